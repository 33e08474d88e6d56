"""lm-eval's calls on tiny models, and real tasks from local files."""

import json
from pathlib import Path
from typing import Any

import pytest
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model

from pgm_scale.errors import UserError
from pgm_scale.evaluation.benchmarks import BenchmarkSettings, check_benchmarks
from pgm_scale.evaluation.harness import HarnessModel
from pgm_scale.evaluation.run import EvaluationRequest, evaluate
from tests.evaluation.tiny_text import export_tiny
from tests.tiny_data import LENGTH

KINDS = ("pgm", "mdlm", "ar")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    return {kind: str(export_tiny(kind, folder / kind, seed=1)) for kind in (*KINDS, "d3pm")}


def words(*numbers: int) -> str:
    return " ".join(f"w{number}" for number in numbers)


def requests(kind: str, arguments: list[tuple[Any, ...]]) -> list[Instance]:
    return [Instance(kind, {}, args, 0) for args in arguments]


LONG = words(*(1 + i % 20 for i in range(3 * LENGTH)))


@pytest.mark.parametrize("kind", [*KINDS, "d3pm"])
def test_no_text_is_too_long(folders: dict[str, str], kind: str) -> None:
    model = HarnessModel(folders[kind], draws=8)
    pairs = [(words(1), " " + words(2)), (LONG, " " + words(2)), (words(1), " " + LONG), (words(1), "")]
    short, cut, windowed, empty = model.loglikelihood(requests("loglikelihood", pairs))
    assert short[0] < 0
    assert cut[0] < 0
    assert windowed[0] < 20 * cut[0] < 0
    assert empty == (0, True)
    counts = model.record()
    assert (counts["truncated_contexts"], counts["windowed_texts"], counts["empty_continuations"]) == (
        1,
        1,
        1,
    )
    kept = " ".join(LONG.split()[-(LENGTH - 2) :])
    assert model.loglikelihood(requests("loglikelihood", [(kept, " " + words(2))]))[0] == pytest.approx(cut)


@pytest.mark.parametrize("kind", KINDS)
def test_a_whole_text_scores_what_its_windows_do(folders: dict[str, str], kind: str) -> None:
    model = HarnessModel(folders[kind], draws=8)
    (whole,) = model.loglikelihood_rolling(requests("loglikelihood_rolling", [(LONG,)]))
    tokens, room = LONG.split(), LENGTH - 1
    windows = [("", " ".join(tokens[i : i + room])) for i in range(0, len(tokens), room)]
    scores = model.loglikelihood(requests("loglikelihood", windows))
    assert whole == pytest.approx(sum(score for score, _ in scores), rel=1e-5)
    assert model.record()["likelihood"] == ("exact" if kind == "ar" else "any-order bound, conditional")


@pytest.mark.parametrize("kind", KINDS)
def test_generation_goes_on_from_the_prompt_and_stops(folders: dict[str, str], kind: str) -> None:
    def generate(options: dict[str, Any], batch: int = 32, seed: int = 1) -> list[str]:
        model = HarnessModel(folders[kind], batch_size=batch, seed=seed)
        contexts = [words(1, 2), words(3), LONG]
        return model.generate_until(requests("generate_until", [(text, options) for text in contexts]))

    greedy = generate({"max_gen_toks": 4, "until": []})
    assert all(len(text.split()) <= 4 for text in greedy)
    assert greedy == generate({"max_gen_toks": 4, "do_sample": False}, batch=1)
    sampled = {"max_gen_toks": 6, "do_sample": True, "temperature": 1.0}
    assert generate(sampled) == generate(sampled, batch=2)
    assert generate(sampled) != generate(sampled, seed=2)
    row = next(i for i, text in enumerate(greedy) if len(text.split()) > 1)
    stop = greedy[row].split()[1]
    stopped = generate({"max_gen_toks": 4, "until": [stop]})
    assert stopped[row] == greedy[row].split(stop)[0] != greedy[row]
    assert generate({"max_gen_toks": 4, "until": stop}) == stopped


def test_generated_text_ends_at_eos(folders: dict[str, str]) -> None:
    model = HarnessModel(folders["pgm"])
    tokens_L = [0, 1, 2, 3, 0, 5, 6]
    assert model._continuation(tokens_L, 2, {"max_gen_toks": 5}).split() == ["w2", "w3"]
    assert model._continuation(tokens_L, 2, {"max_gen_toks": 1}).split() == ["w2"]


