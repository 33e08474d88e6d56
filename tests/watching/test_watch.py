"""Real runs as the world outside sees them: every way out, a full disk, progress that is none, a hang."""

import json
import logging
import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families

from pgm_scale.config import RunConfig
from pgm_scale.data.storage import SplitStorage
from pgm_scale.errors import HungRankError, Preempted, UnstableError, UserError
from pgm_scale.parallel.hangs import Verdict
from pgm_scale.parallel.launch import Launch, free_port
from pgm_scale.parallel.mesh import Mesh, connected
from pgm_scale.training.loop import TrainingRun, train_on_mesh
from pgm_scale.training.signals import StopFlag
from pgm_scale.watching import watch as module
from pgm_scale.watching.alerts import Alerts
from pgm_scale.watching.heartbeat import HEARTBEAT_NAME, Heartbeat, read_heartbeat
from pgm_scale.watching.stragglers import Straggler
from pgm_scale.watching.watch import RunWatch
from tests.distributed import run_ranks
from tests.tiny_data import tiny_config, write_tiny_data

TIMEOUT_S = 5.0


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_data(tmp_path_factory.mktemp("data"))


def _config(data: Path, folder: Path, **changes: Any) -> RunConfig:
    command = f'echo "$PGM_SCALE_EVENT $PGM_SCALE_STEP" >> {folder.parent}/alerts'
    return tiny_config(data, folder, **{"watching": {"alert_command": command}, **changes})


def _alerts(folder: Path) -> list[str]:
    return sorted((folder.parent / "alerts").read_text().split("\n"))[1:]


def _train(mesh: Mesh, config: RunConfig, watch: RunWatch, stop: StopFlag | None = None) -> None:
    with watch:
        train_on_mesh(
            config,
            mesh,
            SplitStorage(config.data.train),
            SplitStorage(config.data.validation),
            stop,
            watch=watch,
        )


def _session(mesh: Mesh, config: RunConfig, ending: str) -> list[dict[str, Any]]:
    """One session that ends in some way in its fourth step; returns the heartbeats as they were written."""
    written: list[Heartbeat] = []
    write, after_step = RunWatch._write, TrainingRun._after_step
    watch, stop = RunWatch(config, mesh.rank, mesh.world_size), StopFlag()
    errors: dict[str, BaseException] = {
        "error": UserError("cannot go on:\n  disk full"),
        "bug": ValueError("a bug of ours"),
        "unstable": UnstableError("loss is not finite at step 3"),
        "hung": HungRankError("rank 1 is stopped"),
        "interrupted": KeyboardInterrupt(),
    }

    def recording(self: RunWatch) -> None:
        write(self)
        beat = read_heartbeat(config.folder)
        assert beat is not None
        written.append(beat)

    def ending_step(self: TrainingRun, step: int, *arguments: Any) -> None:
        after_step(self, step, *arguments)
        if step == 3 and ending == "preempted":
            stop.signal_name = "SIGTERM"
        if step == 4 and ending in errors:
            raise errors[ending]

    caught: BaseException | None = None
    with patch.object(RunWatch, "_write", recording), patch.object(TrainingRun, "_after_step", ending_step):
        try:
            _train(mesh, config, watch, stop)
        except BaseException as error:
            caught = error
    if caught is not errors.get(ending) and not (ending == "preempted" and isinstance(caught, Preempted)):
        raise AssertionError("another way out") from caught
    return [vars(beat) for beat in written]


def _prometheus(path: Path) -> dict[str, float]:
    families = text_string_to_metric_families(path.read_text())
    return {sample.name: sample.value for family in families for sample in family.samples}


def _session_of_a_job(mesh: Mesh, config: RunConfig) -> list[dict[str, Any]]:
    """A whole session in which a heartbeat is always due."""
    with patch.dict(os.environ, SLURM_JOB_ID="4711"), patch.object(module, "_INTERVAL_S", 0.0):
        return _session(mesh, config, "finished")


