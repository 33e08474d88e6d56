"""The tokenizer that goes beside converted weights: a given one, or the one that the checkpoint holds."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from pgm_scale.convert.checkpoint import ForeignCheckpoint
from pgm_scale.data.manifest import TOKENIZER_NAME
from pgm_scale.errors import UserError
from pgm_scale.files import read_bounded
from pgm_scale.vq_tokenizer import VQTokenizer


@dataclass(frozen=True)
class Companion:
    """Attributes:
    name: where it comes from; None if there is none.
    sha256: what models call `tokenizer_sha256`.
    vq: of image models.
    largest_id: of a text tokenizer's tokens.
    """

    name: str | None = None
    sha256: str | None = None
    vq: VQTokenizer | None = None
    largest_id: int | None = None


def companion(
    given: str | None, checkpoint: ForeignCheckpoint, is_of_images: bool, folder: Path
) -> Companion:
    """Put the tokenizer's files into `folder`.

    Raises:
        UserError: the given one cannot be read.
    """
    if is_of_images:
        if given is None:
            return Companion()
        vq = VQTokenizer.load(given)
        vq.save(folder)
        return Companion(Path(given).name, vq.sha256, vq)
    path = folder / TOKENIZER_NAME
    if given is None and checkpoint.tokenizer_json is None:
        return Companion()
    try:
        if given is None:
            path.write_bytes(checkpoint.tokenizer_json or b"")
        else:
            path.write_bytes(read_bounded(given))
    except OSError as error:
        raise UserError(f"cannot read --tokenizer {given}: {error.strerror}; give a tokenizer.json") from None
    name = Path(given).name if given is not None else f"the one inside {checkpoint.path.name}"
    largest_id = _largest_id(path, given or str(checkpoint.path))
    return Companion(name, hashlib.sha256(path.read_bytes()).hexdigest(), largest_id=largest_id)


def _largest_id(path: Path, where: str) -> int:
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_str(path.read_text(encoding="utf-8"))
        return max(tokenizer.get_vocab().values(), default=-1)
    except Exception as error:  # the library raises this very class
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{where} holds no tokenizer.json ({reason}); give one with --tokenizer") from None
