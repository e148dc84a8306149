"""One token a row from logits: penalty, temperature, min-p, top-k, top-p, inverse transform."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pipeline.engines import Sampling
from pipeline.engines._random import uniforms

# From this vocabulary on, sums are first made over blocks of tokens.
LARGE = 8192
BLOCK = 256


class Sampler:
    """Draws tokens; holds nothing that a draw changes.

    Args:
        sampling: How.
    """

    def __init__(self, sampling: Sampling) -> None:
        """Keep the settings."""
        self.sampling = sampling
        self.truncates = bool(sampling.top_k) or sampling.top_p < 1.0 or sampling.min_p > 0.0

    @property
    def is_plain(self) -> bool:
        """Whether tokens are drawn from the softmax as it is, or greedily."""
        return not self.truncates and not self.penalises

    @property
    def penalises(self) -> bool:
        """Whether draws need to know which tokens stand in prompt and completion."""
        return self.sampling.repetition_penalty != 1.0

    def draw(
        self, logits: Tensor, states: Tensor, counters: Tensor, seen: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Draw one token a row.

        Args:
            logits: [B, V], float32 or float64; overwritten.
            states: [B], hashed seeds.
            counters: [B], index of the token in its completion.
            seen: [B, V] of bool, tokens of prompt and completion; None without a penalty.

        Returns:
            Tokens [B], and their log-probs [B] under the distribution that was drawn from.
        """
        sampling = self.sampling
        if seen is not None:
            penalty = sampling.repetition_penalty
            changed = torch.where(logits > 0, logits / penalty, logits * penalty)
            logits = torch.where(seen, changed, logits)
        if sampling.temperature == 0.0:
            best, tokens = torch.softmax(logits, dim=-1).max(-1)
            return tokens, best.log()
        if sampling.temperature != 1.0:
            logits = logits.div_(sampling.temperature)
        p = torch.softmax(logits, dim=-1)
        if self.truncates:
            p = truncate(p, sampling)
        tokens, total = invert(p, uniforms(states, counters))
        chosen = p.gather(-1, tokens[:, None]).squeeze(-1)
        return tokens, (chosen / total.to(p.dtype)).log() if self.truncates else chosen.log()


def truncate(p: Tensor, sampling: Sampling) -> Tensor:
    """Return probabilities [B, V] with 0 where the sampling excludes; not renormalised."""
    if sampling.min_p > 0.0:
        p = p.masked_fill(p < p.amax(-1, keepdim=True) * sampling.min_p, 0.0)
    if 0 < sampling.top_k < p.shape[-1]:
        p = p.masked_fill(p < p.topk(sampling.top_k, dim=-1).values[:, -1:], 0.0)
    if sampling.top_p < 1.0:
        ordered, order = p.sort(dim=-1, descending=True)
        before = ordered.cumsum(-1, dtype=torch.float64) - ordered
        # A token stays while the mass before it is below top_p, so the first always does.
        outside = before >= sampling.top_p * ordered.sum(-1, keepdim=True, dtype=torch.float64)
        p = p.scatter(-1, order, ordered.masked_fill_(outside, 0.0))
    return p


def invert(p: Tensor, point: Tensor) -> tuple[Tensor, Tensor]:
    """Return the token at which the cumulative sum passes `point` of the whole, and the whole.

    Sums are in float64: in float32 the tail of a large vocabulary would be lost.

    Args:
        p: [B, V], not negative; need not sum to 1.
        point: [B] in [0, 1), float64.

    Returns:
        Tokens [B], whose p is never 0, and row sums [B] in float64.
    """
    batch, vocabulary = p.shape
    block = math.gcd(vocabulary, BLOCK)
    if vocabulary < LARGE or block < 32:
        cumulative = p.cumsum(-1, dtype=torch.float64)
        total = cumulative[:, -1]
        return _first_above(cumulative, point * total), total
    blocks = p.view(batch, -1, block)
    sums = blocks.sum(-1, dtype=torch.float64)
    cumulative = sums.cumsum(-1)
    total = cumulative[:, -1]
    threshold = point * total
    which = _first_above(cumulative, threshold)[:, None]
    before = (cumulative - sums).gather(1, which).squeeze(1)
    inside = blocks.gather(1, which[:, :, None].expand(-1, -1, block)).squeeze(1)
    inside = inside.cumsum(-1, dtype=torch.float64)
    return which.squeeze(1) * block + _first_above(
        inside, (threshold - before).clamp_min_(0)
    ), total


def _first_above(cumulative: Tensor, threshold: Tensor) -> Tensor:
    """Return the first index whose cumulative sum is above the threshold, [B].

    A threshold that rounds up to the whole mass is moved below it, onto the last entry that has
    any; entries without mass repeat the sum before them and are never first.
    """
    below = torch.nextafter(cumulative[:, -1], torch.zeros_like(threshold))
    threshold = torch.minimum(threshold, below)[:, None]
    first = torch.searchsorted(cumulative, threshold, right=True).squeeze(-1)
    return first.clamp_max_(cumulative.shape[-1] - 1)  # sums that are not numbers have no first
