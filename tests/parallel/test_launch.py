"""Ranks from the environments of torchrun and srun."""

import pytest

from pgm_scale.errors import UserError
from pgm_scale.parallel.launch import find_launch, first_host

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "29500"}
SRUN = {
    "SLURM_JOB_ID": "41",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "5",
    "SLURM_STEP_NUM_TASKS": "16",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NODELIST": "gpu[007-010,12]",
}


def test_torchrun_comes_before_slurm() -> None:
    launch = find_launch(TORCHRUN | SRUN)
    assert (launch.source, launch.rank, launch.world_size, launch.local_rank) == ("torchrun", 3, 8, 1)
    assert (launch.master_address, launch.master_port) == ("a", 29500)


def test_torchruns_agent_serves_the_store_in_each_attempt() -> None:
    assert find_launch(TORCHRUN).agent_attempt is None
    agent = {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "2"}
    assert find_launch(TORCHRUN | agent).agent_attempt == 2


def test_srun_step() -> None:
    launch = find_launch(SRUN)
    assert (launch.source, launch.rank, launch.world_size, launch.local_rank) == ("srun", 5, 16, 1)
    assert launch.master_address == "gpu007"
    assert 20_000 <= launch.master_port < 32_000
    assert find_launch({**SRUN, "SLURM_PROCID": "0"}).master_port == launch.master_port
    assert find_launch({**SRUN, "SLURM_RESTART_COUNT": "1"}).master_port != launch.master_port


def test_a_batch_script_without_srun_is_a_single_process() -> None:
    batch = {key: value for key, value in SRUN.items() if key != "SLURM_STEP_ID"}
    assert find_launch(batch).source == "single"
    assert find_launch({}).world_size == 1


@pytest.mark.fault(48)
@pytest.mark.parametrize(
    "broken",
    [{"RANK": "8"}, {"RANK": "-1"}, {"WORLD_SIZE": "0"}, {"LOCAL_RANK": "-1"}, {"MASTER_PORT": "70000"}],
)
def test_numbers_that_cannot_be_are_one_line(broken: dict) -> None:
    with pytest.raises(UserError, match=r"the launcher's environment says .*, which cannot be; start with"):
        find_launch(TORCHRUN | broken)


@pytest.mark.parametrize("broken", [{"WORLD_SIZE": "eight"}, {"MASTER_PORT": None}])
def test_an_incomplete_environment_is_one_line(broken: dict) -> None:
    environment = {k: v for k, v in (TORCHRUN | broken).items() if v is not None}
    with pytest.raises(UserError, match="incomplete"):
        find_launch(environment)


@pytest.mark.parametrize(
    ("nodelist", "host"),
    [("gpu[007-010,12]", "gpu007"), ("login1", "login1"), ("a1,b2", "a1"), ("n[3,5-9]", "n3")],
)
def test_first_host(nodelist: str, host: str) -> None:
    assert first_host(nodelist) == host
