"""The forward pass of Llama, Qwen2 and Qwen3 decoders, written for sampling.

Query, key and value projections are one matrix product, gate and up another. Keys and values
live in one static cache [layers, 2, slots, kv heads, positions, head dim]; the first `rows`
slots are the running ones, so that every step works on views and copies nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding, linear, scaled_dot_product_attention, silu

from data_prep.errors import UserError

ARCHITECTURES = ("llama", "qwen2", "qwen3")


@dataclass(slots=True)
class _Layer:
    """Weights of one decoder layer, in the order in which they are used."""

    norm: Tensor
    qkv: Tensor
    qkv_bias: Tensor | None
    q_norm: Tensor | None
    k_norm: Tensor | None
    out: Tensor
    norm2: Tensor
    gate_up: Tensor
    down: Tensor


class Decoder:
    """A decoder's weights and forward passes.

    Args:
        model: A transformers model; its parameters are copied.
        device: Where the copies live.

    Raises:
        UserError: The architecture is not one of `ARCHITECTURES`, or uses a part that is not
            written here.
    """

    def __init__(self, model: Any, device: torch.device) -> None:
        """Fuse the model's weights."""
        config, dtype = model.config, model.dtype
        if config.model_type not in ARCHITECTURES or getattr(config, "use_sliding_window", False):
            raise UserError(
                "engine.kind 'embedded'",
                f"a model of type {config.model_type!r}"
                + (" with sliding-window attention" if config.model_type in ARCHITECTURES else ""),
                f"one of {', '.join(ARCHITECTURES)} with full attention",
                'set engine.kind = "vllm"',
            )
        self.config, self.dtype, self.device = config, dtype, device
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        width = config.hidden_size
        self.head_dim = getattr(config, "head_dim", None) or width // self.heads
        self.epsilon = config.rms_norm_eps
        self.tied = bool(config.tie_word_embeddings)
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim

        def empty(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        qwen3 = config.model_type == "qwen3"
        biased = config.model_type == "qwen2" or bool(getattr(config, "attention_bias", False))
        self.embedding = empty(config.vocab_size, width)
        self.head = self.embedding if self.tied else empty(config.vocab_size, width)
        self.norm = empty(width)
        self.layers = [
            _Layer(
                norm=empty(width),
                qkv=empty(queries + 2 * keys, width),
                qkv_bias=empty(queries + 2 * keys) if biased else None,
                q_norm=empty(self.head_dim) if qwen3 else None,
                k_norm=empty(self.head_dim) if qwen3 else None,
                out=empty(width, queries),
                norm2=empty(width),
                gate_up=empty(2 * config.intermediate_size, width),
                down=empty(width, config.intermediate_size),
            )
            for _ in range(config.num_hidden_layers)
        ]
        # The model's own frequencies, so that every rotary scaling it knows is right here too.
        rotary = model.base_model.rotary_emb
        positions = torch.arange(config.max_position_embeddings, device=device)
        angles = positions[:, None].float() * rotary.inv_freq.to(device).float()[None]
        angles = torch.cat([angles, angles], dim=-1)
        self.cosines = (angles.cos() * rotary.attention_scaling).to(dtype)
        self.sines = (angles.sin() * rotary.attention_scaling).to(dtype)
        self.load(model.state_dict().items())

    def load(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Copy parameters, named as in the model's `state_dict`, into the fused buffers.

        Raises:
            UserError: A parameter is unknown or one is missing.
        """
        places = self._places()
        missing = set(places)
        with torch.no_grad():
            for name, value in weights:
                if name == "lm_head.weight" and self.tied:
                    continue
                if name not in places:
                    raise UserError(
                        "engine.kind 'embedded'",
                        f"parameter {name!r} has no place here",
                        "a plain Llama, Qwen2 or Qwen3 model",
                        'set engine.kind = "vllm"',
                    )
                places[name].copy_(value)
                missing.discard(name)
        if missing:
            raise UserError(
                "engine.kind 'embedded'",
                f"{len(missing)} parameters are missing, such as {min(missing)!r}",
                "all parameters of the model",
                "check the model folder",
            )

    def _places(self) -> dict[str, Tensor]:
        """Return a view of our buffers for every parameter name."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        places = {"model.embed_tokens.weight": self.embedding, "model.norm.weight": self.norm}
        if not self.tied:
            places["lm_head.weight"] = self.head
        cuts = {
            "q": slice(0, queries),
            "k": slice(queries, queries + keys),
            "v": slice(queries + keys, None),
        }
        inner = self.config.intermediate_size
        for index, layer in enumerate(self.layers):
            prefix = f"model.layers.{index}"
            for letter, cut in cuts.items():
                places[f"{prefix}.self_attn.{letter}_proj.weight"] = layer.qkv[cut]
                if layer.qkv_bias is not None:
                    places[f"{prefix}.self_attn.{letter}_proj.bias"] = layer.qkv_bias[cut]
            if layer.q_norm is not None and layer.k_norm is not None:
                places[f"{prefix}.self_attn.q_norm.weight"] = layer.q_norm
                places[f"{prefix}.self_attn.k_norm.weight"] = layer.k_norm
            places[f"{prefix}.self_attn.o_proj.weight"] = layer.out
            places[f"{prefix}.input_layernorm.weight"] = layer.norm
            places[f"{prefix}.post_attention_layernorm.weight"] = layer.norm2
            places[f"{prefix}.mlp.gate_proj.weight"] = layer.gate_up[:inner]
            places[f"{prefix}.mlp.up_proj.weight"] = layer.gate_up[inner:]
            places[f"{prefix}.mlp.down_proj.weight"] = layer.down
        return places

    def new_cache(self, slots: int, positions: int) -> Tensor:
        """Return an empty cache [layers, 2, slots, kv heads, positions, head dim]."""
        return torch.zeros(
            (len(self.layers), 2, slots, self.kv_heads, positions, self.head_dim),
            dtype=self.dtype,
            device=self.device,
        )

    def prefill(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Run prompts that are padded at the end.

        Args:
            input_ids: [B, P].

        Returns:
            Final hidden states [B, P, H] and keys and values [layers, 2, B, kv heads, P, D].
        """
        batch, length = input_ids.shape
        cosines, sines = self.cosines[:length], self.sines[:length]
        kept = self.new_cache(batch, length)
        x = embedding(input_ids, self.embedding)
        for index, layer in enumerate(self.layers):
            q, k, v = self._project(layer, x, cosines, sines)
            kept[index, 0].copy_(k)
            kept[index, 1].copy_(v)
            attended = scaled_dot_product_attention(
                q, k, v, is_causal=True, enable_gqa=self.heads != self.kv_heads
            )
            x = self._finish(layer, x, attended)
        return self._rms(x, self.norm), kept

    def step(self, token_ids: Tensor, positions: Tensor, cache: Tensor, longest: int) -> Tensor:
        """Run one token a row, write its keys and values, return final hidden states [B, H].

        Args:
            token_ids: [B].
            positions: [B], where each token stands.
            cache: The cache's first B slots.
            longest: Largest position plus one.
        """
        batch = len(token_ids)
        rows = torch.arange(batch, device=self.device)
        cosines = self.cosines[positions][:, None, None]
        sines = self.sines[positions][:, None, None]
        seen = torch.arange(longest, device=self.device)[None] <= positions[:, None]
        mask = seen[:, None, None]
        x = embedding(token_ids, self.embedding)[:, None]
        for index, layer in enumerate(self.layers):
            q, k, v = self._project(layer, x, cosines, sines)
            keys, values = cache[index, 0, :batch], cache[index, 1, :batch]
            keys[rows, :, positions] = k[:, :, 0]
            values[rows, :, positions] = v[:, :, 0]
            attended = scaled_dot_product_attention(
                q,
                keys[:, :, :longest],
                values[:, :, :longest],
                attn_mask=mask,
                enable_gqa=self.heads != self.kv_heads,
            )
            x = self._finish(layer, x, attended)
        return self._rms(x[:, 0], self.norm)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return [B, V] in float32 (float64 for float64 weights)."""
        return linear(hidden, self.head).to(torch.promote_types(self.dtype, torch.float32))

    def _project(
        self, layer: _Layer, x: Tensor, cosines: Tensor, sines: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return rotated q [B, heads, T, D], rotated k and v [B, kv heads, T, D]."""
        batch, length, _ = x.shape
        joint = linear(self._rms(x, layer.norm), layer.qkv, layer.qkv_bias)
        joint = joint.view(batch, length, self.heads + 2 * self.kv_heads, self.head_dim)
        joint = joint.transpose(1, 2)
        q, k, v = joint.split([self.heads, self.kv_heads, self.kv_heads], dim=1)
        if layer.q_norm is not None and layer.k_norm is not None:
            q, k = self._rms(q, layer.q_norm), self._rms(k, layer.k_norm)
        return _rotate(q, cosines, sines), _rotate(k, cosines, sines), v

    def _finish(self, layer: _Layer, x: Tensor, attended: Tensor) -> Tensor:
        batch, _, length, _ = attended.shape
        x = x + linear(attended.transpose(1, 2).reshape(batch, length, -1), layer.out)
        gate, up = linear(self._rms(x, layer.norm2), layer.gate_up).chunk(2, dim=-1)
        return x + linear(silu(gate) * up, layer.down)

    def _rms(self, x: Tensor, weight: Tensor) -> Tensor:
        return torch.rms_norm(x, (x.shape[-1],), weight, self.epsilon)


def _rotate(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    one, two = x.chunk(2, dim=-1)
    return x * cosines + torch.cat([-two, one], dim=-1) * sines
