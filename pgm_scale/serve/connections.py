"""Connections of clients that speak HTTP badly, slowly or not at all: a typed error, and an end."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from pgm_scale.serve.errors import ApiError

HEAD_S = 10.0  # for the head of a request; one that takes longer takes at most twice as long


class Connection(H11Protocol):
    """uvicorn's, but the head of a request has to arrive in time, and what is no HTTP is answered in JSON."""

    head_s = HEAD_S
    _head_check: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._wait_for_head()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._head_check is not None:
            self._head_check.cancel()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        self._refuse(
            ApiError(400, "the request is not HTTP/1.1, or its head is too long", code="bad_request")
        )

    def _wait_for_head(self) -> None:
        """Look again later whether a request has begun since; uvicorn stops its timer at the first byte."""
        self._head_check = self.loop.call_later(self.head_s, self._check_head, self.cycle)

    def _check_head(self, cycle_before: Any) -> None:
        is_idle = self.cycle is None or self.cycle.response_complete
        if is_idle and self.cycle is cycle_before:
            self._refuse(ApiError(408, "the head of a request did not arrive in time"))
        else:
            self._wait_for_head()

    def _refuse(self, error: ApiError) -> None:
        """Answer if an answer can be sent, and close."""
        content = json.dumps(error.body).encode()
        headers = [("content-type", "application/json"), ("content-length", str(len(content)))]
        events: tuple[h11.Event, ...] = (
            h11.Response(
                status_code=error.status, headers=[*headers, ("connection", "close")], reason=b"Refused"
            ),
            h11.Data(data=content),
            h11.EndOfMessage(),
        )
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE) and not self.transport.is_closing():
            for event in events:
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()
