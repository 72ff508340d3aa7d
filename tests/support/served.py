"""A running server for tests, and a client that sends what it is told."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssod_edge.serve.app import Service, make_app
from ssod_edge.serve.command import listen, make_server, serving
from ssod_edge.serve.guard import Guard
from ssod_edge.serve.limits import Limits
from ssod_edge.serve.models import Keeping


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Served:
    """A server on this machine, in a thread of the test's process."""

    port: int
    service: Service

    def ask(
        self,
        path: str = "/v1/predict",
        body: bytes | None = None,
        method: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Answer:
        """One request on a connection of its own; with a body it is a POST of bytes."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        try:
            given = {} if body is None else {"Content-Type": "application/octet-stream"}
            connection.request(method or ("GET" if body is None else "POST"), path, body, {**given, **(headers or {})})
            response = connection.getresponse()
            return Answer(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read())
        finally:
            connection.close()


def eventually(holds: Callable[[], bool], seconds: float = 15) -> bool:
    """Wait until something holds; whether it did in time."""
    until = time.monotonic() + seconds
    while not (held := holds()) and time.monotonic() < until:
        time.sleep(0.01)
    return held


def say_slowly(engine: Any, seconds: float) -> Callable[..., Any]:
    """A runner's `infer` that takes so long; it counts its runs in `runs`, a list of how many images each had."""
    infer = engine.infer

    def slow(inputs: Mapping[str, Any]) -> Any:
        slow.runs.append(len(inputs["image"]))  # type: ignore[attr-defined]
        time.sleep(seconds)
        return infer(inputs)

    slow.runs = []  # type: ignore[attr-defined]
    engine.infer = slow
    return slow


@contextmanager
def served(
    named: Mapping[str, Path],
    token: str | None = None,
    loopback: bool = True,
    keeping: Keeping | None = None,
    **limits: Any,
) -> Iterator[Served]:
    """Exports by name, served for the time of the block."""
    bounds = Limits(**limits)
    with listen("127.0.0.1", 0) as listener, serving(named, bounds, {}, keeping) as service:
        server = make_server(make_app(service, Guard(token, loopback)), bounds)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            until = time.monotonic() + 20
            while not server.started and time.monotonic() < until:
                time.sleep(0.005)
            yield Served(listener.getsockname()[1], service)
        finally:
            server.should_exit = True
            thread.join(20)
            assert not thread.is_alive(), "the server does not end"


def files_body(files: Mapping[str, bytes], boundary: str = "b0undary") -> tuple[bytes, dict[str, str]]:
    """A multipart body of files by name, and its header."""
    parts = [
        f'--{boundary}\r\nContent-Disposition: form-data; name="image"; filename="{name}"\r\n\r\n'.encode()
        + content
        + b"\r\n"
        for name, content in files.items()
    ]
    body = b"".join(parts) + f"--{boundary}--\r\n".encode()
    return body, {"Content-Type": f"multipart/form-data; boundary={boundary}"}
