"""What `ssod-edge serve` costs and withstands, with a real client that checks each answer against its image.

python -m ssod_edge.bench.tools.serve EXPORT PHOTOS --requests 100000 --json bench/results/serve.json

The client shares the cores with the server, so that its yardstick is processor time: the server's per image, over that
of `predict_many` in a process of its own, from the same bytes with the same threads. Then come clients that vanish,
twice the load that fits, and a kill under load.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import resource
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import numpy as np

from ssod_edge.bench.tools.command import Tool, json_option, write_rows
from ssod_edge.bench.tools.serve_client import Known, Tally, close, drive, vanish
from ssod_edge.data.sources import open_dataset
from ssod_edge.errors import UsageError, VerificationError
from ssod_edge.machine import available_cores
from ssod_edge.runtime.open import open_runner
from ssod_edge.runtime.predict import Predictor, Verdict

#: Of the images, those that are damaged.
DAMAGED = 0.1


def damage(content: bytes, rng: random.Random) -> bytes:
    """A file cut short, with other bytes in it, or none of any kind."""
    kind = rng.randrange(3)
    if kind == 0:
        return content[: rng.randrange(1, len(content))]
    if kind == 1:
        other = bytearray(content)
        for _ in range(8):
            other[rng.randrange(len(other))] = rng.randrange(256)
        return bytes(other)
    return rng.randbytes(1000)


def read_images(data: str, count: int) -> list[bytes]:
    """The bytes of so many images, evenly spread, of which `DAMAGED` are damaged.

    Raises:
        UsageError: they are no files.
    """
    source, rng = open_dataset(data, labelled=False), random.Random(0)
    indices = np.linspace(0, len(source) - 1, min(count, len(source))).round().astype(int).tolist()
    images = [source.picture(index).content for index in indices]
    if not all(isinstance(image, bytes) for image in images):
        raise UsageError(f"'{data}' holds no image files")
    found = [image for image in images if isinstance(image, bytes)]
    return [damage(image, rng) if rng.random() < DAMAGED else image for image in found]


def judge(
    export: str, images: Sequence[bytes], engine: str, threads: int, batch: int, count: int
) -> tuple[list[Verdict], float]:
    """Without a server: the verdicts, and milliseconds of processor time an image, of `count` after all were judged."""
    with Predictor(open_runner(export, engine=engine, threads=threads)) as predictor:
        verdicts = list(predictor.predict_many(images, batch))
        before = resource.getrusage(resource.RUSAGE_SELF)
        for _ in predictor.predict_many(itertools.islice(itertools.cycle(images), count), batch):
            pass
        after = resource.getrusage(resource.RUSAGE_SELF)
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return verdicts, 1e3 * spent / count


class Server:
    """`ssod-edge serve` in a process of its own."""

    def __init__(self, export: str, threads: int, options: Sequence[str], port: int = 0) -> None:
        command = [sys.executable, "-m", "ssod_edge", "serve", f"m={export}", "--port", str(port)]
        self.process = subprocess.Popen(
            [*command, "--threads", str(threads), *options], stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line.startswith("Serving "):
            raise UsageError(f"the server does not start (exit code {self.process.wait()})")
        self.port = int(line.rpartition(":")[2])

    def cpu_s(self) -> float:
        """Seconds of processor time so far."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def memory_mb(self) -> float:
        """Resident memory."""
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text(encoding="utf-8").split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 1e6

    def stop(self, number: int = signal.SIGTERM) -> int:
        """End it by a signal; returns the exit code."""
        self.process.send_signal(number)
        return self.process.wait(timeout=60)


@contextmanager
def memory_watched(server: Server) -> Iterator[list[float]]:
    """Resident memory of a server, each half second of the block."""
    found: list[float] = []
    ends = threading.Event()

    def look() -> None:
        while not ends.wait(0.5):
            found.append(server.memory_mb())

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield found
    finally:
        ends.set()
        thread.join()


