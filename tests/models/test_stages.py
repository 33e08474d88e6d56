"""A model cut into stages in every way, run one after the other in one process, is the whole model."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations, pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pgm_scale.config import ModelConfig
from pgm_scale.models import build_model
from pgm_scale.models.partition_transformer import PartitionInputs
from pgm_scale.models.segments import Segments
from pgm_scale.models.stages import Span, is_shared, spans, unit_kinds, whole_span
from tests.models.builders import (
    HIDDEN,
    LENGTH,
    VOCAB,
    autoregressive_config,
    diffusion_config,
    image_config,
    maskgit_config,
    pack_groups,
    partition_config,
    randomised,
)

MODELS: dict[str, Any] = {
    "pgm": partition_config("learn+freqs+mean"),
    "image pgm": image_config(registers=2),
    "mdlm": diffusion_config(),
    "time-conditioned mdlm": diffusion_config(time_conditioned=True),
    "ar": autoregressive_config(),
    "maskgit": maskgit_config(registers=2),
}


def _arguments(name: str) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(1)
    tokens_BL = torch.randint(VOCAB, (3, LENGTH), generator=generator)
    if name == "pgm":
        return (pack_groups(tokens_BL, torch.randint(2, (3, LENGTH), generator=generator))[0],)
    if name == "image pgm":
        groups_BL = torch.randint(2, (3, LENGTH), generator=generator)
        return (pack_groups(tokens_BL, groups_BL, 2, torch.tensor([1, 5, 1]), first_query=1)[0],)
    if name == "maskgit":
        return (tokens_BL % (VOCAB - 1), torch.tensor([1, 0, 5]))
    return (tokens_BL, torch.tensor([0.0, 0.3, 4.0])) if "mdlm" in name else (tokens_BL,)


def _inference_inputs() -> PartitionInputs:
    """5 clean tokens and 7 to predict, in 3 rows of which one has no clean token."""
    positions_T, queries_Q = torch.tensor([0, 3, 7, 2, 1]), torch.arange(3, 10)
    return PartitionInputs(
        torch.arange(5), positions_T, Segments.of([3, 0, 2]), queries_Q, Segments.of([1, 2, 4])
    )


def _cuts(config: ModelConfig) -> Iterator[list[Span]]:
    """Every way to cut the units into consecutive stages."""
    units = whole_span(config).last
    for count in range(units):
        for inner in combinations(range(1, units), count):
            yield [Span(first, last) for first, last in pairwise([0, *inner, units])]


def _stages(whole: Any, cut: list[Span]) -> list[Any]:
    """The stages of a model, with its weights."""
    state, stages = whole.state_dict(), []
    for span in cut:
        stage = build_model(whole.config, VOCAB, LENGTH, span=span)
        stage.load_state_dict({name: state[name] for name in stage.state_dict()})
        stages.append(stage)
    return stages


def _run(stages: list[Any], *arguments: Any, caches: list[Any] | None = None) -> Tensor:
    """Each stage is fed what the one before it returned; every row count must be the one foretold."""
    stream: Any = None
    for number, stage in enumerate(stages):
        if number > 0:
            assert stream.shape == (stage.rows_before(stage.span.first, *arguments), HIDDEN), stage.span
        options = {} if caches is None else {"cache": caches[number]}
        stream = stage(*arguments, received=stream, **options)
    return stream


@pytest.mark.parametrize("name", MODELS)
def test_every_cut_has_the_output_and_the_gradients_of_the_whole(name: str) -> None:
    whole, arguments = randomised(MODELS[name]), _arguments(name)
    expected = whole(*arguments)
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2)) / expected.numel()
    (expected * weights).sum().backward()
    for cut in _cuts(MODELS[name]):
        stages = _stages(whole, cut)
        output = _run(stages, *arguments)
        assert torch.equal(output, expected), cut
        (output * weights).sum().backward()
        for key, parameter in whole.named_parameters():
            gradients = [dict(stage.named_parameters())[key].grad for stage in _holders(stages, key)]
            total = sum(gradient for gradient in gradients if gradient is not None)
            # Exact but for the order in which what several stages read adds up.
            torch.testing.assert_close(total, parameter.grad, rtol=1e-5, atol=1e-7, msg=f"{key}, {cut}")


def _holders(stages: list[nn.Module], name: str) -> list[nn.Module]:
    return [stage for stage in stages if name in dict(stage.named_parameters())]


@pytest.mark.parametrize("name", MODELS)
def test_stages_share_the_condition_and_a_tied_table_and_nothing_else(name: str) -> None:
    whole = randomised(MODELS[name])
    for cut in _cuts(MODELS[name]):
        stages = _stages(whole, cut)
        for key, _ in whole.named_parameters():
            assert len(_holders(stages, key)) == (len(stages) if is_shared(key) else 1), (key, cut)
        names = {key for stage in stages for key, _ in stage.named_parameters()}
        assert names == {key for key, _ in whole.named_parameters()}
    assert any(map(is_shared, names)) == (name != "ar")


def test_inference_with_more_queries_than_tokens_passes_through_every_cut() -> None:
    whole, inputs = randomised(MODELS["pgm"]), _inference_inputs()
    for cut in _cuts(MODELS["pgm"]):
        output = _run(_stages(whole, cut), inputs)
        assert output.shape == (7, VOCAB)
        assert torch.equal(output, whole(inputs)), cut


def test_stages_with_caches_of_their_own_continue_a_sequence() -> None:
    whole = randomised(MODELS["ar"])
    (tokens_BL,) = _arguments("ar")
    for cut in _cuts(MODELS["ar"]):
        stages = _stages(whole, cut)
        with torch.no_grad():
            caches = [stage.new_cache(3) for stage in stages]
            chunks = [_run(stages, chunk, caches=caches) for chunk in tokens_BL.split([5, 1, 4, 2], dim=1)]
            expected = whole(tokens_BL)
        torch.testing.assert_close(torch.cat(chunks, dim=1), expected, atol=1e-5, rtol=1e-5)


def test_units_and_spans() -> None:
    kinds = unit_kinds(MODELS["pgm"])
    assert kinds == (
        "embedding",
        "encoder_block",
        "encoder_block",
        "group_swap",
        "decoder_block",
        "decoder_block",
        "output",
    )
    assert unit_kinds(MODELS["ar"]) == ("embedding", "block", "block", "output")
    assert spans((2, 4, 1)) == [Span(0, 2), Span(2, 6), Span(6, 7)]
    assert [list(span.numbers(4, 2)) for span in spans((2, 3, 2))] == [[], [0], [1]]
