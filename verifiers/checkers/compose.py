"""Several checkers as one."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from . import Checker, Outcome, Verdict, load_checker

MODES = ("all", "any", "weighted")


class ComposeChecker(Checker):
    """Combines the verdicts of other checkers.

    `all`: right when every part is right. `any`: right when one is. `weighted`:
    the score is the weighted mean of the parts' scores (1 or 0 for parts without
    one), and it is right from `threshold` on. What a part could not judge is never
    counted as wrong: unless the other parts settle it, the whole has that part's
    outcome.

    Args:
        parts: Mappings with `kind`, and optionally `options` and `weight`.
        mode: How to combine.
        threshold: For `weighted`.
    """

    examples = (
        ("7", r"so \boxed{7}", "correct"),
        ("7", r"so \boxed{8}", "incorrect"),
    )

    def __init__(
        self,
        parts: Sequence[Mapping[str, Any]] = ({"kind": "boxed"}, {"kind": "format"}),
        mode: str = "all",
        threshold: float = 0.5,
    ) -> None:
        """Load the parts.

        Raises:
            ValueError: No parts, an unknown mode or key, or a part that does not load.
        """
        if mode not in MODES:
            raise ValueError(f"compose: mode is {mode!r}, expected one of {', '.join(MODES)}")
        if not parts:
            raise ValueError("compose: parts is empty, expected at least one {kind: ...}")
        self.mode, self.threshold = mode, threshold
        self.parts: list[tuple[str, Checker, float]] = []
        for index, part in enumerate(parts):
            extra = set(part) - {"kind", "options", "weight"}
            if extra or "kind" not in part:
                raise ValueError(
                    f"compose: parts[{index}] has keys {sorted(part)}, expected kind and "
                    "optionally options and weight"
                )
            weight = float(part.get("weight", 1.0))
            if not weight > 0:
                raise ValueError(f"compose: parts[{index}].weight is {weight}, expected above 0")
            checker = load_checker(part["kind"], part.get("options"))
            self.parts.append((part["kind"], checker, weight))

    def check(self, gold: str, text: str) -> Verdict:
        """Judge by every part."""
        started = time.perf_counter()
        verdicts = [(k, c.quick(gold, text) or c.check(gold, text), w) for k, c, w in self.parts]
        outcome, score = self._combine([(v, w) for _, v, w in verdicts])
        first = verdicts[0][1]
        return Verdict(
            outcome,
            first.extracted,
            first.span,
            first.gold_normal,
            first.answer_normal,
            f"compose_{self.mode}",
            (time.perf_counter() - started) * 1000.0,
            "; ".join(f"{kind}: {v.outcome.value} ({v.rule})" for kind, v, _ in verdicts),
            score,
        )

    def _combine(self, verdicts: list[tuple[Verdict, float]]) -> tuple[Outcome, float | None]:
        unjudged = next((v.outcome for v, _ in verdicts if not v.is_scorable), None)
        right = [v.is_correct for v, _ in verdicts if v.is_scorable]
        if self.mode == "weighted":
            if unjudged is not None:
                return unjudged, None
            total = sum(w for _, w in verdicts)
            score = sum(w * _score(v) for v, w in verdicts) / total
            return (Outcome.CORRECT if score >= self.threshold else Outcome.INCORRECT), score
        settled = not all(right) if self.mode == "all" else any(right)
        if unjudged is not None and not settled:
            return unjudged, None
        good = all(right) if self.mode == "all" else any(right)
        return (Outcome.CORRECT if good else Outcome.INCORRECT), None


def _score(verdict: Verdict) -> float:
    return float(verdict.is_correct) if verdict.score is None else verdict.score
