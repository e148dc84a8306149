"""The fingerprint of a result: a hash over all that a run has made, and over no time or path.

On a CPU two runs of one resolved configuration have the same, whatever the number of workers and
however often they were killed. Its four parts say where two results part: the first one that
differs, in this order, made the others differ.
"""

from __future__ import annotations

from fnmatch import fnmatch
from pathlib import Path

from data_prep.config import fingerprint
from data_prep.manifest import read_manifest, stage_of

PARTS = {
    "parameters": ("*/checkpoint/*.safetensors",),
    "samples": ("*/samples-*.jsonl", "*/greedy-*.jsonl", "*/rollouts/step-*.jsonl"),
    "verdicts": ("*/verdicts-*.jsonl", "*/verdicts.jsonl", "*/greedy_verdicts.jsonl"),
    "figures": ("*/steps.jsonl", "*/figures.json"),
}


def result_fingerprint(run: Path) -> dict[str, str]:
    """Return a hash of each part that the run has, and of all of them under "all".

    The hashes of the files are those that the stages' manifests hold.

    Args:
        run: The run folder.

    Raises:
        UserError: A manifest is damaged.
    """
    files: dict[str, str] = {}
    for stage in sorted(path for path in run.iterdir() if path.is_dir()):
        if stage.suffix not in (".partial", ".old") and stage_of(stage) == stage:
            outputs = read_manifest(stage)["outputs"]
            files |= {f"{stage.name}/{name}": content for name, content in outputs.items()}
    found: dict[str, str] = {}
    for part, patterns in PARTS.items():
        mine = {
            name: content
            for name, content in files.items()
            if any(fnmatch(name, pattern) for pattern in patterns)
        }
        if mine:
            found[part] = fingerprint(mine)
    return {**found, "all": fingerprint(found)}
