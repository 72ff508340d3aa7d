"""The images of a request, out of its body: in memory, within the limits, and never by a path or an address."""

from __future__ import annotations

import asyncio
import unicodedata
from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING

from ssod_edge.serve.limits import Limits, RefusedError, busy

if TYPE_CHECKING:
    from starlette.requests import Request

#: What the body of one image may be called, beside image/...; without a name it is taken for that too.
BYTES = ("application/octet-stream", "")
#: Characters of a file name that is echoed.
LONGEST = 200


class Bodies:
    """Reads bodies; what all of them hold at a time is bounded.

    Attributes:
        held: bytes in memory.
    """

    def __init__(self, limits: Limits) -> None:
        self.limits, self.held = limits, 0

    async def read(self, request: Request, sizes: list[int]) -> list[tuple[str, bytes]]:
        """Each image with its name; what is held for it is added to `sizes`, and is to be given back.

        Raises:
            RefusedError: another kind of body, no image, too large, too slow, or too much is held by now.
        """
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if request.headers.get("content-encoding", "identity").lower() != "identity":
            raise RefusedError(415, "type", "send the body as it is, without Content-Encoding")
        if kind != "multipart/form-data" and kind not in BYTES and not kind.startswith("image/"):
            kinds = "image/..., application/octet-stream or multipart/form-data"
            raise RefusedError(415, "type", f"send the bytes of an image as {kinds}")
        length = request.headers.get("content-length", "")
        if length.isdecimal() and int(length) > self.limits.body:
            raise self._too_large()
        try:
            reading = self._multipart(request, sizes) if kind == "multipart/form-data" else self._bytes(request, sizes)
            return await asyncio.wait_for(reading, self.limits.body_timeout)
        except asyncio.TimeoutError:
            message = f"the body did not arrive within {self.limits.body_timeout:g} seconds"
            raise RefusedError(408, "slow", message, {"Connection": "close"}) from None

    def _too_large(self) -> RefusedError:
        return RefusedError(413, "body", f"a body has at most {self.limits.body} bytes")

    async def _chunks(self, request: Request, sizes: list[int]) -> AsyncGenerator[bytes, None]:
        total = 0
        async for chunk in request.stream():
            total += len(chunk)
            if total > self.limits.body:
                raise self._too_large()
            if self.held + len(chunk) > self.limits.bodies:
                raise busy()
            self.held += len(chunk)
            sizes.append(len(chunk))
            yield chunk

    async def _bytes(self, request: Request, sizes: list[int]) -> list[tuple[str, bytes]]:
        content = b"".join([chunk async for chunk in self._chunks(request, sizes)])
        if not content:
            raise RefusedError(400, "empty", "the body is empty")
        return [("bytes", content)]

    async def _multipart(self, request: Request, sizes: list[int]) -> list[tuple[str, bytes]]:
        from starlette.datastructures import UploadFile
        from starlette.formparsers import MultiPartException, MultiPartParser

        parser = MultiPartParser(
            request.headers, self._chunks(request, sizes), max_files=self.limits.queue, max_fields=0
        )
        parser.spool_max_size = self.limits.body + 1  # nothing is written to a disk
        try:
            form = await parser.parse()
        except (MultiPartException, ValueError) as error:  # of a ValueError: a charset that decodes nothing
            if "Too many files" in getattr(error, "message", ""):
                raise RefusedError(413, "images", f"at most {self.limits.queue} images a request") from None
            raise RefusedError(
                400, "multipart", "a multipart/form-data body must hold files and nothing else"
            ) from None
        found = [
            (clean(part.filename or ""), await part.read())
            for _, part in form.multi_items()
            if isinstance(part, UploadFile)
        ]
        if not found:
            raise RefusedError(400, "empty", "the body holds no file")
        return found


def clean(name: str) -> str:
    """The last part of a file name that a client gave, without control characters; it is shown, and never opened."""
    name = name.replace("\\", "/").rpartition("/")[2]
    name = "".join(c for c in name if unicodedata.category(c)[0] != "C" and c not in "\u2028\u2029")
    return name[:LONGEST] or "image"
