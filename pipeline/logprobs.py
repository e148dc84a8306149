"""Log-probs of chosen tokens, with the vocabulary axis walked in chunks.

For hidden states h [T, H], output weights W [V, H] and temperature τ:

    logp_t = h_t·W[y_t]/τ − logsumexp_v(h_t·W_v/τ)
    ∂logp_t/∂logits_v = (1[v = y_t] − p_v)/τ

The dense path keeps logits, log-softmax and their gradients, each [T, V]. Here a chunk of
tokens is turned into logits, used and forgotten; the backward pass makes them again, unless all
of them are small enough to keep.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Logits of one chunk, and probabilities that the backward pass may find kept.
CHUNK_BYTES = 64 << 20
KEEP_BYTES = 128 << 20


class _Selected(torch.autograd.Function):
    """Selected log-probs and entropies; differentiable in hidden states and weights."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor]:
        tokens, vocabulary = hidden.shape[0], weight.shape[0]
        accumulate = torch.promote_types(hidden.dtype, torch.float32)
        logp = torch.empty(tokens, dtype=accumulate, device=hidden.device)
        entropy = torch.empty_like(logp)
        chunk = _chunk_size(vocabulary, accumulate)
        kept = tokens * vocabulary * accumulate.itemsize <= KEEP_BYTES
        probabilities = []
        for start in range(0, tokens, chunk):
            part = slice(start, start + chunk)
            logits = _logits(hidden[part], weight, temperature, accumulate)
            normaliser = torch.logsumexp(logits, dim=-1, keepdim=True)
            logp[part] = logits.gather(-1, targets[part, None]).squeeze(-1) - normaliser[:, 0]
            p = torch.exp(logits - normaliser)
            entropy[part] = normaliser[:, 0] - (p * logits).sum(-1)
            if kept:
                probabilities.append(p)
        ctx.save_for_backward(hidden, weight, targets, *probabilities)
        ctx.temperature, ctx.chunk = temperature, chunk
        ctx.mark_non_differentiable(entropy)
        return logp, entropy

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor, Tensor, None, None]:  # type: ignore[override]
        hidden, weight, targets, *probabilities = ctx.saved_tensors
        hidden_gradient = torch.empty_like(hidden)
        weight_gradient = torch.zeros_like(weight)
        for index, start in enumerate(range(0, hidden.shape[0], ctx.chunk)):
            part = slice(start, start + ctx.chunk)
            if probabilities:
                p = probabilities[index]
            else:
                logits = _logits(hidden[part], weight, ctx.temperature, gradient.dtype)
                p = torch.softmax(logits, dim=-1)
            scale = gradient[part, None] / ctx.temperature
            logits_gradient = p * -scale
            logits_gradient.scatter_add_(-1, targets[part, None], scale)
            logits_gradient = logits_gradient.to(weight.dtype)
            hidden_gradient[part] = logits_gradient @ weight
            weight_gradient.addmm_(logits_gradient.T, hidden[part])
        return hidden_gradient, weight_gradient, None, None


def _chunk_size(vocabulary: int, dtype: torch.dtype) -> int:
    return max(1, CHUNK_BYTES // (vocabulary * dtype.itemsize))


def _logits(hidden: Tensor, weight: Tensor, temperature: float, dtype: torch.dtype) -> Tensor:
    logits = (hidden @ weight.T).to(dtype)
    return logits if temperature == 1.0 else logits / temperature


def selected_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Return log π(y_t) and the entropy of the distribution, for each token.

    Args:
        hidden: [T, H], the states that predict the targets.
        weight: [V, H], the output embedding.
        targets: [T], int64.
        temperature: Divides the logits, as in the sampler; > 0.

    Returns:
        logp [T], differentiable in `hidden` and `weight`; entropy [T] in nats, without
        gradient. Both in float32, or float64 for float64 input.
    """
    return _Selected.apply(hidden, weight, targets, temperature)  # type: ignore[return-value]
