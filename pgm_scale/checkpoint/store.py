"""The checkpoint store: saves that all ranks agree on, verified loads that fall back."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from pgm_scale.checkpoint.background import BackgroundWrite
from pgm_scale.checkpoint.fragments import FileEntry, Fragment, Kind, TensorKey
from pgm_scale.checkpoint.host_buffers import HostBuffers
from pgm_scale.checkpoint.manifest import STATE_NAME, Problem, find_problems, join, read_manifest
from pgm_scale.checkpoint.peers import ALONE, Peers, describe
from pgm_scale.checkpoint.reader import Index, Wanted, assemble, build_index, check_names
from pgm_scale.checkpoint.step_folders import StepFolders, step_name
from pgm_scale.errors import UserError
from pgm_scale.tensor_slices import TensorSlice

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SaveUnderWay:
    """A save that every rank has started and none has committed."""

    step: int
    write: BackgroundWrite
    state: dict[str, Any]


class CheckpointStore:
    """The checkpoints below `run_folder`; `folders` are its files as one process sees them.

    Methods marked collective must be called by all `peers` together; they raise on all of them or on none.
    Whoever writes holds the folder's `RunLock`; readers of a live run need none.
    """

    def __init__(self, run_folder: str | Path, peers: Peers = ALONE) -> None:
        self.folders = StepFolders(run_folder)
        self.peers = peers
        self.under_way: SaveUnderWay | None = None
        self._buffers = HostBuffers()
        self._verified_step: int | None = None

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
        folders, peers = self.folders, self.peers
        if not self._begin(step):
            return False
        self._commit(
            step,
            lambda: folders.write_rank(step, peers.rank, fragments, peers.progress, self._buffers),
            state,
        )
        return True

    def start(self, step: int, fragments: Iterable[tuple[Kind, Fragment]], state: dict[str, Any]) -> bool:
        """Collective: `save` in the background, up to the commit, which is for `finish`. Same arguments and errors.

        The fragments' values must not change before `under_way.write.wait_until_copied` has returned. The copy
        takes as much memory on the host as they do; it is kept for the next save.
        """
        assert self.under_way is None, "one save at a time"
        if not self._begin(step):
            return False
        folders, rank, buffers = self.folders, self.peers.rank, self._buffers
        write = BackgroundWrite(
            lambda progress, copied: folders.write_rank(step, rank, fragments, progress, buffers, copied)
        )
        self.under_way = SaveUnderWay(step, write, state)
        return True

    def finish(self) -> None:
        """Collective: wait for all ranks' writes of the save that was started, and commit it.

        Raises:
            UserError: as `save`.
        """
        assert self.under_way is not None
        save, self.under_way = self.under_way, None
        self._commit(save.step, lambda: save.write.result(self.peers.progress), save.state)

    def give_up(self) -> None:
        """Before this process ends by an error: the save under way, if any, is lost."""
        if self.under_way is not None:
            self.under_way.write.give_up()

    def _begin(self, step: int) -> bool:
        with self._failing_whole(step):
            return self.peers.first(lambda: self.folders.begin(step))

    def _commit(self, step: int, write: Callable[[], FileEntry], state: dict[str, Any]) -> None:
        with self._failing_whole(step):
            entries = self.peers.each(write)
            self.peers.first(lambda: self.folders.commit(step, entries, state))

    @contextmanager
    def _failing_whole(self, step: int) -> Iterator[None]:
        """No rank writes any more when `Peers` raises: what there is of the step can go."""
        try:
            yield
        except UserError as error:
            if self.peers.rank == 0:
                self.folders.abandon(step)
            raise UserError(
                f"checkpoint of step {step} not saved in {self.folders.folder}: {error}; "
                "earlier checkpoints are intact"
            ) from error

    def purge(self, keep_last: int, *milestone_intervals_steps: int) -> list[int]:
        """Delete old steps, after a save; acts on rank 0 only and returns the deleted steps.

        Kept are the newest `keep_last`, the multiples of each of the intervals (0: none), and the newest step that
        this process has verified by reading (it resumed from it): the newer ones were only written.
        """
        if self.peers.rank != 0:
            return []
        return self.folders.purge(keep_last, milestone_intervals_steps, self._verified_step)

    def recover(self) -> None:
        """Collective, at start and with the lock held: finish or remove what a dead process has left.

        Raises:
            UserError: the folder cannot be written.
        """
        self.peers.first(self.folders.recover)

    def steps(self) -> list[int]:
        """All committed steps in ascending order, verified or not."""
        return self.folders.steps()

    def newest_verified(self, strict: bool = False, repair: bool = True) -> int | None:
        """Collective: the newest step all of whose files have the size and SHA-256 of its manifest.

        Each rank hashes its share of the files. A bad step is named on stderr and moved to the quarantine,
        and the next older one is tried.

        Args:
            strict: refuse with an error at the first bad step instead, and leave it where it is.
            repair: False for readers of somebody else's run: bad steps are passed over, nothing is changed.

        Returns:
            None when the run has never had a checkpoint.

        Raises:
            UserError: `strict` and a bad step; or no good step although there have been some.
        """
        rejected: set[int] = set()
        self.peers.first(self._refuse_foreign_identity)
        while (step := self.peers.first(lambda: self._newest(rejected))) is not None:
            problems = self._problems(step)
            if not problems:
                self._verified_step = step
                if repair:
                    self.peers.first(partial(self._repair_marker, step))
                return step
            if strict:
                raise UserError(f"{_bad(step, problems)}; run without --strict to use the newest good one")
            rejected.add(step)
            self.peers.first(partial(self._reject, step, problems, repair))
        self.peers.first(self._refuse_silent_restart)
        return None

    def verify(self, step: int) -> None:
        """Collective: check one step. Raises: UserError: it is missing, or a file of it is bad."""
        problems = self._problems(step)
        if problems:
            raise UserError(f"{_bad(step, problems)}; {self.folders.folder} has the steps {self.steps()}")
        self._verified_step = max(step, self._verified_step or 0)

    def state(self, step: int) -> dict[str, Any]:
        """The state of a verified step."""
        path = self.folders.of(step) / STATE_NAME
        try:
            state = json.loads(path.read_bytes())
            if not isinstance(state, dict):
                raise ValueError("not a JSON object")
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"{path}: {describe(error)}; use one of the steps {self.steps()}") from None
        return state

    def kinds(self, step: int) -> set[Kind]:
        """The kinds of values a step holds (a run without EMA has no "ema")."""
        return {kind for kind, _ in self._index(step).shapes}

    def read(self, step: int, wanted: Wanted) -> dict[TensorKey, list[torch.Tensor]]:
        """Any flat ranges of whole tensors or shards of a verified step, whatever layout wrote it.

        Args:
            wanted: for every (kind, name) of the model its whole shape and the ranges to read as (slice, start,
                length), which may be none: names that this rank holds nothing of are still compared.

        Returns:
            for each key one 1-D fp32 CPU tensor a range, in the order asked.

        Raises:
            UserError: all missing, extra and mis-shaped tensors of the wanted kinds, all holes and overlaps.
        """
        index = self._index(step)
        check_names(index, wanted)
        return assemble(index, wanted, self.peers.progress)

    def read_full(self, step: int, kind: Kind) -> dict[str, torch.Tensor]:
        """All whole tensors of one kind, for inference and export.

        Raises:
            UserError: the step has nothing of that kind; ask `kinds` to choose between "ema" and "weight".
        """
        index = self._index(step)
        shapes = {key: shape for key, shape in index.shapes.items() if key[0] == kind}
        if not shapes:
            stored = sorted({kind for kind, _ in index.shapes})
            raise UserError(f"{self.folders.of(step)} has no {kind!r} values, only {stored}")
        whole: Wanted = {
            key: (shape, [(TensorSlice.whole(shape), 0, math.prod(shape))]) for key, shape in shapes.items()
        }
        return {key[1]: values.view(shapes[key]) for key, (values,) in assemble(index, whole).items()}

    def _index(self, step: int) -> Index:
        folder = self.folders.of(step)
        try:
            return build_index(folder / name for name in read_manifest(folder).rank_files)
        except (OSError, ValueError) as error:
            raise UserError(f"{folder}: manifest {error}; use one of the steps {self.steps()}") from None

    def _newest(self, rejected: set[int]) -> int | None:
        return max((step for step in self.steps() if step not in rejected), default=None)

    def _problems(self, step: int) -> list[Problem]:
        folder, peers = self.folders.of(step), self.peers
        found = peers.each(lambda: find_problems(folder, step, peers.rank, peers.world_size, peers.progress))
        problems = list(dict.fromkeys(problem for share in found for problem in share))
        if not problems and peers.first(lambda: self.folders.is_foreign(step)):
            problems = [Problem(STATE_NAME, "belongs to another run")]
        return problems

    def _reject(self, step: int, problems: list[Problem], repair: bool) -> None:
        if not self.folders.of(step).exists():
            return  # purged by its owner while we were reading: not bad, just gone
        outcome = "passed over"
        if repair:
            outcome = f"moved to {self.folders.quarantine(step, str(problems[0]))}"
        logger.error("%s; %s, trying the next older step", _bad(step, problems), outcome)

    def _repair_marker(self, step: int) -> None:
        if self.folders.marker() != step_name(step):
            logger.warning("LATEST did not name %s, the newest good checkpoint; repaired", step_name(step))
        self.folders.mark(step)

    def _refuse_foreign_identity(self) -> None:
        """Else a run.json that was overwritten would put every step in the quarantine."""
        steps = self.steps()
        if steps and all(self.folders.is_foreign(step) for step in steps):
            raise UserError(
                f"{self.folders.folder} holds only checkpoints of the run {self.folders.owner(steps[-1])}, and "
                "run.json beside it is of another; restore run.json, or move them to their own run folder"
            )

    def _refuse_silent_restart(self) -> None:
        quarantined = self.folders.quarantined()
        if self.folders.have_been():
            raise UserError(
                f"{self.folders.folder} has had checkpoints, but none is usable "
                f"(quarantine: {', '.join(quarantined) or 'empty'}); "
                "restore one, or start from scratch in a new run folder"
            )


def _bad(step: int, problems: Sequence[Problem]) -> str:
    return f"checkpoint {step_name(step)} is bad: {join(problems)}"
