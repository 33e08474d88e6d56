"""The VQ tokenizer as users meet it: published files, its own folder, and images to codes and back."""

import argparse
import hashlib
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pgm_scale.config import VQModelConfig
from pgm_scale.errors import UserError
from pgm_scale.models.vq import VQModel
from pgm_scale.vq_tokenizer import VQTokenizer, to_pixels
from tests.models.test_vq import SMALL, randomised

GRAY = VQModelConfig(
    codebook_size=11,
    code_size=3,
    channels=32,
    channel_multipliers=(2, 1),
    num_res_blocks=1,
    z_channels=6,
    image_channels=1,
)


def _images(count: int, side: int, channels: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, side, side, channels), dtype=np.uint8)


def _published(model: VQModel) -> dict[str, Any]:
    """A `state_dict` as LlamaGen saves it, with the buffer that nothing reads."""
    return {**model.state_dict(), "quantize.codebook_used": torch.zeros(65_536)}


def _junk() -> dict[str, Any]:
    """What its training script stores beside the model."""
    moments = {"step": torch.tensor(9.0), "exp_avg": torch.zeros(3), "exp_avg_sq": torch.zeros(3)}
    optimizer = {"state": {0: moments}, "param_groups": [{"lr": 1e-4, "betas": (0.9, 0.95), "params": [0]}]}
    args = argparse.Namespace(codebook_size=19, vq_model="VQ-8", lr=1e-4, cloud=None)
    discriminator = {"main.0.weight": torch.ones(2)}
    return {"optimizer": optimizer, "discriminator": discriminator, "steps": 9, "args": args}


@pytest.mark.parametrize("config", [SMALL, GRAY])
def test_a_published_file_loads_by_the_shapes_in_it(tmp_path: Path, config: VQModelConfig) -> None:
    model = randomised(config)
    torch.save({"model": _published(model), **_junk()}, tmp_path / "vq.pt")
    tokenizer = VQTokenizer.load(tmp_path / "vq.pt", "cpu")
    assert tokenizer.config == config
    assert tokenizer.downsampling == 2 ** (len(config.channel_multipliers) - 1)
    images = _images(2, 16, config.image_channels)
    assert np.array_equal(tokenizer.encode(images), VQTokenizer(model).encode(images))
    assert not any(p.requires_grad for p in tokenizer.model.parameters())


def test_the_average_is_preferred(tmp_path: Path) -> None:
    torch.manual_seed(1)
    trained, average = VQModel(GRAY), VQModel(GRAY)
    torch.save({"model": _published(trained), "ema": _published(average)}, tmp_path / "vq.pt")
    loaded = VQTokenizer.load(tmp_path / "vq.pt", "cpu")
    assert loaded.description() == VQTokenizer(average).description()
    assert loaded.description() != VQTokenizer(trained).description()


class _Hostile:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def _refusal(path: Path) -> str:
    with pytest.raises(UserError) as raised:
        VQTokenizer.load(path, "cpu")
    message = str(raised.value)
    assert str(path) in message
    assert "\n" not in message
    return message


