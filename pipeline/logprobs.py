"""Log-probs of chosen tokens, entropy and full KL, with tokens and vocabulary walked in blocks.

For hidden states h [T, H], output weights W [V, H] and temperature τ, logits z = W h / τ:

    logp_t = z_{y_t} − logsumexp(z)            ∂logp/∂z_v = 1[v = y_t] − p_v
    H_t    = −Σ_v p_v log p_v                  ∂H/∂z_v    = −p_v (log p_v + H)
    KL_t   = Σ_v p_v (log p_v − log q_v)       ∂KL/∂z_v   = p_v (log p_v − log q_v − KL)

q is a reference's distribution over the same vocabulary, without gradient. The dense path keeps
logits, log-softmax and their gradients, each [T, V]. Here the logits of a chunk of tokens over a
block of the vocabulary are made, used and forgotten; the backward pass makes them again, unless
all of them are small enough to keep.

A block b has a normaliser L_b = logsumexp_{v∈b} z_v and, for any f over the vocabulary, a mean
M_b = Σ_{v∈b} e^{z_v − L_b} f_v under its own share of the distribution. From all blocks' follow

    L = logsumexp_b L_b        E_p[f] = Σ_b e^{L_b − L} M_b
    H = L − E_p[z]             KL = L' − L + E_p[z − z']

with z' and L' of the reference.
"""

from __future__ import annotations

from itertools import product as pairs
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from pipeline.kernels import by_onednn, product, round_up

# Logits of a chunk of tokens over a block, and probabilities that the backward pass may find kept.
CHUNK_BYTES = 64 << 20
KEEP_BYTES = 128 << 20
# Rows of the output weights in a block. Many tokens meet few weights, which oneDNN then brings
# into its own layout once for all of them, and whose gradient is one product.
BLOCK_ROWS = 4096


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
        accumulate = torch.promote_types(hidden.dtype, torch.float32)
        tokens, vocabulary = hidden.shape[0], weight.shape[0]
        chunks, blocks = _walk(tokens, vocabulary, accumulate)
        logp = torch.empty(tokens, dtype=accumulate, device=hidden.device)
        entropy, kl = torch.empty_like(logp), torch.zeros_like(logp)
        normalisers, other_normalisers = torch.empty_like(logp), torch.empty_like(logp)
        keep = tokens * vocabulary * accumulate.itemsize <= KEEP_BYTES
        kept: list[Tensor] = []
        for part in chunks:
            sums, means, other_sums, gaps, probabilities = [], [], [], [], []
            chosen = torch.zeros_like(logp[part])
            for block in blocks:
                z = _logits(hidden[part], weight[block], temperature, accumulate)
                p = torch.softmax(z, -1)
                # The largest logit and its probability give the log-sum-exp of all.
                sums.append(z.amax(-1) - p.amax(-1).log_())
                place, inside = _place(targets[part], block)
                chosen = torch.where(inside, z.gather(-1, place[:, None]).squeeze(-1), chosen)
                if other_hidden is not None:
                    other = _other(other_hidden[part], other_weight, block, temperature, accumulate)
                    other_sums.append(other.logsumexp(-1))
                    gaps.append(torch.sub(z, other, out=other).mul_(p).sum(-1))
                means.append(z.mul_(p).sum(-1))
                if keep:
                    probabilities.append(p)
            normaliser, shares = _merged(sums)
            normalisers[part], logp[part] = normaliser, chosen - normaliser
            entropy[part] = normaliser - (shares * torch.stack(means)).sum(0)
            if other_hidden is not None:
                other_normaliser, _ = _merged(other_sums)
                other_normalisers[part] = other_normaliser
                gap = (shares * torch.stack(gaps)).sum(0)
                kl[part] = other_normaliser - normaliser + gap
            if keep and len(blocks) > 1:
                for p, share in zip(probabilities, shares, strict=True):
                    p.mul_(share[:, None])
            kept += probabilities
        ctx.save_for_backward(
            hidden,
            weight,
            targets,
            normalisers,
            entropy,
            kl,
            other_hidden,
            other_weight,
            other_normalisers,
            *kept,
        )
        ctx.temperature = temperature
        ctx.set_materialize_grads(False)
        return logp, entropy, kl

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, by_logp: Tensor | None, by_entropy: Tensor | None, by_kl: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, normalisers, entropy, kl, *others = ctx.saved_tensors
        other_hidden, other_weight, other_normalisers, *kept = others
        accumulate = entropy.dtype
        chunks, blocks = _walk(hidden.shape[0], weight.shape[0], accumulate)
        # Sums over blocks stay in full precision.
        hidden_gradient = torch.zeros(hidden.shape, dtype=accumulate, device=hidden.device)
        # A frozen head (adapters, a scalar head beside it) needs no [V, H] of zeros.
        weight_gradient = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        for index, (part, block) in enumerate(pairs(chunks, blocks)):
            if kept:
                p = kept[index]
            else:
                z = _logits(hidden[part], weight[block], ctx.temperature, accumulate)
                p = z.sub_(normalisers[part, None]).exp_()
            if by_logp is None:
                gradient = torch.zeros_like(p)
            else:
                scale = by_logp[part]
                # In place where nobody reads p again: a block then takes its size once.
                again = kept or by_entropy is not None or by_kl is not None
                gradient = p * -scale[:, None] if again else p.mul_(-scale[:, None])
                place, inside = _place(targets[part], block)
                of_chosen = torch.where(inside, scale, 0.0)
                gradient.scatter_add_(-1, place[:, None], of_chosen[:, None])
            if by_entropy is not None:
                plogp = torch.xlogy(p, p) + p * entropy[part, None]
                gradient -= by_entropy[part, None] * plogp
            if by_kl is not None and other_hidden is not None:
                log_q = _other(other_hidden[part], other_weight, block, ctx.temperature, accumulate)
                log_q -= other_normalisers[part, None]
                gap = torch.xlogy(p, p) - p * (log_q + kl[part, None])
                gradient += by_kl[part, None] * gap
            if ctx.temperature != 1.0:
                gradient /= ctx.temperature
            gradient = gradient.to(weight.dtype)
            hidden_gradient[part] += product(gradient, weight[block].t())
            if weight_gradient is not None:
                weight_gradient[block] += product(gradient.t(), hidden[part].t())
        return hidden_gradient.to(hidden.dtype), weight_gradient, None, None, None, None


