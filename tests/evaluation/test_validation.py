"""Validation is a function of the split and the weights: not of the batch size, nor of the ranks."""

from typing import Any

import numpy as np
import pytest
import torch

from pgm_scale.config import MDLMObjectiveConfig, PGMObjectiveConfig, VQObjectiveConfig
from pgm_scale.data.storage import SplitStorage
from pgm_scale.evaluation.perplexity import Perplexity
from pgm_scale.evaluation.validation import (
    validate,
    validation_loader,
    validation_metrics,
    validation_summary,
)
from pgm_scale.models import build_model
from pgm_scale.objectives import build_objective
from tests.objectives.tiny import LogitsGiven
from tests.tiny_data import LENGTH, VOCABULARY, tiny_config, write_tiny_split


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> SplitStorage:
    return SplitStorage(
        write_tiny_split(tmp_path_factory.mktemp("data") / "v", 21, 3, "validation", pad=True)
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> torch.nn.Module:
    config = tiny_config(tmp_path_factory.mktemp("d"), tmp_path_factory.mktemp("r")).model
    torch.manual_seed(0)
    model = build_model(config, VOCABULARY.size, LENGTH)
    for parameter in model.parameters():  # many are 0 at first, which would hide differences
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def _validate(model: torch.nn.Module, split: SplitStorage, **options: Any) -> Perplexity:
    objective = build_objective(PGMObjectiveConfig(), VOCABULARY)
    settings: dict[str, Any] = {"sequences": 1000, "batch_sequences": 4, "device": torch.device("cpu")}
    return validate(model, objective, validation_loader(split), **settings | options)


def test_any_batch_size_gives_the_same_number(model: torch.nn.Module, split: SplitStorage) -> None:
    expected = _validate(model, split, batch_sequences=21)
    assert (expected.sequences, expected.tokens) == (21, split.manifest.tokens)
    for batch in (1, 4, 40):
        found = _validate(model, split, batch_sequences=batch)
        assert (found.sequences, found.tokens) == (21, split.manifest.tokens)
        assert found.nll_nats_per_token == pytest.approx(expected.nll_nats_per_token, rel=1e-5)
        assert found.standard_error == pytest.approx(expected.standard_error, rel=1e-4)


def test_ranks_share_the_work_with_equal_numbers_of_passes(
    model: torch.nn.Module, split: SplitStorage
) -> None:
    states: list[np.ndarray] = []
    passes: list[int] = []

    class Counted(torch.nn.Module):
        def forward(self, *arguments: Any, **options: Any) -> Any:
            passes[-1] += 1
            return model(*arguments, **options)

    def keep(state: np.ndarray) -> np.ndarray:
        states.append(state)
        return state

    for rank in range(3):
        passes.append(0)
        _validate(Counted(), split, rank=rank, ranks=3, sum_over_ranks=keep)
    assert len(set(passes)) == 1
    shares = list(states)
    _validate(model, split, sum_over_ranks=keep)
    np.testing.assert_allclose(sum(shares), states[-1], rtol=1e-6)


def test_more_draws_change_the_draws_but_not_the_sequences(
    model: torch.nn.Module, split: SplitStorage
) -> None:
    one, many = _validate(model, split), _validate(model, split, draws=8)
    assert many.tokens == one.tokens
    assert many.nll_nats_per_token != one.nll_nats_per_token
    assert many.standard_error < one.standard_error


def test_a_model_that_knows_nothing_scores_the_uniform_distribution(split: SplitStorage) -> None:
    """Logits of 0 over the tokens without the mask; PGM and MDLM see the same masks, so they agree."""

    def uniform(*arguments: Any, readout: Any, **options: Any) -> torch.Tensor:
        return readout(
            torch.zeros(*readout.targets.shape, VOCABULARY.size).double(), LogitsGiven(VOCABULARY.size)
        )

    results = [
        validate(
            uniform,
            build_objective(config, VOCABULARY),
            validation_loader(split),
            sequences=21,
            batch_sequences=7,
            device=torch.device("cpu"),
            draws=64,
        )
        for config in (PGMObjectiveConfig(), MDLMObjectiveConfig())
    ]
    assert results[0].nll_nats_per_token == pytest.approx(results[1].nll_nats_per_token, rel=1e-6)
    # The bound's weights average to 1 a token, up to the time that is cut off and the noise of the draws.
    assert results[0].nll_nats_per_token == pytest.approx(np.log(VOCABULARY.size - 1), rel=0.03)


def test_only_a_likelihood_has_a_perplexity() -> None:
    result = Perplexity(2.0, 0.1, 40, 4)
    text = build_objective(MDLMObjectiveConfig(), VOCABULARY)
    assert validation_metrics(result, text) == {
        "validation_nll": 2.0,
        "validation_perplexity": pytest.approx(np.exp(2)),
        "validation_perplexity_standard_error": pytest.approx(np.exp(2) / 10),
    }
    assert validation_summary(result, text) == "validation perplexity 7.39 +- 0.74 on 4 sequences"
    images = build_objective(VQObjectiveConfig(), VOCABULARY)
    assert validation_metrics(result, images) == {
        "validation_loss": 2.0,
        "validation_loss_standard_error": 0.1,
    }
    assert validation_summary(result, images) == "validation loss 2.0000 +- 0.1000 on 4 sequences"
