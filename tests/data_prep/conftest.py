import random
from contextlib import contextmanager
from pathlib import Path

import pytest

from data_prep import pipeline, units


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
        units._encode = encoding.start()

        def run_bounded(calls):
            for key, function, *arguments in reversed(list(calls)):
                yield key, function(*arguments)

        yield run_bounded

    monkeypatch.setattr(pipeline, "worker_pool", pool)


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory):
    """A tiny VQ tokenizer with a code for every image: its folder, and itself."""
    folder = tmp_path_factory.mktemp("vq")
    import torch

    from pgm_scale.config import VQModelConfig
    from pgm_scale.models.vq import VQModel
    from pgm_scale.vq_tokenizer import VQTokenizer

    config = VQModelConfig(
        codebook_size=40, code_size=4, channels=32, channel_multipliers=(1, 2), num_res_blocks=1, z_channels=8
    )
    generator = torch.Generator().manual_seed(3)
    model = VQModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    vq = VQTokenizer(model)
    vq.save(folder)
    return folder, vq
