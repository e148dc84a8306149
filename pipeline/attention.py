"""Attention of packed documents on a CPU, without the scores that a mask would throw away.

A *span* is a run of tokens that see each other causally and, where it has a parent, every token
of that: a whole document is one span, a prompt with several completions is a span and its
branches. Spans of like length are laid side by side, [S, heads, L, D], and go through two batched
products with a softmax in between. A query's cost is its own span and its parent, whatever else
the pass holds; PyTorch's fused kernel with a mask walks over all of it and is slower besides at
the lengths of solutions.

Long spans take their queries in chunks, each with the keys up to its own end, and make the
probabilities again on the way back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

# Queries of one product; spans that are longer are cut.
CHUNK = 256
# A span this much shorter than the longest of its block begins another.
ALIKE = 0.7


@dataclass(slots=True)
class _Block:
    """S spans of at most L tokens with parents of at most P.

    Attributes:
        spans: S.
        length: L.
        parent: P, 0 without parents.
        asked: Where its queries stand among all, S · heads · L rows.
        seen: Where its keys stand among all, S · key heads · (P + L) rows.
        absent: [S, 1, 1, P], −∞ at the columns that shorter parents leave empty; None without.
        later: [R · L, P + L], −∞ at the keys after each query, R query heads to a key head; None
            for spans that are cut, whose chunks have their own.
    """

    spans: int
    length: int
    parent: int
    asked: slice
    seen: slice
    absent: Tensor | None
    later: Tensor | None


@dataclass(slots=True)
class Plan:
    """How the T tokens of a pass are laid side by side for so many heads.

    Attributes:
        tokens: T.
        heads: Of the queries.
        key_heads: Of keys and values.
        blocks: What is multiplied together.
        asked: Rows of queries [T · heads, D], span by span; row 0 where there is padding.
        padding: Where that is.
        place: [T · heads], where each row stands in `asked`.
        seen: Rows of keys [T · key heads, D], span by span, parents first.
        own_place: [T · key heads], where each row stands in `seen` as its own span's; None where
            there are parents, whose rows are there more than once.
    """

    tokens: int
    heads: int
    key_heads: int
    blocks: list[_Block]
    asked: Tensor
    padding: Tensor
    place: Tensor
    seen: Tensor
    own_place: Tensor | None


def plan_of(spans: np.ndarray, tokens: int, heads: int, key_heads: int) -> Plan:
    """Return how the spans of a pass are laid side by side.

    Args:
        spans: [S, 4] int64: first token, length, first token of the parent, its length or 0;
            every token is in one.
        tokens: T.
        heads: Of the queries.
        key_heads: Of keys and values; divides `heads`.
    """
    order = np.lexsort((-spans[:, 1], spans[:, 3] > 0))
    blocks: list[_Block] = []
    asked, padding, seen = [], [], []
    place = np.empty(tokens * heads, dtype=np.int64)
    own_place = np.empty(tokens * key_heads, dtype=np.int64)
    rows = columns = 0
    for chosen in _alike(spans[order]):
        start, length, parent_start, parent_length = chosen.T
        count, longest, parent = len(chosen), int(length.max()), int(parent_length.max())
        own, missing = _range(start, length, longest)
        query = _by_head(own, heads)
        numbers = rows + np.arange(query.size).reshape(query.shape)
        gone = np.broadcast_to(missing[:, None], query.shape)
        place[query[~gone]] = numbers[~gone]
        asked.append(query.ravel())
        padding.append(numbers[gone])
        shared, absent = _range(parent_start, parent_length, parent)
        key = _by_head(np.concatenate([shared, own], 1), key_heads)
        key_numbers = columns + np.arange(key.size).reshape(key.shape)
        gone = np.broadcast_to(missing[:, None], (count, key_heads, longest))
        own_place[key[..., parent:][~gone]] = key_numbers[..., parent:][~gone]
        seen.append(key.ravel())
        hidden = None
        if absent.any():
            hidden = torch.zeros(absent.shape).masked_fill_(torch.from_numpy(absent), -torch.inf)
            hidden = hidden[:, None, None]
        blocks.append(
            _Block(
                count,
                longest,
                parent,
                slice(rows, rows + query.size),
                slice(columns, columns + key.size),
                hidden,
                _later(longest, parent + longest, heads // key_heads) if longest <= CHUNK else None,
            )
        )
        rows, columns = rows + query.size, columns + key.size
    return Plan(
        tokens,
        heads,
        key_heads,
        blocks,
        torch.from_numpy(np.concatenate(asked)),
        torch.from_numpy(np.concatenate(padding)),
        torch.from_numpy(place),
        torch.from_numpy(np.concatenate(seen)),
        None if any(block.parent for block in blocks) else torch.from_numpy(own_place),
    )


def _alike(spans: np.ndarray) -> list[np.ndarray]:
    """Cut spans, longest first and those without parents before the others, into blocks."""
    cuts, longest = [0], int(spans[0, 1])
    for i in range(1, len(spans)):
        branches = spans[i, 3] > 0 and not spans[i - 1, 3] > 0
        if branches or spans[i, 1] < ALIKE * longest:
            cuts.append(i)
            longest = int(spans[i, 1])
    return np.split(spans, cuts[1:])


def _range(start: np.ndarray, length: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Return [S, width] tokens, 0 beyond each length, and where that is."""
    steps = np.arange(width)[None]
    missing = steps >= length[:, None]
    return np.where(missing, 0, start[:, None] + steps), missing


