"""The report's first paragraph: what the numbers say, and no more than they say."""

from __future__ import annotations

from typing import Any

from eval.collect import Results

SPELLED = {"sft": "SFT", "rft": "RFT", "dpo": "DPO", "grpo": "GRPO", "ppo": "PPO"}


def spell(checkpoint: str) -> str:
    """Return a checkpoint's name as a sentence spells it."""
    return SPELLED.get(checkpoint, checkpoint)


def reading(results: Results) -> str:
    """Return a paragraph on the first suite: the best checkpoint against the first one.

    A difference is called one only where the intervals are disjoint or the interval of the
    paired difference excludes zero.
    """
    suite = results.suites[0]
    evaluated = [c for c in results.checkpoints if suite in results.figures[c]]
    first = evaluated[0]
    content = results.figures[first][suite]
    metric = f"avg@{content['n']}"
    questions = f"{content['questions']:,} questions of the suite “{suite}”"

    def figure(checkpoint: str, name: str) -> dict[str, Any]:
        return results.figures[checkpoint][suite]["figures"][name]

    comparable = [c for c in evaluated if metric in results.figures[c][suite]["figures"]]
    best = max(comparable, key=lambda c: figure(c, metric)["value"])
    words = [
        f"On {questions}, {spell(best)} answers {_range(figure(best, metric))} of its samples "
        f"correctly (95 % interval over questions)"
    ]
    parts = results.decomposition.get(suite, {}).get(best)
    if best == first or parts is None:
        is_top = best == first and len(evaluated) > 1
        words[0] += "; no later checkpoint is above it." if is_top else "."
        return " ".join(words)
    gain = parts["difference"]
    words[0] += (
        f", where {spell(first)} answers {_range(figure(first, metric))}: "
        f"{_signed(gain['value'])} points [{_signed(gain['low'])}, {_signed(gain['high'])}]"
    )
    words[0] += "." if gain["low"] > 0 else ", a difference that these questions do not establish."
    if gain["low"] > 0:
        choice, skill = parts["choice"], parts["skill"]
        words.append(
            f"Of the gain, {_signed(choice['value'])} points are the choice of style (working "
            f"the steps or answering bare) and {_signed(skill['value'])} "
            f"[{_signed(skill['low'])}, {_signed(skill['high'])}] sharper work within a style."
        )
    k = max(content["k"])
    if k > 1 and f"maj@{k}" in results.figures[best][suite]["figures"]:
        vote = _change(figure(first, f"maj@{k}"), figure(best, f"maj@{k}"))
        least = _change(figure(first, f"pass@{k}"), figure(best, f"pass@{k}"))
        words.append(
            f"Maj@{k} moves by {_signed(vote / 100)} points and Pass@{k} by {_signed(least / 100)}."
        )
        is_clear = figure(first, f"maj@{k}")["high"] < figure(best, f"maj@{k}")["low"]
        if is_clear and vote > 2 * max(least, 0.0):
            words.append(
                "The vote gains, the reach hardly does: training made likely what the first "
                "checkpoint could already do."
            )
    return " ".join(words)


def _range(figure: dict[str, Any]) -> str:
    value, low, high = (100 * figure[end] for end in ("value", "low", "high"))
    return f"{value:.1f}\u00a0% [{low:.1f},\u00a0{high:.1f}]"


def _signed(value: float) -> str:
    """Return a share in points, with its sign and never "-0.0"."""
    return f"{round(100 * value, 1) + 0.0:+.1f}".replace("-", "−")


def _change(before: dict[str, Any], after: dict[str, Any]) -> float:
    return 100 * (after["value"] - before["value"])
