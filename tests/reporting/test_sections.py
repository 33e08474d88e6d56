"""The tables of a report."""

import pytest

from pgm_scale.reporting.evaluations import open_evaluations
from pgm_scale.reporting.sections import last_values, quality_section, settings_section
from pgm_scale.reporting.training_runs import open_runs
from tests.reporting.written import (
    GLOBAL_BATCH,
    LENGTH,
    image_result,
    record,
    text_result,
    write_results,
    write_run,
)


def test_only_settings_that_differ_are_highlighted(tmp_path):
    folders = [
        write_run(tmp_path / "a", [record(1)]),
        write_run(
            tmp_path / "b", [record(1)], training__seed=2, model__dropout=0.1, optimizer__betas=[0.9, 0.95]
        ),
    ]
    section = settings_section(open_runs(folders))
    (table,) = section.tables
    assert table.head == ["setting", "a", "b"]
    marked = [table.rows[index] for index in sorted(table.marked)]
    assert sorted(map(list, marked)) == [
        ["model.dropout", "\N{EM DASH}", "0.1"],
        ["optimizer.betas", "\N{EM DASH}", "[0.9, 0.95]"],
        ["training.seed", "1", "2"],
    ]
    assert [table.rows[index] for index in range(len(table.rows)) if index not in table.marked] == [
        ["folder", *folders]
    ]
    assert section.folded is not None
    title, common = section.folded
    assert ["objective.kind", "pgm"] in common.rows
    assert title == f"{len(common.rows)} settings that all share"


def test_one_run_has_nothing_to_highlight(tmp_path):
    section = settings_section(open_runs([write_run(tmp_path / "a", [record(1)])]))
    assert section.tables[0].marked == frozenset()
    assert section.folded is not None
    assert ["training.seed", "1"] in section.folded[1].rows


def test_last_values_are_those_of_the_last_record_that_has_them(tmp_path):
    records = [record(step, mfu=0.1 * step) for step in (1, 2, 3)]
    for one, value in zip(records, (8.0, 6.0, 7.0), strict=True):
        one |= {"validation_perplexity": value, "validation_perplexity_standard_error": 0.5}
    records.append(record(4, loss_mean=float("nan"), round=2, unix_time_s=0))
    values = last_values(open_runs([write_run(tmp_path / "a", records)])[0])
    assert values["step"] == "4 of 100"
    assert values["training tokens"] == str(4 * GLOBAL_BATCH * LENGTH)
    assert values["training loss, nats per token"] == "5.333"  # of step 3
    assert values["validation perplexity"] == "7 \N{PLUS-MINUS SIGN} 0.5"
    assert values["lowest validation perplexity"] == "6 \N{PLUS-MINUS SIGN} 0.5 at step 2"
    assert values["round"] == "2"
    assert values["tokens/s, median"] == "1,002"
    assert values["MFU, median"] == "20.0%"
    assert values["last record, UTC"] == "1970-01-01 00:00"


@pytest.mark.parametrize("time_s", [1e300, -1e18, "soon", None])
def test_times_of_no_calendar_are_no_bug(tmp_path, time_s):
    run = open_runs([write_run(tmp_path / "a", [record(1, unix_time_s=time_s)])])[0]
    assert last_values(run).get("last record, UTC", "unknown") == "unknown"


def test_text_and_images_have_a_table_each(tmp_path):
    results = [
        text_result(8, 125.0, 12_345.6),
        image_result(4, 5.0, 2.0, 1.0),
        image_result(8, 6.0, 1.0, 2.0),
    ]
    points = open_evaluations([write_results(tmp_path / "a.json", results)], [])
    text, images = quality_section(points, []).tables
    assert text.head[:5] == [
        "model",
        "steps",
        "Generative perplexity, retokenised first chunk",
        "entropy, nats",
        "tokens/s",
    ]
    assert list(text.rows[0])[:5] == ["text", "8", "125", "5.008", "12,346"]
    assert images.head == ["model", "steps", "FID", "images/s a process", "guidance", "file"]
    assert [row[:5] for row in images.rows] == [
        ["images", "4", "5", "2", "1.0"],
        ["images", "8", "6", "1", "2.0"],
    ]
