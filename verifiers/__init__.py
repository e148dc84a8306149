r"""Text in, verdict out: a verifier suite for mathematical answers.

    >>> from verifiers import verify
    >>> verify("1/2", r"so the probability is \boxed{0.5}").outcome
    <Outcome.CORRECT: 'correct'>

A verdict is never a guess: correct, incorrect, no_answer, or a named reason why
the answer could not be judged. This package imports no sibling, no torch, and
nothing heavy until it is needed; as a wheel of its own it is `boxed_verifiers`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .checkers import Checker, load_checker
    from .grouping import group_answers
    from .judge import verify
    from .pool import VerifierPool, averify_many, verify_many
    from .verdict import Outcome, Verdict

# Another project on PyPI is also named `verifiers`; code that must be sure to have
# this one asks for this name (see `tests/verifiers`).
BOXED_VERIFIERS = "1"

_HOMES = {
    "Checker": "checkers",
    "load_checker": "checkers",
    "group_answers": "grouping",
    "verify": "judge",
    "VerifierPool": "pool",
    "averify_many": "pool",
    "verify_many": "pool",
    "Outcome": "verdict",
    "Verdict": "verdict",
}

__all__ = [
    "BOXED_VERIFIERS",
    "Checker",
    "Outcome",
    "Verdict",
    "VerifierPool",
    "averify_many",
    "group_answers",
    "load_checker",
    "verify",
    "verify_many",
]


def __getattr__(name: str) -> Any:
    """Load a public name from its file on first use."""
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f".{home}", __name__), name)
    globals()[name] = value
    return value
