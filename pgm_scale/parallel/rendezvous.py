"""The ranks find each other: who does not come within the time is named, on every rank that came.

Every rank writes who it is into a key-value store (TCP) that rank 0 serves, or torchrun's agent where there is
one. The last to come says that all are there; the first whose time is over says who is missing. One of the two
becomes the common outcome, so that all ranks say the same. The store is then handed to `torch.distributed`.

torch's own rendezvous ends in a time-out that names nobody, and its store can block for ever when the process
that serves it is stopped; hence the checks with plain sockets and the threads with a deadline here.
"""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist

from pgm_scale.errors import UserError
from pgm_scale.holder import node_name
from pgm_scale.parallel.launch import Launch

Result = TypeVar("Result")
_EVERYONE = "everyone is here"
_POLL_S = 0.2
_GRACE_S = 3.0  # how long the server stays after a failure, so that the others can read of it
_SHOWN_HOSTS = 8


@dataclass(frozen=True)
class Member:
    """Who a rank is."""

    rank: int
    host: str
    pid: int
    local_rank: int
    gpu: str = ""  # a name that no other GPU has; none without one

    def __str__(self) -> str:
        return f"host {self.host}, pid {self.pid}"


def join(launch: Launch, timeout_s: float, gpu: str = "") -> dist.Store:
    """Meet the other ranks; returns, when all are there, a store for `init_process_group` and the watchdog.

    Its own keys start with `member/`, so give the process group a `PrefixStore` of it. Operations of the store
    time out after `timeout_s` as long as its server lives.

    Args:
        gpu: the unique name of the one that this rank uses.

    Raises:
        UserError: on every rank, within `timeout_s` and a few seconds, naming the ranks that did not come, or
            the two processes that have the same rank or the same GPU; or what is wrong with rank 0's address and
            port.
    """
    me = Member(launch.rank, node_name(), os.getpid(), launch.local_rank, gpu)
    try:
        return within(timeout_s + 2 * _GRACE_S, lambda: _join(launch, me, timeout_s))
    except TimeoutError:
        raise UserError(
            f"rank {me.rank} ({me}): {server_address(launch)} accepts connections but does not answer: "
            f"{server_name(launch)} is stopped, or another program has that port; set another MASTER_PORT"
        ) from None


def _join(launch: Launch, me: Member, timeout_s: float) -> dist.Store:
    deadline_s = time.monotonic() + timeout_s
    server = _serve(launch, timeout_s) if serves(launch) else _reach(launch, me, timeout_s)
    store = dist.PrefixStore(f"pgm-scale/{launch.agent_attempt or 0}", server)
    try:
        _enter(store, me, launch.world_size)
        outcome = _outcome(store, launch, timeout_s, deadline_s)
        if outcome != _EVERYONE:
            raise UserError(outcome)
    except UserError:
        if serves(launch):
            time.sleep(_GRACE_S)
        raise
    except dist.DistError as error:
        raise UserError(
            f"rank {me.rank} ({me}) lost {server_name(launch)} at {server_address(launch)}: {error}"
        ) from None
    return store


def serves(launch: Launch) -> bool:
    """Whether the store ends with this process."""
    return launch.rank == 0 and launch.agent_attempt is None


def server_name(launch: Launch) -> str:
    """Who serves the store."""
    return "rank 0" if launch.agent_attempt is None else "torchrun's agent"


def server_address(launch: Launch) -> str:
    return f"{launch.master_address}:{launch.master_port}"


def _serve(launch: Launch, timeout_s: float) -> dist.TCPStore:
    """The store of rank 0, or, if another rank 0 is there first, that one's, in which both will be named."""
    try:
        return _tcp_store(launch, timeout_s, is_master=True)
    except dist.DistError as error:
        if "EADDRINUSE" not in str(error):
            raise UserError(
                f"rank 0 on {node_name()} cannot serve {server_address(launch)}: "
                f"{_first_line(error)}; is MASTER_ADDR the host of rank 0?"
            ) from None
    try:
        return within(_GRACE_S, lambda: _tcp_store(launch, _GRACE_S, is_master=False))
    except (TimeoutError, dist.DistError):
        raise UserError(
            f"rank 0 on {node_name()} cannot serve port {launch.master_port}: another program has it; "
            "set another MASTER_PORT"
        ) from None


def _reach(launch: Launch, me: Member, timeout_s: float) -> dist.TCPStore:
    """The store that rank 0 or the agent serves; waits for its port to open."""
    deadline_s = time.monotonic() + timeout_s
    while True:
        try:
            with socket.create_connection((launch.master_address, launch.master_port), timeout=_GRACE_S):
                break
        except OSError as error:
            if time.monotonic() > deadline_s:
                raise UserError(
                    f"rank {me.rank} ({me}) cannot reach {server_name(launch)} at {server_address(launch)} within "
                    f"{timeout_s:g} s ({error.strerror or error}): look at the log of rank 0, which may never "
                    "have started; if it runs, check MASTER_ADDR, MASTER_PORT and the firewall"
                ) from None
            time.sleep(_POLL_S)
    return _tcp_store(launch, timeout_s, is_master=False)


