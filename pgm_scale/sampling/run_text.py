"""Texts of a run: what is known of them, and where they go."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer

from pgm_scale.errors import UserError
from pgm_scale.files import check_writable
from pgm_scale.sampling import UNKNOWN, known_prefixes
from pgm_scale.sampling.output import chosen_format, load_tokenizer, render_samples, write_samples
from pgm_scale.sampling.request import SampleRequest
from pgm_scale.trained_model import TrainedModel


class TextJob:
    """What a request says of the texts of a run."""

    def __init__(self, run: TrainedModel, request: SampleRequest, device: torch.device) -> None:
        self.description, self.request = run.description, request
        self.tokenizer = load_tokenizer(run.tokenizer_path)

    @staticmethod
    def check(request: SampleRequest) -> None:
        """Refuse, before anything is loaded, what cannot be."""
        output_format = chosen_format(request.text.output_format, request.output_path)
        if output_format == "npy" and request.output_path is None:
            raise UserError("npy samples cannot be printed; add --out FILE")
        if request.output_path is not None:
            check_writable("--out", request.output_path)

    def inputs(self, known_BL: np.ndarray | None) -> tuple[np.ndarray, None]:
        """`known_BL` of all samples: the given one's, the template's or the prompts', each `count` times."""
        length, bos_id = self.description.length_tokens, self.description.vocabulary.bos_id
        if known_BL is None and self.request.text.template:
            known_BL = known_template(self.request.text.template, self.tokenizer, length, bos_id)
        elif known_BL is None:
            texts = self.request.text.prompts or [""]
            prompts = [self.tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
            known_BL = known_prefixes(prompts, length, bos_id)
        return np.repeat(known_BL, self.request.count, axis=0), None

    def write(self, tokens_BL: np.ndarray) -> None:
        output_format = chosen_format(self.request.text.output_format, self.request.output_path)
        if self.request.output_path:
            write_samples(Path(self.request.output_path), tokens_BL, output_format, self.tokenizer)
        else:
            sys.stdout.write(render_samples(tokens_BL, output_format, self.tokenizer).decode())


def known_template(template: str, tokenizer: Tokenizer, length: int, bos_id: int) -> np.ndarray:
    """`known_BL` [1, length] of a text in which {N} stands for N unknown tokens; what follows it is unknown.

    Raises:
        UserError: the text and its gaps are longer than the model.
    """
    tokens = [bos_id]
    for index, piece in enumerate(re.split(r"\{(\d+)\}", template)):
        if index % 2:
            tokens += [UNKNOWN] * min(int(piece[:12]), length + 1)  # too many is told below
        else:
            tokens += tokenizer.encode(piece, add_special_tokens=False).ids
    if len(tokens) > length:
        raise UserError(
            f"the template takes {len(tokens)} tokens with BOS, the model holds {length}; shorten it"
        )
    return np.array([tokens + [UNKNOWN] * (length - len(tokens))], np.int64)
