"""What the verifier tests share: the guard against another `verifiers`, the local data."""

import json
from pathlib import Path

import pytest

import verifiers

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared"

if getattr(verifiers, "BOXED_VERIFIERS", None) is None:
    raise ImportError(
        f"'verifiers' is {verifiers.__file__}, another distribution of that name, expected the "
        f"folder {ROOT / 'verifiers'}: run from the root of the repository, or uninstall the other"
    )


def shared_file(name: str) -> Path:
    """Return a file of the local data, or skip."""
    path = SHARED / name
    if not path.is_file():
        pytest.skip(f"local data ../shared/{name} is not here")
    return path


def shared_rows(name: str) -> list:
    """Return the rows of a file of the local data, or skip."""
    with shared_file(name).open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


@pytest.fixture
def pairs() -> list:
    return shared_rows("verifier_pairs/pairs.jsonl")


@pytest.fixture
def adversarial(tmp_path: Path) -> tuple[list, Path]:
    rows = shared_rows("verifier_pairs/adversarial.jsonl")
    canary = tmp_path / "canary"
    for row in rows:
        for key in ("gold", "pred"):
            row[key] = row[key].replace("CANARY_PATH", str(canary))
    return rows, canary


@pytest.fixture
def gold_file():
    return shared_file
