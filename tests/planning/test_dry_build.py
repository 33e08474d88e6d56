from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from pgm_scale.config import (
    AutoregressiveTransformerConfig,
    DiffusionTransformerConfig,
    MaskGITTransformerConfig,
)
from pgm_scale.models import build_model
from pgm_scale.parallel.tensor_layers import TensorParallelLayers
from pgm_scale.planning.dry_build import dry_build
from tests.planning.cases import HARDWARE, MODEL, WORKLOAD, layout, planner_of

MODELS = [
    MODEL,
    replace(MODEL, group_swap_query="learn+freqs+mean", group_swap_processor="mlp4"),
    replace(MODEL, num_classes=9, registers=6),
    DiffusionTransformerConfig(hidden_size=64, num_heads=4, num_blocks=4, condition_size=8),
    AutoregressiveTransformerConfig(hidden_size=64, num_heads=4, num_blocks=4),
    MaskGITTransformerConfig(hidden_size=64, num_heads=4, num_blocks=4, num_classes=9),
]
LAYOUTS = [
    layout(),
    layout(tensor=4, sequence_parallel=True, data=256, micro_batches=1),  # 1,024 ranks
    layout(tensor=2, pipeline=3, data=8, micro_batches=2),
    layout(tensor=2, sequence_parallel=True, pipeline=2, recompute=True, micro_batch_sequences=2),
    layout(pipeline=5, data=4, recompute=True),
]


def built(model, chosen, tamper=lambda stages: stages):
    workload = replace(WORKLOAD, model=model)
    stages = tamper(planner_of(workload).stages(chosen))
    return dry_build(workload, chosen, stages, HARDWARE)


@pytest.mark.parametrize(
    ("model", "chosen"),
    [(MODELS[0], chosen) for chosen in LAYOUTS]
    + [(model, LAYOUTS[2]) for model in MODELS[1:]]
    + [(MODELS[-1], LAYOUTS[3])],
)
def test_layouts_are_proved(model, chosen):
    proof = built(model, chosen)
    assert proof.problems == ()
    assert proof.parts == chosen.sharing.tensor * chosen.pipeline
    with torch.device("meta"):
        whole = build_model(model, WORKLOAD.vocab_size, WORKLOAD.length)
    assert proof.parameters == sum(p.numel() for p in whole.parameters())
    assert not dist.is_initialized()


def test_a_missing_unit_is_found():
    proof = built(MODEL, LAYOUTS[2], lambda stages: [*stages[:-1], replace(stages[-1], kinds=("output",))])
    assert any("decoder.layers" in line for line in proof.problems)


def test_a_wrong_memory_prediction_is_found():
    proof = built(MODEL, LAYOUTS[2], lambda stages: [replace(stages[0], held_bytes=1e9), *stages[1:]])
    assert any(line.startswith("stage 0: activations") for line in proof.problems)


def test_overlapping_shards_are_found(monkeypatch):
    """Ranks that all take the first slice."""
    monkeypatch.setattr(TensorParallelLayers, "rank", property(lambda _: 0, lambda *_: None), raising=False)
    proof = built(MODEL, LAYOUTS[2])
    assert any("a gap or an overlap" in line for line in proof.problems)
