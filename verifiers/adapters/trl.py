"""A reward function for TRL's `GRPOTrainer` and its relatives."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..pool import VerifierPool

Completion = str | Sequence[Mapping[str, Any]]
RewardFunction = Callable[..., list[float | None]]


def make_math_reward(
    *,
    column: str = "solution",
    correct: float = 1.0,
    wrong: float = 0.0,
    policy: str = "boxed",
    workers: int = 2,
    time_limit_s: float = 1.0,
    memory_limit_mb: int = 512,
) -> RewardFunction:
    """Build a reward function.

    Its worker processes start on first use and end with the program.

    Args:
        column: Column of the data set that holds the gold.
        correct: Reward of a correct answer.
        wrong: Reward of an incorrect or absent answer.
        policy: How answers are found.
        workers: Number of processes.
        time_limit_s: Wall time for one completion, seconds.
        memory_limit_mb: Memory of one process, MiB.

    Returns:
        A function as TRL calls it: `f(completions=..., solution=..., **rest)` gives
        one float a completion, or None, which TRL leaves out, where the answer could
        not be judged.
    """
    lock = threading.Lock()
    pools: list[VerifierPool] = []

    def pool() -> VerifierPool:
        with lock:
            if not pools:
                pools.append(
                    VerifierPool(
                        "boxed", {"policy": policy}, workers=workers, time_limit_s=time_limit_s,
                        memory_limit_mb=memory_limit_mb,
                    )
                )  # fmt: skip
            return pools[0]

    def math_reward(completions: Sequence[Completion], **columns: Any) -> list[float | None]:
        """Judge completions; see `make_math_reward`."""
        if column not in columns:
            raise ValueError(
                f"math_reward: no column {column!r}; found {sorted(columns)}; name the "
                "gold's column with make_math_reward(column=...)"
            )
        golds = columns[column]
        rows = [(str(g), text_of(c)) for g, c in zip(golds, completions, strict=True)]
        return [
            (correct if v.is_correct else wrong) if v.is_scorable else None
            for v in pool().verify_many(rows)
        ]

    return math_reward


def text_of(completion: Completion) -> str:
    """Return the text of a completion, which is a string or a list of chat messages."""
    if isinstance(completion, str):
        return completion
    for message in reversed(completion):
        if message.get("role", "assistant") == "assistant":
            content = message.get("content") or ""
            if isinstance(content, str):
                return content
            return "".join(part.get("text", "") for part in content)
    return ""


math_reward = make_math_reward()
"""The reward function with its defaults: golds in the column `solution`."""
