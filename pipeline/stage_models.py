"""The models of a stage: what is trained, its reference, its critic, and adapters in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from data_prep.errors import UserError
from pipeline.adapters import Adapters
from pipeline.config import RunConfig, TrainConfig
from pipeline.critic import Critic, critic_of, load_scalar_model, value_head
from pipeline.generate import checkpoint_of
from pipeline.methods import Method
from pipeline.model import build_model, load_model, pick_device
from pipeline.ranks import ALONE, Ranks


class Models(NamedTuple):
    """What `pipeline.trainer.Trainer` takes.

    Attributes:
        model: The policy, or the reward model.
        reference: The frozen π_ref, where somebody asks for one; the policy itself where that has
            adapters, without which it is the reference.
        critic: V, where the method has one.
        adapters: Those in the model, where they are trained in its place.
    """

    model: Any
    reference: Any = None
    critic: Critic | None = None
    adapters: Adapters | None = None


def load_models(
    run: RunConfig,
    config: TrainConfig,
    method: Method,
    init: str | Path | None,
    tokenizer: Any,
    ranks: Ranks = ALONE,
) -> Models:
    """Load or build what a stage trains, and what it needs beside that.

    Args:
        run: The whole run's configuration.
        config: The stage's.
        method: Says what is needed.
        init: What the stage starts from; None builds a model with random weights.
        tokenizer: Gives such a model its vocabulary.
        ranks: The processes that train it together.

    Raises:
        UserError: A reward model is to start from random weights, or a model cannot be loaded.
    """
    device = pick_device(run.engine.device)  # type: ignore[attr-defined]
    if ranks.shards:
        device = torch.device("cpu")  # a layer at a time goes to the GPU, split
    dtype, trust = run.model.dtype, run.model.trust_remote_code
    if method.trains == "scores":
        if init is None:
            raise UserError(
                f"stage {config.name!r}, key 'init'",
                "a model with random weights",
                "a trained model to judge with",
                'set init = "sft"',
            )
        judge: Any = load_scalar_model(init, dtype, trust).to(device)  # type: ignore[arg-type]
        adapters = _adapters(run, config, judge, "scores")
        _checkpointing(config, judge)
        return Models(judge.train(), adapters=adapters)
    model: Any = (
        build_model(run.model, tokenizer, run.seed)
        if init is None
        else load_model(init, dtype, trust)
    ).to(device)  # type: ignore[arg-type]
    adapters = _adapters(run, config, model)
    _checkpointing(config, model)
    reference: Any = None
    if method.reference or config.watch_reference:
        # Without its adapters the model is its own reference.
        reference = model if adapters else load_model(str(init), dtype, trust).requires_grad_(False)
        reference = reference.to(device)  # type: ignore[arg-type]
    critic = None
    if method.critic == "head":
        critic = value_head(model)
    elif method.critic == "separate":
        start = checkpoint_of(run, method.critic_init) if method.critic_init else str(init)
        scalar: Any = load_scalar_model(start, dtype, trust).to(device)  # type: ignore[arg-type]
        _adapters(run, config, scalar, "scores")
        _checkpointing(config, scalar)
        critic = critic_of(scalar.train())
    if ranks.shards and method.critic == "head":
        critic = critic.to(ranks.device)  # type: ignore[union-attr]
    return Models(model.train(), reference, critic, adapters)


def _adapters(
    run: RunConfig, config: TrainConfig, model: Any, task: Literal["policy", "scores"] = "policy"
) -> Adapters | None:
    """Put adapters into a model where the stage asks for them."""
    if not config.lora.rank:
        return None
    resets = task == "policy" and config.iterations > 1
    return Adapters(model, config.lora, task, run.seed, resets, f"stage {config.name!r}")


def _checkpointing(config: TrainConfig, model: Any) -> None:
    if config.gradient_checkpointing:
        # Reentrant checkpoints would lose the gradient of adapters on a frozen embedding.
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
