"""`pgm-scale report` as a user meets it."""

import base64
import json
import os

import pytest

from pgm_scale.cli import main
from tests.reporting.parsed_page import parse
from tests.reporting.written import image_result, record, text_result, write_results, write_run


@pytest.fixture
def runs(tmp_path):
    validation = {
        "validation_nll": 2.0,
        "validation_perplexity": 8.0,
        "validation_perplexity_standard_error": 0.5,
    }
    text = [record(step, cross_entropy_by_mask_fraction=[1.0, 2.0]) for step in range(1, 61)]
    text[-1] |= validation
    resumed = "".join(json.dumps(one) + "\n" for one in [*text[:8], *text[4:12]]) + '{"step": 13, "lo'
    return [
        write_run(tmp_path / "text", text),
        write_run(tmp_path / "going <b>", resumed.encode(), training__seed=2, model__dropout=0.1),
    ]


def test_a_report_of_runs_and_evaluations(runs, tmp_path, capsys):
    evaluations = [
        write_results(tmp_path / "eval.json", [text_result(s, 1000 / s, 1e4 / s) for s in (8, 64)]),
        write_results(tmp_path / "images.json", image_result(8, 5.0, 2.0)),
    ]
    out = tmp_path / "new" / "report"
    assert main(["report", *runs, "--eval", *evaluations, "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"{out / 'report.html'}\n"

    numbers = json.loads((out / "report.json").read_text())
    files = {picture["file"] for picture in numbers["pictures"]}
    assert {path.name for path in out.iterdir()} == files | {"report.html", "report.json"}
    text = (out / "report.html").read_text(encoding="utf-8")
    parsed = parse(text)
    assert parsed.tags.isdisjoint({"b", "script"})
    embedded = {base64.b64decode(src.partition(",")[2]) for src in parsed.attributes["src"]}
    assert embedded == {(out / file).read_bytes() for file in files}
    for shown in ("going <b>", "60 of 100", "8 \N{PLUS-MINUS SIGN} 0.5", "Quality against speed", "images/s"):
        assert shown in parsed.text

    panels = {panel["key"]: panel for panel in numbers["panels"]}
    raw, *_ = panels["training_loss"]["lines"]
    assert raw["faint"]
    assert raw["y"] == [2.0 + 10 / step for step in range(1, 61)]
    going = next(line for line in panels["training_loss"]["lines"] if line["label"] == "going <b>")
    assert going["x"]["step"] == list(range(1, 13))
    perplexity = panels["generative_perplexity_retokenised_first_chunk_against_tokens_s"]["lines"]
    assert [line["label"] for line in perplexity] == ["text"]
    assert perplexity[0]["y"] == [125.0, 1000 / 64]
    assert panels["fid_against_images_s"]["lines"][0]["y"] == [5.0]


def test_evaluations_alone_and_again_over_the_old_ones(tmp_path):
    path = write_results(tmp_path / "eval.json", text_result(8, 9.0, 10.0))
    for _ in range(2):
        assert main(["report", "--eval", path, "--out", str(tmp_path / "out")]) == 0
    assert "Training" not in parse((tmp_path / "out" / "report.html").read_text()).text


def test_bad_input_is_an_error_of_one_line_and_writes_nothing(runs, tmp_path, capsys):
    out, file = tmp_path / "out", tmp_path / "file"
    file.write_text("")
    bad = write_results(tmp_path / "bad.json", {"perplexity": 3})
    for arguments, message in (
        ([], "nothing to report"),
        ([str(tmp_path)], "is not a run folder"),
        ([*runs, "--eval", bad], "bad.json: no quality"),
    ):
        assert main(["report", *arguments, "--out", str(out)]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
        assert not out.exists()
    for place in (file, file / "below"):
        assert main(["report", *runs, "--out", str(place)]) == 2
        assert capsys.readouterr().err.startswith(f"--out {place}")


def test_a_folder_that_cannot_be_written_is_refused(runs, tmp_path, capsys, monkeypatch):
    """By the system's answer, as root may write anywhere."""
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert main(["report", *runs, "--out", str(tmp_path / "out")]) == 2
    assert "cannot be written" in capsys.readouterr().err
