"""The forward pass of Llama, Qwen2 and Qwen3 decoders, written for sampling.

Query, key and value projections are one matrix product, gate and up another. Dimensions of a
head that rotate together stand side by side here (transformers keeps them half a head apart):
a rotation is then one product of complex numbers, and q·k is the same sum in another order.

On a CPU float32 products go through oneDNN with packed weights. PyTorch's own way there is MKL,
which on AMD's processors reaches less than half of oneDNN's rate.
"""

from __future__ import annotations

from collections.abc import Iterable
from ctypes import CDLL
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding, linear, scaled_dot_product_attention, silu

from data_prep.errors import UserError
from pipeline.engines._cache import Cache, Store, rounded
from pipeline.engines._compiled import Compiled, CompiledSession
from pipeline.engines._rows import COUNT, LENGTH, TOKEN, Size

ARCHITECTURES = ("llama", "qwen2", "qwen3")
# Rotary embeddings whose frequencies do not depend on the length of the text.
ROTATIONS = ("default", "linear", "llama3", "yarn")


# Tokens of one forward pass over prompts, padding included.
PREFILL_TOKENS = 8192
# Weights beyond this are not packed: a second copy of them would cost more than it gains.
PACK_BYTES = 1 << 30


@dataclass(slots=True)
class _Matrix:
    """Weights [out, in], and the same in oneDNN's own layout where that is used."""

    plain: Tensor
    packed: Tensor | None = None


@dataclass(slots=True)
class _Layer:
    """Weights of one decoder layer, in the order in which they are used."""

    norm: Tensor
    qkv: _Matrix
    qkv_bias: Tensor | None
    q_norm: Tensor | None
    k_norm: Tensor | None
    out: _Matrix
    norm2: Tensor
    gate_up: _Matrix
    down: _Matrix


class Unwritten(Exception):
    """The model has a part that is not written here."""


