"""Ranks that meet, and ranks that do not: each failure is one line that names ranks, hosts, processes or ports."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import signal
import socket
import time
from collections.abc import Iterable
from itertools import zip_longest
from typing import Any

import pytest
import torch.distributed as dist

from pgm_scale.errors import UserError
from pgm_scale.parallel.launch import Launch, free_port
from pgm_scale.parallel.rendezvous import Member, join, rank_map, ranks_text

HOST = socket.gethostname()
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["pgm_scale.parallel.watchdog"])  # torch is imported once


def launch(
    rank: int, ranks: int, port: int, attempt: int | None = None, address: str = "127.0.0.1"
) -> Launch:
    return Launch("torchrun", rank, ranks, rank, address, port, attempt)


def join_and_tell(found: Launch, timeout_s: float, gpu: str, queue: Any) -> None:
    """Puts (rank, pid, text): the map of the ranks after it has met all, or the error."""
    try:
        store = join(found, timeout_s, gpu)
        store.add("after", 1)
        while store.add("after", 0) < found.world_size:  # rank 0 serves it
            time.sleep(0.05)
        queue.put((found.rank, os.getpid(), rank_map(store, found.world_size)))
        time.sleep(1)
    except UserError as error:
        queue.put((found.rank, os.getpid(), str(error)))


def meet(
    launches: Iterable[Launch], timeout_s: float, gpus: Iterable[str] = ()
) -> list[tuple[int, int, str]]:
    """What `join_and_tell` tells for each launch, a process each; without `gpus` none has a GPU."""
    queue = PROCESSES.Queue()
    processes = [
        PROCESSES.Process(target=join_and_tell, args=(one, timeout_s, gpu or "", queue))
        for one, gpu in zip_longest(launches, gpus)
    ]
    try:
        for process in processes:
            process.start()
        told = [queue.get(timeout=60) for _ in processes]
    finally:
        for process in processes:
            process.join(timeout=10)
            process.kill()
    return sorted(told)


def test_all_meet() -> None:
    port = free_port()
    told = meet([launch(rank, 3, port) for rank in range(3)], 60)
    assert [(rank, text) for rank, _, text in told] == [(rank, f"ranks 0-2 on {HOST}") for rank in range(3)]


def test_ranks_that_use_the_same_gpu_are_named_on_every_rank() -> None:
    port = free_port()
    told = meet([launch(rank, 3, port) for rank in range(3)], 60, ["GPU-a", "GPU-b", "GPU-a"])
    for _, _, text in told:
        assert text.startswith(f"rank 0 and rank 2 use the same GPU of host {HOST}: start one task a GPU")


def test_ranks_with_a_gpu_each_meet() -> None:
    port = free_port()
    told = meet([launch(rank, 2, port) for rank in range(2)], 60, ["GPU-a", "GPU-b"])
    assert [text for _, _, text in told] == [f"ranks 0-1 on {HOST}"] * 2


def test_the_map_of_many_hosts_is_short() -> None:
    """Two ranks on each of ten hosts, and one whose tasks are spread."""
    store = dist.HashStore()
    hosts = [f"gpu{rank // 2}" for rank in range(20)] + ["gpu0"]
    for rank, host in enumerate(hosts):
        me = Member(rank, host, 100 + rank, rank % 2)
        store.set(f"member/{rank}", json.dumps(dataclasses.asdict(me)))
    expected = "ranks 0-1, 20 on gpu0; ranks 2-3 on gpu1; ranks 4-5 on gpu2; "
    text = rank_map(store, len(hosts))
    assert text.startswith(expected)
    assert text.endswith("ranks 14-15 on gpu7; and 2 more hosts")


@pytest.mark.fault(48)
def test_missing_ranks_are_named_on_every_rank() -> None:
    port = free_port()
    told = meet([launch(rank, 8, port) for rank in (0, 2)], 6)
    assert told[0][2] == told[1][2]
    assert "ranks 1, 3-7 of 8 never joined within 6 s" in told[0][2]
    assert f"joined: ranks 0, 2 on {HOST}; " in told[0][2]
    assert f"127.0.0.1:{port}" in told[0][2]


def test_a_missing_rank_0_is_named_by_its_address() -> None:
    port = free_port()
    ((_, pid, text),) = meet([launch(1, 2, port)], 2)
    assert f"rank 1 (host {HOST}, pid {pid}) cannot reach rank 0 at 127.0.0.1:{port} within 2 s" in text


def test_an_unknown_host_is_named() -> None:
    with pytest.raises(UserError, match=r"cannot reach rank 0 at nowhere\.invalid:29500 within 1 s"):
        join(launch(1, 2, 29500, address="nowhere.invalid"), 1)


@pytest.mark.fault(48)
def test_the_same_rank_twice() -> None:
    port = free_port()
    told = meet([launch(rank, 3, port) for rank in (0, 1, 1)], 60)
    pids = [pid for rank, pid, _ in told if rank == 1]
    for _, _, text in told:
        assert "rank 1 was started twice" in text
        assert all(f"host {HOST}, pid {pid}" in text for pid in pids)


@pytest.mark.fault(48)
def test_ranks_that_were_told_of_different_numbers_of_ranks() -> None:
    """Both would wait for ranks that nobody starts, or go on with one that belongs to nobody."""
    port = free_port()
    for _, _, text in meet([launch(0, 2, port), launch(1, 3, port)], 60):
        assert "was told of" in text
        assert "give all processes the same WORLD_SIZE" in text


def test_rank_0_twice() -> None:
    port = free_port()
    told = meet([launch(0, 2, port), launch(0, 2, port)], 60)
    for _, _, text in told:
        assert "rank 0 was started twice" in text
        assert all(f"pid {pid}" in text for _, pid, _ in told)


@pytest.mark.fault(48)
def test_another_program_has_the_port() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(UserError, match=rf"cannot serve port {port}: another program has it"):
            join(launch(0, 2, port), 2)
        with pytest.raises(UserError, match=rf"127.0.0.1:{port} accepts connections but does not answer"):
            join(launch(1, 2, port), 2)


def serve(found: Launch, queue: Any) -> None:
    queue.put(os.getpid())
    join(found, 60)


@pytest.mark.fault(48)
def test_a_stopped_rank_0_is_named() -> None:
    port = free_port()
    queue = PROCESSES.Queue()
    first = PROCESSES.Process(target=serve, args=(launch(0, 3, port), queue))
    first.start()
    try:
        queue.get(timeout=60)
        while True:
            try:
                socket.create_connection(("127.0.0.1", port)).close()
                break
            except OSError:
                time.sleep(0.1)
        os.kill(first.pid or 0, signal.SIGSTOP)
        with pytest.raises(
            UserError, match=rf"127.0.0.1:{port} accepts connections but does not answer: rank 0"
        ):
            join(launch(1, 3, port), 2)
    finally:
        first.kill()
        first.join()


def test_torchruns_agent_serves_the_store() -> None:
    """Its store outlives an attempt, whose ranks must not be taken for those of the next one."""
    agent = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for attempt in range(2):
        told = meet([launch(rank, 2, agent.port, attempt) for rank in range(2)], 60)
        assert [text for _, _, text in told] == [f"ranks 0-1 on {HOST}"] * 2
    (told_alone,) = meet([launch(1, 2, agent.port, 2)], 2)
    assert "rank 0 of 2 never joined within 2 s" in told_alone[2]


@pytest.mark.parametrize(
    ("ranks", "text"),
    [([3], "rank 3"), ([0, 1], "ranks 0-1"), ([3, 5, 6, 7], "ranks 3, 5-7"), ([1, 3], "ranks 1, 3")],
)
def test_ranks_text(ranks: list[int], text: str) -> None:
    assert ranks_text(ranks) == text
