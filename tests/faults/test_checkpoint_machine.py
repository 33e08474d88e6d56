"""Whatever is saved, killed, purged, damaged and resumed in whatever order: the newest good checkpoint is found."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule

from pgm_scale.checkpoint import CheckpointStore
from pgm_scale.errors import UserError
from tests.checkpoint.support import (
    assert_step_is_good,
    fragments_of,
    in_child,
    kill_before_call,
    save_step,
    step_folder,
    whole_tensors,
)


class CheckpointMachine(RuleBasedStateMachine):
    """One run folder and its sessions, each of which begins with a resume and trains from where that leads.

    The model: `good` are the steps that are there for sure; `open` are those that a killed process may have
    committed, or deleted, just before it died.
    """

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.good: set[int] = set()
        self.open: set[int] = set()
        self.damaged: set[int] = set()
        self.step = 0  # of the session's training
        self.verified = 0  # the step that the session has resumed from
        self.store = CheckpointStore(self.folder)
        self.had_any = False

    def teardown(self) -> None:
        shutil.rmtree(self.folder)

    def _committed(self, step: int) -> None:
        self.step, self.had_any = step, True
        self.good.add(step)

    @rule(world_size=st.integers(1, 3))
    def save(self, world_size: int) -> None:
        save_step(self.folder, self.step + 1, world_size)
        self._committed(self.step + 1)

    @rule()
    def save_in_background(self) -> None:
        step = self.step + 1
        tensors = whole_tensors(step)
        assert self.store.start(step, fragments_of(tensors, 0, 1), {"step": step})
        assert self.store.under_way is not None
        self.store.under_way.write.wait_until_copied(lambda _: None)
        for tensor in tensors.values():
            tensor.zero_()
        self.store.finish()
        self._committed(step)

    @rule(point=st.integers(0, 14), in_background=st.booleans())
    def killed_in_a_save(self, point: int, in_background: bool) -> None:
        step = self.step + 1

        def life() -> None:
            kill_before_call(point)
            store, fragments = CheckpointStore(self.folder), fragments_of(whole_tensors(step), 0, 1)
            if in_background:
                store.start(step, fragments, {"step": step})
                store.finish()
            else:
                store.save(step, fragments, {"step": step})

        status, _ = in_child(life)
        if status == 0:
            self._committed(step)
        else:
            self.open.add(step)
        self.resume()

    @rule(saves=st.integers(0, 3), keep_last=st.integers(1, 3), point=st.none() | st.integers(0, 8))
    def save_and_purge(self, saves: int, keep_last: int, point: int | None) -> None:
        """After which what it has kept is still good; killed within it, what it would have deleted is open."""
        for _ in range(saves):
            self.save(1)
        if point is None:
            gone = set(self.store.purge(keep_last))
            assert self.verified not in gone
        else:
            kept = set(self.store.steps()[-keep_last:])
            gone = set(self.store.steps()) - kept

            def life() -> None:
                kill_before_call(point)
                CheckpointStore(self.folder).purge(keep_last)

            in_child(life)
            self.open |= gone
        self.good -= gone
        if point is not None:
            self.resume()

    @rule(data=st.data(), offset=st.integers(0, 1 << 16), mask=st.integers(1, 255))
    @precondition(lambda self: self.good)
    def flip(self, data: Any, offset: int, mask: int) -> None:
        step = data.draw(st.sampled_from(sorted(self.good)))
        path = self._file_of(step, data)
        content = bytearray(path.read_bytes())
        content[offset % len(content)] ^= mask
        path.write_bytes(content)
        self._spoilt(step)

    @rule(data=st.data(), kept=st.none() | st.integers(0, 2000))
    @precondition(lambda self: self.good)
    def cut_or_lose(self, data: Any, kept: int | None) -> None:
        step = data.draw(st.sampled_from(sorted(self.good)))
        path = self._file_of(step, data)
        if kept is None:
            path.unlink()
        else:
            os.truncate(path, min(kept, path.stat().st_size - 1))
        self._spoilt(step)

    def _file_of(self, step: int, data: Any) -> Path:
        return data.draw(st.sampled_from(sorted(step_folder(self.folder, step).iterdir())))

    def _spoilt(self, step: int) -> None:
        self.good.discard(step)
        self.damaged.add(step)

    @rule(content=st.none() | st.binary(max_size=20))
    @precondition(lambda self: self.had_any)
    def lose_the_marker(self, content: bytes | None) -> None:
        path = self.folder / "checkpoints" / "LATEST"
        if content is not None:
            path.write_bytes(content)
        else:
            path.unlink(missing_ok=True)

    @rule(point=st.integers(0, 12))
    def killed_in_a_resume(self, point: int) -> None:
        def life() -> None:
            kill_before_call(point)
            store = CheckpointStore(self.folder)
            store.recover()
            store.newest_verified()

        in_child(life)
        self.resume()

    @rule()
    def resume(self) -> None:
        self.store = CheckpointStore(self.folder)
        self.store.recover()
        try:
            newest = self.store.newest_verified()
        except UserError:
            assert not self.good
            assert self.had_any or self.open
            shutil.rmtree(self.folder)  # as it says: a new run
            self.__init__()  # type: ignore[misc]
            return
        if newest is None:
            assert not self.had_any
            return
        assert newest in self.good | self.open
        assert newest >= max(self.good, default=0)
        assert newest not in self.damaged or newest in self.open
        assert_step_is_good(self.store, newest)
        assert (self.folder / "checkpoints" / "LATEST").read_text().rstrip("\n") == f"step_{newest:08d}"
        assert max(self.store.steps()) == newest, "what is newer is out of the way"
        self.step = self.verified = newest
        # Now it is known which of them there are. Older ones are not looked at, and may be damaged.
        self.good = {s for s in self.good | self.open if s in self.store.steps() and s not in self.damaged}
        self.open, self.had_any = set(), True
        self.damaged = {step for step in self.damaged if step in self.store.steps()}


TestCheckpoints = pytest.mark.fault(1)(pytest.mark.fault(3)(CheckpointMachine.TestCase))
TestCheckpoints.settings = settings(max_examples=30, stateful_step_count=20, deadline=None)