def test_a_run_says_what_it_does_until_it_is_finished(data: Path, tmp_path: Path) -> None:
    collector, run = tmp_path / "collector", tmp_path / "run"
    collector.mkdir()
    command = f'echo "$PGM_SCALE_EVENT $PGM_SCALE_STEP" >> {tmp_path}/alerts'
    watching = {"alert_command": command, "prometheus_folder": str(collector)}
    config = _config(data, run, watching=watching, training={"steps": 6}, checkpoint={"asynchronous": False})
    start_s = time.time()
    written = run_ranks(1, _session_of_a_job, config)
    states = [beat["state"] for beat in written]
    changes = [state for state, before in zip(states, [None, *states], strict=False) if state != before]
    saved, validated = ["saving", "training"], ["validating", "training"]
    assert changes == ["starting", "training", *saved, *validated, *saved, "finished"]
    assert [beat["step"] for beat in written] == sorted(beat["step"] for beat in written)
    times = [beat["unix_time_s"] for beat in written]
    assert times == sorted(times)
    assert start_s <= times[0]
    last = written[-1]
    record = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    for key in ("loss", "tokens_per_second", "gradient_norm", "learning_rate", "validation_perplexity"):
        assert last[key] == record[key], key
    assert (last["step"], last["total_steps"], last["last_checkpoint_step"]) == (6, 6, 6)
    assert (last["job"], last["restarts"], last["ranks"], last["exit_reason"]) == ("4711", 0, 1, None)
    identity = json.loads((run / "run.json").read_text())["run_id"]
    copy = collector / f"pgm_scale_{identity}.prom"
    assert os.listdir(collector) == [copy.name]
    assert copy.read_bytes() == (run / "metrics.prom").read_bytes()
    values = _prometheus(copy)
    assert values["pgm_scale_step"] == 6
    assert values["pgm_scale_running"] == 0
    assert values["pgm_scale_loss"] == record["loss"]
    assert _alerts(run) == ["finished 6", "started 0"]
    assert not [name for name in os.listdir(run) if name.endswith(".writing")]


@pytest.mark.parametrize(
    ("ending", "state", "reason", "event"),
    [
        ("preempted", "stopped:preempted", "stopped by a signal after step 4", "preempted 4"),
        ("unstable", "failed", "unstable: loss is not finite at step 3", "unstable 4"),
        ("hung", "failed", "hung: rank 1 is stopped", "hung 4"),
        ("error", "failed", "error: cannot go on: disk full", "failed 4"),
        ("bug", "failed", "bug: ValueError: a bug of ours", "failed 4"),
        ("interrupted", "failed", "error: KeyboardInterrupt", "failed 4"),
    ],
)
def test_every_way_out_is_told(
    data: Path, tmp_path: Path, ending: str, state: str, reason: str, event: str
) -> None:
    run = tmp_path / "run"
    run_ranks(1, _session, _config(data, run), ending)
    last = read_heartbeat(run)
    assert last is not None
    assert (last.state, last.step) == (state, 4)
    assert last.exit_reason is not None
    assert last.exit_reason.startswith(reason)
    assert _alerts(run) == sorted(["started 0", event])


