"""The progress bars of the preparation that this process runs, for the passes over the input far below it.

Workers import this through the sources, so it does not import rich.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from rich.progress import Progress

_Item = TypeVar("_Item")
_current: ContextVar[Progress | None] = ContextVar("progress", default=None)


@contextmanager
def showing(progress: Progress) -> Iterator[Progress]:
    """Show `progress`, also what `tracked` adds to it."""
    token = _current.set(progress)
    try:
        with progress:
            yield progress
    finally:
        _current.reset(token)


def tracked(items: Iterable[_Item], description: str, total: int | None = None) -> Iterator[_Item]:
    """The items, counted by a bar of their own where one is shown; `total` None is unknown until the end."""
    progress = _current.get()
    if progress is None:
        yield from items
        return
    task = progress.add_task(description, total=total)
    yield from progress.track(items, total=total, task_id=task)
    progress.update(task, total=progress.tasks[progress.task_ids.index(task)].completed)
