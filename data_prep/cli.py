"""`pgm-scale prepare ...`: the arguments, and how they become a source and options.

Nothing heavy is imported before `run`, so that `--help` is quick.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from data_prep import image_cli
from data_prep.output_cli import NOTES, add_output, add_validation_share
from pgm_scale.errors import UserError

if TYPE_CHECKING:
    from data_prep.readers import InputFile
    from data_prep.sources import DocumentSource

_TEXT_NOTES = f"""\
Inputs are .txt, .jsonl and .parquet files, each plain, .gz or .zst, and folders of them, walked in sorted order.
A document is a .jsonl line, a .parquet row, or what --documents says of .txt; a .txt document of more than
65,536 characters is cut near that length into several. Documents go to validation by a hash of their content,
so that equal ones are on one side.

{NOTES}"""

_OPENWEBTEXT_NOTES = f"""\
OpenWebText as published: GPT-2 tokens and an EOS after every document, joined in batches of 1,000 documents and
cut into BOS + 1,022 tokens + EOS; the last 100,000 documents are the validation split. Without --input the
parquet files of Skylion007/openwebtext are fetched from the hub, without running any script of it.

{NOTES}"""

_LM1B_NOTES = f"""\
LM1B as published: detokenised, bert-base-uncased, one sentence a row as [CLS] text [SEP], cut or padded to 128
tokens; the test split is for validation. Without --train and --test the parquet files of
billion-word-benchmark/lm1b are fetched from the hub, without running any script of it.

{NOTES}"""

_PYTHON_DOCS_NOTES = f"""\
The demonstration corpus: Python's language reference and the docstrings of its standard library, about 2 MB of
English that every machine has. Equal documents are kept once and near-duplicates stay on one side.

