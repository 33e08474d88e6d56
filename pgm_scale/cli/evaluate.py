"""`pgm-scale eval` and `eval-images`."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

from pgm_scale.cli.arguments import add_weights_argument, positive

if TYPE_CHECKING:
    from pgm_scale.evaluation.run import EvaluationRequest


def add_commands(commands: argparse._SubParsersAction) -> None:
    _add_eval(commands)
    _add_eval_images(commands)


def _add_eval(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "eval",
        help="perplexity, generative perplexity, MAUVE, self-BLEU and benchmarks of a run or an exported model",
        description="Perplexity bound (exact for autoregressive models) with its standard error, with fixed "
        "draws, of the newest good checkpoint; of image models, which have no likelihood, the validation loss. "
        "With --judge also of samples, with --harness the tasks of lm-eval. Prints a table and, with --json, "
        "writes a record.",
    )
    parser.add_argument("run_folder", metavar="RUN", help="folder of a run, or of an exported model")
    parser.add_argument(
        "--split",
        action="append",
        help="split folder to score, of any data with the same tokenizer; give it again for more; 'none' for none "
        "(default: the run's validation split)",
    )
    parser.add_argument("--sequences", type=positive, default=2048, help="at most this many (default 2048)")
    parser.add_argument(
        "--draws", type=positive, default=1, help="draws of time and mask a sequence (default 1)"
    )
    parser.add_argument("--batch", type=positive, default=32, help="sequences a forward pass (default 32)")
    parser.add_argument(
        "--step", type=positive, metavar="N", help="checkpoint (default: the newest good one)"
    )
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="(default fp32)")
    parser.add_argument("--cache-folder", metavar="FOLDER", help="for splits at a URL (default: the run's)")
    add_weights_argument(parser)
    parser.add_argument("--json", metavar="FILE", help="also write the result as JSON")
    _add_sample_options(parser.add_argument_group("samples"))
    _add_harness_options(parser.add_argument_group("benchmarks (lm-eval)"))
    parser.set_defaults(run=_eval)


def _add_sample_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--judge",
        metavar="PATH",
        help="generative perplexity under this model: a folder of a Hugging Face causal LM, or an AR run or export",
    )
    group.add_argument("--samples", type=positive, default=1024, help="to generate (default 1024)")
    group.add_argument("--samples-file", metavar="FILE.npy", help="score these tokens instead")
    group.add_argument("--mauve", action="store_true", help="of completions; needs --judge for its features")
    group.add_argument("--self-bleu", action="store_true", help="of completions of the same prompt")
    group.add_argument(
        "--prompts", type=positive, default=1024, help="first rows of the first split (default 1024)"
    )
    group.add_argument(
        "--prompt-tokens", type=positive, default=50, help="of each, BOS included (default 50)"
    )
    group.add_argument(
        "--completion-tokens", type=positive, default=50, help="generated behind them (default 50)"
    )
    group.add_argument("--completions", type=positive, default=5, help="of each prompt (default 5)")
    group.add_argument("--sampler", help="kind of sampler (default: the model's)")
    group.add_argument("--steps", type=positive, help="decoding steps (default: the model's)")
    group.add_argument("--temperature", type=float, help="divides the logits")
    group.add_argument("--top-p", type=float, help="nucleus: smallest set of tokens with this probability")
    group.add_argument("--top-k", type=int, help="only the k most likely tokens")
    group.add_argument("--seed", type=int, default=1, help="(default 1)")


def _add_harness_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--harness", metavar="TASKS", help="names of lm-eval tasks, between commas")
    group.add_argument(
        "--harness-tasks-folder",
        metavar="DIR",
        help="folder of task YAML files (default: lm-eval's own tasks)",
    )
    group.add_argument("--limit", type=positive, help="at most so many examples a task")
    group.add_argument(
        "--harness-draws", type=positive, default=128, help="masks a continuation, of a bound (default 128)"
    )
    group.add_argument(
        "--harness-bound",
        choices=("conditional", "joint"),
        default="conditional",
        help="joint is the published form, which also noises the context (default conditional)",
    )


def _eval(options: argparse.Namespace) -> None:
    from pathlib import Path

    from pgm_scale.files import atomic_write_bytes, check_writable, finite

    if options.json:
        check_writable("--json", options.json)
    from pgm_scale.evaluation.run import evaluate
    from pgm_scale.evaluation.table import print_result
    from pgm_scale.host_memory import keep_freed_memory

    keep_freed_memory()
    result = evaluate(_request(options))
    print_result(result)
    if options.json:
        atomic_write_bytes(Path(options.json), (json.dumps(finite(result), indent=2) + "\n").encode())


def _request(options: argparse.Namespace) -> EvaluationRequest:
    from pgm_scale.evaluation.benchmarks import BenchmarkSettings
    from pgm_scale.evaluation.completions import CompletionSettings
    from pgm_scale.evaluation.likelihood import LikelihoodSettings
    from pgm_scale.evaluation.run import EvaluationRequest

    benchmarks = None
    if options.harness:
        benchmarks = BenchmarkSettings(
            tasks=[name.strip() for name in options.harness.split(",")],
            tasks_folder=options.harness_tasks_folder,
            limit=options.limit,
            draws=options.harness_draws,
            bound=options.harness_bound,
        )
    return EvaluationRequest(
        folder=options.run_folder,
        splits=options.split,
        step=options.step,
        weights=options.weights,
        precision=options.precision,
        likelihood=LikelihoodSettings(options.sequences, options.draws, options.batch),
        judge=options.judge,
        samples=options.samples,
        samples_file=options.samples_file,
        mauve=options.mauve,
        self_bleu=options.self_bleu,
        completions=CompletionSettings(
            options.prompts, options.prompt_tokens, options.completion_tokens, options.completions
        ),
        benchmarks=benchmarks,
        sampler={
            "kind": options.sampler,
            "steps": options.steps,
            "temperature": options.temperature,
            "top_p": options.top_p,
            "top_k": options.top_k,
        },
        seed=options.seed,
        cache_folder=options.cache_folder,
    )


def _add_eval_images(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "eval-images",
        help="FID and Inception score of a run's samples, or of a VQ tokenizer's reconstructions",
        description="Sample images from a run and compare them with a reference, or, with "
        "--vq PATH --reconstruction, a tokenizer's reconstructions with their originals. Under torchrun or srun "
        "the ranks share the work. A run that was interrupted goes on; the numbers are the same.",
    )
    parser.add_argument("run_folder", metavar="RUN", nargs="?", help="folder of a run")
    parser.add_argument(
        "--reference",
        required=True,
        metavar="PATH",
        help="split folder of pixels or codes, folder of images, or statistics (.npz of ours, .pt of mu and cov)",
    )
    parser.add_argument("--out", required=True, metavar="FILE.json", help="where the result is written")
    parser.add_argument("--work", metavar="FOLDER", help="codes and features, kept (default: FILE.json.work)")
    parser.add_argument("--vq", metavar="PATH", help="VQ tokenizer (default: the run's own)")
    parser.add_argument("--reconstruction", action="store_true", help="evaluate the tokenizer of --vq")
    parser.add_argument("--count", type=positive, default=50_000, help="samples (default 50000)")
    parser.add_argument(
        "--features",
        choices=("inception", "light"),
        default="inception",
        help="light needs no weights and is not comparable with FID (default inception)",
    )
    parser.add_argument(
        "--inception", metavar="PATH", help="Inception weights of torch-fidelity; never downloaded"
    )
    parser.add_argument(
        "--classifier",
        metavar="SPLIT",
        help="labelled images from which the classifier of light features learns (default: the reference)",
    )
    parser.add_argument("--save-reference", metavar="FILE.npz", help="write the reference's statistics")
    parser.add_argument(
        "--labels",
        choices=("reference", "balanced"),
        help="classes in the order of the reference's rows, or in turn (default: reference, if it has labels)",
    )
    parser.add_argument(
        "--step",
        type=positive,
        metavar="N",
        help="checkpoint to sample from (default: the newest good one; who goes on in a work folder keeps to it)",
    )
    parser.add_argument("--sampler", choices=("halton", "confidence"), help="(default: the run's)")
    parser.add_argument("--steps", type=positive, help="decoding steps (default: the run's)")
    parser.add_argument("--guidance", type=float, help="classifier-free guidance w (default: the run's)")
    parser.add_argument("--guidance-schedule", choices=("constant", "linear"), help="(default: the run's)")
    parser.add_argument("--temperature", type=float, help="divides the logits (default: the run's)")
    parser.add_argument("--temperature-warmup-steps", type=int, help="first steps, twice as hot")
    parser.add_argument("--choice-temperature", type=float, help="of the confidence sampler")
    parser.add_argument(
        "--quirks", metavar="A,B", help="deviations of the published samplers; 'none' for none"
    )
    parser.add_argument("--top-k", type=int, help="only the k most likely codes (default: the run's)")
    parser.add_argument("--seed", type=int, default=1, help="(default 1)")
    parser.add_argument("--batch", type=positive, default=32, help="images a forward pass (default 32)")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="(default fp32)")
    parser.add_argument(
        "--timeout", type=float, default=1800.0, help="seconds to wait for another rank's next images"
    )
    add_weights_argument(parser)
    parser.set_defaults(run=_eval_images)


def _eval_images(options: argparse.Namespace) -> None:
    from pgm_scale.evaluation.images.command import eval_images
    from pgm_scale.host_memory import keep_freed_memory
    from pgm_scale.parallel.launch import find_launch

    keep_freed_memory()
    eval_images(options, find_launch())
