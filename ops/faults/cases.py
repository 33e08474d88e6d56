"""The faults that are injected, by the number that a test's `fault` mark gives, and what must happen then.

1 to 31 are the founders' list; those after it are ours. A test of any folder may prove a case:
`@pytest.mark.fault(3)`; `make faults` runs all that are marked, and fails if a case has no test.
"""

from __future__ import annotations

from typing import NamedTuple


class Case(NamedTuple):
    """What happens, and what must follow; "fall back" is to quarantine the bad step and use the newest good one."""

    fault: str
    expected: str


CASES: dict[int, Case] = {
    1: Case(
        "a rank dies while it writes its part of a checkpoint",
        "the others end in time; resume from the step before; leftovers removed",
    ),
    2: Case("death between the manifest and the marker", "the step is complete; the marker is mended"),
    3: Case(
        "a flipped bit in any file of the newest checkpoint",
        "file and step named; fall back; `--strict` refuses",
    ),
    4: Case("rank files cut, empty, missing, foreign, swapped, of another step", "as 3"),
    5: Case("every checkpoint is bad", "refused: training never starts again from nothing by itself"),
    6: Case(
        "two runs in one folder",
        "the second is refused with host, pid and job; a dead holder's lock is taken",
    ),
    7: Case(
        "disk full during a save",
        "old steps intact, nothing removed first, one line, exit code 2",
    ),
    8: Case("a run folder that cannot be written", "refused before step 1"),
    9: Case("the background writer fails", "seen within one step, exit code 2, the marker unchanged"),
    10: Case("SIGTERM at one rank within a step", "all ranks save the same step once, exit code 75"),
    11: Case("the time-limit signal of Slurm", "saved, requeued, same tracker run, losses go on"),
    12: Case("the signal twice, or during a save", "one save, one requeue"),
    13: Case("a requeue without a signal", "goes on from the run folder"),
    14: Case("preemption by a higher partition", "at most one save interval lost"),
    15: Case("a leftover `.save_tmp` of submitit", "the next requeue works"),
    16: Case("a stopped rank", "named with its stack in time; all ranks end with exit code 4"),
    17: Case("a slow rank", "reported with rank and ratio; nothing stops"),
    18: Case(
        "a loss or gradient that is not finite on one rank",
        "no update anywhere; step, rank and samples named; stop, skip or roll back",
    ),
    19: Case(
        "a corrupt shard in the cache, then a restart", "found on every run, fetched again, never served"
    ),
    20: Case("a tar cut at a member or in a header", "count or hash names the shard"),
    21: Case("a shard or index that is missing or empty", "all are listed before step 1"),
    22: Case(
        "a store that fails, hangs, refuses, cuts short",
        "retries with back-off; time-out; 403 at once; length and hash checked",
    ),
    23: Case(
        "resume with another world size, batch, seed, data",
        "the allowed are exact; others refused with a diff",
    ),
    24: Case("sizes that do not divide", "all problems at once"),
    25: Case("keys extra, missing, renamed, mis-shaped", "all listed; never a partial load"),
    26: Case("a malicious pickle in .pt, .ckpt, .npy", "nothing runs; typed error"),
    27: Case(
        "a hostile tar: ../x, absolute, links, devices, twice the same", "rejected; nothing written outside"
    ),
    28: Case("secrets in environment, configuration, argv", "in no file of the run, log or sbatch text"),
    29: Case("leftovers of a killed run in /dev/shm", "removed if their owner is dead, else named"),
    30: Case("the job ends during the final save", "a save starts only if it fits; the one before stands"),
    31: Case("export while a step is being written", "only complete, verified steps are exported"),
    # Ours: 32 on.
}