def test_sessions_are_counted_and_a_resume_is_told(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run_ranks(1, _session, _config(data, run), "preempted")
    (run / HEARTBEAT_NAME).write_text(
        (run / HEARTBEAT_NAME).read_text().replace('"restarts": 0', '"restarts": 4')
    )
    written = run_ranks(1, _session, _config(data, run), "finished")
    assert {beat["restarts"] for beat in written} == {5}
    assert written[-1]["exit_reason"] is None
    assert _alerts(run) == ["finished 6", "preempted 4", "resumed 4", "started 0"]
    (run / HEARTBEAT_NAME).write_text("{")
    written = run_ranks(1, _session, _config(data, run), "finished")
    assert {beat["restarts"] for beat in written} == {0}
    assert written[-1]["state"] == "finished"


def test_nothing_is_written_before_the_folder_is_ours(data: Path, tmp_path: Path) -> None:
    """Another session that lives in the folder refuses this one: its heartbeat is not touched."""
    config = _config(data, tmp_path / "run")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / HEARTBEAT_NAME).write_text("of the other")
    with pytest.raises(UserError), RunWatch(config, 0, 1):
        raise UserError("in use by another run")
    RunWatch(config, 0, 1).hung(Verdict(0, "rank 1", "", (), ()))
    assert (tmp_path / "run" / HEARTBEAT_NAME).read_text() == "of the other"
    assert not (tmp_path / "alerts").exists()


def test_a_slow_rank_is_told_once_and_alerted_once(data: Path, tmp_path: Path) -> None:
    """Records may name it for hours; an alert that comes too soon after another's is sent later."""
    watch, clock = RunWatch(_config(data, tmp_path / "run"), 0, 4), [0.0]
    sent: list[str] = []
    one, other = Straggler(1, "gpu1", 2.0, "data"), Straggler(2, "gpu2", 2.0, "compute")
    changed = Straggler(1, "gpu1", 3.0, "compute")  # the same rank
    said = []
    with (
        patch("pgm_scale.watching.alerts.time.monotonic", lambda: clock[0]),
        patch.object(
            Alerts, "_run", lambda self, command, event, told: sent.append(told["PGM_SCALE_MESSAGE"])
        ),
    ):
        for step, straggler in enumerate([one, one, changed, other, None, one, other, other]):
            said.append(watch.slow(step, straggler))
            watch._alerts.wait()
            clock[0] += 45.0
    assert [line is not None for line in said] == [True, False, False, True, False, True, True, False]
    assert said[0] == f"step 0: {one}"
    expected = [(0, one), (3, other), (5, one), (7, other)]
    assert sent == [f"run: step {step}: {straggler}" for step, straggler in expected]


