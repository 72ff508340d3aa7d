"""uvicorn's HTTP with an end to what makes no request: headers without end, a line that stays open, a body that nobody
reads any more."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from ssod_edge.serve.limits import Limits

if TYPE_CHECKING:
    from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

#: Bytes of a request's head.
HEAD = 65_536


def protocol(limits: Limits) -> type[HttpToolsProtocol]:
    """The class of uvicorn's connections, with limits."""
    from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

    class Protocol(HttpToolsProtocol):
        """Closes a connection on which no request is being answered, once it has brought too much, or for too long.

        Between two requests uvicorn's own, shorter, limit holds until the first byte of the next.
        """

        _brought = 0
        _timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._wait()

        def connection_lost(self, exc: Exception | None) -> None:
            super().connection_lost(exc)
            self._answers()

        def data_received(self, data: bytes) -> None:
            drained = self._drains()
            super().data_received(data)
            if self.cycle is not None and not self.cycle.response_complete:
                self._answers()
            elif drained and not self._drains():  # the next request may come
                self._answers()
                self._wait()
            else:
                self._brought += len(data)
                if self._brought > (limits.body if drained else HEAD):
                    self.transport.close()
                self._wait()

        def on_message_complete(self) -> None:
            super().on_message_complete()
            self.cycle.more_body = False

        def on_response_complete(self) -> None:
            super().on_response_complete()
            if self._drains():
                self._wait()

        def _drains(self) -> bool:
            """Whether the rest of a body is awaited that was refused before it was read."""
            return self.cycle is not None and self.cycle.response_complete and self.cycle.more_body

        def _wait(self) -> None:
            if self._timer is None and not self.transport.is_closing():
                self._timer = self.loop.call_later(limits.body_timeout, self.transport.close)

        def _answers(self) -> None:
            self._brought = 0
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

    return Protocol
