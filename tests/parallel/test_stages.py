from itertools import combinations, pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pgm_scale.errors import UserError
from pgm_scale.models.stages import unit_kinds
from pgm_scale.parallel.stages import split_units
from pgm_scale.parallel.unit_costs import measure_unit_costs
from tests.models.builders import LENGTH, VOCAB, autoregressive_config, diffusion_config, partition_config

CONFIGS = [
    partition_config(),
    partition_config(query="learn+freqs+logsumexp", processor="mlp4"),
    diffusion_config(time_conditioned=True),
    autoregressive_config(),
]


def stage_costs(costs, cuts):
    edges = [0, *cuts, len(costs)]
    return [sum(costs[a:b]) for a, b in pairwise(edges)]


@given(st.lists(st.integers(0, 12), min_size=1, max_size=9), st.data())
def test_split_is_the_best_of_all(costs, data):
    stages = data.draw(st.integers(1, len(costs)))
    sizes = split_units(costs, stages)
    assert len(sizes) == stages
    assert sum(sizes) == len(costs)
    assert min(sizes) >= 1
    cuts = [sum(sizes[: i + 1]) for i in range(stages - 1)]

    def badness(parts):
        return max(parts), sum(part * part for part in parts)

    best = min(
        badness(stage_costs(costs, chosen)) for chosen in combinations(range(1, len(costs)), stages - 1)
    )
    assert badness(stage_costs(costs, cuts)) == best


def test_equal_units_that_do_not_divide_leave_the_larger_stages_first():
    assert split_units([1.0] * 8, 3) == (3, 3, 2)


def test_sums_of_floats_do_not_hide_a_split():
    assert split_units([0.1, 0.2, 0.3, 0.1 + 0.2 + 0.3], 2) == (3, 1)


def test_more_stages_than_units_is_an_error():
    with pytest.raises(UserError, match="3 units cannot be split into 4 pipeline stages"):
        split_units([1.0, 1.0, 1.0], 4)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: type(c).__name__)
def test_every_kind_is_measured_and_the_generator_left_alone(config):
    before = torch.get_rng_state()
    costs = measure_unit_costs(config, VOCAB, LENGTH, 2, torch.device("cpu"), torch.float32)
    assert costs.keys() == set(unit_kinds(config))
    assert all(seconds > 0 for seconds in costs.values())
    assert torch.equal(before, torch.get_rng_state())
