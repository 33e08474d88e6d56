"""Which numbers of training runs are drawn, and where."""

import random
from typing import get_args

import pytest

from pgm_scale.config import ObjectiveConfig
from pgm_scale.reporting.panels import smoothed
from pgm_scale.reporting.training_panels import last_cross_entropies, training_panels
from pgm_scale.reporting.training_runs import open_runs
from tests.reporting.written import GLOBAL_BATCH, LENGTH, record, write_run


@pytest.fixture
def panels(tmp_path):
    def build(*runs, **settings):
        folders = [
            write_run(tmp_path / f"run{number}", records, **settings) for number, records in enumerate(runs)
        ]
        return {panel.key: panel for panel in training_panels(open_runs(folders))}

    return build


def test_smoothing_is_a_mean_of_neighbours_within_a_round():
    generator = random.Random(0)
    values = [generator.random() for _ in range(137)]
    for breaks in ([], [40], [1, 2, 136]):
        bounds = [0, *breaks, len(values)]
        for index, mean in enumerate(smoothed(values, breaks)):
            start = max(bound for bound in bounds if bound <= index)
            stop = min(bound for bound in bounds if bound > index)
            near = [values[i] for i in range(start, stop) if abs(i - index) <= 2]
            assert mean == pytest.approx(sum(near) / len(near))
    assert smoothed([3.0, 1.0]) == [3.0, 1.0]
    assert smoothed([]) == []


def test_a_text_run_has_its_panels_and_every_number(panels):
    records = [record(step, mfu=0.4) for step in range(1, 6)]
    records[1] |= {
        "validation_nll": 2.0,
        "validation_perplexity": 8.0,
        "validation_perplexity_standard_error": 0.4,
    }
    found = panels(records)
    assert set(found) == {
        "training_loss",
        "validation_loss",
        "validation_perplexity",
        "gradient_norm",
        "learning_rate",
        "throughput",
        "mfu",
    }
    (line,) = found["training_loss"].lines
    assert line.y == [one["loss_mean"] for one in records]
    assert line.x["step"] == [1, 2, 3, 4, 5]
    assert line.x["tokens"] == [step * GLOBAL_BATCH * LENGTH for step in range(1, 6)]
    assert found["training_loss"].y_axis.label == "nats per token"
    (perplexity,) = found["validation_perplexity"].lines
    assert (perplexity.x["step"], perplexity.y, perplexity.error) == ([2], [8.0], [0.4])
    (loss,) = found["validation_loss"].lines
    assert (loss.y, loss.error) == ([2.0], [pytest.approx(0.05)])  # d log(ppl) = d ppl / ppl


def test_a_vq_run_has_its_codes_and_no_perplexity(panels):
    records = [
        record(step, codebook_usage=0.5, codebook_perplexity=10.0 + step, validation_loss=0.1 * step)
        for step in (1, 2)
    ]
    records[1]["validation_loss_standard_error"] = 0.01
    found = panels(records, objective__kind="vq")
    assert "validation_perplexity" not in found
    assert found["training_loss"].y_axis.label == "loss"
    assert found["validation_loss"].lines[0].error == [None, 0.01]
    assert found["codebook_perplexity"].lines[0].y == [11.0, 12.0]
    assert found["codebook_usage"].lines[0].y == [0.5, 0.5]


def test_rounds_of_a_distillation_are_marked_and_not_smoothed_over(panels):
    records = [
        record(step, round=(step - 1) // 60, loss_mean=float((step - 1) // 60)) for step in range(1, 121)
    ]
    found = panels(records, objective__kind="sdtt", objective__divergence="forward_kl")
    panel = found["training_loss"]
    assert [(mark.label, mark.x) for mark in panel.marks] == [
        ("round 1", {"step": 61.0, "tokens": 61.0 * GLOBAL_BATCH * LENGTH})
    ]
    raw, mean = panel.lines
    assert raw.faint
    assert not mean.faint
    assert mean.y == raw.y == [0.0] * 60 + [1.0] * 60
    assert panel.y_axis.label == "forward kl"


@pytest.mark.parametrize("kind", [section.kind for section in get_args(ObjectiveConfig)])
def test_every_objective_has_the_unit_of_its_loss(panels, kind):
    divergence = {"objective__divergence": "tvd"} if kind == "sdtt" else {}
    unit = panels([record(1)], objective__kind=kind, **divergence)["training_loss"].y_axis.label
    assert unit == {"vq": "loss", "sdtt": "tvd"}.get(kind, "nats per token")


def test_losses_of_different_units_have_panels_of_their_own(tmp_path):
    kinds = ("pgm", "sdtt", "autoregressive")
    runs = open_runs(
        [
            write_run(tmp_path / kind, [record(1)], objective__kind=kind, objective__divergence="tvd")
            for kind in kinds
        ]
    )
    found = {panel.key: panel for panel in training_panels(runs)}
    assert "training_loss" not in found
    nats, divergence = found["training_loss_nats_per_token"], found["training_loss_tvd"]
    assert [(line.label, line.color) for line in nats.lines] == [("pgm", 0), ("autoregressive", 2)]
    assert [(line.label, line.color) for line in divergence.lines] == [("sdtt", 1)]
    assert (nats.title, nats.y_axis.label) == ("Training loss, nats per token", "nats per token")
    assert divergence.y_axis.label == "tvd"


def test_one_mask_fraction_is_no_curve(panels):
    runs = [[record(1, cross_entropy_by_mask_fraction=means)] for means in ([3.0, None], [3.0, 4.0])]
    (line,) = panels(*runs)["cross_entropy_by_mask_fraction"].lines
    assert (line.label, line.color) == ("run1", 1)


def test_runs_share_a_panel_each_in_its_colour(panels):
    found = panels([record(1)], [record(1, loss_mean=None, mfu=0.1)], [record(1)])
    assert [line.color for line in found["training_loss"].lines] == [0, 2]
    assert [line.label for line in found["mfu"].lines] == ["run1"]
    assert [line.color for line in found["mfu"].lines] == [1]


def test_numbers_that_are_none_are_left_out(panels):
    found = panels([record(1), record(2, loss_mean=float("nan"), gradient_norm="x", samples=None), record(3)])
    assert found["training_loss"].lines[0].x["step"] == [1, 3]
    assert found["gradient_norm"].lines[0].x["step"] == [1, 3]
    assert found["throughput"].lines[0].x["tokens"][1] is None


def test_cross_entropies_are_means_over_the_last_tenth():
    records = [record(step) for step in range(1, 41)]
    for one in records[:30]:
        one["cross_entropy_by_mask_fraction"] = [9.0, None, float(one["step"])]
    assert last_cross_entropies(records) == [9.0, None, (28 + 29 + 30) / 3]
    assert last_cross_entropies(records[30:]) == []
