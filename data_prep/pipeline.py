"""Documents to finished split folders: parallel, in bounded memory, and resumable to the same bytes.

1. Every unit of documents becomes a file of rows in `<output>/.prepare/units`, by any worker in any order.
2. Every shard is made of a fixed range of the units' rows, in `<output>/.prepare/<split>`.
3. Each split folder gets its tokenizer and dataset.json and is renamed into place: complete.

Each file is written whole or not at all and depends on the plan alone, so a run that was killed goes on where
it was and nothing depends on the number of workers. The work folder needs about as much space as the result.
What the documents are, texts or images, is the job's to know.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from data_prep import work
from data_prep.pool import Call, RunBounded, worker_pool
from data_prep.progress import showing
from data_prep.sources import SPLITS
from data_prep.units import (
    Encoding,
    ShardTask,
    Unit,
    UnitCounts,
    UnitRows,
    encode_to_file,
    encode_unit,
    make_shard,
    read_counts,
    write_unit,
)
from pgm_scale.data.manifest import (
    TOKENIZER_NAME,
    DatasetManifest,
    ImageContent,
    Shard,
    ShardFormat,
    TokenDtype,
    Vocabulary,
)
from pgm_scale.data.mds import largest_rows
from pgm_scale.data.writers import shard_name
from pgm_scale.errors import UserError
from pgm_scale.files import sha256_file

PLAN_VERSION = 1  # to be raised with any change of the output's bytes


@dataclass(frozen=True, kw_only=True)
class OutputOptions:
    """`workers` 0 is one for each core."""

    output: Path
    format: ShardFormat = "mds"
    rows_per_shard: int = 8192
    workers: int = 0
    show_progress: bool = True

    def problems(self) -> list[str]:
        problems = []
        if self.rows_per_shard < 1:
            problems.append(f"--rows-per-shard {self.rows_per_shard} is below 1")
        if self.workers < 0:
            problems.append(f"--workers {self.workers} is negative; 0 is one for each core")
        return problems


@dataclass(frozen=True)
class RowFormat:
    """What the manifest says of all rows."""

    vocabulary: Vocabulary
    length_tokens: int
    token_dtype: TokenDtype
    packing: str
    images: ImageContent | None = None


Counts = dict[str, list[UnitCounts]]  # of all units, in order, by split


class Job(Protocol):
    """What there is to prepare."""

    @property
    def activity(self) -> str:
        """What encoding is called, for the progress bar."""
        ...

    @property
    def tokenizer_files(self) -> tuple[str, ...]:
        """Names of the files that `make_tokenizer` writes and that every split folder gets."""
        ...

    def plan(self) -> dict[str, Any]:
        """Everything that decides the rows, in plain JSON values."""
        ...

    def make_tokenizer(self, folder: Path, progress: Progress) -> None:
        """Write the files of the tokenizer into `folder`, which may hold those of a run that was killed."""
        ...

    def encoding(self, folder: Path) -> Encoding: ...

    def total_documents(self) -> int | None:
        """For the progress bar; None where counting would cost a pass."""
        ...

    def units(self) -> Iterator[Unit]:
        """In an order that is always the same."""
        ...

    def check(self, counts: Counts) -> None:
        """Called once all units are encoded; raises a `UserError` if no data set can be made of them."""
        ...

    def row_format(self, folder: Path) -> RowFormat:
        """Called last."""
        ...


def check_shard_size(
    options: OutputOptions, length_tokens: int, token_dtype: TokenDtype, labelled: bool
) -> None:
    """Called before anything is read, as the work of hours would end in it.

    Raises:
        UserError: full shards would not fit their format.
    """
    largest = largest_rows(length_tokens, token_dtype, labelled)
    if options.format == "mds" and options.rows_per_shard > largest:
        raise UserError(
            f"--rows-per-shard {options.rows_per_shard}: so many rows of {length_tokens} tokens exceed the 4 GiB "
            f"of an MDS shard; give --rows-per-shard {largest} or fewer, or --format tar"
        )


def prepare_job(job: Job, options: OutputOptions) -> list[DatasetManifest]:
    """Write `<output>/<split>` for each split of the job and return their manifests.

    A completed output of the same plan is left as it is; after a kill the same call goes on.

    Raises:
        UserError: bad input, a full disk, an output that holds something else, or one that another process is
            writing.
    """
    try:
        options.output.mkdir(parents=True, exist_ok=True)
        with work.only_writer(options.output), showing(_progress(options.show_progress)) as progress:
            return _prepare(job, options, progress)
    except BrokenProcessPool:
        raise UserError(
            "a worker process was killed, most likely for memory; run the same command with fewer --workers, "
            "and it goes on where it stopped"
        ) from None
    except OSError as error:
        where = error.filename or options.output
        raise UserError(
            f"{where}: {error.strerror or error}; make room or mend permissions, then run the same command: "
            "it goes on where it stopped"
        ) from None


def _prepare(job: Job, options: OutputOptions, progress: Progress) -> list[DatasetManifest]:
    plan = _plan(job, options)
    done = work.completed(options.output, plan)
    if done:
        return done
    folder = work.claim(options.output, plan)
    job.make_tokenizer(folder, progress)
    encoding = job.encoding(folder)
    with worker_pool(encoding, options.workers) as run_bounded:
        counts = _encode_units(job, encoding, folder, run_bounded, progress)
        _check_unchanged(plan, _plan(job, options), folder)
        job.check(counts)
        shards = _make_shards(counts, folder, options, run_bounded, progress)
    rows = job.row_format(folder)
    manifests = [
        DatasetManifest(
            format=options.format,
            split=split,
            vocabulary=rows.vocabulary,
            tokenizer_sha256=sha256_file(folder / TOKENIZER_NAME),
            length_tokens=rows.length_tokens,
            token_dtype=rows.token_dtype,
            packing=rows.packing,
            source=plan,
            documents=sum(unit.documents for unit in counts[split]),
            rows=sum(unit.rows for unit in counts[split]),
            tokens=sum(unit.tokens for unit in counts[split]),
            shards=shards[split],
            images=rows.images,
        )
        for split in SPLITS
    ]
    for manifest in manifests:
        work.finish(folder, options.output, job.tokenizer_files, manifest)
    shutil.rmtree(folder)
    return manifests


def _plan(job: Job, options: OutputOptions) -> dict[str, Any]:
    return {
        "version": PLAN_VERSION,
        "format": options.format,
        "rows_per_shard": options.rows_per_shard,
        **job.plan(),
    }


def _check_unchanged(before: dict[str, Any], now: dict[str, Any], folder: Path) -> None:
    """Rows of a file that changed while it was read are of no version of it; so it is hashed before and after."""
    if before != now:
        shutil.rmtree(folder)
        raise UserError(
            "the input changed while it was read, so nothing of it is kept; run the same command again once "
            "nobody writes to it"
        )


def _encode_units(
    job: Job, encoding: Encoding, folder: Path, run_bounded: RunBounded, progress: Progress
) -> Counts:
    """Counts of all units by split, in order. What an earlier run has finished is read past, not encoded."""
    bar = progress.add_task(job.activity, total=job.total_documents())
    counts: dict[str, dict[int, UnitCounts]] = {split: {} for split in SPLITS}
    finish = encoding.finisher()

    def calls() -> Iterator[Call]:
        for unit in job.units():
            key = (unit.split, unit.number)
            file = _unit_file(folder, *key)
            if file.exists():
                yield key, read_counts, file
            elif finish is None:
                yield key, encode_to_file, unit, file
            else:
                yield key, encode_unit, unit

    for (split, number), result in run_bounded(calls()):
        if finish is not None and isinstance(result, UnitRows):
            result = write_unit(finish(result), _unit_file(folder, split, number))
        counts[split][number] = result
        progress.advance(bar, result.documents + len(result.rejected))
    return {split: [by_number[n] for n in sorted(by_number)] for split, by_number in counts.items()}


def _make_shards(
    counts: Counts,
    folder: Path,
    options: OutputOptions,
    run_bounded: RunBounded,
    progress: Progress,
) -> dict[str, tuple[Shard, ...]]:
    tasks = {
        (split, number): ShardTask(
            folder / split,
            shard_name(number, options.format),
            options.format,
            tuple((_unit_file(folder, split, unit), first, last) for unit, first, last in ranges),
        )
        for split in SPLITS
        for number, ranges in enumerate(
            shard_ranges([unit.rows for unit in counts[split]], options.rows_per_shard)
        )
    }
    bar = progress.add_task("writing shards", total=len(tasks))
    shards = {}
    for key, shard in run_bounded((key, make_shard, task) for key, task in tasks.items()):
        shards[key] = shard
        progress.advance(bar)
    return {split: tuple(shards[key] for key in tasks if key[0] == split) for split in SPLITS}


def shard_ranges(rows_of_units: list[int], rows_per_shard: int) -> list[list[tuple[int, int, int]]]:
    """For each shard the (unit, first row, last row + 1) that make it; only the last shard is not full."""
    shards: list[list[tuple[int, int, int]]] = []
    free = 0
    for unit, rows in enumerate(rows_of_units):
        first = 0
        while first < rows:
            if free == 0:
                shards.append([])
                free = rows_per_shard
            last = min(rows, first + free)
            shards[-1].append((unit, first, last))
            free -= last - first
            first = last
    return shards


def _progress(shown: bool) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=not shown,
    )


def _unit_file(folder: Path, split: str, number: int) -> Path:
    return folder / "units" / f"{split}-{number:07d}.npz"
