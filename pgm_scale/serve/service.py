"""One trained model behind its engine: from the bodies of requests to rows, whatever the model generates."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from pgm_scale.config import SamplerConfig, VQModelConfig
from pgm_scale.data.manifest import Vocabulary
from pgm_scale.errors import UserError
from pgm_scale.models.autoregressive import AutoregressiveTransformer
from pgm_scale.models.partition_transformer import PartitionTransformer
from pgm_scale.sampling import class_count, fitting_sampler, sampler_kinds
from pgm_scale.sampling.output import load_tokenizer
from pgm_scale.sampling.stepwise import PLANS, Row, StepwiseDecoding
from pgm_scale.serve.batches import Decoding, WholeBatches
from pgm_scale.serve.bodies import CompletionBody, ImageBody, InfillBody
from pgm_scale.serve.engine import Engine
from pgm_scale.serve.errors import ApiError
from pgm_scale.serve.images import ImageRows
from pgm_scale.serve.metrics import Metrics
from pgm_scale.serve.settings import ServeSettings
from pgm_scale.serve.text import Template, TextRows
from pgm_scale.trained_model import TrainedModel
from pgm_scale.vq_tokenizer import VQTokenizer


class Service:
    """Everything but HTTP.

    Args:
        trained: in eval mode, on `device`.

    Raises:
        UserError: the model generates nothing, or its tokenizer is missing or another one.
    """

    def __init__(self, trained: TrainedModel, settings: ServeSettings, device: torch.device | str) -> None:
        description = trained.description
        self.settings, self.metrics = settings, Metrics()
        self.vocabulary: Vocabulary = description.vocabulary
        self.length, self.name = description.length_tokens, description.origin.source
        self.model: nn.Module = trained.model
        self.sampler: SamplerConfig = fitting_sampler(description.sampler, trained.model)
        self.text: TextRows | None = None
        self.images: ImageRows | None = None
        if isinstance(description.model, VQModelConfig):
            raise UserError(
                f"{trained.folder} is a VQ tokenizer, which generates nothing; give a model of codes"
            )
        if description.images is None:
            self.text = TextRows(load_tokenizer(trained.tokenizer_path), self.vocabulary, self.length)
        else:
            vq = VQTokenizer.load(trained.folder, device)
            if vq.sha256 != description.tokenizer_sha256:
                raise UserError(
                    f"{trained.folder}: its VQ tokenizer is not the one that its codes are of; export it again"
                )
            self.images = ImageRows(vq, description.images, self.vocabulary, self.length)
        self.joins_at_steps = isinstance(trained.model, PartitionTransformer) and not class_count(
            trained.model
        )
        self.kinds = [
            kind for kind in sampler_kinds(trained.model) if kind in PLANS or not self.joins_at_steps
        ]
        if self.sampler.kind not in self.kinds:  # naive: the same text as the non-uniform sampler, but slower
            self.sampler = replace(self.sampler, kind=self.kinds[0])  # type: ignore[arg-type]
        self.device = torch.device(device)
        self.engine = Engine(
            self._decoding, self.vocabulary.mask_id, settings, self.metrics, gathers=not self.joins_at_steps
        )

    def completion_rows(self, body: CompletionBody) -> tuple[list[Template], list[Row]]:
        """n rows for each prompt, and the template of each."""
        text = self._for_text("/v1/completions")
        body.refuse()
        self._check_count(len(body.prompt) * body.n)
        templates = [template for template in text.completions(body) for _ in range(body.n)]
        return templates, self._rows([template.known_L for template in templates], body)

    def infill_rows(self, body: InfillBody) -> tuple[list[Template], list[Row]]:
        text = self._for_text("/v1/infill")
        if isinstance(self.model, AutoregressiveTransformer):
            raise ApiError(
                400, "an autoregressive model cannot infill; use /v1/completions", code="unsupported"
            )
        self._check_count(body.n)
        templates = [text.infill(body)] * body.n
        return templates, self._rows([template.known_L for template in templates], body)

    def image_rows(self, body: ImageBody) -> list[Row]:
        if self.images is None:
            raise ApiError(400, "the model generates text; use /v1/completions", code="unsupported")
        classes = len(self.images.names) if body.classes is None else len(body.classes)
        self._check_count(classes * body.n)
        labels = self.images.labels(body)
        return self._rows([self.images.known_L] * len(labels), body, labels, body.guidance)

    def check_model(self, name: str | None) -> None:
        """Raises:
        ApiError: 404, another model is asked for.
        """
        if name is not None and name != self.name:
            raise ApiError(
                404, f"this server has the model {self.name}", param="model", code="model_not_found"
            )

    def _for_text(self, path: str) -> TextRows:
        if self.text is None:
            raise ApiError(400, f"the model generates images; use /v1/images, not {path}", code="unsupported")
        return self.text

    def _check_count(self, sequences: int) -> None:
        most = self.settings.max_request_sequences
        if sequences > most:
            raise ApiError(
                400, f"{sequences} sequences in one request; at most {most}", param="n", code="too_many"
            )

    def _rows(
        self,
        known: Sequence[np.ndarray],
        body: CompletionBody | InfillBody | ImageBody,
        labels: Sequence[int] | None = None,
        guidance: float | None = None,
    ) -> list[Row]:
        config = self._config(body, guidance)
        if body.seed is None:
            body.seed = secrets.randbits(32)  # the answer names it
        return [
            Row(known_L, body.seed, number, config, None if labels is None else labels[number])
            for number, known_L in enumerate(known)
        ]

    def _config(self, body: CompletionBody | InfillBody | ImageBody, guidance: float | None) -> SamplerConfig:
        if body.sampler is not None and body.sampler not in self.kinds:
            raise ApiError(
                422,
                f"sampler: the model has {', '.join(self.kinds)}",
                param="sampler",
                code="invalid_value",
            )
        if body.steps is not None and body.steps > self.settings.max_steps:
            raise ApiError(
                422, f"steps: at most {self.settings.max_steps}", param="steps", code="invalid_value"
            )
        given: dict[str, Any] = {
            "kind": body.sampler,
            "steps": body.steps,
            "temperature": body.temperature or None,
            "top_p": body.top_p,
            "top_k": body.top_k,
            "guidance": guidance,
        }
        if body.temperature == 0:  # OpenAI's way to ask for the likeliest tokens
            given |= {"temperature": 1.0, "top_k": 1}
        return replace(self.sampler, **{name: value for name, value in given.items() if value is not None})

    def _decoding(self) -> Decoding:
        """In the engine's thread; one row is decoded, so that the first request finds everything set up."""
        rows = self.settings.max_batch_sequences
        decoding: Decoding
        if self.joins_at_steps:
            assert isinstance(self.model, PartitionTransformer)
            decoding = StepwiseDecoding(self.model, self.vocabulary, rows, self.device)
        else:
            decoding = WholeBatches(self.model, self.vocabulary, rows, self.device)
        length = self.length if self.images is not None else 2
        known_L = np.array([self.vocabulary.bos_id] + [-1] * (length - 1), np.int64)
        label = None if self.images is None else 0
        decoding.join(Row(known_L, 0, 0, replace(self.sampler, steps=1), label))
        decoding.step()
        for row in decoding.rows:
            decoding.leave(row)
        return decoding
