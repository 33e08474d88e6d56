"""A few generated texts or images beside each validation, for people to look at."""

from __future__ import annotations

from torch import nn

from pgm_scale.config import RunConfig
from pgm_scale.parallel.mesh import Mesh
from pgm_scale.run_folder import RunFolder, RunIdentity
from pgm_scale.sampling import fitting_sampler, known_prefixes, sample
from pgm_scale.sampling.output import load_tokenizer, write_samples


def write_validation_samples(
    model: nn.Module, config: RunConfig, identity: RunIdentity, folder: RunFolder, step: int, mesh: Mesh
) -> None:
    """Collective: all ranks generate the same samples (ZeRO-3 needs them all), the first one writes them.

    A run on pixels trains a VQ tokenizer, which generates nothing.
    """
    if identity.images is None:
        _write_texts(model, config, identity, folder, step, mesh)
    elif identity.images.tokens == "codes":
        from pgm_scale.sampling.images import write_validation_images

        write_validation_images(model, config, identity, folder, step, mesh.device, mesh.is_main)


def _write_texts(
    model: nn.Module, config: RunConfig, identity: RunIdentity, folder: RunFolder, step: int, mesh: Mesh
) -> None:
    result = sample(
        model,
        identity.vocabulary,
        identity.length_tokens,
        fitting_sampler(config.sampler, model),
        known_BL=known_prefixes(
            [[]] * config.validation.samples, identity.length_tokens, identity.vocabulary.bos_id
        ),
        seed=config.training.seed,
        batch_sequences=config.validation.samples,
        device=mesh.device,
    )
    if mesh.is_main:
        folder.samples_path.mkdir(exist_ok=True)
        path = folder.samples_path / f"step_{step:08d}.txt"
        write_samples(path, result.tokens_BL, "text", load_tokenizer(folder.tokenizer_path))
