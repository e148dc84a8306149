"""Log-probs of chosen tokens, entropy and full KL, with the vocabulary axis walked in chunks.

For hidden states h [T, H], output weights W [V, H] and temperature τ, logits z = W h / τ:

    logp_t = z_{y_t} − logsumexp(z)            ∂logp/∂z_v = 1[v = y_t] − p_v
    H_t    = −Σ_v p_v log p_v                  ∂H/∂z_v    = −p_v (log p_v + H)
    KL_t   = Σ_v p_v (log p_v − log q_v)       ∂KL/∂z_v   = p_v (log p_v − log q_v − KL)

q is a reference's distribution over the same vocabulary, without gradient. The dense path keeps
logits, log-softmax and their gradients, each [T, V]. Here a chunk of tokens is turned into
logits, used and forgotten; the backward pass makes them again, unless all of them are small
enough to keep.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from pipeline.kernels import add_product, by_onednn, product, round_up

# Logits of one chunk, and probabilities that the backward pass may find kept.
CHUNK_BYTES = 64 << 20
KEEP_BYTES = 128 << 20


class Selected(NamedTuple):
    """What one walk over the vocabulary gives, [T] each, in nats.

    Attributes:
        logp: log π(y_t).
        entropy: Of the distribution at each token.
        kl: KL(π‖q) over the whole vocabulary; zeros where there is no reference.
    """

    logp: Tensor
    entropy: Tensor
    kl: Tensor


class _Selected(torch.autograd.Function):
    """All three, differentiable in hidden states and weights."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        temperature: float,
        other_hidden: Tensor | None,
        other_weight: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        tokens, vocabulary = hidden.shape[0], weight.shape[0]
        accumulate = torch.promote_types(hidden.dtype, torch.float32)
        logp = torch.empty(tokens, dtype=accumulate, device=hidden.device)
        entropy, kl = torch.empty_like(logp), torch.zeros_like(logp)
        normalisers = torch.empty_like(logp)
        chunk = _chunk_size(vocabulary, accumulate)
        kept = tokens * vocabulary * accumulate.itemsize <= KEEP_BYTES
        probabilities = []
        for start in range(0, tokens, chunk):
            part = slice(start, start + chunk)
            logits = _logits(hidden[part], weight, temperature, accumulate)
            p = torch.softmax(logits, -1)
            # The largest logit and its probability give the log-sum-exp of all.
            normaliser = logits.amax(-1) - p.amax(-1).log_()
            normalisers[part] = normaliser
            logp[part] = logits.gather(-1, targets[part, None]).squeeze(-1) - normaliser
            entropy[part] = normaliser - logits.mul_(p).sum(-1)
            if other_hidden is not None:
                log_q = _log_softmax(other_hidden[part], other_weight, temperature, accumulate)
                kl[part] = -entropy[part] - (p * log_q).sum(-1)
            if kept:
                probabilities.append(p)
        ctx.save_for_backward(
            hidden,
            weight,
            targets,
            normalisers,
            entropy,
            kl,
            other_hidden,
            other_weight,
            *probabilities,
        )
        ctx.temperature, ctx.chunk = temperature, chunk
        ctx.set_materialize_grads(False)
        return logp, entropy, kl

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, by_logp: Tensor | None, by_entropy: Tensor | None, by_kl: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, normalisers, entropy, kl, *others = ctx.saved_tensors
        other_hidden, other_weight, *probabilities = others
        accumulate = entropy.dtype
        hidden_gradient = torch.empty_like(hidden)
        # A frozen head (adapters, a scalar head beside it) needs no [V, H] of zeros.
        weight_gradient = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        for index, start in enumerate(range(0, hidden.shape[0], ctx.chunk)):
            part = slice(start, start + ctx.chunk)
            if probabilities:
                p = probabilities[index]
            else:
                logits = _logits(hidden[part], weight, ctx.temperature, accumulate)
                p = logits.sub_(normalisers[part, None]).exp_()
            if by_logp is None:
                logits_gradient = torch.zeros_like(p)
            else:
                scale = by_logp[part, None]
                # In place where nobody reads p again: a chunk then takes its size once.
                again = probabilities or by_entropy is not None or by_kl is not None
                logits_gradient = p * -scale if again else p.mul_(-scale)
                logits_gradient.scatter_add_(-1, targets[part, None], scale)
            if by_entropy is not None:
                plogp = torch.xlogy(p, p) + p * entropy[part, None]
                logits_gradient -= by_entropy[part, None] * plogp
            if by_kl is not None and other_hidden is not None:
                log_q = _log_softmax(other_hidden[part], other_weight, ctx.temperature, accumulate)
                gap = torch.xlogy(p, p) - p * (log_q + kl[part, None])
                logits_gradient += by_kl[part, None] * gap
            if ctx.temperature != 1.0:
                logits_gradient /= ctx.temperature
            logits_gradient = logits_gradient.to(weight.dtype)
            hidden_gradient[part] = product(logits_gradient, weight.t())
            if weight_gradient is not None:
                add_product(weight_gradient, logits_gradient.t(), hidden[part].t())
        return hidden_gradient, weight_gradient, None, None, None, None


def _chunk_size(vocabulary: int, dtype: torch.dtype) -> int:
    return max(1, CHUNK_BYTES // (vocabulary * dtype.itemsize))


def _logits(hidden: Tensor, weight: Tensor, temperature: float, dtype: torch.dtype) -> Tensor:
    logits = product(hidden, weight).to(dtype)
    return logits if temperature == 1.0 else logits.div_(temperature)


def _log_softmax(
    hidden: Tensor, weight: Tensor | None, temperature: float, dtype: torch.dtype
) -> Tensor:
    if weight is None:
        raise ValueError("a reference has hidden states and output weights")
    return torch.log_softmax(_logits(hidden, weight, temperature, dtype), -1)


def selected_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: float = 1.0,
    reference: tuple[Tensor, Tensor] | None = None,
) -> Selected:
    """Return log π(y_t), the entropy and KL(π‖q) at each token.

    Args:
        hidden: [T, H], the states that predict the targets.
        weight: [V, H], the output embedding.
        targets: [T], int64.
        temperature: Divides the logits, as in the sampler; > 0.
        reference: q's hidden states [T, H'] and output embedding [V, H'], taken without
            gradient.

    Returns:
        Three [T], differentiable in `hidden` and `weight`, in float32, or float64 for float64
        input.
    """
    other = (None, None) if reference is None else (reference[0].detach(), reference[1].detach())
    tokens = len(targets)
    if by_onednn(hidden, weight):
        more = round_up(tokens) - tokens
        hidden, targets = pad(hidden, (0, 0, 0, more)), pad(targets, (0, more))
        if other[0] is not None:
            other = pad(other[0], (0, 0, 0, more)), other[1]
    found = _Selected.apply(hidden, weight, targets, temperature, *other)
    return Selected(*(values[:tokens] for values in found))  # type: ignore[union-attr]
