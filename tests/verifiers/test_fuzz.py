"""Generated inputs: no crash, no verdict over its limit, no asymmetry.

Half are mutations of real answers by a small grammar, half random Unicode. The
short run is part of the tests; `-m slow` runs 200,000.
"""

import json
import random
from pathlib import Path

import pytest

from verifiers import Outcome, VerifierPool, verify

from .work import CALLS, work

SEEDS = tuple(
    line.split(" ||| ")[side]
    for name in ("pairs_same.txt", "pairs_different.txt")
    for line in (Path(__file__).parent / name).read_text(encoding="utf-8").splitlines()
    if " ||| " in line
    for side in (0, 1)
)
PIECES = (
    "\\frac", "{", "}", "(", ")", "[", "]", "\\{", "\\}", "^", "_", "+", "-", "*", "/", "=", "<",
    ">", "\\le", "\\ne", ",", ";", ":", "|", "!", "%", "\\sqrt", "\\pi", "e", "i", "x", "y", "n",
    "0", "1", "2", "10", "999999999", "0.5", "1e9", "\\infty", "\\cup", "\\in", "\\mathbb{R}",
    "\\pm", "\\sin", "\\log", "\\text{", " and ", " or ", "\\%", "\\$", "$", "^\\circ", "\\binom",
    "\\sum_{k=1}^{n}", "\\begin{pmatrix}", "\\end{pmatrix}", "&", "\\\\", "\\left", "\\right",
    "\\int_0^1", "dx", "\\lim", "二分之一", "万", "½", "²", "−", "\u200b", "\u202e", "\u0000",
    "\ud83d", "'", "\"", "\\boxed{", "</think>", "<answer>", "####", "answer is", ".", "\n", "\t",
    "_2", "\\overline{3}", "mod", "gcd(", "cm", "km",
)  # fmt: skip


def _answer(rng: random.Random) -> str:
    """A real answer, cut, joined and spliced."""
    text = rng.choice(SEEDS)
    for _ in range(rng.choice((0, 1, 1, 2, 4, 12))):
        kind, at = rng.randrange(6), rng.randrange(len(text) + 1)
        if kind == 0:
            text = text[:at] + rng.choice(PIECES) + text[at:]
        elif kind == 1:
            text = text[:at] + text[at + rng.randrange(1, 6) :]
        elif kind == 2:
            text = text[:at] + rng.choice(SEEDS) + text[at:]
        elif kind == 3:
            end = at + rng.randrange(1, 12)
            text = text[:at] + text[at:end] * rng.randrange(2, 5) + text[end:]
        elif kind == 4:
            before, after = ("(", "{", "-", "|", "sqrt(", "2^{"), (")", "}", "|", "!", "^2")
            text = f"{rng.choice(before)}{text}{rng.choice(after)}"
        else:
            text = "".join(rng.choice(PIECES) for _ in range(rng.randrange(1, 12)))
    return text[:3000]


def _noise(rng: random.Random) -> str:
    spans = (
        (0, 0x7F), (0x80, 0x2FF), (0x370, 0x3FF), (0x2000, 0x2BFF), (0x4E00, 0x4FFF),
        (0xD7FF, 0xFFFF), (0x1D400, 0x1D7FF),
    )  # fmt: skip
    return "".join(chr(rng.randint(*rng.choice(spans))) for _ in range(rng.randrange(1, 60)))


def _rows(count: int, seed: int) -> list[tuple[str, str]]:
    rng = random.Random(seed)
    rows = []
    for index in range(count):
        make = _answer if index % 2 else _noise
        gold = rng.choice(SEEDS) if rng.random() < 0.5 else make(rng)
        answer = gold if rng.random() < 0.1 else make(rng)
        rows.append((gold, answer))
    return rows


def _faults(rows: list[tuple[str, str]]) -> list[str]:
    faults = []
    for gold, answer in rows:
        calls, there = work(gold, answer, "answer")
        back = verify(answer, gold, policy="answer")
        shown = json.dumps((gold, answer))
        for verdict in (there, back):
            if verdict.rule == "internal":
                faults.append(f"crash {verdict.detail}: {shown}")
        if calls > CALLS:
            faults.append(f"{calls} calls: {shown}")
        sides = {there.outcome, back.outcome}
        # Extraction may find a part of a longer text, which only one side is asked for;
        # whole answers must be equal both ways round, but for rounding to the gold.
        whole = all(
            v.span is None or _is_whole(v.span, t) for v, t in ((there, answer), (back, gold))
        )
        rounded = "rounded" in (there.rule, back.rule)
        if Outcome.CORRECT in sides and len(sides) > 1 and whole and not rounded:
            faults.append(f"asymmetry {there.rule} {back.rule} {back.outcome.value}: {shown}")
    return faults


def _is_whole(span: tuple[int, int], text: str) -> bool:
    return text[span[0] : span[1]].strip() == text.strip()


def test_fuzz_short() -> None:
    assert _faults(_rows(3000, seed=20)) == []


def test_fuzz_in_the_pool() -> None:
    rows = [(gold, f"so \\boxed{{{answer}}}") for gold, answer in _rows(1500, seed=21)]
    with VerifierPool(workers=2) as pool:
        verdicts = pool.verify_many(rows)
    assert [v.rule for v in verdicts if v.rule in ("internal", "worker_died", "memory_limit")] == []


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_fuzz_two_hundred_thousand() -> None:
    faults: list[str] = []
    for seed in range(20):
        faults.extend(_faults(_rows(10_000, seed=1000 + seed)))
    assert faults == []
