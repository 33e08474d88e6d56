"""A representative part of `make parity`: layouts train the run of one process, on the same draws."""

import dataclasses
from pathlib import Path

import pytest

from ops.parity_layouts import FP32_BOUNDS, both, layout, reference
from ops.parity_runs import Case, Draws, differences, same_draws, train_all, write_data
from pgm_scale.config import ParallelConfig, RunConfig
from tests.distributed import run_ranks

IMAGE = {"models": ["image PGM"]}
CASES = {
    2: [
        *both((2,), (1, 2), (1, 1, 2, 2), (1, 1, 2, 3), **IMAGE),
        layout("image PGM", 2, sequence_parallel=True),
    ],
    3: both((1, 3), models=["PGM", "MDLM", "MaskGIT"]),
    4: [
        *both((2, 2), (1, 2, 2), (2, 1, 2, 3)),
        *both((2, 2), (1, 2, 2), (2, 1, 2, 3), models=["MaskGIT"]),
        *(layout(model, 4, sequence_parallel=True) for model in ("PGM", "MaskGIT")),
    ],
}


def _train(ranks: int, configs: list[RunConfig]) -> dict[Path, list[Draws]]:
    """What each rank trained on, by run folder."""
    drawn = run_ranks(ranks, train_all, configs)
    return {Path(config.folder): draws for config, draws in zip(configs, drawn, strict=True)}


@pytest.mark.parametrize("ranks", CASES)
def test_layouts_train_the_run_of_one_process(tmp_path: Path, ranks: int) -> None:
    data, cases = write_data(tmp_path / "data"), CASES[ranks]

    def config(case: Case) -> RunConfig:
        return case.config(data, tmp_path)

    drawn = _train(1, [config(case) for case in dict.fromkeys(map(reference, cases))])
    drawn |= _train(ranks, [config(case) for case in cases])
    for case in cases:
        run, expected = Path(config(case).folder), Path(config(reference(case)).folder)
        (on_one,) = drawn[expected]
        assert same_draws(drawn[run], on_one, case.parallel), case.name
        found = differences(run, expected)
        missed = {name: found[name] for name, bound in FP32_BOUNDS.items() if not found[name] <= bound}
        assert not missed, case.name


def test_the_comparison_tells_runs_apart(tmp_path: Path) -> None:
    """Another seed is another run in every quantity and every draw."""
    config = reference(layout("PGM")).config(write_data(tmp_path / "data"), tmp_path)
    other = dataclasses.replace(
        config, folder=str(tmp_path / "other"), training=dataclasses.replace(config.training, seed=2)
    )
    drawn = _train(1, [config, other])
    ours, theirs = (drawn[Path(c.folder)][0] for c in (config, other))
    found = differences(Path(config.folder), Path(other.folder))
    assert all(found[name] > bound for name, bound in FP32_BOUNDS.items()), found
    assert ours.keys() == theirs.keys()
    assert not any(ours[sample] == theirs[sample] for sample in ours)


def test_draws_have_to_be_seen_once_by_each_rank_of_a_copy() -> None:
    first, second = {"0/0": "a"}, {"0/1": "b"}
    both = first | second
    alone, tensor = ParallelConfig(), ParallelConfig(tensor=2)
    pipeline = ParallelConfig(pipeline=2)
    assert same_draws([first, second], both, alone)
    assert same_draws([both, both], both, tensor)
    assert same_draws([first, first, second, second], both, tensor)
    assert same_draws([first, second, first, second], both, pipeline)
    assert not same_draws([first, {}], both, alone), "a sample is missing"
    assert not same_draws([both, second], both, alone), "a sample is there twice"
    assert not same_draws([first, {"1/1": "b"}], both, alone), "a sample is in another step"
    assert not same_draws([both, first | {"0/1": "c"}], both, tensor), "a rank of the copy saw other noise"
    assert not same_draws([first, second, first, second], both, tensor), "a copy's ranks saw other samples"
