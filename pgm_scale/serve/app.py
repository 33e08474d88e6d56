"""The application: its paths, what it says of itself, and errors as answers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response
from starlette.exceptions import HTTPException

from pgm_scale.serve.errors import ApiError
from pgm_scale.serve.handlers import ClientLeft, Handlers
from pgm_scale.serve.metering import Metering
from pgm_scale.serve.page import PAGE
from pgm_scale.serve.service import Service

_METHODS = {405: "use another method for this path", 404: "no such path; GET / shows those there are"}


def create_app(service: Service) -> FastAPI:
    """The application; its engine starts with it, and stops with it."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.engine.start()
        yield
        service.engine.stop()
        await asyncio.to_thread(service.engine.join, service.settings.grace_s)

    app = FastAPI(title="pgm-scale", docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)
    app.state.metrics = service.metrics
    app.add_middleware(Metering, metrics=service.metrics)
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(ClientLeft, _client_left)
    app.add_exception_handler(Exception, _our_bug)
    _add_generation(app, Handlers(service))
    _add_information(app, service)
    return app


def _add_generation(app: FastAPI, handlers: Handlers) -> None:
    for path, handler in (
        ("/v1/completions", handlers.completions),
        ("/v1/infill", handlers.infill),
        ("/v1/images", handlers.images),
    ):
        app.add_route(path, handler, methods=["POST"])


def _add_information(app: FastAPI, service: Service) -> None:
    async def models(_: Request) -> Response:
        about = {"id": service.name, "object": "model", "created": 0, "owned_by": "pgm-scale"}
        extension = {
            "length_tokens": service.length,
            "samplers": service.kinds,
            "steps": service.sampler.steps,
        }
        return JSONResponse({"object": "list", "data": [about | extension]})

    async def health(_: Request) -> Response:
        if service.engine.state == "failed":
            raise ApiError(500, "the model cannot be used; see the server's log", code="model_failed")
        return JSONResponse({"status": "alive"})

    async def ready(_: Request) -> Response:
        service.engine.check_ready()
        return JSONResponse({"status": "ready"})

    async def metrics(_: Request) -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def page(_: Request) -> Response:
        return HTMLResponse(PAGE)

    routes = {"/v1/models": models, "/health": health, "/ready": ready, "/metrics": metrics, "/": page}
    for path, handler in routes.items():
        app.add_route(path, handler, methods=["GET"])


async def _api_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return JSONResponse(error.body, error.status, headers=error.headers)


async def _http_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = _METHODS.get(error.status_code, str(error.detail))
    answer = ApiError(error.status_code, message)
    return JSONResponse(answer.body, error.status_code, headers=error.headers)


async def _client_left(request: Request, _: Exception) -> Response:
    request.app.state.metrics.disconnects.inc()
    return Response(status_code=499)  # nobody reads it; the metrics do


async def _our_bug(_: Request, error: Exception) -> Response:
    answer = ApiError(500, "the server has a bug; see its log", code="bug")
    return JSONResponse(answer.body, 500)