def _walk(tokens: int, vocabulary: int, dtype: torch.dtype) -> tuple[list[slice], list[slice]]:
    """Return chunks of tokens and blocks of the vocabulary, in the order of both passes."""
    rows = min(vocabulary, BLOCK_ROWS)
    step = max(1, CHUNK_BYTES // (rows * dtype.itemsize))
    chunks = [slice(start, min(start + step, tokens)) for start in range(0, tokens, step)]
    blocks = [slice(start, min(start + rows, vocabulary)) for start in range(0, vocabulary, rows)]
    return chunks, blocks


def _merged(sums: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Return L [T] and the blocks' probabilities e^{L_b − L} [blocks, T]."""
    of_blocks = torch.stack(sums)
    whole = of_blocks.logsumexp(0)
    return whole, of_blocks.sub_(whole).exp_()


def _place(targets: Tensor, block: slice) -> tuple[Tensor, Tensor]:
    """Return the targets' places in a block, and whether they are there at all."""
    place, last = targets - block.start, block.stop - block.start - 1
    return place.clamp(0, last), (place >= 0) & (place <= last)


def _logits(hidden: Tensor, weight: Tensor, temperature: float, dtype: torch.dtype) -> Tensor:
    logits = product(hidden, weight).to(dtype)
    return logits if temperature == 1.0 else logits.div_(temperature)


def _other(
    hidden: Tensor, weight: Tensor | None, block: slice, temperature: float, dtype: torch.dtype
) -> Tensor:
    if weight is None:
        raise ValueError("a reference has hidden states and output weights")
    return _logits(hidden, weight[block], temperature, dtype)


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
    within = ((targets >= 0) & (targets < len(weight))).all()
    torch.ops.aten._assert_async.msg(
        within, f"targets are below {len(weight)}, the rows of the output weights"
    )
    if by_onednn(hidden, weight[:BLOCK_ROWS]):
        more = round_up(tokens) - tokens
        hidden, targets = pad(hidden, (0, 0, 0, more)), pad(targets, (0, more))
        if other[0] is not None:
            other = pad(other[0], (0, 0, 0, more)), other[1]
    found = _Selected.apply(hidden, weight, targets, temperature, *other)
    return Selected(*(values[:tokens] for values in found))  # type: ignore[union-attr]
