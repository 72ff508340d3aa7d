"""What a source is called: nowhere does a secret of an address or a pipeline stand."""

from __future__ import annotations

from pathlib import Path

import pytest

from ssod_edge.sources import is_address, scrubbed, without_secrets

CSI = (
    "nvarguscamerasrc sensor-id=0 ! video/x-raw(memory:NVMM),width=1280,height=720,framerate=30/1 ! nvvidconv ! "
    "video/x-raw, format=BGRx ! videoconvert ! video/x-raw,format=BGR ! appsink drop=1 sync=false"
)


@pytest.mark.parametrize(
    ("source", "shown"),
    [
        ("rtsp://host:554/a", "rtsp://host:554/a"),
        ("rtsp://user:SECRET@host:554/a", "rtsp://host:554/a"),
        ("rtsps://user:SEC/RET@host/a", "rtsps://host/a"),
        ("rtsp://user:SEC@RET@host/a", "rtsp://host/a"),
        ("rtsp://user:SEC?RET#@host/a", "rtsp://host/a"),
        ("rtsp://user:SEC'RET@host/a", "rtsp://host/a"),
        ('rtsp://user:SEC" RET@host/a', "rtsp://host/a"),
        ("RTSP://SECRET@host/a", "RTSP://host/a"),
        ("ftp://user:SECRET@host/a.jpg", "ftp://host/a.jpg"),
        ("s3://KEYSECRET:SECRET@bucket/a", "s3://bucket/a"),
        ("https://host/a.m3u8?token=SECRET&b=1#SECRET", "https://host/a.m3u8?..."),
        ("srt://host:9000?passphrase=SECRET", "srt://host:9000?..."),
        ("rtmps://host/live/a?key=SECRET", "rtmps://host/live/a?..."),
        ("rtmp://host/live/a pubUser=x pubPasswd=SECRET", "rtmp://host/live/a ..."),
        ("rtsp://cam/user=admin_password=SECRET_channel=1.sdp", "rtsp://cam/..."),
        ("rtsp://cam/live/admin;streamkey=SECRET", "rtsp://cam/..."),
        ("http://host/@somebody/monkey.mp4", "http://host/@somebody/monkey.mp4"),
        (CSI, CSI),
        (
            'rtspsrc location=rtsp://u:SECRET@host/a user-pw=SECRET user-id="SEC RET" ! appsink',
            "rtspsrc location=rtsp://host/a user-pw=... user-id=... ! appsink",
        ),
        ("souphttpsrc location='http://h/a?b=SECRET' x='SEC RET' ! x", "souphttpsrc location=http://h/a?... x=... ! x"),
        ('rtspsrc user-pw="SEC\\"RET" ! x', "rtspsrc user-pw=... ! x"),
        ("rtspsrc user-pw=SEC!RET ! x", "rtspsrc user-pw=... ! x"),
        ("rtspsrc latency=0 user-pw=SEC RET ! x", "rtspsrc latency=0 user-pw=... ... ! x"),
        ('rtspsrc user-pw="SECRET ! x', "pipeline"),
        ('souphttpsrc extra-headers="a,Authorization=(string)SECRET" ! x', "souphttpsrc extra-headers=... ! x"),
        ("x ! application/x-srtp, srtp-key=(buffer)SECRET ! y", "x ! application/x-srtp, srtp-key=... ! y"),
        ("tcpclientsrc psk=SECRET host=SECRET ! x", "tcpclientsrc psk=... host=... ! x"),
        ("camera rtspsrc user-pw=SECRET ! appsink", "camera rtspsrc user-pw=... ! appsink"),
        ("camera /dev/video0", "camera /dev/video0"),
        ("rtsp:/user:SECRET@host/a", "rtsp:/host/a"),
        ("rtsp:user:SECRET@host/a", "rtsp:host/a"),
        ("http:\\\\user:SECRET@host/a", "http:\\\\host/a"),
        ("user:SECRET@host:554/a", "host:554/a"),
        ("//user:SEC/RET@host", "host"),
        ("http://host/bearer/SECRET", "http://host/..."),
        ("photos/mail@home.jpg", "photos/mail@home.jpg"),
        ("photos/12:30@gate.jpg", "photos/12:30@gate.jpg"),
        ("photos/key=3/a!b.mp4", "photos/key=3/a!b.mp4"),
    ],
)  # fmt: skip
def test_a_source_is_named_without_its_secrets(source: str, shown: str) -> None:
    assert without_secrets(source) == shown
    assert without_secrets(shown) == shown, "what was named once may be named again"
    assert "SEC" not in shown and "RET" not in shown


@pytest.mark.parametrize(
    ("camera", "shown"),
    [
        ("0", "0"),
        ("/dev/video0", "/dev/video0"),
        ("rtspsrc location=rtsp://u:SECRET@h user-pw=SECRET", "rtspsrc location=rtsp://h user-pw=..."),
        ("user-pw=SECRET", "user-pw=..."),
        ("rtspsrc user-pw=SECRET!appsink", "rtspsrc user-pw=..."),
    ],
)
def test_of_a_camera_a_pipeline_may_lack_its_marks(camera: str, shown: str) -> None:
    assert without_secrets(camera, camera=True) == shown


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("error: 'ftp://u:SECRET@h/a?b=SECRET' is not there", "error: 'ftp://h/a?...' is not there"),
        ("error: 'rtsp://u:SEC'RET@h/a' is not there", "error: 'rtsp://h/a' is not there"),
        ('got "x user-pw=SECRET ! y"', 'got "x user-pw=... ! y"'),
        ("error: 'ftp:/u:SECRET@h/a' is not there", "error: 'ftp:/h/a' is not there"),
        ("error: 'ftp:/u:SE CRET@h/a' is not there", "error: 'ftp:/h/a' is not there"),
        ("no such file: 'a?b=c@d.jpg'", "no such file: 'a?b=c@d.jpg'"),
        ("class 'key = 3' is not there", "class 'key = 3' is not there"),
    ],
)
def test_a_message_is_printed_without_secrets(message: str, shown: str) -> None:
    assert scrubbed(message) == shown


def test_a_file_that_is_there_is_no_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert is_address("12:30@gate.jpg") and without_secrets("12:30@gate.jpg") == "gate.jpg"
    Path("12:30@gate.jpg").touch()
    assert not is_address("12:30@gate.jpg") and without_secrets("12:30@gate.jpg") == "12:30@gate.jpg"


def test_an_address_begins_with_a_scheme() -> None:
    assert is_address("x-a+b.c://h") and is_address("FTP://h")
    assert not any(map(is_address, ("photos/a://b", "://h", "1://h", "a:/b")))
