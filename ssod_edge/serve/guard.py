"""Who may ask: the token, and what keeps a browser's other pages out.

Without a token the server trusts whoever reaches it. A page of another site, open in a browser on this machine, would
reach it too: by a name of its own that leads to 127.0.0.1 (so the Host header must be a loopback name), or by a form
that is sent across sites (so an Origin header must be this server's).
"""

from __future__ import annotations

import hmac
import os
from collections.abc import Iterable
from ipaddress import ip_address
from pathlib import Path

from ssod_edge.errors import UsageError
from ssod_edge.serve.limits import RefusedError

#: The environment variable that holds a token.
VARIABLE = "SSOD_EDGE_TOKEN"
#: Characters of a token: fewer can be tried one by one.
SHORTEST = 16
#: What everybody may ask for: whether it lives, and how to use it.
OPEN = ("/healthz", "/readyz", "/docs", "/openapi.json")

Headers = Iterable[tuple[bytes, bytes]]


class Guard:
    """Refuses requests.

    Args:
        token: that a request must carry; None: none.
        loopback: the server listens on this machine alone.
    """

    def __init__(self, token: str | None, loopback: bool) -> None:
        self._token = None if token is None else token.encode()
        self._loopback = loopback

    @property
    def with_token(self) -> bool:
        return self._token is not None

    def check(self, path: str, headers: Headers) -> None:
        """Raises RefusedError for a request that may not be."""
        found = dict(headers)
        if self._token is not None:
            if path not in OPEN and not self._carries(found.get(b"authorization", b"")):
                message = "a token is required: send it as the header 'Authorization: Bearer TOKEN'"
                raise RefusedError(401, "token", message, {"WWW-Authenticate": "Bearer"})
            return
        host = found.get(b"host", b"").decode("latin-1").lower()
        if self._loopback and not is_loopback(_without_port(host)):
            raise RefusedError(
                421, "host", "this server answers only as localhost or 127.0.0.1. Ask for it by that name"
            )
        origin = found.get(b"origin", b"").decode("latin-1").lower()
        if origin and origin.partition("://")[2] != host:
            raise RefusedError(403, "origin", "a page of another site may not ask this server")

    def _carries(self, header: bytes) -> bool:
        scheme, _, token = header.partition(b" ")
        right = hmac.compare_digest(token.strip(), self._token or b"")
        return right and scheme.lower() == b"bearer"


def _without_port(host: str) -> str:
    return host[1 : host.index("]")] if host.startswith("[") and "]" in host else host.partition(":")[0]


def is_loopback(host: str) -> bool:
    """Whether a name or address is this machine's own, which no other machine reaches."""
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def read_token(file: str | None) -> str | None:
    """The token of a file, else of the environment; None where there is neither.

    Raises:
        UsageError: the file cannot be read, or it is no token.
    """
    where, token = f"the environment variable {VARIABLE}", os.environ.get(VARIABLE, "")
    if file is not None:
        where = f"'{file}'"
        try:
            token = Path(file).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise UsageError(f"the token file {where} cannot be read: {getattr(error, 'strerror', error)}") from error
    elif not token:
        return None
    token = token.strip()
    if len(token) < SHORTEST or not token.isascii() or not token.isprintable() or " " in token:
        raise UsageError(
            f"{where} holds no token: it is at least {SHORTEST} ASCII characters without blanks. Make one with: "
            "python3 -c 'import secrets; print(secrets.token_urlsafe(32))'"
        )
    return token


def check_exposure(host: str, token: str | None, insecure: bool) -> None:
    """Raises UsageError where others could reach the server, and nothing would keep them out."""
    if not is_loopback(host) and token is None and not insecure:
        raise UsageError(
            f"--host {host} lets other machines in: give a token with --token-file FILE or in {VARIABLE}, or let "
            "everybody in with --insecure"
        )
