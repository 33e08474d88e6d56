"""Run folders as columns: their names, their settings, and folders that are none."""

import random

import pytest

from pgm_scale.errors import UserError
from pgm_scale.reporting.training_runs import differing, flatten, open_runs, short_names
from tests.reporting.written import GLOBAL_BATCH, LENGTH, record, write_run


def test_names_are_the_shortest_ends_that_differ():
    assert short_names(["/a/runs/x", "/a/runs/y"]) == ["x", "y"]
    assert short_names(["/a/x/run", "/b/x/run", "/c/z"]) == ["a/x/run", "b/x/run", "z"]
    assert short_names(["x/run", "run"]) == ["x/run", "run"]
    assert short_names(["/a/b", "/a/b"]) == ["b", "b"]
    assert short_names(["/"]) == ["/"]


def test_names_of_different_paths_differ():
    generator = random.Random(0)
    for _ in range(200):
        paths = {
            "/" + "/".join(generator.choices("ab", k=generator.randint(1, 4)))
            for _ in range(generator.randint(1, 8))
        }
        names = short_names(sorted(paths))
        assert len(set(names)) == len(paths)
        assert all(path.endswith(name) for path, name in zip(sorted(paths), names, strict=True))


def test_a_run_has_its_settings_and_where_its_records_lie(tmp_path):
    folder = write_run(tmp_path / "one", [record(2), record(4, mfu=0.5)], model__size="pgm-8-8")
    (run,) = open_runs([folder, str(tmp_path / "." / "one")])
    assert (run.label, run.run_id) == ("one", "id-one")
    assert run.settings["model.size"] == "pgm-8-8"
    assert run.settings["data.length_tokens"] == LENGTH
    assert "folder" not in run.settings
    places = run.places(run.records)
    assert places == {"step": [2, 4], "tokens": [2 * GLOBAL_BATCH * LENGTH, 4 * GLOBAL_BATCH * LENGTH]}
    assert [one["step"] for one in run.with_values("mfu")] == [4]


def test_a_round_begins_where_the_number_changes(tmp_path):
    rounds = [0, 0, 1, 1, 2]
    folder = write_run(tmp_path / "a", [record(step + 1, round=number) for step, number in enumerate(rounds)])
    assert [(number, one["step"]) for number, one in open_runs([folder])[0].rounds] == [(1, 3), (2, 5)]
    assert open_runs([write_run(tmp_path / "b", [record(1), record(2)])])[0].rounds == []


def test_differing_settings_are_those_that_not_all_share():
    settings = [{"a": 1, "b": 2, "c": [1]}, {"a": 1, "b": 3, "c": [1]}, {"a": 1, "b": 2, "c": [1], "d": 0}]
    assert differing(settings) == ["b", "d"]
    assert differing(settings[:1]) == []
    assert differing(settings[::-1]) == ["b", "d"]
    assert differing([]) == []
    assert flatten({"a": {"b": 1, "c": {"d": [2]}}, "e": None}) == {"a.b": 1, "a.c.d": [2], "e": None}


def test_what_is_no_run_is_an_error_of_one_line(tmp_path):
    good = write_run(tmp_path / "good", [record(1)])
    (tmp_path / "other").mkdir()
    empty = write_run(tmp_path / "empty", b"")
    absent = write_run(tmp_path / "absent", b"")
    (tmp_path / "absent" / "metrics.jsonl").unlink()
    cut = write_run(tmp_path / "cut", b'{"step": 1, "lo')
    damaged = write_run(tmp_path / "damaged", b'{"step"\n{"step": 2}\n')
    lost = write_run(tmp_path / "lost", [record(1)])
    (tmp_path / "lost" / "run.json").write_text("{")
    for folder, message in (
        (str(tmp_path / "nowhere"), "is not a run folder"),
        (str(tmp_path / "other"), "is not a run folder"),
        (empty, "has no metrics yet"),
        (absent, "has no metrics yet"),
        (cut, "has no metrics yet"),
        (damaged, "line 1 is damaged"),
        (lost, "run.json is damaged"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            open_runs([good, folder])
        assert folder in str(caught.value)
        assert "\n" not in str(caught.value)
