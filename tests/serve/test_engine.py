"""The queue and its thread, with a decoding that the test drives step by step."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import pytest

from pgm_scale.config import SamplerConfig
from pgm_scale.sampling.stepwise import Decoded, Row
from pgm_scale.serve.engine import Engine, Event, Generation
from pgm_scale.serve.errors import ApiError
from pgm_scale.serve.metrics import Metrics
from pgm_scale.serve.settings import ServeSettings
from tests.serve.tiny_service import wait_for

MASK, STOP = 99, 0


def row_of(unknown: int, seed: int = 1) -> Row:
    return Row(np.array([7] + [-1] * unknown), seed, 0, SamplerConfig())


class FakeDecoding:
    """One token of each row a step, from left to right: 10 + its position; each step waits for `go`."""

    def __init__(self, slots: int) -> None:
        self.slots, self.held = slots, dict[Row, int]()
        self.go, self.steps = threading.Semaphore(0), 0
        self.batches: list[list[Row]] = []
        self.token_of: Callable[[Row, int], int] = lambda row, position: 10 + position
        self.joined: Callable[[Row], None] = lambda row: None

    @property
    def rows(self) -> list[Row]:
        return list(self.held)

    next_rows = rows

    @property
    def free_slots(self) -> int:
        return self.slots - len(self.held)

    def join(self, row: Row) -> None:
        self.joined(row)
        assert self.free_slots > 0
        self.held[row] = 1

    def leave(self, row: Row) -> None:
        self.held.pop(row, None)

    def step(self) -> list[Decoded]:
        assert self.go.acquire(timeout=30)
        self.steps += 1
        self.batches.append(self.rows)
        return [self._advance(row) for row in self.rows]

    def _advance(self, row: Row) -> Decoded:
        position = self.held[row]
        self.held[row] += 1
        is_finished = position + 1 == len(row.known_L)
        token = self.token_of(row, position)
        if is_finished:
            self.leave(row)
        return Decoded(row, [position], [token], is_finished)

    def allow(self, steps: int) -> None:
        self.go.release(steps)


@asynccontextmanager
async def engine_of(
    decoding: FakeDecoding, gathers: bool = False, **settings: Any
) -> AsyncIterator[tuple[Engine, Metrics]]:
    metrics = Metrics()
    engine = Engine(lambda: decoding, MASK, ServeSettings(**settings), metrics, gathers)
    engine.start()
    wait_for(lambda: engine.state == "ready")
    try:
        yield engine, metrics
    finally:
        decoding.allow(10_000)
        engine.stop()
        await asyncio.to_thread(engine.join, 30)
        assert engine.state == "stopped"


def submitted(engine: Engine, *unknown: int, streams: bool = False, stop: int | None = None) -> Generation:
    generation = Generation([row_of(count) for count in unknown], stop, streams)
    engine.submit(generation)
    return generation


async def finish(generation: Generation) -> list[list[Event]]:
    async with asyncio.timeout(30):
        return [events async for events in generation.events()]


async def test_rows_join_between_steps_and_leave_when_finished() -> None:
    decoding = FakeDecoding(slots=2)
    async with engine_of(decoding) as (engine, _):
        long, short, third = (submitted(engine, count) for count in (4, 1, 2))
        await asyncio.to_thread(wait_for, lambda: len(decoding.held) == 2)
        decoding.allow(1)
        await finish(short)
        await asyncio.to_thread(wait_for, lambda: third.rows[0] in decoding.held)
        decoding.allow(3)
        assert await finish(long) == await finish(third) == []
        first = [set(batch) for batch in decoding.batches]
        assert first[0] == {long.rows[0], short.rows[0]} or first[0] == {long.rows[0]}
        assert {long.rows[0], third.rows[0]} in first
        assert long.tokens[0].tolist() == [7, 11, 12, 13, 14]


async def test_a_stream_hears_of_each_step() -> None:
    decoding = FakeDecoding(slots=4)
    decoding.allow(100)
    async with engine_of(decoding) as (engine, _):
        heard = await finish(submitted(engine, 2, 3, streams=True))
        events = sorted(event for part in heard for event in part)
        assert events == [(0, [1], [11]), (0, [2], [12]), (1, [1], [11]), (1, [2], [12]), (1, [3], [13])]


async def test_a_stop_token_at_the_end_of_the_prefix_ends_a_row_early() -> None:
    decoding = FakeDecoding(slots=1)
    decoding.token_of = lambda row, position: STOP if position == 2 else 5
    decoding.allow(2)
    async with engine_of(decoding) as (engine, _):
        generation = submitted(engine, 50, stop=STOP)
        await finish(generation)
        assert generation.tokens[0][:4].tolist() == [7, 5, STOP, -1]
        assert decoding.steps == 2


async def test_the_queue_is_bounded_and_says_so() -> None:
    decoding = FakeDecoding(slots=2)
    async with engine_of(decoding, max_batch_sequences=2, max_queue_sequences=3) as (engine, metrics):
        accepted = [submitted(engine, 1, 1), submitted(engine, 1, 1)]
        with pytest.raises(ApiError) as caught:
            submitted(engine, 1, 1)
        assert (caught.value.status, caught.value.headers) == (429, {"Retry-After": "1"})
        accepted.append(submitted(engine, 1))
        await asyncio.to_thread(wait_for, lambda: engine.active_sequences == 2)
        assert engine.queued_sequences == 3
        assert metrics.registry.get_sample_value("pgm_scale_queue_sequences") == 3
        decoding.allow(10)
        for generation in accepted:
            await finish(generation)
        assert engine.queued_sequences == 0


async def test_cancelled_rows_leave_the_queue_at_once_and_their_slots_after_the_step() -> None:
    decoding = FakeDecoding(slots=1)
    async with engine_of(decoding) as (engine, _):
        running, waiting, last = submitted(engine, 9), submitted(engine, 9), submitted(engine, 1)
        await asyncio.to_thread(wait_for, lambda: decoding.held)
        engine.cancel(waiting)
        assert engine.queued_sequences == 1
        engine.cancel(running)
        decoding.allow(2)
        await finish(last)
        assert decoding.steps == 2
        assert decoding.batches[1] == last.rows
        engine.cancel(last)  # finished: nothing to do
        await finish_one_more(engine, decoding)


async def finish_one_more(engine: Engine, decoding: FakeDecoding) -> None:
    decoding.allow(1)
    await finish(submitted(engine, 1))


async def test_an_exception_in_the_model_fails_the_rows_of_its_step_only() -> None:
    decoding = FakeDecoding(slots=1)

    def token_of(row: Row, position: int) -> int:
        if row.seed == 13:
            raise RuntimeError("the model is broken")
        return 5

    decoding.token_of = token_of
    async with engine_of(decoding) as (engine, _):
        bad = Generation([row_of(3, seed=13), row_of(3)], None, streams=False)
        engine.submit(bad)
        good = submitted(engine, 2)
        decoding.allow(10)
        with pytest.raises(ApiError) as caught:
            await finish(bad)
        assert caught.value.status == 500
        assert "broken" not in caught.value.message
        await finish(good)
        assert not any(row in decoding.held for row in bad.rows)
        await finish_one_more(engine, decoding)


async def test_a_token_that_could_not_be_drawn_fails_its_request_only() -> None:
    decoding = FakeDecoding(slots=2)
    decoding.token_of = lambda row, position: MASK if row.seed == 13 else 5
    decoding.allow(10)
    async with engine_of(decoding) as (engine, _):
        bad = Generation([row_of(3, seed=13)], None, streams=False)
        engine.submit(bad)
        good = submitted(engine, 2)
        with pytest.raises(ApiError) as caught:
            await finish(bad)
        assert caught.value.status == 500
        await finish(good)


async def test_a_row_that_cannot_join_fails_its_request_only() -> None:
    decoding = FakeDecoding(slots=2)

    def joined(row: Row) -> None:
        if row.seed == 13:
            raise ValueError("no")

    decoding.joined = joined
    decoding.allow(10)
    async with engine_of(decoding) as (engine, _):
        bad = Generation([row_of(1, seed=13)], None, streams=False)
        engine.submit(bad)
        with pytest.raises(ApiError):
            await finish(bad)
        await finish(submitted(engine, 2))


async def test_stopping_refuses_who_waits_and_finishes_who_runs() -> None:
    decoding = FakeDecoding(slots=1)
    async with engine_of(decoding, grace_s=30) as (engine, _):
        running, waiting = submitted(engine, 3), submitted(engine, 3)
        await asyncio.to_thread(wait_for, lambda: decoding.held)
        engine.stop()
        with pytest.raises(ApiError) as caught:
            await finish(waiting)
        assert caught.value.status == 503
        with pytest.raises(ApiError) as caught:
            submitted(engine, 1)
        assert caught.value.status == 503
        decoding.allow(3)
        await finish(running)


async def test_what_outlives_the_grace_time_gets_503() -> None:
    decoding = FakeDecoding(slots=1)
    async with engine_of(decoding, grace_s=0.0) as (engine, _):
        running = submitted(engine, 100)
        await asyncio.to_thread(wait_for, lambda: decoding.held)
        engine.stop()
        decoding.allow(2)
        with pytest.raises(ApiError) as caught:
            await finish(running)
        assert caught.value.status == 503
        assert decoding.steps <= 2


async def test_an_idle_engine_gathers_rows_before_a_whole_batch() -> None:
    decoding = FakeDecoding(slots=2)
    decoding.allow(10)
    async with engine_of(decoding, gathers=True, max_wait_ms=60_000) as (engine, _):
        first, second = (
            submitted(engine, 1),
            submitted(engine, 1),
        )  # two fill the slots: nobody waits a minute
        await finish(first)
        await finish(second)
        assert [len(batch) for batch in decoding.batches] == [2]


async def test_a_model_that_cannot_be_used_is_not_ready() -> None:
    def broken() -> Any:
        raise RuntimeError("no weights")

    engine = Engine(broken, MASK, ServeSettings(), Metrics(), gathers=False)
    with pytest.raises(ApiError):
        engine.check_ready()
    engine.start()
    wait_for(lambda: engine.state == "failed")
    with pytest.raises(ApiError) as caught:
        submitted(engine, 1)
    assert caught.value.status == 503
    engine.stop()
    assert engine.state == "failed"


async def test_an_engine_that_ends_by_a_bug_leaves_nobody_waiting() -> None:
    decoding = FakeDecoding(slots=2)
    engine = Engine(lambda: decoding, MASK, ServeSettings(), Metrics(), gathers=False)
    engine.start()
    wait_for(lambda: engine.state == "ready")
    left, running, waiting = (submitted(engine, 9) for _ in range(3))
    await asyncio.to_thread(wait_for, lambda: engine.active_sequences == 2)

    def broken(row: Row) -> None:
        raise RuntimeError("a bug")

    decoding.leave = broken  # type: ignore[method-assign]
    engine.cancel(left)
    decoding.allow(2)
    for generation in (running, waiting):
        with pytest.raises(ApiError) as caught:
            await finish(generation)
        assert caught.value.status == 500
    assert engine.state == "failed"


async def test_rows_of_a_request_that_failed_while_joining_take_no_slots() -> None:
    decoding = FakeDecoding(slots=4)

    def joined(row: Row) -> None:
        if row.seed == 13:
            raise ValueError("no")

    decoding.joined = joined
    async with engine_of(decoding) as (engine, _):
        bad = Generation([row_of(5, seed=13), row_of(5), row_of(5)], None, streams=False)
        engine.submit(bad)
        with pytest.raises(ApiError):
            await finish(bad)
        assert decoding.free_slots == 4
