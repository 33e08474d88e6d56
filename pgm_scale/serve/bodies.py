"""What the bodies of requests may say; OpenAI's names where it has them.

Sizes that depend on the model are checked where rows are made (`text`, `images`).
"""

from __future__ import annotations

import json
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.functional_validators import AfterValidator, BeforeValidator

from pgm_scale.serve.errors import ApiError

_MAX_COUNT = 1 << 20
_MAX_SEED = (1 << 63) - 1


def _prompts(value: Any) -> list[str | list[int]]:
    """One or several texts or lists of token ids."""
    items = value if isinstance(value, list) and not _is_tokens(value) else [value]
    for item in items:
        if isinstance(item, str):
            _characters(item)
        elif not _is_tokens(item):
            raise ValueError("give a string, a list of strings, or lists of token ids")
    if not items:
        raise ValueError("give at least one prompt; an empty string is one")
    return items


def _characters(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("half of a surrogate pair is no character") from None
    return text


def _is_tokens(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(item) is int for item in value)


def _stops(value: Any) -> list[str]:
    return [] if value is None else [value] if isinstance(value, str) else value


def _hot_or_greedy(value: float) -> float:
    if 0 < value < 0.01:
        raise ValueError("give 0 for the likeliest tokens, or at least 0.01")
    return value


Text = Annotated[str, AfterValidator(_characters)]
Temperature = Annotated[float, Field(ge=0, le=100), AfterValidator(_hot_or_greedy)]
TopP = Annotated[float, Field(gt=0, le=1)]
Count = Annotated[int, Field(ge=1, le=_MAX_COUNT)]
StopText = Annotated[str, Field(min_length=1, max_length=100)]
Stop = Annotated[list[StopText], BeforeValidator(_stops), Field(max_length=4)]
Prompts = Annotated[list[str | list[int]], BeforeValidator(_prompts)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class _SamplingBody(_Body):
    """Fields that all endpoints know; None is the model's own setting."""

    model: str | None = None
    n: Count = 1
    seed: Annotated[int, Field(ge=-_MAX_SEED, le=_MAX_SEED)] | None = None
    temperature: Temperature | None = None
    top_p: TopP | None = None
    top_k: Annotated[int, Field(ge=0, le=_MAX_COUNT)] | None = None
    steps: Count | None = None
    sampler: str | None = None
    user: str | None = None


class StreamOptions(_Body):
    """`include_usage`: a last chunk without choices tells how many tokens there were."""

    include_usage: bool = False


class CompletionBody(_SamplingBody):
    """`/v1/completions`; `steps`, `sampler` and `top_k` are ours. `refuse` names what no model here can do."""

    prompt: Prompts = [""]
    max_tokens: Count = 16
    stop: Stop = Field(default_factory=list)
    stream: bool = False
    stream_options: StreamOptions | None = None
    echo: bool = False
    logprobs: int | bool | None = None
    suffix: str | None = None
    best_of: int | None = None
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: dict[str, float] | None = None

    def refuse(self) -> None:
        """Raises:
        ApiError: 400, something is asked that no model here can do.
        """
        if self.logprobs:  # 0 and false ask for none of the alternatives
            raise _unsupported("logprobs", "probabilities are not served; leave it out")
        if self.suffix:
            raise _unsupported("suffix", "POST /v1/infill takes text on both sides of a hole")
        if self.best_of not in (None, self.n):
            raise _unsupported("best_of", "ask for n completions and choose yourself")
        for name in ("frequency_penalty", "presence_penalty", "logit_bias"):
            if getattr(self, name):
                raise _unsupported(name, "leave it out")


class Segment(_Body):
    """Either known text or a hole of so many tokens."""

    text: Text | None = None
    hole: Count | None = None


class InfillBody(_SamplingBody):
    """`/v1/infill`: a `template` in which {N} stands for N tokens to generate, or a list of `segments`."""

    template: Text | None = None
    segments: Annotated[list[Segment], Field(min_length=1)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None


class ImageBody(_SamplingBody):
    """`/v1/images`: n images of each class, by number, name, or null for no class."""

    classes: Annotated[list[int | str | None], Field(min_length=1)] | None = None
    guidance: Annotated[float, Field(ge=0, le=1000)] | None = None


Body = TypeVar("Body", CompletionBody, InfillBody, ImageBody)


def parse_body(content: bytes, kind: type[Body]) -> Body:
    """Raises:
    ApiError: 400, no JSON object; 422, a field is wrong, with one message that names it.
    """
    try:
        tree = json.loads(content, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        reason = "nested too deep" if isinstance(error, RecursionError) else str(error)
        raise ApiError(400, f"the body is not JSON: {reason[:200]}", code="invalid_json") from None
    if not isinstance(tree, dict):
        raise ApiError(400, "the body must be a JSON object", code="invalid_json")
    try:
        # null is OpenAI's way to leave a field out
        return kind.model_validate({name: value for name, value in tree.items() if value is not None})
    except (ValidationError, RecursionError) as error:
        raise _wrong_field(error) from None


def _wrong_field(error: ValidationError | RecursionError) -> ApiError:
    if isinstance(error, RecursionError):
        return ApiError(422, "the body is nested too deep")
    problems = error.errors(include_url=False, include_context=False, include_input=False)
    first, more = problems[0], len(problems) - 1
    field = str(first["loc"][0])[:100].encode(errors="replace").decode() if first["loc"] else None
    reason = first["msg"].removeprefix("Value error, ")  # pydantic's name for what validators raise
    message = f"{field}: {reason}" + (f" (and {more} more problems)" if more else "")
    return ApiError(422, message, param=field, code="invalid_value")


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")


def _unsupported(name: str, hint: str) -> ApiError:
    return ApiError(400, f"{name} is not supported: {hint}", param=name, code="unsupported")
