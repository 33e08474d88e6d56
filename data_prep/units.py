"""What a worker process does: a unit of documents to a file of rows, and rows of several units to a shard.

A worker imports what its encoding needs, and ends with its parent, even when that is killed.
"""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import signal
import threading
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from zipfile import BadZipFile

import numpy as np

from pgm_scale.data.manifest import Shard, ShardFormat
from pgm_scale.errors import UserError
from pgm_scale.files import commit


@dataclass(frozen=True)
class Unit:
    """Consecutive documents of one split: all that one worker needs, and all that its result depends on.

    `documents` are texts, or the images of `data_prep.image_sources`.
    """

    split: str
    number: int
    documents: list[Any]


@dataclass(frozen=True)
class Rejected:
    """A document that cannot be used, and why, in a few words."""

    name: str
    reason: str


@dataclass(frozen=True)
class UnitRows:
    """What a unit becomes: tokens [R, L], valid lengths [R], labels [R] of images, of so many documents."""

    documents: int
    tokens_RL: np.ndarray
    valid_lengths_R: np.ndarray
    labels_R: np.ndarray | None = None
    rejected: tuple[Rejected, ...] = ()


@dataclass(frozen=True)
class UnitCounts:
    documents: int
    rows: int
    tokens: int
    rejected: tuple[Rejected, ...] = ()


class Encoding(Protocol):
    """How every unit is encoded: given to each worker once."""

    def start(self) -> Callable[[Unit], UnitRows]:
        """Called in each worker process; what it returns does the work of a worker."""
        ...

    def finisher(self) -> Callable[[UnitRows], UnitRows] | None:
        """Called in the main process: the rest of the work, for what only it has (a GPU); None for nothing."""
        ...


@dataclass(frozen=True)
class ShardTask:
    """Rows [first, last) of each listed unit file make one shard."""

    folder: Path
    name: str
    format: ShardFormat
    parts: tuple[tuple[Path, int, int], ...]


_encode: Callable[[Unit], UnitRows]


def start_worker(encoding: Encoding) -> None:
    """Called once in each worker process."""
    global _encode
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one process is one core
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which then lets us finish
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _encode = encoding.start()


def _end_with_parent() -> None:
    """A pool's worker holds both ends of its queue, so it would wait for a killed parent for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def encode_unit(unit: Unit) -> UnitRows:
    return _encode(unit)


def encode_to_file(unit: Unit, file: Path) -> UnitCounts:
    return write_unit(_encode(unit), file)


def write_unit(rows: UnitRows, file: Path) -> UnitCounts:
    """Write the rows of one unit to `file` (.npz), whole or not at all."""
    counts = UnitCounts(rows.documents, len(rows.tokens_RL), int(rows.valid_lengths_R.sum()), rows.rejected)
    temporary = file.with_name(f".{file.name}.{os.getpid()}.writing")
    labels = {} if rows.labels_R is None else {"labels_R": rows.labels_R}
    content = io.BytesIO()  # a zip file that cannot be written complains again when it is forgotten
    np.savez(
        content,
        tokens_RL=rows.tokens_RL,
        valid_lengths_R=rows.valid_lengths_R,
        counts=np.array([counts.documents, counts.rows, counts.tokens]),
        rejected=np.array(json.dumps([[r.name, r.reason] for r in rows.rejected])),
        **labels,
    )
    temporary.write_bytes(content.getbuffer())
    commit(temporary, file)
    return counts


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    """The arrays of a unit's file, whose checksums are compared while they are read."""
    try:
        with np.load(file, allow_pickle=False) as content:
            yield content
    except (BadZipFile, ValueError, LookupError, EOFError, zlib.error, NotImplementedError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{file}: damaged since it was written ({reason}); delete it and run the same command: "
            "only it is made again"
        ) from None


def read_counts(file: Path) -> UnitCounts:
    with _opened(file) as content:
        documents, rows, tokens = content["counts"].tolist()
        # Files of texts by the version before images lack it.
        listed = json.loads(str(content["rejected"])) if "rejected" in content.files else []
        return UnitCounts(documents, rows, tokens, tuple(Rejected(name, reason) for name, reason in listed))


def make_shard(task: ShardTask) -> Shard:
    """Write one shard, also if an earlier run has: what lies there may have been damaged since, unlike the units
    it has no checksum yet, and the hash that is taken now is what all will trust."""
    from pgm_scale.data.writers import write_shard

    rows = sum(last - first for _, first, last in task.parts)
    columns: dict[str, np.ndarray] = {}
    start = 0
    for file, first, last in task.parts:
        with _opened(file) as content:
            for name in {"tokens_RL", "valid_lengths_R", "labels_R"} & set(content.files):
                part = content[name][first:last]
                if name not in columns:  # filled part by part: a shard of pixels may have gigabytes
                    columns[name] = np.empty((rows, *part.shape[1:]), part.dtype)
                columns[name][start : start + len(part)] = part
        start += last - first
    return write_shard(task.folder, task.name, task.format, **columns)
