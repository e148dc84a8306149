"""The embedded engine: torch, batched, cached, on a CPU or one GPU.

A prompt is computed once and its keys and values are given to all samples of its group.
Finished rows leave, and waiting prompts enter when enough slots are free.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from data_prep.errors import UserError
from pipeline.engines import Completion, EngineConfig, Group, Prompt, Sampling, sample_seed
from pipeline.engines._decoder import Decoder
from pipeline.engines._random import uniforms
from pipeline.model import load_model, load_tokenizer, pick_device


class Config(EngineConfig):
    """Settings of the embedded engine.

    Attributes:
        slots: Samples that run side by side.
        refill_share: Share of free slots at which waiting prompts enter.
    """

    kind: str = "embedded"
    slots: int = Field(default=512, ge=1)
    refill_share: float = Field(default=0.25, gt=0.0, le=1.0)


class _Row:
    """One running sample."""

    __slots__ = ("budget", "completion", "group", "prompt_length")

    def __init__(self, group: Group, prompt_length: int, budget: int, seed: int) -> None:
        self.group, self.prompt_length, self.budget = group, prompt_length, budget
        self.completion = Completion([], [], "", "length", seed)


class EmbeddedEngine:
    """Samples from a Llama, Qwen2 or Qwen3 model by its weights.

    Args:
        config: Settings.
        model: A model folder or hub id.
    """

    def __init__(self, config: Config, model: str | Path) -> None:
        """Load the model and keep its weights in the decoder's own layout."""
        self.config = config
        self.policy_version = 0
        self.device = pick_device(config.device)
        loaded: Any = load_model(model, config.dtype)
        self.tokenizer: Any = load_tokenizer(model)
        self.decoder = Decoder(loaded, self.device)
        ends = loaded.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        self.end_token_ids = sorted({*ends, self.tokenizer.eos_token_id} - {None})
        self.context = int(loaded.config.max_position_embeddings)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Take a policy's parameters, named as in its `state_dict`."""
        self.decoder.load(weights)
        self.policy_version = version

    def close(self) -> None:
        """Drop the weights."""
        del self.decoder

    @torch.inference_mode()
    def generate(self, prompts: list[Prompt], sampling: Sampling) -> list[Group]:
        """Return one group a prompt, in order."""
        groups = [Group(prompt) for prompt in prompts]
        waiting: deque[Group] = deque()
        for group in groups:
            length = len(group.prompt.token_ids)
            if not 0 < length < self.context:
                group.error = (
                    f"the prompt has {length} tokens; the model's context holds {self.context} "
                    "with at least one to sample"
                )
            else:
                waiting.append(group)
        run = _Run(self, sampling)
        while waiting or run.rows:
            run.admit(waiting)
            run.step()
        for group in filter(lambda group: group.completions, groups):
            texts = self.tokenizer.batch_decode(
                [c.token_ids for c in group.completions], skip_special_tokens=True
            )
            for completion, text in zip(group.completions, texts, strict=True):
                completion.text = text
        return groups