class Decoder:
    """A decoder's weights and forward passes.

    Args:
        model: A transformers model; its parameters are copied.
        device: Where the copies live.
        library: Compiled code that is to run it, in float32 on a CPU (`_library`).

    Raises:
        Unwritten: The architecture is not one of `ARCHITECTURES`, or uses a part that is not
            written here.
    """

    def __init__(self, model: Any, device: torch.device, library: CDLL | None = None) -> None:
        """Fuse the model's weights."""
        config, dtype = model.config, model.dtype
        if config.model_type not in ARCHITECTURES:
            raise Unwritten("another architecture")
        if getattr(config, "use_sliding_window", False):
            raise Unwritten("sliding-window attention")
        if config.hidden_act != "silu":
            raise Unwritten(f"the activation {config.hidden_act!r}")
        rope = getattr(config, "rope_parameters", None) or {}
        if rope.get("rope_type", "default") not in ROTATIONS:
            raise Unwritten(f"rotations of type {rope['rope_type']!r}")
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
        self.head = _Matrix(self.embedding if self.tied else empty(config.vocab_size, width))
        self.norm = empty(width)
        self.layers = [
            _Layer(
                norm=empty(width),
                qkv=_Matrix(empty(queries + 2 * keys, width)),
                qkv_bias=empty(queries + 2 * keys) if biased else None,
                q_norm=empty(self.head_dim) if qwen3 else None,
                k_norm=empty(self.head_dim) if qwen3 else None,
                out=_Matrix(empty(width, queries)),
                norm2=empty(width),
                gate_up=_Matrix(empty(2 * config.intermediate_size, width)),
                down=_Matrix(empty(width, config.intermediate_size)),
            )
            for _ in range(config.num_hidden_layers)
        ]
        # The model's own frequencies, so that every rotary scaling it knows is right here too.
        rotary = model.base_model.rotary_emb
        positions = torch.arange(config.max_position_embeddings, device=device)
        angles = positions[:, None].float() * rotary.inv_freq.to(device).float()[None]
        wide = torch.promote_types(dtype, torch.float32)
        cosines, sines = angles.cos().to(wide), angles.sin().to(wide)
        self.rotations = torch.complex(cosines, sines) * rotary.attention_scaling
        if 2 * angles.shape[1] != self.head_dim:
            raise Unwritten("rotations of a part of each head")
        self.scale = self.head_dim**-0.5
        self.store = Store()
        self.onednn = (
            device.type == "cpu" and dtype == torch.float32 and torch.backends.mkldnn.is_available()
        )
        unknown = sorted(set(model.state_dict()) - {*self._places(), "lm_head.weight"})
        if unknown:
            raise Unwritten(f"a parameter {unknown[0]!r}")
        self.packs = sum(matrix.plain.nbytes for matrix in self._matrices()) <= PACK_BYTES
        self.compiled = Compiled(library, self) if library and self.packs else None
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
                place = places[name]
                place.copy_(value.reshape(place.shape))
                missing.discard(name)
        if missing:
            raise UserError(
                "engine.kind 'embedded'",
                f"{len(missing)} parameters are missing, such as {min(missing)!r}",
                "all parameters of the model",
                "check the model folder",
            )
        self._pack()

    def _matrices(self) -> list[_Matrix]:
        matrices = [self.head]
        for layer in self.layers:
            matrices += [layer.qkv, layer.out, layer.gate_up, layer.down]
        return matrices

    def _pack(self) -> None:
        """Bring the matrices into the layout of what multiplies them."""
        if self.compiled is not None:
            self.compiled.pack()
        elif self.onednn and self.packs:
            for matrix in self._matrices():
                matrix.packed = torch.ops.mkldnn._reorder_linear_weight(matrix.plain, 256)

    def _places(self) -> dict[str, Tensor]:
        """Return a view of our buffers for every parameter name.

        Views of weights whose outputs rotate have the order of transformers' rows: of a head's
        D outputs, i and i + D/2 turn together there, 2i and 2i + 1 here.
        """

        def halves(rows: Tensor) -> Tensor:
            return rows.unflatten(0, (-1, self.head_dim // 2, 2)).transpose(1, 2)

        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        places = {"model.embed_tokens.weight": self.embedding, "model.norm.weight": self.norm}
        if not self.tied:
            places["lm_head.weight"] = self.head.plain
        cuts = {
            "q": slice(0, queries),
            "k": slice(queries, queries + keys),
            "v": slice(queries + keys, None),
        }
        inner = self.config.intermediate_size
        for index, layer in enumerate(self.layers):
            prefix = f"model.layers.{index}"
            for letter, cut in cuts.items():
                part = layer.qkv.plain[cut]
                name = f"{prefix}.self_attn.{letter}_proj"
                places[f"{name}.weight"] = part if letter == "v" else halves(part)
                if layer.qkv_bias is not None:
                    part = layer.qkv_bias[cut]
                    places[f"{name}.bias"] = part if letter == "v" else halves(part)
            if layer.q_norm is not None and layer.k_norm is not None:
                places[f"{prefix}.self_attn.q_norm.weight"] = halves(layer.q_norm)
                places[f"{prefix}.self_attn.k_norm.weight"] = halves(layer.k_norm)
            places[f"{prefix}.self_attn.o_proj.weight"] = layer.out.plain
            places[f"{prefix}.input_layernorm.weight"] = layer.norm
            places[f"{prefix}.post_attention_layernorm.weight"] = layer.norm2
            places[f"{prefix}.mlp.gate_proj.weight"] = layer.gate_up.plain[:inner]
            places[f"{prefix}.mlp.up_proj.weight"] = layer.gate_up.plain[inner:]
            places[f"{prefix}.mlp.down_proj.weight"] = layer.down.plain
        return places

    @property
    def graphs(self) -> bool:
        """Whether steps can be captured as CUDA graphs."""
        return self.device.type == "cuda"

    def cache_bytes(self, size: Size) -> int:
        """Return the most bytes that the keys and values of a batch take."""
        if self.compiled is not None:
            return self.compiled.cache_bytes(size)
        positions = size.blocks * rounded(size.prompt) + size.rows * rounded(size.completion)
        numbers = 2 * len(self.layers) * self.kv_heads * self.head_dim
        return numbers * self.dtype.itemsize * positions

    def open(self, lanes: int, size: Size) -> Session | CompiledSession:
        """Return an empty batch for n = `lanes` samples a prompt."""
        if self.compiled is not None:
            return self.compiled.open(lanes, size)
        return Session(self, lanes, size)

    def prefill(self, input_ids: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
        """Run prompts that are padded at the end.

        Args:
            input_ids: [B, P].
            last: [B], where each prompt's last token stands.

        Returns:
            Logits after the last tokens [B, V], and keys and values
            [layers, 2, B, kv heads, P, D].
        """
        batch, length = input_ids.shape
        rotation = self.rotations[:length, None]
        kept = torch.empty(
            (len(self.layers), 2, batch, self.kv_heads, length, self.head_dim),
            dtype=self.dtype,
            device=self.device,
        )
        x = embedding(input_ids.view(-1), self.embedding)
        for index, layer in enumerate(self.layers):
            joint = self._project(layer, x).view(batch, length, -1, self.head_dim)
            _rotate_(joint[:, :, : self.heads + self.kv_heads], rotation)
            q, k, v = joint.split([self.heads, self.kv_heads, self.kv_heads], dim=2)
            q = q.transpose(1, 2)
            kept[index, 0] = k.transpose(1, 2)
            kept[index, 1] = v.transpose(1, 2)
            attended = self._attend(q, kept[index, 0], kept[index, 1])
            attended = attended.transpose(1, 2).reshape(batch * length, -1)
            x = self._finish(layer, x, attended)
        rows = torch.arange(batch, device=self.device) * length + last
        return self._logits(x[rows]), kept

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return causal attention of whole prompts [B, heads, P, D]."""
        batch, _, length, size = q.shape
        grouped = self.heads != self.kv_heads
        if self.device.type != "cpu" or length > 256:
            return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
        # Short prompts: three plain products are several times faster here than the fused one.
        q = q.reshape(batch * self.kv_heads, -1, size)
        k, v = k.flatten(0, 1), v.flatten(0, 1)
        later = torch.full((length, length), -torch.inf, dtype=self.dtype).triu_(1)
        later = later.repeat(self.heads // self.kv_heads, 1)
        scores = torch.baddbmm(later, q, k.transpose(1, 2), alpha=self.scale)
        return torch.bmm(torch.softmax(scores, dim=-1), v).view(batch, self.heads, length, size)

    def step(self, tokens: Tensor, positions: Tensor, columns: Tensor, cache: Cache) -> Tensor:
        """Run one token a row, keep its keys and values, return the logits after it [B, V].

        Args:
            tokens: [B], of the cache's first B rows.
            positions: [B], where each token stands in prompt and completion together.
            columns: [B], where it stands in its completion.
            cache: Of all rows.
        """
        batch, kv_heads, size = len(tokens), self.kv_heads, self.head_dim
        repeats, blocks, lanes = self.heads // kv_heads, cache.step_blocks, cache.step_lanes
        width, span = cache.prompt_width, cache.completion_width
        rotation = self.rotations[positions][:, None]
        destinations = cache.destinations(columns)
        prompt_mask = cache.prompt_mask[:blocks, None, :width].expand(-1, kv_heads, -1)
        prompt_mask = prompt_mask.reshape(blocks * kv_heads, 1, width)
        mask = cache.completion_mask[:batch, None, None, :span]
        mask = mask.expand(-1, kv_heads, repeats, -1).clone(memory_format=torch.contiguous_format)
        mask = mask.view(batch * kv_heads, repeats, span)
        place = cache.place[: batch * kv_heads]
        occupant = cache.occupant[: blocks * kv_heads * lanes]
        x = embedding(tokens, self.embedding)
        for index, layer in enumerate(self.layers):
            joint = self._project(layer, x)
            _rotate_(joint[:, : self.heads + kv_heads], rotation)
            q, fresh = joint[:, : self.heads], joint[:, self.heads :]
            cache.flat(index).index_copy_(0, destinations, fresh.reshape(-1, size))

            q = q.reshape(batch * kv_heads, repeats * size)
            asked = q.index_select(0, occupant)
            asked = asked.view(blocks * kv_heads, lanes * repeats, size)
            keys, values = (part[:blocks].flatten(0, 1)[:, :width] for part in cache.prompt[index])
            seen = torch.baddbmm(prompt_mask, asked, keys.transpose(1, 2), alpha=self.scale)
            p = torch.softmax(seen, dim=-1)
            # The largest score and its probability give the log-sum-exp of all.
            normaliser = seen.amax(-1) - p.amax(-1).log_()
            found = torch.bmm(p, values).view(-1, repeats * size).index_select(0, place)
            mask[..., 0] = normaliser.view(-1, repeats).index_select(0, place)

            keys, values = (
                part[:batch].flatten(0, 1)[:, :span] for part in cache.completion[index]
            )
            q = q.view(batch * kv_heads, repeats, size)
            scores = torch.baddbmm(mask, q, keys.transpose(1, 2), alpha=self.scale)
            w = torch.softmax(scores, dim=-1)
            found = found.view(-1, repeats, size).mul_(w[..., :1])
            attended = found.baddbmm_(w, values).view(batch, -1)
            x = self._finish(layer, x, attended)
        return self._logits(x)

    def _logits(self, x: Tensor) -> Tensor:
        """Return [B, V] in float32 (float64 for float64 weights)."""
        logits = self._linear(self._rms(x, self.norm), self.head)
        return logits.to(torch.promote_types(self.dtype, torch.float32))

    def _project(self, layer: _Layer, x: Tensor) -> Tensor:
        """Return queries, keys and values before rotation, [T, heads + 2 kv heads, D]."""
        joint = self._linear(self._rms(x, layer.norm), layer.qkv, layer.qkv_bias)
        joint = joint.view(len(x), -1, self.head_dim)
        if layer.q_norm is not None and layer.k_norm is not None:
            q, k, v = joint.split([self.heads, self.kv_heads, self.kv_heads], dim=1)
            joint = torch.cat([self._rms(q, layer.q_norm), self._rms(k, layer.k_norm), v], dim=1)
        return joint

    def _finish(self, layer: _Layer, x: Tensor, attended: Tensor) -> Tensor:
        x = x + self._linear(attended, layer.out)
        gate, up = self._linear(self._rms(x, layer.norm2), layer.gate_up).chunk(2, dim=-1)
        return x + self._linear(silu(gate).mul_(up), layer.down)

    def _rms(self, x: Tensor, weight: Tensor) -> Tensor:
        if not self.onednn:
            return torch.rms_norm(x, (x.shape[-1],), weight, self.epsilon)
        # PyTorch has no kernel of its own for this on a CPU; its composition is slower.
        size = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale = size.square_().mul_(1.0 / x.shape[-1]).add_(self.epsilon).rsqrt_()
        return (x * scale).mul_(weight)

    def _linear(self, x: Tensor, matrix: _Matrix, bias: Tensor | None = None) -> Tensor:
        """Return x Wᵀ + b."""
        if not self.onednn:
            return linear(x, matrix.plain, bias)
        if len(x) == 1:  # a lone row would take another path, which rounds differently
            return self._linear(x.expand(2, -1), matrix, bias)[:1]
        weight = matrix.plain if matrix.packed is None else matrix.packed
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class Session:
    """A running batch: the decoder and a cache.

    Attributes:
        joins: Whether prompts may enter while others run.
    """

    joins = True

    def __init__(self, decoder: Decoder, lanes: int, size: Size) -> None:
        """Make the cache."""
        self.decoder = decoder
        self.cache = Cache(
            decoder.store,
            len(decoder.layers),
            decoder.kv_heads,
            decoder.head_dim,
            lanes,
            # Products of fewer than four queries take other paths, which round differently.
            -(-4 * decoder.kv_heads // decoder.heads),
            size.rows,
            size.blocks,
            size.prompt,
            size.completion,
            decoder.dtype,
            decoder.device,
        )

    @property
    def free_blocks(self) -> int:
        """Prompts that have room."""
        return self.cache.blocks_capacity - self.cache.blocks

    def admit(self, prompts: list[tuple[int, ...]]) -> Tensor:
        """Run prompts and add n rows for each; return the logits after each prompt, [B, V].

        Neighbours of similar length share a forward pass, so the longest are best first.
        """
        logits: list[Tensor] = []
        start, device = 0, self.decoder.device
        while start < len(prompts):
            width = rounded(len(prompts[start]))
            end = start + 1
            while (
                end < len(prompts)
                and 0.75 * width <= rounded(len(prompts[end])) <= width
                and (end + 1 - start) * width <= PREFILL_TOKENS
            ):
                end += 1
            part = prompts[start:end]
            ids = torch.zeros((len(part), width), dtype=torch.int64)
            for row, prompt in enumerate(part):
                ids[row, : len(prompt)] = torch.tensor(prompt)
            lengths = [len(prompt) for prompt in part]
            found, kept = self.decoder.prefill(
                ids.to(device), torch.tensor(lengths, device=device) - 1
            )
            self.cache.add(kept, lengths)
            logits.append(found)
            start = end
        return torch.cat(logits)

    def step(self, state: Tensor) -> Tensor:
        """Run the last token of the first rows; return the logits after it [B, V].

        Args:
            state: [7, B] of `_rows.Rows`.
        """
        columns = state[COUNT] - 1
        return self.decoder.step(state[TOKEN], state[LENGTH] + columns, columns, self.cache)

    def fit(self, tokens: int, coarse: bool) -> tuple[int, ...]:
        """Make room for completions of so many tokens; see `Cache.fit`."""
        return self.cache.fit(tokens, coarse)

    def keep(self, order: list[int]) -> None:
        """Keep the rows at these indices, in this order."""
        self.cache.keep(order)


def _rotate_(x: Tensor, rotation: Tensor) -> None:
    """Turn every pair of neighbouring dimensions in place; bfloat16 turns in float32."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    torch.view_as_complex(wide.unflatten(-1, (-1, 2))).mul_(rotation)
    if wide is not x:
        x.copy_(wide)
