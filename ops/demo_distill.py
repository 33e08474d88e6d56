"""`make demo-distill`: a small PGM distilled in five rounds, judged by a small AR model, exported and drawn.

The text is that of `make demo` in pieces of a few letters (512 of them): tokens depend on their neighbours, as
those of a large model of long texts do. A teacher whose tokens hardly do leaves nothing to distil: see
ops/bench/LOG.md.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

from ops.demo_tools import run_command
from pgm_scale import config as configuration
from pgm_scale.reporting.metrics_file import read_metrics

ROOT = Path(__file__).resolve().parent.parent
FOLDER = Path(".demo-distill")
TEACHER, STUDENT, JUDGE = (FOLDER / name for name in ("teacher", "student", "judge"))
CONFIG = Path("configs/demo_sdtt.yaml")
STEPS = (4, 8, 16, 64)  # of sampling, at which both are judged
PROMISED_STEPS, MOST_ENTROPY_LOST = 8, 0.15
SAMPLES = 1024
_BARS = "▁▂▃▄▅▆▇█"


def main() -> int:
    started_s = time.monotonic()
    os.chdir(ROOT)
    shutil.rmtree(FOLDER, ignore_errors=True)
    run_command("prepare", "python-docs", "--tokenizer", "train:bpe:512", "--output", str(FOLDER / "data"))
    run_command("train", "configs/demo_teacher.yaml")
    run_command("train", "configs/demo_judge.yaml")
    run_command("distill", str(CONFIG))
    run_command("export", str(STUDENT), "--out", str(FOLDER / "exported"))
    judged = {
        name: {steps: judge(name, folder, steps) for steps in STEPS}
        for name, folder in (("teacher", TEACHER), ("student", FOLDER / "exported"))
    }
    results = [str(FOLDER / f"{name}-{steps}.json") for name in judged for steps in STEPS]
    run_command(
        *("report", str(TEACHER), str(STUDENT), str(JUDGE), "--out", str(FOLDER / "report")),
        *("--eval", *results),
    )
    return report(judged, time.monotonic() - started_s)


def judge(name: str, folder: Path, steps: int) -> dict[str, float]:
    """Generative perplexity on raw tokens, which judge and model share, and entropy."""
    path = FOLDER / f"{name}-{steps}.json"
    run_command(
        *("eval", str(folder), "--split", "none", "--judge", str(JUDGE), "--samples", str(SAMPLES)),
        *("--sampler", "pgm_uniform", "--steps", str(steps), "--json", str(path)),
        shows_output=False,
    )
    found = json.loads(path.read_text())["generative_perplexity"]
    return {
        "perplexity": found["raw_tokens"]["perplexity"],
        "standard_error": found["raw_tokens"]["perplexity_standard_error"],
        "entropy_nats": found["unigram_entropy_nats"],
        "tokens_per_second": found["tokens_per_second"],
    }


def report(judged: dict[str, dict[int, dict[str, float]]], seconds: float) -> int:
    """Print the table and the losses' curves, and write them as JSON; 1 if the promise is missed."""
    config = configuration.read_yaml(CONFIG)["objective"]
    lines = [
        "",
        "=" * 78,
        "pgm-scale demo: a PGM distilled in five rounds of SDTT, judged by a small AR model",
    ]
    lines.append("  steps      teacher: perplexity, entropy            student: perplexity, entropy")
    for steps in STEPS:
        cells = [
            f"{value['perplexity']:8.1f} +- {value['standard_error']:4.1f}  {value['entropy_nats']:.3f}"
            for value in (judged["teacher"][steps], judged["student"][steps])
        ]
        lines.append(f"  {steps:5}      {cells[0]:38}  {cells[1]}")
    curves = {"teacher": losses(TEACHER), "student": losses(STUDENT)}
    lines += [f"  {name} loss  {curve(values)}" for name, values in curves.items()]
    lines.append(
        f"  distilled {config['groups']} group(s), from {config['sampling_steps']} steps, in 5 rounds"
    )
    lines.append(f"  look at   {FOLDER / 'report' / 'report.html'}; took {seconds:.0f} s")
    lines.append("=" * 78)
    teacher, student = (judged[name][PROMISED_STEPS] for name in ("teacher", "student"))
    held = (
        student["perplexity"] < teacher["perplexity"]
        and abs(student["entropy_nats"] - teacher["entropy_nats"]) <= MOST_ENTROPY_LOST
    )
    if not held:
        lines.append(
            f"the promise, a lower perplexity at {PROMISED_STEPS} steps at an entropy within "
            f"{MOST_ENTROPY_LOST}, is not kept here"
        )
    print("\n".join(lines))
    record: dict[str, Any] = {"judged": judged, "losses": curves, "seconds": seconds, "held": held}
    (FOLDER / "result.json").write_text(json.dumps(record, indent=2) + "\n")
    return 0 if held else 1


def losses(run: Path) -> list[float]:
    return [record["loss_mean"] for record in read_metrics(run / "metrics.jsonl")]


def curve(values: list[float], columns: int = 60) -> str:
    """A line of bars from the least value to the greatest, each the mean of its part."""
    cuts = [index * len(values) // columns for index in range(columns + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(cuts) if b > a]
    low, high = min(means), max(means)
    scale = (len(_BARS) - 1) / (high - low or 1.0)
    bars = "".join(_BARS[round((mean - low) * scale)] for mean in means)
    return f"{bars}  {low:.3f} to {high:.3f}"


if __name__ == "__main__":
    sys.exit(main())
