"""The policy's model folder: built small from a config, or any causal LM that is given."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from data_prep.config import Config
from data_prep.errors import UserError
from pipeline.weights import check_tokenizer_files, check_weights, refuse_not_finite

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class ModelConfig(Config):
    """Which model the run starts from.

    Attributes:
        path: Model folder or hub id; empty builds the small one that the other keys describe.
        architecture: Family of the built model.
        width: Hidden size.
        layers: Decoder layers.
        heads: Attention heads.
        kv_heads: Key-value heads; equal to `heads` is plain multi-head attention.
        feed_forward: Inner size of the gated feed-forward.
        context: Longest prompt plus completion, in tokens.
        rope_theta: Base of the rotary position embedding.
        dtype: Precision of the trained parameters.
        trust_remote_code: Whether Python files that come with the model at `path` may run, as
            architectures that transformers does not know need it. Without it they are refused.
    """

    path: str = ""
    architecture: Literal["llama", "qwen2", "qwen3"] = "qwen2"
    width: int = Field(default=128, ge=8)
    layers: int = Field(default=4, ge=1)
    heads: int = Field(default=4, ge=1)
    kv_heads: int = Field(default=4, ge=1)
    feed_forward: int = Field(default=384, ge=8)
    context: int = Field(default=1024, ge=16)
    rope_theta: float = Field(default=10000.0, gt=0.0)
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    trust_remote_code: bool = False

    @model_validator(mode="after")
    def _heads(self) -> ModelConfig:
        if not self.path and (self.width % self.heads or self.heads % self.kv_heads):
            raise ValueError(
                f"width {self.width}, heads {self.heads}, kv_heads {self.kv_heads}: heads divides "
                "width, and kv_heads divides heads"
            )
        if not self.path and self.width // self.heads % 2:
            raise ValueError(
                f"width {self.width} over {self.heads} heads gives heads of "
                f"{self.width // self.heads}, and rotary positions need an even number"
            )
        return self


def build_model(
    config: ModelConfig, tokenizer: PreTrainedTokenizerBase, seed: int
) -> PreTrainedModel:
    """Build the small model with random weights that follow from the seed."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    shape: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": config.width,
        "intermediate_size": config.feed_forward,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.width // config.heads,
        "max_position_embeddings": config.context,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": True,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(config.architecture, **shape), dtype=torch_dtype(config.dtype)
        )
    return in_own_precision(model)


def load_model(
    path: str | Path, dtype: str = "float32", trust_remote_code: bool = False
) -> PreTrainedModel:
    """Load a causal LM from a folder or hub id, from safetensors alone.

    Args:
        path: Folder or hub id.
        dtype: Precision of its parameters.
        trust_remote_code: Whether Python files that come with it may run.

    Raises:
        UserError: There is no such model, its files are damaged, its weights are pickled, do not
            fit its configuration or are no numbers, or it needs code of its own.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    refuse_pickles(path)
    if Path(path).is_dir():
        check_weights(Path(path), trust_remote_code)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            str(path),
            dtype=torch_dtype(dtype),
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
        )
    except Exception as error:  # the loaders raise everything from OSError to SafetensorError
        raise UserError(
            str(path),
            f"this model cannot be loaded: {error}",
            "a folder with config.json and safetensors, or a hub id that can be reached",
            "check the path, or fetch the model first",
        ) from error
    refuse_not_finite(model, path)
    return in_own_precision(model)


# What torch.save writes: reading a pickle can run any code that its author put there.
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


def refuse_pickles(folder: str | Path) -> None:
    """Refuse a model or adapter folder whose weights are pickled and not in safetensors.

    A hub id passes: there transformers is told to take safetensors or nothing.

    Raises:
        UserError: They are.
    """
    folder = Path(folder)
    if not folder.is_dir() or any(folder.glob("*.safetensors")):
        return
    if pickled := sorted(p.name for p in folder.iterdir() if p.suffix in PICKLED):
        raise UserError(
            str(folder),
            f"pickled weights ({pickled[0]}), which can run code when they are read",
            "weights in safetensors",
            "take the model's safetensors, or where you trust the file: load it elsewhere and "
            "write it with save_pretrained",
        )


def in_own_precision(model: PreTrainedModel) -> PreTrainedModel:
    """Let a float64 model's norms compute in float64: transformers' round to float32.

    Without this no proof about a float64 model holds beyond 1e-8. Norms of other formulas, such as
    Gemma's with 1 + w, stay as they are.
    """
    import torch

    if model.dtype != torch.float64:
        return model
    for module in model.modules():
        # What Llama's norm and its copies call it; those of another formula call it `eps`.
        if type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon"):
            norm: Any = module
            norm.forward = partial(exact_rms_norm, norm)
    return model


def exact_rms_norm(norm: Any, x: torch.Tensor) -> torch.Tensor:
    """Return w x / √(mean x² + ε), in the precision of x."""
    import torch

    return torch.rms_norm(x, (x.shape[-1],), norm.weight, norm.variance_epsilon)


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """Load a tokenizer from a folder or hub id.

    Raises:
        UserError: There is no such tokenizer.
    """
    from transformers import AutoTokenizer

    check_tokenizer_files(Path(path))
    try:
        # A tokenizer of tokenizer.json needs no code; False also keeps transformers from asking
        # on the terminal.
        return AutoTokenizer.from_pretrained(str(path), trust_remote_code=False)
    except Exception as error:
        raise UserError(
            str(path),
            f"this tokenizer cannot be loaded: {error}",
            "a folder with tokenizer.json, or a hub id that can be reached",
            "check the path",
        ) from error


def save_checkpoint(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    end_token_ids: list[int],
    profile: str,
    reads: str = "",
    weights: dict[str, torch.Tensor] | None = None,
) -> None:
    """Write a complete model folder: weights, tokenizer, template, generation config.

    Adapters in the model are merged into the weights that are written; the model stays as it is.

    Args:
        folder: Where.
        model: A policy or a reward model.
        tokenizer: Its tokenizer, with the chat template.
        end_token_ids: Every token that ends a turn.
        profile: The prompt profile that it was trained with.
        reads: For a reward model: "end", or "steps" of a process reward model.
        weights: The model's `plain_weights`, where somebody has gathered them.
    """
    from transformers import GenerationConfig

    from data_prep.files import disk_errors
    from data_prep.jsonl import write_json
    from pipeline.adapters import plain_weights

    generation = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=end_token_ids,
        pad_token_id=tokenizer.pad_token_id,
        do_sample=True,
        temperature=1.0,
    )
    if model.can_generate():
        model.generation_config = generation
    with disk_errors(folder):
        model.save_pretrained(folder, state_dict=weights or dict(plain_weights(model)))
        tokenizer.save_pretrained(folder)
    write_json(folder / "boxed.json", {"profile": profile, **({"reads": reads} if reads else {})})


def torch_dtype(name: str) -> torch.dtype:
    """Return the dtype that a config names."""
    import torch

    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}[name]


def pick_device(name: str) -> torch.device:
    """Return the device that a config names; "auto" takes a GPU where there is one."""
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(name)
