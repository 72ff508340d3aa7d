"""When a camera or a stream that gives no frame is tried again, and what is said of it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

#: A live source that gives no frame is tried again after each of these pauses: half a minute, and the time that the
#: tries themselves take.
PAUSES_S = (0.1, 0.3, 1.0, 2.0, 4.0, 8.0, 15.0)
#: So many of the tries read from a camera as it is, the others open it anew.
REREADS = 2
#: A source that has been open for so long is well, and gets all tries the next time it fails.
STEADY_S = 10.0
#: After a line about an interruption the next ones are only counted, for so long.
QUIET_S = 60.0


class Retries:
    """The tries of one source; the thread that reads calls it.

    Args:
        name: of the source.
        rereads: tries that read on before the source is opened anew.
        say: takes a line when frames stop coming, and when they come again.

    Attributes:
        interruptions: how often frames have stopped coming so far.
        reopened: how often the source was opened anew.
    """

    def __init__(self, name: str, rereads: int, say: Callable[[str], Any] | None) -> None:
        self._name, self._rereads, self._say = name, rereads, say
        self.interruptions = self.reopened = 0
        self._tries, self._opened = 0, time.monotonic()
        self._lost: float | None = None
        self._said, self._quiet = -math.inf, False

    def pause(self) -> float | None:
        """After a failed read: the seconds to wait before the next try; None if there is none."""
        now = time.monotonic()
        if self._lost is None:
            self._lost = now
            self.interruptions += 1
            self._quiet = now - self._said < QUIET_S
            if not self._quiet:
                self._said = now
                self._tell(f"{self._name} gives no frame; it is tried up to {len(PAUSES_S) - self._tries} times again")
        if self._tries == len(PAUSES_S):
            return None
        self._tries += 1
        return PAUSES_S[self._tries - 1]

    @property
    def opens_anew(self) -> bool:
        """Whether the try after the last pause opens the source anew."""
        return self._tries > self._rereads

    def was_opened(self) -> None:
        """The source was opened anew."""
        self._opened = time.monotonic()
        self.reopened += 1

    def has_frame(self) -> None:
        """A read gave a frame."""
        now = time.monotonic()
        if self._lost is not None:
            if not self._quiet:
                self._tell(f"{self._name} gives frames again, after {now - self._lost:.1f} s")
            self._lost = None
        if self._tries and now - self._opened >= STEADY_S:
            self._tries = 0

    def _tell(self, line: str) -> None:
        if self._say is not None:
            self._say(line)
