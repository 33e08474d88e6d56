"""The queue, and the one thread that owns the model: rows of many requests are decoded together.

The HTTP side lives in an asyncio loop and never touches the model; it submits a `Generation` and awaits its events.
Between two steps the thread lets rows leave whose client is gone, and others join in the order of their arrival.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from pgm_scale.sampling.stepwise import Decoded, Row
from pgm_scale.serve.batches import Decoding
from pgm_scale.serve.errors import ApiError, unavailable
from pgm_scale.serve.metrics import Metrics
from pgm_scale.serve.settings import ServeSettings

_LOG = logging.getLogger(__name__)

State = Literal["starting", "ready", "stopping", "stopped", "failed"]
# What a step has made of a generation; the number is that of its row.
Event = tuple[int, list[int], list[int]]


class Generation:
    """The rows of one request, on their way; made and awaited in the event loop, filled by the engine's thread.

    Args:
        rows: to complete.
        stop_token: a row is finished once this token ends its decoded prefix, whatever is behind it; None: never.
        streams: whether each step is told as it comes, or all of them at the end.

    Attributes:
        tokens: of each row int64 [L], -1 where not decoded (yet); the loop reads it once the events have ended.
    """

    def __init__(self, rows: Sequence[Row], stop_token: int | None, streams: bool) -> None:
        self.rows, self.stop_token, self.streams = list(rows), stop_token, streams
        self.tokens = [row.known_L.copy() for row in rows]
        self.arrived_s = time.monotonic()
        self._number = {row: number for number, row in enumerate(rows)}
        self._prefix = [1] * len(self.rows)
        self._unfinished = set(rows)
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[list[Event] | ApiError | None] = asyncio.Queue()

    @property
    def is_finished(self) -> bool:
        return not self._unfinished

    async def events(self) -> AsyncIterator[list[Event]]:
        """What the steps have decoded, until all rows are finished.

        Raises:
            ApiError: it failed.
        """
        while (item := await self._events.get()) is not None:
            if isinstance(item, ApiError):
                raise item
            yield item

    def absorb(self, decoded: Decoded) -> Event:
        """Note a row's tokens; engine's thread only."""
        number = self._number[decoded.row]
        self.tokens[number][decoded.positions] = decoded.tokens
        if decoded.is_finished or self._has_stopped(number):
            self._unfinished.discard(decoded.row)
        return number, decoded.positions, decoded.tokens

    def has_finished(self, row: Row) -> bool:
        return row not in self._unfinished

    def tell(self, item: list[Event] | ApiError | None) -> None:
        """Hand something to `events`; in the loop only."""
        self._events.put_nowait(item)

    def tell_from_thread(self, items: Sequence[list[Event] | ApiError | None]) -> None:
        def tell_all() -> None:
            for item in items:
                self.tell(item)

        try:
            self._loop.call_soon_threadsafe(tell_all)
        except RuntimeError:  # the loop has been closed: nobody listens any more
            _LOG.debug("an answer came after its event loop had ended")

    def _has_stopped(self, number: int) -> bool:
        if self.stop_token is None:
            return False
        tokens_L, known_L = self.tokens[number], self.rows[number].known_L
        while self._prefix[number] < len(tokens_L) and tokens_L[self._prefix[number]] >= 0:
            place = self._prefix[number]
            if known_L[place] < 0 and tokens_L[place] == self.stop_token:
                return True
            self._prefix[number] += 1
        return False


@dataclass(frozen=True)
class _Waiting:
    generation: Generation
    row: Row
    since_s: float


class Engine:
    """Owns the model's thread.

    Args:
        make_decoding: called in the thread; loads, folds and warms up what it needs.
        mask_id: stands for a token that could not be drawn, because logits were not finite.
        gathers: whether an idle engine waits `max_wait_ms` for more rows before a step.
    """

    def __init__(
        self,
        make_decoding: Callable[[], Decoding],
        mask_id: int,
        settings: ServeSettings,
        metrics: Metrics,
        gathers: bool,
    ) -> None:
        self._make_decoding, self._mask_id, self._gathers = make_decoding, mask_id, gathers
        self._settings, self._metrics = settings, metrics
        self._changed = threading.Condition(threading.RLock())
        self._waiting: deque[_Waiting] = deque()
        self._leaving: list[Row] = []
        self._owners: dict[Row, Generation] = {}  # of the rows that have a slot
        self._state: State = "starting"
        self._stop_by_s = float("inf")
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)

    @property
    def state(self) -> State:
        return self._state

    @property
    def active_sequences(self) -> int:
        return len(self._owners)

    @property
    def queued_sequences(self) -> int:
        return len(self._waiting)

    def start(self) -> None:
        self._thread.start()

    def check_ready(self) -> None:
        """Raises:
        ApiError: 503, it is not.
        """
        if self._state == "failed":
            raise unavailable("the model cannot be used; see the server's log")
        if self._state != "ready":
            raise unavailable(f"the server is {self._state}; try again later")

    def submit(self, generation: Generation) -> None:
        """Queue the rows of a generation.

        Raises:
            ApiError: 429, the queue is full; 503, starting or stopping.
        """
        with self._changed:
            self.check_ready()
            # Those that get a free slot at the next step do not wait for anyone.
            room = self._settings.max_batch_sequences - len(self._owners) + self._settings.max_queue_sequences
            if len(self._waiting) + len(generation.rows) > room:
                raise ApiError(
                    429,
                    f"the queue is full ({len(self._waiting)} sequences wait); try again in a moment",
                    code="queue_full",
                    retry_after_s=1,
                )
            now_s = time.monotonic()
            self._waiting.extend(_Waiting(generation, row, now_s) for row in generation.rows)
            self._metrics.queued.set(len(self._waiting))
            self._changed.notify()

    def cancel(self, generation: Generation) -> None:
        """Give back what a generation holds: at once if it waits, at the end of the step if it is decoded."""
        with self._changed:
            self._drop_waiting(lambda waiting: waiting.generation is generation)
            self._leaving += [row for row, owner in self._owners.items() if owner is generation]
            self._changed.notify()

    def stop(self) -> None:
        """Refuse what is new and what waits; what is decoded goes on for the grace time. Returns at once."""
        with self._changed:
            if self._state in ("stopped", "failed", "stopping"):
                return
            self._state = "stopping"
            refused = {waiting.generation for waiting in self._waiting}
            self._drop_waiting(lambda waiting: True)
            self._leaving += [row for row, owner in self._owners.items() if owner in refused]
            self._stop_by_s = time.monotonic() + self._settings.grace_s
            self._changed.notify()
        for generation in refused:
            generation.tell_from_thread([unavailable("the server is stopping; try another one")])

    def join(self, timeout_s: float) -> None:
        """Wait for the thread to end."""
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def _drop_waiting(self, condition: Callable[[_Waiting], bool]) -> None:
        self._waiting = deque(waiting for waiting in self._waiting if not condition(waiting))
        self._metrics.queued.set(len(self._waiting))

    def _run(self) -> None:
        try:
            self._decoding = self._make_decoding()
        except Exception:
            _LOG.exception("the model cannot be used")
            self._state = "failed"
            return
        with self._changed:
            if self._state == "starting":
                self._state = "ready"
        try:
            while self._admit():
                self._step()
            self._state = "stopped"
        except Exception:
            _LOG.exception("the engine has a bug and has ended")
            self._end_all()

    def _admit(self) -> bool:
        """Wait for work, and give free slots to those that wait; False when the engine is to end."""
        with self._changed:
            while not self._waiting and not self._owners and self._state == "ready":
                self._changed.wait()
            if self._gathers and not self._owners and self._state == "ready":
                self._gather()
            for row in self._leaving:
                self._release(row)
            self._leaving = []
            joining = [
                self._waiting.popleft() for _ in range(min(len(self._waiting), self._decoding.free_slots))
            ]
            for waiting in joining:
                self._owners[waiting.row] = waiting.generation
            self._metrics.queued.set(len(self._waiting))
            if self._state == "stopping":
                if self._owners and time.monotonic() > self._stop_by_s:
                    self._fail(list(self._owners), unavailable("the server has stopped"))
                if not self._owners:
                    return False
        for waiting in joining:
            self._metrics.queue_s.observe(time.monotonic() - waiting.since_s)
            if waiting.row not in self._owners:  # another row of its request has just failed
                continue
            try:
                self._decoding.join(waiting.row)
            except Exception:
                _LOG.exception("a sequence cannot be decoded")
                self._fail([waiting.row], _model_failed())
        self._metrics.active.set(len(self._owners))
        return True

    def _gather(self) -> None:
        until_s = time.monotonic() + self._settings.max_wait_ms / 1e3
        while (left_s := until_s - time.monotonic()) > 0 and self._waiting and self._state == "ready":
            if len(self._waiting) >= self._decoding.free_slots:
                return
            self._changed.wait(left_s)

    def _step(self) -> None:
        rows = self._decoding.next_rows
        if not rows:
            return
        started_s = time.monotonic()
        try:
            decoded = self._decoding.step()
        except Exception:
            _LOG.exception("a batch of %d sequences failed", len(rows))
            self._fail(rows, _model_failed())
            return
        self._metrics.step_s.observe(time.monotonic() - started_s)
        self._metrics.batch.observe(len(rows))
        self._metrics.tokens.inc(sum(len(part.tokens) for part in decoded))
        self._deliver(decoded)
        self._metrics.active.set(len(self._owners))

    def _deliver(self, decoded: Sequence[Decoded]) -> None:
        events: dict[Generation, list[Event]] = {}
        with self._changed:
            for part in decoded:
                generation = self._owners.get(part.row)
                if generation is None:
                    continue
                if self._mask_id in part.tokens:
                    _LOG.error("the model's logits are not finite; check its checkpoint")
                    self._fail([part.row], _model_failed())
                    events.pop(generation, None)
                    continue
                events.setdefault(generation, []).append(generation.absorb(part))
                if generation.has_finished(part.row):
                    self._release(part.row)
        for generation, own in events.items():
            items: list[list[Event] | ApiError | None] = [own] if generation.streams else []
            if generation.is_finished:
                items.append(None)
            if items:
                generation.tell_from_thread(items)

    def _fail(self, rows: Sequence[Row], error: ApiError) -> None:
        """Fail the generations of rows that have a slot, with all their rows."""
        with self._changed:
            failed = {self._owners[row] for row in rows if row in self._owners}
            self._drop_waiting(lambda waiting: waiting.generation in failed)
            for row in [row for row, owner in self._owners.items() if owner in failed]:
                self._release(row)
        for generation in failed:
            generation.tell_from_thread([error])

    def _end_all(self) -> None:
        with self._changed:
            self._state = "failed"
            generations = {waiting.generation for waiting in self._waiting} | set(self._owners.values())
            self._drop_waiting(lambda waiting: True)
            self._owners = {}
        for generation in generations:
            generation.tell_from_thread([_model_failed()])

    def _release(self, row: Row) -> None:
        self._owners.pop(row, None)
        self._decoding.leave(row)


def _model_failed() -> ApiError:
    return ApiError(500, "the model failed at this request; see the server's log", code="model_failed")
