"""`pgm-scale`: one command, a thin face over the library. Heavy imports happen inside the commands."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Sequence

from pgm_scale.errors import UserError

_EPILOG = """exit codes: 0 done; 1 a bug of ours (with a traceback); 2 bad input; 3 a loss or gradient that is
not finite; 4 a rank hung or died, and is named; 75 stopped by a signal after saving, run the same command to go
on; 130 interrupted"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; a `UserError` becomes its one message on stderr and its exit code."""
    options = _parse(arguments)
    # Before torch is imported: it would print the C++ frames of every broken connection.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    try:
        options.run(options)
    except UserError as error:
        rank = os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or "0"
        print(f"{'' if rank == '0' else f'rank {rank}: '}{error}", file=sys.stderr)
        return error.exit_code
    except MemoryError as error:
        print(f"not enough memory ({error}); ask for less at a time", file=sys.stderr)
        return UserError.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """argparse, but overrides may also stand behind options, where it does not look for them."""
    parser = build_parser()
    options, rest = parser.parse_known_args(arguments)
    if not hasattr(options, "overrides") or any(word.startswith("-") for word in rest):
        return parser.parse_args(arguments)  # which says what is wrong
    options.overrides += rest
    return options


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pgm-scale",
        description="Pretrain, evaluate and sample Partition Generative Models and their baselines.",
        epilog=_EPILOG,
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_prepare(commands)
    _add_train(commands)
    _add_eval(commands)
    _add_eval_images(commands)
    _add_sample(commands)
    _add_plan(commands)
    _add_config(commands)
    _add_doctor(commands)
    return parser


def _add_config_arguments(parser: argparse.ArgumentParser, optional: bool = False) -> None:
    parser.add_argument(
        "config", metavar="CONFIG.yaml", nargs="?" if optional else None, help="run configuration"
    )
    parser.add_argument(
        "overrides",
        metavar="SECTION.KEY=VALUE",
        nargs="*",
        help="set a key over the file, for example training.steps=1000 model.size=pgm-8-8-768",
    )


def _add_prepare(commands: argparse._SubParsersAction) -> None:
    from data_prep import cli as preparation

    preparation.add_arguments(commands)
    commands.choices["prepare"].set_defaults(run=preparation.run)


def _add_train(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "train",
        help="train a model, or go on training it",
        description="Train the run of a configuration, or go on from its newest good checkpoint. The same "
        "command works alone, under torchrun (torchrun --nproc-per-node 8 -m pgm_scale.cli train ...) and "
        "under a bare srun with one task per GPU.",
    )
    _add_config_arguments(parser)
    parser.set_defaults(run=_train)


def _train(options: argparse.Namespace) -> None:
    from functools import partial

    from pgm_scale.host_memory import keep_freed_memory

    keep_freed_memory()
    from pgm_scale import config as configuration
    from pgm_scale.parallel.launch import find_launch
    from pgm_scale.parallel.layout import layout_problems

    launch = find_launch()
    check = partial(layout_problems, world_size=launch.world_size)
    config = configuration.load(options.config, options.overrides, check)
    from pgm_scale.training.loop import train

    train(config, launch)


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
    parser.add_argument("--sequences", type=_positive, default=2048, help="at most this many (default 2048)")
    parser.add_argument(
        "--draws", type=_positive, default=1, help="draws of time and mask a sequence (default 1)"
    )
    parser.add_argument("--batch", type=_positive, default=32, help="sequences a forward pass (default 32)")
    _add_weights_argument(parser)
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
    parser.add_argument("--count", type=_positive, default=50_000, help="samples (default 50000)")
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
        type=_positive,
        metavar="N",
        help="checkpoint to sample from (default: the newest good one; who goes on in a work folder keeps to it)",
    )
    parser.add_argument("--sampler", choices=("halton", "confidence"), help="(default: the run's)")
    parser.add_argument("--steps", type=_positive, help="decoding steps (default: the run's)")
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
    parser.add_argument("--batch", type=_positive, default=32, help="images a forward pass (default 32)")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="(default fp32)")
    parser.add_argument(
        "--timeout", type=float, default=1800.0, help="seconds to wait for another rank's next images"
    )
    _add_weights_argument(parser)
    parser.set_defaults(run=_eval_images)


