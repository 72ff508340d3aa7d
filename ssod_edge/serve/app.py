"""The pages of the server: what is asked for, and what is answered."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any

from ssod_edge.runtime.predict import Verdict
from ssod_edge.serve.bodies import Bodies
from ssod_edge.serve.guard import Guard
from ssod_edge.serve.lane import Asked
from ssod_edge.serve.limits import Limits, RefusedError
from ssod_edge.serve.metrics import Metrics
from ssod_edge.serve.models import Model
from ssod_edge.serve.pages import POLICY, docs, openapi

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.types import ASGIApp, Receive, Scope, Send


class Service:
    """What the pages do.

    Args:
        models: by name.
        limits: of requests.
        metrics: of all of it.
    """

    def __init__(self, models: Mapping[str, Model], limits: Limits, metrics: Metrics) -> None:
        self.models, self.limits, self.metrics = models, limits, metrics
        self._bodies = Bodies(limits)
        metrics.watch(models)

    @asynccontextmanager
    async def running(self, _app: object = None) -> AsyncIterator[None]:
        """The time in which the server answers."""
        for model in self.models.values():
            model.lane.start()
        following = [asyncio.ensure_future(model.follow()) for model in self.models.values()]
        try:
            yield
        finally:
            for task in following:
                task.cancel()
            await asyncio.gather(*following, return_exceptions=True)
            for model in self.models.values():
                await asyncio.to_thread(model.stop)

    async def healthz(self, _request: Request) -> Response:
        """The process lives."""
        return answer({"status": "ok"})

    async def readyz(self, _request: Request) -> Response:
        """Every model answers."""
        ready = all(model.lane.alive for model in self.models.values())
        return answer({"status": "ready" if ready else "not ready"}, 200 if ready else 503)

    async def list_models(self, _request: Request) -> Response:
        """What answers, and since when."""
        return answer({"models": [model.facts() for model in self.models.values()]})

    async def show_metrics(self, _request: Request) -> Response:
        """For Prometheus."""
        from starlette.responses import Response

        text, kind = self.metrics.text()
        return Response(text, media_type=kind)

    async def predict(self, request: Request) -> Response:
        """Verdicts on the images of the body."""
        began = time.monotonic()
        model = self._model(request.path_params.get("name"))
        model.lane.check_room()  # before the body is read
        sizes: list[int] = []
        try:
            images = await self._bodies.read(request, sizes)
            asked = model.lane.admit(images)
            verdicts = await self._wait(request, asked, began + self.limits.timeout)
        finally:
            self._bodies.held -= sum(sizes)
        if is_alone(request) and verdicts[0].error is not None:
            too_large = asked.jobs[0].too_large
            raise RefusedError(413 if too_large else 422, "pixels" if too_large else "image", verdicts[0].error)
        self.metrics.took(model.name, time.monotonic() - began)
        version = asked.jobs[0].opened.predictor.runner.spec.version
        return answer({"model": model.name, "version": version, "verdicts": [v.to_dict() for v in verdicts]})

    def _model(self, name: str | None) -> Model:
        if name is None and len(self.models) == 1:
            return next(iter(self.models.values()))
        if name is None:
            raise RefusedError(404, "model", "name a model: /v1/models/NAME/predict; /v1/models lists them")
        if name not in self.models:
            raise RefusedError(404, "model", "there is no model of that name; /v1/models lists them")
        return self.models[name]

    async def _wait(self, request: Request, asked: Asked, until: float) -> list[Verdict]:
        """The verdicts, while the client waits for them and there is time."""
        gone: asyncio.Future[None] = asyncio.ensure_future(_disconnected(request))
        try:
            left = max(0.0, until - time.monotonic())
            both: list[asyncio.Future[Any]] = [asked.answer, gone]
            await asyncio.wait(both, timeout=left, return_when=asyncio.FIRST_COMPLETED)
        finally:
            asked.gone = not asked.answer.done()
            left_us = gone.done()
            gone.cancel()
        if asked.gone:
            reason = "gone" if left_us else "timeout"
            raise RefusedError(503, reason, "it took too long; try again", {"Retry-After": "1"})
        verdicts = asked.answer.result()
        if verdicts is None:
            raise RefusedError(503, "engine", "the model failed; the log of the server says why")
        return verdicts


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def is_alone(request: Request) -> bool:
    """Whether the body of a request was one image, and no form."""
    return not request.headers.get("content-type", "").lower().startswith("multipart/")


def answer(content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """A JSON answer, which no cache keeps."""
    from starlette.responses import Response

    body = json.dumps(content, allow_nan=False).encode()
    shared = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}
    return Response(body, status, {**shared, **(headers or {})}, "application/json")


def refusal(error: RefusedError) -> Response:
    """The answer to a request that gets no verdict."""
    return answer({"error": str(error)}, error.status, error.headers)


class Guarded:
    """The pages behind a guard."""

    def __init__(self, app: ASGIApp, guard: Guard, metrics: Metrics) -> None:
        self._app, self._guard, self._metrics = app, guard, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        from starlette.requests import ClientDisconnect

        if scope["type"] == "http":
            try:
                self._guard.check(scope["path"], scope["headers"])
            except RefusedError as error:
                self._metrics.refuse(error.reason)
                await refusal(error)(scope, receive, send)
                return
        with suppress(ClientDisconnect):
            await self._app(scope, receive, send)


def make_app(service: Service, guard: Guard) -> Starlette:
    """The pages of a service."""
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.middleware import Middleware
    from starlette.responses import Response
    from starlette.routing import Route

    async def refuse(_request: Request, error: Any) -> Response:
        service.metrics.refuse(error.reason)
        return refusal(error)

    async def http(_request: Request, error: Any) -> Response:
        words = {404: "there is no such page", 405: "not by this method"}
        return answer({"error": words.get(error.status_code, "bad request")}, error.status_code, error.headers)

    async def failed(_request: Request, _error: Exception) -> Response:
        return answer({"error": "the server failed; its log says more"}, 500)

    described = openapi(service.limits, guard.with_token)

    async def show_openapi(_request: Request) -> Response:
        return answer(described)

    async def show_docs(_request: Request) -> Response:
        headers = {"Content-Security-Policy": POLICY, "Referrer-Policy": "no-referrer", "Cache-Control": "no-store"}
        return Response(docs(), 200, headers, "text/html")

    app = Starlette(
        routes=[
            Route("/openapi.json", show_openapi),
            Route("/docs", show_docs),
            Route("/healthz", service.healthz),
            Route("/readyz", service.readyz),
            Route("/metrics", service.show_metrics),
            Route("/v1/models", service.list_models),
            Route("/v1/predict", service.predict, methods=["POST"]),
            Route("/v1/models/{name}/predict", service.predict, methods=["POST"]),
        ],
        middleware=[Middleware(Guarded, guard=guard, metrics=service.metrics)],
        exception_handlers={RefusedError: refuse, HTTPException: http, Exception: failed},
        lifespan=service.running,
    )
    app.router.redirect_slashes = False
    return app
