"""What answers look like: OpenAI's objects, whole or as server-sent events."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Sequence
from typing import Any

from pgm_scale.serve.bodies import CompletionBody, ImageBody, InfillBody, StreamOptions
from pgm_scale.serve.service import Service
from pgm_scale.serve.text import Template


class Answer:
    """What all answers to one request have in common."""

    def __init__(
        self, prefix: str, kind: str, service: Service, body: CompletionBody | InfillBody | ImageBody
    ) -> None:
        self.head = {
            "id": f"{prefix}-{uuid.uuid4().hex}",
            "object": kind,
            "created": int(time.time()),
            "model": service.name,
            "seed": body.seed,
        }
        self.n: int = body.n
        options: StreamOptions | None = getattr(body, "stream_options", None)
        self.streams_usage = options is not None and options.include_usage

    def whole(self, choices: list[dict[str, Any]], usage: dict[str, int]) -> dict[str, Any]:
        return self.head | {"choices": choices, "usage": usage}

    def chunk(self, choices: list[dict[str, Any]], usage: dict[str, int] | None = None) -> str:
        return server_sent(self.head | {"choices": choices} | ({"usage": usage} if usage else {}))


def choice_of(number: int, text: str, finish_reason: str | None) -> dict[str, Any]:
    return {"index": number, "text": text, "logprobs": None, "finish_reason": finish_reason}


def usage_of(templates: Sequence[Template], n: int, generated: int) -> dict[str, int]:
    known = sum(len(template.known_L) - 1 - template.generated_tokens for template in templates[::n])
    return {"prompt_tokens": known, "completion_tokens": generated, "total_tokens": known + generated}


def server_sent(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"
