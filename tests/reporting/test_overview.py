"""The demo's picture."""

from pathlib import Path

from pgm_scale.reporting.overview import plot_curves


def test_curves_are_drawn_also_where_values_are_missing(tmp_path: Path) -> None:
    records = [
        {"step": step, "loss_mean": 1.0, "cross_entropy_by_mask_fraction": [None, 1.0]}
        for step in range(1, 4)
    ]
    records[-1]["validation_nll"] = 1.0
    plot_curves(records, tmp_path / "curves.png", "title", unigram_nll=2.0, resumed_at_step=2)
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
