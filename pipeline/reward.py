"""Verdict to reward: the only place where one becomes the other."""

from __future__ import annotations

from verifiers import Outcome, Verdict


def reward_of(verdict: Verdict) -> float | None:
    """Return 1 for a correct answer, 0 for a wrong or missing one, None where nobody knows.

    A verdict that could not be reached (unparseable gold, timeout, error) is masked, never
    scored 0: scoring it would teach the policy the verifier's weaknesses.
    """
    if not verdict.is_scorable:
        return None
    return 1.0 if verdict.outcome is Outcome.CORRECT else 0.0
