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


def overlong_penalty(length: int, max_tokens: int, cache: int) -> float:
    """Return 0 up to L_max − L_cache tokens, then linear down to −1 at L_max, −1 beyond.

    A penalty that sets in softly, since a hard one would punish sound reasoning for its length.

    Args:
        length: Tokens of the completion.
        max_tokens: L_max.
        cache: L_cache; 0 is no penalty.

    Source: methods.md section 7 (DAPO's soft overlong punishment).
    """
    if cache <= 0:
        return 0.0
    return -min(1.0, max(0, length - (max_tokens - cache)) / cache)
