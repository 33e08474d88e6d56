"""Results of evaluations as points, and files that hold none."""

import json

import pytest

from pgm_scale.errors import UserError
from pgm_scale.reporting.evaluations import open_evaluations
from pgm_scale.reporting.quality_panels import quality_labels, quality_panels
from pgm_scale.reporting.training_runs import open_runs
from tests.reporting.written import image_result, record, text_result, write_results, write_run


def test_a_text_result_is_a_point(tmp_path):
    (point,) = open_evaluations([write_results(tmp_path / "a.json", text_result(32, 100.0, 5e3))], [])
    assert (point.label, point.steps, point.speed_name, point.speed) == ("text", 32, "tokens_per_second", 5e3)
    assert point.qualities == {"generative_perplexity.retokenised_first_chunk": 100.0}
    assert point.entropy == pytest.approx(5.032)
    assert point.settings["sampler"] == "pgm_uniform"
    assert point.settings["precision"] == "bf16"  # the model's, not the judge's
    assert point.settings["judge"] == "judge"
    assert "steps" not in point.settings


def test_an_image_result_is_a_point(tmp_path):
    (point,) = open_evaluations([write_results(tmp_path / "a.json", image_result(8, 5.5, 2.0, 3.0))], [])
    assert (point.label, point.steps, point.speed) == ("images", 8, 2.0)
    assert (point.speed_name, point.qualities) == ("images_per_second_per_process", {"fid": 5.5})
    assert point.settings["guidance"] == 3.0
    assert point.settings["count"] == 50_000
    assert point.entropy is None


def test_a_line_has_its_points_by_steps_from_any_files(tmp_path):
    sweep = [text_result(steps, 1000.0 / steps, 1e5 / steps) for steps in (64, 8, 512)]
    files = [
        write_results(tmp_path / "sweep.json", sweep),
        write_results(tmp_path / "one.json", text_result(16, 60.0, 6e3)),
    ]
    points = open_evaluations([*files, files[0]], [])
    perplexity, entropy = quality_panels(points, [])
    (line,) = perplexity.lines
    assert line.point_labels == ["8", "16", "64", "512"]
    assert line.x["tokens_per_second"] == [1e5 / 8, 6e3, 1e5 / 64, 1e5 / 512]
    assert line.y == [125.0, 60.0, 1000 / 64, 1000 / 512]
    assert perplexity.x_axes[0].log
    assert perplexity.y_axis.log
    assert entropy.lines[0].y == [pytest.approx(5 + steps / 1000) for steps in (8, 16, 64, 512)]


def test_settings_that_differ_make_and_name_lines(tmp_path):
    results = [image_result(steps, 5.0, 1.0, guidance) for guidance in (0.0, 2.0) for steps in (8, 4)]
    (panel,) = quality_panels(open_evaluations([write_results(tmp_path / "a.json", results)], []), [])
    assert [line.label for line in panel.lines] == ["images, guidance 0.0", "images, guidance 2.0"]
    assert [line.point_labels for line in panel.lines] == [["4", "8"], ["4", "8"]]
    assert [line.color for line in panel.lines] == [0, 1]


def test_an_evaluation_of_a_run_has_its_name_and_colour(tmp_path):
    runs = open_runs([write_run(tmp_path / name, [record(1)]) for name in ("first", "second", "images")])
    mine = text_result(8, 9.0, 10.0, run="elsewhere/moved", run_id="id-second")
    other = text_result(8, 9.0, 10.0, run="b/first", run_id="another")
    points = open_evaluations([write_results(tmp_path / "a.json", [mine, other])], runs)
    assert [point.label for point in points] == ["second", "b/first"]  # no name of a run that it is not
    panel = quality_panels(points, [run.label for run in runs])[0]
    assert [line.color for line in panel.lines] == [1, 3]


def _without(result, *keys):
    for key in keys:
        result.get("generative_perplexity", result).pop(key)
    return result


@pytest.mark.parametrize(
    ("result", "missing"),
    [
        ({"run": "r", "perplexity": 3.0}, "no quality"),
        ([[1], 2, {}], "no quality"),
        (None, "no quality"),
        (_without(text_result(8, 9.0, 10.0), "retokenised_first_chunk"), "no quality"),
        (text_result(8, float("nan"), 10.0), "no quality"),
        (text_result(8, -1.0, 10.0), "no quality"),
        (_without(text_result(8, 9.0, 10.0), "tokens_per_second"), "no speed"),
        (text_result(8, 9.0, 0.0), "no speed"),
        (_without(text_result(8, 9.0, 10.0), "steps", "sampler_settings"), "no number of sampling steps"),
        (_without(image_result(8, 9.0, 10.0), "sampler"), "no number of sampling steps"),
        (_without(image_result(8, 9.0, 10.0), "images_per_second_per_process"), "no speed"),
    ],
)
def test_what_is_missing_is_named_with_the_file(tmp_path, result, missing):
    path = write_results(tmp_path / "bad.json", result)
    with pytest.raises(UserError, match=f"bad.json: {missing}") as caught:
        open_evaluations([path], [])
    assert "\n" not in str(caught.value)


def test_what_is_no_json_is_an_error_of_one_line(tmp_path):
    path = tmp_path / "bad.json"
    for content in (
        b"",
        b"{",
        b"\xff\xfe",
        b"[" * 100_000,
        json.dumps([1]).encode()[:-1],
        b'{"a":' * 900 + b"1" + b"}" * 900,
    ):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"bad.json: ") as caught:
            open_evaluations([str(path)], [])
        assert "\n" not in str(caught.value)
    for place in (tmp_path / "nowhere.json", tmp_path):
        with pytest.raises(UserError, match="cannot be read"):
            open_evaluations([str(place)], [])


def test_forms_of_generative_perplexity_have_their_names():
    title, _ = quality_labels("generative_perplexity.retokenised_first_chunk")
    assert title == "Generative perplexity, retokenised first chunk"
    assert quality_labels("generative_perplexity")[0] == "Generative perplexity"
    assert quality_labels("light_distance")[1] == "distance (not FID)"