@pytest.mark.fault(26)
def test_a_file_that_would_run_code_is_refused_and_does_not(tmp_path: Path) -> None:
    trace = tmp_path / "ran"
    content = {"model": _published(VQModel(GRAY)), "args": _Hostile(trace)}
    torch.save(content, tmp_path / "vq.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps({"model": _Hostile(trace)}, protocol=2))
    for name in ("vq.pt", "plain.pt"):
        assert "run code" in _refusal(tmp_path / name)
        assert not trace.exists()
    pickle.loads((tmp_path / "plain.pt").read_bytes())
    assert trace.exists()  # it is hostile


def test_damaged_and_foreign_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "vq.pt"
    torch.save({"model": _published(VQModel(GRAY))}, path)
    whole = path.read_bytes()
    for content in (b"", b"hello", whole[: len(whole) // 2]):
        path.write_bytes(content)
        assert "damaged" in _refusal(path)
    for tree, part in (
        ([1, 2], "neither `ema` nor `model`"),
        ({"state_dict": {}}, "neither `ema` nor `model`"),
        ({"model": {"a.weight": torch.zeros(2)}}, "KeyError: 'encoder.conv_in.weight'"),
        ({"model": {"a.weight": "text"}}, "a.weight"),
    ):
        torch.save(tree, path)
        assert part in _refusal(path)
    assert "no such VQ tokenizer" in _refusal(tmp_path / "absent.pt")
    assert "holds no VQ tokenizer" in _refusal(tmp_path)


@pytest.mark.fault(25)
def test_all_wrong_names_and_shapes_are_told_at_once(tmp_path: Path) -> None:
    state = _published(VQModel(GRAY))
    del state["decoder.mid.1.q.bias"]
    state["decoder.extra.weight"] = torch.zeros(1)
    state["quant_conv.bias"] = torch.zeros(4)
    torch.save({"model": state}, tmp_path / "vq.pt")
    message = _refusal(tmp_path / "vq.pt")
    for part in (
        "decoder.mid.1.q.bias is missing",
        "decoder.extra.weight is unknown",
        "quant_conv.bias has shape (4,), not (3,)",
    ):
        assert part in message


def test_its_folder_is_described_and_verified(tmp_path: Path) -> None:
    tokenizer = VQTokenizer(randomised(GRAY))
    tokenizer.save(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_bytes())
    assert content["kind"] == "vq"
    assert content["config"]["channel_multipliers"] == [2, 1]
    weights = tmp_path / "vq.safetensors"
    assert content["weights_sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert (tmp_path / "tokenizer.json").read_bytes() == tokenizer.description()

    loaded = VQTokenizer.load(tmp_path, "cpu")
    assert loaded.config == GRAY
    assert loaded.description() == tokenizer.description()
    images = _images(3, 8, 1)
    assert np.array_equal(loaded.encode(images), tokenizer.encode(images))

    changes: list[dict[str, Any]] = [{"channels": 33}, {"channel_multipliers": []}, {"z_channels": -1}]
    for change in changes:
        tree = content | {"config": content["config"] | change}
        (tmp_path / "tokenizer.json").write_text(json.dumps(tree))
        with pytest.raises(UserError, match="no VQ model has the sizes"):
            VQTokenizer.load(tmp_path, "cpu")
    (tmp_path / "tokenizer.json").write_bytes(tokenizer.description())

    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(UserError, match="other SHA-256"):
        VQTokenizer.load(tmp_path, "cpu")
    trees: tuple[Any, ...] = (
        {"kind": "pixels"},
        content | {"kind": "bpe"},
        content | {"config": {"channels": "x"}},
        [],
    )
    for tree in trees:
        (tmp_path / "tokenizer.json").write_text(json.dumps(tree))
        with pytest.raises(UserError, match="does not describe a VQ tokenizer"):
            VQTokenizer.load(tmp_path, "cpu")


@pytest.mark.parametrize("config", [SMALL, GRAY])
def test_batches_do_not_change_an_image(config: VQModelConfig) -> None:
    tokenizer, images = VQTokenizer(randomised(config)), _images(7, 16, config.image_channels)
    codes = tokenizer.encode(images, batch_images=7)
    assert codes.dtype == np.int64
    assert codes.shape == (7, (16 // tokenizer.downsampling) ** 2)
    assert len(np.unique(codes)) > 3
    decoded = tokenizer.decode(codes, batch_images=7)
    assert decoded.dtype == np.uint8
    assert decoded.shape == images.shape
    for batch in (1, 3):
        assert np.array_equal(tokenizer.encode(torch.from_numpy(images), batch), codes)
        # A convolution may round differently in another batch, and a value may lie between two pixels.
        assert np.abs(tokenizer.decode(codes, batch).astype(int) - decoded).max() <= 1
    assert tokenizer.encode(images[:0]).shape == (0, codes.shape[1])
    assert tokenizer.decode(codes[:0]).shape == (0, *images.shape[1:])


def test_both_ways_are_computed_without_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = VQTokenizer(randomised(GRAY))
    seen: list[tuple[bool, bool]] = []
    for name in ("encode", "decode"):
        original = getattr(tokenizer.model, name)

        def spy(batch: torch.Tensor, original: Any = original) -> torch.Tensor:
            seen.append((torch.backends.cudnn.allow_tf32, torch.backends.cudnn.deterministic))
            return original(batch)

        monkeypatch.setattr(tokenizer.model, name, spy)
    tokenizer.decode(tokenizer.encode(_images(1, 4, 1)))
    assert seen == [(False, True)] * 2


def test_images_need_not_be_square() -> None:
    tokenizer = VQTokenizer(randomised(GRAY))
    image = _images(1, 16, 1)[:, :6]
    assert tokenizer.encode(image).shape == (1, 3 * 8)


def test_pixels_are_rounded_and_clamped() -> None:
    values = torch.tensor([-9.0, -1.0, -0.0003, 0.0, 2.4 / 127.5 - 1, 2.6 / 127.5 - 1, 0.999, 1.0, 5.0])
    found = to_pixels(values.view(1, 1, 3, 3))
    assert found.flatten().tolist() == [0, 0, 127, 128, 2, 3, 255, 255, 255]
    every = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1)
    assert torch.equal(to_pixels(every.permute(0, 3, 1, 2).float() / 127.5 - 1), every)


@pytest.mark.parametrize(
    ("images", "part"),
    [
        (np.zeros((1, 16, 16, 3), np.uint8), r"uint8 \[images, height, width, 1\]"),
        (np.zeros((1, 16, 15, 1), np.uint8), "divisible by 2"),
        (np.zeros((1, 16, 16, 1), np.float32), "torch.float32"),
        (np.zeros((16, 16, 1), np.uint8), r"shape \(16, 16, 1\)"),
    ],
)
def test_images_that_do_not_fit_are_refused(images: np.ndarray, part: str) -> None:
    with pytest.raises(UserError, match=part):
        VQTokenizer(VQModel(GRAY)).encode(images)


def test_codes_that_do_not_fit_are_refused() -> None:
    tokenizer = VQTokenizer(VQModel(GRAY))
    for codes, part in (
        (np.full((1, 4), 11), "codebook of 11"),
        (np.full((1, 4), -1), "from -1"),
        (np.zeros((1, 5), np.int64), "square grid"),
    ):
        with pytest.raises(UserError, match=part):
            tokenizer.decode(codes)
