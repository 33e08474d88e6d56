"""The HTTP side: endpoints, errors, streams, and what happens when a client leaves or time is up.

`stream: true` answers with server-sent events in OpenAI's shape. A PGM decodes its tokens in any order: `text` of a
chunk goes on from left to right as soon as a prefix is complete, and `tokens` of a chunk lists all that were
decoded since the chunk before, with their `position` in the answer (0 is its first token) and `text`, in the order
of decoding. All `text` put together is the text of the answer without streaming.
"""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from pgm_scale.sampling.stepwise import Row
from pgm_scale.serve.bodies import Body, CompletionBody, ImageBody, InfillBody, parse_body
from pgm_scale.serve.engine import Event, Generation
from pgm_scale.serve.errors import ApiError, unavailable
from pgm_scale.serve.metering import Metering
from pgm_scale.serve.page import PAGE
from pgm_scale.serve.service import Service
from pgm_scale.serve.text import LeftToRight, Template, answer_of, hole_texts

_METHODS = {405: "use another method for this path", 404: "no such path; GET / shows those there are"}


class ClientLeft(Exception):
    """Nobody waits for this answer any more."""


class EventStream(StreamingResponse):
    """Server-sent events; `at_end` is called once all are sent or the client has left, even before the first."""

    def __init__(self, content: AsyncIterator[str], at_end: Callable[[], None]) -> None:
        super().__init__(content, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self.at_end = at_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.at_end()


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


class Handlers:
    """The endpoints that generate."""

    def __init__(self, service: Service) -> None:
        self.service = service

    async def completions(self, request: Request) -> Response:
        body = await self._body(request, CompletionBody)
        templates, rows = self.service.completion_rows(body)
        answer = _Answer("cmpl", "text_completion", self.service, body)
        stop_token = self.service.vocabulary.eos_id
        readers = self._readers(templates, stop_token, body.stop)
        context = [self._context(template) if body.echo else "" for template in templates]
        if body.stream:
            return self._stream(answer, rows, readers, context, stop_token)
        generation = await self._finished(request, rows, stop_token)
        tokenizer = self._tokenizer
        choices, used = [], 0
        for number, template in enumerate(templates):
            text = answer_of(template, generation.tokens[number], tokenizer, stop_token, body.stop)
            used += text.tokens
            choices.append(_choice(number, context[number] + text.text, text.finish_reason))
        return JSONResponse(answer.whole(choices, _usage(templates, body.n, used)))

    async def infill(self, request: Request) -> Response:
        body = await self._body(request, InfillBody)
        templates, rows = self.service.infill_rows(body)
        answer = _Answer("infill", "infill", self.service, body)
        if body.stream:
            readers = self._readers(templates, None)
            return self._stream(answer, rows, readers, [""] * len(rows), None)
        generation = await self._finished(request, rows, None)
        choices, used = [], 0
        for number, (template, tokens_L) in enumerate(zip(templates, generation.tokens, strict=True)):
            text = answer_of(template, tokens_L, self._tokenizer, None)
            used += text.tokens
            holes = hole_texts(template, tokens_L, self._tokenizer)
            choices.append(_choice(number, text.text, text.finish_reason) | {"holes": holes})
        return JSONResponse(answer.whole(choices, _usage(templates, body.n, used)))

    async def images(self, request: Request) -> Response:
        body = await self._body(request, ImageBody)
        rows = self.service.image_rows(body)
        images = self.service.images
        assert images is not None, "rows would have been refused"
        generation = await self._finished(request, rows, None)
        pngs = await asyncio.to_thread(images.pngs, generation.tokens)
        data = [
            {"b64_json": png, "class": images.name_of(row.label or 0), "class_number": row.label}
            for png, row in zip(pngs, rows, strict=True)
        ]
        answer = _Answer("img", "images", self.service, body)
        return JSONResponse(answer.head | {"data": data})

    @property
    def _tokenizer(self) -> Any:
        assert self.service.text is not None, "rows would have been refused"
        return self.service.text.tokenizer

    async def _body(self, request: Request, kind: type[Body]) -> Body:
        self.service.engine.check_ready()
        most = self.service.settings.max_body_bytes
        content = bytearray()
        try:
            async with asyncio.timeout(self.service.settings.timeout_s):
                async for part in request.stream():
                    content += part
                    if len(content) > most:
                        raise ApiError(413, f"the body has more than {most} bytes", code="too_large")
        except TimeoutError:
            raise ApiError(408, "the body did not arrive in time") from None
        except ClientDisconnect:
            raise ClientLeft from None
        body = parse_body(bytes(content), kind)
        self.service.check_model(body.model)
        return body

    def _readers(
        self, templates: Sequence[Template], stop_token: int | None, stops: Sequence[str] = ()
    ) -> list[LeftToRight]:
        return [LeftToRight(template, self._tokenizer, stop_token, stops) for template in templates]

    def _context(self, template: Template) -> str:
        return self._tokenizer.decode(
            template.known_L[1 : template.first].tolist(), skip_special_tokens=False
        )

    async def _finished(self, request: Request, rows: list[Row], stop_token: int | None) -> Generation:
        """The generation when all of it is decoded; its slots are free whatever happens.

        Raises:
            ApiError: it failed, or time is up.
            ClientLeft: the client has closed its connection.
        """
        generation = Generation(rows, stop_token, streams=False)
        self.service.engine.submit(generation)
        drained = asyncio.create_task(_drain(generation))
        left = asyncio.create_task(_disconnected(request))
        try:
            done, _ = await asyncio.wait(
                {drained, left},
                timeout=self.service.settings.timeout_s,
                return_when=asyncio.FIRST_COMPLETED,
            )
            if drained in done:
                drained.result()
                return generation
            if left in done:
                raise ClientLeft
            raise self._time_is_up()
        finally:
            self.service.engine.cancel(generation)
            for task in (drained, left):
                task.cancel()

    def _stream(
        self,
        answer: _Answer,
        rows: list[Row],
        readers: list[LeftToRight],
        context: list[str],
        stop_token: int | None,
    ) -> Response:
        generation = Generation(rows, stop_token, streams=True)
        self.service.engine.submit(generation)  # refused here, it still has a status of its own
        chunks = self._chunks(generation, answer, readers, context)
        return EventStream(chunks, lambda: self.service.engine.cancel(generation))

    async def _chunks(
        self,
        generation: Generation,
        answer: _Answer,
        readers: list[LeftToRight],
        context: list[str],
    ) -> AsyncIterator[str]:
        deadline_s = asyncio.get_running_loop().time() + self.service.settings.timeout_s
        try:
            for number, text in enumerate(context):
                if text:
                    yield answer.chunk([_choice(number, text, None)])
            async with asyncio.timeout_at(deadline_s):
                async for events in generation.events():
                    choices = [
                        choice for event in events if (choice := self._streamed(event, readers)) is not None
                    ]
                    if choices:
                        yield answer.chunk(choices)
                    if all(reader.finish_reason for reader in readers):
                        break
            yield "data: [DONE]\n\n"
        except TimeoutError:
            yield _event(self._time_is_up().body)
        except ApiError as error:
            yield _event(error.body)
        except (asyncio.CancelledError, GeneratorExit):
            self.service.metrics.disconnects.inc()
            raise

    def _streamed(self, event: Event, readers: list[LeftToRight]) -> dict[str, Any] | None:
        number, positions, tokens = event
        reader = readers[number]
        if reader.finish_reason:
            return None
        text = reader.take(positions, tokens)
        first = reader.template.first
        decoded = [
            {"position": position - first, "text": self._tokenizer.decode([token], skip_special_tokens=False)}
            for position, token in zip(positions, tokens, strict=True)
        ]
        return _choice(number, text, reader.finish_reason or None) | {"tokens": decoded}

    def _time_is_up(self) -> ApiError:
        return unavailable(f"no answer within {self.service.settings.timeout_s:g} s; try again later")


class _Answer:
    """What all answers to one request have in common."""

    def __init__(self, prefix: str, kind: str, service: Service, body: Any) -> None:
        self.head = {
            "id": f"{prefix}-{uuid.uuid4().hex}",
            "object": kind,
            "created": int(time.time()),
            "model": service.name,
            "seed": body.seed,
        }

    def whole(self, choices: list[dict[str, Any]], usage: dict[str, int]) -> dict[str, Any]:
        return self.head | {"choices": choices, "usage": usage}

    def chunk(self, choices: list[dict[str, Any]]) -> str:
        return _event(self.head | {"choices": choices})


def _choice(number: int, text: str, finish_reason: str | None) -> dict[str, Any]:
    return {"index": number, "text": text, "logprobs": None, "finish_reason": finish_reason}


def _usage(templates: Sequence[Template], n: int, generated: int) -> dict[str, int]:
    known = sum(len(template.known_L) - 1 - template.generated_tokens for template in templates[::n])
    return {"prompt_tokens": known, "completion_tokens": generated, "total_tokens": known + generated}


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


async def _drain(generation: Generation) -> None:
    async for _ in generation.events():
        pass


async def _disconnected(request: Request) -> None:
    """Returns when the client has closed its connection; the body must have been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


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
