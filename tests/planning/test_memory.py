from dataclasses import replace

import pytest
import torch
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

from pgm_scale.config import DataConfig, ParallelConfig, RunConfig
from pgm_scale.parallel.deepspeed_setup import deepspeed_config
from pgm_scale.parallel.mesh import Mesh
from pgm_scale.planning.memory import (
    BUCKET,
    LIVE_WEIGHTS,
    PERSISTENT,
    SUB_GROUP,
    RankMemory,
    rank_memory,
)
from pgm_scale.planning.stages import Load, Stage
from tests.planning.cases import WORKLOAD, layout

SIZES = (1_000_001, 70_000, 30_002)
TOTAL = sum(SIZES)  # 1,100,003, odd on purpose


def memory(parameters=SIZES, precision="bf16", stage_changes=None, **changes) -> RankMemory:
    stage = Stage(("block",), parameters, Load(), 0.0, 0.0, 0.0, 0.0, 1)
    workload = replace(WORKLOAD, precision=precision)
    return rank_memory(workload, layout(**changes), replace(stage, **stage_changes or {}))


def states(found: RankMemory) -> tuple[float, ...]:
    return found.weights, found.gradients, found.master, found.moments, found.ema


def test_states_of_one_rank():
    # Padded to two elements a rank; bf16 weights, fp32 sums of gradients, master weights, two moments, EMA.
    padded = TOTAL + 1
    assert states(memory()) == (2 * padded, 4 * padded, 4 * padded, 8 * padded, 4 * TOTAL)
    assert states(memory(pipeline=2)) == states(memory())


def test_states_shared_by_zero_1_and_2():
    padded = 1_100_008  # the next multiple of 8
    assert states(memory(data=4)) == (2 * padded, 4 * padded, padded, 2 * padded, padded)
    assert states(memory(data=4, zero_stage=2)) == (2 * padded, padded, padded, 2 * padded, padded)


def test_states_shared_by_zero_3():
    share = 250_001 + 17_500 + 7_501  # each parameter on its own
    persistent = 70_000 + 30_002  # too small to be worth gathering
    assert states(memory(data=4, zero_stage=3)) == (
        2 * (share + persistent),
        4 * share,
        4 * share,
        8 * share,
        4 * share,
    )


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_one_fp32_rank_holds_everything_once(zero_stage: int):
    found = memory(precision="fp32", zero_stage=zero_stage)
    assert states(found) == (4 * TOTAL, 4 * TOTAL, 0, 8 * TOTAL, 4 * TOTAL)
    assert found.buffers == 0


def test_a_pipeline_and_two_fp32_ranks_have_partitions():
    padded = TOTAL + 1
    assert states(memory(precision="fp32", pipeline=2))[1:3] == (4 * padded, 4 * padded)
    assert states(memory(precision="fp32", data=2))[1:3] == (4 * 1_100_004, 2 * 1_100_004)


def test_no_ema_costs_nothing():
    stage = Stage(("block",), SIZES, Load(), 0.0, 0.0, 0.0, 0.0, 1)
    assert rank_memory(replace(WORKLOAD, has_ema=False), layout(), stage).ema == 0


def test_activations_of_all_micro_batches_in_flight_and_the_work_of_one():
    found = memory(stage_changes={"held_bytes": 10.0, "work_bytes": 7.0, "in_flight": 3})
    assert (found.activations, found.work) == (30.0, 7.0)


@pytest.mark.parametrize(("zero_stage", "standing"), [(1, 0), (2, 2 * BUCKET), (3, 4 * BUCKET)])
def test_buffers_stand_while_activations_are_at_their_peak(zero_stage, standing):
    large = {"held_bytes": 1e12}
    found = memory(data=2, zero_stage=zero_stage, stage_changes=large).buffers
    gathered = (2 * TOTAL + 4 * 550_002) if zero_stage == 3 else 0
    assert found == standing + gathered


def test_a_reduction_within_the_pass_meets_the_activations():
    within = memory(parameters=(BUCKET + 1,), zero_stage=2, stage_changes={"held_bytes": 1e12}).buffers
    assert within == 2 * BUCKET + 6 * BUCKET


def test_total_is_the_sum():
    assert memory().total == sum(states(memory()))


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_constants_are_those_of_the_engine(zero_stage):
    parallel = ParallelConfig(zero_stage=zero_stage)
    config = RunConfig(folder="", data=DataConfig("", ""), parallel=parallel)
    settings = deepspeed_config(config, Mesh(0, 1, 0, torch.device("cpu")))
    zero = DeepSpeedZeroConfig(**settings["zero_optimization"])
    assert zero.reduce_bucket_size == BUCKET
    assert (zero.max_live_parameters, zero.sub_group_size) == (LIVE_WEIGHTS, SUB_GROUP)
    assert zero.param_persistence_threshold == PERSISTENT
    assert not zero.overlap_comm  # or there are two buckets, and reductions are not waited for
    assert settings["communication_data_type"] == settings["data_types"]["grad_accum_dtype"] == "fp32"
