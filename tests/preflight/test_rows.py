"""Rows of checks that fail or hang, and node names folded as Slurm writes them."""

import re
import threading
from collections.abc import Iterator

from hypothesis import given
from hypothesis import strategies as st

from pgm_scale.errors import UserError
from pgm_scale.holder import node_name
from pgm_scale.preflight.rows import Row, fold_names, guarded, worst


def _expand(folded: str) -> list[str]:
    """What Slurm reads: commas outside of brackets part the groups."""
    names = []
    for prefix, inside in re.findall(r"([^,\[]+)(?:\[([^\]]+)\])?,?", folded):
        if not inside:
            names.append(prefix)
        for part in inside.split(",") if inside else ():
            low, _, high = part.partition("-")
            names += [f"{prefix}{n:0{len(low)}}" for n in range(int(low), int(high or low) + 1)]
    return names


_NAMES = st.builds(
    lambda prefix, number, width: f"{prefix}{number:0{width}}",
    st.sampled_from(["gpu", "rack1-node", "n"]),
    st.integers(0, 120),
    st.integers(1, 4),
)


@given(st.sets(st.one_of(_NAMES, st.sampled_from(["login", "head-a"]))))
def test_folded_names_read_back_as_the_same_set(names: set[str]) -> None:
    assert sorted(_expand(fold_names(names))) == sorted(names)


def test_runs_of_numbers_are_short() -> None:
    assert fold_names(f"gpu{n:03}" for n in range(1, 129)) == "gpu[001-128]"
    assert fold_names(["b7", "a", "b9", "b8", "c01"]) == "a,b[7-9],c01"


def test_a_check_that_fails_is_a_bad_row_and_keeps_what_it_says() -> None:
    def fails(error: Exception) -> Iterator[Row]:
        yield Row("disk", "fine so far")
        raise error

    (row,) = guarded("disk", lambda: fails(UserError("no room;\n  make some")))
    assert (row.check, row.value, row.status) == ("disk", "no room; make some", "bad")
    (row,) = guarded("disk", lambda: fails(PermissionError(13, "Permission denied")))
    assert row.status == "bad"
    assert "Permission denied" in row.value
    assert guarded("disk", lambda: [Row("disk", "fine")]) == (Row("disk", "fine"),)


def test_a_check_that_hangs_ends() -> None:
    forever = threading.Event()

    def hangs() -> list[Row]:
        forever.wait(60)
        return []

    (row,) = guarded("disk", hangs, timeout_s=0.05)
    forever.set()
    assert row.status == "bad"
    assert "no answer" in row.value


def test_the_worst_status_and_the_name_of_the_node() -> None:
    assert worst([]) == "ok"
    assert worst(["ok", "warning", "ok"]) == "warning"
    assert worst(["warning", "bad", "ok"]) == "bad"
    assert node_name({"SLURMD_NODENAME": "node7"}) == "node7"
    assert node_name({}) != ""
