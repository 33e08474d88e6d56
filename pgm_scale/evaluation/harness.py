"""lm-eval's view of a trained model: `loglikelihood`, `loglikelihood_rolling` and `generate_until`.

Importing this file registers the model as `pgm-scale`, so that a program may also call
`lm_eval.simple_evaluate(model="pgm-scale", model_args={"folder": RUN}, ...)`. It needs the package lm_eval.

Scores are sums over tokens, as lm-eval defines them, of EMA weights; of PGM, MDLM and D3PM models they are bounds
(`conditional_likelihood`). Sources of what the published harness did otherwise: FACTS 7 and 8.11.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model

from pgm_scale.config import SamplerConfig
from pgm_scale.errors import UserError
from pgm_scale.evaluation.conditional_likelihood import BoundSettings, ConditionalLikelihood, Score
from pgm_scale.evaluation.continuations import Continuation, ContinuationEncoder
from pgm_scale.evaluation.progress import track
from pgm_scale.evaluation.record import Precision, torch_dtype
from pgm_scale.evaluation.samples import Generator
from pgm_scale.loading import load
from pgm_scale.sampling import fitting_sampler, known_prefixes
from pgm_scale.sampling.output import load_tokenizer
from pgm_scale.trained_model import TrainedModel, Weights

NEW_TOKENS = 256  # lm-eval's default of max_gen_toks


@register_model("pgm-scale")
class HarnessModel(LM):
    """A run or an exported folder as a model of lm-eval."""

    def __init__(
        self,
        folder: str | TrainedModel,
        weights: Weights = "ema",
        draws: int = 128,
        bound: str = "conditional",
        seed: int = 1,
        batch_size: int | str | None = 32,
        device: str | torch.device | None = None,
        precision: Precision = "fp32",
        sampler: SamplerConfig | None = None,
        max_batch_size: int | None = None,
    ) -> None:
        """
        Args:
            folder: or a model that is loaded already, on `device`.
            draws: of the bound, see `BoundSettings`.
            batch_size: rows a forward pass.
            sampler: of generate_until; None is the run's own.
            max_batch_size: lm-eval passes it; unused.

        Raises:
            UserError: no run or export, or none of a model of text.
        """
        super().__init__()
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if not isinstance(folder, TrainedModel):
            folder = load(folder, weights=weights, device=device, dtype=torch_dtype(precision))
        self.trained = trained = folder
        if bound not in ("conditional", "joint"):
            raise UserError(f"bound {bound} is not one of conditional, joint")
        if batch_size is not None and (not str(batch_size).isdigit() or int(batch_size) < 1):
            raise UserError(
                f"batch_size {batch_size} is no whole number above 0; give the rows of a forward pass"
            )
        batch = 32 if batch_size is None else int(batch_size)
        description = trained.description
        self.settings = BoundSettings(int(draws), int(seed), bound)  # type: ignore[arg-type]
        self.likelihood = ConditionalLikelihood(trained, self.settings, batch, device)
        self.encoder = ContinuationEncoder(
            load_tokenizer(trained.tokenizer_path), description.vocabulary.bos_id, description.length_tokens
        )
        config = sampler or fitting_sampler(description.sampler, trained.model)
        self.generator = Generator(trained, config, int(seed), batch, device)

    def record(self) -> dict[str, Any]:
        """What a score is and what was too long for the model, in plain JSON values."""
        return {
            "likelihood": self.likelihood.method,
            "draws": None if self.likelihood.method == "exact" else self.settings.draws,
            "bound_seed": self.settings.seed,
            **dataclasses.asdict(self.encoder.counts),
            **self.generator.settings(),
        }

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Of each (context, continuation): the sum of log p in nats, and whether the continuation is greedy.

        Greedy: of an autoregressive model exactly; of others, all tokens are the most likely ones in a single pass
        that sees the context alone.
        """
        windows = [self.encoder.pair(*request.args) for request in requests]
        scores = [
            (sum(score.log_likelihood for score in parts), all(score.is_greedy for score in parts))
            for parts in self._scores(windows, "loglikelihood")
        ]
        for request, score in zip(requests, scores, strict=True):
            self.cache_hook.add_partial("loglikelihood", request.args, score)
        return scores

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Of each whole text, in disjoint windows behind BOS, each token scored once."""
        windows = [self.encoder.whole(*request.args) for request in requests]
        scores = [
            sum(score.log_likelihood for score in parts)
            for parts in self._scores(windows, "loglikelihood_rolling")
        ]
        for request, score in zip(requests, scores, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, score)
        return scores

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """A continuation of each context, cut at the first stop string, EOS, or `max_gen_toks` tokens.

        Rows have the model's full length, as in training. Where a task does not ask for sampling (`do_sample`, a
        temperature above 0), each token is the most likely one where and when the sampler decodes it.
        """
        texts: list[str | None] = [None] * len(requests)
        configs = [self._sampler(request.args[1]) for request in requests]
        for config in dict.fromkeys(configs):
            numbers = [number for number, other in enumerate(configs) if other == config]
            found = self._generate([requests[number].args for number in numbers], config)
            for number, text in zip(numbers, found, strict=True):
                texts[number] = text
        for request, made in zip(requests, texts, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, made)
        return [made or "" for made in texts]

    def _scores(self, windows: list[list[Continuation]], label: str) -> Iterator[list[Score]]:
        total = sum(map(len, windows))
        scores = iter(track(self.likelihood(part for parts in windows for part in parts), total, label))
        for parts in windows:
            yield [next(scores) for _ in parts]

    def _sampler(self, options: dict[str, Any]) -> SamplerConfig:
        temperature = float(options.get("temperature") or 0)
        if not options.get("do_sample", temperature > 0) or temperature == 0:
            return dataclasses.replace(self.generator.config, temperature=1.0, top_p=1.0, top_k=1)
        given = {name: options[name] for name in ("top_p", "top_k") if options.get(name) is not None}
        return dataclasses.replace(self.generator.config, temperature=temperature, **given)

    def _generate(self, arguments: list[tuple[str, dict[str, Any]]], config: SamplerConfig) -> list[str]:
        description = self.trained.description
        prompts = [
            self.encoder.prompt(context, int(options.get("max_gen_toks", NEW_TOKENS)))
            for context, options in arguments
        ]
        known_BL = known_prefixes(
            [prompt[1:] for prompt in prompts], description.length_tokens, description.vocabulary.bos_id
        )
        generator = dataclasses.replace(self.generator, config=config)
        tokens_BL = generator.complete(known_BL, "generate_until").tokens_BL.tolist()
        return [
            self._continuation(tokens_L, len(prompt), options)
            for tokens_L, prompt, (_, options) in zip(tokens_BL, prompts, arguments, strict=True)
        ]

    def _continuation(self, tokens_L: list[int], prompt_tokens: int, options: dict[str, Any]) -> str:
        new = tokens_L[prompt_tokens : prompt_tokens + int(options.get("max_gen_toks", NEW_TOKENS))]
        eos_id = self.trained.description.vocabulary.eos_id
        if eos_id in new:
            new = new[: new.index(eos_id)]
        tokenizer, prompt = self.encoder.tokenizer, tokens_L[:prompt_tokens]
        # Decoded with the prompt, because the first token of a text may lose the space before it.
        before, both, alone = (
            tokenizer.decode(tokens, skip_special_tokens=False) for tokens in (prompt, prompt + new, new)
        )
        text = both[len(before) :] if both.startswith(before) else alone
        until = options.get("until") or []
        for stop in [until] if isinstance(until, str) else until:
            text = text.split(stop)[0] if stop else text
        return text
