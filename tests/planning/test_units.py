"""What units cost, against whole models and against formulas of other modules."""

from dataclasses import replace
from functools import cache

import pytest
import torch

from pgm_scale.config import (
    AutoregressiveTransformerConfig,
    DiffusionTransformerConfig,
    MaskGITTransformerConfig,
    ParallelConfig,
)
from pgm_scale.models import build_model
from pgm_scale.models.flops import forward_flops_per_token
from pgm_scale.models.stages import unit_kinds, whole_span
from pgm_scale.parallel.construction import build_part, layer_builder
from pgm_scale.parallel.unit_costs import ExampleBatch, backward, stage_forward
from pgm_scale.planning.layouts import Sharing, Workload
from pgm_scale.planning.pretend import META, pretended_rank
from pgm_scale.planning.stages import StageCosts
from pgm_scale.planning.trace import trace_passes
from pgm_scale.planning.units import UnitCosts, keys_per_query
from pgm_scale.planning.units import unit_costs as trace_units
from tests.planning.cases import HARDWARE, MODEL, WORKLOAD, layout

MODELS = [
    MODEL,
    replace(MODEL, group_swap_query="learn+freqs+logsumexp", group_swap_processor="mlp4"),
    DiffusionTransformerConfig(hidden_size=64, num_heads=4, num_blocks=3, time_conditioned=True),
    AutoregressiveTransformerConfig(hidden_size=64, num_heads=4, num_blocks=3),
    MaskGITTransformerConfig(hidden_size=64, num_heads=4, num_blocks=3, num_classes=9),
]
SHARINGS = [Sharing(1, False), Sharing(2, False), Sharing(2, True)]


@cache
def unit_costs(workload: Workload, sharing: Sharing) -> tuple[UnitCosts, UnitCosts]:
    return trace_units(workload, sharing, HARDWARE)


def ids(value):
    if isinstance(value, Sharing):
        return f"TP{value.tensor}{'+SP' if value.sequence_parallel else ''}"
    return getattr(value, "kind", None)


@pytest.mark.parametrize("model", MODELS, ids=ids)
def test_forward_arithmetic_is_what_the_models_flops_count(model):
    workload = replace(WORKLOAD, model=model)
    kept, _ = unit_costs(workload, Sharing(1, False))
    total = 0.0
    for kind in unit_kinds(model):
        # What grows with the batch: not the products with the one condition.
        work = (kept.by_kind[kind].at(2) - kept.by_kind[kind].at(1)).forward
        if kind == "output":  # the gradients of its weight and input are made in its forward pass
            no_bos = isinstance(model, MaskGITTransformerConfig)  # which has neither a place nor a logit
            logits = (workload.vocab_size - no_bos) * (workload.length - no_bos)
            total -= 2 * (2 * model.hidden_size * logits)
        keys = keys_per_query(model, kind, workload.length)
        total += work.matmul_flops + work.attention_flops_per_key * keys
    expected = forward_flops_per_token(model, workload.vocab_size, workload.length) * workload.length
    if isinstance(model, MaskGITTransformerConfig):  # its class, one a sequence
        expected += 2 * model.hidden_size**2 * (6 * model.num_blocks + 2)
    if getattr(model, "time_conditioned", False):
        condition_parts = (
            6 * model.num_blocks + 2
        )  # one condition a sequence, which `models.flops` leaves out
        expected += 2 * model.condition_size * model.hidden_size * condition_parts
    assert total == pytest.approx(expected)


