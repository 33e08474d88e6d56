"""Where a split folder is and whether its files are what the manifest says.

A local folder is read in place. Files of a remote folder (`s3://`, `gs://`) are fetched with
mosaicml-streaming's downloader into `cache_folder/<fingerprint of the URL>/`, which all processes of a node
share and which grows to the size of the split. Size and SHA-256 are checked every time a file is opened, on
every run: streaming itself would serve a cached shard that once failed its hash. SHA-256 reads some 1 GB/s.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import stat
from pathlib import Path
from urllib.parse import urlparse

from pgm_scale.data.fetching import delete, fetch, locked, remote_names
from pgm_scale.data.manifest import (
    MANIFEST_NAME,
    TOKENIZER_NAME,
    VQ_WEIGHTS_NAME,
    DatasetManifest,
    Shard,
)
from pgm_scale.errors import UserError
from pgm_scale.files import sha256_file

REMOTE_SCHEMES = ("s3", "gs")

_log = logging.getLogger(__name__)


def is_remote(split: str | Path) -> bool:
    return "://" in str(split)


class SplitStorage:
    """One split folder, local or remote, and its manifest.

    Args:
        split: a folder, or an `s3://` or `gs://` URL of one (`S3_ENDPOINT_URL` names another S3 server).
        cache_folder: a local folder for what is fetched; needed for a URL, unused for a folder.

    Raises:
        UserError: the manifest or shards are missing or wrong, or the URL cannot be read.
    """

    def __init__(self, split: str | Path, cache_folder: str | Path | None = None) -> None:
        self.split = str(split).rstrip("/")
        self._remote = is_remote(split)
        if not self._remote:
            self._folder = Path(split)
            self.manifest = DatasetManifest.load(self._folder)
            return
        scheme = urlparse(self.split).scheme
        if scheme not in REMOTE_SCHEMES:
            raise UserError(
                f"{self.split}: cannot read {scheme}://; give a folder or one of s3:// and gs:// URLs"
            )
        if cache_folder is None:
            raise UserError(f"{self.split}: a remote split needs data.cache_folder, a local folder; set it")
        self._folder = Path(cache_folder) / hashlib.sha256(self.split.encode()).hexdigest()[:16]
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"data.cache_folder {cache_folder}: cannot be written ({error.strerror}); choose another"
            ) from None
        self.manifest = self._remote_manifest()

    def shard_path(self, shard: Shard) -> Path:
        """A local file that was just found to be the shard; a remote one is fetched if need be.

        Raises:
            UserError: the file is missing or corrupt, which for a remote one means twice in a row.
        """
        return self._verified(shard.name, shard.sha256, shard.bytes)

    def tokenizer_path(self) -> Path:
        """A local `tokenizer.json` with the manifest's fingerprint; of image codes, the VQ's weights are beside it.

        Raises:
            UserError: a file is missing or corrupt.
        """
        path = self._verified(TOKENIZER_NAME, self.manifest.tokenizer_sha256, None)
        if self.manifest.images is not None and self.manifest.images.tokens == "codes":
            self._verified(VQ_WEIGHTS_NAME, _weights_sha256(path), None)
        return path

    def _verified(self, name: str, sha256: str, size_bytes: int | None) -> Path:
        path = self._folder / name
        if not self._remote:
            fault = _fault(path, sha256, size_bytes)
            if fault:
                raise UserError(f"{path}: {fault}; copy the file again or prepare the dataset again")
            return path
        with locked(self._folder / f".{name}.lock"):
            for fetches_left in (2, 1, 0):
                fault = _fault(path, sha256, size_bytes)
                if fault is None:
                    return path
                if os.path.lexists(path):
                    _log.warning("%s: %s; deleting it", path, fault)
                    delete(path)
                if fetches_left:
                    fetch(f"{self.split}/{name}", path)
        raise UserError(f"{self.split}/{name}: {fault}, fetched twice; upload the file again")

    def _remote_manifest(self) -> DatasetManifest:
        """Fetched anew by every run: what lies at a URL may have been replaced."""
        with locked(self._folder / f".{MANIFEST_NAME}.lock"):
            fetch(f"{self.split}/{MANIFEST_NAME}", self._folder / MANIFEST_NAME)
            try:
                text = (self._folder / MANIFEST_NAME).read_bytes().decode()
            except UnicodeDecodeError:
                raise UserError(f"{self.split}/{MANIFEST_NAME}: not UTF-8 text; upload it again") from None
        manifest = DatasetManifest.from_json(text, f"{self.split}/{MANIFEST_NAME}")
        names = remote_names(self.split)
        absent = [s.name for s in manifest.shards if names is not None and s.name not in names]
        if absent:
            raise UserError(
                f"{self.split}: {len(absent)} of {len(manifest.shards)} shards are missing: "
                f"{', '.join(absent)}; upload them"
            )
        return manifest


def open_splits(
    train: str, validation: str, cache_folder: str | None, problems: list[str]
) -> list[SplitStorage]:
    """The two splits of a run, which must have one vocabulary; a line is added to `problems` for each fault.

    Splits that cannot be opened are left out.
    """
    splits = []
    for path in (train, validation):
        try:
            splits.append(SplitStorage(path, cache_folder))
        except UserError as error:
            problems.append(str(error))
    if len(splits) == 2:
        differences = splits[0].manifest.differences(splits[1].manifest)
        problems += [f"data.train and data.validation differ in {line}" for line in differences]
    return splits


def _weights_sha256(tokenizer_path: Path) -> str:
    try:
        return str(json.loads(tokenizer_path.read_bytes())["weights_sha256"])
    except (ValueError, LookupError, TypeError):
        raise UserError(
            f"{tokenizer_path}: names no weights of a VQ tokenizer, which image codes need; prepare the data again"
        ) from None


def _fault(path: Path, sha256: str, size_bytes: int | None) -> str | None:
    """Why the file is not the one described, or None."""
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):  # reading a FIFO would wait for ever
            return "not a plain file"
        found_bytes = found.st_size
        if size_bytes is not None and found_bytes != size_bytes:
            return f"corrupt: {found_bytes} bytes instead of {size_bytes}"
        digest = sha256_file(path)
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return None if digest == sha256 else f"corrupt: SHA-256 {digest} instead of {sha256}"
