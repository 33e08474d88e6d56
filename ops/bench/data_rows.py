"""Tokens a second that one process reads, and `prepare text` against the tokenizer library's own batches."""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np

from data_prep.tokenizers import open_tokenizer, train_bpe
from ops.bench.machine import Machine
from ops.bench.measure import Row, Side, Target, ratio, take_turns
from pgm_scale.data.loader import BatchStream, TokenLoader
from pgm_scale.data.manifest import DatasetManifest, ShardFormat, Vocabulary
from pgm_scale.data.order import BatchPlan, GlobalOrder
from pgm_scale.data.storage import SplitStorage
from pgm_scale.data.writers import shard_name, write_shard
from pgm_scale.files import sha256_file

FORMATS: tuple[ShardFormat, ...] = ("mds", "tar")
LENGTH_TOKENS = 1024
SHARDS, ROWS_PER_SHARD = 4, 8192  # of the default size, read in one epoch of 34 M tokens
BATCH_SEQUENCES = 32
BATCH_BYTES_PER_TOKEN = 8  # int64, which is what a batch delivers
READING_REPEATS = 5

TEXT_BYTES = (
    40_000_000  # the start of the command and the last unit of work, some 1.3 s, are then a small part
)
TOKENIZER_SIZE, TOKENIZER_DOCUMENTS = 8192, 500
LIBRARY_BATCH_DOCUMENTS = 100  # its best rate of 100, 1,000 and all at once
PREPARE_REPEATS = 2


def rows(machine: Machine) -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as folder:
        yield from reading_rows(machine, Path(folder))
    with tempfile.TemporaryDirectory() as folder:
        yield from prepare_rows(Path(folder))


def reading_rows(machine: Machine, folder: Path) -> Iterator[Row]:
    """A whole epoch each time, so every shard is hashed and decoded once a run, as in training."""
    sides = []
    for format in FORMATS:
        storage = write_random_split(folder / format, format)
        tokens = storage.manifest.rows * LENGTH_TOKENS
        for name, read in (("TokenLoader", read_by_loader), ("BatchStream", read_by_stream)):
            work_bytes = float(BATCH_BYTES_PER_TOKEN * tokens)
            sides.append(Side(f"{format}, {name}", partial(read, storage), work_bytes, "memory"))
    seconds = take_turns(sides, READING_REPEATS)
    fractions = machine.fractions(sides, seconds)
    for side in sides:
        yield Row(
            f"reading {side.name}; L {LENGTH_TOKENS}, batch {BATCH_SEQUENCES}, warm cache",
            side.work / BATCH_BYTES_PER_TOKEN / statistics.median(seconds[side.name]),
            "tokens/s",
            Target(10e6, 30e6),
            {side.name: seconds[side.name]},
            {side.name: side.work},
            {side.name: fractions[side.name]},
            side.resource,
            "hashing, decoding, shuffling included",
        )


def read_by_loader(storage: SplitStorage) -> None:
    order = shuffled(storage)
    loader = TokenLoader(storage, order)
    for start in range(0, order.rows, BATCH_SEQUENCES):
        loader.read(np.arange(start, start + BATCH_SEQUENCES))


def read_by_stream(storage: SplitStorage) -> None:
    """Through the background thread of training, with nothing to do on a batch."""
    order = shuffled(storage)
    plan = BatchPlan(BATCH_SEQUENCES, BATCH_SEQUENCES)
    steps = order.rows // BATCH_SEQUENCES
    loader = TokenLoader(storage, order)
    with BatchStream(loader, plan, start_step=0, stop_step=steps, transform=lambda batch: batch) as stream:
        for _ in stream:
            pass


def shuffled(storage: SplitStorage) -> GlobalOrder:
    return GlobalOrder(storage.manifest.rows_per_shard, seed=1, shuffle_block_shards=SHARDS)


