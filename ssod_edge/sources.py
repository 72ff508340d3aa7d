"""What to call a source, such as an address, a camera or a path, so that no secret in it is printed or recorded."""

from __future__ import annotations

import os
import re
import shlex

#: Schemes of buckets and other file systems, from which images are read through fsspec.
BUCKETS = ("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "oci", "oss", "hf", "hdfs", "sftp", "ssh", "memory")
_BUCKET = re.compile(rf"(?:{'|'.join(BUCKETS)})://", re.IGNORECASE)
#: What may sign an address of a bucket; a "?" may be in a pattern, too.
_QUERY = re.compile(r"\?[\w-]+=.*", re.DOTALL)
#: What an address begins with; with a known scheme also where slashes were left out, or `Path` took one away.
_ADDRESS = re.compile(
    r"[a-z][a-z0-9+.-]*://|(?:rtsps?|rtmp[a-z]*|rtp|srt|https?|wss?|udp|tcp|mms|s?ftps?):[/\\]{0,2}", re.IGNORECASE
)
#: USER:PASSWORD@HOST, of which the scheme was left out.
_NO_SCHEME = re.compile(r"/{0,2}[^/\s:=@]+:.*@[\w.-]+(:\d+)?(/|$)", re.DOTALL)
_WORDS = (
    r"(?:user|usr|pw|pass|secret|token|key|auth|cookie|credential|header|proxy|psk|session|sign|bearer|login|apikey)"
)
#: A property whose name says that its value is a secret.
_SECRET = re.compile(_WORDS, re.IGNORECASE)
#: The same in the path of an address, where some cameras take user and password.
_SECRET_PATH = re.compile(rf"(?<![a-z]){_WORDS}|{_WORDS}[a-z]*=", re.IGNORECASE)
#: In running text: an address, whose "//" may have become "/" as in any path, its user and password, which may hold
#: anything, and the address without them.
_SCHEME_IN_TEXT = r"\b([a-z][a-z0-9+.-]+:/{1,2})"
_USER_IN_TEXT = re.compile(rf"{_SCHEME_IN_TEXT}(?:[^\s\"'/:@]+@|[^\s\"']*:[^\s\"']*@|[^\n]*:[^\n]*@)", re.IGNORECASE)
_ADDRESS_IN_TEXT = re.compile(rf"{_SCHEME_IN_TEXT}([^\s\"'<>]+)", re.IGNORECASE)
_PROPERTY_IN_TEXT = re.compile(rf"\b([\w-]*{_WORDS}[\w-]*\s*=\s*)(\"(?:\\.|[^\"\\])*\"?|'[^']*'?|\S+)", re.IGNORECASE)
#: In a pipeline: values that are no secrets, and properties whose text is none.
_PLAIN = re.compile(r"(\(\w+\))?([-+]?[\d./:]+|true|false|\.\.\.)", re.IGNORECASE)
_HARMLESS = frozenset(
    ("device", "location", "uri", "name", "format", "media", "encoding-name", "io-mode", "protocols", "stream-format")
)


def is_bucket(source: str) -> bool:
    """Whether a source is the address of something in a bucket: s3://bucket/photos/1.jpg."""
    return _BUCKET.match(source) is not None


def is_address(source: str) -> bool:
    """Whether a source is written as SCHEME://..., or is meant so: "rtsp:/host", USER:PASSWORD@HOST and no file."""
    if _ADDRESS.match(source) is not None:
        return True
    return _NO_SCHEME.match(source) is not None and not os.path.lexists(source)


def without_secrets(source: str, camera: bool = False) -> str:
    """What to call a source.

    Of an address its user, password and query are left out, and a path that looks as if it held one of them. Of a
    GStreamer pipeline only those values stay that are no secrets: numbers, devices, files, addresses as above. A path
    stays as it is. What was named once may be named again: the result is the same.

    Args:
        source: an address, a pipeline (with a "!" between blanks), or a path.
        camera: it is that of a camera, so that what is no number or device file is a pipeline.
    """
    if is_address(source):
        return _address(source)
    if re.search(r"(^|\s)!(\s|$)", source) or (camera and ("=" in source or "!" in source)):
        return _pipeline(source)
    return source


def scrubbed(text: str) -> str:
    """A message without the secrets of addresses and pipelines that it quotes: the last line of defence."""
    if ":/" in text:
        text = _ADDRESS_IN_TEXT.sub(_address_in_text, _USER_IN_TEXT.sub(r"\1", text))
    return _PROPERTY_IN_TEXT.sub(r"\1...", text) if "!" in text else text


def _address_in_text(match: re.Match[str]) -> str:
    return _address(match[0]) if is_bucket(match[0]) else match[1] + _rest(match[2])


def _address(address: str) -> str:
    if (bucket := _BUCKET.match(address)) is not None:  # whose path is one of files, and no camera's
        host, slash, path = address[bucket.end() :].partition("/")
        return bucket[0] + host.rpartition("@")[2] + slash + _QUERY.sub("?...", path)
    scheme = _ADDRESS.match(address)
    start = scheme.end() if scheme else 0
    return address[:start] + _rest(address[start:])


def _rest(rest: str) -> str:
    """Of an address what follows the scheme."""
    # All up to the last "@" if there is a ":" before it, for a password may hold "/", "?" and "@".
    user, at, host = rest.rpartition("@")
    if at and (":" in user or "/" not in user):
        rest = host
    if (end := re.search(r"[?#\s]", rest)) is not None:
        rest = f"{rest[: end.end()]}..."
    host, slash, path = rest.partition("/")
    return f"{host}/..." if slash and _SECRET_PATH.search(path) else rest


def _pipeline(pipeline: str) -> str:
    try:
        words = shlex.split(pipeline)
    except ValueError:  # a quote that does not end
        return "pipeline"
    shown, in_element = [], False
    for word in words:
        if word == "!":
            in_element = False
        elif is_address(word):
            word = _address(word)
        elif "/" in (caps := word.split(","))[0] and "=" not in caps[0]:
            word = ",".join(_property(field.strip()) for field in caps)
        elif "=" in word:
            word, in_element = _property(word), True
        elif in_element:  # the rest of a value with blanks in it
            word = "..."
        shown.append(word)
    return " ".join(shown)


def _property(text: str) -> str:
    name, equals, value = text.partition("=")
    if not equals or (value and _SECRET.search(name) is None and (name in _HARMLESS or _PLAIN.fullmatch(value))):
        return f"{name}={_address(value)}" if is_address(value) else text
    return f"{name}=..."