def test_it_is_registered_with_lm_eval(folders: dict[str, str]) -> None:
    model = get_model("pgm-scale").create_from_arg_string(
        f"folder={folders['pgm']},draws=4", {"batch_size": "8", "max_batch_size": None, "device": "cpu"}
    )
    assert isinstance(model, HarnessModel)
    assert model.settings.draws == 4
    with pytest.raises(UserError, match="batch_size auto"):
        HarnessModel(folders["pgm"], batch_size="auto")
    with pytest.raises(UserError, match="bound exact"):
        HarnessModel(folders["pgm"], bound="exact")


def task_file(folder: Path, name: str, data: Path, **settings: Any) -> None:
    tree = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        **settings,
    }
    (folder / f"{name}.yaml").write_text(json.dumps(tree))  # YAML holds JSON


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder, data = tmp_path / "tasks", tmp_path / "data.jsonl"
    folder.mkdir()
    rows = [
        {"text": words(i, i + 1, i + 2), "choices": [words(i), words(i + 2, 3), words(4)], "gold": i % 3}
        for i in range(1, 7)
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task_file(
        folder,
        "tiny_choice",
        data,
        output_type="multiple_choice",
        doc_to_text="{{text}}",
        doc_to_choice="{{choices}}",
        doc_to_target="gold",
        metric_list=[{"metric": "acc"}, {"metric": "acc_norm"}],
    )
    mean = {"aggregation": "mean", "higher_is_better": True}
    task_file(
        folder,
        "tiny_lambada",
        data,
        output_type="loglikelihood",
        doc_to_text="{{text.split(' ')[:-1]|join(' ')}}",
        doc_to_target="{{' '+text.split(' ')[-1]}}",
        metric_list=[
            {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
            {"metric": "acc", **mean},
        ],
    )
    task_file(
        folder,
        "tiny_generate",
        data,
        output_type="generate_until",
        doc_to_text="{{text}}",
        doc_to_target="w1 w2",
        generation_kwargs={"until": [" w3"], "max_gen_toks": 4},
        metric_list=[{"metric": "exact_match", **mean}],
    )
    task_file(
        folder, "tiny_bad_template", data, output_type="loglikelihood", doc_to_text="{{", doc_to_target="x"
    )
    task_file(
        folder,
        "tiny_later_template",  # fits its first row, which is all that lm-eval looks at when it loads it
        data,
        output_type="loglikelihood",
        doc_to_text="{{text if gold == 1 else nothing}}",
        doc_to_target="x",
    )
    task_file(folder, "tiny_no_data", tmp_path / "nowhere.jsonl", output_type="loglikelihood")
    return folder


def test_local_tasks_run_without_a_hub(folders: dict[str, str], tasks: Path) -> None:
    names = ["tiny_choice", "tiny_lambada", "tiny_generate"]
    settings = BenchmarkSettings(names, str(tasks), limit=5, draws=16)
    part = evaluate(EvaluationRequest(folders["pgm"], benchmarks=settings))["harness"]
    assert part["examples"] == dict.fromkeys(names, 5)
    assert set(part["tasks"]["tiny_choice"]) == {"acc", "acc_stderr", "acc_norm", "acc_norm_stderr"}
    assert set(part["tasks"]["tiny_lambada"]) == {"acc", "acc_stderr", "perplexity", "perplexity_stderr"}
    assert set(part["tasks"]["tiny_generate"]) == {"exact_match", "exact_match_stderr"}
    model = HarnessModel(folders["pgm"], draws=16)
    pairs = [(words(i, i + 1), " " + words(i + 2)) for i in range(1, 6)]
    scores = model.loglikelihood(requests("loglikelihood", pairs))
    assert part["tasks"]["tiny_lambada"]["acc"] == sum(greedy for _, greedy in scores) / 5
    for name in (
        "checkpoint_sha256",
        "weights",
        "precision",
        "seed",
        "sampler",
        "steps",
        "draws",
        "likelihood",
    ):
        assert part[name] is not None


def test_bad_tasks_are_one_line(folders: dict[str, str], tasks: Path) -> None:
    for settings, message in (
        (BenchmarkSettings(["none_such"], str(tasks)), "no task none_such"),
        (BenchmarkSettings(["tiny_choice"], str(tasks / "nowhere")), "is no folder"),
        (BenchmarkSettings(["tiny_no_data"], str(tasks)), "cannot load it"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            check_benchmarks(settings)
        assert "\n" not in str(caught.value)
    for name, message in (("tiny_bad_template", "lm-eval cannot"), ("tiny_later_template", "cannot run it")):
        with pytest.raises(UserError, match=message):
            evaluate(EvaluationRequest(folders["pgm"], benchmarks=BenchmarkSettings([name], str(tasks))))
