"""Counts and times every request, streams included."""

from __future__ import annotations

import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pgm_scale.serve.metrics import Metrics

_ENDPOINTS = (
    "/v1/completions",
    "/v1/infill",
    "/v1/images",
    "/v1/models",
    "/health",
    "/ready",
    "/metrics",
    "/",
)


class Metering:
    """ASGI middleware; paths that we do not have are counted together."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started_s, status = time.perf_counter(), 500

        async def noting_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, noting_send)
        finally:
            endpoint = scope["path"] if scope["path"] in _ENDPOINTS else "other"
            self.metrics.requests.labels(endpoint, str(status)).inc()
            self.metrics.request_s.labels(endpoint).observe(time.perf_counter() - started_s)
