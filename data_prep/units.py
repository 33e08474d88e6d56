"""What a worker process does: a unit of documents to a file of rows, and rows of several units to a shard.

A worker imports numpy and tokenizers only, and ends with its parent, even when that is killed.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from data_prep.packing import Packing, pack
from data_prep.sources import Unit
from data_prep.tokenizers import encode, open_tokenizer
from pgm_scale.data.manifest import Shard, ShardFormat, Vocabulary
from pgm_scale.files import commit, sha256_file


@dataclass(frozen=True)
class Encoding:
    """How every unit is encoded: given to each worker once."""

    tokenizer_file: Path
    vocabulary: Vocabulary
    packing: Packing
    length_tokens: int
    detokenise: Callable[[str], str] | None


@dataclass(frozen=True)
class UnitCounts:
    documents: int
    rows: int
    tokens: int


@dataclass(frozen=True)
class ShardTask:
    """Rows [first, last) of each listed unit file make one shard."""

    folder: Path
    name: str
    format: ShardFormat
    parts: tuple[tuple[Path, int, int], ...]


_encoding: Encoding
_tokenizer: Tokenizer


def start_worker(encoding: Encoding) -> None:
    """Called once in each worker process."""
    global _encoding, _tokenizer
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one process is one core
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which then lets us finish
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _encoding = encoding
    _tokenizer = open_tokenizer(encoding.tokenizer_file.read_bytes(), str(encoding.tokenizer_file))


def _end_with_parent() -> None:
    """A pool's worker holds both ends of its queue, so it would wait for a killed parent for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def encode_unit(unit: Unit, file: Path) -> UnitCounts:
    """Write the rows of one unit to `file` (.npz), whole or not at all."""
    texts = unit.texts if _encoding.detokenise is None else list(map(_encoding.detokenise, unit.texts))
    tokens_RL, valid_lengths_R = pack(
        _encoding.packing, list(encode(_tokenizer, texts)), _encoding.length_tokens, _encoding.vocabulary
    )
    counts = UnitCounts(len(texts), len(tokens_RL), int(valid_lengths_R.sum()))
    temporary = file.with_name(f".{file.name}.{os.getpid()}.writing")
    with open(temporary, "wb") as stream:
        np.savez(
            stream,
            tokens_RL=tokens_RL,
            valid_lengths_R=valid_lengths_R,
            counts=np.array([counts.documents, counts.rows, counts.tokens]),
        )
    commit(temporary, file)
    return counts


def read_counts(file: Path) -> UnitCounts:
    with np.load(file, allow_pickle=False) as content:
        return UnitCounts(*content["counts"].tolist())


def make_shard(task: ShardTask) -> Shard:
    """Write one shard, unless an earlier run has: a file that is there is whole."""
    from pgm_scale.data.writers import write_shard

    tokens, valid_lengths = [], []
    path = task.folder / task.name
    if path.exists():
        rows = sum(last - first for _, first, last in task.parts)
        return Shard(task.name, rows, path.stat().st_size, sha256_file(path))
    for file, first, last in task.parts:
        with np.load(file, allow_pickle=False) as content:
            tokens.append(content["tokens_RL"][first:last])
            valid_lengths.append(content["valid_lengths_R"][first:last])
    return write_shard(
        task.folder, task.name, task.format, np.concatenate(tokens), np.concatenate(valid_lengths)
    )
