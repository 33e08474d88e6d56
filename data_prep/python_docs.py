"""The demonstration corpus: English that every machine with Python has, some 2 MB in 7,400 documents.

It is the language reference of `pydoc_data.topics` and the docstrings of the standard library, whose files are
parsed, never imported. Equal documents are kept once. Near-duplicates stay on one side of the split: two
documents are joined when they share at least half of the shorter one's runs of five words, whatever is joined
through others is one cluster, and clusters go to validation in the order of a hash until the share is reached.
"""

from __future__ import annotations

import ast
import hashlib
import os
import platform
import re
import sysconfig
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from data_prep.sources import TRAIN, VALIDATION, UnitSize, content_hash
from pgm_scale.errors import UserError

SHINGLE_WORDS = 5
JOINING_SHARE = 0.5

# Third-party packages, test suites, and programs with a library of their own.
_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3", "idlelib"}
_WORD = re.compile(r"\w+")


class PythonDocsSource:
    unit_size = UnitSize(documents=500)  # 15 units: a small corpus must be shared out among cores too
    detokenise = None

    def __init__(self, validation_share: float) -> None:
        if not 0 < validation_share < 1:
            raise UserError(f"--validation-share {validation_share} is not between 0 and 1; 0.05 is usual")
        self._validation_share = validation_share

    def describe(self) -> dict[str, Any]:
        digest = hashlib.sha256("\0".join(self._texts).encode()).hexdigest()
        return {
            "kind": "python-docs",
            "python": platform.python_version(),
            "validation_share": self._validation_share,
            "input": {"documents": len(self._texts), "sha256": digest},
        }

    def total_documents(self) -> int:
        return len(self._texts)

    def documents(self) -> Iterator[tuple[str, str]]:
        for number, text in enumerate(self._texts):
            yield VALIDATION if number in self._validation else TRAIN, text

    @cached_property
    def _validation(self) -> set[int]:
        return validation_documents(self._texts, self._validation_share)

    @cached_property
    def _texts(self) -> list[str]:
        return list(dict.fromkeys(_topics() + list(_docstrings(Path(sysconfig.get_path("stdlib"))))))


def _topics() -> list[str]:
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise UserError(
            "this Python lacks pydoc_data.topics; install the complete standard library"
        ) from None
    return [topics[name].strip() for name in sorted(topics)]


def _docstrings(library: Path) -> Iterator[str]:
    """Docstrings of all modules, classes and functions, files in sorted order."""
    files = []
    for root, folders, names in os.walk(library):
        folders[:] = [name for name in folders if name not in _SKIPPED_FOLDERS]
        files += [Path(root, name) for name in names if name.endswith(".py")]
    for file in sorted(files):
        try:
            with warnings.catch_warnings(action="ignore"):  # of escapes in old string literals
                tree = ast.parse(file.read_bytes())
        except (SyntaxError, ValueError, OSError):
            continue  # templates and unreadable files of a distribution's own
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                text = (ast.get_docstring(node) or "").strip()
                if text:
                    yield text


def validation_documents(texts: list[str], share: float) -> set[int]:
    """Numbers of the documents that are for validation: whole clusters, about `share` of all characters.

    A cluster that would overshoot the share is left to training, but for the first.
    """
    clusters = sorted(near_duplicate_clusters(texts), key=lambda c: min(content_hash(texts[i]) for i in c))
    wanted_characters = share * sum(map(len, texts))
    chosen: set[int] = set()
    for cluster in clusters:
        size = sum(len(texts[i]) for i in cluster)
        if not chosen or size <= wanted_characters:
            chosen.update(cluster)
            wanted_characters -= size
    return chosen


def near_duplicate_clusters(texts: list[str]) -> list[list[int]]:
    """Document numbers by cluster, by the rule at the top of this module; exact, by an inverted index."""
    shingles = [_shingles(text) for text in texts]
    holders: dict[int, list[int]] = defaultdict(list)
    for number, own in enumerate(shingles):
        for shingle in own:
            holders[shingle].append(number)
    parents = list(range(len(texts)))

    def root(number: int) -> int:
        while parents[number] != number:
            parents[number] = number = parents[parents[number]]
        return number

    for number, own in enumerate(shingles):
        shared = Counter(other for shingle in own for other in holders[shingle] if other < number)
        for other, count in shared.items():
            if count >= JOINING_SHARE * min(len(own), len(shingles[other])):
                parents[root(number)] = root(other)
    clusters: dict[int, list[int]] = defaultdict(list)
    for number in range(len(texts)):
        clusters[root(number)].append(number)
    return list(clusters.values())


def _shingles(text: str) -> set[int]:
    """Hashes of all runs of five words, case ignored; a shorter text is one run."""
    words = _WORD.findall(text.lower())
    last = max(1, len(words) - SHINGLE_WORDS + 1)
    return {content_hash(" ".join(words[i : i + SHINGLE_WORDS])) for i in range(last)}
