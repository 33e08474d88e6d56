"""The checkpoints of a run folder: atomic commits, verified loads, quarantine and retention.

    <run>/checkpoints/step_00001000/{rank_00000.safetensors, ..., state.json, manifest.json}
    <run>/checkpoints/LATEST                          the name of the newest step
    <run>/checkpoints/quarantine/step_...-<reason>    bad steps, for a person to look at
    <run>/checkpoints/.step_00002000.saving           a save under way, or one that died

A save writes and syncs all files in the `.saving` folder, the manifest last, renames the folder, syncs the
parent and then moves LATEST. A death before the manifest loses that save only; a death after it loses nothing:
`recover` finishes the rename, and LATEST is a convenience that `newest_verified` repairs. There is no pickle.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import shutil
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from pgm_scale.checkpoint.fragments import FileEntry, Fragment, Kind, TensorKey, write_fragments
from pgm_scale.checkpoint.manifest import (
    MANIFEST_NAME,
    STATE_NAME,
    Manifest,
    Problem,
    find_problems,
    find_size_problems,
    rank_file_name,
    read_manifest,
)
from pgm_scale.checkpoint.peers import ALONE, Peers, describe
from pgm_scale.checkpoint.reader import Index, Wanted, assemble, build_index, check_names
from pgm_scale.errors import UserError
from pgm_scale.files import atomic_write_bytes, fsync_folder, sha256_file, write_synced

logger = logging.getLogger(__name__)

_STEP_NAME = re.compile(r"step_(\d{8,})")


def step_name(step: int) -> str:
    return f"step_{step:08d}"


class CheckpointStore:
    """The checkpoints below `run_folder`.

    Methods marked collective must be called by all `peers` together; they raise on all of them or on none.
    Whoever writes holds the folder's `RunLock`; readers of a live run need none.
    """

    def __init__(self, run_folder: str | Path, peers: Peers = ALONE) -> None:
        self.folder = Path(run_folder) / "checkpoints"
        self.peers = peers
        self._verified_step: int | None = None

    # ---- saving

    def save(self, step: int, fragments: Iterable[tuple[Kind, Fragment]], state: dict[str, Any]) -> bool:
        """Collective: write every rank's fragments and commit the step.

        Args:
            fragments: this rank's, disjoint from all other ranks'; together they cover every tensor.
            state: JSON values; rank 0's is kept.

        Returns:
            False when the step is already committed: a step names one state, so nothing is written.

        Raises:
            UserError: on all ranks (disk full, read-only folder, ...). Earlier steps are intact.
        """
        try:
            if not self.peers.first(lambda: self.begin(step)):
                return False
            entries = self.peers.each(lambda: self.write_rank(step, self.peers.rank, fragments))
            self.peers.first(lambda: self.commit(step, entries, state))
        except UserError as error:
            if self.peers.rank == 0:
                self.abandon(step)
            raise UserError(
                f"checkpoint of step {step} not saved in {self.folder}: {error}; "
                "earlier checkpoints are intact"
            ) from error
        return True

    def begin(self, step: int) -> bool:
        """Rank 0, before any rank writes: an empty folder for the save. False when the step is committed."""
        if self._step_folder(step).exists():
            return False
        self._make_folder()
        self.abandon(step)
        self._saving_folder(step).mkdir()
        return True

    def write_rank(self, step: int, rank: int, fragments: Iterable[tuple[Kind, Fragment]]) -> FileEntry:
        """Write and sync one rank's own file; the hash is taken while writing. Raises: OSError."""
        return write_fragments(self._saving_folder(step) / rank_file_name(rank), fragments)

    def commit(self, step: int, entries: Sequence[FileEntry], state: dict[str, Any]) -> None:
        """Rank 0, after all ranks have written: make the step durable and visible, in the order above.

        Args:
            entries: those of all ranks, in rank order.

        Raises:
            OSError, UserError: not committed; the earlier steps stand.
        """
        saving = self._saving_folder(step)
        problems = find_size_problems(saving, entries)
        if problems:
            raise UserError(
                f"rank 0 does not see what the ranks wrote: {_join(problems)}; is {saving} shared?"
            )
        state_bytes = json.dumps(state, indent=1, allow_nan=False).encode()
        write_synced(saving / STATE_NAME, state_bytes)
        state_entry = FileEntry(STATE_NAME, len(state_bytes), sha256_file(saving / STATE_NAME))
        write_synced(saving / MANIFEST_NAME, Manifest(step, (*entries, state_entry)).to_bytes())
        self._publish(step)
        self._move_marker(step)

    def abandon(self, step: int) -> None:
        """Rank 0: remove what a failed save of this step has left."""
        shutil.rmtree(self._saving_folder(step), ignore_errors=True)

    def _publish(self, step: int) -> None:
        fsync_folder(self._saving_folder(step))
        os.rename(self._saving_folder(step), self._step_folder(step))
        fsync_folder(self.folder)

    def _move_marker(self, step: int) -> None:
        atomic_write_bytes(self._marker, f"{step_name(step)}\n".encode())

    def purge(self, keep_last: int, milestone_interval_steps: int = 0) -> list[int]:
        """Delete old steps, after a commit; acts on rank 0 only and returns the deleted steps.

        Kept are the newest `keep_last`, the multiples of `milestone_interval_steps` (0: none), and the step
        that this process has verified by reading (it resumed from it): the newer ones were only written.
        """
        if self.peers.rank != 0:
            return []
        assert keep_last >= 1
        doomed = [
            step
            for step in self.steps()[:-keep_last]
            if step != self._verified_step
            and not (milestone_interval_steps and step % milestone_interval_steps == 0)
        ]
        for step in doomed:
            try:
                # Renamed first, so that a reader, or a death in between, never meets half a step.
                purging = self.folder / f".{step_name(step)}.purging"
                os.rename(self._step_folder(step), purging)
                shutil.rmtree(purging)
            except OSError as error:
                logger.warning("cannot delete the old checkpoint %s: %s", step_name(step), describe(error))
        return doomed

    # ---- starting

    def recover(self) -> None:
        """Collective, at start and with the lock held: finish or remove what a dead process has left.

        Raises:
            UserError: the folder cannot be written.
        """
        self.peers.first(self._recover)

    def _recover(self) -> None:
        self._make_folder()
        for leftover in sorted([*self.folder.glob(".step_*"), *self.folder.glob(".LATEST.*")]):
            match = re.fullmatch(rf"\.{_STEP_NAME.pattern}\.saving", leftover.name)
            if match and self._is_complete(leftover, int(match[1])):
                logger.warning("finished the commit of %s, which had died before its rename", leftover.name)
                self._publish(int(match[1]))
            elif leftover.is_dir():
                logger.warning("removed %s, left by a process that died", leftover.name)
                shutil.rmtree(leftover)
            else:
                leftover.unlink()

    def _is_complete(self, saving: Path, step: int) -> bool:
        """The manifest is written last, so a whole one says that all files were synced."""
        try:
            return read_manifest(saving).step == step and not self._step_folder(step).exists()
        except ValueError:
            return False

    def newest_verified(self, strict: bool = False, repair: bool = True) -> int | None:
        """Collective: the newest step all of whose files have the size and SHA-256 of its manifest.

        Each rank hashes its share of the files. A bad step is named on stderr and moved to the quarantine, and
        the next older one is tried.

        Args:
            strict: refuse with an error at the first bad step instead, and leave it where it is.
            repair: False for readers of somebody else's run: bad steps are passed over, nothing is changed.

        Returns:
            None when the run has never had a checkpoint.

        Raises:
            UserError: `strict` and a bad step; or no good step although there have been some.
        """
        rejected: set[int] = set()
        while (step := self.peers.first(lambda: self._newest(rejected))) is not None:
            problems = self._problems(step)
            if not problems:
                self._verified_step = step
                if repair:
                    self.peers.first(lambda: self._repair_marker(step))
                return step
            if strict:
                raise UserError(_bad(step, problems) + "; run without --strict to use the newest good one")
            rejected.add(step)
            self.peers.first(partial(self._reject, step, problems, repair))
        self.peers.first(self._refuse_silent_restart)
        return None

    def verify(self, step: int) -> None:
        """Collective: check one step. Raises: UserError: it is missing, or a file of it is bad."""
        problems = self._problems(step)
        if problems:
            raise UserError(f"{_bad(step, problems)}; use one of {self.steps()} in {self.folder}")
        self._verified_step = step

    def _newest(self, rejected: set[int]) -> int | None:
        return max((step for step in self.steps() if step not in rejected), default=None)

    def _problems(self, step: int) -> list[Problem]:
        folder, peers = self._step_folder(step), self.peers
        found = peers.each(lambda: find_problems(folder, step, peers.rank, peers.world_size))
        return list(dict.fromkeys(problem for share in found for problem in share))

    def _reject(self, step: int, problems: list[Problem], repair: bool) -> None:
        if not self._step_folder(step).exists():
            return  # purged by its owner while we were reading: not bad, just gone
        if repair:
            place = self.quarantine(step, str(problems[0]))
            logger.error("%s; moved to %s, trying the next older step", _bad(step, problems), place)
        else:
            logger.error("%s; trying the next older step", _bad(step, problems))

    def quarantine(self, step: int, reason: str) -> Path:
        """Move a step out of the way and return its new place (rank 0)."""
        words = re.sub(r"[^A-Za-z0-9._]+", "-", reason).strip("-")[:80]
        self._quarantine.mkdir(exist_ok=True)
        place = self._quarantine / f"{step_name(step)}-{words}"
        while place.exists():  # the same step went bad in the same way before
            place = place.with_name(place.name + "+")
        os.rename(self._step_folder(step), place)
        fsync_folder(self.folder)
        return place

    def _repair_marker(self, step: int) -> None:
        if self._read_marker() != step_name(step):
            logger.warning("LATEST did not name %s, the newest good checkpoint; repaired", step_name(step))
            self._move_marker(step)

    def _refuse_silent_restart(self) -> None:
        bad = sorted(path.name for path in self._quarantine.glob("step_*"))
        if bad or self._marker.exists() or self.steps():
            raise UserError(
                f"{self.folder} has had checkpoints, but none is usable "
                f"(quarantine: {', '.join(bad) or 'empty'}); restore one, or start from scratch in a new run folder"
            )

    # ---- reading

    def steps(self) -> list[int]:
        """All committed steps in ascending order, verified or not."""
        if not self.folder.is_dir():
            return []
        found = [_STEP_NAME.fullmatch(entry.name) for entry in os.scandir(self.folder)]
        return sorted(int(match[1]) for match in found if match)

    def state(self, step: int) -> dict[str, Any]:
        """The state of a verified step."""
        try:
            return json.loads((self._step_folder(step) / STATE_NAME).read_bytes())
        except (OSError, ValueError) as error:
            raise UserError(f"{step_name(step)}/{STATE_NAME} in {self.folder}: {describe(error)}") from None

    def kinds(self, step: int) -> set[Kind]:
        """The kinds of values a step holds (a run without EMA has no "ema")."""
        return {kind for kind, _ in self._index(step).shapes}

    def read(self, step: int, wanted: Wanted) -> dict[TensorKey, list[torch.Tensor]]:
        """Any flat ranges of a verified step, whatever layout wrote it.

        Args:
            wanted: for every (kind, name) of the model its whole shape and the (start, length) ranges to
                read, which may be none: names that this rank holds nothing of are still compared.

        Returns:
            for each key one 1-D fp32 CPU tensor a range, in the order asked.

        Raises:
            UserError: missing, extra or mis-shaped tensors among the wanted kinds, holes, overlaps: all listed.
        """
        index = self._index(step)
        check_names(index, wanted)
        return assemble(index, wanted)

    def read_full(self, step: int, kind: Kind) -> dict[str, torch.Tensor]:
        """All whole tensors of one kind, for inference and export.

        Raises:
            UserError: the step has nothing of that kind; ask `kinds` to choose between "ema" and "weight".
        """
        index = self._index(step)
        shapes = {key: shape for key, shape in index.shapes.items() if key[0] == kind}
        if not shapes:
            raise UserError(f"{step_name(step)} in {self.folder} has no {kind!r} values")
        whole: Wanted = {key: (shape, [(0, math.prod(shape))]) for key, shape in shapes.items()}
        return {key[1]: values.view(shapes[key]) for key, (values,) in assemble(index, whole).items()}

    def _index(self, step: int) -> Index:
        folder = self._step_folder(step)
        try:
            return build_index(folder / name for name in read_manifest(folder).rank_files)
        except ValueError as error:
            raise UserError(
                f"{folder / MANIFEST_NAME}: {error}; use one of the steps {self.steps()}"
            ) from None

    # ---- places

    @property
    def _marker(self) -> Path:
        return self.folder / "LATEST"

    @property
    def _quarantine(self) -> Path:
        return self.folder / "quarantine"

    def _step_folder(self, step: int) -> Path:
        return self.folder / step_name(step)

    def _saving_folder(self, step: int) -> Path:
        return self.folder / f".{step_name(step)}.saving"

    def _read_marker(self) -> str | None:
        try:
            return self._marker.read_text(encoding="utf-8", errors="replace").rstrip("\n")
        except FileNotFoundError:
            return None

    def _make_folder(self) -> None:
        if not self.folder.is_dir():
            self.folder.mkdir(parents=True, exist_ok=True)
            fsync_folder(self.folder.parent)


def _bad(step: int, problems: Sequence[Problem]) -> str:
    return f"checkpoint {step_name(step)} is bad: {_join(problems)}"


def _join(problems: Sequence[Problem]) -> str:
    return "; ".join(map(str, problems))
