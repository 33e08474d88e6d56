"""`pgm-scale eval` and `eval-images`."""

from __future__ import annotations

import argparse
import json

from pgm_scale.cli.arguments import add_weights_argument, positive


def add_commands(commands: argparse._SubParsersAction) -> None:
    _add_eval(commands)
    _add_eval_images(commands)


def _add_eval(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "eval",
        help="validation perplexity or loss of a run",
        description="Perplexity bound (exact for autoregressive models) with its standard error, with fixed "
        "draws, of the newest good checkpoint; of image models, which have no likelihood, the validation loss. "
        "Prints a line and, with --json, writes a record.",
    )
    parser.add_argument("run_folder", metavar="RUN", help="folder of a run")
    parser.add_argument("--split", help="split folder to score (default: the run's validation split)")
    parser.add_argument("--sequences", type=positive, default=2048, help="at most this many (default 2048)")
    parser.add_argument(
        "--draws", type=positive, default=1, help="draws of time and mask a sequence (default 1)"
    )
    parser.add_argument("--batch", type=positive, default=32, help="sequences a forward pass (default 32)")
    add_weights_argument(parser)
    parser.add_argument("--json", metavar="FILE", help="also write the result as JSON")
    parser.set_defaults(run=_eval)


def _eval(options: argparse.Namespace) -> None:
    from pathlib import Path

    from pgm_scale.evaluation.run import evaluate_run
    from pgm_scale.files import atomic_write_bytes, check_writable, finite

    if options.json:
        check_writable("--json", options.json)
    result = evaluate_run(
        options.run_folder, options.split, options.sequences, options.draws, options.batch, options.weights
    )
    if "perplexity" in result:
        value = f"perplexity {result['perplexity']:.3f} +- {result['perplexity_standard_error']:.3f} "
        value += f"({result['nll_nats_per_token']:.4f} nats/token, "
    else:
        value = f"loss {result['loss']:.5f} +- {result['loss_standard_error']:.5f} ("
    print(
        f"{result['split']}: {value}{result['sequences']} sequences, "
        f"{result['draws']} draw(s), step {result['step']}, {result['weights']} weights)"
    )
    if options.json:
        atomic_write_bytes(Path(options.json), (json.dumps(finite(result), indent=2) + "\n").encode())


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
