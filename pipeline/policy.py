"""The policy's log-probs: one forward pass of any transformers causal LM over a layout."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from data_prep.errors import UserError
from pipeline.logprobs import selected_logprobs

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from pipeline.batch import Layout


def token_logprobs(
    model: PreTrainedModel, layout: Layout, temperature: float = 1.0, autocast: bool = False
) -> tuple[Tensor, Tensor]:
    """Return log π(token) and the entropy at every loss-carrying token, [T] each.

    Logits are only made at positions that predict such a token, so prompts cost no vocabulary
    work, and never as [B, L, V].

    Args:
        model: Any causal LM whose logits are its last hidden states times its output embedding.
        layout: What to run.
        temperature: Divides the logits.
        autocast: Whether matrix products run in bfloat16; sums stay in float32.
    """
    backbone: Any = model.base_model
    with torch.autocast(layout.input_ids.device.type, torch.bfloat16, enabled=autocast):
        states = backbone(
            input_ids=layout.input_ids,
            attention_mask=layout.attention,
            position_ids=layout.position_ids,
            use_cache=False,
        ).last_hidden_state[layout.rows, layout.columns]
    head: Any = model.get_output_embeddings()
    dtype = torch.bfloat16 if autocast else states.dtype
    return selected_logprobs(states.to(dtype), head.weight.to(dtype), layout.targets, temperature)


def check_head(model: PreTrainedModel) -> None:
    """Refuse a model whose logits are more than hidden states times output embedding.

    Raises:
        UserError: The model caps or scales its logits, or its head has a bias; log-probs made
            here would differ from the model's own.
    """
    for key, plain in (("final_logit_softcapping", None), ("logit_scale", 1.0)):
        value = getattr(model.config, key, plain)
        if value not in (plain, None):
            raise UserError(
                "model",
                f"{key} = {value}",
                "logits that are a plain product",
                "train another architecture",
            )
    head: Any = model.get_output_embeddings()
    if getattr(head, "bias", None) is not None:
        raise UserError(
            "model",
            "an output layer with a bias",
            "logits that are a plain product",
            "train another architecture",
        )
