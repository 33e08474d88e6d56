"""`pgm-scale launch status`, `logs` and `cancel`."""

from __future__ import annotations

import argparse
import sys

from pgm_scale.cli.arguments import positive


def add_status_commands(actions: argparse._SubParsersAction) -> None:
    _add_status(actions)
    _add_logs(actions)
    _add_cancel(actions)


def _add_status(actions: argparse._SubParsersAction) -> None:
    parser = actions.add_parser(
        "status",
        help="how launched jobs are",
        allow_abbrev=False,
        description="What Slurm says of the jobs, and how far their runs are; of a job that Slurm has forgotten, "
        "what it left behind. Without RUN: the newest job of each run below ./runs and of each command below "
        "./jobs, and all that go on.",
    )
    parser.add_argument(
        "runs", metavar="RUN", nargs="*", help="run folder, its name below ./runs, or a job id"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.set_defaults(run=_status)


def _add_logs(actions: argparse._SubParsersAction) -> None:
    parser = actions.add_parser(
        "logs",
        help="what a job says",
        allow_abbrev=False,
        description="The last lines of a job's output; the paths go to stderr. A requeued job goes on in them.",
    )
    parser.add_argument("target", metavar="RUN", help="run folder, its name below ./runs, or a job id")
    parser.add_argument("--rank", metavar="N", type=int, default=0, help="of the job's tasks (default 0)")
    parser.add_argument("--job", metavar="ID", help="of the run's jobs (default: the newest with a log)")
    parser.add_argument("--lines", metavar="N", type=positive, default=40, help="of each file (default 40)")
    parser.add_argument(
        "--follow",
        action="store_true",
        help="go on until the job has ended, through requeues; Ctrl-C leaves it",
    )
    parser.set_defaults(run=_logs)


def _add_cancel(actions: argparse._SubParsersAction) -> None:
    parser = actions.add_parser(
        "cancel",
        help="cancel jobs, and those that wait for them",
        allow_abbrev=False,
        description="Cancels the waiting and running jobs of a run and the jobs that would wait for them in vain. "
        "A running training saves first, if the cluster's KillWait leaves it the time; it is not requeued.",
    )
    parser.add_argument("target", metavar="RUN", help="run folder, its name below ./runs, or a job id")
    parser.add_argument("--job", metavar="ID", help="only this one of the run's jobs, and what waits for it")
    parser.set_defaults(run=_cancel)


def _status(options: argparse.Namespace) -> None:
    from launchers.records import find_launches
    from launchers.slurm import show_jobs
    from launchers.status import job_statuses, worth_showing
    from launchers.status_table import print_json, print_table
    from pgm_scale.errors import UserError

    launches = find_launches(options.runs)
    if not options.runs:
        launches = worth_showing(launches)
    views = None
    try:
        views = show_jobs(launched.record.job_id for launched in launches)
    except UserError as error:
        print(f"warning: {error}; what follows is from the jobs' own files", file=sys.stderr)
    statuses = job_statuses(launches, views)
    if options.json:
        print_json(statuses)
    elif statuses:
        print_table(statuses)
    else:
        print("no launched jobs below ./runs and ./jobs", file=sys.stderr)


def _logs(options: argparse.Namespace) -> None:
    from launchers.logs import LogTail, choose_job, follow, job_has_ended
    from launchers.records import find_launches, of_job

    launches = of_job(find_launches([options.target]), options.job, options.target)
    launched = choose_job(launches, options.rank, options.follow)
    tail = LogTail(launched, options.rank, options.lines)
    for path in tail.paths:
        print(path, file=sys.stderr)
    try:
        tail.print_new()
        if options.follow:
            follow(tail, lambda: job_has_ended(launched))
    except KeyboardInterrupt:
        pass


def _cancel(options: argparse.Namespace) -> None:
    from launchers.cancelling import cancel, plan_cancellation
    from launchers.records import find_launches, of_job

    launches = of_job(find_launches([options.target]), options.job, options.target)
    jobs = plan_cancellation(launches)
    if not jobs:
        print(f"nothing to cancel: no job of {options.target} waits or runs", file=sys.stderr)
    for line in cancel(jobs):
        print(line)
