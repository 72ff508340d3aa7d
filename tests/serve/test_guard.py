"""Who may ask, and where the server may listen."""

from __future__ import annotations

from pathlib import Path

import pytest
from served import served

from ssod_edge.errors import UsageError
from ssod_edge.serve.guard import Guard, check_exposure, read_token
from ssod_edge.serve.limits import RefusedError

TOKEN = "a-token-of-some-length"


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "127.1.2.3"])
def test_this_machine_needs_no_token(host: str) -> None:
    check_exposure(host, None, False)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.4", "a.host", ""])
def test_other_machines_need_a_token_or_a_word(host: str) -> None:
    with pytest.raises(
        UsageError, match="--token-file FILE or in SSOD_EDGE_TOKEN, or let everybody in with --insecure"
    ):
        check_exposure(host, None, False)
    check_exposure(host, TOKEN, False)
    check_exposure(host, None, True)


def test_a_token_comes_from_a_file_or_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SSOD_EDGE_TOKEN", raising=False)
    assert read_token(None) is None
    monkeypatch.setenv("SSOD_EDGE_TOKEN", TOKEN)
    assert read_token(None) == TOKEN
    file = tmp_path / "token"
    file.write_text("another-token-in-a-file\n")
    assert read_token(str(file)) == "another-token-in-a-file"


@pytest.mark.parametrize("content", ["", "short", "with blanks in between it", "t\u00f6ken-of-some-length"])
def test_what_is_no_token_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "token").write_text(content)
    with pytest.raises(UsageError, match="at least 16 ASCII characters"):
        read_token(str(tmp_path / "token"))
    with pytest.raises(UsageError, match="cannot be read"):
        read_token(str(tmp_path / "nowhere"))


def test_a_token_is_asked_for(export: Path) -> None:
    with served({"colours": export}, token=TOKEN) as server:
        for header in (
            {},
            {"Authorization": f"Bearer {TOKEN}x"},
            {"Authorization": TOKEN},
            {"Authorization": "Bearer"},
        ):
            answer = server.ask(body=b"x", headers=header)
            assert (answer.status, answer.headers["www-authenticate"]) == (401, "Bearer")
        assert server.ask(body=b"x", headers={"Authorization": f"bearer {TOKEN}"}).status == 422
        assert server.ask("/healthz").status == 200 == server.ask("/readyz").status


def test_the_token_is_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []
    monkeypatch.setattr("hmac.compare_digest", lambda a, b: compared.append((a, b)) or a == b)
    Guard(TOKEN, False).check("/v1/predict", [(b"authorization", b"Bearer " + TOKEN.encode())])
    assert compared == [(TOKEN.encode(), TOKEN.encode())]


def refused(guard: Guard, **headers: str) -> int:
    try:
        guard.check("/v1/predict", [(name.encode(), value.encode()) for name, value in headers.items()])
    except RefusedError as error:
        return error.status
    return 0


@pytest.mark.parametrize("host", ["127.0.0.1:8000", "localhost", "[::1]:8000"])
def test_without_a_token_pages_of_other_sites_are_kept_out(host: str) -> None:
    guard = Guard(None, True)
    assert refused(guard, host=host) == 0 == refused(guard, host=host, origin=f"http://{host}")
    assert refused(guard, host=host, origin="https://evil.example") == 403 == refused(guard, host=host, origin="null")
    assert refused(guard, host="evil.example:8000") == 421 == refused(guard)
    assert refused(Guard(None, False), host="a.host") == 0
    assert refused(Guard(None, False), host="a.host", origin="https://evil.example") == 403
