"""The step folders of a run on the disk, as one process (rank 0) begins, commits, recovers and deletes them.

    <run>/checkpoints/step_00001000/{rank_00000.safetensors, ..., state.json, manifest.json}
    <run>/checkpoints/LATEST                          the name of the newest step
    <run>/checkpoints/quarantine/step_...-<reason>    bad steps, for a person to look at
    <run>/checkpoints/.step_00002000.saving           a save under way, or one that died

A save writes and syncs all files in the `.saving` folder, the manifest last, renames the folder, syncs the
parent and then moves LATEST. A death before the manifest loses that save only; a death after it loses
nothing, as `recover` finishes the rename, and LATEST is a convenience that the next start repairs.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from pgm_scale.checkpoint.fragments import FileEntry, Fragment, Kind
from pgm_scale.checkpoint.host_buffers import HostBuffers
from pgm_scale.checkpoint.manifest import (
    MANIFEST_NAME,
    STATE_NAME,
    Manifest,
    find_size_problems,
    join,
    rank_file_name,
    read_manifest,
)
from pgm_scale.checkpoint.peers import describe
from pgm_scale.checkpoint.writing import write_fragments
from pgm_scale.errors import UserError
from pgm_scale.files import atomic_write_bytes, fsync_folder, sha256_file, write_synced

logger = logging.getLogger(__name__)

_STEP_NAME = re.compile(r"step_(\d{8,})")


def step_name(step: int) -> str:
    return f"step_{step:08d}"


class StepFolders:
    """One process's view of `<run_folder>/checkpoints`. A save is begin, write_rank (all ranks), commit."""

    def __init__(self, run_folder: str | Path) -> None:
        self.folder = Path(run_folder) / "checkpoints"

    def steps(self) -> list[int]:
        """All committed steps in ascending order, verified or not."""
        if not self.folder.is_dir():
            return []
        found = [_STEP_NAME.fullmatch(entry.name) for entry in os.scandir(self.folder)]
        return sorted(int(match[1]) for match in found if match)

    def of(self, step: int) -> Path:
        """The folder of a committed step."""
        return self.folder / step_name(step)

    def saving(self, step: int) -> Path:
        """The folder of a step while it is being written."""
        return self.folder / f".{step_name(step)}.saving"

    def begin(self, step: int) -> bool:
        """Rank 0, before any rank writes: an empty folder for the save. False when the step is committed."""
        if self.of(step).exists():
            return False
        self._make_folder()
        self.abandon(step)
        self.saving(step).mkdir()
        return True

    def write_rank(
        self,
        step: int,
        rank: int,
        fragments: Iterable[tuple[Kind, Fragment]],
        progress: Callable[[str], None] = lambda _: None,
        buffers: HostBuffers | None = None,
        copied: Callable[[], None] | None = None,
    ) -> FileEntry:
        """Write and sync one rank's own file, see `write_fragments`. Raises: OSError."""
        return write_fragments(self.saving(step) / rank_file_name(rank), fragments, progress, buffers, copied)

    def commit(self, step: int, entries: Sequence[FileEntry], state: dict[str, Any]) -> None:
        """Rank 0, after all ranks have written: make the step durable and visible, in the order above.

        Args:
            entries: those of all ranks, in rank order.
            state: JSON values.

        Raises:
            OSError, UserError: not committed; the earlier steps stand.
        """
        saving = self.saving(step)
        problems = find_size_problems(saving, entries)
        if problems:
            raise UserError(
                f"rank 0 does not see what the ranks wrote: {join(problems)}; is {saving} shared?"
            )
        state_bytes = json.dumps(state, indent=1, allow_nan=False).encode()
        write_synced(saving / STATE_NAME, state_bytes)
        state_entry = FileEntry(STATE_NAME, len(state_bytes), sha256_file(saving / STATE_NAME))
        write_synced(saving / MANIFEST_NAME, Manifest(step, (*entries, state_entry)).to_bytes())
        self._publish(step)
        self.move_marker(step)

    def abandon(self, step: int) -> None:
        """Rank 0: remove what a failed save of this step has left."""
        shutil.rmtree(self.saving(step), ignore_errors=True)

    def recover(self) -> None:
        """At start: finish the saves that died after their manifest, remove the other leftovers."""
        self._make_folder()
        for leftover in [*self.folder.glob(".step_*"), *self.folder.glob(".LATEST.*")]:
            match = re.fullmatch(rf"\.{_STEP_NAME.pattern}\.saving", leftover.name)
            if match and self._is_complete(leftover, int(match[1])):
                logger.warning("finished the commit of %s, which had died before its rename", leftover.name)
                self._publish(int(match[1]))
            elif leftover.is_dir():
                logger.warning("removed %s, left by a process that died", leftover.name)
                shutil.rmtree(leftover)
            else:
                leftover.unlink()

    def purge(self, keep_last: int, intervals_steps: Sequence[int], keep_step: int | None) -> list[int]:
        """Delete all but the newest `keep_last`, the intervals' multiples and `keep_step`; returns the deleted."""
        assert keep_last >= 1
        doomed = [
            step
            for step in self.steps()[:-keep_last]
            if step != keep_step
            and not any(interval and step % interval == 0 for interval in intervals_steps)
        ]
        for step in doomed:
            try:
                # Renamed first, so that a reader, or a death in between, never meets half a step.
                purging = self.folder / f".{step_name(step)}.purging"
                os.rename(self.of(step), purging)
                shutil.rmtree(purging)
            except OSError as error:
                logger.warning("cannot delete the old checkpoint %s: %s", step_name(step), describe(error))
        return doomed

    def quarantine(self, step: int, reason: str) -> Path:
        """Move a step out of the way; returns its new place."""
        words = re.sub(r"[^A-Za-z0-9._]+", "-", reason).strip("-")[:80]
        place = self.folder / "quarantine" / f"{step_name(step)}-{words}"
        place.parent.mkdir(exist_ok=True)
        while place.exists():  # the same step went bad in the same way before
            place = place.with_name(place.name + "+")
        os.rename(self.of(step), place)
        fsync_folder(self.folder)
        return place

    def quarantined(self) -> list[str]:
        return sorted(path.name for path in (self.folder / "quarantine").glob("step_*"))

    def marker(self) -> str | None:
        """What LATEST says: a step's name when all is well."""
        try:
            return (self.folder / "LATEST").read_text(encoding="utf-8", errors="replace").rstrip("\n")
        except FileNotFoundError:
            return None

    def move_marker(self, step: int) -> None:
        atomic_write_bytes(self.folder / "LATEST", f"{step_name(step)}\n".encode())

    def _publish(self, step: int) -> None:
        fsync_folder(self.saving(step))
        os.rename(self.saving(step), self.of(step))
        fsync_folder(self.folder)

    def _is_complete(self, saving: Path, step: int) -> bool:
        """The manifest is written last, so a whole one says that all files were synced."""
        try:
            return read_manifest(saving).step == step and not self.of(step).exists()
        except ValueError:
            return False

    def _make_folder(self) -> None:
        if not self.folder.is_dir():
            self.folder.mkdir(parents=True, exist_ok=True)
            fsync_folder(self.folder.parent)
