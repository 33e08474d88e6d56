"""`pgm-scale report`: read runs and evaluations, draw what they have, write a folder."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pgm_scale.errors import UserError
from pgm_scale.files import atomic_write_bytes, finite
from pgm_scale.reporting.drawing import draw
from pgm_scale.reporting.evaluations import Evaluation, open_evaluations
from pgm_scale.reporting.page import Picture, page
from pgm_scale.reporting.panels import Panel
from pgm_scale.reporting.quality_panels import quality_panels
from pgm_scale.reporting.sections import quality_section, settings_section, training_section
from pgm_scale.reporting.training_panels import training_panels
from pgm_scale.reporting.training_runs import TrainingRun, open_runs


def report(folders: Sequence[str], evaluation_paths: Sequence[str], out: str) -> Path:
    """Write `report.html`, its pictures as PNG, and `report.json` with every number in them; the page's path.

    Raises:
        UserError: nothing to draw, a bad run or evaluation, or a folder that cannot be written.
    """
    if not folders and not evaluation_paths:
        raise UserError("nothing to report: give the folders of runs, or --eval FILE.json, or both")
    runs = open_runs(folders)
    points = open_evaluations(evaluation_paths, runs)
    folder = _writable(out)
    training = _pictures(training_panels(runs))
    quality = _pictures(quality_panels(points, [run.label for run in runs]))
    sections = [training_section(runs, training), settings_section(runs)] if runs else []
    if points:
        sections.insert(len(sections) // 2, quality_section(points, quality))
    names = dict.fromkeys([run.label for run in runs] + [point.label for point in points])
    title = f"pgm-scale report: {', '.join(names)}"
    subtitle = f"{_counted(len(runs), 'training run')}, {_counted(len(points), 'evaluation')}"
    numbers = json.dumps(finite(_numbers(runs, points, training + quality)), indent=1, default=str) + "\n"
    for picture in training + quality:
        _write(folder / picture.name, picture.png)
    _write(folder / "report.json", numbers.encode())
    _write(folder / "report.html", page(title, subtitle, sections).encode())
    return folder / "report.html"


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _writable(out: str) -> Path:
    folder = Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out}: {error.strerror}; give another folder") from None
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"--out {out} cannot be written; give another folder")
    return folder


def _pictures(panels: Sequence[Panel]) -> list[Picture]:
    """A panel of several x axes has them in its files' names."""
    return [
        Picture(
            panel,
            axis.key,
            f"{panel.key}_over_{axis.key}.png" if len(panel.x_axes) > 1 else f"{panel.key}.png",
            draw(panel, axis),
        )
        for panel in panels
        for axis in panel.x_axes
    ]


def _numbers(
    runs: Sequence[TrainingRun], points: Sequence[Evaluation], pictures: Sequence[Picture]
) -> dict[str, Any]:
    panels = {picture.panel.key: picture.panel for picture in pictures}
    return {
        "runs": [
            {
                "label": run.label,
                "folder": run.folder,
                "run_id": run.run_id,
                "settings": run.settings,
                "last_record": run.records[-1],
            }
            for run in runs
        ],
        "evaluations": [dataclasses.asdict(point) for point in points],
        "panels": [dataclasses.asdict(panel) for panel in panels.values()],
        "pictures": [
            {"file": picture.name, "panel": picture.panel.key, "x_axis": picture.axis_key}
            for picture in pictures
        ],
    }


def _write(path: Path, data: bytes) -> None:
    try:
        atomic_write_bytes(path, data)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; give another --out") from None
