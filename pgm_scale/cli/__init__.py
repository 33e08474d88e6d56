"""`pgm-scale`: one command, a thin face over the library, with a file for each group of commands.

Heavy imports happen inside the commands.
"""

from __future__ import annotations

import argparse
import errno
import logging
import os
import sys
from collections.abc import Sequence
from typing import Any

from data_prep import cli as preparation
from pgm_scale.cli import check, convert, evaluate, export, launch, plan, report, runs, sample, serve, train
from pgm_scale.cli.streams import forgiving, open_closed_streams, written_results
from pgm_scale.errors import UserError
from pgm_scale.secrets import RedactingFormatter, print_redacted_traceback, redact

# What a disk, a path or a limit refuses, wherever it was met: no bug of ours.
_OF_THE_ENVIRONMENT = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.EIO,
    errno.EMFILE,
    errno.ENFILE,
    errno.ENAMETOOLONG,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ELOOP,
}
_EPILOG = """exit codes: 0 done; 1 a bug of ours (with a traceback); 2 bad input; 3 a loss or gradient that is
not finite, or a spike; 4 a rank hung or died, and is named; 75 stopped by a signal after saving, run the same
command to go on; 130 interrupted; 141 the reader of the output has gone"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; a `UserError` becomes its one message on stderr and its exit code.

    Messages, log lines and the traceback of an error of ours are printed without secrets.
    """
    open_closed_streams()
    with forgiving("stderr"):
        try:
            with written_results():
                return _run(arguments)
        except UserError as error:
            rank = os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or "0"
            print(redact(f"{'' if rank == '0' else f'rank {rank}: '}{error}"), file=sys.stderr)
            return error.exit_code
        except OSError as error:
            if isinstance(error, BrokenPipeError):  # of stdout: `| head` has seen enough
                return 141
            if error.errno not in _OF_THE_ENVIRONMENT:
                raise
            print(
                redact(f"{error.filename or 'a file'}: {error.strerror}; free it or choose another"),
                file=sys.stderr,
            )
            return UserError.exit_code
        except MemoryError as error:
            print(f"not enough memory ({error}); ask for less at a time", file=sys.stderr)
            return UserError.exit_code
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 130


def _run(arguments: Sequence[str] | None) -> int:
    options = parse_arguments(arguments)
    # Before torch is imported: it would print the C++ frames of every broken connection.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    _set_up_messages()
    options.run(options)
    return 0


def _set_up_messages() -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(RedactingFormatter("%(levelname)s: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    sys.excepthook = print_redacted_traceback


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """argparse, but overrides may also stand behind options, where it does not look for them.

    Raises:
        SystemExit: with argparse's exit code and message, or after --help.
    """
    parser = build_parser()
    options, rest = parser.parse_known_args(arguments)
    if not hasattr(options, "overrides") or any(word.startswith("-") for word in rest):
        return parser.parse_args(arguments)  # which says what is wrong
    options.overrides += rest
    return options


class Parser(argparse.ArgumentParser):
    """Takes no abbreviations: `sample --step 3` must not be --steps 3."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{**options, "allow_abbrev": False})


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="pgm-scale",
        description="Pretrain, evaluate and sample Partition Generative Models and their baselines.",
        epilog=_EPILOG,
    )
    commands: argparse._SubParsersAction = parser.add_subparsers(
        title="commands", metavar="COMMAND", required=True
    )
    preparation.add_arguments(commands)
    commands.choices["prepare"].set_defaults(run=preparation.run)
    for group in (train, launch, runs, evaluate, report, sample, serve, export, convert, plan, check):
        group.add_commands(commands)
    return parser
