"""int8 weights: each within half a step, the model within the bound, and samplers as they are."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import pgm_scale
from pgm_scale import loading
from pgm_scale.errors import UserError
from pgm_scale.export.parity import LogitDifference, probe_logits
from pgm_scale.export.run import ExportRequest, export_run
from pgm_scale.models.int8 import Int8Linear, is_quantized
from pgm_scale.sampling import SAMPLERS, sampler_kinds
from pgm_scale.sampling.engine import fold
from tests.export.runs import KINDS, write_run
from tests.export.test_run import samples


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("runs")
    return {kind: write_run(root / kind, kind) for kind in KINDS}


def test_a_linear_is_rounded_to_its_rows_steps() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(50, 20)
    with torch.no_grad():
        linear.weight[3] = 0.0
        linear.weight[4] *= 1e-30
        linear.weight[5] *= 1e30
    x = torch.randn(7, 50)
    quantized = Int8Linear(linear)
    assert quantized.weight_OI.dtype == torch.int8
    for row in range(20):
        step = linear.weight[row].abs().max() / 127
        restored = quantized.weight_OI[row].double() * quantized.scale_O[row].double()
        assert ((restored - linear.weight[row].double()).abs() <= step.double() * (0.5 + 1e-5)).all()
        expected = (x.double() @ restored + linear.bias[row].double()).detach()
        found = quantized(x)[:, row].double()
        scale = (x.abs().double() @ restored.abs()) + linear.bias[row].abs()
        assert ((found - expected).abs() <= 1e-5 * scale).all()
    assert quantized(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_keeps_its_logits(
    runs: dict[str, Path], kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # Random weights this large make every block's output as large as its input: harder than a trained model.
    monkeypatch.setattr(loading, "INT8_BOUND", 0.1)
    export_run(str(runs[kind]), ExportRequest(str(tmp_path / "m")), lambda _: None)
    plain, quantized = pgm_scale.load(str(runs[kind])), pgm_scale.load(str(tmp_path / "m"), int8=True)
    difference = LogitDifference.of(probe_logits(plain), probe_logits(quantized))
    assert 0 < difference.relative_rms < 0.1
    kept = [name for name, module in quantized.model.named_modules() if type(module) is nn.Linear]
    assert not kept, kept
    names = {name for name, module in quantized.model.named_modules() if isinstance(module, Int8Linear)}
    assert names
    assert not any("output_layer" in name or "sigma_map" in name or "head" in name for name in names)
    assert all(p.dtype == torch.float32 for p in quantized.model.parameters())
    assert is_quantized(quantized.model)
    assert not is_quantized(plain.model)
    assert samples(quantized).shape == samples(plain).shape


@pytest.mark.parametrize("kind", ["pgm", "mdlm", "ar"])
def test_every_sampler_takes_it(runs: dict[str, Path], kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folded engine leaves it alone: its copies would be as large as the plain weights."""
    from dataclasses import replace

    monkeypatch.setattr(loading, "INT8_BOUND", 0.1)
    trained = pgm_scale.load(str(runs[kind]), int8=True)
    assert fold(trained.model) is trained.model
    for sampler in sampler_kinds(trained.model):
        assert sampler in SAMPLERS
        description = replace(trained.description, sampler=replace(trained.description.sampler, kind=sampler))  # type: ignore[arg-type]
        tokens_BL = samples(replace(trained, description=description))
        assert (tokens_BL >= 0).all()
        assert (tokens_BL != description.vocabulary.mask_id).all()


def test_weights_take_a_quarter(runs: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "INT8_BOUND", 0.1)
    plain, quantized = (pgm_scale.load(str(runs["ar"]), int8=int8) for int8 in (False, True))
    mine = dict(plain.model.named_parameters())
    for name, module in quantized.model.named_modules():
        if isinstance(module, Int8Linear):
            bytes_now = sum(buffer.numel() * buffer.element_size() for buffer in module.buffers())
            weight = mine[f"{name}.weight"]
            assert bytes_now == weight.numel() + 4 * weight.shape[0]


def test_beyond_the_bound_it_is_refused(tmp_path: Path) -> None:
    """One huge weight a row costs the others all their digits; its unit is dead, so it does not count itself."""
    run = write_run(tmp_path / "r", "pgm")
    export_run(str(run), ExportRequest(str(tmp_path / "m")), lambda _: None)
    from safetensors.torch import load_file, save_file

    weights = tmp_path / "m" / "model.safetensors"
    tensors = load_file(weights)
    for name, tensor in tensors.items():
        if name.endswith("mlp.0.bias"):
            tensor[0] = -1e4
        if name.endswith("mlp.2.weight"):
            tensor[:, 0] = 1e3
    save_file(tensors, weights)
    (tmp_path / "m" / "SHA256SUMS").unlink()
    pgm_scale.load(str(tmp_path / "m"))
    with pytest.raises(
        UserError, match=r"int8 weights change the logits by .*% of their spread, more than the 2%"
    ):
        pgm_scale.load(str(tmp_path / "m"), int8=True)


def test_logits_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    run = write_run(tmp_path / "r", "ar", weight_scale=1e30)
    with pytest.raises(UserError, match="int8 weights change the logits by nan%"):
        pgm_scale.load(str(run), int8=True)


def test_a_random_row_is_the_same_in_every_process() -> None:
    """What parity is measured on: a change here changes what int8's bound was chosen on."""
    from pgm_scale.data.manifest import Vocabulary
    from pgm_scale.export.parity import _random_rows

    vocabulary = Vocabulary(size=30, mask_id=29, bos_id=0, eos_id=1, pad_id=None)
    rows = [_random_rows(vocabulary, 8, torch.Generator().manual_seed(5)) for _ in range(2)]
    assert np.array_equal(rows[0], rows[1])
    assert (rows[0][:, 0] == 0).all()
    assert not ((rows[0][:, 1:] == 0) | (rows[0] == 29)[:, 1:]).any()
