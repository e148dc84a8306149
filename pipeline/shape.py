"""The shape of a decoder, from its configuration alone: parameters, work and memory a token.

With V vocabulary, H width, L layers, q = heads · head size, k = key-value heads · head size and
F inner width:

    parameters  = V H (twice where the output embedding is its own) + H
                  + L (2 H q + 2 H k + 3 H F + 2 H [+ q + 2 k biases] [+ 2 head sizes of q/k norms])
    products    = V H + L (2 H q + 2 H k + 3 H F)        one multiply-add a token each
    kept        = 4 F + 6 H + 2 q + 2 k [+ 2 q + 2 k with q/k norms]     numbers a token and layer
    cache       = 2 L k                                                  numbers a token

"kept" is what autograd keeps of one layer for the backward pass: the norms' inputs and results,
queries, keys, values and what attention returns, and the four results of the gated feed-forward.
With a mixture of experts F in the parameters is that of all experts, and in the rest that of those
that a token passes through.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.errors import UserError
from data_prep.jsonl import read_json
from pipeline.model import ModelConfig


@dataclass(frozen=True, slots=True)
class Shape:
    """A decoder of the Llama family.

    Attributes:
        vocabulary: V.
        width: H.
        layers: L.
        heads: Attention heads.
        kv_heads: Key-value heads.
        head_dim: Size of a head.
        feed_forward: F that a token passes through.
        all_feed_forward: F of all experts together.
        tied: Whether input and output embedding are one.
        biased: Whether query, key and value projections have biases.
        normed_heads: Whether queries and keys have norms of their own.
        context: Longest sequence, tokens.
    """

    vocabulary: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    feed_forward: int
    all_feed_forward: int
    tied: bool
    biased: bool
    normed_heads: bool
    context: int

    @property
    def queries(self) -> int:
        """q, the width of all queries."""
        return self.heads * self.head_dim

    @property
    def keys(self) -> int:
        """k, the width of all keys, and of all values."""
        return self.kv_heads * self.head_dim

    @property
    def parameters(self) -> int:
        """Numbers that the model holds."""
        q, k, h = self.queries, self.keys, self.width
        layer = 2 * h * q + 2 * h * k + 3 * h * self.all_feed_forward + 2 * h
        layer += (q + 2 * k) * self.biased + 2 * self.head_dim * self.normed_heads
        return self.vocabulary * h * (2 - self.tied) + h + self.layers * layer

    @property
    def products(self) -> int:
        """Multiply-adds of one token's matrix products, the output embedding's included."""
        h = self.width
        layer = 2 * h * self.queries + 2 * h * self.keys + 3 * h * self.feed_forward
        return self.vocabulary * h + self.layers * layer

    @property
    def kept(self) -> int:
        """Numbers that one layer keeps of a token for the backward pass."""
        heads = 2 * (self.queries + self.keys)
        return 4 * self.feed_forward + 6 * self.width + heads * (1 + self.normed_heads)

    @property
    def cache(self) -> int:
        """Numbers of a token's keys and values, over all layers."""
        return 2 * self.layers * self.keys

    def adapters(self, rank: int) -> int:
        """Return the numbers of adapters of a rank on every linear layer between the embeddings."""
        q, k, h, f = self.queries, self.keys, self.width, self.feed_forward
        return self.layers * rank * ((h + q) * 2 + (h + k) * 2 + (h + f) * 3)


def shape_of_config(config: ModelConfig, vocabulary: int) -> Shape:
    """Return the shape of the model that a run builds."""
    return Shape(
        vocabulary=vocabulary,
        width=config.width,
        layers=config.layers,
        heads=config.heads,
        kv_heads=config.kv_heads,
        head_dim=config.width // config.heads,
        feed_forward=config.feed_forward,
        all_feed_forward=config.feed_forward,
        tied=True,
        biased=config.architecture == "qwen2",
        normed_heads=config.architecture == "qwen3",
        context=config.context,
    )


def shape_of_model(name: str) -> Shape | None:
    """Return the shape of a model folder or hub id; None where its configuration is not here.

    A hub id is looked up among what was downloaded before; nothing is fetched.

    Raises:
        UserError: A configuration is there, and is not one of a decoder.
    """
    path = Path(name) / "config.json"
    if not path.is_file():
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(name, "config.json") if name.count("/") == 1 else None
        if not isinstance(found, str):
            return None
        path = Path(found)
    table = read_json(path)
    if not isinstance(table, dict):
        raise UserError(
            str(path), f"a JSON {type(table).__name__}", "a model's configuration", "check the file"
        )
    # Models of text and more keep the decoder's numbers in a table of their own.
    return _read(table.get("text_config", table), path)


def _read(table: Mapping[str, Any], path: Path) -> Shape:
    def number(key: str, default: int | None = None) -> int:
        value = table.get(key)
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise UserError(
                f"{path}, key {key!r}",
                "missing" if value is None else f"found {value!r:.60}",
                "a whole number above 0",
                "name a folder of a decoder such as Llama or Qwen, as save_pretrained writes it",
            )
        return value

    family = str(table.get("model_type", ""))
    width, heads = number("hidden_size"), number("num_attention_heads")
    inner = number("intermediate_size")
    experts = number("num_experts", number("num_local_experts", 1))
    expert = number("moe_intermediate_size", inner) if experts > 1 else inner
    active = number("num_experts_per_tok", 1)
    return Shape(
        vocabulary=number("vocab_size"),
        width=width,
        layers=number("num_hidden_layers"),
        heads=heads,
        kv_heads=number("num_key_value_heads", heads),
        head_dim=number("head_dim", max(1, width // heads)),
        feed_forward=expert * active,
        all_feed_forward=expert * experts,
        tied=bool(table.get("tie_word_embeddings", False)),
        biased=family.startswith("qwen2") or bool(table.get("attention_bias", False)),
        normed_heads=family.startswith("qwen3"),
        context=number("max_position_embeddings", 2048),
    )