def steady(
    server: Server, known: Sequence[Known], count: int, connections: int, alone: Callable[[], float], rounds: int
) -> dict[str, Any]:
    """So many requests, one after another on each connection, by turns with the same images without a server.

    Args:
        alone: milliseconds of processor time an image, measured anew.
    """
    drive(server.port, known, 4 * connections, connections)  # warm
    tally, taken, without = Tally(), [], []
    for _ in range(rounds):
        without.append(alone())
        before = server.cpu_s()
        drive(server.port, known, count // rounds, connections, tally=tally)
        taken.append(1e3 * (server.cpu_s() - before) / (count // rounds))
    return {
        "what": "steady",
        **tally.to_dict(),
        "server_cpu_ms": taken,
        "predict_many_cpu_ms": without,
        "cpu_ratio": statistics.median(taken) / statistics.median(without),
    }


def vanishing(server: Server, known: Sequence[Known], count: int, connections: int) -> dict[str, Any]:
    """The same beside clients that go away, before or after they have sent all of a request."""
    ends, gone = threading.Event(), [0]
    rude = threading.Thread(target=vanish, args=(server.port, known, ends, gone))
    rude.start()
    with memory_watched(server) as memory:
        tally = drive(server.port, known, count, connections)
    ends.set()
    rude.join()
    tenth = max(1, len(memory) // 10)
    return {
        "what": "vanishing",
        **tally.to_dict(),
        "vanished": gone[0],
        "memory_first_mb": float(np.median(memory[:tenth])) if memory else None,
        "memory_last_mb": float(np.median(memory[-tenth:])) if memory else None,
        "memory_most_mb": max(memory, default=None),
    }


def overload(server: Server, known: Sequence[Known], rate: float, seconds: float, connections: int) -> dict[str, Any]:
    """Requests at a fixed rate, twice what fits, whatever comes back."""
    count = max(connections, round(rate * seconds))
    tally = drive(server.port, known, count, connections, rate)
    return {"what": "overload", "asked_per_s": rate, **tally.to_dict()}


def killed(
    server: Server, known: Sequence[Known], count: int, connections: int, start: Callable[[int], Server]
) -> tuple[Server, dict[str, Any]]:
    """kill -9 in the middle, and a start on the same port: each request is asked again until it is answered."""
    tally = Tally()
    thread = threading.Thread(target=drive, args=(server.port, known, count, connections, None, tally, True))
    thread.start()
    while len(tally.seconds) < count // 3 and thread.is_alive():
        time.sleep(0.01)
    began = time.perf_counter()
    server.stop(signal.SIGKILL)
    server = start(server.port)
    ready = time.perf_counter() - began
    thread.join()
    return server, {"what": "killed", "restart_s": ready, **tally.to_dict()}


@click.command(cls=Tool)
@click.argument("export")
@click.argument("photos")
@click.option(
    "--requests", default=3000, show_default=True, help="Of the steady run and of the one with vanishing clients."
)
@click.option("--images", default=256, show_default=True, help="Different images.")
@click.option("--connections", default=16, show_default=True)
@click.option("--rounds", default=3, show_default=True, help="Of the steady run, by turns with predict_many.")
@click.option("--seconds", default=10.0, show_default=True, help="Of the overload.")
@click.option("--engine", default="auto", show_default=True)
@click.option("--threads", default=available_cores(), show_default=True, help="Of the engine.")
@click.option("--batch", default=8, show_default=True)
@click.option("--wait-ms", default=2.0, show_default=True)
@json_option
def main(
    export: str, photos: str, requests: int, images: int, connections: int, rounds: int, seconds: float, engine: str,
    threads: int, batch: int, wait_ms: float, json_file: Path | None,
) -> None:  # fmt: skip
    """Load a server, and check each answer."""
    contents = read_images(photos, images)
    count = max(requests // rounds, len(contents))
    verdicts, _ = judge(export, contents, engine, threads, batch, 1)
    known = [Known(content, verdict) for content, verdict in zip(contents, verdicts, strict=True)]

    def alone() -> float:
        return judge(export, contents, engine, threads, batch, count)[1]

    def start(port: int = 0) -> Server:
        return Server(export, threads, ["--engine", engine, "--batch", str(batch), "--wait-ms", str(wait_ms)], port)

    server = start()
    rows: list[dict[str, Any]] = []

    def keep(row: dict[str, Any]) -> dict[str, Any]:
        rows.append(row)
        click.echo(json.dumps(row))
        return row

    try:
        keep(steady(server, known, requests, connections, alone, rounds))
        keep(vanishing(server, known, requests, connections))
        keep(overload(server, known, 2 * max(row["per_s"] for row in rows), seconds, 160))
        server, row = killed(server, known, max(requests // 4, 200), connections, start)
        keep(row)
        keep({"what": "stopped", "exit_code": server.stop()})
    finally:
        close(server.process)
    unreadable = sum(one.verdict.error is not None for one in known)
    settings = {"images": len(known), "unreadable": unreadable, "connections": connections}
    write_rows(json_file, "serve", rows, **settings, engine=engine, threads=threads, batch=batch, wait_ms=wait_ms)
    faults = [f"{row[kind]} {kind} ({row['what']})" for row in rows for kind in ("wrong", "lost") if row.get(kind)]
    if faults:
        raise VerificationError(f"answers: {', '.join(faults)}")


if __name__ == "__main__":
    main()
