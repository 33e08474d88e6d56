"""Cancelling the jobs of a run, and those that would wait for them for ever."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from launchers.records import Launched
from launchers.slurm import JobView, cancel_jobs, needed_jobs, show_jobs
from launchers.status import view_of


@dataclass(frozen=True)
class Cancellation:
    """One job that is to be cancelled; a dependent is not among those that were asked for."""

    job_id: str
    name: str
    state: str
    is_dependent: bool


def plan_cancellation(launches: Sequence[Launched]) -> list[Cancellation]:
    """The waiting and running ones of these jobs, and what waits for their success; the newest first.

    Raises:
        UserError: no Slurm here, or it does not answer.
    """
    views = show_jobs(launched.record.job_id for launched in launches)
    ours = [view_of(launched.record, views) for launched in launches]
    active = {view.id: view for view in ours if view is not None and not view.has_ended}
    if not active:
        return []
    dependents = show_jobs(dependents_of(active, needed_jobs()))
    found: dict[str, JobView] = {
        **active,
        **{id: view for id, view in dependents.items() if not view.has_ended},
    }
    planned = [Cancellation(id, view.name, view.state, id not in active) for id, view in found.items()]
    return sorted(planned, key=lambda job: _order(job.job_id), reverse=True)


def dependents_of(ids: Iterable[str], needed: Mapping[str, tuple[str, ...]]) -> list[str]:
    """The jobs that need one of these, those that need them, and so on.

    Args:
        needed: of `needed_jobs`; an array's id stands for all its jobs.
    """
    cancelled = {name for id in ids for name in (id, _array(id))}
    found: list[str] = []
    grows = True
    while grows:
        new = [id for id, others in needed.items() if id not in cancelled and cancelled.intersection(others)]
        found += new
        cancelled.update(name for id in new for name in (id, _array(id)))
        grows = bool(new)
    return found


def cancel(jobs: Sequence[Cancellation]) -> Iterator[str]:
    """Cancel them, the waiting ones first, as the end of a running one may start them; a line for each."""
    waiting = [job for job in jobs if job.state == "PENDING"]
    running = [job for job in jobs if job.state != "PENDING"]
    for group in (waiting, running):
        cancel_jobs(job.job_id for job in group)
        for job in group:
            why = ", which waits for it" if job.is_dependent else ""
            then = "; a training saves before it ends" if job.state == "RUNNING" else ""
            yield f"cancelled job {job.job_id} ({job.name}, {job.state}){why}{then}"


def _array(job_id: str) -> str:
    return job_id.partition("_")[0]


def _order(job_id: str) -> tuple[int, int]:
    array, _, index = job_id.partition("_")
    return int(array), int(index or 0)