class _Run:
    """The state of one `generate` call: running rows and their cache."""

    def __init__(self, engine: EmbeddedEngine, sampling: Sampling) -> None:
        self.engine, self.sampling, self.decoder = engine, sampling, engine.decoder
        self.rows: list[_Row] = []
        self.cache: Tensor | None = None
        device = engine.device
        self.tokens = torch.zeros(0, dtype=torch.int64, device=device)
        self.positions = torch.zeros(0, dtype=torch.int64, device=device)
        self.seeds = np.zeros(0, dtype=np.uint64)
        self.counters = np.zeros(0, dtype=np.uint64)
        self.is_end = torch.zeros(self.decoder.config.vocab_size, dtype=torch.bool, device=device)
        self.is_end[engine.end_token_ids] = True
        if unknown := [token for token in sampling.stop_token_ids if token >= len(self.is_end)]:
            raise UserError(
                "sampling, key 'stop_token_ids'",
                f"token {unknown[0]}",
                f"tokens of the model's vocabulary, 0 to {len(self.is_end) - 1}",
                "take the ids from the model's own tokenizer",
            )
        self.is_end[list(sampling.stop_token_ids)] = True
        # Tokens of prompt and completion, [rows, V], where they are penalised.
        self.penalised = sampling.repetition_penalty != 1.0
        self.seen = torch.zeros(0, len(self.is_end), dtype=torch.bool, device=device)

    def admit(self, waiting: deque[Group]) -> None:
        """Let waiting prompts in, if enough slots are free."""
        slots = max(self.engine.config.slots, self.sampling.n)
        free = slots - len(self.rows)
        if not waiting or (self.rows and free < self.engine.config.refill_share * slots):
            return
        count = min(len(waiting), free // self.sampling.n)
        if not count:
            return
        groups = [waiting.popleft() for _ in range(count)]
        lengths = [len(group.prompt.token_ids) for group in groups]
        width = max(lengths)
        ids = torch.zeros((count, width), dtype=torch.int64)
        for row, group in enumerate(groups):
            ids[row, : lengths[row]] = torch.tensor(group.prompt.token_ids)
        hidden, kept = self.decoder.prefill(ids.to(self.engine.device))
        last = torch.tensor(lengths, device=self.engine.device) - 1
        logits = self.decoder.logits(hidden[torch.arange(count), last])

        n, old = self.sampling.n, len(self.rows)
        longest = min(self.engine.context, width + self.sampling.max_tokens)
        self._grow(old + count * n, longest)
        assert self.cache is not None  # noqa: S101 - _grow made it
        self.cache[:, :, old : old + count * n, :, :width] = kept.repeat_interleave(n, dim=2)
        new_rows, seeds = [], []
        for group, length in zip(groups, lengths, strict=True):
            for index in range(n):
                seed = sample_seed(self.sampling.seed, self.sampling.step, group.prompt.id, index)
                row = _Row(group, length, group.prompt.budget(self.sampling), seed)
                group.completions.append(row.completion)
                new_rows.append(row)
                seeds.append(seed)
        self.rows += new_rows
        self.seeds = np.concatenate([self.seeds, np.array(seeds, dtype=np.uint64)])
        self.counters = np.concatenate([self.counters, np.zeros(len(seeds), dtype=np.uint64)])
        if self.penalised:
            seen = self.seen.new_zeros(count, len(self.is_end))
            for row, group in enumerate(groups):
                seen[row, list(group.prompt.token_ids)] = True
            self.seen = torch.cat([self.seen, seen.repeat_interleave(n, dim=0)])
        fresh = self._sample(logits.repeat_interleave(n, dim=0), slice(old, None))
        self.tokens = torch.cat([self.tokens, fresh])
        self.positions = torch.cat([self.positions, (last + 1).repeat_interleave(n)])
        self._leave(slice(old, None))

    def step(self) -> None:
        """Sample one more token for every running row."""
        if not self.rows:
            return
        assert self.cache is not None  # noqa: S101 - rows exist, so it does
        longest = int(self.positions.max()) + 1
        hidden = self.decoder.step(self.tokens, self.positions, self.cache, longest)
        self.tokens = self._sample(self.decoder.logits(hidden), slice(None))
        self.positions = self.positions + 1
        self._leave(slice(None))

    def _sample(self, logits: Tensor, part: slice) -> Tensor:
        """Draw one token a row by inverse transform and record it; return [B]."""
        seeds, counters = self.seeds[part], self.counters[part]
        temperature = self.sampling.temperature
        if self.penalised:
            penalty = self.sampling.repetition_penalty
            changed = torch.where(logits > 0, logits / penalty, logits * penalty)
            logits = torch.where(self.seen[part], changed, logits)
        if temperature == 0.0:
            logp = torch.log_softmax(logits, dim=-1)
            chosen = logp.argmax(-1)
        else:
            logp = torch.log_softmax(logits / temperature, dim=-1)
            logp = _truncate(logp, self.sampling)
            # Float64 sums: in float32 the tail of a large vocabulary would be lost.
            cumulative = torch.cumsum(logp.double().exp(), dim=-1)
            point = torch.from_numpy(uniforms(seeds, counters)).to(logits.device)
            threshold = point * cumulative[:, -1]
            chosen = (cumulative <= threshold[:, None]).sum(-1)
            # A threshold that rounds up to the whole mass falls on the last possible token.
            chosen = torch.minimum(chosen, _last_possible(logp))
        recorded = logp.gather(-1, chosen[:, None]).squeeze(-1)
        for row, token, value in zip(
            self.rows[part], chosen.tolist(), recorded.tolist(), strict=True
        ):
            row.completion.token_ids.append(token)
            row.completion.logprobs.append(value)
        self.counters[part] += np.uint64(1)
        if self.penalised:
            self.seen[part].scatter_(1, chosen[:, None], True)
        return chosen

    def _leave(self, part: slice) -> None:
        """Take finished rows out and close the gaps."""
        ended = self.is_end[self.tokens].tolist()
        keep = []
        for index, row in enumerate(self.rows):
            completion = row.completion
            if index < (part.start or 0):
                keep.append(index)
                continue
            count = len(completion.token_ids)
            if ended[index] or self._stopped(completion):
                completion.finish_reason = "stop"
            elif count < row.budget and (row.prompt_length + count < self.engine.context):
                keep.append(index)
        if len(keep) == len(self.rows):
            return
        self._compact(keep)

    def _stopped(self, completion: Completion) -> bool:
        if not self.sampling.stop:
            return False
        # The last tokens are enough: a stop string ends in the token that was just sampled.
        longest = max(len(stop) for stop in self.sampling.stop)
        tail = self.engine.tokenizer.decode(completion.token_ids[-longest - 8 :])
        return any(stop in tail for stop in self.sampling.stop)

    def _compact(self, keep: list[int]) -> None:
        """Move the last running rows into the slots of finished ones."""
        assert self.cache is not None  # noqa: S101 - rows exist, so it does
        order = list(range(len(keep)))
        staying = set(keep)
        holes = [index for index in order if index not in staying]
        movers = [index for index in keep if index >= len(keep)]
        for hole, mover in zip(holes, movers, strict=True):
            order[hole] = mover
        if holes:
            self.cache[:, :, holes] = self.cache[:, :, movers]
        self.rows = [self.rows[index] for index in order]
        index = torch.tensor(order, dtype=torch.int64, device=self.tokens.device)
        self.tokens, self.positions = self.tokens[index], self.positions[index]
        self.seen = self.seen[index] if self.penalised else self.seen
        self.seeds, self.counters = self.seeds[order], self.counters[order]

    def _grow(self, slots: int, positions: int) -> None:
        """Make room for slots and positions, keeping what is running."""
        if self.cache is None:
            self.cache = self.decoder.new_cache(slots, positions)
            return
        if self.cache.shape[2] >= slots and self.cache.shape[4] >= positions:
            return
        grown = self.decoder.new_cache(
            max(slots, self.cache.shape[2]), max(positions, self.cache.shape[4])
        )
        running = len(self.rows)
        grown[:, :, :running, :, : self.cache.shape[4]] = self.cache[:, :, :running]
        self.cache = grown


def _truncate(logp: Tensor, sampling: Sampling) -> Tensor:
    """Return the log-probs of the truncated and renormalised distribution."""
    top_k, top_p, min_p = sampling.top_k, sampling.top_p, sampling.min_p
    if min_p > 0.0:
        smallest = logp.amax(-1, keepdim=True) + math.log(min_p)
        logp = torch.log_softmax(logp.masked_fill(logp < smallest, -torch.inf), dim=-1)
    if 0 < top_k < logp.shape[-1]:
        smallest = logp.topk(top_k, dim=-1).values[:, -1:]
        logp = logp.masked_fill(logp < smallest, -torch.inf)
    if top_p < 1.0:
        ordered, order = logp.sort(dim=-1, descending=True)
        p = ordered.exp()
        # A token stays while the mass before it is below top_p, so the first always does.
        outside = (p.cumsum(-1) - p) >= top_p * p.sum(-1, keepdim=True)
        logp = logp.scatter(-1, order, ordered.masked_fill(outside, -torch.inf))
    if top_k or top_p < 1.0:
        logp = torch.log_softmax(logp, dim=-1)
    return logp


def _last_possible(logp: Tensor) -> Tensor:
    """Return the index of the last token with non-zero probability, [B]."""
    indices = torch.arange(logp.shape[-1], device=logp.device)
    return torch.where(logp > -torch.inf, indices, -1).max(-1).values


def create(config: Config, model: str | Path) -> EmbeddedEngine:
    """Return the engine."""
    return EmbeddedEngine(config, model)
