"""Model folders: where a checkpoint comes from, and whether it is complete."""

from __future__ import annotations

from pathlib import Path

from data_prep.errors import UserError


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
        folder = Path(snapshot_download(model))
    except Exception as error:
        raise UserError(
            model,
            f"neither a folder nor a hub model that can be reached: {error}",
            "a model folder or hub id",
            "check the path, or fetch the model first",
        ) from None
    return folder, f"{model}@{folder.name}"


def check_model(folder: Path) -> None:
    """Check that a model folder is complete, before anything is loaded.

    Raises:
        UserError: The folder is not there, or a file that every model folder has is missing.
    """
    if not folder.is_dir():
        raise UserError(str(folder), "no such folder", "a model folder", "check the path")
    needed = {
        "config.json": ("config.json",),
        "weights": ("*.safetensors", "pytorch_model*.bin"),
        "a tokenizer": ("tokenizer.json", "tokenizer.model", "vocab.json"),
    }
    for what, patterns in needed.items():
        if not any(any(folder.glob(pattern)) for pattern in patterns):
            found = ", ".join(sorted(p.name for p in folder.iterdir())[:12]) or "nothing"
            raise UserError(
                str(folder),
                f"an incomplete model folder without {what}; it holds {found}",
                f"{what} ({' or '.join(patterns)})",
                "copy the missing files, or name the folder that save_pretrained wrote",
            )
