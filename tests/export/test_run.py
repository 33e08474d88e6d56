"""`pgm-scale export`: the folder is the run's model, whatever is asked of it, or there is no folder."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors import SafetensorError, safe_open

import pgm_scale
from pgm_scale.checkpoint import CheckpointStore
from pgm_scale.cli import main
from pgm_scale.cli.export import size_bytes
from pgm_scale.errors import UserError
from pgm_scale.export import folder as folder_writer
from pgm_scale.export.parity import probe_logits
from pgm_scale.export.run import ExportRequest, export_run
from pgm_scale.run_folder import load_run
from pgm_scale.sampling import fitting_sampler, sample
from pgm_scale.trained_model import TrainedModel, parameters_sha256
from tests.export.runs import KINDS, STEP, write_run
from tests.tiny_images import vq_config, write_blobs


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("runs")
    return {kind: write_run(root / kind, kind) for kind in KINDS}


def samples(trained: TrainedModel) -> np.ndarray:
    description = trained.description
    known_BL = np.full((3, description.length_tokens), -1)
    known_BL[:, 0] = description.vocabulary.bos_id
    return sample(
        trained.model,
        description.vocabulary,
        description.length_tokens,
        fitting_sampler(description.sampler, trained.model),
        known_BL=known_BL,
        seed=3,
        batch_sequences=2,
        labels_B=None if description.images is None else np.arange(3),
        device="cpu",
    ).tokens_BL


@pytest.mark.parametrize("kind", KINDS)
def test_the_folder_is_the_run_to_the_bit(runs: dict[str, Path], tmp_path: Path, kind: str) -> None:
    said: list[str] = []
    export_run(str(runs[kind]), ExportRequest(str(tmp_path / "model")), said.append)
    ours, theirs = load_run(runs[kind]), pgm_scale.load(str(tmp_path / "model"))
    assert parameters_sha256(ours.model) == parameters_sha256(theirs.model)
    assert ours.description == theirs.description
    assert probe_logits(ours).std() > 0
    assert torch.equal(probe_logits(ours), probe_logits(theirs))
    assert np.array_equal(samples(ours), samples(theirs))
    assert "loaded in fp32: largest logit difference 0 " in said[0]
    assert "loaded in bf16" in said[1]
    assert "difference 0 " not in said[1]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_what_is_asked_is_what_is_written(runs: dict[str, Path], tmp_path: Path) -> None:
    """Raw weights of a step, rounded, in several files of bounded size."""
    request = ExportRequest(str(tmp_path / "m"), STEP, "weight", "bf16", max_shard_bytes=4000)
    export_run(str(runs["pgm"]), request, lambda _: None)
    shards = sorted((tmp_path / "m").glob("*.safetensors"))
    assert len(shards) > 2
    dtypes, keys = set(), []
    for shard in shards:
        with safe_open(shard, framework="pt") as stored:
            tensors = [stored.get_tensor(key) for key in stored.keys()]  # noqa: SIM118
            dtypes |= {tensor.dtype for tensor in tensors}
            assert len(tensors) == 1 or sum(2 * tensor.numel() for tensor in tensors) <= 4000
            keys += list(stored.keys())
    assert dtypes == {torch.bfloat16}
    ours, theirs = load_run(runs["pgm"], weights="weight"), pgm_scale.load(str(tmp_path / "m"))
    assert theirs.description.origin.weights == "weight"
    assert sorted(keys) == sorted(f"backbone.{name}" for name, _ in ours.model.named_parameters())
    for mine, other in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
        assert other.dtype == torch.float32
        assert torch.equal(mine.bfloat16().float(), other)


def test_files_are_for_whom_the_umask_says(runs: dict[str, Path], tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.write_bytes(b"")
    export_run(str(runs["pgm"]), ExportRequest(str(tmp_path / "out")), lambda _: None)
    modes = {path.stat().st_mode for path in (tmp_path / "out").iterdir()}
    assert modes == {plain.stat().st_mode}


def test_the_folder_evaluates_as_the_run(runs: dict[str, Path], tmp_path: Path) -> None:
    from pgm_scale.config import PGMObjectiveConfig
    from pgm_scale.data.storage import SplitStorage
    from pgm_scale.evaluation.validation import validate, validation_loader
    from pgm_scale.objectives import build_objective

    export_run(str(runs["pgm"]), ExportRequest(str(tmp_path / "m")), lambda _: None)
    storage = SplitStorage(str(runs["pgm"].parent / "data" / "validation"), None)
    nll = []
    for trained in (load_run(runs["pgm"]), pgm_scale.load(str(tmp_path / "m"))):
        description = trained.description
        assert isinstance(description.objective, PGMObjectiveConfig)
        objective = build_objective(description.objective, description.vocabulary, description.model)
        nll.append(
            validate(
                trained.model,
                objective,
                validation_loader(storage),
                sequences=20,
                batch_sequences=7,
                device=torch.device("cpu"),
            ).nll_nats_per_token
        )
    assert nll[0] == nll[1] > 0


def test_the_card_tells_the_run_and_no_places(runs: dict[str, Path], tmp_path: Path) -> None:
    run = runs["pgm"]
    records = [{"step": step, "loss": 9.0 - step, "unix_time_s": 1} for step in (2, STEP, STEP + 1)]
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, records)) + '\n{"step": 4, "lo')
    evaluation = {"split": "/home/someone/data/val", "perplexity": 12.25, "judge": {"loss": float("nan")}}
    (tmp_path / "eval.json").write_text(json.dumps(evaluation))
    arguments = ["export", str(run), "--out", str(tmp_path / "m"), "--metrics", str(tmp_path / "eval.json")]
    assert main(arguments) == 0
    card = (tmp_path / "m" / "README.md").read_text()
    _, front, body = card.split("---\n", 2)
    assert "pgm-scale" in yaml.safe_load(front)["tags"]
    assert "pipeline_tag" not in front  # no pipeline of transformers samples a PGM
    trained = load_run(run)
    for told in (
        trained.description.origin.checkpoint_sha256,
        f"| rows | {100} |",
        "| objective.kind | pgm |",
        "| loss | 5 |",
        "| perplexity | 12.25 |",
        "| split | val |",
        "| judge.loss | nan |",
        f"{sum(p.numel() for p in trained.model.parameters()):,} parameters",
    ):
        assert told in body, told
    everything = "".join(path.read_text(errors="replace") for path in (tmp_path / "m").iterdir())
    assert str(tmp_path.parent) not in everything
    assert "/home" not in body
    assert "unix_time" not in body


def test_a_card_without_data_and_metrics(tmp_path: Path) -> None:
    """A class-conditional model, whose data have moved."""
    run = write_run(tmp_path / "r", "image_pgm")
    export_run(str(run), ExportRequest(str(tmp_path / "m")), lambda _: None)
    card = (tmp_path / "m" / "README.md").read_text()
    assert "not readable when this was exported" in card
    assert "| classes | 3 |" in card
    assert "## Evaluation" not in card
    assert "## Last metrics" not in card


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--step", "9"], r"no checkpoint of step 9; give one of \[4\]"),
        (["--metrics", "no.json"], "--metrics no.json: .*No such file"),
        (["--out", "tests"], "tests is not empty; give a new folder"),
        (["--out", "/proc/nothing/here"], "cannot write /proc/nothing/here: .*; choose another place"),
    ],
)
def test_refused_in_one_line(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture, options: list[str], message: str
) -> None:
    import re

    out = [] if "--out" in options else ["--out", str(tmp_path / "m")]
    assert main(["export", str(runs["ar"]), *out, *options]) == 2
    printed = capsys.readouterr().err
    assert re.search(message, printed)
    assert printed.count("\n") == 1
    assert not (tmp_path / "m").exists()


def test_no_run_no_vq_and_no_folder_of_ours(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    export_run(str(runs["ar"]), ExportRequest(str(tmp_path / "m")), lambda _: None)
    with pytest.raises(UserError, match="is an exported model already; give the folder of a run"):
        export_run(str(tmp_path / "m"), ExportRequest(str(tmp_path / "again")))
    with pytest.raises(UserError, match="is not a run folder"):
        export_run(str(tmp_path / "nothing"), ExportRequest(str(tmp_path / "again")))
    from pgm_scale import config as configuration

    vq = tmp_path / "vq"
    vq.mkdir()
    (vq / "config.yaml").write_text(configuration.to_yaml(vq_config(write_blobs(tmp_path / "d"), vq)))
    with pytest.raises(UserError, match=r"trains a VQ tokenizer, which has no logits; .*--vq.*VQTokenizer"):
        export_run(str(vq), ExportRequest(str(tmp_path / "again")))
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize("failing", ["bundled_files", "_write_weights", "generation_config"])
def test_a_failed_export_leaves_nothing(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(folder_writer, failing, fail)
    with pytest.raises(UserError, match=r"cannot write .*: No space left on device"):
        export_run(str(runs["ar"]), ExportRequest(str(tmp_path / "m")), lambda _: None)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_as_safetensors_tells_it(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise SafetensorError("I/O error: No space left on device")

    monkeypatch.setattr(folder_writer, "save_file", fail)
    with pytest.raises(UserError, match=r"cannot write .*: I/O error: No space left on device; choose"):
        export_run(str(runs["ar"]), ExportRequest(str(tmp_path / "m")), lambda _: None)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.fault(31)
def test_a_checkpoint_that_training_removes_meanwhile(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Path(shutil.copytree(runs["ar"], tmp_path / "run"))
    read = CheckpointStore.read_full

    def lose_and_read(store: CheckpointStore, step: int, kind: Any) -> Any:
        shutil.rmtree(store.folders.of(step))
        return read(store, step, kind)

    monkeypatch.setattr(CheckpointStore, "read_full", lose_and_read)
    with pytest.raises(UserError, match="No such file or directory; use one of the steps"):
        export_run(str(run), ExportRequest(str(tmp_path / "m"), step=STEP), lambda _: None)
    with pytest.raises(UserError, match="has had checkpoints, but none is usable"):
        export_run(str(run), ExportRequest(str(tmp_path / "m")), lambda _: None)


def test_logits_that_differ_are_not_exported(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is loaded back is another model: as if a tensor had gone to the wrong place."""
    monkeypatch.setattr(
        "pgm_scale.export.run.load_folder", lambda *_, **__: load_run(runs["ar"], weights="weight")
    )
    with pytest.raises(UserError, match="the exported model's logits differ from the run's by"):
        export_run(str(runs["ar"]), ExportRequest(str(tmp_path / "m")), lambda _: None)
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_export_left_is_taken_over(runs: dict[str, Path], tmp_path: Path) -> None:
    left = tmp_path / ".m.writing"
    left.mkdir()
    (left / "model.safetensors").write_bytes(b"half")
    (left / "other.safetensors").write_bytes(b"half")
    (tmp_path / "m").mkdir()  # an empty folder may be there
    export_run(str(runs["ar"]), ExportRequest(str(tmp_path / "m")), lambda _: None)
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
    assert not (tmp_path / "m" / "other.safetensors").exists()


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5 * 10**9), ("500mb", 5 * 10**8), ("7", 7), ("1KB", 1000)]
)
def test_sizes(text: str, size: int) -> None:
    assert size_bytes(text) == size