def traced_model(model, sharing, recompute, rows):
    """The whole model as one stage, without the sum over units."""
    parallel = ParallelConfig(tensor=sharing.tensor, sequence_parallel=sharing.sequence_parallel)
    with pretended_rank(parallel, sharing.tensor, sharing.tensor - 1) as mesh:
        layers = layer_builder(mesh, parallel)
        part = build_part(model, WORKLOAD.vocab_size, WORKLOAD.length, layers, whole_span(model), recompute)
        for parameter in part.parameters():
            parameter.data = parameter.data.to(torch.bfloat16)
            parameter.grad = torch.empty_like(parameter)
        batch = ExampleBatch(WORKLOAD.vocab_size, WORKLOAD.length, rows, META)
        forward = stage_forward(part, model, 0, batch, torch.bfloat16)
        return trace_passes(forward, backward, HARDWARE, "bf16"), sum(p.numel() for p in part.parameters())


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("sharing", SHARINGS, ids=ids)
@pytest.mark.parametrize("model", [MODELS[0], MODELS[3], MODELS[4]], ids=ids)
def test_units_sum_to_the_whole_model(model, sharing, recompute):
    workload = replace(WORKLOAD, model=model)
    costs = unit_costs(workload, sharing)[recompute]
    rows = 4
    chosen = layout(
        tensor=sharing.tensor,
        sequence_parallel=sharing.sequence_parallel,
        micro_batch_sequences=rows,
        recompute=recompute,
    )
    (stage,) = StageCosts(workload, sharing, HARDWARE, costs, {}).stages(chosen)
    traced, parameters = traced_model(model, sharing, recompute, rows)
    assert sum(stage.parameters) == parameters
    assert stage.held_bytes == pytest.approx(traced.held_bytes, rel=0.01)
    # Never much below. Above by a share of the weights' gradients, which weigh in so small a model only.
    peak_bytes = traced.held_bytes + traced.extra_bytes
    assert 0.99 * peak_bytes < stage.held_bytes + stage.work_bytes < 1.06 * peak_bytes
    assert stage.load.reduced_bytes == pytest.approx(
        traced.forward.reduced_bytes + traced.backward.reduced_bytes
    )
    assert stage.load.gathered_bytes == pytest.approx(
        traced.forward.gathered_bytes + traced.backward.gathered_bytes
    )
    # MaskGIT's codes without their registers are a view of one sequence and a copy of several.
    assert stage.load.forward_kernels == pytest.approx(traced.forward.kernels, abs=1)


def test_tensor_parallel_traffic_counted_by_hand():
    """Megatron's f and g: an all-reduce of the stream after each row-parallel linear, and in the backward pass
    after each input of column-parallel ones, which a decoder block has three of."""
    kept, _ = unit_costs(WORKLOAD, Sharing(2, False))
    stream = 2 * WORKLOAD.length * MODEL.hidden_size
    for kind, forward, backward_ in (("encoder_block", 2, 2), ("group_swap", 1, 2), ("decoder_block", 2, 3)):
        cost = kept.by_kind[kind].at(1)
        assert cost.forward.reduced_bytes == forward * stream, kind
        assert cost.backward.reduced_bytes == backward_ * stream, kind
        assert cost.forward.gathered_bytes == cost.backward.gathered_bytes == 0
    cost = kept.by_kind["embedding"].at(1)
    assert (cost.forward.reduced_bytes, cost.backward.reduced_bytes) == (stream, 0)


def test_sequence_parallel_traffic_counted_by_hand():
    """Each all-reduce becomes a gather and a scatter, and what a backward pass needs whole is gathered again."""
    kept, _ = unit_costs(WORKLOAD, Sharing(2, True))
    stream = 2 * WORKLOAD.length * MODEL.hidden_size
    # 2 column-parallel inputs gathered, 2 row-parallel outputs scattered; backward 2 + 2, and 2 gathered again.
    cost = kept.by_kind["encoder_block"].at(1)
    assert cost.forward.gathered_bytes == 4 * stream
    assert cost.backward.gathered_bytes == 6 * stream
    assert cost.forward.reduced_bytes == 0


@pytest.mark.parametrize("model", MODELS, ids=ids)
@pytest.mark.parametrize("ranks", [1, 2])
def test_parameters_of_all_ranks_are_the_models(model, ranks):
    kept, recomputed = unit_costs(replace(WORKLOAD, model=model), Sharing(ranks, False))
    assert kept.parameters == recomputed.parameters
    held = sum(kept.shared_parameters) + sum(sum(kept.parameters[kind]) for kind in unit_kinds(model))
    with torch.device("meta"):
        whole = build_model(model, WORKLOAD.vocab_size, WORKLOAD.length)
    split = (
        "attn_",
        "mlp.",
        "vocab_embed",
        "output_layer.linear",
        "query_processor",
        "hidden_to_key_value",
        "attn.w",
        "ff.w",
        "tok_emb",
        "head",
    )
    copies = ("mlp.1.", "mlp.2.bias", "query_processor.0", "sigma_map", "attn_out.bias")
    expected = 0.0
    for name, parameter in whole.named_parameters():
        is_split = any(part in name for part in (*split, "output_linear.weight")) and not any(
            part in name for part in copies
        )
        rows = parameter.shape[0]
        is_vocabulary = any(
            part in name for part in ("vocab_embed", "output_layer.linear", "tok_emb", "head")
        )
        padded = -(-rows // ranks) * ranks if is_vocabulary else rows
        expected += parameter.numel() * padded / rows / (ranks if is_split else 1)
    assert held == expected
