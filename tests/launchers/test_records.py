"""The list of launched jobs: whole lines whatever happens, and found by run, name, folder or id."""

import json
import multiprocessing
from pathlib import Path

import pytest

from launchers.records import LAUNCHES_NAME, append_launches, find_launches, of_job, read_launches
from pgm_scale.errors import UserError
from tests.launchers.fake_slurm import add_launch, launch_record


def _ids(launches: list) -> list[str]:
    return [launched.record.job_id for launched in launches]


def test_round_trip(tmp_path: Path) -> None:
    jobs = tmp_path / "runs" / "owt" / "jobs"
    records = [
        launch_record(jobs, "12"),
        launch_record(jobs, "18_3", run_folder=None, after=("12", "13"), name='"é\n'),
    ]
    append_launches(jobs, records[:1])
    append_launches(jobs, records[1:])
    assert [launched.record for launched in read_launches(jobs)] == records
    lines = [json.loads(line) for line in (jobs / LAUNCHES_NAME).read_text().splitlines()]
    assert [line["array_index"] for line in lines] == [None, 3]


def test_lines_that_cannot_be_read_are_left_out(tmp_path: Path) -> None:
    add_launch(tmp_path, "1")
    path = tmp_path / LAUNCHES_NAME
    whole = path.read_bytes()
    path.write_bytes(
        whole + b'[1]\nnull\n{"job_id": 2}\n\xff\xfe\n' + whole.replace(b'"1"', b'["x"]') + whole[:40]
    )
    assert _ids(read_launches(tmp_path)) == ["1"]
    add_launch(tmp_path, "2")  # after the line that was cut, not in it
    assert _ids(read_launches(tmp_path)) == ["1", "2"]


def test_a_record_of_a_later_version_is_read(tmp_path: Path) -> None:
    add_launch(tmp_path, "1")
    path = tmp_path / LAUNCHES_NAME
    path.write_text(json.dumps({**json.loads(path.read_text()), "color": "red"}) + "\n")
    assert _ids(read_launches(tmp_path)) == ["1"]


def _append_many(folder: Path, start: int) -> None:
    for job in range(start, start + 50):
        add_launch(folder, str(job))


def test_writers_at_once_do_not_mix_their_lines(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_append_many, args=(tmp_path, start)) for start in (0, 100, 200)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    expected = sorted(str(start + job) for start in (0, 100, 200) for job in range(50))
    assert sorted(_ids(read_launches(tmp_path))) == expected
    assert len((tmp_path / LAUNCHES_NAME).read_text().splitlines()) == 150


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", refuse)
    add_launch(tmp_path, "1")
    assert _ids(read_launches(tmp_path)) == ["1"]


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "jobs").write_text("a file")
    with pytest.raises(UserError, match="cannot be written"):
        add_launch(tmp_path / "jobs", "1")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two runs, a sweep of two and an evaluation, launched one after the other."""
    monkeypatch.chdir(tmp_path)
    add_launch(tmp_path / "runs/owt/jobs", "12", unix_time_s=1.0)
    add_launch(tmp_path / "runs/lm1b/jobs", "13", unix_time_s=3.0)
    for index, name in enumerate(("a", "b")):
        run = str(tmp_path / "runs" / f"sweep-{name}")
        add_launch(tmp_path / "runs/sweep-sweep/jobs", f"18_{index}", run_folder=run, unix_time_s=4.0 + index)
    add_launch(tmp_path / "jobs/eval", "14", run_folder=None, unix_time_s=2.0)
    add_launch(tmp_path / "runs/owt/jobs", "15", unix_time_s=9.0)
    return tmp_path


def test_everything_in_the_order_of_time(here: Path) -> None:
    assert _ids(find_launches()) == ["12", "14", "13", "18_0", "18_1", "15"]


@pytest.mark.parametrize(
    ("word", "ids"),
    [
        ("runs/owt", ["12", "15"]),
        ("runs/owt/", ["12", "15"]),
        ("runs/../runs/owt", ["12", "15"]),
        ("owt", ["12", "15"]),
        ("runs/owt/jobs", ["12", "15"]),
        ("jobs/eval", ["14"]),
        ("eval", ["14"]),
        ("runs/sweep-sweep", ["18_0", "18_1"]),
        ("runs/sweep-b", ["18_1"]),
        ("sweep-a", ["18_0"]),
        ("18", ["18_0", "18_1"]),
        ("18_1", ["18_1"]),
        ("13", ["13"]),
    ],
)
def test_by_run_name_folder_or_id(here: Path, word: str, ids: list[str]) -> None:
    assert _ids(find_launches([word])) == ids


def test_a_run_elsewhere_is_found_by_its_folder(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = here / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert _ids(find_launches([str(here / "runs" / "sweep-b")])) == ["18_1"]
    assert find_launches() == []


def test_several_and_none_twice(here: Path) -> None:
    assert _ids(find_launches(["13", "owt", "lm1b", "12"])) == ["12", "13", "15"]


@pytest.mark.parametrize("word", ["nothing", "99", "", "runs", "/"])
def test_what_was_not_launched_is_refused(here: Path, word: str) -> None:
    with pytest.raises(UserError, match="nothing was launched for it"):
        find_launches([word])


def test_one_job_of_a_run(here: Path) -> None:
    launches = find_launches(["owt", "18"])
    assert _ids(of_job(launches, None, "owt")) == ["12", "18_0", "18_1", "15"]
    assert _ids(of_job(launches, "15", "owt")) == ["15"]
    assert _ids(of_job(launches, "18", "owt")) == ["18_0", "18_1"]
    with pytest.raises(UserError, match="its jobs are 12, 18_0, 18_1, 15"):
        of_job(launches, "13", "owt")
