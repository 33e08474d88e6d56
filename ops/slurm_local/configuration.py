"""The slurm.conf of a small Slurm whose nodes are all on this machine."""

from __future__ import annotations

import os
import pwd
import socket
from dataclasses import dataclass
from pathlib import Path

import psutil

_TEMPLATE = """\
# Written by `python -m ops.slurm_local start`; the next start writes it anew.
ClusterName=local
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge/socket,cred_expire={requeue_delay_s}

StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/state/slurmctld.pid
SlurmdPidFile={folder}/spool/%n/slurmd.pid
SlurmctldLogFile={folder}/logs/slurmctld.log
SlurmdLogFile={folder}/logs/slurmd-%n.log
SlurmctldDebug=info
SlurmdDebug=info

# No cgroups, no accounting, no task binding: none of these can be had everywhere.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
MpiDefault=none
PropagateResourceLimits=NONE

# Nodes say they have CPUs that this machine may lack.
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
# A silent node comes back by itself, one set down stays so until `scontrol update NodeName=... State=RESUME`.
ReturnToService=1
{controller_parameters}

SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=2,sched_min_interval=0,bf_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE

JobRequeue=1
KillWait={kill_wait_s}
OverTimeLimit=0
InactiveLimit=0
MinJobAge=3600
SlurmdTimeout={node_timeout_s}
MessageTimeout=20
CompleteWait=0

{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=1 GraceTime={grace_s} State=UP
PartitionName=urgent Nodes=ALL MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF State=UP
"""


@dataclass(frozen=True)
class Settings:
    """What can be chosen of a local Slurm.

    Attributes:
        grace_s: seconds that a job of `main` may go on after a job of `urgent` has taken its place.
        signal_at_preemption: send the job's own `--signal` when it is preempted, in place of SIGTERM.
        requeue_delay_s: a requeued job stays pending so long; also how long a credential lives.
        kill_wait_s: seconds between SIGTERM and SIGKILL at the time limit and at `scancel`.
        node_timeout_s: seconds of silence after which a node counts as down.
    """

    nodes: int = 2
    cpus_per_node: int = 4
    grace_s: int = 20
    signal_at_preemption: bool = False
    requeue_delay_s: int = 10
    kill_wait_s: int = 15
    node_timeout_s: int = 30

    @property
    def node_names(self) -> list[str]:
        return [f"node{number}" for number in range(1, self.nodes + 1)]


def slurm_conf(folder: Path, settings: Settings) -> str:
    """The text of slurm.conf, with ports that are free now."""
    controller_port, *node_ports = _free_ports(1 + settings.nodes)
    memory_mib = psutil.virtual_memory().total // 2**20
    nodes = "\n".join(
        f"NodeName={name} NodeHostname=localhost NodeAddr=127.0.0.1 Port={port} "
        f"CPUs={settings.cpus_per_node} RealMemory={memory_mib} State=UNKNOWN"
        for name, port in zip(settings.node_names, node_ports, strict=True)
    )
    return _TEMPLATE.format(
        folder=folder,
        host=socket.gethostname().split(".")[0],
        user=_user(),
        controller_port=controller_port,
        controller_parameters="SlurmctldParameters=preempt_send_user_signal"
        if settings.signal_at_preemption
        else "",
        requeue_delay_s=settings.requeue_delay_s,
        kill_wait_s=settings.kill_wait_s,
        node_timeout_s=settings.node_timeout_s,
        grace_s=settings.grace_s,
        nodes=nodes,
    )


def _user() -> str:
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:  # in a container, of a user without a name
        return str(os.getuid())


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()
