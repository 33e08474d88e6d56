"""`pgm-scale convert`."""

from __future__ import annotations

import argparse

from pgm_scale.cli.arguments import add_weights_argument

_FORMATS = ("pgm-text", "pgm-image", "maskgit", "mdlm", "mdlm-hf", "ar", "sdtt", "llamagen-vq")


def add_commands(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "convert",
        help="published checkpoints to exported folders, and back",
        description="Read a published checkpoint as plain data (no code in it runs) and write an exported folder; "
        "or, with --to, write a run or an exported folder in a published format. All keys that are unknown, "
        "missing or of another shape are listed. Ends with what was compared.",
        epilog="formats: pgm-text, mdlm and ar are Lightning files, pgm-image and maskgit plain torch files, "
        "mdlm-hf and sdtt folders of config.json and weights, llamagen-vq a VQ tokenizer. What a file does not "
        "say: heads are 64 wide, length 1024 (images 1025), dropout 0.1; the mask is the last row and BOS the one "
        "before it (of 30,522 rows BERT's); of images the other way round. Anything else: --set.",
    )
    parser.add_argument(
        "source", metavar="SOURCE", help="published file or folder; with --to, a run or exported folder"
    )
    parser.add_argument("--out", required=True, metavar="PATH", help="new folder; with --to, file or folder")
    direction = parser.add_mutually_exclusive_group()
    direction.add_argument(
        "--from",
        dest="source_format",
        choices=_FORMATS,
        help="format of SOURCE (default: told by its content)",
    )
    direction.add_argument("--to", dest="target_format", choices=_FORMATS, help="published format to write")
    add_weights_argument(parser)
    parser.add_argument(
        "--tokenizer",
        metavar="PATH",
        help="tokenizer.json to put beside (default: the one inside SOURCE); of image models a VQ tokenizer",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="settings",
        help="what SOURCE does not say, or says wrongly, as length_tokens=128 model.num_heads=16 "
        "vocabulary.mask_id=5; give it again for more",
    )
    parser.add_argument(
        "--no-strict", dest="strict", action="store_false", help="leave unknown keys out, and list them"
    )
    parser.set_defaults(run=_convert)


def _convert(options: argparse.Namespace) -> None:
    from pgm_scale.convert.exporting import WriteRequest, write_published
    from pgm_scale.convert.importing import ImportRequest, import_checkpoint
    from pgm_scale.errors import UserError

    if options.target_format is None:
        import_checkpoint(
            ImportRequest(
                options.source,
                options.out,
                options.source_format,
                options.weights,
                options.tokenizer,
                options.settings,
                options.strict,
            )
        )
        return
    if options.tokenizer or options.settings or not options.strict:
        raise UserError("--tokenizer, --set and --no-strict are for reading; leave them out with --to")
    write_published(WriteRequest(options.source, options.out, options.target_format, options.weights))
