"""One real two-node Slurm on this machine for all tests of a session."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from ops.slurm_local.cluster import LocalSlurm, local_slurm
from ops.slurm_local.daemons import PACKAGES, missing_programs


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalSlurm]:
    if missing := missing_programs():
        message = f"no {', '.join(missing)}: apt-get install --no-install-recommends {PACKAGES}"
        if os.environ.get("CI") == "true":
            pytest.fail(message)
        pytest.skip(message)
    with local_slurm(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster
