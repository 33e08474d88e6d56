"""Files of a remote folder into a cache that the processes of a node share: fetching, retries, locks."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO
from urllib.parse import urlparse

from pgm_scale.errors import UserError
from pgm_scale.files import commit, temporary_name

DOWNLOAD_TIMEOUT_S = 30.0  # without a byte; the store's client itself retries, five times for S3
RETRY_DELAYS_S = (2.0, 8.0, 30.0)  # for a store that is busy or down, whose client gives up within seconds
_LOCK_WARNING_S = 60.0
_LOCK_POLL_S = 0.05

_log = logging.getLogger(__name__)


def fetch(url: str, path: Path) -> None:
    """Download `url` to `path`, replacing what is there. The caller holds the file's lock.

    Raises:
        UserError: it cannot be fetched, which of a store that is busy is so after some retries.
    """
    from streaming.base.storage import CloudDownloader

    temporary = temporary_name(path)
    for delay_s in (*RETRY_DELAYS_S, None):
        try:
            if os.path.lexists(temporary):  # the downloader keeps a file that exists
                delete(temporary)
            CloudDownloader.direct_download(url, str(temporary), DOWNLOAD_TIMEOUT_S)
            commit(temporary, path)
            return
        except UserError:
            raise
        except Exception as error:  # the stores' clients share no base class
            reason = getattr(error, "last_exception", error)  # of boto3's "Max Retries Exceeded"
            what = f"{url}: cannot be fetched ({type(reason).__name__}: {_first_line(reason)})"
            if delay_s is None or not _may_pass(reason):
                raise UserError(
                    f"{what}; check the address, the credentials and the room in data.cache_folder"
                ) from error
        _log.warning("%s; trying again in %g s", what, delay_s)
        time.sleep(delay_s)


def delete(path: Path) -> None:
    """Whatever lies where a file of the cache should."""
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    except OSError as error:
        raise UserError(
            f"{path}: cannot be deleted ({error.strerror}); delete it, or mend permissions"
        ) from None


def remote_names(url: str) -> set[str] | None:
    """Names in a remote folder, or None where listing is not allowed; then a missing shard is found late."""
    from streaming.base.storage import CloudUploader

    try:
        uploader = CloudUploader.get(url)  # the part of streaming that can list; it makes a scratch folder
        shutil.rmtree(uploader.local, ignore_errors=True)
        prefix = urlparse(url).path.strip("/") + "/"
        return {key.removeprefix(prefix) for key in uploader.list_objects("")}
    except Exception as error:  # the stores' clients share no base class
        _log.warning("%s: cannot be listed (%s); missing shards are not known yet", url, _first_line(error))
        return None


def _may_pass(error: BaseException) -> bool:
    """Whether a store is busy or cannot be reached. Time-outs were long and many; the rest is refusal."""
    status = getattr(error, "response", None)
    if isinstance(status, dict):  # botocore's
        status = status.get("ResponseMetadata", {}).get("HTTPStatusCode")
    elif (code := getattr(error, "code", None)) is not None:  # of google.api_core
        status = code
    if isinstance(status, int):
        return status >= 500 or status == 429
    names = {kind.__name__ for kind in type(error).__mro__}
    return bool(names & {"EndpointConnectionError", "ConnectionClosedError", "ConnectionError"}) and not (
        names & {"ConnectTimeoutError", "ReadTimeoutError", "ProxyConnectionError"}
    )


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0]


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """An exclusive lock between the processes of a node; it ends with the process that holds it.

    A download may take long, so it is waited for without an end, but not without a word about who has it.

    Raises:
        UserError: the folder cannot be written, or has no room.
    """
    try:
        file = open(path, "a+")  # noqa: SIM115 - closed below
    except OSError as error:
        raise UserError(
            f"{path.parent}: the cache cannot be written ({error.strerror}); make room, mend permissions, or "
            "choose another data.cache_folder"
        ) from None
    with file:
        warn_s = time.monotonic() + _LOCK_WARNING_S
        while not _taken(file):
            if time.monotonic() > warn_s:
                file.seek(0)
                holder = file.read(200).strip() or "another process"
                _log.warning("%s: held by %s, which fetches the file or hangs; waiting", path, holder)
                warn_s = time.monotonic() + _LOCK_WARNING_S
            time.sleep(_LOCK_POLL_S)
        with contextlib.suppress(OSError):  # a full disk: the download will say so
            file.truncate(0)
            file.write(f"process {os.getpid()} on {os.uname().nodename}\n")
            file.flush()
        yield


def _taken(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass  # some network file systems have no locks: two may fetch the same, and each then checks it
    return True
