"""Runs tasks of lm-eval on a trained model."""

from __future__ import annotations

import contextlib
import io
import logging
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pgm_scale.config import SamplerConfig
from pgm_scale.errors import UserError
from pgm_scale.evaluation.extra import require
from pgm_scale.evaluation.record import Precision, model_record
from pgm_scale.trained_model import TrainedModel

_BOOTSTRAP_SAMPLES = 1000  # of the standard errors of metrics that are no means


@dataclass(frozen=True)
class BenchmarkSettings:
    """Which tasks.

    Attributes:
        tasks: names; those in the folder, or without one those that come with lm-eval.
        tasks_folder: of task YAML files; their data paths are relative to the working folder.
        limit: at most so many examples a task.
        draws, bound: of the likelihood, see `conditional_likelihood`.
    """

    tasks: list[str]
    tasks_folder: str | None = None
    limit: int | None = None
    draws: int = 128
    bound: str = "conditional"


def check_benchmarks(settings: BenchmarkSettings) -> Any:
    """lm-eval's task manager, after it has found every task and its data.

    Raises:
        UserError: no lm-eval, no such folder or task, or one that cannot be loaded.
    """
    tasks = require("lm_eval.tasks", "--harness")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    if settings.tasks_folder is not None and not Path(settings.tasks_folder).is_dir():
        raise UserError(
            f"--harness-tasks-folder {settings.tasks_folder} is no folder; give one of task YAML files"
        )
    # Not both: lm-eval reads thousands of files to know its own tasks, which takes seconds.
    manager = tasks.TaskManager(
        include_path=settings.tasks_folder, include_defaults=settings.tasks_folder is None
    )
    unknown = [name for name in settings.tasks if name not in manager.all_tasks]
    if unknown:
        raise UserError(
            f"--harness: there is no task {', '.join(unknown)} in {settings.tasks_folder or 'lm-eval'}; "
            "give others, or another --harness-tasks-folder"
        )
    try:
        with _only_on_a_terminal():
            manager.load(settings.tasks)
    except Exception as error:  # a task's files may make lm-eval, datasets, yaml or jinja raise anything
        raise UserError(
            f"--harness {','.join(settings.tasks)}: lm-eval cannot load it: {_one_line(error)}; "
            "check the task's YAML and that its data are on this machine"
        ) from None
    return manager


def run_benchmarks(
    trained: TrainedModel,
    settings: BenchmarkSettings,
    manager: Any,
    sampler: SamplerConfig,
    *,
    seed: int,
    batch_sequences: int,
    precision: Precision,
    device: torch.device,
) -> dict[str, Any]:
    """The metrics of every task, and what they were made with.

    Raises:
        UserError: a task's templates do not fit its data.
    """
    evaluator = require("lm_eval.evaluator", "--harness")
    from jinja2 import TemplateError  # lm-eval brings it

    from pgm_scale.evaluation.harness import HarnessModel

    model = HarnessModel(
        trained,
        draws=settings.draws,
        bound=settings.bound,
        seed=seed,
        batch_size=batch_sequences,
        device=device,
        sampler=sampler,
    )
    try:
        with _only_on_a_terminal():
            found = evaluator.simple_evaluate(
                model=model,
                tasks=settings.tasks,
                task_manager=manager,
                limit=settings.limit,
                log_samples=False,
                bootstrap_iters=_BOOTSTRAP_SAMPLES,
                random_seed=seed,
                numpy_random_seed=seed,
                torch_random_seed=seed,
                fewshot_random_seed=seed,
            )
    except (OSError, ValueError, LookupError, TemplateError) as error:
        raise UserError(
            f"--harness {','.join(settings.tasks)}: lm-eval cannot run it: {_one_line(error)}; "
            "check the task's YAML"
        ) from error
    return {
        **model_record(trained, precision),
        "tasks": {name: _plain(metrics) for name, metrics in found["results"].items()},
        "examples": {name: counts["effective"] for name, counts in found["n-samples"].items()},
        "fewshot": dict(found["n-shot"]),
        "limit": settings.limit,
        **model.record(),
    }


def _plain(metrics: dict[str, Any]) -> dict[str, Any]:
    """Numbers by name; lm-eval writes `acc,none` for a metric without a filter."""
    return {
        name.removesuffix(",none"): float(value)
        for name, value in metrics.items()
        if isinstance(value, int | float) and name != "sample_len"
    }


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


@contextlib.contextmanager
def _only_on_a_terminal() -> Iterator[None]:
    """lm-eval and datasets draw bars and print whether or not somebody watches; nothing of it belongs on stdout."""
    with contextlib.redirect_stdout(sys.stderr), contextlib.ExitStack() as stack:
        if not sys.stderr.isatty():
            nowhere = io.StringIO()
            stack.enter_context(contextlib.redirect_stdout(nowhere))
            stack.enter_context(contextlib.redirect_stderr(nowhere))
        yield