def _eval_images(options: argparse.Namespace) -> None:
    from pgm_scale.evaluation.images.command import eval_images
    from pgm_scale.host_memory import keep_freed_memory
    from pgm_scale.parallel.launch import find_launch

    keep_freed_memory()
    eval_images(options, find_launch())


def _add_sample(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "sample",
        help="generate text or images with a run's model",
        description="Generate from the newest good checkpoint: freely, after a prompt, or around given text or "
        "given parts of an image. The same seed gives the same samples at any --batch.",
    )
    parser.add_argument("run_folder", metavar="RUN", help="folder of a run")
    parser.add_argument("--count", type=_positive, default=1, help="samples a prompt or class (default 1)")
    parser.add_argument("--sampler", help="kind of sampler (default: the run's); 'list' prints the kinds")
    parser.add_argument("--steps", type=_positive, help="decoding steps (default: the run's)")
    parser.add_argument("--temperature", type=float, help="divides the logits")
    parser.add_argument("--top-p", type=float, help="nucleus: smallest set of tokens with this probability")
    parser.add_argument("--top-k", type=int, help="only the k most likely tokens")
    parser.add_argument("--seed", type=int, default=1, help="(default 1)")
    parser.add_argument("--batch", type=_positive, default=32, help="samples a forward pass (default 32)")
    parser.add_argument(
        "--out",
        metavar="PATH",
        help="file to write instead of printing; of images FILE.png (a grid), a folder (a PNG each), or FILE.npy "
        "(codes behind BOS)",
    )
    _add_weights_argument(parser)
    known = parser.add_argument_group("what is known (default: nothing)").add_mutually_exclusive_group()
    known.add_argument("--prompt", action="append", help="text to go on from; give it again for more prompts")
    known.add_argument(
        "--infill",
        metavar="TEMPLATE",
        help="text in which {N} stands for N tokens to generate, for example 'Return the {4} of a list.'",
    )
    known.add_argument(
        "--inpaint", metavar="IMAGE", help="image of which --box, or all but --keep-box, is generated"
    )
    known.add_argument("--known", metavar="FILE.npy", help="int array [rows, length], -1 where to generate")
    text = parser.add_argument_group("text only")
    text.add_argument("--format", choices=("text", "jsonl", "npy"), default="text", help="(default text)")
    _add_image_options(parser.add_argument_group("images only"))
    parser.set_defaults(run=_sample)


def _add_image_options(images: argparse._ArgumentGroup) -> None:
    images.add_argument(
        "--classes",
        action="append",
        help="names, or numbers where no class is named so, as 207,360; 'none' for no class (default: every class, "
        "--count samples each)",
    )
    images.add_argument("--guidance", type=float, metavar="W", help="classifier-free guidance")
    images.add_argument(
        "--guidance-schedule", choices=("linear", "constant"), help="linear: from 0 at the first step to W"
    )
    images.add_argument("--temperature-warmup-steps", type=int, metavar="N", help="first steps, twice as hot")
    images.add_argument(
        "--choice-temperature", type=float, metavar="T", help="of the noise of the confidence sampler"
    )
    images.add_argument(
        "--quirks",
        metavar="A,B",
        help="deviations of the published samplers: register_offset, dropout, resampled_tokens; 'none' for none",
    )
    images.add_argument(
        "--box",
        metavar="X0,Y0,X1,Y1",
        help="pixels of the --inpaint image, when cropped to the run's size, to generate; X1 and Y1 lie outside",
    )
    images.add_argument(
        "--keep-box",
        metavar="X0,Y0,X1,Y1",
        help="the same, to keep: only codes whose cells lie wholly in it; all else is generated",
    )
    images.add_argument("--vq", metavar="PATH", help="VQ tokenizer (default: the run's own)")
    images.add_argument("--columns", type=_positive, help="images in a row of the grid")


