"""The normaliser Z, over a whole optimizer step.

Since weights are computed before a step is split, the gradient does not depend on micro-batches,
accumulation or padding. Sequences without loss-carrying tokens (masked, unscorable) are not in
the step at all, so they are in no denominator.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from pipeline.batch import Tokens

Normaliser = Literal["sequence", "token", "group_token", "constant", "trajectory"]


def token_weights(tokens: Tokens, kind: Normaliser, max_tokens: int) -> Tensor:
    """Return 1/Z for every token, [T].

    | kind        | weight of token t of sequence i             |
    |-------------|---------------------------------------------|
    | sequence    | 1 / (N·|o_i|)                               |
    | token       | 1 / Σ_j |o_j|                               |
    | group_token | 1 / (N_groups · Σ_{j in the group of i} |o_j|) |
    | constant    | 1 / (N·L_max)                               |
    | trajectory  | 1 / N: sums over a completion, of tokens or of segments |

    Args:
        tokens: The step's flat view.
        kind: Which denominator.
        max_tokens: L_max of "constant": the longest completion that sampling allows.
    """
    lengths = tokens.lengths
    count = len(lengths)
    if kind == "sequence":
        per_sequence = 1.0 / (count * lengths)
    elif kind == "token":
        per_sequence = torch.full_like(lengths, 1.0) / lengths.sum()
    elif kind == "group_token":
        groups = int(tokens.group.max()) + 1
        in_group = torch.zeros(groups, dtype=lengths.dtype).index_add(0, tokens.group, lengths)
        per_sequence = 1.0 / (groups * in_group[tokens.group])
    elif kind == "trajectory":
        per_sequence = torch.full_like(lengths, 1.0 / count)
    else:
        per_sequence = torch.full_like(lengths, 1.0 / (count * max_tokens))
    return per_sequence[tokens.sequence]
