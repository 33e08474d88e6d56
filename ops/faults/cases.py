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
    32: Case(
        "a whole, newer checkpoint of another run in the folder; another run's run.json",
        "fall back; with the other run.json refused, and nothing is moved",
    ),
    33: Case(
        "checkpoints/ or run.json gone, or a dead link, although there have been checkpoints",
        "refused: neither from nothing nor under another description",
    ),
    34: Case(
        "the newest checkpoint cannot be read now: no permission, too many open files",
        "refused; what may be good is not put in the quarantine",
    ),
    35: Case(
        "disk or inodes full while logs, heartbeat, samples, LATEST are written",
        "said once; training goes on to the save; no half line, and later records follow",
    ),
    36: Case(
        "a byte of config.yaml, run.json, tokenizer.json flipped, cut, put in",
        "named and refused, or mended from the data; no weights with another meaning",
    ),
    37: Case(
        "strange names in checkpoints/: a backup, another spelling, a copy under a coming step's name",
        "not deleted, not counted as kept, not taken for a committed step",
    ),
    38: Case(
        "fuzzed manifest (with a true seal), rank header, marker, run.json, costs, log, heartbeat, lock",
        "a value or one typed error, in bounded time and memory",
    ),
    39: Case(
        "the run folder is renamed or removed while it trains",
        "nothing more is written; one line, exit code 2; it goes on in its new place",
    ),
    40: Case(
        "stdout or stderr: its reader gone, its terminal closed, its disk full, closed from the start",
        "training goes on; a result that is cut is one line, exit code 2; nothing of it gets into a file",
    ),
    41: Case("ranks with another configuration, data or code", "refused before step 1 with the differences"),
    42: Case("a run folder that the nodes do not share", "refused before step 1; the rank and folder named"),
    43: Case("SIGHUP: the terminal is closed", "saved, exit code 75; under nohup it goes on"),
    44: Case(
        "Ctrl-C while a library is imported that catches it",
        "exit code 130; never a training with half a library",
    ),
    45: Case(
        "too few open files are allowed",
        "the limit is raised as far as it may be, else one line at the start",
    ),
    46: Case("a tracker that hangs or dies", "training goes on; the next session sends the rest"),
    47: Case(
        "damaged heartbeat, metrics, tracker state, lock", "`runs` shows it, a resume goes on; no traceback"
    ),
    48: Case("ranks and ports that cannot be, or contradict each other", "one line on every rank that came"),
    49: Case(
        "an alert command that hangs, forks, fails; nowhere to write metrics", "said once; training goes on"
    ),
    50: Case(
        "a flipped digit, a wild value, a key twice in dataset.json",
        "it holds its own hash: one line that names the file",
    ),
    51: Case(
        "`prepare` killed anywhere, and its leftovers damaged before the same command",
        "the bytes of an uninterrupted one, or one line that names what to delete",
    ),
    52: Case(
        "a FIFO, device, folder or circular link in the place of a data file", "one line; nothing hangs"
    ),
    53: Case("an input that changes while `prepare` reads it", "refused; nothing of it is kept"),
    54: Case("decompression bombs: .zst, .gz, images of absurd size", "bounded memory; streamed or refused"),
    55: Case("the disk fills up during `prepare`", "one line, exit code 2; the same command goes on"),
    56: Case(
        "ids, lengths or labels out of range in a shard whose hash is right",
        "shard and row named by `train` and `doctor`, exit code 2",
    ),
    57: Case(
        "a cache that is read-only, full, full of junk, or held by a stopped process",
        "one line; junk replaced; the holder named",
    ),
    58: Case("a shard that is cut while it is trained on", "never SIGBUS: named, exit code 2"),
    59: Case(
        "any damage in a text, parquet, image, tar or tokenizer", "read, left out and counted, or one line"
    ),
    60: Case("any mutation of a configuration or override", "valid, or one readable message and exit code 2"),
    61: Case(
        "YAML that is deep, doubled, endless, huge, tagged or full of aliases",
        "one short message in bounded time; no key is read twice",
    ),
    62: Case(
        "HTTP and JSON that break the rules, pipelined or without end",
        "a typed JSON error of 4xx; the next client gets the same answer as before",
    ),
    63: Case("clients that drip, stall or leave", "refused with 408 in time; their places are free again"),
    64: Case("a pipe, a device or a folder in the place of a file", "told at once; nothing is waited for"),
    65: Case(
        "foreign bytes that are flipped, cut, forged or deflated bombs",
        "a typed error, or the whole value; no memory for what a header claims",
    ),
    66: Case(
        "two exports to one folder, or one that is killed", "the second is refused; the next one starts clean"
    ),
    67: Case("a full disk under export, convert, sample, eval, report", "one line; nothing half written"),
    68: Case("output to /dev/null, a device or a pipe", "refused; root does not replace the device"),
    69: Case(
        "metrics and evaluations that are damaged, given to a report", "read whole, or the line is named"
    ),
    70: Case(
        "kill -9 at 200 random points of a training run with saves every few steps",
        "200 exact resumes: data, losses, norms, and in the end weights, moments and EMA to the last bit",
    ),
    71: Case(
        "SIGTERM, and SIGKILL during the save that answers it",
        "nothing is missing in metrics.jsonl when the run goes on",
    ),
    72: Case(
        "kills while a lock or a heartbeat is written, again and again",
        "what they leave is removed by the next start; nothing of a live process is",
    ),
    73: Case(
        "roll_backs.json damaged, missing, another run's; roll backs without end",
        "refused: no data are left out or trained on by mistake; three to one checkpoint end the run",
    ),
}
