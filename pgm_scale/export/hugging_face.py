"""Our models as transformers' classes; `import pgm_scale.hugging_face` makes AutoModel know them.

`pgm_scale.export.bundle` copies this file and what it imports into exported folders, for `trust_remote_code`: it
must not import what needs more than torch, transformers and safetensors.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    GenerationMixin,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.utils import ModelOutput

from pgm_scale.config import VQModelConfig
from pgm_scale.errors import UserError
from pgm_scale.model_folder import MODEL_TYPE, parse_description
from pgm_scale.models import build_model
from pgm_scale.models.layers import PositionTable
from pgm_scale.models.maskgit import MaskGITTransformer
from pgm_scale.models.partition_transformer import PartitionTransformer
from pgm_scale.models.row_logits import row_logits
from pgm_scale.sampling import UNKNOWN, class_count, fitting_sampler, sample
from pgm_scale.trained_model import ModelDescription

TIED_KEY = "backbone.head.weight"  # of MaskGIT; not in the files


def register() -> None:
    """Make transformers' AutoConfig, AutoModel and AutoModelForCausalLM load exported folders."""
    AutoConfig.register(MODEL_TYPE, PGMScaleConfig, exist_ok=True)
    AutoModel.register(PGMScaleConfig, PGMScaleModel, exist_ok=True)
    AutoModelForCausalLM.register(PGMScaleConfig, PGMScaleForCausalLM, exist_ok=True)


class PGMScaleConfig(PretrainedConfig):
    """config.json of an exported folder; `description` is a `ModelDescription` in plain containers."""

    model_type = MODEL_TYPE

    def __init__(self, description: dict[str, Any] | None = None, **others: Any) -> None:
        self.description = description
        super().__init__(**others)

    @property
    def vocab_size(self) -> int:
        """Tokens, the mask included."""
        return self._described("vocabulary", "size")

    @property
    def hidden_size(self) -> int:
        return self._described("model", "hidden_size")

    @property
    def max_position_embeddings(self) -> int:
        return self._described("length_tokens")

    def _described(self, *keys: str) -> Any:
        value: Any = self.description
        for key in keys:
            if value is None:  # transformers also makes configurations of nothing, to compare with
                raise AttributeError(f"the configuration has no description, and so no {key}")
            value = value[key]
        return value


@dataclass
class PGMScaleOutput(ModelOutput):
    """`logits`: fp32 `[B, L, V]`; of MaskGIT, which knows no BOS, `[B, L - 1, V - 1]`."""

    logits: Tensor | None = None


