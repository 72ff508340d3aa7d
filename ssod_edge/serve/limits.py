"""What a request may be and take, and the error that refuses one."""

from __future__ import annotations

from dataclasses import dataclass, fields

from ssod_edge.errors import UsageError


@dataclass(frozen=True)
class Limits:
    """What a client may ask for.

    Attributes:
        batch: images per run of the engine, at most.
        wait_ms: for how long a run waits for images that are being decoded.
        queue: images of a model that may be inside, from the upload to the verdict; also of one request.
        max_mb: of a request's body, in millions of bytes.
        max_megapixels: of one image, in millions.
        timeout: seconds from a request's first line to its answer.
        body_timeout: seconds for its body.
        stop_timeout: seconds that are left to what is in flight when the server is stopped.
    """

    batch: int = 8
    wait_ms: float = 2.0
    queue: int = 64
    max_mb: float = 20.0
    max_megapixels: float = 50.0
    timeout: float = 30.0
    body_timeout: float = 10.0
    stop_timeout: float = 10.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not 0 <= value < float("inf") or (value == 0 and field.name != "wait_ms"):
                raise UsageError(f"--{field.name.replace('_', '-')} must be a number above 0, got {value}")

    @property
    def body(self) -> int:
        """Bytes of a request's body."""
        return int(self.max_mb * 1e6)

    @property
    def bodies(self) -> int:
        """Bytes of all bodies that are in memory at a time."""
        return max(16 * self.body, 256_000_000)

    @property
    def pixels(self) -> int:
        """Of one image."""
        return int(self.max_megapixels * 1e6)


class RefusedError(Exception):
    """A request gets no verdict. The message is for the client: nothing of this machine is in it.

    Attributes:
        status: of HTTP.
        reason: one word for the metrics.
        headers: of the answer, beside the usual ones.
    """

    def __init__(self, status: int, reason: str, message: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.reason, self.headers = status, reason, headers or {}


def busy(message: str = "too many images are waiting; try again") -> RefusedError:
    """The error of a full queue."""
    return RefusedError(429, "queue", message, {"Retry-After": "1"})
