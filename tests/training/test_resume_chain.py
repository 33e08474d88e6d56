"""One run moved through six layouts, ten steps in each, is the run that never stopped."""

import dataclasses
from itertools import groupby
from pathlib import Path

from ops.parity_layouts import FP32_BOUNDS, layout
from ops.parity_runs import (
    GLOBAL_BATCH_SEQUENCES,
    Case,
    Draws,
    differences,
    records,
    same_draws,
    train_all,
    write_data,
)
from pgm_scale.checkpoint.fragments import KINDS, list_pieces
from pgm_scale.checkpoint.step_folders import StepFolders
from pgm_scale.checkpoint.store import CheckpointStore
from pgm_scale.config import CheckpointConfig, RunConfig
from tests.distributed import run_ranks

LEG_STEPS = 10
LEGS = (
    layout("PGM"),
    layout("PGM", tensor=2),
    layout("PGM", pipeline=2, data=2),
    layout("PGM", data=4, zero=3),
    layout("PGM", tensor=2, pipeline=2),
    layout("PGM"),
)
STEPS = LEG_STEPS * len(LEGS)


def _config(case: Case, data: Path, run: Path, steps: int) -> RunConfig:
    config = case.config(data, run.parent)
    return dataclasses.replace(
        config,
        folder=str(run),
        training=dataclasses.replace(config.training, steps=steps),
        validation=dataclasses.replace(config.validation, interval_steps=LEG_STEPS),
        checkpoint=CheckpointConfig(interval_steps=LEG_STEPS, keep_last=len(LEGS)),
    )


def _train_chain(data: Path, run: Path) -> list[list[Draws]]:
    """What each rank trained on, leg by leg; consecutive legs of one world size share their processes."""
    configs = [(case, _config(case, data, run, LEG_STEPS * leg)) for leg, case in enumerate(LEGS, 1)]
    drawn: list[list[Draws]] = []
    for ranks, legs in groupby(configs, lambda leg: leg[0].world_size):
        drawn += run_ranks(ranks, train_all, [config for _, config in legs])
    return drawn


def _assert_one_share_a_rank(run: Path, step: int, case: Case) -> None:
    """One file a rank, and none with a whole model in it where ranks share one."""
    files = sorted(StepFolders(run).of(step).glob("rank_*"))
    assert len(files) == case.world_size
    for kind in KINDS:
        whole = sum(tensor.numel() for tensor in CheckpointStore(run).read_full(step, kind).values())
        held = [sum(p.length for key, p in list_pieces(file) if key[0] == kind) for file in files]
        assert sum(held) == whole
        assert case.world_size == 1 or max(held) < 0.8 * whole, (case.name, kind, held)


def test_a_run_moves_through_layouts(tmp_path: Path) -> None:
    data = write_data(tmp_path / "data")
    straight, moved = tmp_path / "straight", tmp_path / "moved"
    ((uninterrupted,),) = run_ranks(1, train_all, [_config(LEGS[0], data, straight, STEPS)])
    drawn = _train_chain(data, moved)

    first_samples = {step: step * GLOBAL_BATCH_SEQUENCES for step in range(STEPS)}
    assert uninterrupted.keys() == {
        f"{step}/{first + n}" for step, first in first_samples.items() for n in range(GLOBAL_BATCH_SEQUENCES)
    }
    for leg, (case, found) in enumerate(zip(LEGS, drawn, strict=True)):
        steps = range(leg * LEG_STEPS, (leg + 1) * LEG_STEPS)
        expected = {key: digest for key, digest in uninterrupted.items() if int(key.split("/")[0]) in steps}
        assert same_draws(found, expected, case.parallel), case.name
        _assert_one_share_a_rank(moved, steps.stop, case)
    assert [record["samples"] for record in records(moved)] == [
        (step + 1) * GLOBAL_BATCH_SEQUENCES for step in range(STEPS)
    ]
    for step in range(LEG_STEPS, STEPS + 1, LEG_STEPS):
        apart = differences(moved, straight, step)
        missed = {name: apart[name] for name, bound in FP32_BOUNDS.items() if not apart[name] <= bound}
        assert not missed, step
