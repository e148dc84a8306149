"""The policy's log-probs: one forward pass of any transformers causal LM over a layout."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from data_prep.errors import UserError
from pipeline.backbone import final_states, serves
from pipeline.layout import Reading
from pipeline.logprobs import Selected, selected_logprobs
from pipeline.split import whole

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from pipeline.batch import Layout


class States(NamedTuple):
    """Hidden states at the N loss-carrying tokens.

    Attributes:
        all: [R, H], each state that somebody reads, once.
        layout: Says which of them stands where.
    """

    all: Tensor
    layout: Layout

    @property
    def before(self) -> Tensor:
        """[N, H], of the token that predicts each of them: the state s_t in which it is chosen."""
        return self.all.index_select(0, self.layout.before)

    @property
    def after(self) -> Tensor:
        """[N, H], of the token itself: the state that it leads to."""
        return self.all.index_select(0, self.layout.after)


Found = TypeVar("Found")


def in_one_pass(model: Any, function: Callable[[], Found]) -> Found:
    """Return what a function computes with a model's own parameters, as one forward pass of it.

    Nothing but a call, unless the model is split over processes: then its parameters are gathered
    for the call and for the backward pass through what it returns.

    Args:
        model: A causal LM.
        function: Returns tensors, in tuples or alone.
    """
    within = getattr(model, "within", None)
    return function() if within is None else within(function)


def hidden_states(backbone: Any, layout: Layout, autocast: bool = False) -> States:
    """Run a transformers backbone over a layout.

    Args:
        backbone: A model without its head.
        layout: What to run.
        autocast: Whether matrix products run in bfloat16; sums stay in float32.
    """
    if serves(backbone):
        return States(final_states(backbone, layout, autocast), layout)
    rows = layout.rows(reading_of(backbone, layout.longest))
    mask = rows.attention
    if mask is not None and backbone.config._attn_implementation == "eager":
        # Which adds the mask to the scores.
        kind = next(backbone.parameters()).dtype
        mask = torch.zeros_like(mask, dtype=kind).masked_fill_(~mask, torch.finfo(kind).min)
    given = {"attention_mask": mask, "position_ids": rows.position_ids}
    # Each weight is read once: a cache would hold copies of all of them to the end of the pass.
    device = layout.input_ids.device.type
    with torch.autocast(device, torch.bfloat16, enabled=autocast, cache_enabled=False):
        found = backbone(
            input_ids=rows.input_ids,
            use_cache=False,
            **{key: value for key, value in given.items() if value is not None},
        ).last_hidden_state
    place = rows.place.index_select(0, layout.kept)
    return States(found.flatten(0, 1).index_select(0, place), layout)


def reading_of(backbone: Any, longest: int) -> Reading:
    """Return how a transformers backbone is to be given documents.

    A mask of ours reaches all layers alike, and says only who sees whom. It is right for layers
    that look at everything before them, and for windows that hold the whole of each text. Shorter
    windows are masked by transformers itself, which tells packed texts apart by their positions.
    Anything else (chunks, states that are carried on, positions that the model counts for itself,
    kernels that take no such mask) gets a text a row; a prompt is then computed with each of its
    completions, and rows are padded to the longest.

    Args:
        backbone: A model without its head.
        longest: Tokens of the longest prompt with a completion.
    """
    config = backbone.config.get_text_config()
    if (
        getattr(backbone, "_is_stateful", False)
        or "position_ids" not in inspect.signature(backbone.forward).parameters
        or config._attn_implementation not in ("sdpa", "eager")
        or any(getattr(config, key, None) for key in ("alibi", "attention_types"))
    ):
        return "alone"
    window = getattr(config, "sliding_window", None)
    kinds = set(getattr(config, "layer_types", None) or ())
    if not kinds:
        is_used = window is not None and getattr(config, "use_sliding_window", True)
        kinds = {"sliding_attention" if is_used else "full_attention"}
    if not kinds <= {"full_attention", "sliding_attention"}:
        return "alone"
    if "sliding_attention" not in kinds or (window is not None and longest <= window):
        return "shared"
    own_code = not type(backbone).__module__.startswith("transformers.models.")
    return "alone" if own_code else "packed"


def token_logprobs(
    model: PreTrainedModel,
    states: States,
    targets: Tensor,
    temperature: float = 1.0,
    autocast: bool = False,
    reference: tuple[PreTrainedModel, States] | None = None,
) -> Selected:
    """Return log π(token), the entropy and KL(π‖π_ref) at every loss-carrying token, [T] each.

    Logits are only made at positions that predict such a token, so prompts cost no vocabulary
    work, and never as [B, L, V].

    Args:
        model: Any causal LM whose logits are its last hidden states times its output embedding.
        states: Of that model's backbone.
        targets: [T], the tokens.
        temperature: Divides the logits.
        autocast: Whether matrix products run in bfloat16.
        reference: π_ref and its states, for the KL over the whole vocabulary.
    """
    head: Any = model.get_output_embeddings()
    before = states.before
    dtype = torch.bfloat16 if autocast else before.dtype
    other = None
    if reference is not None:
        other_head: Any = reference[0].get_output_embeddings()
        other = (reference[1].before.to(dtype), whole(other_head.weight).to(dtype))
    return selected_logprobs(before.to(dtype), head.weight.to(dtype), targets, temperature, other)


def logprobs_of(
    model: Any, layout: Layout, temperature: float = 1.0, autocast: bool = False
) -> Selected:
    """Return `token_logprobs` of a layout, running the model's own backbone first."""

    def compute() -> Selected:
        states = hidden_states(model.base_model, layout, autocast)
        return token_logprobs(model, states, layout.targets, temperature, autocast)

    return in_one_pass(model, compute)


def check_head(model: PreTrainedModel) -> None:
    """Refuse a model whose logits are more than hidden states times output embedding.

    Raises:
        UserError: The model caps or scales its logits, or its head has a bias; log-probs made
            here would differ from the model's own. Or it does not say which part of it makes the
            hidden states.
    """
    if model.base_model is model:
        raise UserError(
            "model",
            f"a {type(model).__name__}, which does not name its backbone (base_model_prefix)",
            "a causal LM whose `base_model` gives hidden states",
            "train another architecture",
        )
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
