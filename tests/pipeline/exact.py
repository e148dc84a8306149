"""The distribution that an engine should draw from, worked out slowly and in float64."""

from __future__ import annotations

from typing import Any

import torch

from pipeline.engines import Sampling


def exact_distribution(model: Any, token_ids: list[int], sampling: Sampling) -> dict[int, float]:
    """Return the next token's probabilities, truncated the plain way, token by token."""
    with torch.no_grad():
        logits = model(torch.tensor([token_ids])).logits[0, -1].double()
    if sampling.repetition_penalty != 1.0:
        for token in set(token_ids):
            value = logits[token]
            penalty = sampling.repetition_penalty
            logits[token] = value / penalty if value > 0 else value * penalty
    p = torch.softmax(logits / sampling.temperature, dim=-1).tolist()
    order = sorted(range(len(p)), key=lambda token: -p[token])
    order = [token for token in order if p[token] >= sampling.min_p * p[order[0]]]
    order = order[: sampling.top_k or None]
    whole, before, kept = sum(p[token] for token in order), 0.0, []
    for token in order:
        if before >= sampling.top_p * whole:
            break
        kept.append(token)
        before += p[token]
    return {token: p[token] / before for token in kept}