def _train_without_room(mesh: Mesh, config: RunConfig) -> list[str]:
    """All small files of the watch fail; returns the warnings."""
    warnings: list[str] = []

    class Collecting(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            warnings.append(record.getMessage())

    handler = Collecting()
    module.logger.addHandler(handler)
    full = OSError(28, "No space left on device")
    with patch.object(module, "_INTERVAL_S", 0.0), patch.object(module, "replace_file", side_effect=full):
        _train(mesh, config, RunWatch(config, mesh.rank, mesh.world_size))
    module.logger.removeHandler(handler)
    return warnings


@pytest.mark.fault(49)
def test_a_full_disk_is_said_once_and_training_goes_on(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    watching = {"prometheus_folder": str(tmp_path / "missing")}
    warnings = run_ranks(1, _train_without_room, _config(data, run, watching=watching))
    assert len(warnings) == 3, warnings
    assert all("No space left on device" in line for line in warnings)
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 6


def test_a_heartbeat_is_progress_of_the_training_thread(data: Path, tmp_path: Path) -> None:
    """Other threads may go on while training hangs; between two steps progress beats, when it is due."""
    import threading

    config = _config(data, tmp_path)
    told: list[tuple[str, int | None]] = []
    mesh = Mesh(0, 1, 0, torch.device("cpu"), progress=lambda what, step=None: told.append((what, step)))
    watch = RunWatch(config, 0, 1)
    watched = watch.begin(mesh)

    def age_of_beats() -> float:
        beat = read_heartbeat(tmp_path)
        assert beat is not None
        return beat.unix_time_s

    first_s = age_of_beats()
    watched.progress("at once", 3)
    assert age_of_beats() == first_s, "not due"
    watch._due_s = 0.0
    other = threading.Thread(target=lambda: watched.progress("elsewhere"))
    other.start()
    other.join()
    assert age_of_beats() == first_s
    watched.progress("here")
    assert age_of_beats() > first_s
    assert told == [("at once", 3), ("elsewhere", None), ("here", None)]


def test_other_ranks_write_nothing(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run_ranks(2, _session_of_two, _config(data, run))
    last = read_heartbeat(run)
    assert last is not None
    assert (last.state, last.ranks) == ("finished", 2)
    assert last.slowest_rank_ratio is not None
    assert last.slowest_rank_ratio > 0
    assert _alerts(run)[0] == "finished 6"


def _session_of_two(mesh: Mesh, config: RunConfig) -> None:
    write = module.replace_file

    def only_on_rank_0(*arguments: Any) -> None:
        assert mesh.rank == 0
        write(*arguments)

    with patch.object(module, "replace_file", only_on_rank_0):
        _train(mesh, config, RunWatch(config, mesh.rank, mesh.world_size))


def _rank_that_may_stop(launch: Launch, config: RunConfig, victim: int) -> None:
    """Steps as the loop's, without a model; one rank stops itself after some."""
    torch.set_num_threads(1)
    watch = RunWatch(config, launch.rank, launch.world_size)
    try:
        with watch, connected(launch, TIMEOUT_S, Path(config.folder) / "hangs", watch.hung) as plain:
            mesh = watch.begin(plain)
            watch.opened("abc", 0)
            for step in range(10):
                mesh.progress(f"step {step}", step)
                mesh.sum(np.ones(1))
                watch.step(step + 1, 1.0)
                if launch.rank == victim and step == 4:
                    time.sleep(3)  # some beats of the watchdog
                    os.kill(os.getpid(), signal.SIGSTOP)
    except HungRankError as error:
        os._exit(error.exit_code)


@pytest.mark.fault(16)
@pytest.mark.parametrize("victim", [1, 0])
def test_a_stopped_rank_is_told_by_one_that_lives(data: Path, tmp_path: Path, victim: int) -> None:
    """Real ranks. When rank 0 is stopped, rank 1 says what has become of the run."""
    run, port = tmp_path / "run", free_port()
    config = _config(data, run)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pgm_scale.training.loop"])
    processes = [
        context.Process(
            target=_rank_that_may_stop,
            args=(Launch("torchrun", rank, 2, rank, "127.0.0.1", port), config, victim),
        )
        for rank in range(2)
    ]
    for process in processes:
        process.start()
    try:
        processes[1 - victim].join(120)
        assert processes[1 - victim].exitcode == HungRankError.exit_code
    finally:
        for process in processes:
            process.kill()
            process.join()
    last = read_heartbeat(run)
    assert last is not None
    assert (last.state, last.run_id) == ("failed", "abc")
    assert last.exit_reason is not None
    assert last.exit_reason.startswith(f"hung: rank {victim} ")
    assert [line.split()[0] for line in _alerts(run)] == ["hung", "started"]


def test_a_session_that_is_refused_leaves_how_far_the_run_is(data: Path, tmp_path: Path) -> None:
    config = _config(data, tmp_path / "run")
    run_ranks(1, _train_whole, config)
    done = read_heartbeat(tmp_path / "run")
    assert done is not None
    another = tiny_config(data, tmp_path / "run", training={"seed": 7})
    assert "training.seed" in run_ranks(1, _refused, another)
    refused = read_heartbeat(tmp_path / "run")
    assert refused is not None
    assert refused.state == "failed"
    for name in ("step", "run_id", "loss", "last_checkpoint_step"):
        assert getattr(refused, name) == getattr(done, name) is not None


def _train_whole(mesh: Mesh, config: RunConfig) -> None:
    _train(mesh, config, RunWatch(config, mesh.rank, mesh.world_size))


def _refused(mesh: Mesh, config: RunConfig) -> str:
    try:
        _train_whole(mesh, config)
    except UserError as error:
        return str(error)
    return "trained"