def _later(queries: int, columns: int, repeats: int) -> Tensor:
    """Return [repeats · queries, columns], −∞ after the last columns' diagonal."""
    mask = torch.full((queries, columns), -torch.inf).triu_(columns - queries + 1)
    return mask.repeat(repeats, 1)


def _by_head(tokens: np.ndarray, heads: int) -> np.ndarray:
    """Return [S, heads, L] rows of tokens [S, L]."""
    return tokens[:, None] * heads + np.arange(heads)[None, :, None]


class _Attend(Function):
    """O = softmax(Q Kᵀ) V, block by block."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, plan: Plan) -> Tensor:
        tokens, size = len(q), q.shape[-1]
        asked = q.reshape(-1, size).index_select(0, plan.asked)
        keys = k.reshape(-1, size).index_select(0, plan.seen)
        values = v.reshape(-1, size).index_select(0, plan.seen)
        found = torch.empty_like(asked)
        kept: list[Tensor | None] = []
        for block in plan.blocks:
            parts = _Parts(plan, block, asked, keys, values)
            out = parts.queries(found)
            if block.length <= CHUNK:
                p = parts.probabilities(slice(0, block.length), parts.k.shape[1])
                torch.bmm(p, parts.v, out=out.flatten(1, 2))
                kept.append(p)
                continue
            kept.append(None)
            for start in range(0, block.length, CHUNK):
                rows, columns = parts.chunk(start)
                p = parts.probabilities(rows, columns)
                out[:, :, rows] = torch.bmm(p, parts.v[:, :columns]).view(out[:, :, rows].shape)
        ctx.save_for_backward(asked, keys, values, *kept)
        ctx.plan = plan
        return found.index_select(0, plan.place).view(tokens, -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        plan: Plan = ctx.plan
        asked, keys, values, *kept = ctx.saved_tensors
        size = asked.shape[-1]
        g = gradient.reshape(-1, size).index_select(0, plan.asked)
        g.index_fill_(0, plan.padding, 0.0)
        by_q, by_k, by_v = (torch.empty_like(x) for x in (asked, keys, values))
        for block, saved in zip(plan.blocks, kept, strict=True):
            parts = _Parts(plan, block, asked, keys, values)
            upstream, out = parts.queries(g), parts.queries(by_q)
            to_k, to_v = parts.columns(by_k), parts.columns(by_v)
            if saved is not None:
                above = upstream.flatten(1, 2)
                torch.bmm(saved.transpose(1, 2), above, out=to_v)
                slope = _slope(above, parts.v, saved)
                torch.bmm(slope, parts.k, out=out.flatten(1, 2))
                torch.bmm(slope.transpose(1, 2), parts.q.flatten(1, 2), out=to_k)
                continue
            to_k.zero_()
            to_v.zero_()
            for start in range(0, block.length, CHUNK):
                rows, columns = parts.chunk(start)
                p = parts.probabilities(rows, columns)
                above = upstream[:, :, rows].reshape(len(p), -1, size)
                to_v[:, :columns].baddbmm_(p.transpose(1, 2), above)
                slope = _slope(above, parts.v[:, :columns], p)
                out[:, :, rows] = torch.bmm(slope, parts.k[:, :columns]).view(out[:, :, rows].shape)
                to_k[:, :columns].baddbmm_(slope.transpose(1, 2), parts.rows(rows))
        tokens = len(gradient)
        return (
            by_q.index_select(0, plan.place).view(tokens, plan.heads, size),
            _gathered(by_k, plan, tokens),
            _gathered(by_v, plan, tokens),
            None,
        )


def _slope(upstream: Tensor, values: Tensor, p: Tensor) -> Tensor:
    """Return the gradient of the scores from that of what was gathered."""
    by_p = torch.bmm(upstream, values.transpose(1, 2))
    return torch.ops.aten._softmax_backward_data(by_p, p, -1, p.dtype)


class _Parts:
    """A block's queries [S · key heads, R, L, D], keys and values [S · key heads, P + L, D]."""

    __slots__ = ("block", "k", "plan", "q", "v")

    def __init__(self, plan: Plan, block: _Block, q: Tensor, k: Tensor, v: Tensor) -> None:
        self.plan, self.block = plan, block
        self.q, self.k, self.v = self.queries(q), self.columns(k), self.columns(v)

    def queries(self, flat: Tensor) -> Tensor:
        """Return the block's share of what lies as the queries do."""
        block, repeats = self.block, self.plan.heads // self.plan.key_heads
        shape = block.spans * self.plan.key_heads, repeats, block.length, flat.shape[-1]
        return flat[block.asked].view(shape)

    def columns(self, flat: Tensor) -> Tensor:
        """Return the block's share of what lies as the keys do."""
        block = self.block
        shape = block.spans * self.plan.key_heads, block.parent + block.length, flat.shape[-1]
        return flat[block.seen].view(shape)

    def chunk(self, start: int) -> tuple[slice, int]:
        """Return the queries of a chunk, and how many keys the last of them reaches."""
        end = min(start + CHUNK, self.block.length)
        return slice(start, end), self.block.parent + end

    def rows(self, rows: slice) -> Tensor:
        """Return queries of a chunk, [S · key heads, R · rows, D]."""
        return self.q[:, :, rows].reshape(len(self.q), -1, self.q.shape[-1])

    def probabilities(self, rows: slice, columns: int) -> Tensor:
        """Return [S · key heads, R · rows, columns]."""
        block, count = self.block, rows.stop - rows.start
        q, k = self.rows(rows), self.k[:, :columns]
        later = block.later
        if later is None:
            later = _later(count, columns, q.shape[1] // count)
        scores = torch.baddbmm(later.to(q.dtype), q, k.transpose(1, 2))
        if block.absent is not None:
            scores.view(block.spans, -1, q.shape[1], columns)[..., : block.parent] += block.absent
        return torch.softmax(scores, -1)


def _gathered(gradient: Tensor, plan: Plan, tokens: int) -> Tensor:
    """Return the gradient of keys or values [T, key heads, D] from that of the rows laid out."""
    size = gradient.shape[-1]
    if plan.own_place is not None:
        found = gradient.index_select(0, plan.own_place)
    else:
        found = gradient.new_zeros(tokens * plan.key_heads, size).index_add_(0, plan.seen, gradient)
    return found.view(tokens, plan.key_heads, size)


def attend(q: Tensor, k: Tensor, v: Tensor, plan: Plan) -> Tensor:
    """Return what each token gathers from the tokens that it sees.

    Args:
        q: [T, heads, D], scaled and rotated.
        k: [T, key heads, D], rotated.
        v: [T, key heads, D].
        plan: Of the pass.

    Returns:
        [T, heads · D].
    """
    return _Attend.apply(q, k, v, plan)  # type: ignore[no-any-return]
