"""The weights of a model folder, held against its configuration before anything is loaded.

transformers fills a tensor that is missing with random numbers and passes over one that it does not
know, with a line in its log: a model that looks whole and is another. Here both are refused, from
the headers of the safetensors files alone.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from data_prep.errors import UserError
from data_prep.jsonl import read_json

# Families whose tensors have the names of transformers' own; others are renamed when loaded.
CHECKED = ("llama", "mistral", "qwen2", "qwen3")
# Headers beyond this are no headers (safetensors' own limit).
MOST_HEADER = 100 << 20
COPY = "copy the folder again, or name the one that save_pretrained wrote"


def read_header(path: Path) -> dict[str, Any]:
    """Return name → {dtype, shape, data_offsets} of a safetensors file that is whole.

    Raises:
        UserError: Its size is not what its header says, or it has none.
    """
    size = path.stat().st_size
    header: dict[str, Any] = {}
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 0 < length <= min(size, MOST_HEADER):
                raise ValueError
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        whole = 8 + length + max((row["data_offsets"][1] for row in header.values()), default=0)
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
        whole = -1
    if whole != size:
        expected = f"{whole} bytes, as its header says" if whole > 0 else "a safetensors header"
        raise UserError(
            str(path),
            f"a weights file of {size} bytes that is cut short or damaged",
            expected,
            "copy it again",
        )
    return header


def read_model_config(folder: Path) -> dict[str, Any]:
    """Return the configuration of a model folder.

    Raises:
        UserError: There is none, or it is no table.
    """
    path = folder / "config.json"
    table = read_json(path)
    if not isinstance(table, dict):
        raise UserError(str(path), f"a JSON {type(table).__name__}", "a JSON object", COPY)
    return table


def check_weights(folder: Path, trust_remote_code: bool = False) -> None:
    """Hold the tensors of a causal LM's folder against what its configuration asks for.

    Args:
        folder: The model.
        trust_remote_code: Whether Python files that come with it may run.

    Raises:
        UserError: A file is damaged, the architecture is not known, a tensor is missing, of
            another shape or one too many, or the tokenizer has tokens that the model has no
            embedding for.
    """
    table = read_model_config(folder)
    if any("SequenceClassification" in str(name) for name in table.get("architectures") or []):
        raise UserError(
            str(folder),
            "a reward model, which answers no question",
            "a causal language model",
            "name the policy's folder",
        )
    if not trust_remote_code:
        _check_architecture(folder, table)
    files = sorted(folder.glob("*.safetensors"))
    found = {name: row for path in files for name, row in read_header(path).items()}
    if not files or table.get("model_type") not in CHECKED:
        return
    expected, tied = _expected(folder)
    for name, shape in expected.items():
        if name not in found:
            if name == "lm_head.weight" and tied:
                continue
            raise UserError(
                str(folder), f"the tensor {name} is missing", f"one of shape {list(shape)}", COPY
            )
        if tuple(found[name]["shape"]) != shape:
            raise UserError(
                str(folder),
                f"the tensor {name} has the shape {found[name]['shape']}",
                f"{list(shape)}, as config.json says",
                COPY,
            )
    extra = sorted(n for n in found.keys() - expected.keys() if "rotary_emb" not in n)
    if extra:
        raise UserError(
            str(folder),
            f"{len(extra)} tensors that config.json knows nothing of, such as {extra[0]}",
            "the tensors of a causal language model, and no other",
            "a reward model is given as such; otherwise " + COPY,
        )
    _check_tokens(folder, int(table.get("vocab_size", 0)))


def _check_architecture(folder: Path, table: dict[str, Any]) -> None:
    from transformers import CONFIG_MAPPING

    kind = table.get("model_type")
    if kind in CONFIG_MAPPING:
        return
    if "auto_map" in table:
        raise UserError(
            str(folder),
            f"this model cannot be loaded: {kind!r} needs Python files that come with it",
            "an architecture that transformers knows",
            "where you trust those files, set model.trust_remote_code = true",
        )
    raise UserError(
        f"{folder / 'config.json'}, key 'model_type'",
        f"found {kind!r}, which transformers does not know",
        "the model_type of a causal language model, such as llama or qwen2",
        "check the file, or upgrade transformers for a newer architecture",
    )


def _expected(folder: Path) -> tuple[dict[str, tuple[int, ...]], bool]:
    """Return the name and shape of every tensor, and whether the two embeddings are one."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except Exception as error:  # transformers raises whatever a wrong number leads to
        raise UserError(
            str(folder / "config.json"),
            f"no model can be made of it: {' '.join(str(error).split())[:300]}",
            "the configuration of a causal language model",
            COPY,
        ) from error
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    return shapes, bool(config.tie_word_embeddings)


def _check_tokens(folder: Path, vocabulary: int) -> None:
    """Refuse a tokenizer with ids beyond the model's vocabulary."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        return
    table = read_json(path)
    try:
        # Added tokens may lie beyond: loading adds a family's own padding, which no row has.
        last = max(table["model"]["vocab"].values(), default=-1)
    except (KeyError, TypeError, AttributeError, ValueError):  # loading it says what is wrong
        return
    if last >= vocabulary:
        raise UserError(
            str(path),
            f"a token of id {last}",
            f"ids below the model's vocabulary of {vocabulary}",
            "take the tokenizer that belongs to the model",
        )


def check_tokenizer_files(folder: Path) -> None:
    """Refuse a folder without a tokenizer, of which transformers would make an empty one.

    Raises:
        UserError: None of the files that hold a vocabulary is there.
    """
    names = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
    if folder.is_dir() and not any((folder / name).is_file() for name in names):
        raise UserError(str(folder), "no tokenizer", f"one of {', '.join(names)}", COPY)


def refuse_not_finite(model: Any, path: str | Path) -> None:
    """Refuse a loaded model with a parameter that is no number.

    Raises:
        UserError: One is NaN or infinite.
    """
    import torch

    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter.detach()).all()):
            raise UserError(
                str(path),
                f"the tensor {name} is not finite",
                "numbers",
                "take another checkpoint: this one was saved after training had failed",
            )
