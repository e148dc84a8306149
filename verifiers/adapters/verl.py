"""The `compute_score` that verl loads by path and name.

custom_reward_function.path=.../boxed_verifiers/adapters/verl.py
custom_reward_function.name=compute_score

verl imports this file outside of any package, so it finds its own package first.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any


def _package() -> Any:
    """Import the package that this file lies in, under its own name."""
    home = Path(__file__).resolve().parent.parent
    try:
        found = importlib.import_module(home.name)
    except ImportError:
        found = None
    if found is None or getattr(found, "BOXED_VERIFIERS", None) is None:
        # Another `verifiers` may be there, or none: ask for this very folder.
        sys.path.insert(0, str(home.parent))
        sys.modules.pop(home.name, None)
        found = importlib.import_module(home.name)
    if Path(str(found.__file__)).resolve().parent != home:
        raise ImportError(
            f"the package {home.name!r} is {found.__file__}, expected {home}; another distribution "
            "of that name shadows it: install the wheel boxed-verifiers instead"
        )
    return found


def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: str,
    extra_info: dict[str, Any] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Score one solution as verl asks for it.

    Args:
        data_source: Name of the data set; kept in the result.
        solution_str: The model's text.
        ground_truth: The gold.
        extra_info: Not used by the judgement; a `policy` in it names how the answer
            is found.
        **options: `policy`, `correct` and `wrong` (rewards), from verl's
            `reward_kwargs`.

    Returns:
        `score` and, for verl's log, `acc`, `judged` (False where the answer could
        not be judged: mask these), `outcome`, `rule` and `pred`.

    Raises:
        ValueError: An unknown option.
    """
    known = {"policy", "correct", "wrong"}
    if set(options) - known:
        raise ValueError(f"compute_score: unknown options {sorted(set(options) - known)}")
    policy = options.get("policy") or (extra_info or {}).get("policy") or "boxed"
    verdict = _package().verify(str(ground_truth), solution_str, policy=policy)
    score = float(options.get("correct", 1.0) if verdict.is_correct else options.get("wrong", 0.0))
    return {
        "score": score,
        "acc": float(verdict.is_correct),
        "judged": verdict.is_scorable,
        "outcome": verdict.outcome.value,
        "rule": verdict.rule,
        "pred": verdict.extracted or "",
        "data_source": data_source,
    }
