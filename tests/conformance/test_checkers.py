"""Every checker keeps the contract; `python -m verifiers check` runs the same on yours."""

import importlib.util

import pytest

from verifiers.checkers import kinds
from verifiers.conformance import CHECKS

# Nothing listens on the discard port: graders by model must say that they could not judge.
NOWHERE = {"base_url": "http://127.0.0.1:9/v1", "retries": 0, "timeout_s": 0.5}
OPTIONS = {"score_model": NOWHERE, "label_model": NOWHERE}
NEEDS = {"math_verify": "math_verify", "text_similarity": "rapidfuzz"}


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("kind", kinds())
def test_checker(kind: str, check: str) -> None:
    library = NEEDS.get(kind)
    if library is not None and importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed")
    assert CHECKS[check](kind, dict(OPTIONS.get(kind, {}))) is None
