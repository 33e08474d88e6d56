"""Completions keep their prompts; MAUVE and self-BLEU see what is the same and what is not."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sacrebleu import sentence_bleu

from pgm_scale.data.storage import SplitStorage
from pgm_scale.errors import UserError
from pgm_scale.evaluation.completions import Completions, CompletionSettings, complete_prompts
from pgm_scale.evaluation.judges import load_judge
from pgm_scale.evaluation.mauve import mauve_score
from pgm_scale.evaluation.samples import Generator
from pgm_scale.evaluation.self_bleu import check_self_bleu, self_bleu
from pgm_scale.loading import load
from tests.evaluation.tiny_text import KINDS, export_tiny, hugging_face_judge, word_tokenizer
from tests.tiny_data import LENGTH, VOCABULARY, write_tiny_split

CPU = torch.device("cpu")
SETTINGS = CompletionSettings(prompts=6, prompt_tokens=4, completion_tokens=5, completions=2)


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> SplitStorage:
    return SplitStorage(
        write_tiny_split(tmp_path_factory.mktemp("data") / "v", 20, 3, "validation", pad=True)
    )


def generator(kind: str, folder: Path, batch: int = 32) -> Generator:
    config = replace(KINDS[kind][2], steps=3)
    return Generator(load(folder), config, 1, batch, CPU)


@pytest.mark.parametrize("kind", ["pgm", "mdlm", "ar"])
def test_completions_go_on_from_long_enough_rows(tmp_path: Path, split: SplitStorage, kind: str) -> None:
    folder = export_tiny(kind, tmp_path / kind)
    made = complete_prompts(generator(kind, folder), split, SETTINGS)
    assert made.references_PT.shape == (6, 9)
    assert made.completed_PCT.shape == (6, 2, 9)
    np.testing.assert_array_equal(
        made.completed_PCT[:, :, :4], made.references_PT[:, None, :4].repeat(2, axis=1)
    )
    assert (made.completed_PCT[:, 0] != made.completed_PCT[:, 1]).any()
    again = complete_prompts(generator(kind, folder, batch=3), split, SETTINGS)
    np.testing.assert_array_equal(made.completed_PCT, again.completed_PCT)
    assert made.record["prompts"] == 6
    assert made.record["steps"] == (5 if kind == "ar" else 3)


def test_what_does_not_fit_is_refused(tmp_path: Path, split: SplitStorage) -> None:
    made = generator("pgm", export_tiny("pgm", tmp_path / "pgm"))
    with pytest.raises(UserError, match=f"exceed the model's {LENGTH} tokens"):
        complete_prompts(made, split, CompletionSettings(prompt_tokens=LENGTH))
    short = SplitStorage(write_tiny_split(tmp_path / "short", 2, 1, "validation", pad=True))
    with pytest.raises(UserError, match="rows of at least 16 tokens"):
        complete_prompts(made, short, CompletionSettings(prompt_tokens=8, completion_tokens=8))
    with pytest.raises(UserError, match="give at least 2"):
        check_self_bleu(1)


def completions(completed_PCT: np.ndarray, references_PT: np.ndarray) -> Completions:
    return Completions(references_PT, completed_PCT, {"prompt_tokens": 4})


def test_mauve_knows_the_same_from_another(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    judge = load_judge(str(hugging_face_judge(tmp_path / "judge")), CPU)
    low_PT = generator.integers(1, 6, (40, 9))
    same, other = low_PT[:, None], generator.integers(15, 20, (40, 1, 9))
    scores = [
        mauve_score(completions(made, low_PT), word_tokenizer(), VOCABULARY, judge, 8)["mauve"]
        for made in (same, other)
    ]
    assert scores[0] == pytest.approx(1, abs=1e-6)
    assert scores[1] < 0.5
    result = mauve_score(completions(other, low_PT), word_tokenizer(), VOCABULARY, judge, 40)
    assert result["mauve"] == pytest.approx(scores[1], rel=1e-6)
    assert (result["feature_tokens"], result["feature_input"]) == (9, "raw tokens")
    text = load_judge(str(hugging_face_judge(tmp_path / "other", words=10, positions=5)), CPU)
    result = mauve_score(completions(other, low_PT), word_tokenizer(), VOCABULARY, text, 40)
    assert (result["feature_tokens"], result["feature_input"]) == (5, "text")


def test_self_bleu_is_the_mean_of_sentence_bleus() -> None:
    completed_PCT = np.random.default_rng(0).integers(1, 4, (3, 3, 12))
    expected = []
    for tokens_CT in completed_PCT:
        texts = [" ".join(f"w{token}" for token in tokens[4:]) for tokens in tokens_CT]
        scores = [
            sentence_bleu(text, [other for j, other in enumerate(texts) if j != i]).score
            for i, text in enumerate(texts)
        ]
        expected.append(np.mean(scores))
    result = self_bleu(completions(completed_PCT, completed_PCT[:, 0]), word_tokenizer())
    assert result["self_bleu"] == pytest.approx(np.mean(expected))
    assert result["self_bleu_standard_error"] == pytest.approx(np.std(expected, ddof=1) / np.sqrt(3))
    equal_PCT = np.tile(np.arange(1, 13), (2, 2, 1))
    assert self_bleu(completions(equal_PCT, equal_PCT[:, 0]), word_tokenizer())["self_bleu"] == pytest.approx(
        100
    )
