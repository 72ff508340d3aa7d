"""The client of `ssod_edge.bench.tools.serve`: connections that stay open, answers that are checked."""

from __future__ import annotations

import http.client
import json
import random
import socket
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ssod_edge.runtime.predict import Verdict

#: A graph's numbers depend on how many images run together, in their last bits.
TOLERANCE = 1e-3
#: Seconds for an answer: more than the server's own limit.
TIMEOUT_S = 60.0
KIND = {"Content-Type": "application/octet-stream"}


@dataclass(frozen=True)
class Known:
    """An image and what is to be said of it."""

    content: bytes
    verdict: Verdict

    def fits(self, status: int, body: bytes) -> bool:
        """Whether an answer is this image's."""
        wanted = self.verdict
        if wanted.error is not None or status != 200:
            return wanted.error is not None and status == 422
        (found,) = json.loads(body)["verdicts"]
        assert wanted.ood_score is not None and wanted.confidence is not None and wanted.threshold is not None
        near = abs(wanted.ood_score - wanted.threshold) < TOLERANCE
        return (
            abs(found["ood_score"] - wanted.ood_score) < TOLERANCE
            and abs(found["confidence"] - wanted.confidence) < TOLERANCE
            and found["class_index"] == wanted.class_index
            and (near or found["known"] == wanted.known)
        )

    def difference(self, body: bytes) -> float:
        """Of the score in an answer from that of `predict_many`."""
        return abs(float(json.loads(body)["verdicts"][0]["ood_score"]) - float(self.verdict.ood_score or 0))


@dataclass
class Tally:
    """What came back.

    Attributes:
        statuses: answers by status, and connections that broke.
        wrong: answers that were another image's.
        difference: the largest of a score.
        seconds, refused: of each answer about the image; of each 429 and 503.
        lost: requests without an answer.
        took: seconds of all of them together.
    """

    statuses: Counter[str] = field(default_factory=Counter)
    wrong: int = 0
    difference: float = 0.0
    seconds: list[float] = field(default_factory=list)
    refused: list[float] = field(default_factory=list)
    lost: int = 0
    took: float = 0.0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, known: Known, status: int, body: bytes, seconds: float) -> None:
        """Check an answer."""
        wrong = status not in (429, 503) and not known.fits(status, body)
        with self.lock:
            self.statuses[str(status)] += 1
            self.wrong += wrong
            if status == 200 and not wrong:
                self.difference = max(self.difference, known.difference(body))
            (self.refused if status in (429, 503) else self.seconds).append(seconds)

    def to_dict(self) -> dict[str, Any]:
        """For the record; times are in milliseconds."""
        found: dict[str, Any] = {
            "statuses": dict(sorted(self.statuses.items())),
            "wrong": self.wrong,
            "score_difference": self.difference,
            "lost": self.lost,
        }
        for name, values in (("answer", self.seconds), ("refusal", self.refused)):
            for percent in (50, 99):
                found[f"{name}_p{percent}_ms"] = 1e3 * float(np.percentile(values, percent)) if values else None
        return {**found, "per_s": len(self.seconds) / self.took if self.took else None, "took_s": self.took}


def drive(
    port: int,
    known: Sequence[Known],
    count: int,
    connections: int,
    rate: float | None = None,
    tally: Tally | None = None,
    again: bool = False,
) -> Tally:
    """Send `count` requests over several connections.

    Args:
        rate: requests a second that are begun, whatever comes back; None: each connection sends one after another.
        tally: that is added to.
        again: ask again where the connection broke, until there is an answer; else such a request is lost.
    """
    tally = Tally() if tally is None else tally
    numbers, lock, began = iter(range(count)), threading.Lock(), time.perf_counter()

    def work() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_S)
        while True:
            with lock:
                number = next(numbers, None)
            if number is None:
                break
            if rate is not None:
                time.sleep(max(0.0, began + number / rate - time.perf_counter()))
            _ask(connection, known[number % len(known)], tally, again)
        connection.close()

    threads = [threading.Thread(target=work) for _ in range(connections)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    tally.took += time.perf_counter() - began
    return tally


def _ask(connection: http.client.HTTPConnection, known: Known, tally: Tally, again: bool) -> None:
    until = time.perf_counter() + TIMEOUT_S
    while True:
        began = time.perf_counter()
        try:
            connection.request("POST", "/v1/predict", known.content, KIND)
            response = connection.getresponse()
            body = response.read()
        except (OSError, http.client.HTTPException):
            connection.close()
            if again and time.perf_counter() < until:
                with tally.lock:
                    tally.statuses["broken"] += 1
                time.sleep(0.05)
                continue
            with tally.lock:
                tally.lost += 1
            return
        tally.add(known, response.status, body, time.perf_counter() - began)
        return


def vanish(port: int, known: Sequence[Known], ends: threading.Event, gone: list[int]) -> None:
    """Be a client that goes away, again and again: in the head, in the body, or before the answer."""
    rng = random.Random(0)
    while not ends.wait(0.02):
        content = rng.choice(known).content
        head = f"POST /v1/predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(content)}\r\n\r\n".encode()
        whole = head + content
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
            connection.sendall(whole[: rng.choice((20, len(head) + len(content) // 2, len(whole)))])
            gone[0] += 1


def close(process: subprocess.Popen[str]) -> None:
    """End a process that may have ended."""
    process.kill()
    process.wait()
    if process.stdout is not None:
        process.stdout.close()
