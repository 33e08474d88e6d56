"""Stand-ins for scontrol, squeue and scancel that answer from files, in the words of Slurm 22.05."""

import stat
from pathlib import Path

import pytest

from launchers.records import LaunchRecord, append_launches

_SCONTROL = """#!/bin/bash
echo "$@" >> {folder}/calls
failed=0
while read -r action job id; do
    echo "scontrol: $action $job $id"
    if [ "$action" = update ]; then echo "$job $id" >> {folder}/updated; continue; fi
    if [ -e {folder}/jobs/"$id" ]; then cat {folder}/jobs/"$id"
    else echo "slurm_load_jobs error: Invalid job id specified" >&2; failed=1; fi
done
exit $failed
"""
_SQUEUE = """#!/bin/bash
cat {folder}/waiting
"""
_SCANCEL = """#!/bin/bash
echo "$@" >> {folder}/cancelled
"""

# What scontrol prints of a job, in one line.
_LINE = (
    "JobId={number}{array} JobName={name} UserId=user(1000) GroupId=user(1000) MCS_label=N/A "
    "Priority=4294901759 Nice=0 Account=(null) QOS=(null) JobState={state} Reason={reason} "
    "Dependency={dependency} Requeue=1 Restarts={restarts} BatchFlag=1 Reboot=0 ExitCode={exit} "
    "RunTime={run} TimeLimit={limit} TimeMin=N/A SubmitTime=2026-11-22T15:29:30 "
    "EligibleTime=2026-11-22T15:29:30 AccrueTime=2026-11-22T15:29:30 StartTime={start} EndTime={end} "
    "Deadline=N/A SuspendTime=None SecsPreSuspend=0 LastSchedEval=2026-11-22T15:29:30 "
    "Scheduler=Backfill Partition=main AllocNode:Sid=localhost:25814 ReqNodeList=(null) "
    "ExcNodeList=(null) NodeList={node_list} BatchHost=node1 NumNodes={nodes} NumCPUs=4 NumTasks=4 "
    "CPUs/Task=1 ReqB:S:C:T=0:0:*:* TRES=cpu=4,node=2,billing=4 Socks/Node=* "
    "NtasksPerN:B:S:C=2:0:*:* CoreSpec=* MinCPUsNode=2 MinMemoryNode=0 MinTmpDiskNode=0 "
    "Features=(null) DelayBoot=00:00:00 OverSubscribe=OK Contiguous=0 Licenses=(null) Network=(null) "
    "Command={command} WorkDir=/home/user StdErr={stdout} StdIn=/dev/null StdOut={stdout} Power= "
)


def job_line(
    number: int | str,
    state: str = "RUNNING",
    *,
    name: str = "owt",
    array: str = "",
    reason: str = "None",
    dependency: str = "(null)",
    restarts: int = 0,
    exit: str = "0:0",
    run: str = "00:00:06",
    limit: str = "00:10:00",
    start: str = "2026-11-22T15:29:30",
    end: str = "2026-11-22T15:39:30",
    node_list: str = "node[1-2]",
    nodes: str = "2",
    command: str = "/home/user/runs/owt/jobs/12_submission.sh",
    stdout: str = "/home/user/runs/owt/jobs/12_0_log.out",
) -> str:
    return _LINE.format(**locals())


class FakeSlurm:
    """Slurm's programs first on PATH; `jobs` sets what they know."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._folder = folder
        (folder / "jobs").mkdir(parents=True)
        programs = folder / "bin"
        programs.mkdir()
        for name, text in (("scontrol", _SCONTROL), ("squeue", _SQUEUE), ("scancel", _SCANCEL)):
            self.program(name, text.format(folder=folder))
        self.waiting("")
        monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")

    def program(self, name: str, text: str) -> None:
        path = self._folder / "bin" / name
        path.write_text(text)
        path.chmod(path.stat().st_mode | stat.S_IXUSR)

    def knows(self, id: int | str, *lines: str) -> None:
        (self._folder / "jobs" / str(id)).write_text("".join(line + "\n" for line in lines))

    def waiting(self, text: str) -> None:
        (self._folder / "waiting").write_text(text)

    @property
    def calls(self) -> int:
        """Of scontrol, so far."""
        path = self._folder / "calls"
        return len(path.read_text().splitlines()) if path.exists() else 0

    @property
    def updated(self) -> list[str]:
        path = self._folder / "updated"
        return path.read_text().splitlines() if path.exists() else []

    @property
    def cancelled(self) -> list[list[str]]:
        """The ids of each call of scancel."""
        path = self._folder / "cancelled"
        return [line.split() for line in path.read_text().splitlines()] if path.exists() else []


def launch_record(jobs: Path, job_id: str, **changes: object) -> LaunchRecord:
    values: dict = {
        "job_id": job_id,
        "name": "owt",
        "command": ("train", "owt.yaml"),
        "run_folder": str(jobs.parent),
        "logs": str(jobs / f"{job_id}_*_log.*"),
        "sbatch": str(jobs / f"{job_id}_submission.sh"),
        "cluster": "configs/clusters/h100-8x.yaml",
    }
    return LaunchRecord(**(values | changes))


def add_launch(jobs: Path, job_id: str, **changes: object) -> LaunchRecord:
    record = launch_record(jobs, job_id, **changes)
    append_launches(jobs, [record])
    return record