def write_random_split(folder: Path, format: ShardFormat) -> SplitStorage:
    """A split folder of random tokens below GPT-2's vocabulary."""
    folder.mkdir()
    tokenizer = folder / "tokenizer.json"
    tokenizer.write_text("{}")
    rng = np.random.default_rng(0)
    shards = []
    for number in range(SHARDS):
        tokens_RL = rng.integers(0, 50_257, (ROWS_PER_SHARD, LENGTH_TOKENS), np.uint16)
        valid_lengths_R = np.full(ROWS_PER_SHARD, LENGTH_TOKENS)
        shards.append(write_shard(folder, shard_name(number, format), format, tokens_RL, valid_lengths_R))
    DatasetManifest(
        format=format,
        split="train",
        vocabulary=Vocabulary(50_258, 50_257, 50_256, 50_256, None),
        tokenizer_sha256=sha256_file(tokenizer),
        length_tokens=LENGTH_TOKENS,
        token_dtype="uint16",
        packing="wrap",
        source={},
        documents=1,
        rows=SHARDS * ROWS_PER_SHARD,
        tokens=SHARDS * ROWS_PER_SHARD * LENGTH_TOKENS,
        shards=tuple(shards),
    ).save(folder)
    return SplitStorage(folder)


def prepare_rows(folder: Path) -> Iterator[Row]:
    """The whole command (its start, surveying, workers, tokens, shards, hashes) against tokens thrown away."""
    texts = standard_library_texts()
    (folder / "text").mkdir()
    (folder / "text" / "all.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    tokenizer = folder / "tokenizer.json"
    tokenizer.write_bytes(train_bpe(texts[:TOKENIZER_DOCUMENTS], TOKENIZER_SIZE))
    text_bytes = float(sum(len(text.encode()) for text in texts))
    output = folder / "output"

    # The installed command, in a process of its own: its workers would import this program's modules again.
    command = [str(Path(sysconfig.get_path("scripts")) / "pgm-scale"), "prepare", "text", "--quiet"]
    command += ["--input", str(folder / "text"), "--output", str(output), "--tokenizer", str(tokenizer)]

    def prepare_text(format: ShardFormat) -> None:
        subprocess.run([*command, "--format", format], check=True, stdout=subprocess.DEVNULL)

    library = Side("encode_batch_fast", partial(encode_by_library, tokenizer.read_bytes(), texts), text_bytes)
    remove = partial(shutil.rmtree, output)
    sides = [Side(format, partial(prepare_text, format), text_bytes, undo=remove) for format in FORMATS]
    seconds = take_turns([library, *sides], PREPARE_REPEATS, warm_ups=0)
    sizes = f"{text_bytes / 1e6:.0f} MB, BPE {TOKENIZER_SIZE}"
    for side in sides:
        yield Row(
            f"prepare text to {side.name}, against encode_batch_fast; {sizes}",
            ratio(seconds, library.name, side.name),
            "x",
            Target(0.75, 0.9),
            {name: seconds[name] for name in (library.name, side.name)},
            {library.name: text_bytes, side.name: text_bytes},
            note="work is bytes of text",
        )


def encode_by_library(tokenizer_json: bytes, texts: list[str]) -> None:
    """On all cores by the library's own threads, or as TOKENIZERS_PARALLELISM and RAYON_NUM_THREADS say."""
    tokenizer = open_tokenizer(tokenizer_json, "bench")
    for start in range(0, len(texts), LIBRARY_BATCH_DOCUMENTS):
        tokenizer.encode_batch_fast(texts[start : start + LIBRARY_BATCH_DOCUMENTS], add_special_tokens=False)


def standard_library_texts() -> list[str]:
    """Python's own sources, a document a file: real and distinct text that every machine has."""
    paths = sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py"))
    texts: list[str] = []
    left_bytes = TEXT_BYTES
    for path in paths:
        if left_bytes <= 0:
            break
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):  # the test suite has files that are not UTF-8 on purpose
            continue
        left_bytes -= len(text.encode())
        texts += [text] if text.strip() else []
    return texts
