"""`pgm-scale prepare images` and `prepare imagenet-vq`: the arguments, and how they become a source and options."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from data_prep.output_cli import NOTES, add_output, add_validation_share
from pgm_scale.errors import UserError

if TYPE_CHECKING:
    from data_prep.image_encoding import Augmentation
    from data_prep.image_sources import ImageSource

SOURCES = ("images", "imagenet-vq")

_INPUT_NOTES = """\
Inputs are, all of one kind:
- folders of images (.jpg, .png, .webp, .bmp, .gif, .tif, .ppm): the first folder below the input is the class,
  classes are numbered in sorted order, and rows are in an order that mixes them; images in no folder are one class;
- WebDataset tars, plain, .gz or .zst: .jpg, .jpeg or .png with a .cls (a number) or a .json (with `label`) of the
  same name; they are streamed, and links, devices, paths that leave the folder and absurd sizes are refused;
- parquet files: the column `image` (bytes, or a struct with `bytes`) and the column `label`; class names that
  Hugging Face's datasets keep in the file are used.
Give --train and --validation, or one --input that is shared out by a hash of the images' bytes.

Images are turned upright, converted to 8 bits on white, resized along the shorter side and cut in the middle.
Those that cannot be read are left out, counted, and named in corrupt.jsonl in the output."""

_PIXEL_NOTES = f"""\
Images to rows of pixels, on which a VQ tokenizer is trained (objective vq).

{_INPUT_NOTES}

{NOTES}"""

_CODE_NOTES = f"""\
Images to rows of VQ codes with their classes, as for ImageNet: BOS and the codes of the grid, row by row. Each
split folder, and each run that is trained on it, gets a copy of the tokenizer. Codes may differ in few places
between a CPU and a GPU, so the device is one of the settings that a preparation goes on with.

{_INPUT_NOTES}

{NOTES}"""


def add_arguments(kinds: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add both commands; `run` serves the parsed result."""
    pixels = add_output(kinds, "images", "images to pixels, to train a VQ tokenizer", _PIXEL_NOTES, 1024)
    pixels.add_argument(
        "--channels", type=int, choices=[3, 1], default=3, help="RGB or gray (default: %(default)s)"
    )
    codes = add_output(kinds, "imagenet-vq", "images to the codes of a VQ tokenizer", _CODE_NOTES)
    codes.add_argument(
        "--vq",
        required=True,
        type=Path,
        metavar="PATH",
        help="a LlamaGen .pt, the run folder of a VQ training, or a split folder with its tokenizer",
    )
    codes.add_argument(
        "--batch", type=int, default=16, metavar="N", help="images a forward pass (default: %(default)s)"
    )
    codes.add_argument(
        "--device",
        choices=["auto", "cpu", "cuda"],
        default="auto",
        help="where codes are computed: on the GPU in one process, or on the CPU in all (default: %(default)s)",
    )
    for kind in (pixels, codes):
        _add_images(kind)


def _add_images(kind: argparse.ArgumentParser) -> None:
    for name, what in [("train", "images for training"), ("validation", "images for validation")]:
        kind.add_argument(f"--{name}", nargs="+", type=Path, metavar="PATH", help=what)
    kind.add_argument("--input", nargs="+", type=Path, metavar="PATH", help="images for both")
    add_validation_share(kind, 0.01)
    kind.add_argument(
        "--class-names",
        type=Path,
        metavar="FILE",
        help="for tars and parquet: one name a line, label 0 first",
    )
    kind.add_argument(
        "--size",
        type=int,
        metavar="PIXELS",
        help="side of the images (default: that of the --vq run's own images, else 256)",
    )
    more = kind.add_mutually_exclusive_group()
    more.add_argument("--flip", action="store_true", help="training images are also mirrored: two rows each")
    more.add_argument(
        "--ten-crop",
        action="store_true",
        help="training images are resized to 1.1 times the size, and their corners and centre cut out, plain and "
        "mirrored: ten rows each",
    )
    kind.add_argument(
        "--max-corrupt-share",
        type=float,
        default=0.01,
        metavar="SHARE",
        help="fail if more than this share of the images cannot be read (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> None:
    """Prepare what `args` ask for and print one line for each split, and one for what was left out.

    Raises:
        UserError: see `data_prep.images.prepare_images`.
    """
    from data_prep.images import CORRUPT_NAME, ImageOptions, named, prepare_images, read_rejected

    augmentation: Augmentation = "flip" if args.flip else "ten-crop" if args.ten_crop else "none"
    codes = {"vq_path": args.vq, "batch": args.batch, "device": _device(args)} if "vq" in args else {}
    options = ImageOptions(
        output=args.output,
        format=args.format,
        rows_per_shard=args.rows_per_shard,
        workers=args.workers,
        show_progress=not args.quiet,
        size=_usual_size(args) if args.size is None else args.size,
        channels=getattr(args, "channels", 3),
        augmentation=augmentation,
        max_corrupt_share=args.max_corrupt_share,
        **codes,
    )
    for manifest in prepare_images(_source(args), options):
        assert manifest.images is not None
        print(
            f"{args.output / manifest.split}: {manifest.documents} images of {len(manifest.images.class_names)} "
            f"class(es), {manifest.rows} rows of {manifest.length_tokens} tokens, vocabulary "
            f"{manifest.vocabulary.size}, {len(manifest.shards)} {manifest.format} shard(s)"
        )
    rejected = read_rejected(args.output)
    if rejected:
        print(
            f"left out {len(rejected)} unreadable image(s), see {args.output / CORRUPT_NAME}: {named(rejected)}"
        )


def _source(args: argparse.Namespace) -> ImageSource:
    from data_prep.image_sources import ImageSource, open_images

    if args.input and not args.train and not args.validation:
        return ImageSource(open_images(args.input, args.class_names), args.validation_share)
    if args.input or not args.train or not args.validation:
        raise UserError(f"prepare {args.source}: give --train and --validation, or --input to share out")
    train, validation = (open_images(paths, args.class_names) for paths in (args.train, args.validation))
    return ImageSource(train, validation)


def _usual_size(args: argparse.Namespace) -> int:
    """Side in pixels of the images that the tokenizer was trained on, where it is a run of ours."""
    from pgm_scale.run_folder import RunFolder

    if "vq" in args and RunFolder(args.vq).identity_path.is_file():
        images = RunFolder(args.vq).identity().images
        if images is not None:
            return images.side_pixels
    return 256


def _device(args: argparse.Namespace) -> str:
    import torch

    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: this machine has no usable GPU; take --device cpu")
    return "cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu"
