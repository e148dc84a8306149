"""Engines: token ids in, groups of completions out.

Contract of a plug-in file `pipeline/engines/<kind>.py`:

* `Config(EngineConfig)`: its settings.
* `create(config, model) -> Engine`: an engine with the weights of a model folder.

An engine has the shape of vLLM's `LLM.generate`, so that a benchmark swaps one line. A sample
depends on (run seed, step, prompt id, sample index) through `sample_seed` and on nothing else.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol

from pydantic import Field

from data_prep.config import Config, PluginConfig
from data_prep.plugins import load_plugin

if TYPE_CHECKING:
    from pathlib import Path

    import torch

FinishReason = Literal["stop", "length", "error"]


class EngineConfig(PluginConfig):
    """What every engine understands."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    device: str = "auto"


class Sampling(Config):
    """How completions are drawn.

    Attributes:
        n: Completions a prompt (the group size G).
        temperature: 0 is greedy.
        top_p: Nucleus; below 1 the log-probs are those of the truncated distribution.
        top_k: 0 keeps the whole vocabulary.
        max_tokens: Longest completion, end token included.
        stop: Strings that end a completion; the text that holds the string is kept.
        seed: The run's seed.
        step: Which draw of the run this is (0 for a single one).
    """

    n: int = Field(default=8, ge=1)
    temperature: float = Field(default=1.0, ge=0.0)
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    top_k: int = Field(default=0, ge=0)
    max_tokens: int = Field(default=64, ge=1)
    stop: tuple[str, ...] = ()
    seed: int = Field(default=0, ge=0)
    step: int = Field(default=0, ge=0)


@dataclass(frozen=True, slots=True)
class Prompt:
    """Rendered tokens of one problem; `id` takes part in the seeds of its samples."""

    id: str
    token_ids: tuple[int, ...]


@dataclass(slots=True)
class Completion:
    """What was sampled after a prompt.

    Attributes:
        token_ids: Sampled tokens, the end token included.
        logprobs: One a token: of the distribution that was really sampled from (temperature
            and truncation applied). At temperature 0, of the untempered distribution.
        text: Decoded without special tokens.
        finish_reason: "stop" at an end token or stop string, "length" when cut off.
        seed: What the sample was drawn with.
    """

    token_ids: list[int]
    logprobs: list[float]
    text: str
    finish_reason: FinishReason
    seed: int


@dataclass(slots=True)
class Group:
    """The completions of one prompt, by sample index.

    `error` is None, or says why this prompt could not be completed (too long for the
    model's context, for one); then `completions` is empty.
    """

    prompt: Prompt
    completions: list[Completion] = field(default_factory=list)
    error: str | None = None


class Engine(Protocol):
    """Generates with some weights."""

    policy_version: int

    def generate(self, prompts: list[Prompt], sampling: Sampling) -> list[Group]:
        """Return one group a prompt, in order."""
        ...

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """Take a policy's parameters, named as in its `state_dict`."""
        ...

    def close(self) -> None:
        """Give back memory and processes."""
        ...


def create_engine(config: PluginConfig, model: str | Path) -> Engine:
    """Create the engine that `config.kind` names, with the weights of a model folder."""
    return load_plugin("pipeline.engines", config.kind, where="engine.kind").create(config, model)


def sample_seed(run_seed: int, step: int, prompt_id: str, sample_index: int) -> int:
    """Return a sample's seed, a 62-bit hash of what it may depend on.

    Never seed + index: that makes samples of neighbouring prompts coincide. 62 bits fit every
    sampler that takes a signed 64-bit integer.
    """
    text = f"{run_seed}\x1f{step}\x1f{prompt_id}\x1f{sample_index}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 2
