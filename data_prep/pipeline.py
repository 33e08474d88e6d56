"""Documents to finished split folders: parallel, in bounded memory, and resumable to the same bytes.

1. Every unit of documents becomes a file of rows in `<output>/.prepare/units`, by any worker in any order.
2. Every shard is made of a fixed range of the units' rows, in `<output>/.prepare/<split>`.
3. Each split folder gets its tokenizer.json and dataset.json and is renamed into place: complete.

Each file is written whole or not at all and depends on the plan alone, so a run that was killed goes on where
it was and nothing depends on the number of workers. The work folder needs about as much space as the result.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

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
from data_prep.packing import Packing
from data_prep.pool import Call, RunBounded, worker_pool
from data_prep.sources import SPLITS, TRAIN, DocumentSource, units_of
from data_prep.tokenizers import load_tokenizer, open_tokenizer, size_to_train, train_bpe, vocabulary_of
from data_prep.units import (
    Encoding,
    ShardTask,
    UnitCounts,
    encode_unit,
    make_shard,
    read_counts,
)
from pgm_scale.data.manifest import TOKENIZER_NAME, DatasetManifest, Shard, ShardFormat, token_dtype_for
from pgm_scale.data.writers import shard_name
from pgm_scale.errors import UserError
from pgm_scale.files import atomic_write_bytes

PLAN_VERSION = 1  # to be raised with any change of the output's bytes


@dataclass(frozen=True)
class PrepareOptions:
    """`tokenizer` is a path, a hub name or `train:bpe:<size>`; `workers` 0 is one for each core."""

    output: Path
    tokenizer: str
    length_tokens: int
    packing: Packing = "wrap"
    format: ShardFormat = "mds"
    rows_per_shard: int = 8192
    workers: int = 0
    show_progress: bool = True


def prepare(source: DocumentSource, options: PrepareOptions) -> list[DatasetManifest]:
    """Write `<output>/<split>` for each split of the source and return their manifests.

    A completed output of the same plan is left as it is; after a kill the same call goes on.

    Raises:
        UserError: bad options or input, a full disk, an output that holds something else, or one that another
            process is writing.
    """
    _check(options)
    try:
        options.output.mkdir(parents=True, exist_ok=True)
        with work.only_writer(options.output):
            return _prepare(source, options)
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


def _check(options: PrepareOptions) -> None:
    problems = []
    if options.length_tokens < 4:
        problems.append(f"--length {options.length_tokens} is below 4 (BOS, EOS and text)")
    if options.rows_per_shard < 1:
        problems.append(f"--rows-per-shard {options.rows_per_shard} is below 1")
    if options.workers < 0:
        problems.append(f"--workers {options.workers} is negative; 0 is one for each core")
    if problems:
        raise UserError("; ".join(problems))


def _prepare(source: DocumentSource, options: PrepareOptions) -> list[DatasetManifest]:
    size = size_to_train(options.tokenizer)
    loaded = load_tokenizer(options.tokenizer) if size is None else None
    plan = _plan(source, options, _sha256(loaded) if loaded else options.tokenizer)
    done = work.completed(options.output, plan)
    if done:
        return done
    folder = work.claim(options.output, plan)
    with _progress(options.show_progress) as progress:
        tokenizer_file = folder / TOKENIZER_NAME
        if not tokenizer_file.exists():
            atomic_write_bytes(tokenizer_file, loaded or _train_tokenizer(source, size or 0, progress))
        tokenizer = tokenizer_file.read_bytes()
        vocabulary = vocabulary_of(
            open_tokenizer(tokenizer, options.tokenizer), options.packing, options.tokenizer
        )
        encoding = Encoding(
            tokenizer_file, vocabulary, options.packing, options.length_tokens, source.detokenise
        )
        with worker_pool(encoding, options.workers) as run_bounded:
            counts = _encode_units(source, folder, run_bounded, progress)
            _refuse_empty(counts, options.length_tokens)
            shards = _make_shards(counts, folder, options, run_bounded, progress)
    manifests = [
        DatasetManifest(
            format=options.format,
            split=split,
            vocabulary=vocabulary,
            tokenizer_sha256=_sha256(tokenizer),
            length_tokens=options.length_tokens,
            token_dtype=token_dtype_for(vocabulary.size),
            packing=options.packing,
            source=plan,
            documents=sum(unit.documents for unit in counts[split]),
            rows=sum(unit.rows for unit in counts[split]),
            tokens=sum(unit.tokens for unit in counts[split]),
            shards=shards[split],
        )
        for split in SPLITS
    ]
    for manifest in manifests:
        work.finish(folder, options.output, tokenizer, manifest)
    shutil.rmtree(folder)
    return manifests


def _plan(source: DocumentSource, options: PrepareOptions, tokenizer: str) -> dict[str, Any]:
    """Everything that decides the output's bytes; kept in `dataset.json` as its source."""
    return {
        "version": PLAN_VERSION,
        "tokenizer": tokenizer,
        "length_tokens": options.length_tokens,
        "packing": options.packing,
        "format": options.format,
        "rows_per_shard": options.rows_per_shard,
        "unit": asdict(source.unit_size),
        "text": source.describe(),
    }


def _train_tokenizer(source: DocumentSource, size: int, progress: Progress) -> bytes:
    task = progress.add_task("training the tokenizer", total=None)
    texts = (
        source.detokenise(text) if source.detokenise else text
        for split, text in source.documents()
        if split == TRAIN
    )
    content = train_bpe(texts, size)
    progress.update(task, total=1, completed=1)
    return content


def _encode_units(
    source: DocumentSource, folder: Path, run_bounded: RunBounded, progress: Progress
) -> dict[str, list[UnitCounts]]:
    """Counts of all units by split, in order. What an earlier run has finished is read past, not encoded."""
    bar = progress.add_task("tokenizing", total=source.total_documents())
    counts: dict[str, dict[int, UnitCounts]] = {split: {} for split in SPLITS}

    def calls() -> Iterator[Call]:
        for unit in units_of(source.documents(), source.unit_size):
            file = _unit_file(folder, unit.split, unit.number)
            key = (unit.split, unit.number)
            yield (key, read_counts, file) if file.exists() else (key, encode_unit, unit, file)

    for (split, number), unit_counts in run_bounded(calls()):
        counts[split][number] = unit_counts
        progress.advance(bar, unit_counts.documents)
    return {split: [by_number[n] for n in sorted(by_number)] for split, by_number in counts.items()}


def _make_shards(
    counts: dict[str, list[UnitCounts]],
    folder: Path,
    options: PrepareOptions,
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


def _refuse_empty(counts: dict[str, list[UnitCounts]], length_tokens: int) -> None:
    for split in SPLITS:
        if not any(unit.rows for unit in counts[split]):
            documents = sum(unit.documents for unit in counts[split])
            raise UserError(
                f"the {split} split has {documents} documents, too few for one row of {length_tokens} "
                "tokens; give more text, a shorter --length, or another share for validation"
            )


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


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
