"""Verifies every equation of a solution: a reward for each step."""

from __future__ import annotations

import re
import time

from ..equality import UndecidedError, equal, symbols
from ..extract import check_policy
from ..judge import verify
from ..nodes import Node
from ..reading import read
from ..views import is_name
from . import Checker, Outcome, Verdict

SPLITS = {"line": re.compile(r"\n+"), "paragraph": re.compile(r"\n\s*\n+")}
_MATH = re.compile(
    r"\$\$(.+?)\$\$|\\\[((?:(?!\\\[).)+?)\\\]|\\\(((?:(?!\\\().)+?)\\\)|\$([^$]+)\$|<<([^<>]+)>>",
    re.DOTALL,
)
_PLAIN = re.compile(r"[-+\d.(][-+*/×÷^().,\d\s%$]*=\s*\$?\s*[-+]?[\d.,]+(?:/\d+)?%?")
_MAX_STEPS = 400
_MAX_EQUATIONS = 40
_WORK_S = 0.6


class StepsChecker(Checker):
    r"""Judges the answer as `boxed` does, and gives each step a reward.

    A step's reward is the share of its equations that hold; None where it states no
    equation that can be checked. An equation can be checked when both sides are
    numbers, or when they hold for all values of their variables; `x = 5` states
    something new and is left out. The score is the mean of the rewards that are
    not None.

    Args:
        split: Steps are lines or paragraphs; a formula is never cut.
        policy: How the answer is found.
    """

    examples = (
        ("7", "2 + 5 = 7\nso \\boxed{7}", "correct"),
        ("7", "2 + 5 = 8\nso \\boxed{8}", "incorrect"),
        ("7", "2 + 5 = 7\nso \\boxed{}", "no_answer"),
        ("", r"\boxed{7}", "gold_unparseable"),
    )

    def __init__(self, split: str = "line", policy: str = "boxed") -> None:
        """Check the options.

        Raises:
            ValueError: An unknown split or policy.
        """
        if split not in SPLITS:
            raise ValueError(f"steps: split is {split!r}, expected one of {', '.join(SPLITS)}")
        self.split, self.policy = split, check_policy(policy)

    def check(self, gold: str, text: str) -> Verdict:
        """Judge the answer and every step."""
        started = time.perf_counter()
        final = verify(gold, text, policy=self.policy)
        rewards: list[float | None] = []
        late = False
        for step in split_steps(text, self.split)[:_MAX_STEPS]:
            late = late or time.perf_counter() - started > _WORK_S
            rewards.append(None if late else step_reward(step))
        known = [reward for reward in rewards if reward is not None]
        return Verdict(
            final.outcome if not late or not final.is_scorable else Outcome.TIMEOUT,
            final.extracted,
            final.span,
            final.gold_normal,
            final.answer_normal,
            final.rule,
            (time.perf_counter() - started) * 1000.0,
            f"{len(known)} of {len(rewards)} steps have equations"
            + ("; the rest took too long" if late else ""),
            sum(known) / len(known) if known else None,
            tuple(rewards),
        )


def split_steps(text: str, split: str = "line") -> list[str]:
    """Cut a solution into steps, never inside a formula.

    Args:
        text: A solution.
        split: `line` or `paragraph`.

    Returns:
        The steps without empty ones.
    """
    held: list[str] = []

    def hold(match: re.Match[str]) -> str:
        held.append(match.group())
        return f"\x00{len(held) - 1}\x00"

    masked = _MATH.sub(hold, text)
    parts = SPLITS[split].split(masked)
    restored = [re.sub(r"\x00(\d+)\x00", lambda m: held[int(m.group(1))], p) for p in parts]
    return [part.strip() for part in restored if part.strip()]


def step_reward(step: str) -> float | None:
    """Return the share of a step's equations that hold; None when none can be checked."""
    results = [result for formula in _formulas(step) for result in _links(formula)]
    known = [result for result in results[:_MAX_EQUATIONS] if result is not None]
    return sum(known) / len(known) if known else None


def _formulas(step: str) -> list[str]:
    found = [next(filter(None, m.groups())) for m in _MATH.finditer(step)]
    rest = _MATH.sub(" ", step)
    found.extend(m.group() for m in _PLAIN.finditer(rest))
    return [formula for formula in found if "=" in formula or "approx" in formula]


def _links(formula: str) -> list[bool | None]:
    """Check each link of a chain a = b = c."""
    nodes = read(formula.strip().rstrip(".,;")).nodes
    if not nodes:
        return []
    items = nodes[0][1] if nodes[0][0] == "list" else (nodes[0],)
    out: list[bool | None] = []
    for item in items:
        if item[0] != "rel":
            continue
        parts = item[1]
        for index in range(0, len(parts) - 2, 2):
            out.append(_holds(parts[index], parts[index + 1], parts[index + 2]))
    return out


def _holds(left: Node, operator: str, right: Node) -> bool | None:
    if operator not in ("=", "approx"):
        return None
    left, right = _value(left), _value(right)
    named = is_name(left) or is_name(right)
    try:
        same = equal(left, right)
    except (UndecidedError, TypeError, IndexError):
        return None
    if same:
        return None if named else True
    if symbols(left) or symbols(right):
        return None
    if named:
        return None
    from ..scalars import decimal
    from ..scalars import same as same_value

    if operator == "approx" or decimal(right) is not None:
        # "1/3 = 0.33" and "1/3 ≈ 0.33" are both read as rounding.
        return _rounds(left, right)
    try:
        return bool(same_value(left, right))
    except UndecidedError:
        return None


def _rounds(left: Node, right: Node) -> bool | None:
    from ..equality import approximate
    from ..scalars import decimal

    exact, shown = approximate(left), approximate(right)
    if exact is None or shown is None:
        return None
    written = decimal(right)
    step = float(written.step) if written is not None else 1.0
    return abs(exact - shown) <= step / 2 * (1 + 1e-9)


def _value(node: Node) -> Node:
    return _value(node[1]) if node[0] == "qty" else node