class PGMScaleModel(PreTrainedModel):
    """Any of our models, as `backbone`."""

    config_class = PGMScaleConfig
    main_input_name = "input_ids"

    def __init__(self, config: PGMScaleConfig) -> None:
        super().__init__(config)
        self.description: ModelDescription = parse_description(config.description, "config.json")
        if isinstance(self.description.model, VQModelConfig):
            raise UserError("a VQ tokenizer has no logits; load it with pgm_scale.vq_tokenizer.VQTokenizer")
        self.backbone = build_model(
            self.description.model, self.description.vocabulary.size, self.description.length_tokens
        )
        if isinstance(self.backbone, MaskGITTransformer):
            self._tied_weights_keys = {TIED_KEY: "backbone.tok_emb.weight"}
        self.post_init()

    @classmethod
    def get_init_context(cls, *arguments: Any) -> list[Any]:
        """transformers 4 would put parameters on "meta", and cannot with ours, which have attributes; 5 can."""
        return [] if transformers.__version__.startswith("4.") else super().get_init_context(*arguments)

    def _init_weights(self, module: torch.nn.Module) -> None:
        """`build_model` has drawn them; but transformers 5 empties the tables of positions, which no file has."""
        if isinstance(module, PositionTable):
            module.fill(module.cos_LK.device)

    def tie_weights(self, missing_keys: set[str] | None = None, **_: Any) -> None:
        """MaskGIT's output linear has the token table's weight; loading gives both a tensor of their own."""
        if isinstance(self.backbone, MaskGITTransformer):
            head: Any = self.backbone.head
            head.weight = self.backbone.tok_emb.weight
            if missing_keys is not None:  # transformers 5
                missing_keys.discard(TIED_KEY)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        group_ids: Tensor | None = None,
        class_ids: Tensor | None = None,
        sigma: Tensor | None = None,
        return_dict: bool | None = None,
    ) -> PGMScaleOutput | tuple[Tensor]:
        """Logits of every position.

        Args:
            input_ids: int64 `[B, L]`, BOS first; the mask id where a token is not known.
            attention_mask: only to say that nothing is padded (all ones). An autoregressive model also takes
                padding on the right, whose logits mean nothing; the others read every position of a row.
            group_ids: `[B, L]` of 0 and 1, for a PGM: each position is predicted from the known tokens of the other
                group. By default masks are group 1 and the rest is group 0.
            class_ids: int64 `[B]`, for a class-conditional model; the number of classes stands for no class.
            sigma: `[B]`, noise levels, for a time-conditioned model.
        """
        self._check(input_ids, attention_mask, group_ids, class_ids, sigma)
        mask_id = self.description.vocabulary.mask_id
        logits = row_logits(self.backbone, input_ids, mask_id, group_ids, class_ids, sigma)
        return (logits,) if return_dict is False else PGMScaleOutput(logits=logits)

    def sample(
        self,
        known: Tensor | None = None,
        *,
        count: int = 1,
        class_ids: Tensor | None = None,
        seed: int = 1,
        batch_sequences: int = 32,
        **settings: Any,
    ) -> Tensor:
        """Complete rows with the samplers of pgm-scale.

        Args:
            known: int64 `[B, L]`, BOS first; -1 where a token is to be generated. By default `count` rows of BOS.
            class_ids: int64 `[B]`, for a class-conditional model.
            settings: of generation_config.json's `sampler`, to change: kind, steps, temperature, top_p, top_k, ...

        Returns:
            int64 `[B, L]`, on the model's device.
        """
        length, vocabulary = self.description.length_tokens, self.description.vocabulary
        if known is None:
            known = torch.full((count, length), UNKNOWN)
            known[:, 0] = vocabulary.bos_id
        unknown_settings = settings.keys() - vars(self.description.sampler).keys()
        if unknown_settings:
            raise UserError(
                f"the sampler has no {', '.join(sorted(unknown_settings))}; see generation_config.json"
            )
        config = fitting_sampler(replace(self.description.sampler, **settings), self.backbone)
        if "kind" in settings:
            config = replace(config, kind=settings["kind"])  # as asked, or refused
        result = sample(
            self.backbone,
            vocabulary,
            known.shape[1],
            config,
            known_BL=known.cpu().numpy(),
            seed=seed,
            batch_sequences=batch_sequences,
            labels_B=None if class_ids is None else np.asarray(class_ids.cpu()),
            device=self.device,
        )
        return torch.from_numpy(result.tokens_BL).to(self.device)

    def _check(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        group_ids: Tensor | None,
        class_ids: Tensor | None,
        sigma: Tensor | None,
    ) -> None:
        length, classes = self.description.length_tokens, class_count(self.backbone)
        if input_ids.dim() != 2 or input_ids.shape[1] > length:
            raise UserError(f"input_ids are {tuple(input_ids.shape)}; give rows of at most {length} tokens")
        if attention_mask is not None:
            self._check_padding(attention_mask)
        if group_ids is not None and not isinstance(self.backbone, PartitionTransformer):
            raise UserError("group_ids are for a PGM; leave them out")
        if group_ids is not None and (
            group_ids.shape != input_ids.shape or bool(((group_ids != 0) & (group_ids != 1)).any())
        ):
            raise UserError(
                f"group_ids are {tuple(group_ids.shape)}; give one, 0 or 1, for each of the input_ids"
            )
        if (class_ids is None) != (classes == 0):
            wanted = f"class_ids, 0 to {classes - 1}, or {classes} for none" if classes else "no class_ids"
            raise UserError(f"the model has {classes} classes; give {wanted}")
        if (sigma is None) == getattr(self.description.model, "time_conditioned", False):
            raise UserError("sigma is for time-conditioned models, which need it")

    def _check_padding(self, mask_BL: Tensor) -> None:
        is_right = bool((mask_BL.long().diff(dim=1) <= 0).all())
        if not bool(mask_BL.all()) and not (is_right and self._is_causal):
            raise UserError(
                "attention_mask: only an autoregressive model takes padding, on the right; "
                "give other models rows of equal length, and masks where tokens are to be predicted"
            )

    @property
    def _is_causal(self) -> bool:
        return self.description.model.kind == "autoregressive_transformer"


class PGMScaleForCausalLM(PGMScaleModel, GenerationMixin):
    """An autoregressive model with transformers' `generate`, which computes the whole row for each token.

    `sample` has a key-value cache, and is faster.
    """

    def __init__(self, config: PGMScaleConfig) -> None:
        super().__init__(config)
        if not self._is_causal:
            raise UserError(
                f"a {self.description.model.kind} is no causal language model; load it with transformers.AutoModel"
            )

    def prepare_inputs_for_generation(self, input_ids: Tensor, **inputs: Any) -> dict[str, Any]:
        return {"input_ids": input_ids, "attention_mask": inputs.get("attention_mask")}
