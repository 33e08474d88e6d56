"""Files of a work folder by ranges of image numbers: the ranks' shares, and what a run that goes on finds done.

    <work>/codes-0123456789abcdef/identity.json                     what these are, as plain JSON
    <work>/codes-0123456789abcdef/00000256-00000512.safetensors     values of images 256 to 511

The name of the folder is a fingerprint of the identity, so what was made otherwise is never taken up. Ranges do not
depend on the number of ranks, and whoever reads takes them in order, so neither do the results (but for the last
bits, where the numbers of CPU threads differ). Files are the only way that ranks speak to each other; on several
nodes they need one file system.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track
from safetensors import SafetensorError
from safetensors.numpy import load, save

from pgm_scale.errors import HungRankError, UserError
from pgm_scale.evaluation.images.work import write_file
from pgm_scale.parallel.launch import Launch

Columns = dict[str, np.ndarray]  # by name, one row an image

_POLL_S = 0.2
_NAMED = 8


class ChunkFolder:
    """The chunks of `count` images, `chunk_images` of them in each file but the last."""

    def __init__(
        self, work: Path, kind: str, identity: Mapping[str, Any], count: int, chunk_images: int
    ) -> None:
        self._identity = json.dumps(identity, sort_keys=True, indent=2) + "\n"
        digest = hashlib.sha256(self._identity.encode()).hexdigest()
        self.path = work / f"{kind}-{digest[:16]}"
        self.chunks = [
            range(first, min(first + chunk_images, count)) for first in range(0, count, chunk_images)
        ]

    def has(self, chunk: range) -> bool:
        return self._file(chunk).exists()

    def read(self, chunk: range) -> Columns:
        """Raises: UserError: the file is damaged."""
        path = self._file(chunk)
        try:
            columns = load(path.read_bytes())
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"{path} cannot be read ({error}); delete it and start the same command again"
            ) from None
        if any(len(column) != len(chunk) for column in columns.values()):
            raise UserError(
                f"{path} does not hold {len(chunk)} images; delete it and start the same command again"
            )
        return columns

    def write(self, chunk: range, columns: Columns) -> None:
        """Whole or not at all. Raises: UserError: disk full, no permission, ..."""
        assert all(len(column) == len(chunk) for column in columns.values())
        contiguous = {name: np.ascontiguousarray(column) for name, column in columns.items()}
        write_file(self._file(chunk), save(contiguous))

    def __iter__(self) -> Iterator[Columns]:
        """All chunks in order."""
        return (self.read(chunk) for chunk in self.chunks)

    def column(self, name: str) -> np.ndarray:
        """One column of all images, in order."""
        return np.concatenate([columns[name] for columns in self])

    def fill(self, make: Callable[[range], Columns], launch: Launch, label: str) -> None:
        """Make and write this rank's chunks, those that are there excepted; rank 0 shows a progress bar."""
        self._create(launch)
        own = self.chunks[launch.rank :: launch.world_size]
        todo = [chunk for chunk in own if not self.has(chunk)]
        hidden = launch.rank != 0 or not todo
        for chunk in track(todo, label, console=Console(stderr=True), disable=hidden):
            self.write(chunk, make(chunk))

    def wait(self, launch: Launch, timeout_s: float) -> None:
        """Until all chunks of all ranks are there.

        Raises:
            HungRankError: no chunk has come for `timeout_s`; the ranks and ranges that are missing are named.
        """
        missing, deadline_s = self._missing(), time.monotonic() + timeout_s
        while missing:
            if time.monotonic() > deadline_s:
                raise HungRankError(self._complaint(missing, launch, timeout_s))
            time.sleep(_POLL_S)
            left = [index for index in missing if not self.has(self.chunks[index])]
            if len(left) < len(missing):
                missing, deadline_s = left, time.monotonic() + timeout_s

    def _missing(self) -> list[int]:
        return [index for index, chunk in enumerate(self.chunks) if not self.has(chunk)]

    def _complaint(self, missing: list[int], launch: Launch, timeout_s: float) -> str:
        ranks = sorted({index % launch.world_size for index in missing})
        named = [self._file(self.chunks[index]).name for index in missing[:_NAMED]]
        more = f" and {len(missing) - _NAMED} more" if len(missing) > _NAMED else ""
        return (
            f"{self.path}: nothing new for {timeout_s:.0f} s, and {len(missing)} of {len(self.chunks)} chunks of "
            f"rank(s) {', '.join(map(str, ranks))} are missing: {', '.join(named)}{more}; see what became of these "
            "ranks and start the same command again, which keeps what is done"
        )

    def _create(self, launch: Launch) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"--work: cannot write {self.path} ({error.strerror}); choose another folder"
            ) from None
        if launch.rank == 0:
            write_file(self.path / "identity.json", self._identity.encode())

    def _file(self, chunk: range) -> Path:
        return self.path / f"{chunk.start:08d}-{chunk.stop:08d}.safetensors"