{NOTES}"""


def add_arguments(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `prepare` and its kinds of input to the command line; `run` serves the parsed result."""
    prepare = subparsers.add_parser(
        "prepare",
        help="text or images to token shards",
        description="Turn text or images into token shards.\n\n" + NOTES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    kinds = prepare.add_subparsers(dest="source", required=True, metavar="SOURCE")

    text = _add_kind(kinds, "text", "any local text", _TEXT_NOTES, "train:bpe:32768", 1024, "wrap")
    text.add_argument("--input", nargs="+", required=True, type=Path, metavar="PATH", help="files or folders")
    _add_reading(text, "file")
    add_validation_share(text, 0.01)

    openwebtext = _add_kind(
        kinds, "openwebtext", "OpenWebText, from files or the hub", _OPENWEBTEXT_NOTES, "gpt2", 1024, "wrap"
    )
    openwebtext.add_argument(
        "--input", nargs="+", type=Path, metavar="PATH", help="files or folders, in order"
    )
    openwebtext.add_argument(
        "--validation-documents",
        type=int,
        default=100_000,
        metavar="N",
        help="how many documents at the end are for validation (default: %(default)s)",
    )
    _add_reading(openwebtext, "file")
    _add_revision(openwebtext)

    lm1b = _add_kind(
        kinds, "lm1b", "LM1B, from files or the hub", _LM1B_NOTES, "bert-base-uncased", 128, "pad"
    )
    for split in ("train", "test"):
        lm1b.add_argument(
            f"--{split}", nargs="+", type=Path, metavar="PATH", help=f"files of the {split} split"
        )
    _add_reading(lm1b, "line")
    _add_revision(lm1b)

    python_docs = _add_kind(
        kinds, "python-docs", "the demonstration corpus", _PYTHON_DOCS_NOTES, "train:bpe:1024", 64, "wrap"
    )
    add_validation_share(python_docs, 0.05)
    image_cli.add_arguments(kinds)


def run(args: argparse.Namespace) -> None:
    """Prepare what `args` (of `add_arguments`) ask for and print one line for each split.

    Raises:
        UserError: see `data_prep.pipeline.prepare_job`.
    """
    if args.source in image_cli.SOURCES:
        image_cli.run(args)
        return
    from data_prep.text import PrepareOptions, prepare

    options = PrepareOptions(
        output=args.output,
        tokenizer=args.tokenizer,
        length_tokens=args.length,
        packing=args.packing,
        format=args.format,
        rows_per_shard=args.rows_per_shard,
        workers=args.workers,
        show_progress=not args.quiet,
    )
    for manifest in prepare(_source(args), options):
        print(
            f"{args.output / manifest.split}: {manifest.documents} documents, {manifest.rows} rows of "
            f"{manifest.length_tokens} tokens, vocabulary {manifest.vocabulary.size}, "
            f"{len(manifest.shards)} {manifest.format} shard(s)"
        )


def _source(args: argparse.Namespace) -> DocumentSource:
    from data_prep.readers import Reading, find_files

    if args.source == "python-docs":
        from data_prep.python_docs import PythonDocsSource

        return PythonDocsSource(args.validation_share)
    reading = Reading(args.documents, args.text_field)
    if args.source == "text":
        from data_prep.sources import TextSource

        return TextSource(args.input, reading, args.validation_share)
    if args.source == "openwebtext":
        from data_prep import openwebtext

        if args.input:
            files, commit = find_files(_without_revision(args, args.input)), None
        else:
            files, commit = _fetch(openwebtext.HUB_REPOSITORY, args.revision, "train")
        return openwebtext.OpenWebTextSource(files, reading, args.validation_documents, commit)
    from data_prep import lm1b

    if bool(args.train) != bool(args.test):
        raise UserError(
            "prepare lm1b: give both --train and --test, or neither to fetch the data from the hub"
        )
    if args.train:
        _without_revision(args, args.train)
        return lm1b.LM1BSource(find_files(args.train), find_files(args.test), reading)
    train_files, commit = _fetch(lm1b.HUB_REPOSITORY, args.revision, "train")
    test_files, _ = _fetch(lm1b.HUB_REPOSITORY, commit, "test")
    return lm1b.LM1BSource(train_files, test_files, reading, commit)


def _without_revision(args: argparse.Namespace, inputs: list[Path]) -> list[Path]:
    if args.revision:
        raise UserError("--revision names a commit on the hub; leave it out with local files")
    return inputs


def _fetch(repository: str, revision: str | None, split: str) -> tuple[list[InputFile], str]:
    from data_prep.hub import download_parquet, files_of_split

    files, commit = download_parquet(repository, revision)
    return files_of_split(files, split), commit


def _add_kind(
    kinds: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    short: str,
    notes: str,
    tokenizer: str,
    length_tokens: int,
    packing: str,
) -> argparse.ArgumentParser:
    """A subcommand with the options that all texts have, and its own defaults for them."""
    kind = add_output(kinds, name, short, notes)
    kind.add_argument(
        "--tokenizer",
        default=tokenizer,
        metavar="NAME",
        help="a tokenizer.json or Hugging Face folder, a name on the hub (gpt2, bert-base-uncased), or "
        "train:bpe:<size> to train one on the training split (default: %(default)s)",
    )
    kind.add_argument(
        "--length",
        type=int,
        default=length_tokens,
        metavar="TOKENS",
        help="tokens of a row, BOS and EOS included (default: %(default)s)",
    )
    kind.add_argument(
        "--packing",
        choices=["wrap", "pad"],
        default=packing,
        help="wrap: documents joined by EOS and cut into full rows; pad: one document a row, cut or padded "
        "(default: %(default)s)",
    )
    return kind


def _add_reading(kind: argparse.ArgumentParser, separation: str) -> None:
    kind.add_argument(
        "--documents",
        choices=["file", "paragraph", "line"],
        default=separation,
        help="what a document of a .txt file is: all of it, what stands between blank lines, or a line "
        "(default: %(default)s)",
    )
    kind.add_argument(
        "--text-field",
        default="text",
        metavar="NAME",
        help="key of .jsonl or column of .parquet that holds the text (default: %(default)s)",
    )


def _add_revision(kind: argparse.ArgumentParser) -> None:
    kind.add_argument(
        "--revision",
        metavar="COMMIT",
        help="commit of the data set on the hub to pin; the one used is kept in dataset.json (default: newest)",
    )
