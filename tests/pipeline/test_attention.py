"""Attention over spans beside one dense softmax with a mask, and what the plan lays out."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pipeline import attention
from pipeline.attention import attend, plan_of

# A document alone, a prompt of four with branches of 3, 5 and 1, one of two with branches of 4
# and 4, and a document of one token: first token, length, parent's first token, its length.
SPANS = np.array(
    [
        [0, 6, 0, 0],
        [6, 4, 0, 0],
        [10, 3, 6, 4],
        [13, 5, 6, 4],
        [18, 1, 6, 4],
        [19, 2, 0, 0],
        [21, 4, 19, 2],
        [25, 4, 19, 2],
        [29, 1, 0, 0],
    ]
)
TOKENS = 30
PLAIN = np.array([[0, 7, 0, 0], [7, 5, 0, 0], [12, 2, 0, 0], [14, 9, 0, 0]])


def visible(spans: np.ndarray, tokens: int) -> torch.Tensor:
    """[T, T], written pair by pair."""
    seen = torch.zeros(tokens, tokens, dtype=torch.bool)
    for start, length, parent, parent_length in spans:
        for query in range(start, start + length):
            for key in range(start, query + 1):
                seen[query, key] = True
            for key in range(parent, parent + parent_length):
                seen[query, key] = True
    return seen


def dense(q, k, v, seen):
    repeats = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
    scores = torch.einsum("ihd,jhd->hij", q, k).masked_fill(~seen, -torch.inf)
    return torch.einsum("hij,jhd->ihd", torch.softmax(scores, -1), v).flatten(1)


@pytest.mark.parametrize("chunk", [256, 3, 1])
@pytest.mark.parametrize(("heads", "key_heads"), [(2, 2), (4, 2), (3, 1)])
@pytest.mark.parametrize("spans", [SPANS, PLAIN], ids=["branches", "plain"])
def test_value_and_gradient_are_those_of_a_mask(monkeypatch, spans, heads, key_heads, chunk):
    monkeypatch.setattr(attention, "CHUNK", chunk)
    tokens = int(spans[-1, 0] + spans[-1, 1])
    generator = torch.Generator().manual_seed(4)

    def made(count, size=4):
        return torch.randn(tokens, count, size, dtype=torch.float64, generator=generator)

    leaves = [made(heads), made(key_heads), made(key_heads)]
    upstream = made(heads).flatten(1)
    found = []
    for act in (
        lambda *x: attend(*x, plan_of(spans, tokens, heads, key_heads)),
        lambda *x: dense(*x, visible(spans, tokens)),
    ):
        taken = [leaf.clone().requires_grad_() for leaf in leaves]
        value = act(*taken)
        value.backward(upstream)
        found.append([value.detach(), *(t.grad for t in taken)])
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)


def test_every_token_has_one_place_and_padding_has_none():
    plan = plan_of(SPANS, TOKENS, 2, 1)
    assert sorted(plan.place.tolist() + plan.padding.tolist()) == list(range(len(plan.asked)))
    assert plan.asked[plan.place].tolist() == list(range(2 * TOKENS))
    assert plan.own_place is None
    plain = plan_of(PLAIN, 23, 2, 1)
    assert plain.own_place is not None
    assert plain.seen[plain.own_place].tolist() == list(range(23))


def test_spans_of_unlike_lengths_are_apart():
    plan = plan_of(PLAIN, 23, 1, 1)
    shapes = [(block.spans, block.length) for block in plan.blocks]
    assert shapes == [(2, 9), (1, 5), (1, 2)]
    # Scores are made for 2·9² + 5² + 2² pairs, where one row of all tokens would have 23².
    assert sum(n * length**2 for n, length in shapes) == 191
