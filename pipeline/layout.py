"""How documents lie in a forward pass: one after the other, or in padded rows with a mask.

The flat order is the one that everything is written in: T tokens, document after document, where
a document is a prompt with its completions. Backbones that read rows are given `Rows`, which
hold as many documents each as fit the longest one, and a mask that keeps them apart. What such a
mask cannot say (a sliding window, a state that is carried on) is left to the model: every
completion then stands behind a prompt of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from pipeline.attention import Plan, plan_of
from pipeline.kernels import round_up

# How a model reads rows: by our mask, completions behind a prompt that they share; by positions
# that begin anew, from which it makes masks itself; or a sequence a row, as everything can.
Reading = Literal["shared", "packed", "alone"]


@dataclass(slots=True)
class Rows:
    """The same tokens as B rows of L columns.

    Attributes:
        input_ids: [B, L], 0 where there is no token.
        position_ids: [B, L]; None where every row is one document without branches.
        attention: [B, 1, L, L] bool, True where a query sees a key; None where the model makes
            its masks itself: from the positions, or for plain rows (padding stands at the end,
            unseen).
        place: [T], where each token stands in the flattened rows; of a prompt that several rows
            have, in the first of them.
    """

    input_ids: Tensor
    position_ids: Tensor | None
    attention: Tensor | None
    place: Tensor


@dataclass(slots=True)
class Layout:
    """One forward pass: T tokens, and where each loss-carrying one of N is predicted.

    Attributes:
        input_ids: [T].
        position_ids: [T], counted within prompt + own completion.
        spans: [S, 4] int64, runs of tokens that see each other causally, in order: first token,
            length, and first token and length of the run before it that they see too (0, 0 for
            none, which begins a document).
        kept: [R], ascending, the tokens whose states somebody reads.
        before: [N], which of those predicts each target.
        after: [N], which of those is the target's own, the state after it.
        targets: [N] token ids.
    """

    input_ids: Tensor
    position_ids: Tensor
    spans: np.ndarray
    kept: Tensor
    before: Tensor
    after: Tensor
    targets: Tensor
    _plans: dict[tuple[int, int], Plan] = field(default_factory=dict)

    def to(self, device: torch.device) -> Layout:
        """Return the same on a device."""
        if self.input_ids.device == device:
            return self
        moved = {
            f.name: value.to(device, non_blocking=True)
            for f in fields(self)
            if isinstance(value := getattr(self, f.name), Tensor)
        }
        return replace(self, **moved)

    def plan(self, heads: int, key_heads: int) -> Plan:
        """Return how attention takes the spans of this pass, on a CPU.

        The tokens are rounded up by some that are a span of their own, which nobody reads.
        """
        if (heads, key_heads) not in self._plans:
            count = len(self.input_ids)
            tokens = round_up(count)
            more = [[count, tokens - count, 0, 0]] if tokens > count else np.empty((0, 4), int)
            spans = np.concatenate([self.spans, more])
            self._plans[heads, key_heads] = plan_of(spans, tokens, heads, key_heads)
        return self._plans[heads, key_heads]

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt with a completion of its own."""
        return int((self.spans[:, 1] + self.spans[:, 3]).max())

    def rows(self, reading: Reading = "shared") -> Rows:
        """Return the tokens in rows of the longest document's length, by best fit decreasing."""
        branches = bool((self.spans[:, 3] > 0).any())
        if reading == "shared":
            begins = np.flatnonzero(self.spans[:, 3] == 0)
            lengths = np.add.reduceat(self.spans[:, 1], begins)
            tokens = np.arange(len(self.input_ids))
        else:
            lengths, tokens = self._sequences()
        rows = np.arange(len(lengths)) if reading == "alone" else _best_fit(lengths)
        count, width = 1 + int(rows.max()), int(lengths.max())
        column = np.zeros(len(lengths), dtype=np.int64)
        filled = np.zeros(count, dtype=np.int64)
        for document in range(len(lengths)):
            column[document] = filled[rows[document]]
            filled[rows[document]] += lengths[document]
        starts = np.cumsum(lengths) - lengths
        place = np.arange(len(tokens)) + np.repeat(rows * width + column - starts, lengths)
        first = np.empty(len(self.input_ids), dtype=np.int64)
        first[tokens[::-1]] = place[::-1]  # the last one that is written stays
        device = self.input_ids.device
        at = torch.from_numpy(place).to(device)
        taken = torch.from_numpy(tokens).to(device)
        found = torch.from_numpy(first).to(device)

        def spread(values: Tensor, empty: int) -> Tensor:
            made = torch.full((count * width,), empty, dtype=values.dtype, device=device)
            return made.index_copy_(0, at, values).view(count, width)

        ids = spread(self.input_ids[taken], 0)
        if count == len(lengths) and (reading != "shared" or not branches):
            return Rows(ids, None, None, found)
        positions = spread(self.position_ids[taken], 0)
        if reading == "packed":
            return Rows(ids, positions, None, found)
        owner = np.repeat(np.arange(len(lengths)), lengths)
        branch = np.repeat(
            np.where(self.spans[:, 3] > 0, np.arange(len(self.spans)), -1), self.spans[:, 1]
        )
        seen = _visible(
            spread(torch.from_numpy(owner).to(device), -1),
            spread(torch.from_numpy(branch).to(device), -1),
        )
        return Rows(ids, positions, seen, found)

    def _sequences(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the lengths of all prompts with one completion, and which tokens they are."""
        shared = set(self.spans[self.spans[:, 3] > 0, 2].tolist())
        sequences = [
            np.concatenate([np.arange(parent, parent + before), np.arange(start, start + length)])
            for start, length, parent, before in self.spans.tolist()
            if before or start not in shared
        ]
        return np.array([len(s) for s in sequences]), np.concatenate(sequences)


def _best_fit(lengths: np.ndarray) -> np.ndarray:
    """Return the row of each document: the fullest one that still holds it, else a new one."""
    capacity = int(lengths.max())
    free: list[int] = []
    rows = np.empty(len(lengths), dtype=np.int64)
    for document in np.argsort(-lengths, kind="stable"):
        length = int(lengths[document])
        fits = [(left, r) for r, left in enumerate(free) if left >= length]
        if fits:
            _, row = min(fits)
        else:
            row = len(free)
            free.append(capacity)
        rows[document] = row
        free[row] -= length
    return rows


def _visible(owner: Tensor, branch: Tensor) -> Tensor:
    """Return [B, 1, L, L]: earlier tokens of the same document, of the prompt or own branch."""
    length = owner.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=owner.device).tril()
    same = owner[:, :, None] == owner[:, None, :]
    reached = (branch[:, None, :] == -1) | (branch[:, :, None] == branch[:, None, :])
    return (causal & same & reached)[:, None]


def layout_of(
    documents: Iterable[tuple[Sequence[int], Sequence[tuple[Sequence[int], Sequence[bool]]]]],
) -> Layout:
    """Lay documents one after the other.

    Args:
        documents: Each a prompt, of at least one token, and its completions: token ids, and one
            flag a token that says whether it carries loss.
    """
    ids: list[int] = []
    spans: list[tuple[int, int, int, int]] = []
    predicted_at: list[np.ndarray] = []
    stands_at: list[np.ndarray] = []
    for prompt, completions in documents:
        start, length = len(ids), len(prompt)
        ids += prompt
        alone = len(completions) == 1
        spans.append((start, length + (len(completions[0][0]) if alone else 0), 0, 0))
        for completion, mask in completions:
            first = len(ids)
            ids += completion
            if not alone and completion:
                spans.append((first, len(completion), start, length))
            own = first + np.flatnonzero(mask)
            predicted_at.append(np.where(own == first, start + length, own) - 1)
            stands_at.append(own)
    table = np.array(spans, dtype=np.int64)
    own, by = np.concatenate(stands_at), np.concatenate(predicted_at)
    kept, at = np.unique(np.concatenate([by, own]), return_inverse=True)
    tokens = np.array(ids, dtype=np.int64)
    # A branch counts on from its parent's length, a document from 0.
    offset = np.repeat(table[:, 3] - table[:, 0], table[:, 1])
    at = at.reshape(2, -1)
    return Layout(
        input_ids=torch.from_numpy(tokens),
        position_ids=torch.from_numpy(np.arange(len(tokens)) + offset),
        spans=table,
        kept=torch.from_numpy(kept),
        before=torch.from_numpy(at[0]),
        after=torch.from_numpy(at[1]),
        targets=torch.from_numpy(tokens[own]),
    )
