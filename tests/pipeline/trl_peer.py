"""TRL's own trainers and our own loop, side by side on one model and the same sequences.

TRL projects hidden states to log-probs in a kernel that rounds to float32. `exact` puts a dense
float64 one in its place; all else that is TRL's stays. Tests of the kernel leave it in.
"""

from __future__ import annotations

import importlib
import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.batch import Sequence
from pipeline.config import RunConfig, SamplingConfig, TrainConfig
from pipeline.methods import create_method
from pipeline.trainer import Trainer

NAMES = ("SFT", "DPO", "GRPO", "RLOO", "Reward")


def import_trl() -> SimpleNamespace:
    """Import the trainers; TRL is not told of vLLM, which it would import whole and warn about."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_LOGGING_LEVEL", os.environ.get("VLLM_LOGGING_LEVEL", "ERROR"))
        patch.setattr(
            importlib.import_module("trl.import_utils"), "is_vllm_available", lambda *_, **__: False
        )
        trl = importlib.import_module("trl")
        found = {f"{n}{part}": getattr(trl, f"{n}{part}") for n in NAMES for part in _PARTS}
    return SimpleNamespace(**found, utils=importlib.import_module("trl.trainer.utils"))


_PARTS = ("Trainer", "Config")


class DenseHead:
    """Log-probs and entropies in the precision of the hidden states, by autograd."""

    @staticmethod
    def apply(
        hidden: Tensor, weight: Tensor, bias: None, targets: Tensor, temperature: float, *_: Any
    ) -> tuple[Tensor, ...]:
        """Return what `trl.kernels.ChunkedLogProbFunction` returns."""
        logits = hidden @ weight.T / temperature
        logp = torch.log_softmax(logits, -1)
        return (
            logp.gather(-1, targets[:, None]).squeeze(-1),
            -(logp.exp() * logp).sum(-1),
            torch.logsumexp(2 * logp, -1).detach(),
            logits.mean(-1).detach(),
            logits.argmax(-1) == targets,
        )


@dataclass
class Sides:
    """One model in float64, and both sides' way to its gradient.

    Attributes:
        trl: The trainers, from `import_trl`.
        run: A run's configuration; only its sampling matters here.
        folder: Where TRL may write.
        model: The policy.
        reference: π_ref.
        tokenizer: Of both.
    """

    trl: SimpleNamespace
    run: RunConfig
    folder: Path
    model: Any
    reference: Any
    tokenizer: Any
    rewards: list[float | None] = field(default_factory=list)

    def gradient(self) -> Tensor:
        """Return the gradient in all parameters, as one vector, and forget it."""
        parts = [p.grad.flatten() for p in self.model.parameters()]
        self.model.zero_grad(set_to_none=True)
        return torch.cat(parts)

    def ours(
        self,
        kind: str,
        sequences: list[Sequence],
        *,
        old: Tensor | None = None,
        temperature: float = 1.0,
        max_tokens: int = 9,
        micro_tokens: int = 16384,
        correction: dict[str, Any] | None = None,
        model: Any = None,
        log: list[Sequence] | None = None,
        **options: Any,
    ) -> tuple[float, Tensor]:
        """Return our loss −J and its gradient, by `Trainer._accumulate`.

        Args:
            kind: Which method.
            sequences: With their advantages or signs.
            old: [T], log π_old; the policy's own where there is none.
            temperature: Of the sampler.
            max_tokens: L_max.
            micro_tokens: Largest forward pass.
            correction: Settings of the sampler correction.
            model: In place of the policy: a reward model.
            log: What a method that trains on a log selects from, in place of `sequences`.
            options: The method's.
        """
        config = TrainConfig(
            name="peer",
            method={"kind": kind, **options},
            micro_tokens=micro_tokens,
            correction=correction or {"kind": "off"},  # type: ignore[arg-type]
        )
        sampling = SamplingConfig(temperature=temperature, max_tokens=max_tokens)
        run = self.run.model_copy(update={"sampling": sampling})
        method = create_method(config.method)
        model = model or self.model
        trainer = Trainer(run, config, method, model, self.reference if method.reference else None)
        if log is not None:
            sequences = [s for unit in method.select(log, 0) for s in unit]
        sequences = method.marked(sequences)
        tokens = trainer.flat(sequences)
        tokens.old_logp = old
        if kind == "ppo":  # its figures look at the critic's targets
            tokens.target = tokens.old_value = torch.zeros_like(tokens.weight)
        figures, *_ = trainer._accumulate(sequences, tokens)
        return -figures["objective"], replace(self, model=model).gradient()

    def trainer(self, name: str, **options: Any) -> Any:
        """Return TRL's trainer of that name on the policy."""
        from datasets import Dataset

        columns = {
            "SFT": {"text": ["a", "b"]},
            "DPO": {"prompt": ["a", "b"], "chosen": ["c", "d"], "rejected": ["e", "f"]},
            "Reward": {"chosen": ["c", "d"], "rejected": ["e", "f"]},
        }.get(name, {"prompt": ["a", "b"]})
        more: dict[str, Any] = {}
        if name in ("GRPO", "RLOO"):
            more["reward_funcs"] = lambda **_: self.rewards
            options = {"per_device_train_batch_size": 12, "num_generations": 4, **options}
            options.setdefault("max_completion_length", 9)
        if name == "DPO":
            more["ref_model"] = self.reference
        config = getattr(self.trl, f"{name}Config")(
            output_dir=str(self.folder),
            use_cpu=True,
            bf16=False,
            report_to="none",
            gradient_checkpointing=False,
            disable_tqdm=True,
            **options,
        )
        trainer = getattr(self.trl, f"{name}Trainer")(
            more.pop("model", self.model),
            args=config,
            train_dataset=Dataset.from_dict(columns),
            processing_class=self.tokenizer,
            **more,
        )
        if getattr(trainer, "beta", 0.0) and name in ("GRPO", "RLOO"):
            trainer.ref_model = self.reference
            self.trl.utils.add_fused_lm_head(self.reference, temperature=trainer.temperature)
        trainer.current_gradient_accumulation_steps = 1  # its loop would count them
        self.model.train()
        return trainer

    def theirs(
        self,
        name: str,
        sequences: list[Sequence],
        *,
        old: Tensor | None = None,
        **options: Any,
    ) -> tuple[float, Tensor]:
        """Return the loss and gradient of TRL's GRPO or RLOO trainer.

        Args:
            name: "GRPO" or "RLOO".
            sequences: With their advantages.
            old: [T], log π_old; the policy's own where there is none.
            options: The trainer's configuration.
        """
        trainer = self.trainer(name, **options)
        inputs = self.padded(sequences, old)
        if trainer.beta:
            with torch.no_grad():
                inputs["ref_per_token_logps"] = logps(trainer, self.reference, inputs)
        if name == "RLOO":
            with torch.no_grad():
                found = logps(trainer, self.model, inputs) if old is None else None
            found = inputs["old_per_token_logps"] if found is None else found
            inputs["old_logps"] = (found * inputs["completion_mask"]).sum(1)
        return self.loss(trainer, inputs)

    def rows(self, sequences: list[Sequence]) -> dict[str, Tensor]:
        """Return sequences as transformers' own loss reads them: padded on the right."""
        width = max(len(s.prompt) + len(s.completion) for s in sequences)
        ids = torch.full((len(sequences), width), self.tokenizer.pad_token_id)
        mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
        for row, s in enumerate(sequences):
            start, end = len(s.prompt), len(s.prompt) + len(s.completion)
            ids[row, :end] = torch.tensor(s.prompt + s.completion)
            mask[row, :end] = 1
            kept = torch.tensor(s.mask)
            labels[row, start:end] = torch.where(kept, ids[row, start:end], -100)
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    def loss(self, trainer: Any, inputs: dict[str, Tensor]) -> tuple[float, Tensor]:
        """Return a trainer's loss and its gradient."""
        loss = trainer.compute_loss(trainer.model, inputs)
        loss.backward()
        return float(loss.detach()), replace(self, model=trainer.model).gradient()

    def padded(self, sequences: list[Sequence], old: Tensor | None = None) -> dict[str, Tensor]:
        """Return sequences as TRL's online trainers hold them: prompts padded on the left."""
        pad = self.tokenizer.pad_token_id
        before = max(len(s.prompt) for s in sequences)
        after = max(len(s.completion) for s in sequences)
        shape = len(sequences), after
        ids = torch.full((len(sequences), before), pad)
        found = {"prompt_ids": ids, "prompt_mask": torch.zeros_like(ids)}
        found |= {"completion_ids": torch.full(shape, pad)}
        found |= {"completion_mask": torch.zeros(shape, dtype=torch.int64)}
        found |= {"tool_mask": torch.ones(shape, dtype=torch.int64)}
        advantages = torch.zeros(shape, dtype=torch.float64)
        for row, s in enumerate(sequences):
            found["prompt_ids"][row, before - len(s.prompt) :] = torch.tensor(s.prompt)
            found["prompt_mask"][row, before - len(s.prompt) :] = 1
            length = len(s.completion)
            found["completion_ids"][row, :length] = torch.tensor(s.completion)
            found["completion_mask"][row, :length] = 1
            found["tool_mask"][row, :length] = torch.tensor(s.mask)
            own = s.advantages or [s.advantage] * length
            advantages[row, :length] = torch.tensor(own, dtype=torch.float64)
        whole = not any(s.advantages for s in sequences)
        found["advantages"] = advantages[:, 0] if whole else advantages
        kept = (found["completion_mask"] * found["tool_mask"]).bool()
        found["num_items_in_batch"] = kept.sum()
        if old is not None:
            values = torch.zeros(shape, dtype=torch.float64)
            values[kept] = old
            found["old_per_token_logps"] = values
        return found

    def rollouts(
        self,
        trainer: Any,
        sequences: list[Sequence],
        rewards: list[float | None],
        sampler: list[list[float]] | None = None,
    ) -> dict[str, Tensor]:
        """Return what a GRPO or RLOO trainer makes of completions and rewards, advantages too.

        Only what tokenises and generates is replaced.
        """
        self.rewards = rewards
        completions = [s.completion for s in sequences]
        sampled = (completions, sampler) if isinstance(trainer, self.trl.GRPOTrainer) else None
        trainer._tokenize_prompts = lambda _: ([s.prompt for s in sequences], None, {})
        trainer._generate_single_turn = lambda *_, **__: sampled or completions
        return trainer._generate_and_score_completions([{"prompt": "a"} for _ in sequences])


def logps(trainer: Any, model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """Return [N, T] log-probs of the completions by TRL's own function."""
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    width = inputs["completion_ids"].shape[1]
    return trainer._get_per_token_logps_and_entropies(model, ids, mask, width)[0]
