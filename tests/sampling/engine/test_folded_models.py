"""Folded models answer as the plain ones: logits at every step of real schedules, and whole runs."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch

from pgm_scale.models.partition_transformer import PartitionInputs
from pgm_scale.models.readout import logits
from pgm_scale.models.segments import Segments
from pgm_scale.models.stages import Span
from pgm_scale.sampling import SAMPLERS, sample
from pgm_scale.sampling.categorical import TokenDraw
from pgm_scale.sampling.decode import decode
from pgm_scale.sampling.engine import cached_ancestral, fold, linear, uniform
from pgm_scale.sampling.engine.cached_ancestral import CachedAncestralSampler
from pgm_scale.sampling.engine.uniform import UniformSampler
from tests.sampling.engine.support import (
    CPU,
    LENGTH,
    MASK,
    VOCABULARY,
    batch_of,
    diffusion,
    known_tokens,
    partition,
    plain_tokens,
)
from tests.sampling.exact import ExactPartition, joint_distribution

QUERIES = ["learn", "learn+freqs", "learn+freqs+mean", "learn+freqs+logsumexp"]
RAGGED = [1, 1, 5, 20, LENGTH, 2]
PGM_KINDS = ["pgm_uniform", "pgm_non_uniform", "pgm_naive"]
MDLM_KINDS = ["ancestral_cached", "ancestral", "analytic"]


class Recorder:
    """A model that runs both forms, compares their logits and goes on with the folded one's."""

    def __init__(self, model: Any):
        self.model, self.folded, self.calls, self.config = model, fold(model), 0, model.config

    def __call__(self, *arguments: Any, readout: Any) -> Any:
        self.calls += 1
        torch.testing.assert_close(
            self.folded(*arguments), self.model(*arguments, readout=logits), atol=1e-4, rtol=1e-4
        )
        return self.folded(*arguments, readout=readout)


@pytest.fixture(params=["onednn", "plain linears"])
def backend(request: Any, monkeypatch: Any) -> None:
    if request.param == "plain linears":
        monkeypatch.setattr(linear, "ReorderedLinear", linear.PlainLinear)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("kind", PGM_KINDS + MDLM_KINDS)
@pytest.mark.parametrize("known_B", [[1, 1, 1], RAGGED, [0, 3]])
def test_logits_of_packed_inputs_equal_the_plain_models(kind, known_B):
    known_BL = known_tokens([max(known, 1) for known in known_B])
    known_BL[np.array(known_B) == 0] = -1  # a row may know nothing at all
    model = partition() if kind.startswith("pgm") else diffusion()
    recorder = Recorder(model)
    with torch.inference_mode():
        SAMPLERS[kind][1](recorder, batch_of(known_BL, kind=kind))
    assert recorder.calls >= 7


@pytest.mark.parametrize(("query", "processor"), itertools.product(QUERIES, ["linear", "mlp4"]))
def test_logits_of_the_ordered_decoder_equal_the_plain_models(query, processor, monkeypatch):
    """Every step of a run, with the tokens that it has drawn so far."""
    model = partition(group_swap_query=query, group_swap_processor=processor)
    batch = batch_of(known_tokens([3, 3]), steps=9)
    seen: list[torch.Tensor] = []

    class Recorded(TokenDraw):
        def __call__(self, hidden: torch.Tensor, output_linear: Any) -> torch.Tensor:
            seen.append(output_linear(hidden))
            return super().__call__(hidden, output_linear)

    monkeypatch.setattr(uniform, "TokenDraw", Recorded)
    with torch.inference_mode():
        sampler = UniformSampler(fold(model))
        tokens_BL, passes = sampler(batch)
        decoder: Any = sampler._decoder
        assert passes == len(seen) == 9
        end = 3
        for logits_QV in seen:
            clean, end = end, end + len(logits_QV) // 2
            positions_BL = decoder.positions_BL
            inputs = PartitionInputs(
                tokens_T=tokens_BL.gather(1, positions_BL[:, :clean]).flatten(),
                positions_T=positions_BL[:, :clean].flatten(),
                segments=Segments.of([clean] * 2),
                query_positions_Q=positions_BL[:, clean:end].flatten(),
                query_segments=Segments.of([end - clean] * 2),
            )
            expected_QV = model(inputs)
            others = torch.arange(len(expected_QV[0])) != MASK  # the draw has overwritten the mask's logit
            torch.testing.assert_close(logits_QV[:, others], expected_QV[:, others], atol=1e-4, rtol=1e-4)
        assert end == LENGTH


def sampled(model, batch):
    """The tokens that `sample` gives, which folds the model."""
    return sample(
        model,
        VOCABULARY,
        LENGTH,
        batch.config,
        known_BL=batch.known_BL,
        seed=1,
        batch_sequences=9,
        device=CPU,
    ).tokens_BL


@pytest.mark.parametrize("kind", PGM_KINDS + MDLM_KINDS)
@pytest.mark.parametrize("known_B", [[1] * 4, [6] * 3, RAGGED], ids=["BOS", "equal", "ragged"])
@pytest.mark.parametrize("steps", [1, 7, 100])
def test_whole_runs_give_the_plain_tokens(kind, known_B, steps):
    model = partition() if kind.startswith("pgm") else diffusion()
    batch = batch_of(known_tokens(known_B), steps=steps, kind=kind)
    np.testing.assert_array_equal(sampled(model, batch), plain_tokens(model, batch))


