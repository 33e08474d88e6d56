"""One evaluation of a run or an exported folder: what is asked for, and all of it in one result.

Parts share what they can: generative perplexities the samples, MAUVE and self-BLEU the completions, and all of them
the model and the judge. Whatever can be refused is, before the first of them starts.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch

from pgm_scale.config import SamplerConfig
from pgm_scale.errors import UserError
from pgm_scale.evaluation.benchmarks import BenchmarkSettings, check_benchmarks, run_benchmarks
from pgm_scale.evaluation.completions import CompletionSettings, complete_prompts
from pgm_scale.evaluation.extra import require
from pgm_scale.evaluation.generative_perplexity import generative_perplexity
from pgm_scale.evaluation.judges import Judge, load_judge
from pgm_scale.evaluation.likelihood import (
    LikelihoodSettings,
    check_splits,
    open_splits,
    score_split,
)
from pgm_scale.evaluation.mauve import mauve_score
from pgm_scale.evaluation.record import Precision, model_record, torch_dtype
from pgm_scale.evaluation.samples import Generator, SampleSet, generate, read_samples
from pgm_scale.evaluation.self_bleu import check_self_bleu, self_bleu
from pgm_scale.loading import load
from pgm_scale.sampling import SAMPLERS, fitting_sampler
from pgm_scale.sampling.output import load_tokenizer
from pgm_scale.trained_model import TrainedModel, Weights


@dataclass(frozen=True)
class EvaluationRequest:
    """What to evaluate and how.

    Attributes:
        folder: of a run, or an exported one.
        splits: to score; None is a run's validation split, `["none"]` is none.
        judge: folder of the model that judges samples.
        samples, samples_file: how many to generate for it, or those that exist.
        mauve, self_bleu: on completions of prompts from the first split.
        benchmarks: tasks of lm-eval.
        sampler: fields of SamplerConfig that replace the model's own.
        seed: of all samples; the draws of the likelihood of splits are fixed.
    """

    folder: str
    splits: list[str] | None = None
    step: int | None = None
    weights: Weights = "ema"
    precision: Precision = "fp32"
    likelihood: LikelihoodSettings = field(default_factory=LikelihoodSettings)
    judge: str | None = None
    samples: int = 1024
    samples_file: str | None = None
    mauve: bool = False
    self_bleu: bool = False
    completions: CompletionSettings = field(default_factory=CompletionSettings)
    benchmarks: BenchmarkSettings | None = None
    sampler: dict[str, Any] = field(default_factory=dict)
    seed: int = 1
    cache_folder: str | None = None

    @property
    def needs_text(self) -> bool:
        return bool(self.judge or self.self_bleu or self.benchmarks)


def evaluate(request: EvaluationRequest) -> dict[str, Any]:
    """All parts that are asked for, in plain JSON values, each with all that tells its numbers apart.

    The keys of the first split's score are also at the top.

    Raises:
        UserError: bad input, which is said before anything is computed; or too little memory on the GPU.
    """
    try:
        return _evaluate(request)
    except torch.OutOfMemoryError:
        raise UserError(
            f"--batch {request.likelihood.batch_sequences}: the GPU is out of memory; lower --batch"
        ) from None


def _evaluate(request: EvaluationRequest) -> dict[str, Any]:
    _check(request)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    splits = open_splits(request.folder, request.splits, request.cache_folder)
    tasks = None if request.benchmarks is None else check_benchmarks(request.benchmarks)
    trained = load(
        request.folder,
        step=request.step,
        weights=request.weights,
        device=device,
        dtype=torch_dtype(request.precision),
    )
    check_splits(splits, trained)
    if not splits and (request.mauve or request.self_bleu or not request.needs_text):
        raise UserError(
            f"{request.folder}: there is no split to read; give --split FOLDER, as an exported model has no data"
        )
    result: dict[str, Any] = model_record(trained, request.precision)
    text = _TextParts(request, trained, device) if request.needs_text else None
    scores = [score_split(trained, split, request.likelihood, request.precision, device) for split in splits]
    if scores:
        result |= {**scores[0], "likelihood": scores}
    if text is not None:
        result |= text.generated()
        if request.mauve or request.self_bleu:
            result |= text.completed(splits[0])
        if request.benchmarks is not None:
            result |= text.benchmarks(request.benchmarks, tasks)
    return result


class _TextParts:
    """The parts that need a sampler and a tokenizer, on one model and one judge."""

    def __init__(self, request: EvaluationRequest, trained: TrainedModel, device: torch.device) -> None:
        if trained.description.images is not None:
            raise UserError(
                f"{request.folder} is a model of images, whose samples are judged by `pgm-scale eval-images`"
            )
        self._request, self._trained, self._device = request, trained, device
        self._tokenizer = load_tokenizer(trained.tokenizer_path)
        self._record = model_record(trained, request.precision)
        self._batch = request.likelihood.batch_sequences
        config = sampler_config(trained, request.sampler)
        self._generator = Generator(trained, config, request.seed, self._batch, device)
        self._given: SampleSet | None = None
        if request.samples_file is not None:
            self._given = read_samples(request.samples_file, trained)
        self._judge: Judge | None = None if request.judge is None else load_judge(request.judge, device)

    def generated(self) -> dict[str, Any]:
        """Samples, and their generative perplexity."""
        if self._judge is None:
            return {}
        samples = self._given or generate(self._generator, self._request.samples)
        record = self._record | samples.record
        scores = generative_perplexity(
            samples.tokens_BL,
            self._tokenizer,
            self._trained.description.vocabulary,
            self._judge,
            self._batch,
        )
        return {"generative_perplexity": record | scores}

    def completed(self, split: Any) -> dict[str, Any]:
        """MAUVE and self-BLEU of the same completions."""
        completions = complete_prompts(self._generator, split, self._request.completions)
        parts: dict[str, Any] = {}
        if self._request.mauve:
            assert self._judge is not None
            scores = mauve_score(
                completions,
                self._tokenizer,
                self._trained.description.vocabulary,
                self._judge,
                self._batch,
            )
            parts["mauve"] = self._record | scores
        if self._request.self_bleu:
            parts["self_bleu"] = self._record | self_bleu(completions, self._tokenizer)
        return parts

    def benchmarks(self, settings: BenchmarkSettings, tasks: Any) -> dict[str, Any]:
        """Tasks of lm-eval."""
        found = run_benchmarks(
            self._trained,
            settings,
            tasks,
            self._generator.config,
            seed=self._request.seed,
            batch_sequences=self._batch,
            precision=self._request.precision,
            device=self._device,
        )
        return {"harness": found}


def sampler_config(trained: TrainedModel, given: dict[str, Any]) -> SamplerConfig:
    """The model's own settings with the given ones in their place; those that are None are left.

    Raises:
        UserError: there is no such sampler.
    """
    config = fitting_sampler(trained.description.sampler, trained.model)
    changes = {name: value for name, value in given.items() if value is not None}
    if changes.get("kind", config.kind) not in SAMPLERS:
        raise UserError(f"--sampler {changes['kind']} is not one of {', '.join(SAMPLERS)}")
    return replace(config, **changes)


def _check(request: EvaluationRequest) -> None:
    """Refuse what needs no model to be seen."""
    if request.mauve:
        if request.judge is None:
            raise UserError("--mauve needs the features of a model; give --judge FOLDER")
        require("mauve", "--mauve")
    if request.self_bleu:
        check_self_bleu(request.completions.completions)
    if (request.mauve or request.self_bleu) and request.completions.prompts < 2:
        raise UserError(
            f"--prompts {request.completions.prompts} has no spread to compare or to tell; give at least 2"
        )
    if request.samples_file is not None and request.judge is None:
        raise UserError("--samples-file is scored by a judge; give --judge FOLDER")
    if request.judge is not None and request.samples < 2:
        raise UserError(f"--samples {request.samples} has no standard error; give at least 2")
