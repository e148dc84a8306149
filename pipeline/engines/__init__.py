"""Engines: token ids in, groups of completions out.

Contract of a plug-in file `pipeline/engines/<kind>.py`:

* `Config(EngineConfig)`: its settings.
* `create(config, model) -> Engine`: an engine with the weights of a model folder.

An engine has the shape of vLLM's `LLM.generate`, so that a benchmark swaps one line. A sample
depends on (run seed, step, prompt id, sample index) through `sample_seed` and on nothing else;
what vLLM makes of that promise stands in `_vllm.py`. One thread asks an engine at a time, and
not always the same one (`pipeline.ahead`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Protocol

from pydantic import Field

from data_prep.config import Config, PluginConfig
from data_prep.errors import UserError
from data_prep.plugins import load_plugin, make

if TYPE_CHECKING:
    from pathlib import Path

    import torch

FinishReason = Literal["stop", "length", "error"]
StopString = Annotated[str, Field(min_length=1)]


class EngineConfig(PluginConfig):
    """What every engine understands.

    Attributes:
        dtype: What the engine computes in.
        device: Where the trainer and the embedded engine compute; "auto" takes a GPU if there
            is one.
    """

    # Keys that may change without another result, such as a server's address.
    incidental: ClassVar[frozenset[str]] = frozenset()
    # Whether prompts are token ids, or conversations for an engine that speaks text alone.
    takes: ClassVar[Literal["tokens", "messages"]] = "tokens"
    # Where several processes train: each has an engine of its own, the leader's one serves all,
    # or it cannot stand beside them.
    among: ClassVar[Literal["each", "leader", "alone"]] = "each"

    dtype: Literal["float32", "bfloat16"] = "float32"
    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$")] = "auto"

    def settled(self, model: str | Path) -> EngineConfig:
        """Return these settings with nothing left open that changes a sample's bits.

        Args:
            model: The folder or hub id whose weights sample.
        """
        del model
        return self

    def deciding(self, model: str | Path) -> dict[str, Any]:
        """Return the settings that decide the samples, for a stage's plan.

        Args:
            model: The folder or hub id whose weights sample.
        """
        return self.settled(model).model_dump(mode="json", exclude=set(self.incidental))


class Sampling(Config):
    """How completions are drawn.

    A token is drawn from softmax(z/τ), cut down: logits z, in this order (that of vLLM), are
    penalised for repetition, divided by the temperature τ, and lose what min_p, top_k and top_p
    exclude; what is left is renormalised, and the log-probs are those of the result. At
    temperature 0 the most probable token is taken, after the repetition penalty alone.

    Attributes:
        n: Completions a prompt (the group size G).
        temperature: 0 is greedy.
        top_p: Nucleus: the most probable tokens that together hold this mass; 1 keeps all.
        top_k: The k most probable tokens; 0 keeps the whole vocabulary.
        min_p: Tokens at least this share as probable as the most probable one; 0 keeps all.
        repetition_penalty: Divides the positive logits of tokens that stand in the prompt or
            the completion so far, and multiplies the negative ones (Keskar et al. 2019,
            arXiv:1909.05858, section 4.1, in transformers' and vLLM's form); 1 is none.
        max_tokens: Longest completion, end token included.
        stop: Strings that end a completion; the text that holds the string is kept.
        stop_token_ids: Tokens that end a completion, beside the model's own end tokens; kept.
        seed: The run's seed.
        step: Which draw of the run this is (0 for a single one).
    """

    n: int = Field(default=8, ge=1)
    temperature: float = Field(default=1.0, ge=0.0)
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    top_k: int = Field(default=0, ge=0)
    min_p: float = Field(default=0.0, ge=0.0, le=1.0)
    repetition_penalty: float = Field(default=1.0, gt=0.0)
    max_tokens: int = Field(default=64, ge=1)
    stop: tuple[StopString, ...] = ()
    stop_token_ids: tuple[Annotated[int, Field(ge=0)], ...] = ()
    seed: int = Field(default=0, ge=0)
    step: int = Field(default=0, ge=0)


@dataclass(frozen=True, slots=True)
class Prompt:
    """Tokens that samples go on from.

    To go on from a prefix of a completion (Monte-Carlo values, references that are completed),
    ask for a prompt of its own: `token_ids` are the problem's prompt and the prefix, `id` names
    the prefix too, such as "gsm8k-7/prefix-12", so that its samples have seeds of their own, and
    `max_tokens` is what the prefix leaves of the budget.

    Attributes:
        id: Takes part in the seeds of the prompt's samples.
        token_ids: The rendered tokens.
        max_tokens: Longest completion of this prompt where that is less than
            `Sampling.max_tokens`; None for no limit of its own.
        messages: The conversation, each turn with `role` and `content`, for engines that take
            messages; `token_ids` are then empty.
    """

    id: str
    token_ids: tuple[int, ...]
    max_tokens: int | None = None
    messages: tuple[Mapping[str, str], ...] = field(default=(), hash=False)

    def __post_init__(self) -> None:
        """Refuse a budget of nothing."""
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ValueError(f"prompt {self.id!r}: max_tokens is {self.max_tokens}, below 1")

    def budget(self, sampling: Sampling) -> int:
        """Return the longest completion of this prompt, in tokens."""
        return min(sampling.max_tokens, self.max_tokens or sampling.max_tokens)


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
        token_count: Tokens as the endpoint counts them, from engines that give text alone; None
            where `token_ids` says it.
    """

    token_ids: list[int]
    logprobs: list[float]
    text: str
    finish_reason: FinishReason
    seed: int
    token_count: int | None = None


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
    module = load_plugin("pipeline.engines", config.kind, where="engine.kind")
    engine = make(module, config, model)
    missing = [name for name in ("generate", "load_weights", "close") if not hasattr(engine, name)]
    if missing:
        raise UserError(
            str(module.__file__),
            f"create returned {type(engine).__name__}, without {', '.join(missing)}",
            "a pipeline.engines.Engine",
            "mend create",
        )
    return engine


def require_among(config: PluginConfig, where: str) -> None:
    """Refuse an engine that cannot stand beside several training processes.

    Args:
        config: The engine's.
        where: Who asks.

    Raises:
        UserError: It cannot.
    """
    if getattr(config, "among", "each") == "alone":
        raise UserError(
            where,
            f"engine.kind = {config.kind!r} with several processes: it would join their "
            "process group",
            "servers beside the trainer, or the embedded engine in every process",
            'set engine.kind = "vllm_server" (python -m pipeline.serve starts servers)',
        )


def require_tokens(config: PluginConfig, where: str) -> None:
    """Refuse an engine that speaks text alone.

    Args:
        config: The engine's.
        where: Who asks.

    Raises:
        UserError: It does.
    """
    if getattr(config, "takes", "tokens") != "tokens":
        raise UserError(
            where,
            f"engine.kind = {config.kind!r}, which gives text without token ids and log-probs",
            "an engine of token ids: every method weighs the log-probs of the sampled tokens, and "
            "text that is tokenised again need not be the tokens that were sampled",
            'set engine.kind = "embedded", "vllm" or "vllm_server"; it may serve eval.run',
        )


def sample_seed(run_seed: int, step: int, prompt_id: str, sample_index: int) -> int:
    """Return a sample's seed, a 62-bit hash of what it may depend on.

    Never seed + index: that makes samples of neighbouring prompts coincide. 62 bits fit every
    sampler that takes a signed 64-bit integer.
    """
    text = f"{run_seed}\x1f{step}\x1f{prompt_id}\x1f{sample_index}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 2
