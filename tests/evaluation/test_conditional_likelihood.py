"""The bound is the average over all orders, its draws estimate it without bias; autoregressive scores are exact."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch

from pgm_scale.errors import UserError
from pgm_scale.evaluation.conditional_likelihood import (
    BoundSettings,
    ConditionalLikelihood,
    row_model,
    weighted_masks,
)
from pgm_scale.evaluation.continuations import Continuation
from pgm_scale.loading import load
from pgm_scale.models.partition_transformer import PartitionInputs
from pgm_scale.models.segments import Segments
from pgm_scale.trained_model import TrainedModel
from tests.evaluation.tiny_text import export_tiny
from tests.tiny_data import LENGTH, VOCABULARY

CPU = torch.device("cpu")
MASK = VOCABULARY.mask_id


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TrainedModel]:
    folder = tmp_path_factory.mktemp("models")
    return {kind: load(export_tiny(kind, folder / kind)) for kind in ("pgm", "mdlm", "d3pm", "ar")}


def log_p(trained: TrainedModel, shown: dict[int, int], position: int) -> torch.Tensor:
    """[V] log-probabilities at a position, given tokens at others, from the logits of one plain forward pass."""
    if trained.description.model.kind == "partition_transformer":
        inputs = PartitionInputs(
            torch.tensor(list(shown.values())),
            torch.tensor(list(shown)),
            Segments.of([len(shown)]),
            torch.tensor([position]),
            Segments.of([1]),
        )
        logits_V = trained.model(inputs)[0]
    else:
        tokens_L = torch.tensor([shown.get(place, MASK) for place in range(LENGTH)])
        share = min((tokens_L == MASK).double().mean().item(), 1 - 1e-4)
        logits_V = trained.model(tokens_L[None], torch.tensor([-math.log(1 - share)]))[0, position]
    logits_V = logits_V.double().index_fill(0, torch.tensor([MASK]), -torch.inf)
    return logits_V.log_softmax(0)


def average_over_orders(trained: TrainedModel, item: Continuation) -> float:
    """The mean over all orders of the targets of the chain rule's sum."""
    start, totals = len(item.context), []
    for order in itertools.permutations(range(len(item.targets))):
        shown, total = dict(enumerate(item.context)), 0.0
        for place in order:
            total += log_p(trained, shown, start + place)[item.targets[place]].item()
            shown[start + place] = item.targets[place]
        totals.append(total)
    return float(np.mean(totals))


def scores_of(trained: TrainedModel, items: list[Continuation], batch: int = 32, **settings: Any):
    return list(ConditionalLikelihood(trained, BoundSettings(**settings), batch, CPU)(items))


@pytest.mark.parametrize("kind", ["pgm", "mdlm", "d3pm"])
def test_all_masks_together_are_the_average_over_all_orders(
    models: dict[str, TrainedModel], kind: str
) -> None:
    items = [Continuation([0, 5, 6], [7, 8, 9]), Continuation([0], [4, 4]), Continuation([0, 2], [3])]
    found = scores_of(models[kind], items)
    for score, item in zip(found, items, strict=True):
        assert score.log_likelihood == pytest.approx(average_over_orders(models[kind], item), rel=1e-4)
    exact = log_p(models[kind], {0: 0, 1: 2}, 2)[3].item()
    assert found[2].log_likelihood == pytest.approx(exact, rel=1e-4)


@pytest.mark.parametrize("kind", ["pgm", "mdlm"])
def test_the_joint_form_also_predicts_the_context(models: dict[str, TrainedModel], kind: str) -> None:
    conditional, joint = Continuation([0, 5], [7, 8]), Continuation([0], [5, 7, 8])
    (found,) = scores_of(models[kind], [conditional], bound="joint")
    assert found.log_likelihood == pytest.approx(average_over_orders(models[kind], joint), rel=1e-4)
    assert found.is_greedy == scores_of(models[kind], [conditional])[0].is_greedy