def test_batches_of_one_size_share_buffers_and_leave_nothing_in_them():
    model, known_BL = partition(), known_tokens([4] * 10)
    config = batch_of(known_BL).config
    sizes = (10, 4, 1)  # 4 + 4 + 2: the last batch is smaller
    runs = [
        sample(
            model, VOCABULARY, LENGTH, config, known_BL=known_BL, seed=1, batch_sequences=size, device=CPU
        ).tokens_BL
        for size in sizes
    ]
    for run in runs[1:]:
        np.testing.assert_array_equal(run, runs[0])


def test_truncation_reaches_the_folded_samplers():
    model, known_BL = partition(), known_tokens([1] * 4)
    batch = batch_of(known_BL, top_k=3, top_p=0.8, temperature=0.7)
    tokens_BL = UniformSampler(fold(model))(batch)[0].numpy()
    np.testing.assert_array_equal(tokens_BL, plain_tokens(model, batch))
    assert (tokens_BL != plain_tokens(model, batch_of(known_BL))).any()


def test_bfloat16_is_as_close_to_fp32_as_the_plain_model():
    """PGM by its packed form and MDLM by its own; only the order of rounding differs."""
    for model, kind in ((partition(), "pgm_naive"), (diffusion(), "ancestral")):
        calls: list[tuple[Any, ...]] = []

        class Tap:
            def __init__(self, model: Any, calls: list[tuple[Any, ...]]):
                self.model, self.calls, self.config = model, calls, model.config

            def __call__(self, *arguments: Any, readout: Any) -> Any:
                self.calls.append(arguments)
                return self.model(*arguments, readout=readout)

        with torch.inference_mode():
            SAMPLERS[kind][1](Tap(model, calls), batch_of(known_tokens([1, 1]), kind=kind))
            exact = [model(*arguments) for arguments in calls]
            model.to(torch.bfloat16)
            folded = fold(model)
            plain_error, folded_error = (
                torch.stack([(form(*a) - e).abs().mean() for a, e in zip(calls, exact, strict=True)]).mean()
                for form in (model, folded)
            )
            assert folded(*calls[0]).dtype == torch.float32
        assert 0 < folded_error < 1.5 * plain_error


@pytest.mark.parametrize("kind", ["pgm_uniform", "pgm_non_uniform", "ancestral_cached"])
def test_bfloat16_samples(kind):
    model = (partition() if kind.startswith("pgm") else diffusion()).to(torch.bfloat16)
    for known_B in ([2, 2, 2], RAGGED):
        batch = batch_of(known_tokens(known_B), kind=kind)
        tokens_BL = sampled(model, batch)
        assert ((tokens_BL >= 0) & (tokens_BL < MASK)).all()


def test_cached_ancestral_steps_of_some_rows_only():
    """More steps than tokens: most steps draw in one row, and others stay behind with what they have."""
    model = diffusion()
    batch = batch_of(known_tokens([1, 30, 38]), steps=300, kind="ancestral_cached")
    with torch.inference_mode():
        tokens_BL, passes = CachedAncestralSampler(fold(model))(batch)
    np.testing.assert_array_equal(tokens_BL.numpy(), plain_tokens(model, batch))
    assert passes > 40


def test_cached_logits_equal_the_plain_models(monkeypatch):
    """The cache's own steps, logits and all: the recorded readout sees each target's."""
    model = diffusion()
    plain_QV: list[torch.Tensor] = []
    cached_QV: list[torch.Tensor] = []
    batch = batch_of(known_tokens([1, 4, 9]), steps=6, kind="ancestral_cached")
    cache = cached_ancestral.FirstBlockCache

    class Recorded(TokenDraw):
        def __call__(self, hidden: torch.Tensor, output_linear: Any) -> torch.Tensor:
            cached_QV.append(output_linear(hidden.flatten(0, -2)[self.rows_Q]))
            return super().__call__(hidden, output_linear)

    def draw(self: Any, uniforms_Q: np.ndarray, rows_Q: np.ndarray) -> TokenDraw:
        return Recorded(self.rules, torch.from_numpy(uniforms_Q), torch.from_numpy(rows_Q))

    monkeypatch.setattr(type(batch), "draw", draw)
    with torch.inference_mode():
        predict = cache(fold(model), batch)

        def both(folded: Any, batch: Any, step: Any) -> torch.Tensor:
            plain_QV.append(model(step.tokens_BL)[torch.from_numpy(step.target_BL)])
            return predict(folded, batch, step)

        decode(fold(model), both, batch, cached_ancestral.opening_steps(batch))
    for plain, cached in zip(plain_QV, cached_QV, strict=True):
        torch.testing.assert_close(cached, plain, atol=1e-4, rtol=1e-4)


def test_what_cannot_be_folded_keeps_the_plain_path():
    assert fold(partition()) is not None
    for model in (
        diffusion(time_conditioned=True),
        diffusion(num_blocks=1),
        partition(num_encoder_blocks=0),
        partition(num_decoder_blocks=0),
        ExactPartition(joint_distribution()),
    ):
        assert fold(model) is model
    stage, gathered = partition(), partition()
    stage.span = Span(0, 3)
    gathered.encoder.blocks[0].attn_out.weight.data = torch.empty(0)  # as ZeRO-3 leaves it
    split = partition()
    split.output_layer.linear = torch.nn.Linear(32, 23)
    for model in (stage, gathered, split):
        assert fold(model) is model
    with torch.autocast("cpu", torch.bfloat16):
        model = partition()
        assert fold(model) is model
