"""Any causal LM through its own forward pass and its own cache: slower, but whatever it is.

The counterpart of `_decoder` for architectures that are not written there. Prompts are padded on
the left; a group's prompt is computed once and its cache copied for each sample; ended rows
leave, but new prompts wait until the batch is empty, since a cache has one length for all rows.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from data_prep.errors import UserError
from pipeline.engines._cache import Store
from pipeline.engines._rows import COUNT, LENGTH, TOKEN, Size


class ForwardDecoder:
    """Stands where a `_decoder.Decoder` would.

    Args:
        model: A transformers causal LM; used as it is.
        device: Where it runs.
    """

    graphs = False

    def __init__(self, model: Any, device: torch.device) -> None:
        """Move the model."""
        self.model = model.to(device).eval().requires_grad_(False)
        self.config, self.dtype, self.device = model.config, model.dtype, device
        self.store = Store()
        known = inspect.signature(model.forward).parameters
        self.takes_positions = "position_ids" in known
        self.last_only: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in known else {}

    def cache_bytes(self, size: Size) -> int:
        """Return 0: how large a cache is, is the model's own affair."""
        del size
        return 0

    def load(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Copy parameters, named as in the model's `state_dict`.

        Raises:
            UserError: A parameter is unknown or one is missing.
        """
        own = self.model.state_dict()
        missing = set(own)
        for name, value in weights:
            if name not in own:
                raise _mismatch(f"parameter {name!r} is not the model's")
            own[name].copy_(value)
            missing.discard(name)
        if missing:
            raise _mismatch(f"{len(missing)} parameters are missing, such as {min(missing)!r}")

    def open(self, lanes: int, size: Size) -> ForwardSession:
        """Return an empty batch for n = `lanes` samples a prompt."""
        return ForwardSession(self, lanes, size.blocks)

    def run(self, ids: Tensor, mask: Tensor, positions: Tensor, cache: Any) -> Tensor:
        """Return the logits after the last column [B, V]; the cache takes the rest in."""
        optional = {"position_ids": positions} if self.takes_positions else {}
        logits = self.model(
            input_ids=ids,
            attention_mask=mask,
            past_key_values=cache,
            use_cache=True,
            **optional,
            **self.last_only,
        ).logits[:, -1]
        return logits.to(torch.promote_types(logits.dtype, torch.float32), copy=True)


class ForwardSession:
    """A running batch: the model, its cache, and which columns of it are padding."""

    joins = False

    def __init__(self, decoder: ForwardDecoder, lanes: int, blocks: int) -> None:
        """Start empty."""
        self.decoder, self.lanes, self.free_blocks = decoder, lanes, blocks
        self.cache: Any = None
        self.mask = torch.zeros((0, 0), dtype=torch.int64, device=decoder.device)

    def admit(self, prompts: list[tuple[int, ...]]) -> Tensor:
        """Run prompts and make n rows for each; return the logits after each prompt, [B, V]."""
        from transformers import DynamicCache

        device, width = self.decoder.device, max(map(len, prompts))
        ids = torch.zeros((len(prompts), width), dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        positions = (mask.cumsum(1) - 1).clamp_min_(0).to(device)
        self.cache, mask = DynamicCache(config=self.decoder.config), mask.to(device)
        logits = self.decoder.run(ids.to(device), mask, positions, self.cache)
        self._select(torch.arange(len(prompts), device=device).repeat_interleave(self.lanes), mask)
        return logits

    def fit(self, tokens: int, coarse: bool) -> tuple[int, ...]:
        """Do nothing: the model's cache grows by itself."""
        del tokens, coarse
        return ()

    def step(self, state: Tensor) -> Tensor:
        """Run the last token of the first rows; return the logits after it [B, V].

        Args:
            state: [7, B] of `_rows.Rows`.
        """
        tokens, positions = state[TOKEN], state[LENGTH] + state[COUNT] - 1
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(tokens), 1)], dim=1)
        return self.decoder.run(tokens[:, None], self.mask, positions[:, None], self.cache)

    def keep(self, order: list[int]) -> None:
        """Keep the rows at these indices, in this order."""
        if order:
            self._select(torch.tensor(order, device=self.decoder.device), self.mask)

    def _select(self, rows: Tensor, mask: Tensor) -> None:
        self.cache.reorder_cache(rows)
        self.mask = mask[rows]


def _mismatch(found: str) -> UserError:
    return UserError(
        "engine.kind 'embedded'",
        found,
        "all parameters of the model, and no others",
        "check the model folder",
    )