def _tcp_store(launch: Launch, timeout_s: float, is_master: bool) -> dist.TCPStore:
    return dist.TCPStore(
        launch.master_address,
        launch.master_port,
        is_master=is_master,
        timeout=timedelta(seconds=timeout_s),
        wait_for_workers=False,
    )


def _enter(store: dist.Store, me: Member, world_size: int) -> None:
    """Write down who this rank is. Raises: UserError: another process has written itself down under it, or
    the ranks were told of different numbers of ranks."""
    first = store.compare_set("world size", "", str(world_size)).decode()
    if first != str(world_size):
        outcome = (
            f"rank {me.rank} ({me}) was told of {world_size} ranks, and another rank of {first}: give all "
            "processes the same WORLD_SIZE, or, if these are two runs, each its own MASTER_PORT"
        )
        store.compare_set("outcome", "", outcome)
        raise UserError(outcome)
    ours = json.dumps(dataclasses.asdict(me))
    found = store.compare_set(_key(me.rank), "", ours).decode()
    if found != ours:
        outcome = (
            f"rank {me.rank} was started twice ({Member(**json.loads(found))}; {me}): give each process its own "
            "RANK, or, if these are two runs, its own MASTER_PORT"
        )
        store.compare_set("outcome", "", outcome)  # no effect on a run that has met already
        raise UserError(outcome)
    if store.add("members", 1) == world_size:
        store.compare_set("outcome", "", _shared_gpu(store, world_size) or _EVERYONE)


def _outcome(store: dist.Store, launch: Launch, timeout_s: float, deadline_s: float) -> str:
    """What the ranks agree on: `_EVERYONE`, or a message. Polled, as a wait would not end with its server."""
    while not (outcome := read(store, "outcome")):
        if time.monotonic() > deadline_s:
            return store.compare_set("outcome", "", _missing(store, launch, timeout_s)).decode()
        time.sleep(_POLL_S)
    return outcome


def _missing(store: dist.Store, launch: Launch, timeout_s: float) -> str:
    members = [member(store, rank) for rank in range(launch.world_size)]
    absent = [rank for rank, found in enumerate(members) if found is None]
    return (
        f"{ranks_text(absent)} of {launch.world_size} never joined within {timeout_s:g} s; joined: "
        f"{_by_host(found for found in members if found is not None)}; look at the logs and hosts of the missing "
        f"ranks, and whether they reach {server_address(launch)}"
    )


def _shared_gpu(store: dist.Store, world_size: int) -> str:
    """Which two ranks have the same GPU; "" if none: as slow as half of them, or out of memory hours later."""
    users: dict[str, Member] = {}
    for rank in range(world_size):
        found = member(store, rank)
        if found is not None and found.gpu:
            other = users.setdefault(found.gpu, found)
            if other is not found:
                return (
                    f"rank {other.rank} and rank {rank} use the same GPU of host {found.host}: start one task a "
                    "GPU (Slurm: --ntasks-per-node equal to the GPUs of a node)"
                )
    return ""


def rank_map(store: dist.Store, world_size: int) -> str:
    """Which ranks are where, once all are there."""
    return _by_host(found for rank in range(world_size) if (found := member(store, rank)) is not None)


def _by_host(members: Iterable[Member]) -> str:
    hosts: dict[str, list[int]] = {}
    for found in members:
        hosts.setdefault(found.host, []).append(found.rank)
    shown = [f"{ranks_text(ranks)} on {host}" for host, ranks in list(hosts.items())[:_SHOWN_HOSTS]]
    hidden = len(hosts) - _SHOWN_HOSTS
    return "; ".join(shown) + (f"; and {hidden} more hosts" if hidden > 0 else "")


def member(store: dist.Store, rank: int) -> Member | None:
    """Who joined as `rank`, if anyone has."""
    found = read(store, _key(rank))
    return Member(**json.loads(found)) if found else None


def _key(rank: int) -> str:
    return f"member/{rank}"


def read(store: dist.Store, key: str) -> str:
    """The value of a key, "" where there is none. `Store.get` would wait for it."""
    return store.compare_set(key, "", "").decode()


def ranks_text(ranks: Iterable[int]) -> str:
    """Sorted ranks in words: [3] is "rank 3", [3, 5, 6, 7] is "ranks 3, 5-7"."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    text = ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
    return f"rank {text}" if len(runs) == 1 and len(runs[0]) == 1 else f"ranks {text}"


def within(seconds: float, action: Callable[[], Result]) -> Result:
    """`action()` in a thread of its own, which is left behind when it takes too long.

    Raises:
        TimeoutError: it has not ended after `seconds`.
    """
    results: list[Result] = []
    failures: list[BaseException] = []

    def run() -> None:
        try:
            results.append(action())
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=run, name="with-deadline", daemon=True)
    thread.start()
    thread.join(seconds)
    if failures:
        raise failures[0]
    if not results:
        raise TimeoutError
    return results[0]


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
