"""The command line as a user meets it: real processes, real signals, and errors of one readable message."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml

from pgm_scale import config as configuration
from pgm_scale.cli import main
from pgm_scale.data import DatasetManifest
from tests.tiny_data import tiny_config, write_tiny_data

COMMAND = [sys.executable, "-m", "pgm_scale.cli"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_data(tmp_path_factory.mktemp("data"))


def _config_file(data: Path, folder: Path, **changes: object) -> Path:
    path = folder.with_suffix(".yaml")
    path.write_text(configuration.to_yaml(tiny_config(data, folder, **changes)))
    return path


def _run(*arguments: str, code: int = 0, command: list[str] = COMMAND) -> subprocess.CompletedProcess:
    finished = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=200)
    assert finished.returncode == code, finished.stdout + finished.stderr
    return finished


def _losses(run: Path) -> list[tuple[int, float]]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(record["step"], record["loss"]) for record in records]


def _weights(run: Path, step: int) -> bytes:
    return (run / "checkpoints" / f"step_{step:08d}" / "rank_00000.safetensors").read_bytes()


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 6 steps with checkpoints at 3 and 6, uninterrupted; tests must copy it before they break it."""
    folder = tmp_path_factory.mktemp("runs") / "straight"
    _run("train", str(_config_file(data, folder)))
    return folder


def test_a_signal_stops_after_a_save_and_the_same_command_goes_on(
    data: Path, trained: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "stopped"
    # More steps than it will take, so that the signal always comes in time; the schedule is constant.
    config = str(_config_file(data, folder, training={"steps": 100_000}, checkpoint={"interval_steps": 1000}))
    process = subprocess.Popen([*COMMAND, "train", config], stderr=subprocess.PIPE, text=True)
    metrics = folder / "metrics.jsonl"
    deadline_s = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text().count("\n") >= 2):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline_s
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGUSR2)  # the second signal changes nothing
    errors = process.communicate(timeout=120)[1]
    assert process.returncode == 75, errors
    assert "Traceback" not in errors
    assert "is saved" in errors
    stopped_at = _losses(folder)[-1][0]
    _run("train", config, f"training.steps={stopped_at + 2}")
    straight = tmp_path / "again"
    _run("train", str(_config_file(data, straight, training={"steps": stopped_at + 2})))
    assert _losses(folder) == _losses(straight)
    assert _losses(folder)[:6] == _losses(trained)[: len(_losses(folder))]
    assert _weights(folder, stopped_at + 2) == _weights(straight, stopped_at + 2)
    assert not (folder / "run.lock").exists()


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_torchrun_with_two_ranks_has_the_losses_of_one_process(
    data: Path, trained: Path, tmp_path: Path, zero_stage: int
) -> None:
    folder = tmp_path / "two"
    config = _config_file(data, folder)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    _run(
        "train",
        str(config),
        f"parallel.zero_stage={zero_stage}",
        command=[*torchrun, "-m", "pgm_scale.cli"],
    )
    for (step, loss), (expected_step, expected) in zip(_losses(folder), _losses(trained), strict=True):
        assert step == expected_step
        assert loss == pytest.approx(expected, abs=1e-5, rel=1e-5)


