"""The `serve` command: opens exports, listens, and ends in peace."""

from __future__ import annotations

import logging
import os
import re
import signal
import socket
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssod_edge.errors import EXIT_OK, UsageError
from ssod_edge.machine import available_cores
from ssod_edge.optional import require
from ssod_edge.serve.guard import Guard, check_exposure, is_loopback, read_token
from ssod_edge.serve.limits import Limits
from ssod_edge.terminal import tell

if TYPE_CHECKING:
    import uvicorn

    from ssod_edge.serve.app import Service
    from ssod_edge.serve.models import Keeping

#: What a model may be called: it stands in addresses and in metrics.
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
#: Connections that are answered; the next ones get 503.
CONNECTIONS = 512
#: Seconds that an idle connection stays open: longer than proxies keep theirs, which is 60 in nginx.
KEEP_ALIVE_S = 65


@dataclass(frozen=True)
class ServeOptions:
    """Where the server listens, and to whom.

    Attributes:
        host, port: 0 is any port that is free.
        token_file: a file with the token that requests carry.
        insecure: let other machines in without one.
        collect, monitor: see `ssod_edge.serve.models.Keeping`; NAME=PATH, or of one model a path.
        collect_most, collect_mb: its budget.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    token_file: str | None = None
    insecure: bool = False
    collect: tuple[str, ...] = ()
    monitor: tuple[str, ...] = ()
    collect_most: int = 500
    collect_mb: float = 200.0


def run_serve(exports: Sequence[str], options: ServeOptions, limits: Limits, **opening: Any) -> int:
    """Serve exports until SIGTERM or Ctrl-C; returns the exit code.

    Args:
        exports: NAME=FOLDER, or FOLDER.
        opening: options of `ssod_edge.runtime.open.open_runner`.

    Raises:
        MissingExtraError: a package of the extra `serve` is not installed.
        UsageError: no such export, two of one name, no token where one is needed, or the address is taken.
        ArtifactError, EngineError, VerificationError: see `open_runner`.
    """
    require(("starlette", "uvicorn", "httptools", "python_multipart", "prometheus_client"), "ssod-edge serve")
    from ssod_edge.serve.app import make_app
    from ssod_edge.serve.models import Keeping

    token = read_token(options.token_file)
    check_exposure(options.host, token, options.insecure)
    named = name_exports(exports)
    keeping = Keeping(
        name_paths("--collect", options.collect, named),
        name_paths("--monitor", options.monitor, named),
        options.collect_most,
        options.collect_mb,
    )
    with listen(options.host, options.port) as listener, serving(named, limits, opening, keeping) as service:
        app = make_app(service, Guard(token, is_loopback(options.host)))
        server = make_server(app, limits)

        def end(*_: object) -> None:
            server.should_exit = True

        # Before it listens to signals itself, and after: when it is done, it raises the one that ended it again.
        before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            tell(f"Serving {', '.join(named)} at http://{_shown(options.host)}:{listener.getsockname()[1]}")
            server.run(sockets=[listener])
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    return EXIT_OK


@contextmanager
def serving(
    named: Mapping[str, Path], limits: Limits, opening: Mapping[str, Any], keeping: Keeping | None = None
) -> Iterator[Service]:
    """Open exports, by name, for the time of the block; errors as `run_serve`."""
    from ssod_edge.serve.app import Service
    from ssod_edge.serve.metrics import Metrics
    from ssod_edge.serve.models import Keeping, Model

    with ThreadPoolExecutor(min(8, available_cores()), thread_name_prefix="decode") as decoders:
        metrics = Metrics()
        shared = (opening, keeping or Keeping(), limits, decoders, log, metrics)
        yield Service({name: Model(name, folder, *shared) for name, folder in named.items()}, limits, metrics)


def name_exports(exports: Sequence[str]) -> dict[str, Path]:
    """Name -> folder of exports that are given as NAME=FOLDER, or as a folder, whose name is taken.

    Raises:
        UsageError: two of one name, or a name that cannot stand in an address.
    """
    found: dict[str, Path] = {}
    for text in exports:
        name, equals, folder = text.partition("=")
        if not equals or os.path.isdir(text):
            folder = text
            path = Path(os.path.abspath(text))
            name = path.parent.name if path.name == "export" else path.name  # runs/NAME/export
        if not NAME.fullmatch(name):
            raise UsageError(f"'{name}' cannot be a model's name: letters, digits and ._- only; give NAME=EXPORT")
        if name in found:
            raise UsageError(f"two exports are called '{name}'; give NAME=EXPORT")
        found[name] = Path(folder)
    return found


def name_paths(option: str, given: Sequence[str], names: Iterable[str]) -> dict[str, str]:
    """Model -> path of an option that is given as NAME=PATH, or of the only model as a path.

    Raises:
        UsageError: no such model, no model is named where there are several, or two paths for one.
    """
    names, found = list(names), {}
    for text in given:
        name, equals, path = text.partition("=")
        if len(names) == 1 and (not equals or name not in names):
            name, path = names[0], text
        if name not in names or not path:
            raise UsageError(f"{option} {text}: give NAME=PATH for one of the models {', '.join(names)}")
        if name in found:
            raise UsageError(f"{option} is given twice for '{name}'")
        found[name] = path
    return found


def log(line: str) -> None:
    """One line on standard error."""
    tell(" ".join(line.split()), err=True)


class _Log(logging.Handler):
    """What the HTTP library has to say, each in a line."""

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if record.exc_info and record.exc_info[1] is not None:
            error = record.exc_info[1]
            text = f"{text.strip()}: {type(error).__name__}: {error}"
        log(f"{record.levelname.lower()}: {text}")


def _shown(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens.

    Raises:
        UsageError: the address is taken, or none of this machine.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(address[:2], family=family, backlog=1024)
    except (OSError, OverflowError) as error:
        # Python's own text of a taken address names the address again.
        number = None if isinstance(error, socket.gaierror) else getattr(error, "errno", None)
        reason = os.strerror(number) if number else getattr(error, "strerror", None) or error
        raise UsageError(f"cannot listen on {_shown(host)}:{port} ({reason}). Give another --host or --port") from error


def make_server(app: Any, limits: Limits) -> uvicorn.Server:
    """The server of an app; it tells nobody what it is."""
    import uvicorn

    from ssod_edge.serve.protocol import protocol

    for name in ("uvicorn.error", "asyncio"):  # errors alone: clients could fill the log with warnings
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [_Log(logging.ERROR)], False
    logging.getLogger("python_multipart").setLevel(logging.ERROR)
    config = uvicorn.Config(
        app,
        http=protocol(limits),
        ws="none",
        lifespan="on",
        log_config=None,
        log_level="warning",
        access_log=False,
        proxy_headers=False,
        server_header=False,
        limit_concurrency=CONNECTIONS,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=max(1, round(limits.stop_timeout)),
    )
    return uvicorn.Server(config)
