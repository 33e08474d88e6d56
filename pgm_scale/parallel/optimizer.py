"""AdamW, the fastest that this machine has, with its state made at once so that a resume can fill it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch

from pgm_scale.config import OptimizerConfig


def apex_fused_adam() -> Any:
    """NVIDIA Apex's FusedAdam, or None. The package called `apex` in the public index is another project."""
    try:
        from apex.optimizers import FusedAdam
    except ImportError:
        return None
    return FusedAdam


def build_adamw(
    parameters: Iterable[torch.nn.Parameter], config: OptimizerConfig, device: torch.device
) -> torch.optim.Optimizer:
    """AdamW over one parameter group: Apex's on a GPU that has it, else torch's fused kernel."""
    settings: dict[str, Any] = {
        "lr": config.learning_rate,
        "betas": config.betas,
        "eps": config.epsilon,
        "weight_decay": config.weight_decay,
    }
    parameters = list(parameters)
    fused_adam = apex_fused_adam() if device.type == "cuda" else None
    if fused_adam is not None:
        try:
            return fused_adam(parameters, adam_w_mode=True, **settings)
        except RuntimeError:  # Apex was built without its CUDA extensions
            pass
    return torch.optim.AdamW(parameters, fused=True, **settings)


def guard_update(
    optimizer: torch.optim.Optimizer,
    max_norm: float,
    global_norm: Callable[[], float],
    accepts: Callable[[], bool],
) -> None:
    """Update only if `accepts()`, and clip gradients to `max_norm` in the same pass, which saves one over them.

    Refused, neither weights nor moments nor the count of updates change; whoever called the update goes on as after
    one, so that it clears the gradients. `global_norm` is finite where an update is accepted.

    Torch's fused kernel divides by `grad_scale`, meant for mixed precision; Apex's has no such argument, so its
    gradients are divided before it.
    """
    update = optimizer.step

    def step(*_: Any) -> None:
        if not accepts():
            return
        divisor = max(1.0, (global_norm() + 1e-6) / max_norm)
        if isinstance(optimizer, torch.optim.AdamW):
            optimizer.grad_scale = torch.tensor(divisor) if divisor > 1.0 else None  # type: ignore[attr-defined]
        elif divisor > 1.0:
            gradients = [p.grad for group in optimizer.param_groups for p in group["params"]]
            torch._foreach_div_(gradients, divisor)
        update()

    optimizer.step = step  # type: ignore[assignment]


def learning_rate(config: OptimizerConfig, step: int, total_steps: int) -> float:
    """Rate of the update that ends `step` (counted from 0): linear warm-up, constant, then the schedule's fall."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.learning_rate
    start = max(config.warmup_steps, round((1.0 - config.decay_share) * total_steps))
    progress = min(1.0, max(0, step - start) / max(1, total_steps - start))
    linear = 1.0 - progress
    shape = linear if config.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return config.learning_rate * (config.final_ratio + (1.0 - config.final_ratio) * shape)
