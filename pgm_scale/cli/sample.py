"""`pgm-scale sample`."""

from __future__ import annotations

import argparse

from pgm_scale.cli.arguments import add_weights_argument, positive


def add_commands(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "sample",
        help="generate text or images with a run's model",
        description="Generate from the newest good checkpoint: freely, after a prompt, or around given text or "
        "given parts of an image. The same seed gives the same samples at any --batch.",
    )
    parser.add_argument("run_folder", metavar="RUN", help="folder of a run, or of an exported model")
    parser.add_argument("--count", type=positive, default=1, help="samples a prompt or class (default 1)")
    parser.add_argument("--sampler", help="kind of sampler (default: the run's); 'list' prints the kinds")
    parser.add_argument(
        "--step", type=positive, metavar="N", help="checkpoint (default: the newest good one)"
    )
    parser.add_argument("--steps", type=positive, help="decoding steps (default: the run's)")
    parser.add_argument("--temperature", type=float, help="divides the logits")
    parser.add_argument("--top-p", type=float, help="nucleus: smallest set of tokens with this probability")
    parser.add_argument("--top-k", type=int, help="only the k most likely tokens")
    parser.add_argument("--seed", type=int, default=1, help="(default 1)")
    parser.add_argument("--batch", type=positive, default=32, help="samples a forward pass (default 32)")
    parser.add_argument(
        "--out",
        metavar="PATH",
        help="file to write instead of printing; of images FILE.png (a grid), a folder (a PNG each), or FILE.npy "
        "(codes behind BOS)",
    )
    add_weights_argument(parser)
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
    text.add_argument(
        "--format", choices=("text", "jsonl", "npy"), help="(default: as the suffix of --out says, else text)"
    )
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
    images.add_argument("--columns", type=positive, help="images in a row of the grid")


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
        step=options.step,
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
