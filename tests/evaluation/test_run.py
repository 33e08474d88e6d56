"""One evaluation: all parts in one result, each with what tells its numbers apart, and bad input in one line."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pgm_scale.cli import main
from pgm_scale.data import DatasetManifest
from pgm_scale.errors import UserError
from pgm_scale.evaluation import extra
from pgm_scale.evaluation.completions import CompletionSettings
from pgm_scale.evaluation.likelihood import LikelihoodSettings
from pgm_scale.evaluation.run import EvaluationRequest, evaluate
from pgm_scale.sampling.statistics import unigram_entropy
from tests.evaluation.tiny_text import KINDS, export_tiny, hugging_face_judge
from tests.tiny_data import LENGTH, VOCABULARY, write_tiny_split

IDENTITY = ("run", "source", "run_id", "step", "weights", "checkpoint_sha256", "objective", "precision")
SAMPLED = ("sampler", "steps", "sampler_settings", "seed", "tokens_sha256", "tokens_per_second")
COMPLETIONS = CompletionSettings(prompts=6, prompt_tokens=4, completion_tokens=4, completions=2)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    for kind in KINDS:
        export_tiny(kind, folder / kind)
    hugging_face_judge(folder / "judge")
    for name, seed in (("one", 3), ("two", 4)):
        write_tiny_split(folder / name, 20, seed, "validation")
    return folder


def request(place: Path, kind: str = "pgm", **changes: Any) -> EvaluationRequest:
    return EvaluationRequest(str(place / kind), **changes)


@pytest.mark.parametrize("kind", list(KINDS))
def test_every_model_of_text_has_every_number(place: Path, kind: str) -> None:
    result = evaluate(
        request(
            place,
            kind,
            splits=[str(place / "one"), str(place / "two")],
            judge=str(place / "judge"),
            samples=5,
            mauve=True,
            self_bleu=True,
            completions=COMPLETIONS,
        )
    )
    parts = [result[name] for name in ("generative_perplexity", "mauve", "self_bleu")]
    for part in [result, *result["likelihood"], *parts]:
        assert all(part[name] is not None for name in IDENTITY)
    for part in parts:
        assert all(part[name] is not None for name in SAMPLED)
    for part in parts[:2]:
        assert len(part["judge"]["sha256"]) == 64
    assert [score["split"] for score in result["likelihood"]] == [str(place / "one"), str(place / "two")]
    assert result["likelihood"][0].items() <= result.items()
    assert result["perplexity"] != result["likelihood"][1]["perplexity"]
    assert result["generative_perplexity"]["samples"] == 5
    assert result["mauve"]["tokens_sha256"] == result["self_bleu"]["tokens_sha256"]
    json.dumps(result)


def test_the_sampler_is_the_models_own_unless_asked_otherwise(place: Path) -> None:
    def sampled(**changes: Any) -> dict[str, Any]:
        part = evaluate(request(place, judge=str(place / "judge"), samples=3, **changes))
        return part["generative_perplexity"]

    own = sampled(sampler={"kind": None, "steps": None})
    assert (own["sampler"], own["steps"]) == ("pgm_uniform", 4)
    other = sampled(sampler={"kind": "pgm_naive", "steps": 2})
    assert (other["sampler"], other["steps"]) == ("pgm_naive", 2)
    assert sampled(seed=2)["tokens_sha256"] != own["tokens_sha256"]
    small = sampled(likelihood=LikelihoodSettings(batch_sequences=1))
    assert small["tokens_sha256"] == own["tokens_sha256"]
    with pytest.raises(UserError, match="--sampler nothing is not one of"):
        sampled(sampler={"kind": "nothing"})


def test_samples_that_exist_are_scored_as_they_are(place: Path, tmp_path: Path) -> None:
    tokens_BL = np.random.default_rng(0).integers(0, VOCABULARY.mask_id, (4, LENGTH)).astype(np.int32)
    np.save(tmp_path / "samples.npy", tokens_BL)
    asked = request(place, judge=str(place / "judge"), samples_file=str(tmp_path / "samples.npy"))
    part = evaluate(asked)["generative_perplexity"]
    assert part["samples"] == 4
    assert part["sampler"] is None
    assert len(part["file_sha256"]) == 64
    assert part["unigram_entropy_nats"] == unigram_entropy(tokens_BL)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((2, 4)), "does not hold whole numbers"),
        (np.zeros(4, int), "does not hold whole numbers"),
        (np.full((2, 4), VOCABULARY.mask_id), "without the mask"),
        (np.full((2, 4), -1), "has ids from -1"),
        (np.full((2, 4), VOCABULARY.size), "are 0 to 23"),
        (np.array([{}]), "cannot read"),
    ],
)
def test_bad_samples_are_refused(place: Path, tmp_path: Path, array: np.ndarray, message: str) -> None:
    np.save(tmp_path / "samples.npy", array)
    with pytest.raises(UserError, match=message):
        evaluate(request(place, judge=str(place / "judge"), samples_file=str(tmp_path / "samples.npy")))


def test_a_split_of_another_tokenizer_is_one_line(place: Path, tmp_path: Path) -> None:
    other = write_tiny_split(tmp_path / "other", 4, 0, "validation")
    dataclasses.replace(DatasetManifest.load(other), tokenizer_sha256="0" * 64).save(other)
    with pytest.raises(UserError, match=r"does not fit .*: tokenizer: ") as caught:
        evaluate(request(place, splits=[str(place / "one"), str(other)]))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "give --split FOLDER, as an exported model has no data"),
        ({"mauve": True}, "--mauve needs the features of a model"),
        ({"self_bleu": True}, "give --split FOLDER"),
        ({"judge": "judge", "mauve": True, "splits": ["none"]}, "give --split FOLDER"),
        ({"samples_file": "x.npy"}, "--samples-file is scored by a judge"),
        ({"judge": "judge", "samples": 1}, "has no standard error"),
        ({"self_bleu": True, "completions": CompletionSettings(prompts=1)}, "--prompts 1 has no spread"),
        ({"judge": "judge", "samples_file": "nowhere.npy"}, "cannot read --samples-file nowhere.npy"),
        ({"judge": "nowhere"}, "is no folder"),
        ({"step": 3, "splits": ["one"]}, "is the export of step 7"),
    ],
)
def test_bad_requests_are_one_line(
    place: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], message: str
) -> None:
    monkeypatch.chdir(place)
    with pytest.raises(UserError, match=message) as caught:
        evaluate(request(place, **changes))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("option", ["--mauve", "--self-bleu", "--harness", "--judge"])
def test_a_missing_package_names_the_extra(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, option: str
) -> None:
    def absent(name: str) -> Any:
        raise ModuleNotFoundError(f"No module named '{name}'", name=name)

    monkeypatch.setattr(extra.importlib, "import_module", absent)
    command = ["eval", str(place / "pgm"), "--split", str(place / "one"), option]
    command += {"--mauve": ["--judge", "x"], "--harness": ["x"], "--judge": [str(place / "judge")]}.get(
        option, []
    )
    assert main(command) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert f"{option} needs the package" in error
    assert "pip install 'pgm-scale[evaluation]'" in error


def test_the_command_prints_a_line_and_a_table(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    command = ["eval", str(place / "pgm"), "--split", str(place / "one"), "--judge", str(place / "judge")]
    options = [
        "--samples",
        "3",
        "--steps",
        "2",
        "--precision",
        "bf16",
        "--json",
        str(tmp_path / "result.json"),
    ]
    assert main(command + options) == 0
    lines = capsys.readouterr().out.splitlines()
    result = json.loads((tmp_path / "result.json").read_text())
    assert lines[0] == (
        f"{place / 'one'}: perplexity {result['perplexity']:.3f} +- {result['perplexity_standard_error']:.3f} "
        f"({result['nll_nats_per_token']:.4f} nats/token, 20 sequences, 1 draw(s), step 7, ema weights)"
    )
    assert [line.split("  ")[0] for line in lines[1:]] == [
        "metric",
        "perplexity",
        "generative perplexity, retokenised_first_chunk",
        "generative perplexity, raw_tokens",
        "generative perplexity, per_sample_mean",
        "unigram entropy",
    ]
    assert result["precision"] == result["generative_perplexity"]["precision"] == "bf16"
    assert result["generative_perplexity"]["steps"] == 2
