"""Worker processes with few calls in flight."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from multiprocessing import get_context
from typing import Any

from data_prep.units import Encoding, start_worker

CALLS_IN_FLIGHT_PER_WORKER = 3  # one at work, and enough waiting that no worker starves

Call = tuple[Any, ...]  # (key, function, arguments...)
RunBounded = Callable[[Iterable[Call]], Iterator[tuple[Any, Any]]]  # calls -> (key, result) as they finish


@contextmanager
def worker_pool(encoding: Encoding, workers: int) -> Iterator[RunBounded]:
    """Worker processes, and a function that keeps only a few calls in flight, which bounds the memory."""
    workers = workers or len(os.sched_getaffinity(0))
    pool = ProcessPoolExecutor(
        workers, mp_context=get_context("spawn"), initializer=start_worker, initargs=(encoding,)
    )
    for _ in range(workers):  # start them now: they import while the input is surveyed
        pool.submit(os.getpid)

    def run_bounded(calls: Iterable[Call]) -> Iterator[tuple[Any, Any]]:
        running: dict[Future[Any], Any] = {}
        for key, function, *arguments in calls:
            if len(running) == CALLS_IN_FLIGHT_PER_WORKER * workers:
                yield from finished(running)
            running[pool.submit(function, *arguments)] = key
        while running:
            yield from finished(running)

    def finished(running: dict[Future[Any], Any]) -> Iterator[tuple[Any, Any]]:
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            yield running.pop(future), future.result()

    try:
        yield run_bounded
    finally:
        pool.shutdown(cancel_futures=True)
