"""Model folders: where a checkpoint comes from, and whether it is complete."""

from __future__ import annotations

from pathlib import Path

from data_prep.errors import UserError
from data_prep.jsonl import read_json
from pipeline.model import PICKLED, refuse_pickles
from pipeline.weights import check_weights, read_model_config


def fetch_model(model: str) -> tuple[Path, str]:
    """Return (folder, identity) of a model; identity is empty for a local folder.

    Raises:
        UserError: It is neither a folder nor a hub id that can be reached.
    """
    if Path(model).is_dir():
        return Path(model), ""
    if model.count("/") != 1 or model.startswith((".", "/")):
        raise UserError(
            model,
            "no such folder",
            "a model folder, or a hub id such as owner/name",
            "check the path",
        )
    from huggingface_hub import snapshot_download

    try:
        # Pickled weights are not read, so they are not fetched.
        folder = Path(snapshot_download(model, ignore_patterns=[f"*{s}" for s in PICKLED]))
    except Exception as error:
        raise UserError(
            model,
            f"neither a folder nor a hub model that can be reached: {error}",
            "a model folder or hub id",
            "check the path, or fetch the model first",
        ) from None
    return folder, f"{model}@{folder.name}"


def is_scalar_model(folder: Path) -> bool:
    """Return whether a folder holds a sequence classifier, which reward models are."""
    if not (folder / "config.json").is_file():
        return False
    names = read_model_config(folder).get("architectures") or []
    return any("SequenceClassification" in str(name) for name in names)


def check_model(folder: Path, trust_remote_code: bool = False) -> None:
    """Check that a model folder is complete, before anything is loaded.

    Args:
        folder: The model.
        trust_remote_code: Whether Python files that come with it may run.

    Raises:
        UserError: The folder is not there, a file that every model folder has is missing, its
            weights are pickled, or a weights file is missing, cut short or of another model.
    """
    if not folder.is_dir():
        raise UserError(str(folder), "no such folder", "a model folder", "check the path")
    refuse_pickles(folder)
    needed = {
        "config.json": ("config.json",),
        "weights": ("*.safetensors",),
        "a tokenizer": ("tokenizer.json", "tokenizer.model", "vocab.json"),
    }
    for what, patterns in needed.items():
        if not any(any(folder.glob(pattern)) for pattern in patterns):
            names = (path.name for path in folder.iterdir() if not path.name.startswith("."))
            found = ", ".join(sorted(names)[:12]) or "nothing"
            # A stage's folder, or a run's, in place of a checkpoint within it.
            places = ("checkpoint/config.json", "*/checkpoint/config.json")
            below = sorted(path.parent for place in places for path in folder.glob(place))
            within = " or ".join(map(str, below[:6]))
            raise UserError(
                str(folder),
                f"an incomplete model folder without {what}; it holds {found}",
                what if patterns == (what,) else f"{what} ({' or '.join(patterns)})",
                f"name {within}"
                if within
                else "copy the missing files, or name the folder that save_pretrained wrote",
            )
    if is_scalar_model(folder):
        raise UserError(
            str(folder),
            "a reward model, which answers no question",
            "a causal language model",
            "name the policy's folder, and this one as --reward-model",
        )
    for index in sorted(folder.glob("*.safetensors.index.json")):
        named = set(read_json(index).get("weight_map", {}).values())
        missing = sorted(name for name in named if not (folder / name).is_file())
        if missing:
            raise UserError(
                str(folder),
                f"an incomplete model folder: {len(missing)} of the {len(named)} weights files in "
                f"{index.name} are not there, such as {missing[0]}",
                "every file of the index",
                "copy the missing files",
            )
    check_weights(folder, trust_remote_code)
