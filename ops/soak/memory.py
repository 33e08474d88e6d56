"""Long sessions that nothing happens to: memory, open files and threads of their ranks must not grow."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil

from ops.soak.sessions import Outcome, Plan, Sessions
from pgm_scale.errors import Preempted

_SAMPLE_S = 3.0
_WARM_UP = 0.3  # this share of a session, in which the heap and the caches grow to their size
# 0.5 GB in a million steps, which no node would notice. A heap that settles makes some MiB, however many the steps
# are, so there must be more than that, too.
MOST_GROWTH_BYTES_PER_STEP = 512.0
MOST_SETTLING_BYTES = 4 << 20
MOST_MORE_DESCRIPTORS = MOST_MORE_THREADS = 1


@dataclass(frozen=True)
class Sample:
    """One rank at a moment.

    Judged is `resident_bytes`. `private_bytes` also grow where nothing does: a collection of Python's garbage
    writes to pages that the rank shares with the server it was forked from, once some thousand steps in.
    """

    time_s: float
    step: int
    resident_bytes: int
    private_bytes: int
    descriptors: int
    threads: int


@dataclass
class LongSession:
    """A session of some minutes; `samples` are a list for each rank."""

    what: str
    started_s: float
    outcome: Outcome
    samples: list[list[Sample]] = field(default_factory=list)

    def growth(self, rank: int) -> float:
        """Bytes a step: median slope over all pairs of samples (Theil and Sen), after the warm-up."""
        warm = self.warm(rank)
        steps = np.array([sample.step for sample in warm], np.float64)
        sizes = np.array([sample.resident_bytes for sample in warm], np.float64)
        first, second = np.triu_indices(len(warm), 1)
        apart = steps[second] - steps[first]
        if not (apart > 0).any():
            return 0.0
        return float(np.median((sizes[second] - sizes[first])[apart > 0] / apart[apart > 0]))

    def warm(self, rank: int) -> list[Sample]:
        samples = self.samples[rank]
        return samples[int(len(samples) * _WARM_UP) :]

    def problems(self) -> Iterator[str]:
        """What has grown. Files are opened for a moment all the time, so the smallest counts are compared."""
        if set(self.outcome.exit_codes) != {Preempted.exit_code}:
            yield f"exit codes {self.outcome.exit_codes} after SIGTERM"
        yield from (f"a process is left: {command}" for command in self.outcome.leftovers)
        for rank in range(len(self.samples)):
            warm = self.warm(rank)
            third = len(warm) // 3
            if third < 3:
                continue
            growth = self.growth(rank)
            grown = growth * (warm[-1].step - warm[0].step)
            if growth > MOST_GROWTH_BYTES_PER_STEP and grown > MOST_SETTLING_BYTES:
                yield f"rank {rank} grows by {growth:.0f} bytes a step ({self.what})"
            for name, most in (("descriptors", MOST_MORE_DESCRIPTORS), ("threads", MOST_MORE_THREADS)):
                first, last = (
                    min(getattr(sample, name) for sample in part) for part in (warm[:third], warm[-third:])
                )
                if last > first + most:
                    yield f"rank {rank} has {last} {name}, and had {first} ({self.what})"


def long_session(
    sessions: Sessions, arguments: Sequence[str], ranks: int, seconds: float, what: str
) -> LongSession:
    """Run for so long, then stop by a signal."""
    samples: list[list[Sample]] = [[] for _ in range(ranks)]
    start_s, due_s = time.monotonic(), 0.0

    def sample(pids: Sequence[int]) -> None:
        nonlocal due_s
        now_s = time.monotonic() - start_s
        step = sessions.step()
        if now_s < due_s or step is None:
            return
        due_s = now_s + _SAMPLE_S
        for rank, pid in enumerate(pids):
            if (found := sample_process(pid, now_s, step)) is not None:
                samples[rank].append(found)

    outcome = sessions.run(arguments, ranks, Plan("terminate", 0, after_s=seconds), sample)
    return LongSession(what, start_s, outcome, samples)


def sample_process(pid: int, time_s: float, step: int) -> Sample | None:
    """None when it has ended."""
    try:
        process = psutil.Process(pid)
        sizes = dict(re.findall(r"^(\w+): +(\d+) kB", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.M))
        return Sample(
            round(time_s, 2),
            step,
            1024 * int(sizes["Rss"]),
            1024 * (int(sizes["Private_Clean"]) + int(sizes["Private_Dirty"])),
            len(os.listdir(f"/proc/{pid}/fd")),
            process.num_threads(),
        )
    except (OSError, KeyError, psutil.Error):
        return None
