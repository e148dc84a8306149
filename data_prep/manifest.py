"""What a complete stage says of its files: manifests, sealed, and what is held against them.

Nothing is read from a complete stage, and none is skipped, before its files are hashed and held
against the manifest, which is sealed with a hash of its own: a file that was cut off, changed or
removed is named and refused. Each process hashes each file once: about a second for 1 to 2 GB, far
less than it takes to load a model of that size. Files that a stage did not write are left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from . import jsonl
from .config import fingerprint
from .errors import UserError
from .files import JOURNAL, file_hash

# Of manifests and plans; those before 2 are not sealed.
FORMAT = 2
# What differs between two equal runs (rates, times) and so takes no part in a result's hash.
# A model card (README.md) names versions and the commit.
VOLATILE = frozenset(
    {
        "manifest.json",
        "plan.json",
        "timing.json",
        "timing.jsonl",
        "README.md",
        ".gitattributes",
        JOURNAL,
    }
)
BESIDE = VOLATILE - {"manifest.json", "plan.json", JOURNAL}


def input_hash(path: str | Path) -> str:
    """Return what identifies an input: a stage's result, or the content of a file or folder.

    Raises:
        UserError: The input is not there, is a stage that is not complete, or is a stage's or lies
            in one, and is not what the stage wrote.
    """
    path = Path(path)
    stage = stage_of(path)
    if stage is not None:
        manifest = check_stage(stage, path)
        if path == stage:
            return str(manifest["result"])
    if path.is_file():
        return file_hash(path)
    if path.is_dir():
        return fingerprint(content(path))
    partial = path.with_name(f"{path.name}.partial")
    if partial.is_dir():
        raise UserError(
            str(path),
            "this stage was started and is not complete",
            "a complete stage",
            "run that stage again; it goes on where it stopped",
        )
    raise UserError(
        str(path),
        "no such file or stage folder",
        "an input of this stage",
        "run the stage that makes it first, or mend the path",
    )


def stage_of(path: Path) -> Path | None:
    """Return the complete stage that a path is or lies in, up to two folders up; None for none."""
    for folder in (path, *list(path.parents)[:2]):
        manifest = folder / "manifest.json"
        if manifest.is_file() and _is_ours(manifest):
            return folder
    return None


def _is_ours(manifest: Path) -> bool:
    """Return whether a manifest is a stage's, and not that of some other program."""
    try:
        value = jsonl.read_json(manifest)
    except UserError:
        return True  # damaged: its reader says so
    # Two of them: another program may know one of these words, damage may hide one.
    return isinstance(value, dict) and len({"plan", "result", "outputs", "seal"} & set(value)) > 1


def sealed(value: Mapping[str, Any]) -> dict[str, Any]:
    """Return a JSON object with the hash of its own content, under "seal"."""
    return {**value, "seal": fingerprint(dict(value))}


def read_sealed(path: Path, mend: str) -> dict[str, Any]:
    """Read a sealed object.

    Args:
        path: The file.
        mend: What to do where it is damaged.

    Raises:
        UserError: It is missing, or not what was written.
    """
    try:
        value = jsonl.read_json(path)
    except UserError as error:
        raise UserError(error.where, error.found, error.expected, mend) from None
    seal = value.pop("seal", None) if isinstance(value, dict) else None
    # Earlier versions sealed nothing; theirs has none of the marks of a sealed one.
    is_old = seal is None and isinstance(value, dict) and "format" not in value
    if seal != fingerprint(value) and not is_old:
        raise UserError(str(path), "damaged: it is not what was written", "its own seal", mend)
    return value


def read_manifest(stage: Path) -> dict[str, Any]:
    """Return the manifest of a complete stage.

    Raises:
        UserError: It is missing or damaged.
    """
    mend = f"remove {stage} and run its command again: it is made anew"
    manifest = read_sealed(stage / "manifest.json", mend)
    outputs = manifest.get("outputs")
    if not isinstance(outputs, dict) or manifest.get("result") != fingerprint(outputs):
        raise UserError(
            str(stage / "manifest.json"),
            "damaged: its hashes do not belong together",
            "what the stage wrote",
            mend,
        )
    return manifest


def check_stage(stage: Path, path: Path | None = None) -> dict[str, Any]:
    """Hold a stage's files against its manifest, and return that.

    Args:
        stage: A complete stage's folder.
        path: The file or folder in it that is to be read; by default all of it.

    Raises:
        UserError: A file is missing or is not what the stage wrote.
    """
    manifest = read_manifest(stage)
    inside = "" if path is None or path == stage else str(path.relative_to(stage))
    outputs = {
        stage / name: expected
        for name, expected in {**manifest["outputs"], **manifest.get("beside", {})}.items()
        if not inside or name == inside or name.startswith(f"{inside}/")
    }
    mend = f"remove {stage} and run its command again: it is made anew"
    for found in outputs:
        if not found.is_file():
            raise UserError(
                str(found), "missing; the stage had written it", "what the stage wrote", mend
            )
    with ThreadPoolExecutor() as pool:
        for found, content in zip(outputs, pool.map(file_hash, outputs), strict=True):
            if content != outputs[found]:
                raise UserError(
                    str(found), "damaged: it is not what the stage wrote", "the same bytes", mend
                )
    return manifest


def content(folder: Path, scratch: tuple[str, ...] = ()) -> dict[str, str]:
    """Return the hash of each file of a folder that takes part in a result, by its path there.

    Args:
        folder: A stage's folder, or any other.
        scratch: Its sub-folders that take no part.
    """
    return {
        str(path.relative_to(folder)): file_hash(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and path.name not in VOLATILE
        and path.relative_to(folder).parts[0] not in scratch
    }
