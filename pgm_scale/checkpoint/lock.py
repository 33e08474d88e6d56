"""One run, one writer: a lock file that names its holder, and is recovered when the holder is dead."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
import uuid
from pathlib import Path
from types import TracebackType
from typing import Self

from pgm_scale.errors import UserError
from pgm_scale.files import write_synced
from pgm_scale.holder import Holder

logger = logging.getLogger(__name__)

_OLD_NS = 3_600_000_000_000


class RunLock:
    """Exclusive use of a run folder: `with RunLock(folder): ...`. Linux only (process start times in /proc).

    The lock file is created by a hard link, which is atomic on shared file systems too. Its modification time
    is the heartbeat. A lock found at the start is judged so:

    - the holder ran on this machine and in this process-id namespace: the kernel knows whether it lives;
    - elsewhere (another node, another container, before a reboot): the heartbeat is watched. If it moves, the
      holder lives. If it stands still for `dead_after_s`, the holder is dead. No clocks are compared. A run
      that is requeued to another node after a node failure waits `dead_after_s` at its start.

    Args:
        folder: the run folder; it is created.
        heartbeat_interval_s: how often the holder touches the file.
        dead_after_s: how long a foreign heartbeat must stand still; many times the interval.
    """

    def __init__(
        self, folder: str | Path, heartbeat_interval_s: float = 10.0, dead_after_s: float = 90.0
    ) -> None:
        self.path = Path(folder) / "run.lock"
        self._heartbeat_interval_s = heartbeat_interval_s
        self._dead_after_s = dead_after_s
        self._holder = Holder.here()
        self._stop = threading.Event()
        self._heart: threading.Thread | None = None

    def acquire(self) -> None:
        """Take the lock, which also proves that the folder can be written.

        Raises:
            UserError: another run holds it (named by host, pid and job), or the folder cannot be written.
        """
        ours = self.path.with_name(f".run.lock.{uuid.uuid4().hex}")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_synced(ours, self._holder.to_bytes())
            while not _link(ours, self.path):
                self._evict_dead_holder()
        except OSError as error:
            raise UserError(
                f"the run folder {self.path.parent} cannot be locked ({error.strerror}): "
                "it must be writable, with space left, on a file system with hard links"
            ) from None
        finally:
            with contextlib.suppress(OSError):
                ours.unlink()
        self._remove_leftovers()
        self._stop.clear()
        self._heart = threading.Thread(target=self._beat, name="run-lock-heartbeat", daemon=True)
        self._heart.start()

    def check(self) -> None:
        """Before each commit. Raises: UserError: the lock is not ours any more (we were stopped for long)."""
        if not self._is_ours():
            raise UserError(
                f"this run ({self._holder}) has lost {self.path}: another run took the folder over while "
                "this one was stopped, or the file was deleted; nothing more is saved"
            )

    def release(self) -> None:
        """Give the lock back; harmless when it is lost or was never taken."""
        self._stop.set()
        if self._heart is not None:
            self._heart.join()
            self._heart = None
            try:
                if self._is_ours():
                    self.path.unlink()
            except OSError as error:  # the next run sees that its holder is dead
                logger.warning("cannot remove %s (%s)", self.path, error.strerror)

    def __enter__(self) -> Self:
        self.acquire()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def _evict_dead_holder(self) -> None:
        """Return when the lock that stood in our way is gone; raise if its holder lives."""
        data = _content(self.path)
        if data is None:
            return
        holder = Holder.from_bytes(data)
        if self._lives(holder, data):
            raise UserError(
                f"the run folder {self.path.parent} is in use by another run "
                f"({holder or 'unreadable lock'}); wait for it, stop it, or choose another folder"
            )
        if _content(self.path) != data:
            return
        # Moved aside, not deleted: another starter may have been faster just now, and this be its lock.
        aside = self.path.with_name(f".run.lock.dead.{uuid.uuid4().hex}")
        try:
            os.rename(self.path, aside)
        except FileNotFoundError:
            return
        found = _content(aside)  # None: who has the lock by now has removed it
        if found == data:
            logger.warning("recovered the run lock of a dead process (%s)", holder or "unreadable lock")
        elif found is not None:
            _link(aside, self.path)
        aside.unlink(missing_ok=True)

    def _remove_leftovers(self) -> None:
        """With the lock held: what processes have left that were killed while they took it or gave it back.

        Another starter may be at work here at any time, so what is no dead process's of this machine stays until
        it is an hour old, by the file server's own clock.
        """
        try:
            old_ns = self.path.stat().st_mtime_ns - _OLD_NS
            for path in self.path.parent.glob(f".{self.path.name}.*"):
                content = _read(path)
                holder = Holder.from_bytes(content[0]) if content else None
                is_dead = holder is not None and holder.lives() is False
                if content and (is_dead or content[1] < old_ns):
                    path.unlink(missing_ok=True)
        except OSError as error:
            logger.warning("cannot tidy up after dead processes beside %s (%s)", self.path, error.strerror)

    def _lives(self, holder: Holder | None, data: bytes) -> bool:
        lives = None if holder is None else holder.lives()
        if lives is not None:
            return lives
        first = _read(self.path)
        deadline_s = time.monotonic() + self._dead_after_s
        logger.warning(
            "the run lock is held from elsewhere (%s): watching its heartbeat for up to %g s",
            holder or "unreadable lock",
            self._dead_after_s,
        )
        while first is not None and time.monotonic() < deadline_s:
            time.sleep(min(self._heartbeat_interval_s, max(0.0, deadline_s - time.monotonic())))
            now = _read(self.path)
            if now is None or now[0] != data:
                return False  # released, or recovered by a third run: look again
            if now != first:
                return True
        return False

    def _is_ours(self) -> bool:
        return _content(self.path) == self._holder.to_bytes()

    def _beat(self) -> None:
        while not self._stop.wait(self._heartbeat_interval_s):
            try:
                if self._is_ours():
                    os.utime(self.path)
            except OSError as error:
                logger.warning("the heartbeat of the run lock failed: %s", error)


def _link(source: Path, target: Path) -> bool:
    """Create `target` as a second name of `source`; False when it exists."""
    try:
        os.link(source, target)
    except FileExistsError:
        return False
    return True


def _read(path: Path) -> tuple[bytes, int] | None:
    """Content and heartbeat (ns); None when there is no file. Opening makes NFS ask the server again."""
    try:
        with open(path, "rb") as file:
            return file.read(4096), os.fstat(file.fileno()).st_mtime_ns
    except FileNotFoundError:
        return None


def _content(path: Path) -> bytes | None:
    found = _read(path)
    return found[0] if found else None
