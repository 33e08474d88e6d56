"""FAULTS 31: what is exported, evaluated, served of a run that is training is a whole step, whatever happens."""

from __future__ import annotations

import os
import signal
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from pgm_scale.checkpoint import CheckpointStore
from pgm_scale.checkpoint.fragments import Kind
from pgm_scale.errors import UserError
from pgm_scale.run_folder import load_run
from tests.checkpoint.support import in_child, kill_before_call
from tests.export.runs import STEP, whole, write_run

KINDS: tuple[Kind, ...] = ("weight", "ema")


def _save_for_ever(run: Path, weights: dict[str, torch.Tensor]) -> None:
    """A trainer that saves as fast as it can and keeps one step; all weights of a step are its number."""
    store = CheckpointStore(run)
    step = store.steps()[-1]
    while True:
        step += 1
        fragments = [
            (kind, whole(name, torch.full(w.shape, float(step))))
            for kind in KINDS
            for name, w in weights.items()
        ]
        store.save(step, fragments, {"step": step})
        store.purge(keep_last=1)


@pytest.mark.fault(31)
def test_a_reader_beside_a_trainer_gets_one_whole_step(tmp_path: Path) -> None:
    run = write_run(tmp_path, "ar")
    weights = CheckpointStore(run).read_full(STEP, "ema")
    pid = os.fork()
    if pid == 0:
        try:
            _save_for_ever(run, weights)
        finally:
            os._exit(1)
    steps: list[int] = []
    deadline_s = time.monotonic() + 60
    try:
        while len(set(steps)) < 12 and time.monotonic() < deadline_s:
            try:
                trained = load_run(run)
            except UserError as error:  # three newest steps in a row were deleted while they were read
                assert "use" in str(error)  # noqa: PT017
                continue
            step = trained.description.origin.step
            assert step is not None
            if step > STEP:  # the first one has other weights
                assert all((value == step).all() for value in trained.model.parameters())
            steps.append(step)
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    assert len(set(steps)) >= 12
    assert steps == sorted(steps)


@pytest.mark.fault(31)
def test_no_point_of_a_save_or_a_purge_shows_half_a_step(tmp_path: Path) -> None:
    """The trainer stops for good at each of its operations on files in turn; a reader changes nothing there."""
    run = write_run(tmp_path, "ar")
    weights = CheckpointStore(run).read_full(STEP, "ema")

    def life(point: int) -> None:
        kill_before_call(point)
        _save_for_ever(run, weights)

    for point in range(34):
        in_child(partial(life, point))
        before = sorted(path.relative_to(run) for path in run.rglob("*"))
        trained = load_run(run)
        assert sorted(path.relative_to(run) for path in run.rglob("*")) == before
        step = trained.description.origin.step
        assert step in CheckpointStore(run).steps()
        if step != STEP:
            assert all((value == step).all() for value in trained.model.parameters())
        CheckpointStore(run).recover()
