"""One torchrun a node, as some clusters start their jobs; it starts the node's processes."""

from __future__ import annotations

import os
from collections.abc import Sequence

from pgm_scale.parallel.launch import find_launch


def run_torchrun(words: Sequence[str], nodes: int, processes: int) -> int:
    """Run `pgm-scale` with the words in so many processes on this node; returns the highest exit code.

    This process, torchrun's agent, holds the stop signals (launchers/job.py) and never acts on them, as it would
    end the ranks: they reach the ranks directly, as Slurm signals all processes of a task.
    """
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main

    launch = find_launch()  # of this node among the nodes: srun has started one task on each
    arguments = [
        *("--nnodes", str(nodes), "--nproc-per-node", str(processes), "--node-rank", str(launch.rank)),
        *("--master-addr", launch.master_address, "--master-port", str(launch.master_port)),
        *("--signals-to-handle", "SIGHUP,SIGQUIT"),  # not the stop signals, as it would by default
        *("-m", "pgm_scale.cli", *words),
    ]
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        os.environ.pop(name, None)
    try:
        main(arguments)
    except ChildFailedError as error:
        return max(_exit_code(failure.exitcode) for failure in error.failures.values())
    return 0


def _exit_code(code: int) -> int:
    """As a shell says it: 128 and the signal's number for a process that was killed."""
    return 128 - code if code < 0 else code
