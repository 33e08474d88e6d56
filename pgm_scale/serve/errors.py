"""Errors as OpenAI's clients know them: a status, and one JSON object with one message."""

from __future__ import annotations

from typing import Any

# `type` of the error object, by status.
_TYPES = {429: "rate_limit_error", 500: "server_error", 503: "server_error"}


class ApiError(Exception):
    """A request that is refused or failed.

    400 this model cannot do it, or it is not JSON; 404 no such path or model; 405 another method is needed; 408 the
    body did not arrive; 413 too long; 422 a field is wrong; 429 the queue is full; 500 the model failed; 503
    starting, stopping or timed out.

    Attributes:
        param: the field that is to blame.
        code: for programs.
        retry_after_s: sent as Retry-After.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.retry_after_s = retry_after_s

    @property
    def body(self) -> dict[str, Any]:
        kind = _TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        return {} if self.retry_after_s is None else {"Retry-After": str(self.retry_after_s)}


def unavailable(message: str) -> ApiError:
    return ApiError(503, message, code="unavailable", retry_after_s=1)
