from dataclasses import replace
from itertools import product
from typing import Any

import pytest

from pgm_scale.config import (
    AutoregressiveObjectiveConfig,
    AutoregressiveTransformerConfig,
    ComplementaryMDLMObjectiveConfig,
    D3PMObjectiveConfig,
    DataConfig,
    DiffusionTransformerConfig,
    MaskGITTransformerConfig,
    ParallelConfig,
    PGMObjectiveConfig,
    RunConfig,
    TrainingConfig,
)
from pgm_scale.parallel.layout import layout_problems, length_problems
from pgm_scale.planning.layouts import Layout, Workload, possible_layouts
from tests.planning.cases import MODEL

LENGTH = 6


def run_config(model=MODEL) -> RunConfig:
    training = TrainingConfig(global_batch_sequences=24, precision="fp32")
    return RunConfig(folder="", data=DataConfig("", ""), model=model, training=training)


def as_config(config, layout) -> RunConfig:
    """The layout, in the words of a configuration."""
    parallel = ParallelConfig(
        tensor=layout.sharing.tensor,
        pipeline=layout.pipeline,
        sequence_parallel=layout.sharing.sequence_parallel,
        zero_stage=layout.zero_stage,
    )
    micro = layout.micro_batch_sequences
    training = replace(config.training, micro_batch_sequences=micro, recompute_blocks=layout.recompute)
    return replace(config, parallel=parallel, training=training)


def every_setting(config):
    """All that could be tried on 8 GPUs, most of it impossible."""
    for tensor, pipeline, zero, sp, recompute, micro in product(
        range(1, 9), range(1, 9), range(4), (False, True), (False, True), range(1, 25)
    ):
        parallel = ParallelConfig(
            tensor=tensor,
            pipeline=pipeline,
            zero_stage=zero,  # type: ignore[arg-type]
            sequence_parallel=sp,
        )
        training = replace(config.training, micro_batch_sequences=micro, recompute_blocks=recompute)
        yield replace(config, parallel=parallel, training=training)


@pytest.mark.parametrize(
    "model",
    [
        MODEL,
        DiffusionTransformerConfig(hidden_size=48, num_heads=6, num_blocks=2, time_conditioned=True),
        DiffusionTransformerConfig(hidden_size=32, num_heads=2, num_blocks=5),
        MaskGITTransformerConfig(hidden_size=48, num_heads=4, num_blocks=2, registers=2),  # 7 rows an image
    ],
    ids=["pgm", "mdlm of time", "mdlm", "maskgit"],
)
def test_exactly_the_layouts_without_a_problem(model):
    config = run_config(model)
    workload = Workload.of(config, 101, LENGTH)
    found = [as_config(config, layout) for layout in possible_layouts(workload, 8, gpus_per_node=4)]
    allowed = [
        tried
        for tried in every_setting(config)
        if not layout_problems(tried, 8) + length_problems(tried, LENGTH) and 4 % tried.parallel.tensor == 0
    ]
    assert sorted(map(repr, found)) == sorted(map(repr, allowed))


def test_a_layouts_numbers_agree():
    config = run_config()
    workload = Workload.of(config, 101, LENGTH)
    for layout in possible_layouts(workload, 8, gpus_per_node=4):
        assert Layout.of(as_config(config, layout), 8) == layout
        assert layout.gpus == 8
        assert layout.micro_batches * layout.micro_batch_sequences * layout.data == 24


def test_what_the_model_sees_of_a_sequence():
    diffusion, autoregressive = DiffusionTransformerConfig(), AutoregressiveTransformerConfig()
    cases: list[tuple[Any, Any, int, int]] = [
        (MODEL, PGMObjectiveConfig(), 32, 1),
        (autoregressive, AutoregressiveObjectiveConfig(), 31, 1),  # the last token is only a target
        (diffusion, ComplementaryMDLMObjectiveConfig(), 32, 2),
        (diffusion, D3PMObjectiveConfig(), 32, 2),
        (diffusion, D3PMObjectiveConfig(substitution=True), 32, 1),
    ]
    for model, objective, length, rows in cases:
        workload = Workload.of(replace(run_config(model), objective=objective), 101, 32)
        assert (workload.length, workload.rows_per_sequence) == (length, rows)
        assert workload.tokens == 24 * length
