"""`make demo`: from raw text to a pretrained, stopped, resumed, evaluated and sampled PGM, on any CPU.

It runs the commands that a user would run, prints each, and ends with a one-screen report. What it does by
hand is what no command does: choosing how many steps fit the time, pulling the plug half way, and comparing
the speed of two samplers.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

from ops.demo_tools import run_command, steps_within_budget
from pgm_scale import config as configuration
from pgm_scale.config import DiffusionTransformerConfig, SamplerConfig
from pgm_scale.data.storage import SplitStorage
from pgm_scale.evaluation.perplexity import Perplexity, unigram_perplexity
from pgm_scale.evaluation.validation import validation_loader
from pgm_scale.models import build_model
from pgm_scale.reporting.metrics_file import read_metrics
from pgm_scale.reporting.overview import plot_curves
from pgm_scale.run_folder import load_run
from pgm_scale.sampling import known_prefixes, sample

ROOT = Path(__file__).resolve().parent.parent
FOLDER = Path(".demo")
CONFIG = Path("configs/demo.yaml")
TRAINING_BUDGET_S = 190.0  # of the 6 minutes; the rest is preparation, start-up, evaluation and sampling
MOST_STEPS = 6000
PREEMPTED = 75
PROMPT = "Return the"
TEMPLATE = "Return a list of the {6} of this object, or None if{8}."


def main() -> int:
    started_s = time.monotonic()
    os.chdir(ROOT)
    shutil.rmtree(FOLDER / "run", ignore_errors=True)
    run_command("prepare", "python-docs", "--format", "tar", "--output", str(FOLDER / "data"))
    steps = steps_within_budget(CONFIG, TRAINING_BUDGET_S, MOST_STEPS)
    train = ("train", str(CONFIG), f"training.steps={steps}")
    stopped_at = train_and_stop_half_way(train, steps)
    run_command(*train)
    result = FOLDER / "eval.json"
    run_command("eval", str(FOLDER / "run"), "--sequences", "100000", "--draws", "4", "--json", str(result))
    sample_lines = ("sample", str(FOLDER / "run"), "--format", "jsonl")  # shown by the report
    continuation = run_command(*sample_lines, "--prompt", PROMPT, shows_output=False)
    infilling = run_command(*sample_lines, "--infill", TEMPLATE, shows_output=False)
    return report(json.loads(result.read_text()), stopped_at, continuation, infilling, started_s)


def train_and_stop_half_way(train: tuple[str, ...], steps: int) -> int:
    """Start training and send SIGTERM, as a cluster would, when half of the steps are done."""
    print(f"\n$ pgm-scale {shlex.join(train)}   # and SIGTERM half way", flush=True)
    process = subprocess.Popen([sys.executable, "-m", "pgm_scale.cli", *train])
    metrics = FOLDER / "run" / "metrics.jsonl"
    while process.poll() is None:
        time.sleep(0.2)
        if metrics.exists() and _last_step(metrics) >= steps // 2:
            process.send_signal(signal.SIGTERM)
            break
    code = process.wait()
    if code != PREEMPTED:
        sys.exit(f"the demo stops: the stopped training ended with exit code {code}, not {PREEMPTED}")
    return _last_step(metrics)


def _last_step(metrics: Path) -> int:
    lines = metrics.read_text().splitlines()
    try:
        return json.loads(lines[-1])["step"] if lines else 0
    except ValueError:  # read in the middle of a write
        return 0


def unigram() -> Perplexity:
    config = configuration.load(CONFIG)
    train, validation = SplitStorage(config.data.train), SplitStorage(config.data.validation)
    rows = validation_loader(train).read(np.arange(train.manifest.rows))
    counts = np.bincount(rows.tokens_BL[rows.valid_BL], minlength=train.manifest.vocabulary.size)
    batch = validation_loader(validation).read(np.arange(validation.manifest.rows))
    return unigram_perplexity(counts, [batch], train.manifest.vocabulary.mask_id)


def sampler_speeds() -> dict[str, float]:
    """Tokens/s of the trained PGM and of an MDLM with as many blocks, alternating, best of three each."""
    run = load_run(FOLDER / "run")
    vocabulary, length = run.description.vocabulary, run.description.length_tokens
    pgm = run.description.model
    assert pgm.kind == "partition_transformer"
    size = DiffusionTransformerConfig(
        hidden_size=pgm.hidden_size,
        num_heads=pgm.num_heads,
        num_blocks=pgm.num_encoder_blocks + pgm.num_decoder_blocks,
    )
    torch.manual_seed(0)
    mdlm = build_model(size, vocabulary.size, length)  # weights do not matter for the speed
    known_BL = known_prefixes([[]] * 32, length, vocabulary.bos_id)
    contestants = {
        "PGM": (run.model, run.description.sampler),
        "MDLM": (mdlm, SamplerConfig("ancestral_cached", steps=run.description.sampler.steps)),
    }
    speeds = dict.fromkeys(contestants, 0.0)
    for _ in range(3):
        for name, (model, sampler) in contestants.items():
            done = sample(
                model,
                vocabulary,
                length,
                dataclasses.replace(sampler, top_p=1.0),
                known_BL=known_BL,
                seed=0,
                batch_sequences=32,
                device="cpu",
            )
            speeds[name] = max(speeds[name], done.tokens_per_second)
    return speeds


def report(evaluation: dict, stopped_at: int, continuation: str, infilling: str, started_s: float) -> int:
    """Print the report, write it as JSON with a picture of the curves; 1 if it misses its promise."""
    reference, speeds = unigram(), sampler_speeds()
    times_lower = reference.perplexity / evaluation["perplexity"]
    curves = FOLDER / "curves.png"
    records = read_metrics(FOLDER / "run" / "metrics.jsonl")
    plot_curves(records, curves, "pgm-scale demo", reference.nll_nats_per_token, stopped_at)
    seconds = time.monotonic() - started_s
    held = times_lower >= 5
    lines = [
        "",
        "=" * 78,
        "pgm-scale demo: Python's own documentation, a Partition Generative Model on the CPU",
        f"  trained   {records[-1]['step']} steps, {records[-1]['samples'] * 64:,} tokens; "
        f"stopped by SIGTERM after step {stopped_at}, resumed",
        f"  PGM       validation perplexity {evaluation['perplexity']:7.2f} "
        f"+- {evaluation['perplexity_standard_error']:.2f}  (upper bound, {evaluation['sequences']} sequences)",
        f"  unigram   validation perplexity {reference.perplexity:7.2f} "
        f"+- {reference.perplexity_standard_error:.2f}  ({times_lower:.1f} times the PGM's)",
        f"  sampling  PGM {speeds['PGM']:,.0f} tokens/s, MDLM of equal size {speeds['MDLM']:,.0f} tokens/s "
        f"({speeds['PGM'] / speeds['MDLM']:.1f}x; L 64, 32 steps, batch 32)",
        f"  prompt    {PROMPT!r}",
        *_indented(json.loads(continuation)["text"]),
        f"  infill    {TEMPLATE!r}",
        *_indented(json.loads(infilling)["text"]),
        f"  curves    {curves}",
        f"  run       {FOLDER / 'run'}   (pgm-scale sample {FOLDER / 'run'} --prompt ...)",
        f"  took      {seconds:.0f} s",
        "=" * 78,
    ]
    if not held:
        lines.append(
            "the promise is a perplexity at least 5 times below the unigram model's: not reached here"
        )
    print("\n".join(lines))
    record = {
        "evaluation": evaluation,
        "unigram_perplexity": reference.perplexity,
        "times_lower": times_lower,
        "tokens_per_second": speeds,
        "stopped_at_step": stopped_at,
        "seconds": seconds,
        "held": held,
    }
    (FOLDER / "report.json").write_text(json.dumps(record, indent=2) + "\n")
    return 0 if held else 1


def _indented(text: str) -> list[str]:
    return ["            | " + line for line in text.splitlines()[:8]]


if __name__ == "__main__":
    sys.exit(main())
