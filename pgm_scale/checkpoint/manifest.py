"""The manifest of a checkpoint step: every file with its size and SHA-256, sealed by its own exact bytes."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from pgm_scale.checkpoint.fragments import FileEntry
from pgm_scale.checkpoint.peers import describe
from pgm_scale.files import sha256_file

MANIFEST_NAME = "manifest.json"
STATE_NAME = "state.json"
VERSION = 1
_HASH_THREADS = 4
_MAX_MANIFEST_BYTES = 1 << 28  # a million ranks
_SHA256 = re.compile("[0-9a-f]{64}")
# A file that fails so is damaged. Of all else (no permission, too many open files, a server that does not answer)
# the step may be good, so nothing must be judged by it.
_DAMAGE = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.EIO}


def rank_file_name(rank: int) -> str:
    return f"rank_{rank:05d}.safetensors"


@dataclass(frozen=True)
class Problem:
    """What is wrong with which file of a step."""

    file: str
    reason: str

    def __str__(self) -> str:
        return f"{self.file}: {self.reason}"


def join(problems: Sequence[Problem]) -> str:
    """All problems in one line."""
    return "; ".join(map(str, problems))


@dataclass(frozen=True)
class Manifest:
    """`files` are the rank files in rank order, then the state."""

    step: int
    files: tuple[FileEntry, ...]

    @property
    def rank_files(self) -> tuple[str, ...]:
        return tuple(entry.name for entry in self.files[:-1])

    def to_bytes(self) -> bytes:
        """JSON with the SHA-256 of its own content, always the same bytes for the same manifest."""
        body = {
            "version": VERSION,
            "step": self.step,
            "files": [dataclasses.asdict(entry) for entry in self.files],
        }
        seal = hashlib.sha256(json.dumps(body).encode()).hexdigest()
        return (json.dumps({"checkpoint": body, "sha256": seal}, indent=1) + "\n").encode()

    @staticmethod
    def from_bytes(data: bytes) -> Manifest:
        """Parse and check: every byte that differs from what `to_bytes` wrote is an error.

        Raises:
            ValueError: the bytes are no manifest of ours, or they were changed.
        """
        try:
            body = json.loads(data)["checkpoint"]
            if body["version"] != VERSION:
                raise ValueError(f"version {body['version']!r}, this program reads version {VERSION}")
            files = tuple(FileEntry(**entry) for entry in body["files"])
            manifest = Manifest(body["step"], files)
        except (KeyError, TypeError, RecursionError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ValueError(f"not a manifest ({type(error).__name__})") from None
        if not (_is_count(manifest.step) and all(map(_is_possible, files))):
            raise ValueError("not a manifest (a value of the wrong type)")
        if manifest.to_bytes() != data:
            raise ValueError("changed after it was written (its SHA-256 differs)")
        expected = [rank_file_name(rank) for rank in range(len(files) - 1)] + [STATE_NAME]
        if [entry.name for entry in files] != expected:
            raise ValueError("does not list the rank files in order and the state")
        return manifest


def _is_count(value: object) -> bool:
    return type(value) is int and value >= 0


def _is_possible(entry: FileEntry) -> bool:
    """What JSON gave has the types that were meant."""
    is_hash = isinstance(entry.sha256, str) and _SHA256.fullmatch(entry.sha256) is not None
    return isinstance(entry.name, str) and _is_count(entry.bytes) and is_hash


def read_manifest(folder: Path) -> Manifest:
    """Raises: ValueError: it is missing or damaged; OSError: it cannot be read, and may be good."""
    try:
        with open(folder / MANIFEST_NAME, "rb") as file:
            return Manifest.from_bytes(file.read(_MAX_MANIFEST_BYTES))
    except OSError as error:
        if error.errno not in _DAMAGE:
            raise
        raise ValueError(error.strerror) from None


def find_problems(
    folder: Path,
    step: int,
    share: int = 0,
    shares: int = 1,
    progress: Callable[[str], None] = lambda _: None,
) -> list[Problem]:
    """Read and hash this share (every `shares`-th file) of a step's files and compare with the manifest.

    The manifest itself and the list of files are checked by every share. An unlisted rank file is a problem,
    since it says that two checkpoints were mixed; other unlisted files are nobody's business.

    Raises:
        OSError: a file cannot be read, but may be good.
    """
    try:
        manifest = read_manifest(folder)
    except ValueError as error:
        return [Problem(MANIFEST_NAME, str(error))]
    if manifest.step != step:
        return [Problem(MANIFEST_NAME, f"belongs to step {manifest.step}")]
    try:
        found = {path.name for path in folder.glob("rank_*")}
    except FileNotFoundError:  # deleted meanwhile, by its run
        return [Problem(MANIFEST_NAME, "missing")]
    problems = [Problem(name, "not in the manifest") for name in sorted(found - set(manifest.rank_files))]
    return problems + _compare(folder, manifest.files[share::shares], _content_fault, progress)


def find_size_problems(folder: Path, entries: Sequence[FileEntry]) -> list[Problem]:
    """The cheap check before a commit: is every file there, with the size that its writer reported?"""
    return _compare(folder, entries, _size_fault)


def _compare(
    folder: Path,
    entries: Sequence[FileEntry],
    fault_of: Callable[[Path, FileEntry], str | None],
    progress: Callable[[str], None] = lambda _: None,
) -> list[Problem]:
    def compare(entry: FileEntry) -> Problem | None:
        try:
            fault = fault_of(folder / entry.name, entry)
        except FileNotFoundError:
            fault = "missing"
        except OSError as error:
            if error.errno not in _DAMAGE:
                raise
            fault = f"unreadable ({describe(error)})"
        return Problem(entry.name, fault) if fault else None

    problems = []
    with ThreadPoolExecutor(_HASH_THREADS) as pool:  # hashing releases the GIL
        for problem in pool.map(compare, entries):
            progress(f"checking {folder.name}")
            if problem is not None:
                problems.append(problem)
    return problems


def _size_fault(path: Path, entry: FileEntry) -> str | None:
    size_bytes = path.stat().st_size
    return None if size_bytes == entry.bytes else f"{size_bytes} bytes, the manifest says {entry.bytes}"


def _content_fault(path: Path, entry: FileEntry) -> str | None:
    fault = _size_fault(path, entry)
    if fault is None and sha256_file(path) != entry.sha256:
        fault = "SHA-256 differs from the manifest"
    return fault
