"""Generative perplexities against loops that spell the published rules out, with a random GPT-2 as the judge."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import GPT2LMHeadModel

from pgm_scale.errors import UserError
from pgm_scale.evaluation.generative_perplexity import (
    all_but_last_target,
    first_chunk_targets,
    generative_perplexity,
    retokenise,
)
from pgm_scale.evaluation.judges import folder_sha256, load_judge
from pgm_scale.loading import load
from tests.evaluation.tiny_text import export_tiny, hugging_face_judge, word_tokenizer
from tests.tiny_data import LENGTH, VOCABULARY

CPU = torch.device("cpu")
EOS = 0
FORMS = ("retokenised_first_chunk", "raw_tokens", "per_sample_mean")


def random_samples(rows: int = 7) -> np.ndarray:
    """BOS, words, and some EOS in between."""
    generator = np.random.default_rng(0)
    tokens_BL = generator.integers(0, VOCABULARY.mask_id, (rows, LENGTH))
    tokens_BL[:, 0] = VOCABULARY.bos_id
    tokens_BL[0, 3:9:2] = EOS
    return tokens_BL


@pytest.fixture(scope="module")
def judge_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hugging_face_judge(tmp_path_factory.mktemp("judge") / "judge")


def nll_of(folder: Path, tokens_L: list[int], position: int) -> float:
    """Of one token, given those before it, from a forward pass over these alone."""
    model = GPT2LMHeadModel.from_pretrained(folder)
    with torch.no_grad():
        logits_V = model(torch.tensor([tokens_L[:position]])).logits[0, -1].double()
    return -logits_V.log_softmax(0)[tokens_L[position]].item()


@pytest.mark.parametrize(
    ("tokens", "scored"),
    [
        (
            [0, 5, 6, 0, 7, 0, 0, 8, 9],
            [5, 6, 7, 8],
        ),  # the EOS of position 0 is the first: later ones do not count
        ([5, 6, 0, 7, 0, 8, 9], [6, 0, 7, 8]),  # the first EOS counts, no other does
        ([5, 6, 7, 8], [6, 7]),  # no EOS: all but the last target
        ([5, 6, 0, 0, 0, 0], [6, 0]),  # padding: its first EOS counts
        ([0, 5, 0, 0, 0], [5]),
    ],
)
def test_the_first_chunk_rule_by_hand(tokens: list[int], scored: list[int]) -> None:
    mask_L = first_chunk_targets(np.array([tokens]), EOS)[0]
    assert [token for token, counts in zip(tokens[1:], mask_L, strict=True) if counts] == scored


def test_the_first_chunk_rule_as_a_loop() -> None:
    tokens_BL = np.random.default_rng(1).integers(0, 3, (50, 12))
    expected = np.zeros((50, 11), bool)
    for row, tokens_L in enumerate(tokens_BL.tolist()):
        seen = 0
        for place, token in enumerate(tokens_L):
            seen += token == EOS
            if 0 < place < len(tokens_L) - 1:
                expected[row, place - 1] = token != EOS or seen == 1
    np.testing.assert_array_equal(first_chunk_targets(tokens_BL, EOS), expected)


def test_all_but_the_last_target() -> None:
    assert all_but_last_target(np.zeros((2, 4))).tolist() == [[True, True, False]] * 2


def test_all_forms_equal_their_definitions(judge_folder: Path) -> None:
    tokens_BL = random_samples(3)
    found = generative_perplexity(
        tokens_BL, word_tokenizer(), VOCABULARY, load_judge(str(judge_folder), CPU), 32
    )
    every: list[float] = []
    first_chunk: list[float] = []
    raw: list[float] = []
    for tokens_L in tokens_BL.tolist():
        eos_seen, row = 1, []  # BOS is the EOS
        for place in range(1, LENGTH):
            nll = nll_of(judge_folder, tokens_L, place)
            row.append(nll)
            eos_seen += tokens_L[place] == EOS
            if place < LENGTH - 1:
                raw.append(nll)
                if tokens_L[place] != EOS or eos_seen == 1:
                    first_chunk.append(nll)
        every.append(float(np.mean(row)))
    assert (found["raw_tokens"]["tokens"], found["retokenised_first_chunk"]["tokens"]) == (
        len(raw),
        len(first_chunk),
    )
    assert len(first_chunk) < len(raw)
    for form, nlls in zip(FORMS, (first_chunk, raw, every), strict=True):
        assert found[form]["perplexity"] == pytest.approx(math.exp(np.mean(nlls)), rel=1e-4)
        assert found[form]["length_tokens"] == LENGTH
    error = np.std(every, ddof=1) / math.sqrt(3)
    assert found["per_sample_mean"]["nll_standard_error"] == pytest.approx(error, rel=1e-4)
    assert 0 < found["unigram_entropy_nats"] < math.log(LENGTH)


@pytest.mark.parametrize("batch", [1, 2, 3, 100])
def test_no_sample_is_dropped_at_any_batch_size(judge_folder: Path, batch: int) -> None:
    judge, tokens_BL = load_judge(str(judge_folder), CPU), random_samples()
    expected = generative_perplexity(tokens_BL, word_tokenizer(), VOCABULARY, judge, 7)
    found = generative_perplexity(tokens_BL, word_tokenizer(), VOCABULARY, judge, batch)
    for form in FORMS:
        assert found[form]["tokens"] == expected[form]["tokens"]
        assert found[form]["perplexity"] == pytest.approx(expected[form]["perplexity"], rel=1e-5)
    assert found["raw_tokens"]["tokens"] == 7 * (LENGTH - 2)


def test_retokenised_texts_are_cut_and_padded(judge_folder: Path) -> None:
    judge = load_judge(str(judge_folder), CPU)
    assert retokenise(["w1 w2 w3", "w1", ""], judge, 2).tolist() == [[1, 2], [1, EOS], [EOS, EOS]]


def test_a_judge_with_other_tokens_scores_text_alone(tmp_path: Path) -> None:
    judge = load_judge(str(hugging_face_judge(tmp_path / "other", words=10)), CPU)
    found = generative_perplexity(random_samples(), word_tokenizer(), VOCABULARY, judge, 4)
    assert found["retokenised_first_chunk"]["perplexity"] > 1
    for form in FORMS[1:]:
        assert found[form] == {
            "perplexity": None,
            "reason": "token 10 is 'w10' of the model and None of the judge",
        }


def test_a_judge_of_fewer_positions_scores_as_much_text_as_it_takes(tmp_path: Path) -> None:
    judge = load_judge(str(hugging_face_judge(tmp_path / "short", positions=8)), CPU)
    found = generative_perplexity(random_samples(), word_tokenizer(), VOCABULARY, judge, 4)
    assert found["retokenised_first_chunk"]["length_tokens"] == 8
    assert found["raw_tokens"]["reason"] == "samples have 16 tokens, the judge takes 8"


def test_our_own_autoregressive_model_judges(tmp_path: Path) -> None:
    folder, tokens_BL = export_tiny("ar", tmp_path / "ar"), random_samples()
    judge = load_judge(str(folder), CPU)
    found = generative_perplexity(tokens_BL, word_tokenizer(), VOCABULARY, judge, 4)
    logits = load(folder).model(torch.from_numpy(tokens_BL)[:, :-1]).double()
    logits[..., VOCABULARY.mask_id] = -torch.inf
    targets = torch.from_numpy(tokens_BL)[:, 1:, None]
    nll_BL = -logits.log_softmax(-1).gather(-1, targets)[..., 0].numpy()
    assert found["raw_tokens"]["perplexity"] == pytest.approx(np.exp(nll_BL[:, :-1].mean()), rel=1e-5)
    assert found["per_sample_mean"]["perplexity"] == pytest.approx(np.exp(nll_BL.mean()), rel=1e-5)
    scored = first_chunk_targets(tokens_BL, EOS)
    expected = np.exp(nll_BL[scored].mean())
    assert found["retokenised_first_chunk"]["perplexity"] == pytest.approx(expected, rel=1e-5)
    assert judge.record["sha256"] == "0" * 64


def test_features_are_those_of_each_last_token(tmp_path: Path, judge_folder: Path) -> None:
    for folder in (judge_folder, export_tiny("ar", tmp_path / "ar")):
        judge = load_judge(str(folder), CPU)
        sequences = [[1, 2, 3], [4], [5, 6]]
        together = np.concatenate(list(judge.features(sequences, 2)))
        for feature_H, tokens in zip(together, sequences, strict=True):
            alone_H = next(judge.features([tokens], 1))[0]
            np.testing.assert_allclose(feature_H, alone_H, atol=1e-5)
        assert np.std(together) > 0
    with torch.no_grad():
        output = GPT2LMHeadModel.from_pretrained(judge_folder)(
            torch.tensor([[5, 6]]), output_hidden_states=True
        )
    feature_H = next(load_judge(str(judge_folder), CPU).features([[5, 6]], 1))[0]
    np.testing.assert_allclose(feature_H, output.hidden_states[-1][0, -1].numpy(), atol=1e-5)


def test_a_judges_hash_is_of_its_contents(tmp_path: Path) -> None:
    one, other = (hugging_face_judge(tmp_path / name) for name in ("one", "other"))
    assert folder_sha256(one) == folder_sha256(other)
    (other / "config.json").write_text((other / "config.json").read_text() + " ")
    assert folder_sha256(one) != folder_sha256(other)


def test_bad_judges_are_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "garbled").mkdir()
    (tmp_path / "garbled" / "config.json").write_text("{")
    cut = hugging_face_judge(tmp_path / "cut")
    (cut / "model.safetensors").write_bytes(b"no")
    for path, words in (
        (tmp_path / "nowhere", "no folder"),
        (tmp_path / "empty", "neither a config.json nor a run"),
        (tmp_path / "garbled", "transformers cannot load it"),
        (cut, "transformers cannot load it"),
        (export_tiny("mdlm", tmp_path / "mdlm"), "no next-token probabilities"),
    ):
        with pytest.raises(UserError, match=words) as caught:
            load_judge(str(path), CPU)
        assert "\n" not in str(caught.value)
