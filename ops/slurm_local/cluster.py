"""Start, ask and stop a Slurm whose controller and nodes are processes of this machine."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ops.slurm_local.configuration import Settings, slurm_conf
from ops.slurm_local.daemons import PACKAGES, Daemons, missing_programs
from ops.slurm_local.processes import Process, end_all, find_processes, is_daemon, name_of
from pgm_scale.errors import UserError

_JOB_END_S = 5
_DAEMON_END_S = 3
_SOCKET_PATH_LIMIT = 107  # of sockaddr_un


def default_folder() -> Path:
    return Path(tempfile.gettempdir()) / f"slurm_local-{os.getuid()}"


class LocalSlurm:
    """The Slurm of a folder, which holds all of it: slurm.conf, MUNGE's key and socket, state, spool and logs.

    The partition `urgent` preempts `main`. The nodes' names do not resolve: the ranks of a job meet at 127.0.0.1.
    Tried with Slurm 22.05 as root and as an ordinary user (nobody), whose jobs all run as that user.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = (folder or default_folder()).absolute()
        self.configuration = self.folder / "slurm.conf"

    @property
    def environment(self) -> dict[str, str]:
        """This process's environment for use with this Slurm, without the variables of another."""
        kept = {key: value for key, value in os.environ.items() if not re.match("SLURM|SBATCH|SRUN", key)}
        return {**kept, "SLURM_CONF": str(self.configuration)}

    def start(self, settings: Settings) -> None:
        """Start with an empty queue, job ids from 1 on; returns when all nodes are idle.

        Raises:
            UserError: a program is missing, it runs already, or a daemon does not come up.
        """
        self._check_can_start()
        self._prepare_folder(settings)
        daemons = Daemons(self.configuration)
        try:
            daemons.start("munged", self._munged_command())
            daemons.wait_until(self._socket.exists, "munged makes no socket")
            daemons.start("slurmctld", ["slurmctld", "-D", "-c", "-f", str(self.configuration)])
            for node in settings.node_names:
                self.start_node(node, daemons)
            all_idle = dict.fromkeys(settings.node_names, "idle")
            daemons.wait_until(lambda: self.node_states() == all_idle, "not all nodes become idle")
        except BaseException:
            self.stop()
            raise

    def stop(self) -> bool:
        """End all processes of this Slurm and its jobs, even if it is half dead; the logs stay.

        Returns:
            Whether there were any.
        """
        if not self.processes():
            return False
        # The controller first, so that it starts nothing more; then the jobs, which may clean up after SIGTERM.
        end_all(lambda: [one for one in self.processes() if name_of(one) == "slurmctld"], _DAEMON_END_S)
        end_all(lambda: [one for one in self.processes() if not is_daemon(one)], _JOB_END_S)
        end_all(self.processes, _DAEMON_END_S)
        return True

    def processes(self, node: str | None = None) -> list[Process]:
        """All live processes of this Slurm, or those of a node: its slurmd, the steps and the tasks there."""
        return find_processes(self.configuration, node)

    def start_node(self, node: str, daemons: Daemons | None = None) -> None:
        """Start the slurmd of a node, as after `kill_node`."""
        command = ["slurmd", "-D", "-f", str(self.configuration), "-N", node]
        (daemons or Daemons(self.configuration)).start(f"slurmd-{node}", command, {"SLURMD_NODENAME": node})

    def kill_node(self, node: str) -> None:
        """As if it lost power: SIGKILL to its slurmd, steps and tasks. Slurm notices after `node_timeout_s`."""
        end_all(lambda: self.processes(node), patience_s=0)

    def signal_at_preemption(self, sends_user_signal: bool) -> None:
        """Change `Settings.signal_at_preemption` while it runs."""
        name = "SlurmctldParameters"
        kept = [line for line in self.configuration.read_text().splitlines() if not line.startswith(name)]
        wanted = [f"{name}=preempt_send_user_signal"] if sends_user_signal else []
        self.configuration.write_text("\n".join([*kept, *wanted, ""]))
        self.run("scontrol", "reconfigure")

    def run(self, *command: str) -> str:
        """The output of a command that talks to this Slurm.

        Raises:
            UserError: it failed; with its own message.
        """
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=120)
        if done.returncode != 0:
            message = " ".join((done.stderr or done.stdout).split())
            raise UserError(f"{' '.join(command)}: exit code {done.returncode}: {message}")
        return done.stdout

    def submit(self, script: str, *options: str) -> str:
        """The job id of a batch script given as text."""
        done = subprocess.run(
            ["sbatch", "--parsable", *options],
            input=script,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=60,
        )
        if done.returncode != 0:
            raise UserError(f"sbatch: {' '.join(done.stderr.split())}")
        return done.stdout.strip()

    def job(self, job_id: str) -> dict[str, str]:
        """What `scontrol show job` says, of running jobs and of those that ended within the hour."""
        return dict(re.findall(r"(\S+?)=(\S*)", self.run("scontrol", "show", "job", "--oneliner", job_id)))

    def job_state(self, job_id: str) -> str:
        """PENDING, RUNNING, COMPLETING, COMPLETED, FAILED, CANCELLED, TIMEOUT, NODE_FAIL, PREEMPTED, ..."""
        return self.job(job_id)["JobState"]

    def node_states(self) -> dict[str, str]:
        """Node name to idle, mixed, allocated, down, ..., with Slurm's marks such as * for silent; may be empty."""
        command = ["sinfo", "--noheader", "--Node", "--partition=main", "--format=%N %T"]
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True)
        return dict(line.split() for line in done.stdout.splitlines())

    @property
    def _socket(self) -> Path:
        return self.folder / "munge" / "socket"

    def _check_can_start(self) -> None:
        if self.processes():
            raise UserError(
                f"a Slurm runs already in {self.folder}; stop it first, or use it: {self.export_line()}"
            )
        if self.folder.exists() and not self._is_ours():
            raise UserError(
                f"{self.folder}: give a new or empty folder of your own; this one is something else"
            )
        if len(os.fsencode(self._socket)) > _SOCKET_PATH_LIMIT or re.search(r"[\s#%,=]", str(self.folder)):
            raise UserError(
                f"{self.folder}: give a folder with a shorter name and without spaces, #, %, commas and ="
            )
        if missing := missing_programs():
            raise UserError(
                f"cannot find {', '.join(missing)}; on Debian or Ubuntu: "
                f"apt-get install --no-install-recommends {PACKAGES}"
            )

    def _is_ours(self) -> bool:
        """An empty folder of this user, or one in which a local Slurm has run."""
        folder = self.folder
        if not folder.is_dir() or folder.stat().st_uid != os.getuid():
            return False
        return self.configuration.exists() or not any(folder.iterdir())

    def export_line(self) -> str:
        return f"export SLURM_CONF={self.configuration}"

    def _prepare_folder(self, settings: Settings) -> None:
        for name in ("state", "spool", "logs", "munge"):
            shutil.rmtree(self.folder / name, ignore_errors=True)
            (self.folder / name).mkdir(parents=True)
        for node in settings.node_names:
            (self.folder / "spool" / node).mkdir()
        key = self.folder / "munge" / "key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(128))
        # slurmd loads a cgroup plugin though nothing here uses one; that of version 1 needs no systemd.
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        self.configuration.write_text(slurm_conf(self.folder, settings))

    def _munged_command(self) -> list[str]:
        files = ("key-file", "socket", "pid-file", "log-file", "seed-file")
        options = [f"--{name}={self.folder / 'munge' / name.removesuffix('-file')}" for name in files]
        # --force: of a folder that others may write, such as /tmp, it only warns.
        return ["munged", "--foreground", "--force", *options]


@contextmanager
def local_slurm(folder: Path, settings: Settings | None = None) -> Iterator[LocalSlurm]:
    """A Slurm that is stopped, with its jobs, on the way out."""
    cluster = LocalSlurm(folder)
    cluster.start(settings or Settings())
    try:
        yield cluster
    finally:
        cluster.stop()
