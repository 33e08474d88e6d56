"""A VQ tokenizer, splits of pixels and codes, and the run folder of an image PGM, all tiny and untrained."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from pgm_scale.checkpoint import CheckpointStore, Fragment, Kind
from pgm_scale.config import RunConfig, VQModelConfig
from pgm_scale.data.manifest import DatasetManifest, ImageContent, Vocabulary
from pgm_scale.data.writers import shard_name, write_shard
from pgm_scale.models import build_model
from pgm_scale.models.vq import VQModel
from pgm_scale.run_folder import RunFolder
from pgm_scale.tensor_slices import TensorSlice
from pgm_scale.vq_tokenizer import VQTokenizer
from tests.tiny_data import tiny_config
from tests.tiny_images import CLASSES, blobs, write_pixel_split

SIDE, GRID, CODEBOOK = 8, 4, 32
VOCABULARY = Vocabulary(CODEBOOK + 2, CODEBOOK, CODEBOOK + 1, CODEBOOK + 1, None)


@dataclass(frozen=True)
class TinyImages:
    """Where things are, and what is in them."""

    folder: Path
    vq: VQTokenizer
    images_BHWC: np.ndarray  # of the pixel split `real`
    labels_B: np.ndarray

    @property
    def pixels(self) -> str:
        return str(self.folder / "real")

    @property
    def codes(self) -> str:
        return str(self.folder / "codes")

    @property
    def run(self) -> str:
        return str(self.folder / "run")

    @property
    def vq_path(self) -> str:
        return self.codes


def write_tiny_images(folder: Path) -> TinyImages:
    images, labels = blobs(45, SIDE, 1)
    write_pixel_split(folder / "real", images, labels, "validation")
    write_pixel_split(folder / "other", *blobs(40, SIDE, 2), "train")
    torch.manual_seed(0)
    config = VQModelConfig(
        codebook_size=CODEBOOK,
        code_size=4,
        channels=32,
        channel_multipliers=(1, 1),
        num_res_blocks=1,
        z_channels=8,
        image_channels=1,
    )
    vq = VQTokenizer(VQModel(config))
    manifest = _write_codes(folder / "codes", vq, images, labels)
    _write_run(folder / "run", folder / "codes", manifest)
    return TinyImages(folder, vq, images, labels)


def _write_codes(folder: Path, vq: VQTokenizer, images: np.ndarray, labels: np.ndarray) -> DatasetManifest:
    folder.mkdir()
    vq.save(folder)
    codes = vq.encode(images)
    rows = np.concatenate([np.full((len(codes), 1), VOCABULARY.bos_id), codes], axis=1).astype(np.uint16)
    length = rows.shape[1]
    shard = write_shard(folder, shard_name(0, "mds"), "mds", rows, np.full(len(rows), length), labels)
    manifest = DatasetManifest(
        format="mds",
        split="train",
        vocabulary=VOCABULARY,
        tokenizer_sha256=hashlib.sha256(vq.description()).hexdigest(),
        length_tokens=length,
        token_dtype="uint16",
        packing="images",
        source={},
        documents=len(rows),
        rows=len(rows),
        tokens=rows.size,
        shards=(shard,),
        images=ImageContent("codes", SIDE, 1, GRID, CLASSES),
    )
    manifest.save(folder)
    return manifest


def _write_run(folder: Path, codes: Path, manifest: DatasetManifest) -> None:
    """A run of one step that its checkpoint alone knows of."""
    config = _config(folder, codes)
    RunFolder(folder).create_or_match(config, manifest, codes / "tokenizer.json")
    save_step(folder, 1)


def _config(folder: Path, codes: Path) -> RunConfig:
    model_config = {
        "kind": "partition_transformer",
        "hidden_size": 16,
        "num_heads": 2,
        "num_encoder_blocks": 1,
        "num_decoder_blocks": 1,
        "condition_size": 16,
        "num_classes": len(CLASSES),
        "registers": 2,
    }
    return tiny_config(
        codes.parent,
        folder,
        model=model_config,
        objective={"kind": "image_pgm"},
        sampler={"kind": "halton", "steps": 4},
    )


def save_step(folder: Path, step: int) -> None:
    """Another checkpoint of the run, of other weights."""
    torch.manual_seed(step)
    run = RunFolder(folder)
    model = build_model(run.config().model, VOCABULARY.size, run.identity().length_tokens)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    fragments: list[tuple[Kind, Fragment]] = [
        ("weight", Fragment(name, TensorSlice.whole(tuple(p.shape)), 0, p.detach().flatten()))
        for name, p in model.named_parameters()
    ]
    folders = CheckpointStore(folder).folders
    assert folders.begin(step)
    folders.commit(step, [folders.write_rank(step, 0, fragments)], {"step": step})
