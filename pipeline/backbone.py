"""The training pass of Llama, Qwen2 and Qwen3 decoders over packed documents, on a CPU.

It reads the parameters of the transformers model that is trained and gives the states that its
own forward pass would, but takes documents as they lie, token after token, without padding or
mask; uses the operations of `pipeline.kernels` and `pipeline.attention`; and computes the last
layer's feed-forward only where a state is asked for. Adapters stay in their layers, which are
then called as they are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.nn.modules.module import _has_any_global_hook
from torch.utils.checkpoint import checkpoint

from pipeline.attention import Plan, attend
from pipeline.kernels import gated_unit, is_plain_linear, linear, rms_norm, rotate, round_up
from pipeline.layout import Layout
from pipeline.model import exact_rms_norm

ARCHITECTURES = ("LlamaModel", "Qwen2Model", "Qwen3Model")
# Whose forward passes are known here; anybody else's do what they were put there for.
HOMES = ("torch", "transformers", "peft")


def serves(backbone: Any) -> bool:
    """Return whether `final_states` stands for a backbone's own forward pass.

    It does not on a GPU, in half precision, for other architectures, and where somebody has
    hooked into the modules' calls, replaced or compiled one, or spread their parameters over
    processes.
    """
    config = backbone.config
    kind = type(backbone)
    # A model's own code may use these names for something else.
    if kind.__name__ not in ARCHITECTURES or not kind.__module__.startswith("transformers.models."):
        return False
    if config.hidden_act != "silu":
        return False
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("partial_rotary_factor", 1.0) != 1.0 or any(
        kind != "full_attention" for kind in getattr(config, "layer_types", None) or ()
    ):
        return False
    if backbone.training and getattr(config, "attention_dropout", 0.0):
        return False
    if any(
        type(p) not in (nn.Parameter, Tensor)
        or p.device.type != "cpu"
        or p.dtype not in (torch.float32, torch.float64)
        for p in backbone.parameters()
    ):
        return False
    if _has_any_global_hook():
        return False
    # The embedding is called as it is.
    modules = [module for module in backbone.modules() if module is not backbone.embed_tokens]
    kinds = {type(module) for module in modules}
    if any(kind.forward.__module__.partition(".")[0] not in HOMES for kind in kinds):
        return False
    return all(map(_is_as_written, modules))


def _is_as_written(module: nn.Module) -> bool:
    """Return whether a call of a module is its class's own forward pass and nothing else."""
    own = module.__dict__
    if (
        own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
        or own.get("_compiled_call_impl") is not None
    ):
        return False
    forward = own.get("forward")
    return forward is None or getattr(forward, "func", None) is exact_rms_norm


def final_states(backbone: Any, layout: Layout, bfloat16: bool = False) -> Tensor:
    """Return the last hidden states, after the final norm, at `layout.kept`.

    Rows that nobody reads may follow those R: tokens and states are rounded up to numbers that
    other passes share (`kernels.round_up`), with tokens that nothing sees.

    Args:
        backbone: One that `serves` says yes to.
        layout: Of T tokens.
        bfloat16: Whether factors of the layers' products are rounded to bfloat16.
    """
    attention = backbone.layers[0].self_attn
    size = attention.head_dim
    heads = backbone.config.num_attention_heads
    plan = layout.plan(heads, backbone.config.num_key_value_heads)
    more = plan.tokens - len(layout.input_ids)
    x = backbone.embed_tokens(pad(layout.input_ids, (0, more)))
    cosines, sines = backbone.rotary_emb(x[None], pad(layout.position_ids, (0, more))[None])
    cosines, sines = cosines[0, :, None], sines[0, :, None].clone()
    sines[..., : size // 2].neg_()
    rotation = (cosines, sines, cosines * attention.scaling, sines * attention.scaling)
    read = pad(layout.kept, (0, round_up(len(layout.kept)) - len(layout.kept)))
    layers = backbone.layers[: backbone.config.num_hidden_layers]
    for index, layer in enumerate(layers):
        kept = read if index == len(layers) - 1 else None
        if backbone.training and layer.gradient_checkpointing:
            x = checkpoint(_layer, layer, x, rotation, plan, kept, bfloat16, use_reentrant=False)
        else:
            x = _layer(layer, x, rotation, plan, kept, bfloat16)
    return _norm(backbone.norm, x)


def _layer(
    layer: Any,
    x: Tensor,
    rotation: tuple[Tensor, Tensor, Tensor, Tensor],
    plan: Plan,
    kept: Tensor | None,
    bfloat16: bool,
) -> Tensor:
    """Return a decoder layer's output; with `kept`, at those tokens alone."""
    attention, feed_forward = layer.self_attn, layer.mlp
    cosines, sines, scaled_cosines, scaled_sines = rotation
    shape = len(x), -1, attention.head_dim
    normed = _norm(layer.input_layernorm, x)
    q = _project(attention.q_proj, normed, bfloat16).view(shape)
    k = _project(attention.k_proj, normed, bfloat16).view(shape)
    v = _project(attention.v_proj, normed, bfloat16).view(shape)
    if hasattr(attention, "q_norm"):
        q, k = _norm(attention.q_norm, q), _norm(attention.k_norm, k)
    # The scale of the scores is in the queries' rotation.
    q, k = rotate(q, scaled_cosines, scaled_sines), rotate(k, cosines, sines)
    attended = attend(q, k, v, plan)
    if kept is not None:
        attended, x = attended.index_select(0, kept), x.index_select(0, kept)
    x = _project(attention.o_proj, attended, bfloat16, x)
    normed = _norm(layer.post_attention_layernorm, x)
    gate = _project(feed_forward.gate_proj, normed, bfloat16)
    up = _project(feed_forward.up_proj, normed, bfloat16)
    return _project(feed_forward.down_proj, gated_unit(gate, up), bfloat16, x)


def _norm(module: Any, x: Tensor) -> Tensor:
    return rms_norm(x, module.weight, module.variance_epsilon)


def _project(module: Any, x: Tensor, bfloat16: bool, residual: Tensor | None = None) -> Tensor:
    """Return a linear layer's output, plus the residual."""
    if is_plain_linear(module):
        return linear(x, module.weight, module.bias, residual, bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        y = module(x).to(x.dtype)
    return y if residual is None else y + residual
