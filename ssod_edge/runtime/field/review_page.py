"""The page of `review`: a server for this machine alone, that ends when somebody presses "Finish" or Ctrl-C.

It listens on 127.0.0.1. Without the token in the address, which is new each time, nobody gets anything, and the Host
header must be this server's, so that a name on the Internet that leads to 127.0.0.1 is no way in. What is asked for is
looked up among the collected images; no path comes from outside.
"""

from __future__ import annotations

import io
import json
import os
import secrets
import sys
import threading
import webbrowser
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from importlib.resources import files
from pathlib import Path
from socketserver import ThreadingTCPServer
from typing import Any
from urllib.parse import unquote

from ssod_edge.config import Preprocess
from ssod_edge.data.pixels import load_image
from ssod_edge.errors import EXIT_OK, ImageError, SsodEdgeError, UsageError
from ssod_edge.files import exclusive
from ssod_edge.json_reader import from_json, parse_json
from ssod_edge.runtime.field.review import CLASSES, reviewing
from ssod_edge.runtime.field.review_draft import Draft, Step
from ssod_edge.terminal import tell

HOST = "127.0.0.1"
#: Pixels of the longer side: of an image in a sheet, and of one that is looked at.
SIDES = {"thumb": 360, "image": 1600}
#: Bytes of a request: tens of thousands of names.
MOST = 2 << 20
#: Pictures that are decoded at a time.
AT_ONCE = 2


@dataclass(frozen=True)
class Asked:
    """What the page sends: a step (None: the end), and of which state it is meant (`Draft.changes`)."""

    changes: int
    step: Step | None = None


class StaleError(UsageError):
    """The page shows a state that is no longer true: another page has changed it."""


def run_page(folder: str, out: str | None, port: int, browser: bool) -> int:
    """Serve the page until it is finished; returns the exit code.

    Args:
        folder: of what was collected.
        out: where classes go; None is `CLASSES` in the folder.
        port: 0 is any that is free.
        browser: open one, where there is a screen.

    Raises:
        UsageError: nothing was collected there; its groups are folders already; the port is taken.
        BusyError: another process reviews it.
        OutputError: a file cannot be written.
        MissingExtraError: scikit-learn is not installed.
    """
    with reviewing(folder) as place:
        with exclusive(place):
            draft = Draft(place, Path(out) if out else place / CLASSES)
        try:
            server = Server(draft, port)
        except (OSError, OverflowError) as error:
            raise UsageError(f"cannot listen on {HOST}:{port} ({error}). Give another --port, or none") from error
        with server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            if draft.note:
                tell(f"note: {draft.note}")
            tell(f"Review at {server.address}")
            tell("Ctrl-C ends it too; what was decided is kept as a draft.", err=True)
            if browser and has_screen():
                with suppress(webbrowser.Error):
                    webbrowser.open(server.address)
            try:
                server.finished.wait()
            finally:
                server.shutdown()
                with server.lock:  # a step that is being taken, or the end
                    if draft.decided and not server.finished.is_set():
                        tell(f"The draft is kept. Go on with: ssod-edge review {folder}", err=True)
        for line in server.report:
            tell(line)
    return EXIT_OK


def has_screen() -> bool:
    """Whether a browser would have a window; without, some would take the terminal."""
    return sys.platform == "darwin" or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


class Server(ThreadingTCPServer):
    """Serves one draft. (`ThreadingHTTPServer` would ask the network for this machine's name first.)

    Attributes:
        address: of the page, with the token.
        lock: held by whoever reads or changes the draft.
        finished: set once the draft was carried out; `report` then has the lines.
    """

    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, draft: Draft, port: int):
        super().__init__((HOST, port), Handler)
        self.draft, self.token = draft, secrets.token_urlsafe(24)
        port = int(self.server_address[1])
        self.hosts = {f"{name}{end}" for name in (HOST, "localhost") for end in (f":{port}", *([""] * (port == 80)))}
        self.address = f"http://{HOST}:{port}/{self.token}/"
        self.lock, self.decoding = threading.Lock(), threading.Semaphore(AT_ONCE)
        self.finished = threading.Event()
        self.report: list[str] = []

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A page that was closed while it read is no error."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)

    def state(self) -> dict[str, Any]:
        """What the page shows, but for `images`."""
        draft = self.draft
        given, said = draft.names()
        piles = [
            {"kind": kind, "name": name, "files": names, "said": draft.said_of(names)}
            for (kind, name), names in draft.piles().items()
        ]
        return {
            "changes": draft.changes, "touched": draft.touched, "undo": draft.decided, "piles": piles,
            "given": given, "known": said,
        }  # fmt: skip

    def images(self) -> dict[str, Any]:
        """Of each image with a line: what the model said of it, and where it comes from."""
        keys = ("class_name", "confidence", "known", "p_known", "source", "frame", "time")
        return {file: {key: getattr(line, key) for key in keys} for file, line in self.draft.lines.items()}

    def take(self, asked: Asked) -> dict[str, Any]:
        """Take a step; returns the new state."""
        self._check(asked)
        if asked.step is None:
            raise UsageError("a step is missing")
        self.draft.step(asked.step)
        return self.state()

    def finish(self, asked: Asked) -> dict[str, Any]:
        """Carry the draft out."""
        self._check(asked)
        with exclusive(self.draft.folder):
            self.report = self.draft.finish()
        return {"report": self.report}

    def _check(self, asked: Asked) -> None:
        if self.finished.is_set():
            raise StaleError("the review is finished")
        if asked.changes != self.draft.changes:
            raise StaleError("another page of this review has changed it; this one shows it now. Nothing was done")


