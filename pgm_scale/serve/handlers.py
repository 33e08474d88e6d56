"""The endpoints that generate, and what happens when a client leaves, reads nothing, or time is up.

`stream: true` answers with server-sent events in OpenAI's shape. A PGM decodes its tokens in any order: `text` of a
chunk goes on from left to right as soon as a prefix is complete, and `tokens` of a chunk lists all that were
decoded since the chunk before, with their `position` in the answer (0 is its first token) and `text`, in the order
of decoding. All `text` put together is the text of the answer without streaming.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.requests import ClientDisconnect
from starlette.types import Message, Receive, Scope, Send

from pgm_scale.sampling.stepwise import Row
from pgm_scale.serve.answers import Answer, choice_of, server_sent, usage_of
from pgm_scale.serve.bodies import Body, CompletionBody, ImageBody, InfillBody, parse_body
from pgm_scale.serve.engine import Event, Generation
from pgm_scale.serve.errors import ApiError, unavailable
from pgm_scale.serve.service import Service
from pgm_scale.serve.text import LeftToRight, Template, answer_of, hole_texts


class ClientLeft(Exception):
    """Nobody waits for this answer any more."""


class EventStream(StreamingResponse):
    """Server-sent events; `at_end` is called once all are sent or the client has left, even before the first.

    A client that takes nothing for `stall_s` seconds has left, too.
    """

    def __init__(self, content: AsyncIterator[str], at_end: Callable[[], None], stall_s: float) -> None:
        super().__init__(content, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self.at_end, self.stall_s = at_end, stall_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_in_time(message: Message) -> None:
            async with asyncio.timeout(self.stall_s):
                await send(message)

        try:
            await super().__call__(scope, receive, send_in_time)
        except (TimeoutError, ClientDisconnect):
            await self.body_iterator.aclose()  # type: ignore[attr-defined]  # it counts who has left
        finally:
            self.at_end()


class Handlers:
    """The endpoints that generate."""

    def __init__(self, service: Service) -> None:
        self.service = service

    async def completions(self, request: Request) -> Response:
        body = await self._body(request, CompletionBody)
        templates, rows = self.service.completion_rows(body)
        answer = Answer("cmpl", "text_completion", self.service, body)
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
            choices.append(choice_of(number, context[number] + text.text, text.finish_reason))
        return JSONResponse(answer.whole(choices, usage_of(templates, body.n, used)))

    async def infill(self, request: Request) -> Response:
        body = await self._body(request, InfillBody)
        templates, rows = self.service.infill_rows(body)
        answer = Answer("infill", "infill", self.service, body)
        if body.stream:
            readers = self._readers(templates, None)
            return self._stream(answer, rows, readers, [""] * len(rows), None)
        generation = await self._finished(request, rows, None)
        choices, used = [], 0
        for number, (template, tokens_L) in enumerate(zip(templates, generation.tokens, strict=True)):
            text = answer_of(template, tokens_L, self._tokenizer, None)
            used += text.tokens
            holes = hole_texts(template, tokens_L, self._tokenizer)
            choices.append(choice_of(number, text.text, text.finish_reason) | {"holes": holes})
        return JSONResponse(answer.whole(choices, usage_of(templates, body.n, used)))

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
        answer = Answer("img", "images", self.service, body)
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
        answer: Answer,
        rows: list[Row],
        readers: list[LeftToRight],
        context: list[str],
        stop_token: int | None,
    ) -> Response:
        generation = Generation(rows, stop_token, streams=True)
        self.service.engine.submit(generation)  # refused here, it still has a status of its own
        chunks = self._chunks(generation, answer, readers, context)
        at_end = partial(self.service.engine.cancel, generation)
        return EventStream(chunks, at_end, self.service.settings.timeout_s)

    async def _chunks(
        self,
        generation: Generation,
        answer: Answer,
        readers: list[LeftToRight],
        context: list[str],
    ) -> AsyncIterator[str]:
        deadline_s = asyncio.get_running_loop().time() + self.service.settings.timeout_s
        try:
            for number, text in enumerate(context):
                if text:
                    yield answer.chunk([choice_of(number, text, None)])
            async for events in _until(deadline_s, generation.events()):
                choices = [
                    choice for event in events if (choice := self._streamed(event, readers)) is not None
                ]
                if choices:
                    yield answer.chunk(choices)
                if all(reader.finish_reason for reader in readers):
                    break
            if answer.streams_usage:
                generated = sum(reader.generated_tokens for reader in readers)
                templates = [reader.template for reader in readers]
                yield answer.chunk([], usage_of(templates, answer.n, generated))
            yield "data: [DONE]\n\n"
        except TimeoutError:
            yield server_sent(self._time_is_up().body)
        except ApiError as error:
            yield server_sent(error.body)
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
        return choice_of(number, text, reader.finish_reason or None) | {"tokens": decoded}

    def _time_is_up(self) -> ApiError:
        return unavailable(f"no answer within {self.service.settings.timeout_s:g} s; try again later")


async def _until(deadline_s: float, events: AsyncIterator[list[Event]]) -> AsyncIterator[list[Event]]:
    """The events; a TimeoutError at the deadline while one is awaited, never while a slow client takes one.

    (A timeout around the yield would cancel the task that sends, and leave the connection to nobody.)
    """
    while True:
        async with asyncio.timeout_at(deadline_s):
            item = await anext(events, None)
        if item is None:
            return
        yield item


async def _drain(generation: Generation) -> None:
    async for _ in generation.events():
        pass


async def _disconnected(request: Request) -> None:
    """Returns when the client has closed its connection; the body must have been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
