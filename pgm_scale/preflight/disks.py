"""The run folder seen from all nodes: written, read back, and the same one everywhere. Collective."""

from __future__ import annotations

import os
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from pgm_scale.files import write_synced
from pgm_scale.parallel.mesh import Mesh
from pgm_scale.parallel.rendezvous import within
from pgm_scale.preflight.rows import CHECK_TIMEOUT_S, Row, guarded
from pgm_scale.preflight.setup import existing_folder

_TOKEN_BYTES = 32
_TRIAL_BYTES = 4 << 20
_PATIENCE_S = 5.0  # a network file system may show a new file late
_POLL_S = 0.2


def run_folder_rows(mesh: Mesh, folder: str | Path, looks: bool) -> tuple[Row, ...]:
    """Rank 0 leaves a token where the run folder is or will be made; each node must find it at its own path there.

    Paths are resolved on each rank: a relative one means another folder where the working directory differs.

    Args:
        looks: whether this rank does so, one on each node; the others only come along.
    """
    left: tuple[str, int, str] | None = None
    failed: tuple[Row, ...] = ()
    if mesh.is_main:
        try:
            left = within(CHECK_TIMEOUT_S, lambda: _leave_token(folder))
        except OSError as error:
            to_do = "choose another run folder, or mount it"
            failed = (Row("run folder", f"{folder}: cannot be written ({_reason(error)})", "bad", to_do),)
    found = mesh.gather(left)[0]
    rows = failed
    if looks and not failed:
        rows = guarded("run folder", lambda: _look(folder, found))
    mesh.gather(None)  # all have read it
    if left is not None:
        with suppress(OSError):
            within(CHECK_TIMEOUT_S, (_at(folder, left[1]) / left[0]).unlink)
    return rows


def _reason(error: OSError) -> str:
    return error.strerror or ("no answer" if isinstance(error, TimeoutError) else str(error))


def _at(folder: str | Path, levels_up: int) -> Path:
    path = Path(folder).absolute()
    return (path, *path.parents)[levels_up]


def _leave_token(folder: str | Path) -> tuple[str, int, str]:
    """Name of the file, how many folders above the run folder it is, and what is in it."""
    existing, path = existing_folder(folder), Path(folder).absolute()
    name, token = f".preflight-{secrets.token_hex(8)}", secrets.token_hex(_TOKEN_BYTES)
    write_synced(existing / name, token.encode())
    return name, (path, *path.parents).index(existing), token


def _look(folder: str | Path, left: tuple[str, int, str] | None) -> Iterator[Row]:
    """Without a token, at least whether this node can write."""
    if left is None:
        place = existing_folder(folder)
    else:
        name, levels_up, token = left
        place = _at(folder, levels_up)
        if not _finds(place / name, token):
            to_do = "mount the file system there, or give an absolute path that all nodes share"
            yield Row("run folder", f"{place}: not the folder that rank 0 sees", "bad", to_do)
            return
    seconds = _try_writing(place)
    free_bytes = shutil.disk_usage(place).free
    value = f"{_TRIAL_BYTES >> 20} MiB in {seconds:.2f} s, {free_bytes / 2**30:.0f} GiB free"
    yield Row("run folder", value, number=_TRIAL_BYTES / seconds)


def _finds(path: Path, token: str) -> bool:
    deadline_s = time.monotonic() + _PATIENCE_S
    while True:
        with suppress(OSError):
            if path.read_text() == token:
                return True
        if time.monotonic() > deadline_s:
            return False
        time.sleep(_POLL_S)


def _try_writing(folder: Path) -> float:
    """Seconds to write a file, have it on the disk and read it back. Raises: OSError."""
    path, content = folder / f".preflight-{secrets.token_hex(8)}", os.urandom(_TRIAL_BYTES)
    begin_s = time.perf_counter()
    try:
        write_synced(path, content)
        if path.read_bytes() != content:
            raise OSError(f"{path} does not read as it was written")
        return time.perf_counter() - begin_s
    finally:
        path.unlink(missing_ok=True)