def test_srun_environment_starts_a_rank_a_task(tmp_path: Path) -> None:
    from pgm_scale.parallel.launch import free_port

    base = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")}
    step = {
        "SLURM_JOB_ID": "7",
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_NODELIST": "localhost",
        "MASTER_PORT": str(free_port()),
    }
    tasks = [
        subprocess.Popen(
            [*COMMAND, "doctor"],
            env=base | step | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [task.communicate(timeout=120)[0] for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0]
    assert "srun, 2 ranks" in outputs[0]
    assert "rank 1:" in outputs[0]
    assert outputs[1] == ""


def test_a_flipped_byte_in_the_newest_checkpoint_falls_back(trained: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    _flip(run / "checkpoints" / "step_00000006" / "rank_00000.safetensors")
    evaluated = _run("eval", str(run), "--sequences", "8", "--json", str(tmp_path / "eval.json"))
    assert "step_00000006" in evaluated.stderr
    assert "rank_00000.safetensors" in evaluated.stderr
    assert "step 3" in evaluated.stdout
    assert json.loads((tmp_path / "eval.json").read_text())["step"] == 3
    config = yaml.safe_load((trained / "config.yaml").read_text()) | {"folder": str(run)}
    (tmp_path / "again.yaml").write_text(yaml.safe_dump(config))
    resumed = _run("train", str(tmp_path / "again.yaml"))
    assert "rank_00000.safetensors" in resumed.stderr
    assert "resumed from the checkpoint of step 3" in resumed.stderr
    assert _weights(run, 6) == _weights(trained, 6)
    assert _losses(run) == _losses(trained)


def test_a_flipped_byte_in_a_shard_is_named(data: Path, tmp_path: Path) -> None:
    copy = tmp_path / "data"
    shutil.copytree(data, copy)
    shard = next((copy / "train").glob("*.mds"))
    _flip(shard)
    config = str(_config_file(copy, tmp_path / "run"))
    for command in (["train", config], ["train", config], ["doctor", config]):
        failed = _run(*command, code=2)
        assert shard.name in failed.stderr
        assert "Traceback" not in failed.stderr


def test_sampling_gives_the_same_text_at_any_batch(trained: Path, tmp_path: Path) -> None:
    def generate(*arguments: str) -> list[dict]:
        out = tmp_path / "out.jsonl"
        assert main(["sample", str(trained), "--format", "jsonl", "--out", str(out), *arguments]) == 0
        return [json.loads(line) for line in out.read_text().splitlines()]

    samples = generate("--count", "5", "--steps", "4")
    assert samples == generate("--count", "5", "--steps", "4", "--batch", "2")
    assert samples != generate("--count", "5", "--steps", "4", "--seed", "2")
    array = tmp_path / "out.npy"
    assert main(["sample", str(trained), "--count", "5", "--steps", "4", "--out", str(array)]) == 0
    assert np.load(array).tolist() == [sample["tokens"] for sample in samples]
    array.unlink()
    assert main(["sample", str(trained), "--format", "jsonl", "--out", str(array)]) == 2
    assert not array.exists()
    (infilled,) = generate("--infill", "w3 {4} w5")
    assert infilled["tokens"][:2] + infilled["tokens"][6:7] == [0, 3, 5]
    assert 23 not in infilled["tokens"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["training.stpes=3"], "training.stpes: unknown key; did you mean 'steps'?"),
        (["model.num_heads=3"], "model.hidden_size 16 is not divisible by model.num_heads 3"),
        (["data.train=nowhere"], "nowhere/dataset.json"),
        (["training.micro_batch_sequences=3"], "is not divisible by micro_batch_sequences 3"),
        (["objective.kind=mdlm"], "needs model.kind diffusion_transformer"),
    ],
)
def test_bad_input_is_one_message(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture, overrides: list[str], message: str
) -> None:
    tree = yaml.safe_load(configuration.to_yaml(tiny_config(data, tmp_path / "run")))
    tree["objective"].pop("form")
    tree["objective"].pop("minimum_time")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    assert main(["train", str(tmp_path / "config.yaml"), *overrides]) == 2
    errors = capsys.readouterr().err
    assert message in errors
    assert "Traceback" not in errors
    assert not (tmp_path / "run").exists()


@pytest.mark.fault(24)
def test_all_problems_are_told_at_once(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    config = _config_file(data, tmp_path / "run")
    assert main(["train", str(config), "modle.x=1", "training.seed=a", "optimizer.warmup_steps=-1"]) == 2
    errors = capsys.readouterr().err
    assert "modle: unknown key; did you mean 'model'?" in errors
    assert "training.seed: expected int, found 'a'" in errors
    assert main(["train", str(config), "data.train=nowhere", "data.validation=neither"]) == 2
    errors = capsys.readouterr().err
    assert all(part in errors for part in ("nowhere", "neither"))


@pytest.mark.fault(23)
def test_a_vocabulary_mismatch_is_a_readable_diff(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    copy = tmp_path / "data"
    shutil.copytree(data, copy)
    manifest = DatasetManifest.load(copy / "validation")
    vocabulary = dataclasses.replace(manifest.vocabulary, size=30)
    dataclasses.replace(manifest, vocabulary=vocabulary).save(copy / "validation")
    assert main(["train", str(_config_file(copy, tmp_path / "run"))]) == 2
    errors = capsys.readouterr().err
    assert "vocabulary" in errors
    assert "24" in errors
    assert "30" in errors


def test_config_prints_what_loads_again(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    config = _config_file(data, tmp_path / "run")
    assert main(["config", str(config), "training.steps=11", "optimizer.learning_rate=1e-3"]) == 0
    printed = tmp_path / "printed.yaml"
    printed.write_text(capsys.readouterr().out)
    again = configuration.load(printed)
    assert (again.training.steps, again.optimizer.learning_rate) == (11, 1e-3)
    assert again == configuration.load(config, ["training.steps=11", "optimizer.learning_rate=1e-3"])


def test_config_warns_of_data_that_is_not_there(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    config = str(_config_file(data, tmp_path / "run"))
    assert main(["config", config]) == 0
    assert capsys.readouterr().err == ""
    remote = "data.validation=s3://bucket/split"
    assert main(["config", config, f"data.train={tmp_path}", remote, "data.cache_folder=cache"]) == 0
    output, warning = capsys.readouterr()
    assert warning == f"warning: data.train: no prepared split in {tmp_path}; `train` will refuse it\n"
    assert yaml.safe_load(output)["data"]["train"] == str(tmp_path)


def test_config_warns_of_a_warm_up_that_never_ends(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    config = str(_config_file(data, tmp_path / "run"))
    assert main(["config", config, "training.steps=10", "optimizer.warmup_steps=9"]) == 0
    assert capsys.readouterr().err == ""
    assert main(["config", config, "training.steps=10", "optimizer.warmup_steps=10"]) == 0
    assert capsys.readouterr().err.startswith(
        "warning: optimizer.warmup_steps 10 is not below training.steps 10"
    )


def test_inference_needs_neither_deepspeed_nor_megatron(trained: Path) -> None:
    script = (
        "import sys, pgm_scale, pgm_scale.sampling.run as run\n"
        f"run.sample_run({str(trained)!r}, run.SampleRequest(steps=2))\n"
        "found = [m for m in ('deepspeed', 'megatron', 'streaming', 'wandb') if m in sys.modules]\n"
        "sys.exit(f'imported {found}' if found else 0)"
    )
    _run("-c", script, command=[sys.executable])


def test_help_loads_nothing_heavy() -> None:
    """Only the standard library and our own light modules: a user waits for `--help` and for every typo."""
    script = (
        "import sys; before = set(sys.modules)\n"
        "from pgm_scale.cli import build_parser; build_parser().format_help()\n"
        "new = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "foreign = new - set(sys.stdlib_module_names) - {'pgm_scale', 'data_prep'}\n"
        "sys.exit(f'imported {foreign}' if foreign else 0)"
    )
    _run("-c", script, command=[sys.executable])


def test_every_command_explains_itself(capsys: pytest.CaptureFixture) -> None:
    for command in ("prepare", "train", "eval", "sample", "plan", "config", "doctor"):
        with pytest.raises(SystemExit) as stopped:
            main([command, "--help"])
        assert stopped.value.code == 0
        assert len(capsys.readouterr().out) > 200
