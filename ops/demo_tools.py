"""What the demos share: running a command of ours as a user would, and how many steps fit the time."""

from __future__ import annotations

import shlex
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

from pgm_scale import config as configuration
from pgm_scale.data.storage import SplitStorage
from pgm_scale.evaluation.validation import validation_loader
from pgm_scale.models import build_model
from pgm_scale.objectives import build_objective
from pgm_scale.objectives.base import DrawSpec, loss_terms

_TIMED_STEPS, _UNTIMED_STEPS = 40, 10
# The engine, the log and the saves take about as long again as a fifth of a step.
_LOOP_FACTOR = 1.2


def run_command(*arguments: str, shows_output: bool = True) -> str:
    """Run `pgm-scale` with the arguments, showing the command and what it says; returns its stdout."""
    print(f"\n$ pgm-scale {shlex.join(arguments)}", flush=True)
    command = [sys.executable, "-m", "pgm_scale.cli", *arguments]
    finished = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if finished.returncode:
        sys.exit(f"the demo stops: that command ended with exit code {finished.returncode}")
    if shows_output:
        print(finished.stdout, end="", flush=True)
    return finished.stdout


def steps_within_budget(config_path: Path, budget_s: float, most_steps: int) -> int:
    """Steps of a configuration that this machine can train in the time there is, from a few timed ones."""
    config = configuration.load(config_path)
    storage = SplitStorage(config.data.train)
    vocabulary, length = storage.manifest.vocabulary, storage.manifest.length_tokens
    model = build_model(config.model, vocabulary.size, length)
    objective = build_objective(config.objective, vocabulary, config.model)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    batch_sequences = config.training.global_batch_sequences
    loader = validation_loader(storage)
    timings = []
    for step in range(_TIMED_STEPS):
        first = step * batch_sequences
        batch = loader.read((np.arange(batch_sequences) + first) % storage.manifest.rows)
        start_s = time.perf_counter()
        inputs = objective.training_inputs(batch, DrawSpec(0, batch_sequences))
        terms = loss_terms(objective, model, inputs)
        (terms.loss_S.sum() / batch.tokens_BL.size).backward()
        optimizer.step()
        optimizer.zero_grad()
        timings.append(time.perf_counter() - start_s)
    step_s = _LOOP_FACTOR * float(np.median(timings[_UNTIMED_STEPS:]))
    steps = min(most_steps, int(budget_s / step_s))
    print(f"\n{step_s * 1000:.0f} ms a step here: training {steps} steps, about {steps * step_s:.0f} s")
    return steps
