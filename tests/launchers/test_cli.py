"""`pgm-scale launch` as a user meets it: what it refuses, chains on a stand-in for sbatch, and real runs here."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launchers.cli import launch
from launchers.records import read_launches
from pgm_scale import config as configuration
from pgm_scale.cli import main
from pgm_scale.data.manifest import DatasetManifest
from pgm_scale.errors import UserError
from pgm_scale.run_folder import RunFolder
from tests.launchers.fake_slurm import FakeSlurm, add_launch, job_line
from tests.tiny_data import tiny_config, write_tiny_data

_SBATCH = """#!/bin/bash
number=$(( $(cat {folder}/submitted 2> /dev/null || echo 11) + 1 ))
[ "$number" -gt {most} ] && {{ echo "$(cat {folder}/refusal)" >&2; exit 1; }}
echo $number > {folder}/submitted
env > {folder}/environment
echo "Submitted batch job $number"
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def work(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the user is: a run's configuration and a cluster's file."""
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    _write_config(data, training={"steps": 4})
    Path("cluster.yaml").write_text("slurm: {tasks_per_node: 2, time: 90, exclude: 'gpu[1-2]'}\n")
    return work


def _write_config(data: Path, **changes: object) -> None:
    config = tiny_config(data, Path("runs/tiny"), validation={"interval_steps": 100}, **changes)
    Path("tiny.yaml").write_text(configuration.to_yaml(dataclasses.replace(config, name="tiny")))


class Sbatch:
    """A FakeSlurm with an sbatch that gives 12, 13, ... and refuses what comes after `most`."""

    def __init__(self, folder: Path, fake: FakeSlurm) -> None:
        self.folder, self.fake = folder, fake
        fake.program("srun", "#!/bin/bash\n")
        self.refuse_after(99, "")

    def refuse_after(self, most: int, refusal: str) -> None:
        (self.folder / "refusal").write_text(refusal)
        self.fake.program("sbatch", _SBATCH.format(folder=self.folder, most=most))

    @property
    def environment(self) -> dict[str, str]:
        """Of the last submission."""
        lines = (self.folder / "environment").read_text().splitlines()
        return dict(line.split("=", 1) for line in lines if "=" in line)


@pytest.fixture
def sbatch(tmp_path: Path, work: Path, monkeypatch: pytest.MonkeyPatch) -> Sbatch:
    return Sbatch(tmp_path / "slurm", FakeSlurm(tmp_path / "slurm", monkeypatch))


CLUSTER = ("--cluster", "cluster.yaml")
CHAIN = (
    *("prepare", "python-docs", "--output", "docs", *CLUSTER),
    *("--then", "train", "tiny.yaml"),
    *("--then", "export", "runs/tiny", "--out", "exported"),
)


def test_a_chain_is_submitted_told_and_written_down(
    sbatch: Sbatch, work: Path, capsys: pytest.CaptureFixture
) -> None:
    launch(CHAIN)
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if not line.startswith(" ")] == [
        "prepare: job 12 (prepare): 1 nodes x 1 processes, 90",
        "train: job 13 (tiny): 1 nodes x 2 processes, 90, afterok:12",
        "export: job 14 (export): 1 nodes x 1 processes, 90, afterok:13",
    ]
    assert f"  run   {work}/runs/tiny" in lines
    (trained,) = read_launches(Path("runs/tiny/jobs"))
    assert (trained.record.job_id, trained.record.after) == ("13", ("12",))
    text = Path("runs/tiny/jobs/13_submission.sh").read_text()
    assert "#SBATCH --dependency=afterok:12\n" in text
    assert Path("runs/tiny/jobs/13_submitted.pkl").exists()


def test_a_dry_run_of_a_chain_writes_nothing(
    work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("PATH", "")
    before = sorted(work.rglob("*"))
    launch((*CHAIN[:6], "--dry-run", *CHAIN[6:]))
    text = capsys.readouterr().out
    assert text.count("#!/bin/bash") == 3
    assert "# tiny: pgm-scale train tiny.yaml\n" in text
    assert "#SBATCH --dependency='afterok:<id of prepare>'\n" in text
    assert sorted(work.rglob("*")) == before


def test_what_is_submitted_before_a_refusal_is_named(sbatch: Sbatch) -> None:
    sbatch.refuse_after(12, "sbatch: error: invalid partition specified: x")
    with pytest.raises(UserError, match=r"sbatch refuses tiny: .*invalid partition") as caught:
        launch(CHAIN)
    assert "submitted before it: prepare as 12" in str(caught.value)
    assert len(read_launches(Path("jobs/prepare"))) == 1
    assert read_launches(Path("runs/tiny/jobs")) == []


def test_an_sbatch_that_says_nothing(sbatch: Sbatch) -> None:
    sbatch.refuse_after(11, "")
    with pytest.raises(UserError, match="sbatch refuses tiny: it does not say why"):
        launch(("train", "tiny.yaml", *CLUSTER))


@pytest.mark.parametrize("words", [(), ("optimizer.learning_rate=1e-3,1e-4",)])
def test_a_machine_without_slurm(work: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match=r"no Slurm here \(sbatch not found\)"):
        launch(("train", "tiny.yaml", *words, *CLUSTER))
    assert not Path("runs").exists()


def test_a_launch_from_a_shell_in_a_job_hands_nothing_of_it_on(
    sbatch: Sbatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = {"SLURM_JOB_ID": "5", "SLURM_MEM_PER_NODE": "10", "SLURM_ARRAY_JOB_ID": "5", "RANK": "0"}
    kept = {"SLURM_CONF": "/etc/slurm.conf", "SBATCH_ACCOUNT": "me", "HF_HOME": "/x"}
    for name, value in (job | kept).items():
        monkeypatch.setenv(name, value)
    launch(("train", "tiny.yaml", *CLUSTER))
    assert not job.keys() & sbatch.environment.keys()
    assert kept.items() <= sbatch.environment.items()
    assert job.items() <= os.environ.items()


def test_a_preflight_knows_what_follows_and_what_that_avoids(sbatch: Sbatch) -> None:
    words = ("--then", "train", "tiny.yaml", "optimizer.learning_rate=1e-3,1e-4", "--exclude", "gpu9")
    launch(("preflight", *CLUSTER, *words))
    known = json.loads(Path("jobs/preflight/12_next.json").read_text())
    assert known == {"ids": ["13"], "exclude": "gpu[1-2],gpu9"}
    text = Path("runs/tiny-sweep/jobs/13_submission.sh").read_text()
    assert "#SBATCH --dependency=afterany:12\n" in text


def test_a_second_job_of_a_run_is_refused(sbatch: Sbatch, work: Path) -> None:
    jobs = work / "runs/tiny/jobs"
    add_launch(jobs, "11")
    sbatch.fake.knows(11, job_line(11, stdout=f"{jobs}/11_0_log.out"))
    with pytest.raises(UserError, match=r"job 11 of .*runs/tiny waits or runs already"):
        launch(("train", "tiny.yaml", *CLUSTER))
    launch(("train", "tiny.yaml", *CLUSTER, "--after", "11"))
    assert "afterok:11" in Path("runs/tiny/jobs/12_submission.sh").read_text()


def test_a_job_that_slurm_does_not_know_is_not_waited_for(sbatch: Sbatch) -> None:
    """Slurm would start the new one at once."""
    with pytest.raises(UserError, match=r"--after 99: Slurm knows no such job"):
        launch(("train", "tiny.yaml", *CLUSTER, "--after", "99"))


def test_another_run_in_the_folder_is_refused_before_it_waits(work: Path, data: Path) -> None:
    config = configuration.load("tiny.yaml")
    run = RunFolder(config.folder)
    run.create_or_match(config, DatasetManifest.load(config.data.train), data / "train/tokenizer.json")
    launch(("train", "tiny.yaml", *CLUSTER, "--dry-run"))
    with pytest.raises(UserError, match=r"training\.seed: the run has 1, now it is 2"):
        launch(("train", "tiny.yaml", "training.seed=2", *CLUSTER, "--dry-run"))


def test_data_that_are_not_there_are_told(work: Path, capsys: pytest.CaptureFixture) -> None:
    launch(("train", "tiny.yaml", "data.train=none/train", *CLUSTER, "--dry-run"))
    assert "warning: data.train: no prepared split in none/train here" in capsys.readouterr().err


def test_a_preflight_of_a_configuration_that_no_job_could_run(work: Path) -> None:
    with pytest.raises(UserError, match=r"tensor"):
        launch(("preflight", "tiny.yaml", "parallel.tensor=3", *CLUSTER, "--dry-run"))


def test_a_preflight_that_has_not_ended_excludes_nobody(work: Path) -> None:
    Path("report.json").write_text(json.dumps({"verdict": "unfinished", "bad_nodes": []}))
    with pytest.raises(UserError, match=r"has not ended well and checked nothing"):
        launch(("train", "tiny.yaml", *CLUSTER, "--exclude", "report.json"))


def _excluded(capsys: pytest.CaptureFixture) -> list[str]:
    launch(("train", "tiny.yaml", *CLUSTER, "--dry-run", "--exclude", "report.json"))
    return [line for line in capsys.readouterr().out.splitlines() if "--exclude" in line]


def test_bad_nodes_of_a_report_are_left_out(work: Path, capsys: pytest.CaptureFixture) -> None:
    Path("report.json").write_text(json.dumps({"bad_nodes": ["gpu3", "gpu7"], "nodes": {}}))
    assert _excluded(capsys) == ["#SBATCH --exclude='gpu[1-2],gpu3,gpu7'"]
    Path("report.json").write_text(json.dumps({"bad_nodes": []}))
    assert _excluded(capsys) == ["#SBATCH --exclude='gpu[1-2]'"]
    Path("cluster.yaml").write_text("slurm: {tasks_per_node: 2}\n")
    assert _excluded(capsys) == []


@pytest.mark.parametrize("text", ["", "{", "[1]", "{}", '{"bad_nodes": "gpu3"}', '{"bad_nodes": [1]}'])
def test_what_is_no_report_of_a_preflight(work: Path, text: str) -> None:
    Path("report.json").write_text(text)
    with pytest.raises(UserError, match=r"--exclude report.json: names no bad_nodes; give the JSON"):
        launch(("train", "tiny.yaml", *CLUSTER, "--exclude", "report.json"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("train tiny.yaml", "launch train: give the cluster's file"),
        ("train tiny.yaml --cluster none.yaml", "none.yaml"),
        ("train none.yaml --cluster cluster.yaml", "none.yaml"),
        ("train tiny.yaml --cluster tiny.yaml", "has no `slurm` section"),
        ("train tiny.yaml --cluster cluster.yaml --time 1:00", "'1:00' is not HH:MM:SS"),
        ("train tiny.yaml --cluster cluster.yaml --exclude none.json", "cannot be read (No such file"),
        ("train tiny.yaml --cluster cluster.yaml --after x", "--after x: give the id of one job"),
        ("train tiny.yaml --cluster cluster.yaml --after 3 --local", "leave out --local"),
        ("train tiny.yaml --cluster cluster.yaml --then", "--then: an action must follow"),
        ("train tiny.yaml --cluster cluster.yaml --then status", "only jobs can follow"),
        ("train tiny.yaml --cluster cluster.yaml --then train tiny.yaml --local", "before the first --then"),
        ("distill tiny.yaml --cluster cluster.yaml", "distill needs a configuration with objective.kind"),
        ("export runs/x --out y --cluster cluster.yaml --nodes 2", "launch export is one process"),
        ("train tiny.yaml training.seed=1,1 --cluster cluster.yaml", "would train in"),
        (
            "train tiny.yaml data.train=a/b,a_b --cluster cluster.yaml",
            "runs/tiny-train=a_b: their values are, or",
        ),
    ],
)
def test_refusals_are_one_line(work: Path, capsys: pytest.CaptureFixture, words: str, message: str) -> None:
    assert main(["launch", *words.split(), *([] if "--then" in words else ["--dry-run"])]) == 2
    said = capsys.readouterr()
    assert message in said.err
    assert "Traceback" not in said.err
    assert said.out == ""
    assert not Path("runs").exists()


@pytest.mark.parametrize("words", ["train", "trian tiny.yaml", "train tiny.yaml --node 2", "status --x"])
def test_what_argparse_refuses(work: Path, capsys: pytest.CaptureFixture, words: str) -> None:
    with pytest.raises(SystemExit) as caught:
        launch([*words.split(), *(CLUSTER if words.startswith("train") else ())])
    assert caught.value.code == 2
    assert "error:" in capsys.readouterr().err


def _start_here(*words: str) -> subprocess.Popen[str]:
    """In a process group of its own, as a terminal gives to a command."""
    return subprocess.Popen(
        [sys.executable, "-m", "pgm_scale.cli", "launch", *words, *CLUSTER, "--local"],
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def _steps(run: str = "runs/tiny") -> list[int]:
    path = Path(run, "metrics.jsonl")
    return [json.loads(line)["step"] for line in path.read_text().splitlines()] if path.exists() else []


def test_the_same_job_runs_here_in_two_processes(work: Path) -> None:
    here = _start_here("train", "tiny.yaml")
    errors = here.communicate(timeout=120)[1]
    assert here.returncode == 0, errors
    assert _steps() == [1, 2, 3, 4]
    ends = [json.loads(path.read_text())["code"] for path in Path("runs/tiny/jobs").glob("*_exit.json")]
    assert ends == [0, 0]
    assert "tiny: 2 processes here; logs" in errors


def test_a_job_here_that_fails_ends_the_chain_with_its_exit_code(work: Path, data: Path) -> None:
    words = (
        "train",
        "tiny.yaml",
        f"data.train={work}/none",
        *CLUSTER,
        "--local",
        "--then",
        "train",
        "tiny.yaml",
    )
    done = subprocess.run(
        [sys.executable, "-m", "pgm_scale.cli", "launch", *words], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2, done.stderr
    assert "tiny ended here with exit code 2" in done.stderr
    assert "Traceback" not in done.stderr
    assert _steps() == []


@pytest.mark.parametrize("way", ["Ctrl-C", "SIGTERM"])
def test_what_runs_here_saves_when_it_is_stopped(work: Path, data: Path, way: str) -> None:
    """Ctrl-C reaches all processes, more than once; SIGTERM only the launcher. No other run of the sweep begins."""
    _write_config(data, training={"steps": 100_000}, checkpoint={"interval_steps": 10_000})
    here = _start_here("train", "tiny.yaml", "training.seed=1,2")
    deadline_s = time.monotonic() + 90
    while len(_steps("runs/tiny-seed=1")) < 3:
        assert here.poll() is None, here.communicate()[1]
        assert time.monotonic() < deadline_s
        time.sleep(0.1)
    if way == "Ctrl-C":
        os.killpg(here.pid, signal.SIGINT)
        time.sleep(0.1)
        os.killpg(here.pid, signal.SIGINT)
    else:
        here.send_signal(signal.SIGTERM)
    errors = here.communicate(timeout=60)[1]
    assert here.returncode in (75, 130), errors
    assert "stopping: a training saves first" in errors
    assert "Traceback" not in errors
    last = _steps("runs/tiny-seed=1")[-1]
    assert Path(f"runs/tiny-seed=1/checkpoints/step_{last:08d}").exists()
    assert not Path("runs/tiny-seed=2").exists()