def test_autoregressive_scores_are_sums_of_log_softmax(models: dict[str, TrainedModel]) -> None:
    items = [
        Continuation([0, 5, 6], [7, 8, 9]),
        Continuation([0], [4] * (LENGTH - 1)),
        Continuation([0, 2], [3]),
    ]
    for item, score in zip(items, scores_of(models["ar"], items), strict=True):
        logits = models["ar"].model(torch.tensor([item.context + item.targets]))[0].double()
        logits[:, MASK] = -torch.inf
        log_p = logits.log_softmax(-1)[len(item.context) - 1 :]
        expected = sum(log_p[i, token].item() for i, token in enumerate(item.targets))
        assert score.log_likelihood == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", ["pgm", "mdlm", "ar"])
def test_greedy_means_the_most_likely_tokens(models: dict[str, TrainedModel], kind: str) -> None:
    """Of PGM and MDLM all in one pass; of an autoregressive model one after the other."""
    trained, context = models[kind], [0, 5, 6]
    targets: list[int] = []
    for place in range(2):
        if kind == "ar":
            logits_V = trained.model(torch.tensor([context + targets]))[0, -1]
            logits_V[MASK] = -torch.inf
        else:
            logits_V = log_p(trained, dict(enumerate(context)), 3 + place)
        targets.append(int(logits_V.argmax()))
    other = [*targets[:1], (targets[1] + 1) % MASK]
    found = scores_of(trained, [Continuation(context, targets), Continuation(context, other)])
    assert [score.is_greedy for score in found] == [True, False]


@pytest.mark.parametrize("kind", ["pgm", "mdlm", "ar"])
def test_the_batch_size_and_the_company_do_not_matter(models: dict[str, TrainedModel], kind: str) -> None:
    items = [Continuation([0, *range(1, 2 + i % 4)], list(range(2, 3 + i % 7))) for i in range(9)]
    expected = scores_of(models[kind], items, 64, draws=6)
    for batch in (1, 5):
        for one, other in zip(scores_of(models[kind], items, batch, draws=6), expected, strict=True):
            assert one.log_likelihood == pytest.approx(other.log_likelihood, rel=1e-5)
            assert one.is_greedy == other.is_greedy
    (alone,) = scores_of(models[kind], items[6:7], draws=6)
    assert alone.log_likelihood == pytest.approx(expected[6].log_likelihood, rel=1e-5)


def test_no_continuations_have_no_scores(models: dict[str, TrainedModel]) -> None:
    assert scores_of(models["pgm"], []) == []


@pytest.mark.parametrize("n", [5, 9])
def test_drawn_masks_estimate_without_bias(n: int) -> None:
    """With a random cost of each set, the mean over seeds is the sum over all sets."""
    costs = np.random.default_rng(0).exponential(size=1 << n)

    def estimate(masks: list[tuple[np.ndarray, float]]) -> float:
        return sum(
            weight * masked_n.sum() * costs[masked_n @ (1 << np.arange(n))] for masked_n, weight in masks
        )

    everything = weighted_masks(n, BoundSettings(draws=1 << n))
    assert len(everything) == (1 << n) - 1
    estimates = [estimate(weighted_masks(n, BoundSettings(draws=7, seed=seed))) for seed in range(1500)]
    error = float(np.std(estimates)) / math.sqrt(len(estimates))
    assert np.mean(estimates) == pytest.approx(estimate(everything), abs=4 * error)
    assert error < 0.02 * np.mean(estimates)


@pytest.mark.parametrize(("n", "draws"), [(1, 1), (2, 1), (3, 128), (8, 2), (40, 16), (40, 128)])
def test_masks_weigh_every_target_once_on_average(n: int, draws: int) -> None:
    """So equal costs of all tokens are summed without noise; and the sizes are spread evenly."""
    masks = weighted_masks(n, BoundSettings(draws=draws))
    assert sum(weight * masked_n.sum() for masked_n, weight in masks) == pytest.approx(n)
    assert masks[0][0].all()
    assert all(masked_n.any() for masked_n, _ in masks)
    if 2**n - 1 > draws > 2:
        sizes = sorted(int(masked_n.sum()) for masked_n, _ in masks[1:])
        assert max(np.diff([1, *sizes, n - 1])) <= math.ceil((n - 1) / (draws - 1))


def test_image_models_are_refused() -> None:
    with pytest.raises(UserError, match="give a model of text"):
        row_model(torch.nn.Linear(1, 1), VOCABULARY, CPU)
