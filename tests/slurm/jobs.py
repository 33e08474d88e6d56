"""Launching the demo's training on the local Slurm as a user would, doing things to it, and comparing runs."""

from __future__ import annotations

import getpass
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch

from ops.slurm_local.cluster import LocalSlurm
from pgm_scale.checkpoint.fragments import KINDS
from pgm_scale.checkpoint.store import CheckpointStore

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "configs/clusters/local-2x2.yaml"
# As long as the value of a secret may be; the tests look for them in all that is written.
SECRETS = {
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
    "HF_TOKEN": "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",
    "AWS_ACCESS_KEY_ID": "AKIATHISISNOTAREALKEY",
    "AWS_SECRET_ACCESS_KEY": "this/is+not/a+real/secret/access/key0000",
    "AWS_SESSION_TOKEN": "this-is-not-a-real-session-token-0123456789",
}


class Cluster:
    """The local Slurm, with `pgm-scale launch` in front."""

    def __init__(self, slurm: LocalSlurm, folder: Path) -> None:
        """`folder` is where the commands run."""
        self.slurm, self.folder = slurm, folder

    def clear(self) -> None:
        """Cancel what a test has left behind, and wait until it is gone."""
        self.slurm.run("scancel", "--user", getpass.getuser())
        deadline = time.monotonic() + 60
        while self.slurm.run("squeue", "--noheader"):
            assert time.monotonic() < deadline, "jobs do not end"
            time.sleep(0.2)

    def pgm_scale(self, *words: str, code: int = 0) -> str:
        """Run a command; returns stdout and stderr."""
        done = subprocess.run(
            [sys.executable, "-m", "pgm_scale.cli", *words],
            env=self.slurm.environment | SECRETS,
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    def launch(self, *words: str) -> list[str]:
        """The ids of the jobs, in their order."""
        return re.findall(r"^\w+: job (\S+) \(", self.pgm_scale("launch", *words), re.MULTILINE)

    def train(self, data: Path, run: Path, *words: str) -> Job:
        (job,) = self.launch("train", *training_words(data, run), "--cluster", str(CLUSTER), *words)
        return Job(self.slurm, job, run)


class Job:
    def __init__(self, slurm: LocalSlurm, job_id: str, run: Path) -> None:
        self.slurm, self.id, self.run = slurm, job_id, run

    @property
    def state(self) -> str:
        return self.slurm.job_state(self.id)

    @property
    def restarts(self) -> int:
        return int(self.slurm.job(self.id)["Restarts"])

    @property
    def step(self) -> int:
        """Of the newest record in the run's log."""
        path = self.run / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        try:
            return json.loads(lines[-1])["step"] if lines else 0
        except ValueError:  # read in the middle of a write
            return 0

    def wait_for_step(self, step: int, timeout_s: float = 120) -> None:
        self._wait(lambda: self.step >= step, f"step {step}", timeout_s)

    def wait_for_state(self, *states: str, timeout_s: float = 120) -> None:
        self._wait(lambda: self.state in states, f"state {states}", timeout_s)

    def wait_for_restarts(self, count: int, timeout_s: float = 120) -> None:
        """Until the job has been requeued so often and runs again."""
        self._wait(lambda: self.restarts >= count and self.state == "RUNNING", f"restart {count}", timeout_s)

    def wait_until_finished(self, timeout_s: float = 240) -> None:
        ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL", "OUT_OF_MEMORY")
        self.wait_for_state(*ended, timeout_s=timeout_s)
        assert self.state == "COMPLETED", self.logs

    def _wait(self, done: Callable[[], bool], what: str, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while not done():
            assert time.monotonic() < deadline, f"job {self.id} came not to {what}: {self.state}\n{self.logs}"
            time.sleep(0.1)

    def task(self, rank: int) -> psutil.Process:
        """The process of a rank, when it has started."""
        self._wait(lambda: self._tasks(rank) != [], f"a task {rank}", 60)
        return self._tasks(rank)[0]

    def _tasks(self, rank: int) -> list[psutil.Process]:
        found = [process for process in _processes() if _environment(process).get("SLURM_JOB_ID") == self.id]
        # The batch script's srun has the same words, behind others.
        named = [p for p in found if p.cmdline()[1:4] == ["-u", "-m", "submitit.core._submit"]]
        return [p for p in named if _environment(p).get("SLURM_PROCID") == str(rank)]

    @property
    def logs(self) -> str:
        """Of all tasks."""
        files = sorted((self.run / "jobs").glob(f"{self.id}_*_log.*"))
        return "\n".join(f"--- {file.name}\n{file.read_text(errors='replace')}" for file in files)


def _processes() -> list[psutil.Process]:
    return list(psutil.process_iter())


def _environment(process: psutil.Process) -> dict[str, str]:
    try:
        return process.environ()
    except (psutil.Error, OSError):
        return {}


def training_words(data: Path, run: Path) -> list[str]:
    """The demo's run for four ranks, some ten seconds of training, a record each step."""
    return [
        str(ROOT / "configs/demo.yaml"),
        f"folder={run}",
        f"data.train={data / 'train'}",
        f"data.validation={data / 'validation'}",
        "training.steps=100",
        "training.micro_batch_sequences=4",
        "training.log_interval_steps=1",
        "checkpoint.interval_steps=20",
        "validation.interval_steps=50",
        "validation.sequences=32",
        "validation.samples=0",
        "parallel.timeout_s=60",
    ]


def assert_same_training(run: Path, reference: Path) -> None:
    """Every step once, with the same losses, samples and data to the bit, and the same state in the end."""
    ours, theirs = records(run), records(reference)
    assert [record["step"] for record in ours] == [record["step"] for record in theirs]
    compared = ("step", "samples", "loss", "loss_mean", "gradient_norm", "data_fingerprint", "sample_numbers")
    for mine, other in zip(ours, theirs, strict=True):
        assert {key: mine[key] for key in compared} == {key: other[key] for key in compared}
    last = ours[-1]["step"]
    stores = CheckpointStore(run), CheckpointStore(reference)
    for kind in KINDS:
        tensors, expected = (store.read_full(last, kind) for store in stores)
        assert tensors.keys() == expected.keys()
        assert all(torch.equal(tensors[name], expected[name]) for name in expected), kind


def records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def tracker_runs(run: Path) -> set[str]:
    """Ids of the tracker's runs, of which each session has left a folder."""
    return {folder.name.rpartition("-")[2] for folder in (run / "wandb").glob("offline-run-*")}


def assert_holds_no_secret(folder: Path) -> None:
    """Neither in a file nor in a name of one."""
    for path in folder.rglob("*"):
        content = os.fsencode(path) + (path.read_bytes() if path.is_file() else b"")
        for name, value in SECRETS.items():
            assert value.encode() not in content, f"{path} holds {name}"