@pytest.mark.parametrize("text", ["", "0GB", "-1MB", "5XB", "1.5GB", "GB", "9" * 30])
def test_no_sizes(text: str) -> None:
    import argparse

    with pytest.raises(argparse.ArgumentTypeError, match="is not a size such as 5GB"):
        size_bytes(text)


def test_loading_a_folder_needs_neither_deepspeed_nor_transformers(
    runs: dict[str, Path], tmp_path: Path
) -> None:
    export_run(str(runs["ar"]), ExportRequest(str(tmp_path / "m")), lambda _: None)
    code = (
        "import sys, pgm_scale\n"
        f"pgm_scale.load({str(tmp_path / 'm')!r}, int8=False)\n"
        "heavy = {'deepspeed', 'megatron', 'transformers', 'streaming', 'pyarrow'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_a_distilled_run_does_not_tell_where_its_teacher_is(tmp_path: Path) -> None:
    run = write_run(tmp_path / "r", "pgm")
    tree = yaml.safe_load((run / "config.yaml").read_text())
    tree["objective"] = {
        "kind": "sdtt",
        "teacher": "/hidden/place/teacher",
        "sampling_steps": 16,
        "round_steps": 6,
    }
    (run / "config.yaml").write_text(yaml.safe_dump(tree))
    identity = json.loads((run / "run.json").read_text())
    del identity["sha256"]
    teacher = {"run_id": "ab12", "step": 7, "weights": "ema", "checkpoint_sha256": "cd34"}
    identity["distilled_from"] = {"source": "the first teacher", **teacher}
    (run / "run.json").write_text(json.dumps(identity))
    export_run(str(run), ExportRequest(str(tmp_path / "m")), lambda _: None)
    texts = [path.read_text(errors="replace") for path in (tmp_path / "m").iterdir()]
    assert any("| objective.kind | sdtt |" in text for text in texts)
    card = (tmp_path / "m" / "README.md").read_text()
    assert "trained by pgm-scale with the objective sdtt." in card
    assert "| distilled from | the first teacher |\n| teacher's SHA-256 | cd34 |" in card
    assert not any("/hidden" in text for text in texts)