class Handler(BaseHTTPRequestHandler):
    """One request. An error is an object with the key `error`."""

    server: Server
    server_version, sys_version = "ssod-edge", ""
    #: Seconds that a client may keep quiet.
    timeout = 60

    def do_GET(self) -> None:
        wanted = self._wanted()
        if wanted is None:
            return
        kind, _, name = wanted.partition("/")
        if wanted == "":
            self._send(HTTPStatus.OK, page(), "text/html; charset=utf-8")
        elif wanted == "state":
            with self.server.lock:
                self._say(HTTPStatus.OK, {**self.server.state(), **self._place(), "images": self.server.images()})
        elif kind in SIDES and unquote(name) in self.server.draft:
            self._picture(self.server.draft.folder / unquote(name), SIDES[kind])
        else:
            self._say(HTTPStatus.NOT_FOUND, {"error": "there is nothing of that name"})

    def do_POST(self) -> None:
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or int(length) > MOST:
            self._say(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, {"error": f"a request has a length, of at most {MOST}"})
            return
        body = self.rfile.read(int(length))  # also of what is refused: else the connection breaks before the answer
        wanted = self._wanted()
        if wanted in ("step", "finish"):
            self._change(body, self.server.finish if wanted == "finish" else self.server.take)
        elif wanted is not None:
            self._say(HTTPStatus.NOT_FOUND, {"error": "there is nothing of that name"})

    def _change(self, body: bytes, change: Callable[[Asked], dict[str, Any]]) -> None:
        with self.server.lock:
            try:
                code, answer = HTTPStatus.OK, change(from_json(Asked, parse_json(body), defaults=True))
            except StaleError as error:
                code, answer = HTTPStatus.CONFLICT, {"error": str(error)}
            except UsageError as error:
                code, answer = HTTPStatus.BAD_REQUEST, {"error": str(error)}
            except (SsodEdgeError, OSError) as error:  # a full disk: it can be tried again
                code, answer = HTTPStatus.INTERNAL_SERVER_ERROR, {"error": str(error)}
            self._say(code, answer)
            if "report" in answer:  # not before it is said: then the process ends
                self.server.finished.set()

    def _wanted(self) -> str | None:
        """What is asked for, below the token; None where it is refused, which is then said."""
        parts = self.path.split("/", 2)  # "", the token, the rest
        if self.headers.get("Host") not in self.server.hosts:
            own = " or ".join(sorted(self.server.hosts))
            self._say(
                HTTPStatus.FORBIDDEN, {"error": f"this is {own}. Through ssh -L, use the same port on both sides"}
            )
        elif len(parts) < 3 or not secrets.compare_digest(parts[1].encode(), self.server.token.encode()):
            self._say(HTTPStatus.FORBIDDEN, {"error": "open the whole address that ssod-edge review has printed"})
        else:
            return parts[2]
        return None

    def _place(self) -> dict[str, str]:
        return {"folder": str(self.server.draft.folder), "out": str(self.server.draft.out)}

    def _picture(self, path: Path, side: int) -> None:
        try:
            with self.server.decoding:
                content = picture(path, side)
        except ImageError as error:
            self._say(HTTPStatus.NOT_FOUND, {"error": str(error)})
        else:
            self._send(HTTPStatus.OK, content, "image/jpeg")

    def _say(self, code: HTTPStatus, answer: dict[str, Any]) -> None:
        self._send(code, json.dumps(answer).encode(), "application/json")

    def _send(self, code: HTTPStatus, content: bytes, kind: str) -> None:
        headers = {
            "Content-Type": kind,
            "Content-Length": str(len(content)),
            "Cache-Control": "no-store",  # no picture stays in the browser's files
            "Content-Security-Policy": "default-src 'none'; img-src 'self' data:; connect-src 'self'; base-uri 'none'; "
            "style-src 'unsafe-inline'; script-src 'unsafe-inline'; form-action 'none'; frame-ancestors 'none'",
            "Referrer-Policy": "no-referrer",
            "X-Content-Type-Options": "nosniff",
            "Cross-Origin-Resource-Policy": "same-origin",
        }
        with suppress(ConnectionError, TimeoutError):  # the page was closed
            self.send_response(code)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: the terminal is for the report."""


def page() -> bytes:
    """The page, which needs nothing else."""
    return files("ssod_edge.runtime.field").joinpath("review.html").read_bytes()


def picture(path: Path, side: int) -> bytes:
    """A JPEG of an image, upright and whole, whose longer side has at most so many pixels.

    Raises:
        ImageError: it cannot be read.
    """
    image = load_image(path, Preprocess(input_size=side, fit="pad"))
    image.thumbnail((side, side))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=85)
    return file.getvalue()
