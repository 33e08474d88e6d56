import random
from contextlib import contextmanager
from pathlib import Path

import pytest

from data_prep import pipeline, units
from data_prep.tokenizers import open_tokenizer


def random_text(seed: int, words: int) -> str:
    """Pseudo-English with repeated words, so that BPE finds merges."""
    generator = random.Random(seed)
    vocabulary = ["".join(generator.choices("etaoinshrdlu", k=generator.randint(1, 8))) for _ in range(300)]
    return " ".join(generator.choices(vocabulary, k=words))


def tree(folder: Path) -> dict[str, bytes]:
    """Relative path -> bytes of every file below `folder`."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


@pytest.fixture
def text_folder(tmp_path: Path) -> Path:
    """120 documents of 20 to 400 words, two of them equal."""
    folder = tmp_path / "text"
    folder.mkdir()
    for number in range(120):
        words = 20 + (number * 37) % 380
        (folder / f"{number:03d}.txt").write_text(random_text(7 if number == 90 else number, words))
    return folder


@pytest.fixture
def no_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the workers' calls in this process, the newest first, which a pool might do too."""

    @contextmanager
    def pool(encoding, workers):
        units._encoding = encoding
        units._tokenizer = open_tokenizer(encoding.tokenizer_file.read_bytes(), "")

        def run_bounded(calls):
            for key, function, *arguments in reversed(list(calls)):
                yield key, function(*arguments)

        yield run_bounded

    monkeypatch.setattr(pipeline, "worker_pool", pool)
