"""The policy's log-probs: one forward pass of any transformers causal LM over a layout."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from pipeline.logprobs import selected_logprobs

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from pipeline.batch import Layout


def token_logprobs(
    model: PreTrainedModel, layout: Layout, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Return log π(token) and the entropy at every loss-carrying token, [T] each.

    Logits are only made at positions that predict such a token, so prompts cost no vocabulary
    work, and never as [B, L, V].
    """
    backbone: Any = model.base_model
    states = backbone(
        input_ids=layout.input_ids,
        attention_mask=layout.attention,
        position_ids=layout.position_ids,
        use_cache=False,
    ).last_hidden_state
    head: Any = model.get_output_embeddings()
    return selected_logprobs(
        states[layout.rows, layout.columns], head.weight, layout.targets, temperature
    )
