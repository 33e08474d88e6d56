"""Classes to rows of codes, and rows back to PNGs."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

from pgm_scale.data.manifest import ImageContent, Vocabulary
from pgm_scale.sampling import known_prefixes
from pgm_scale.sampling.images import decode_images
from pgm_scale.serve.bodies import ImageBody
from pgm_scale.serve.errors import ApiError
from pgm_scale.vq_tokenizer import VQTokenizer


class ImageRows:
    """For one class-conditional model."""

    def __init__(self, vq: VQTokenizer, content: ImageContent, vocabulary: Vocabulary, length: int) -> None:
        self.vq, self.names = vq, content.class_names
        self.known_L = known_prefixes([[]], length, vocabulary.bos_id)[0]
        self._numbers = {name.lower(): number for number, name in enumerate(self.names)}

    def labels(self, body: ImageBody) -> list[int]:
        """The class of each image: `n` of each class that is asked for; without any, of every class.

        Raises:
            ApiError: no such class.
        """
        classes = range(len(self.names)) if body.classes is None else body.classes
        return [label for item in classes for label in [self._label(item)] * body.n]

    def name_of(self, label: int) -> str | None:
        return self.names[label] if label < len(self.names) else None

    def pngs(self, tokens: Sequence[np.ndarray]) -> list[str]:
        """Base64; takes as long as the tokenizer's decoder does."""
        return [_png(image_HWC) for image_HWC in decode_images(self.vq, np.stack(tokens))]

    def _label(self, item: int | str | None) -> int:
        if item is None:
            return len(self.names)
        number = self._numbers.get(item.lower(), -1) if isinstance(item, str) else item
        if not 0 <= number < len(self.names):
            raise ApiError(
                422,
                f"there is no class {str(item)[:60]!r}; give a name, a number below {len(self.names)}, or null",
                param="classes",
                code="invalid_value",
            )
        return number


def _png(image_HWC: np.ndarray) -> str:
    content = io.BytesIO()
    Image.fromarray(image_HWC[..., 0] if image_HWC.shape[-1] == 1 else image_HWC).save(content, "PNG")
    return base64.b64encode(content.getvalue()).decode()
