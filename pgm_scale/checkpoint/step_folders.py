"""The step folders of a run on the disk, as one process (rank 0) begins, commits, recovers and deletes them.

    <run>/checkpoints/step_00001000/{rank_00000.safetensors, ..., state.json, manifest.json}
    <run>/checkpoints/LATEST                          the name of the newest step
    <run>/checkpoints/quarantine/step_...-<reason>    bad steps, for a person to look at
    <run>/checkpoints/.step_00002000.saving           a save under way, or one that died
    <run>/first_checkpoint                            the name of the first step that was saved

A save writes and syncs all files in the `.saving` folder, the manifest last, renames the folder, syncs the
parent and then moves LATEST. A death before the manifest loses that save only; a death after it loses
nothing, as `recover` finishes the rename, and LATEST is a convenience that the next start repairs. The file
`first_checkpoint` lies outside, so that a run whose checkpoints are gone is not taken for a new one.
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
from pgm_scale.files import atomic_write_bytes, fsync_folder, sha256_file, temporary_name, write_synced

logger = logging.getLogger(__name__)

_STEP_NAME = re.compile(r"step_([0-9]{8,})")
_LEFTOVER_NAME = re.compile(rf"\.{_STEP_NAME.pattern}\.(saving|purging)")
_PROBE_NAME = ".writable"
_MARKER_NAME = "LATEST"
_MAX_MARKER_BYTES = 4096
_MAX_STATE_BYTES = 1 << 26


def step_name(step: int) -> str:
    return f"step_{step:08d}"


class StepFolders:
    """One process's view of `<run_folder>/checkpoints`. A save is begin, write_rank (all ranks), commit."""

    def __init__(self, run_folder: str | Path) -> None:
        self.folder = Path(run_folder) / "checkpoints"
        self._first_path = Path(run_folder) / "first_checkpoint"
        self._identity_path = Path(run_folder) / "run.json"

    def steps(self) -> list[int]:
        """All committed steps in ascending order, verified or not."""
        if not self.folder.is_dir():
            return []
        found = [_STEP_NAME.fullmatch(entry.name) for entry in os.scandir(self.folder)]
        # Another spelling of a number would be a step that is not there, and count as one that is kept.
        return sorted(int(match[1]) for match in found if match and match[0] == step_name(int(match[1])))

    def of(self, step: int) -> Path:
        """The folder of a committed step."""
        return self.folder / step_name(step)

    def saving(self, step: int) -> Path:
        """The folder of a step while it is being written."""
        return self.folder / f".{step_name(step)}.saving"

    def begin(self, step: int) -> bool:
        """Rank 0, before any rank writes: an empty folder for the save. False when the step is committed.

        What has its name and is none of our steps (a copy that somebody made) is moved out of the way.
        """
        stranger = self._stranger(step)
        if stranger is not None:
            logger.error("%s is %s; moved to %s", self.of(step), stranger, self.quarantine(step, stranger))
        elif self.of(step).exists():
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
        self.mark(step)

    def abandon(self, step: int) -> None:
        """Rank 0: remove what a failed save of this step has left."""
        shutil.rmtree(self.saving(step), ignore_errors=True)

    def recover(self) -> None:
        """At start: finish the saves that died after their manifest, remove the other leftovers.

        Raises:
            OSError: nothing can be written here, or a leftover cannot be removed.
        """
        self._make_folder()
        write_synced(self.folder / _PROBE_NAME, b"")
        (self.folder / _PROBE_NAME).unlink()
        temporary_name(self.folder / _MARKER_NAME).unlink(missing_ok=True)
        leftovers = [(path, _LEFTOVER_NAME.fullmatch(path.name)) for path in self.folder.iterdir()]
        for path, match in leftovers:
            if match is None:
                continue
            step, kind = int(match[1]), match[2]
            if kind == "saving" and path == self.saving(step) and self._is_complete(path, step):
                logger.warning("finished the commit of %s, which had died before its rename", path.name)
                self._publish(step)
            else:
                logger.warning("removed %s, left by a process that died", path.name)
                shutil.rmtree(path)

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
            with open(self.folder / _MARKER_NAME, "rb") as file:
                return file.read(_MAX_MARKER_BYTES).decode(errors="replace").rstrip("\n")
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            return describe(error)

    def mark(self, step: int) -> None:
        """Let LATEST name `step`, and `first_checkpoint` if it is the first; neither can undo a commit."""
        line = f"{step_name(step)}\n".encode()
        try:
            if not self._first_path.exists():
                atomic_write_bytes(self._first_path, line)
            if self.marker() != step_name(step):
                atomic_write_bytes(self.folder / _MARKER_NAME, line)
        except OSError as error:
            reason = describe(error)
            logger.warning("LATEST cannot name %s (%s); the next start tries again", step_name(step), reason)

    def have_been(self) -> bool:
        """Whether the run has ever had a checkpoint, be it lost."""
        return bool(
            self._first_path.exists() or self.marker() is not None or self.steps() or self.quarantined()
        )

    def owner(self, step: int) -> str | None:
        """The id of the run that saved a step; None where it does not say, or is no step."""
        return _run_id(self.of(step) / STATE_NAME)

    def is_foreign(self, step: int) -> bool:
        """Whether another run than that of this folder has saved the step."""
        owner, ours = self.owner(step), _run_id(self._identity_path)
        return None not in (owner, ours) and owner != ours

    def _stranger(self, step: int) -> str | None:
        """What there is in the place of a step if it is none that this run has committed."""
        if not self.of(step).exists():
            return None
        try:
            named = read_manifest(self.of(step)).step
        except ValueError:
            return "no checkpoint"
        return f"of step {named}" if named != step else "of another run" if self.is_foreign(step) else None

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
            if os.path.lexists(self.folder):
                raise UserError(f"{self.folder} is no folder, or a link to one that is gone; put it back")
            self.folder.mkdir(parents=True, exist_ok=True)
            fsync_folder(self.folder.parent)


def _run_id(path: Path) -> str | None:
    """The `run_id` in a JSON object; None where there is none."""
    try:
        with open(path, "rb") as file:
            tree = json.loads(file.read(_MAX_STATE_BYTES))
    except (OSError, ValueError, RecursionError):
        return None
    found = tree.get("run_id") if isinstance(tree, dict) else None
    return found if isinstance(found, str) else None