def _sample(options: argparse.Namespace) -> None:
    from pgm_scale.host_memory import keep_freed_memory

    keep_freed_memory()
    from pgm_scale.sampling.request import ImageOptions, SampleRequest, TextOptions
    from pgm_scale.sampling.run import print_kinds, sample_run

    if options.sampler == "list":
        print_kinds()
        return
    request = SampleRequest(
        known_path=options.known,
        count=options.count,
        kind=options.sampler,
        steps=options.steps,
        temperature=options.temperature,
        top_p=options.top_p,
        top_k=options.top_k,
        seed=options.seed,
        batch_sequences=options.batch,
        output_path=options.out,
        weights=options.weights,
        text=TextOptions(options.prompt, options.infill, options.format),
        images=ImageOptions(
            classes=options.classes,
            guidance=options.guidance,
            guidance_schedule=options.guidance_schedule,
            temperature_warmup_steps=options.temperature_warmup_steps,
            choice_temperature=options.choice_temperature,
            quirks=options.quirks,
            vq_path=options.vq,
            inpaint_path=options.inpaint,
            box=options.box,
            keep_box=options.keep_box,
            columns=options.columns,
        ),
    )
    sample_run(options.run_folder, request)


def _add_weights_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--weights", choices=("ema", "weight"), default="ema", help="averaged or raw weights (default ema)"
    )


def _add_plan(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "plan",
        help="find the parallel layout for a cluster, without GPUs",
        description="Predict memory, traffic and speed of every layout of a configuration's model and global batch "
        "on a number of GPUs, and print those that fit, fastest first, with the YAML to paste. Each printed one is "
        "built, on tensors without memory. Exit code 2 if nothing fits.",
    )
    _add_config_arguments(parser)
    parser.add_argument(
        "--cluster",
        metavar="FILE.yaml",
        default="configs/clusters/h100-8x.yaml",
        help="hardware and assumptions (default %(default)s)",
    )
    parser.add_argument("--gpus", type=_positive, help="how many (default: one node)")
    parser.add_argument("--length", type=_positive, help="tokens of a sequence (default: the data's)")
    parser.add_argument("--vocab-size", type=_positive, help="tokens of the vocabulary (default: the data's)")
    parser.add_argument("--top", type=_positive, default=5, help="print so many (default 5)")
    parser.add_argument("--json", metavar="FILE", help="also write them as JSON")
    parser.add_argument(
        "--measure", action="store_true", help="time the model's units on this machine's GPU first"
    )
    parser.set_defaults(run=_plan)


def _plan(options: argparse.Namespace) -> None:
    from pgm_scale.planning.run import PlanRequest, plan

    plan(
        PlanRequest(
            config_path=options.config,
            overrides=options.overrides,
            cluster_path=options.cluster,
            gpus=options.gpus,
            length=options.length,
            vocab_size=options.vocab_size,
            top=options.top,
            json_path=options.json,
            measures=options.measure,
        )
    )


def _add_config(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "config",
        help="print the resolved configuration",
        description="Read a configuration, apply overrides, check everything, print it whole as YAML.",
    )
    _add_config_arguments(parser)
    parser.set_defaults(run=_print_config)


def _print_config(options: argparse.Namespace) -> None:
    from pgm_scale import config as configuration

    print(configuration.to_yaml(configuration.load(options.config, options.overrides)), end="")


def _add_doctor(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "doctor",
        help="check this machine, and a configuration's data and folders",
        description="Versions, devices, NVIDIA Apex or its fallback, and, under a launcher, the rank map. With a "
        "configuration: hashes of all shards and room in the run folder. Exit code 2 if something is wrong.",
    )
    _add_config_arguments(parser, optional=True)
    parser.set_defaults(run=_doctor)


def _doctor(options: argparse.Namespace) -> None:
    from pgm_scale.doctor import examine

    examine(options.config, options.overrides)


def _positive(text: str) -> int:
    if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= 1 << 40:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
