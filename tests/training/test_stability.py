"""The judge of steps: what is a spike, which data are left out, what is remembered."""

import json
import math
import os
from dataclasses import asdict
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgm_scale.config import StabilityConfig
from pgm_scale.data.order import BatchPlan, data_step
from pgm_scale.errors import UnstableError, UserError
from pgm_scale.sealed import sealed_json
from pgm_scale.training.stability import Instability, RollBack, Stability, read_roll_backs

NOT_FINITE = Instability("non_finite", "the loss is not finite")


def stability(folder: Path, **settings: object) -> Stability:
    path = folder / "roll_backs.json"
    return Stability(StabilityConfig(**settings), path, read_roll_backs(path, "a run"))  # type: ignore[arg-type]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_found_from_the_first_step(tmp_path: Path, bad: float) -> None:
    judge = stability(tmp_path)
    assert judge.judge(1.0, 1.0) is None
    assert judge.judge(bad, 1.0) == NOT_FINITE
    assert judge.judge(1.0, bad) == Instability("non_finite", "the gradient norm is not finite")


def test_a_spike_lies_above_the_steps_before_it(tmp_path: Path) -> None:
    judge = stability(tmp_path, on_spike="skip", spike_history_steps=4, spike_deviations=3.0)
    judge.learnt(1.0, 10.0)
    assert judge.judge(99.0, 99.0) is None  # too few to compare with
    judge.learnt(3.0, 10.5)
    # Mean 2, standard deviation 1.
    assert judge.judge(5.0, 10.0) is None
    found = judge.judge(5.001, 10.0)
    assert found is not None
    assert (found.kind, "loss of 5.001" in found.reason) == ("spike", True)
    found = judge.judge(2.0, 11.1)
    assert found is not None
    assert "gradient norm of 11.1" in found.reason
    assert judge.judge(-50.0, 0.0) is None  # a fall is no spike
    for _ in range(4):
        judge.learnt(100.0, 10.0 + _)
    assert judge.judge(99.0, 10.0) is None  # the old ones are forgotten


def test_without_a_policy_nothing_is_a_spike(tmp_path: Path) -> None:
    judge = stability(tmp_path, spike_history_steps=2)
    for _ in range(4):
        judge.learnt(1.0, 1.0)
    assert judge.judge(1e30, 1e30) is None
    assert judge.state()["history"] == ()


def test_policies(tmp_path: Path) -> None:
    with pytest.raises(
        UnstableError, match=r"the loss is not finite at step 7 on rank 3.*on_non_finite to skip"
    ):
        stability(tmp_path).action(7, NOT_FINITE._replace(where="rank 3"))
    assert stability(tmp_path, on_non_finite="skip").action(7, NOT_FINITE) == "skip"
    judge = stability(tmp_path, on_non_finite="skip", on_spike="roll_back")
    assert judge.action(7, Instability("spike", "the loss")) == "roll_back"


def test_too_many_end_the_run(tmp_path: Path) -> None:
    judge = stability(tmp_path, on_non_finite="skip", most_per_1000_steps=2)
    judge.skipped_steps += [5, 900]
    assert judge.action(1005, NOT_FINITE) == "skip"  # step 5 is long ago
    with pytest.raises(UnstableError, match="after 2 such steps of the last 1000"):
        judge.action(1004, NOT_FINITE)
    judge.roll_backs.append(RollBack(990, 900, (990, 990), "a spike"))
    with pytest.raises(UnstableError, match="most_per_1000_steps is 2"):
        judge.action(1005, NOT_FINITE)


RANGES = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 9)), max_size=6)


@given(RANGES, st.integers(0, 80))
def test_data_of_a_step_are_those_of_the_nth_that_is_not_left_out(
    ranges: list[tuple[int, int]], step: int
) -> None:
    judge = Stability(StabilityConfig(), Path("there is none"))
    judge.roll_backs += [RollBack(0, 0, (first, first + more), "") for first, more in ranges]
    gone = {number for first, more in ranges for number in range(first, first + more + 1)}
    kept = [number for number in range(300) if number not in gone]
    assert data_step(step, judge.left_out) == kept[step]
    plan = BatchPlan(8, 2, 1, 2, judge.left_out)
    assert plan.sample_numbers(step, 1).tolist() == [8 * kept[step] + 6, 8 * kept[step] + 7]


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), max_size=5), st.integers(1, 12))
def test_a_roll_back_changes_nothing_before_its_checkpoint(
    events: list[tuple[int, int]], window_steps: int
) -> None:
    """And the data of the step itself never come again, whatever was left out before."""
    judge = Stability(StabilityConfig(roll_back_data_steps=window_steps), Path("there is none"))
    for checkpoint, later in events:
        step = checkpoint + later
        before = [data_step(number, judge.left_out) for number in range(100)]
        back = judge.roll_back(step, checkpoint, "a spike")
        after = [data_step(number, judge.left_out) for number in range(100)]
        assert before[:checkpoint] == after[:checkpoint]
        assert before[step] not in after
        assert set(before[:step]) - set(after) <= set(range(back.data_steps[0], back.data_steps[1] + 1))
        assert len(set(before[: step + 1]) - set(after)) <= window_steps
        assert after == sorted(set(after))


