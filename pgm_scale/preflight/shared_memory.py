"""/dev/shm: room for NCCL and the loaders, and what dead processes have left there. Nothing is deleted."""

from __future__ import annotations

import os
import pwd
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pgm_scale.preflight.rows import Row

FOLDER = Path("/dev/shm")
_ROOM_PER_RANK_BYTES = 64 << 20
_GRACE_S = 60.0  # a file is made before it is mapped
_SHOWN_FILES = 3
_HOSTS_PID_NAMESPACE = 0xEFFFFFFC  # the kernel's constant; in another, living processes may not be seen
# Of DeepSpeed, torch, NCCL, mosaicml-streaming, UCX, MPI, Intel's OpenMP, joblib, Python's multiprocessing.
_OURS = re.compile(
    r"deepspeed_|torch_|nccl-|\d{6}_|ucx_|vader_|sm_segment|__KMP_REGISTERED_LIB_|sem\.|psm_|pym-|loky-|joblib_"
)
_PID = re.compile(r"(?:torch_|__KMP_REGISTERED_LIB_|sem\.loky-|loky-)(\d+)[_-]")


@dataclass(frozen=True)
class Leftover:
    """A file of shared memory whose owner is dead."""

    path: Path
    uid: int
    size_bytes: int
    age_s: float

    @property
    def owner(self) -> str:
        try:
            return pwd.getpwuid(self.uid).pw_name
        except KeyError:
            return f"uid {self.uid}"


def shared_memory_rows(ranks_here: int, folder: Path = FOLDER) -> Iterator[Row]:
    """Room in `folder`, and its leftovers by owner."""
    free_bytes = shutil.disk_usage(folder).free
    value = f"{free_bytes / 2**30:.2f} GiB free"
    if free_bytes < ranks_here * _ROOM_PER_RANK_BYTES:
        to_do = "remove leftovers, or give the container more (docker --shm-size, --ipc=host)"
        yield Row("shared memory", value, "warning", to_do, free_bytes)
    else:
        yield Row("shared memory", value, number=free_bytes)
    found: dict[str, list[Leftover]] = {}
    for leftover in leftovers(folder):
        found.setdefault(leftover.owner, []).append(leftover)
    for owner, files in found.items():
        yield _row(owner, files)


def _row(owner: str, files: list[Leftover]) -> Row:
    size_bytes, age_s = sum(file.size_bytes for file in files), max(file.age_s for file in files)
    shown = ", ".join(file.path.name for file in files[:_SHOWN_FILES])
    shown += ", ..." if len(files) > _SHOWN_FILES else ""
    size = f"{size_bytes / 2**20:.0f} MiB, up to {age_s / 3600:.0f} h old"
    value = f"{len(files)} file(s) of dead processes of {owner}, {size}: {shown}"
    who = "remove them" if files[0].uid == os.getuid() else f"ask {owner} or an administrator to remove them"
    if os.stat("/proc/self/ns/pid").st_ino != _HOSTS_PID_NAMESPACE:
        who = f"if no other container uses them, {who}"
    return Row("leftovers", value, "warning", f"{who} from {files[0].path.parent}")


def leftovers(folder: Path = FOLDER, processes: Path = Path("/proc")) -> list[Leftover]:
    """Files of known libraries, older than a minute, that no living process can be using.

    None has it mapped or open, and the process whose number is in its name is gone; where there is no number, the
    owner has no processes that this one may not look into.
    """
    used, hidden = _in_use(processes)
    sees_all = (processes / "1").exists()  # /proc may be mounted so that others' processes are not in it
    found = []
    for path in sorted(folder.iterdir()):
        try:
            status = path.stat()
        except OSError:  # gone meanwhile
            continue
        age_s = time.time() - status.st_mtime
        if not _OURS.match(path.name) or not path.is_file() or age_s < _GRACE_S:
            continue
        if (status.st_dev, status.st_ino) in used or not (sees_all or status.st_uid == os.getuid()):
            continue
        match = _PID.match(path.name)
        alive = (processes / match.group(1)).exists() if match else status.st_uid in hidden
        if not alive:
            found.append(Leftover(path, status.st_uid, status.st_size, age_s))
    return found


def _in_use(processes: Path) -> tuple[set[tuple[int, int]], set[int]]:
    """Files (device, inode) that processes have mapped or open, and users with unreadable processes.

    Processes of one's own that cannot be read are login programs that forbid it, no users of these files.
    """
    used: set[tuple[int, int]] = set()
    hidden: set[int] = set()
    for process in processes.iterdir():
        if not process.name.isdigit():
            continue
        try:
            uid = process.stat().st_uid
            used |= _files_of(process)
        except PermissionError:
            hidden.add(uid)
        except OSError:  # it has ended meanwhile
            continue
    return used, hidden - {os.getuid()}


def _files_of(process: Path) -> set[tuple[int, int]]:
    files = set()
    for line in (process / "maps").read_text(errors="replace").splitlines():
        fields = line.split(maxsplit=5)
        if len(fields) == 6 and fields[4] != "0":
            major, minor = (int(part, 16) for part in fields[3].split(":"))
            files.add((os.makedev(major, minor), int(fields[4])))
    for descriptor in (process / "fd").iterdir():
        try:
            status = descriptor.stat()
        except OSError:  # closed meanwhile, or a file that cannot be reached
            continue
        files.add((status.st_dev, status.st_ino))
    return files
