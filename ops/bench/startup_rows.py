"""How long a user waits for `--help`, from the installed command, beside an interpreter that does nothing."""

from __future__ import annotations

import statistics
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from ops.bench.machine import Machine
from ops.bench.measure import Row, Side, Target, take_turns

REPEATS = 7


def rows(machine: Machine) -> Iterator[Row]:
    command = str(Path(sysconfig.get_path("scripts")) / "pgm-scale")
    helps = {
        "pgm-scale --help": [command, "--help"],
        "pgm-scale train --help": [command, "train", "--help"],
        "pgm-scale plan --help": [command, "plan", "--help"],
    }
    commands = helps | {"python -c pass": [sys.executable, "-c", "pass"]}
    run = partial(subprocess.run, check=True, stdout=subprocess.DEVNULL)
    seconds = take_turns([Side(name, partial(run, words)) for name, words in commands.items()], REPEATS)
    for name in helps:
        compared = {side: seconds[side] for side in (name, "python -c pass")}
        target = Target(0.5, 0.2, lower_is_better=True)
        yield Row(name, statistics.median(seconds[name]), "s", target, compared)