def test_what_is_remembered(tmp_path: Path) -> None:
    settings = {"on_spike": "skip", "spike_history_steps": 4, "roll_back_data_steps": 2}
    judge = stability(tmp_path, **settings)
    judge.learnt(0.1, 1 / 3)
    judge.learnt(0.7, 5.0)
    judge.skipped_steps.append(3)
    first = judge.roll_back(9, 4, "a spike")
    state = json.loads(json.dumps(judge.state()))
    second = judge.roll_back(11, 4, "another")
    judge.write("a run")  # after the checkpoint that `state` is of
    again = stability(tmp_path, **settings)
    assert again.roll_backs == [first, second]
    again.restore(state, 7)
    assert (again.roll_backs, again.skipped_steps) == ([first, second], [3])
    assert again.state() | {"roll_backs": ()} == judge.state() | {"roll_backs": ()}
    assert [again.judge(loss, 0.0) for loss in (0.3, 1e3)] == [judge.judge(loss, 0.0) for loss in (0.3, 1e3)]
    again.restore(None, 7)  # a checkpoint of an older release
    assert again.skipped_steps == []


@pytest.mark.fault(73)
def test_other_roll_backs_than_the_runs_are_refused(tmp_path: Path) -> None:
    judge = stability(tmp_path)
    judge.roll_back(9, 4, "a spike")
    state = json.loads(json.dumps(judge.state()))
    with pytest.raises(UserError, match=r"roll_backs.json is missing.*write \{\} into it"):
        stability(tmp_path).restore(state, 7)
    (tmp_path / "roll_backs.json").write_text("{}\n")
    judge = stability(tmp_path)
    judge.restore(state, 7)
    assert [back.step for back in judge.roll_backs] == [9]
    judge.write("another run")
    with pytest.raises(UserError, match="it is of run another run, not of a run"):
        stability(tmp_path)
    judge.write("a run")
    with pytest.raises(UserError, match="leaves out data that the checkpoint of step 5 has seen"):
        stability(tmp_path).restore({"roll_backs": []}, 5)
    data = (tmp_path / "roll_backs.json").read_bytes()
    for place in range(len(data)):
        flipped = bytes([*data[:place], data[place] ^ 1, *data[place + 1 :]])
        (tmp_path / "roll_backs.json").write_bytes(flipped)
        with pytest.raises(UserError, match="is damaged"):
            stability(tmp_path)
    (tmp_path / "roll_backs.json").unlink()
    os.mkfifo(tmp_path / "roll_backs.json")
    with pytest.raises(UserError, match="is damaged"):
        stability(tmp_path)


@pytest.mark.fault(73)
def test_roll_backs_to_one_checkpoint_end(tmp_path: Path) -> None:
    judge = stability(tmp_path)
    for _ in range(3):
        judge.check_worth(4, NOT_FINITE)
        judge.roll_back(9, 4, "a spike")
    judge.check_worth(5, NOT_FINITE)
    with pytest.raises(
        UnstableError, match="after 3 roll backs to the checkpoint of step 4: it is not the data"
    ):
        judge.check_worth(4, NOT_FINITE)


@pytest.mark.parametrize(
    "content",
    ["", "[]", '{"roll_backs": []}', "[" * 100_000, "null"]
    + [
        sealed_json({"run_id": "a run", "roll_backs": backs}).decode()
        for backs in (
            3,
            [{"step": 1}],
            [None],
            [asdict(RollBack(1, 0, (3, 2), ""))],
            [asdict(RollBack(1, 0, (0, 10**30), ""))],
        )
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "roll_backs.json").write_text(content)
    with pytest.raises(UserError, match=r"roll_backs.json is damaged: .*restore it, or write"):
        stability(tmp_path)
