"""Memory, processors and limits of this node."""

from pathlib import Path

import pytest

from pgm_scale.preflight.host import cgroup_limit_bytes, host_rows


def _cgroup(folder: Path, limits: dict[str, str]) -> Path:
    for place, limit in limits.items():
        (folder / place).mkdir(parents=True, exist_ok=True)
        (folder / place / "memory.max").write_text(limit + "\n")
    membership = folder / "membership"
    membership.write_text("0::/slurm/job_7/step_0\n")
    (folder / "slurm/job_7/step_0").mkdir(parents=True, exist_ok=True)
    return membership


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({"slurm/job_7": "1000", "slurm/job_7/step_0": "max"}, 1000),
        ({"slurm/job_7": "1000", "slurm/job_7/step_0": "900"}, 900),
        ({"slurm": "max"}, None),
        ({}, None),
    ],
)
def test_the_least_limit_of_the_cgroups_above_counts(
    tmp_path: Path, limits: dict[str, str], expected: int | None
) -> None:
    assert cgroup_limit_bytes(tmp_path, _cgroup(tmp_path, limits)) == expected


def test_no_cgroups_no_limit(tmp_path: Path) -> None:
    assert cgroup_limit_bytes(tmp_path, tmp_path / "absent") is None
    old = tmp_path / "version1"
    old.write_text("5:memory:/slurm\n")
    assert cgroup_limit_bytes(tmp_path, old) is None


def test_what_is_not_enough_is_said_and_what_to_do() -> None:
    statuses = {row.check: row.status for row in host_rows(ranks=1, ranks_here=1)}
    assert statuses.keys() == {"memory", "processors", "open files"}
    assert statuses["open files"] == "ok"
    rows = {row.check: row for row in host_rows(ranks=10**8, ranks_here=10**6)}
    assert rows["open files"].status == "bad"
    assert "ulimit -n" in rows["open files"].to_do
    assert rows["memory"].status == "warning"
