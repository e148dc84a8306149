"""Whether the embedded engine packs a model's weights, known before they are loaded.

A stage's plan says whether compiled code draws its samples, and looking at a plan should load
nothing: `config.json` alone answers for the common models. For the others transformers' code makes
a decoder without numbers, which takes seconds of a processor the first time.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from data_prep.errors import UserError
from data_prep.jsonl import read_json
from pipeline.engines import _decoder as decoder
from pipeline.shape import shape_of_model

# Keys whose values the decoder looks at, or that change what the others mean.
TELLING = (
    "attention_bias",
    "auto_map",
    "mlp_bias",
    "num_experts",
    "num_local_experts",
    "partial_rotary_factor",
    "rope_scaling",
    "text_config",
    "use_sliding_window",
)


def packs(model: str | Path, trust_remote_code: bool = False) -> bool:
    """Return whether a model's weights are packed here, without which no compiled code runs.

    This is what the engine will find. A model that cannot be made gets either answer: no sample is
    drawn from it, since loading it says what is wrong.

    Args:
        model: A folder or hub id.
        trust_remote_code: Whether Python files that come with it may run.
    """
    answer = at_a_glance(Path(model))
    return _by_making_one(model, trust_remote_code) if answer is None else answer


def at_a_glance(folder: Path) -> bool | None:
    """Return what `config.json` alone says; None where a model has to be made."""
    try:
        table: Any = read_json(folder / "config.json")
        if not isinstance(table, dict) or not isinstance(family := table.get("model_type"), str):
            return None
        if "auto_map" not in table and family not in decoder.ARCHITECTURES:
            return False
        shape = shape_of_model(str(folder))
    except (OSError, UserError):
        return None
    rope = table.get("rope_parameters") or {"rope_type": "default"}
    # What transformers puts in for a missing key differs between the families.
    needed = ["num_key_value_heads", "hidden_act", *["head_dim"] * (family == "qwen3")]
    if (
        shape is None
        or any(table.get(key) is None for key in needed)
        or any(table.get(key) for key in TELLING)
        or table["hidden_act"] != "silu"
        or not isinstance(rope, dict)
        or not rope.keys() <= {"rope_type", "rope_theta"}
        or rope.get("rope_type") != "default"
        or shape.head_dim % 2
    ):
        return None
    return torch.float32.itemsize * shape.products <= decoder.PACK_BYTES


def _by_making_one(model: str | Path, trust_remote_code: bool) -> bool:
    """Return what a decoder without numbers says, made from the configuration alone."""
    from transformers import AutoConfig, AutoModelForCausalLM

    meta = torch.device("meta")
    try:
        config = AutoConfig.from_pretrained(str(model), trust_remote_code=trust_remote_code)
        if config.model_type not in decoder.ARCHITECTURES:
            return False
        with meta:
            empty = AutoModelForCausalLM.from_config(
                config, dtype=torch.float32, trust_remote_code=trust_remote_code
            )
        return decoder.Decoder(empty, meta).packs
    except decoder.Unwritten:
        return False
    except Exception:  # the loaders raise everything from OSError to AttributeError
        return True
