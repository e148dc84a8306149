"""AdamW and its schedule."""

from __future__ import annotations

import math

import torch
from torch import nn

from pipeline.config import OptimizerConfig


def build_optimizer(
    *modules: tuple[nn.Module, float], config: OptimizerConfig
) -> torch.optim.AdamW:
    """Return AdamW over the trainable parameters; weight decay on matrices only.

    Args:
        modules: Each with its share of the learning rate.
        config: Betas, weight decay, peak learning rate.
    """
    groups = []
    for module, share in modules:
        parameters = [p for p in module.parameters() if p.requires_grad]
        for matrices, decay in ((True, config.weight_decay), (False, 0.0)):
            chosen = [p for p in parameters if (p.ndim >= 2) is matrices]
            groups.append({"params": chosen, "weight_decay": decay, "share": share})
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the rate of every group, times the group's share."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["share"]


def learning_rate(config: OptimizerConfig, step: int, total: int) -> float:
    """Return the learning rate of a step, counted from 0.

    Linear warm-up over `warmup_steps`, the last of which has the peak, then constant, linear or
    cosine from the peak towards `final_share` of it, which step `total` would have.
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    span = max(1, total - config.warmup_steps)
    progress = min(1.0, (step - config.warmup_steps) / span)
    if config.schedule == "constant":
        share = 1.0
    elif config.schedule == "linear":
        share = 1.0 - progress
    else:
        share = 0.5 * (1.0 + math.cos(math.pi * progress))
    return config.learning_rate * (config.final_share + (1.0 - config.final_share) * share)
