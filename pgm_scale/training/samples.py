"""A few generated texts or images beside each validation, for people to look at."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from math import ceil, sqrt

import numpy as np
import torch
from torch import nn

from pgm_scale.checkpoint.peers import Peers
from pgm_scale.config import RunConfig
from pgm_scale.errors import UserError
from pgm_scale.run_folder import RunFolder, RunIdentity
from pgm_scale.sampling import class_count, fitting_sampler, known_prefixes, sample
from pgm_scale.sampling.output import load_tokenizer, write_samples

logger = logging.getLogger(__name__)


def write_validation_samples(
    model: nn.Module,
    config: RunConfig,
    identity: RunIdentity,
    folder: RunFolder,
    step: int,
    device: torch.device,
    peers: Peers,
) -> None:
    """`validation.samples` texts, or images of the classes in turn, as `samples/step_<step>.txt` or `.png`.

    Collective: all ranks generate the same samples (ZeRO-3 needs them all), the first one writes them, and warns
    if it cannot. A run on pixels trains a VQ tokenizer, which generates nothing.
    """
    if identity.images is not None and identity.images.tokens == "pixels":
        return
    count, classes = config.validation.samples, class_count(model)
    result = sample(
        model,
        identity.vocabulary,
        identity.length_tokens,
        fitting_sampler(config.sampler, model),
        known_BL=known_prefixes([[]] * count, identity.length_tokens, identity.vocabulary.bos_id),
        labels_B=np.arange(count) % classes if classes else None,
        seed=config.training.seed,
        batch_sequences=count,
        device=device,
    )
    write = _write_texts if identity.images is None else partial(_write_images, device=device)
    peers.first(lambda: _try(lambda: write(result.tokens_BL, folder, step), step))


def _try(write: Callable[[], None], step: int) -> None:
    """They are for people to look at: no disk that is full of them ends a training."""
    try:
        write()
    except (OSError, UserError) as error:
        logger.warning("the samples of step %d are not written (%s); training goes on", step, error)


def _write_texts(tokens_BL: np.ndarray, folder: RunFolder, step: int) -> None:
    folder.samples_path.mkdir(exist_ok=True)
    path = folder.samples_path / f"step_{step:08d}.txt"
    write_samples(path, tokens_BL, "text", load_tokenizer(folder.tokenizer_path))


def _write_images(tokens_BL: np.ndarray, folder: RunFolder, step: int, device: torch.device) -> None:
    from pgm_scale.sampling.images import decode_images, write_image_grid
    from pgm_scale.vq_tokenizer import VQTokenizer

    folder.samples_path.mkdir(exist_ok=True)
    images_BHWC = decode_images(VQTokenizer.load(folder.path, device), tokens_BL)
    write_image_grid(folder.samples_path / f"step_{step:08d}.png", images_BHWC, ceil(sqrt(len(tokens_BL))))
