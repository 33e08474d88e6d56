"""The VQ loss and its gradients against their formulas."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pgm_scale.config import VQModelConfig, VQObjectiveConfig
from pgm_scale.data.batch import TokenBatch
from pgm_scale.data.manifest import Vocabulary
from pgm_scale.models.vq import VQModel, unit_range
from pgm_scale.objectives import DrawSpec, build_objective, loss_terms
from pgm_scale.objectives.vq import VQObjective

CONFIG = VQModelConfig(
    codebook_size=7,
    code_size=3,
    channels=32,
    channel_multipliers=(1, 1),
    num_res_blocks=1,
    z_channels=5,
    image_channels=2,
)
SPEC = DrawSpec(0, 4)
WEIGHT = 0.3


def _batch(images: int = 3) -> TokenBatch:
    tokens_BL = np.random.default_rng(0).integers(0, 256, (images, 4 * 4 * 2))
    return TokenBatch(tokens_BL, np.ones_like(tokens_BL, bool), np.arange(images), np.zeros(images, np.int64))


def _model() -> VQModel:
    torch.manual_seed(0)
    return VQModel(CONFIG).double()


def _objective() -> VQObjective:
    return VQObjective(VQObjectiveConfig(commitment_weight=WEIGHT))


def test_loss_of_each_image_and_its_counts() -> None:
    model, objective, batch = _model().float(), _objective(), _batch()
    inputs = objective.training_inputs(batch, SPEC)
    assert inputs.pixels_BL.dtype == torch.uint8
    terms = loss_terms(objective, model, inputs)
    assert terms.cross_entropy_S is None
    assert terms.scored_tokens_S.tolist() == objective.scored_tokens(batch).tolist() == [32, 32, 32]
    counts = np.zeros(7, np.int64)
    for image in range(3):
        images = unit_range(torch.from_numpy(batch.tokens_BL[image].reshape(1, 4, 4, 2)))
        with torch.no_grad():
            z = F.normalize(model.quant_conv(model.encoder(images)), dim=1)[0].flatten(1).T
            codebook = F.normalize(model.quantize.embedding.weight, dim=1)
            codes = torch.cdist(z.double(), codebook.double()).argmin(dim=1)
            rows = codebook[codes]
            decoded = model.decoder(model.post_quant_conv(rows.T.reshape(1, 3, 2, 2)))
            expected = F.mse_loss(decoded, images) + (1 + WEIGHT) * F.mse_loss(z, rows)
        assert float(terms.loss_S[image].detach()) / 32 == pytest.approx(float(expected), rel=1e-4)
        counts += np.bincount(codes.numpy(), minlength=7)
    assert terms.code_counts_K is not None
    assert terms.code_counts_K.tolist() == counts.tolist()


def test_straight_through_gradients() -> None:
    """dL/dz = dR/dz_q + 2 w (z - e) / n, dL/de = 2 (e - z) / n; nothing of R reaches the codebook."""
    model, objective, batch = _model(), _objective(), _batch()
    inputs = objective.training_inputs(batch, SPEC)
    loss = loss_terms(objective, model, inputs).loss_S.sum()
    names, parameters = zip(*model.named_parameters(), strict=True)
    found = dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))

    images = unit_range(torch.from_numpy(batch.tokens_BL.reshape(3, 4, 4, 2))).double()
    z = F.normalize(model.quant_conv(model.encoder(images)).permute(0, 2, 3, 1), dim=-1)
    codebook = F.normalize(model.quantize.embedding.weight, dim=1)
    codes = torch.cdist(z.detach().flatten(0, 2), codebook.detach()).argmin(dim=1).view(z.shape[:3])
    e = codebook[codes]
    z_q = e.detach().requires_grad_()
    reconstructed = model.decoder(model.post_quant_conv(z_q.permute(0, 3, 1, 2)))
    error = (reconstructed - images).square().mean(dim=(1, 2, 3)).sum()
    behind = {n: p for n, p in model.named_parameters() if n.startswith(("decoder", "post_quant"))}
    d_z_q, *d_behind = torch.autograd.grad(error, [z_q, *behind.values()])
    n = z[0].numel()
    d_z = d_z_q + 2 * WEIGHT * (z - e).detach() / n
    d_e = 2 * (e - z).detach() / n
    before = {n: p for n, p in model.named_parameters() if n.startswith(("encoder", "quant_conv"))}
    d_before = torch.autograd.grad(z, list(before.values()), d_z)
    (d_codebook,) = torch.autograd.grad(e, [model.quantize.embedding.weight], d_e)

    expected = dict(zip(behind, d_behind, strict=True)) | dict(zip(before, d_before, strict=True))
    expected["quantize.embedding.weight"] = d_codebook
    assert expected.keys() == found.keys()
    for name, gradient in found.items():
        # The model keeps features, rows and images in fp32.
        scale = max(float(expected[name].abs().max()), 1e-3)
        assert float((gradient / 32 - expected[name]).abs().max()) < 1e-4 * scale, name
    assert float(d_codebook.abs().max()) > 1e-3


def test_rows_that_only_fill_a_batch_count_for_nothing() -> None:
    model, objective, batch = _model().float(), _objective(), _batch()
    batch = dataclasses.replace(batch, valid_BL=np.array([[True], [False], [True]]).repeat(32, axis=1))
    terms = loss_terms(objective, model, objective.validation_inputs(batch, SPEC))
    assert terms.scored_tokens_S.tolist() == [32, 0, 32]
    assert (terms.loss_S > 0).tolist() == [True, False, True]


def test_it_is_built_from_its_section_and_is_no_likelihood() -> None:
    objective = build_objective(VQObjectiveConfig(), Vocabulary(256, 0, 0, 0, None), CONFIG)
    assert isinstance(objective, VQObjective)
    assert not objective.is_likelihood
