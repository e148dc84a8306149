"""Texts made to be slow: bounded work in this process, whatever they hold."""

import pytest

from verifiers import verify

from .work import CALLS, work

GOLDS = ("7", "x+1", r"\{\sqrt2,\sqrt3\}", "x>3", r"\begin{pmatrix}1\\2\end{pmatrix}")
TEXTS = {
    "app": "x(" * 55 + "1+1" + ")" * 55,
    "rel": "a(a=" * 25 + "1" + ")" * 25,
    "mixed": "1\\frac{" * 25 + "1" + "}{2}" * 25,
    "spaces": "$" + " " * 200000 + "7$",
    "thin": "\\," * 29000 + "7",
    "sumsum": r"\sum_{i=1}^{1000}\sum_{j=1}^{1000}\sum_{k=1}^{1000} \sqrt{i+j+k}",
    "set400": "\\{" + ",".join(f"\\sqrt{{{i}}}" for i in range(2, 300)) + "\\}",
    "ints": "\\int" * 3000 + "x dx",
    "frac": "\\frac12" * 3000,
    "cos": "\\cos(" * 50 + "x" + ")" * 50,
    "poly": "+".join(f"x^{{{i}}}\\sin({i}x)" for i in range(600)),
    "tower": "2^{" * 30 + "2" + "}" * 30,
    "fact": "(2000!)^{20}",
    "binom": "\\binom{20000}{10000}+x",
    "root": "\\sqrt{" * 50 + "2" + "}" * 50,
    "cont": "\\frac{1}{1+" * 50 + "x" + "}" * 50,
    "longnum": "0." + "3" * 3900,
    "newlines": "\n" * 100000 + "7",
    "brace": "{" * 1000 + "7" + "}" * 1000,
    "pm": "\\pm".join(["1"] * 2000),
    "words": "word " * 10000,
    "eq": "=".join(["1+1"] * 2000),
    "eqx": "=".join(["x+\\sin x"] * 500),
    "abs": "|" * 400 + "x" + "|" * 400,
    "comma": ",".join("12345"),
    "text": "\\text{" * 2000,
    "quad": "\\quad " * 10000 + "7",
    "list": ",".join(["x"] * 2999),
    "ge": "\\le".join(["x"] * 1000),
    "cup": "\\cup".join(f"({i},{i}.5)" for i in range(190)),
    "sq": "a" * 50000,
    "dig": "1 " * 20000,
    "deg": "^\\circ" * 500,
    "gcd": "\\gcd(10^{3000},6^{3000})",
    "think": "<think>" * 20000,
    "ans": "<answer>" * 20000,
    "hash": "#### " * 20000,
    "inl": "\\(" * 30000,
    "bra": "\\[" * 30000,
    "star": "**" * 30000,
    "dol": "$$" * 20001,
}


@pytest.mark.parametrize("name", TEXTS)
def test_the_work_is_bounded(name: str) -> None:
    for gold in GOLDS:
        boxed, bare = f"\\boxed{{{TEXTS[name]}}}", TEXTS[name]
        for text, policy in ((boxed, "boxed"), (bare, "answer"), (bare, "boxed")):
            calls, verdict = work(gold, text, policy)
            assert calls < CALLS, (gold, policy, verdict.rule)
            assert verdict.rule != "internal", verdict.detail


def test_long_completions_cost_little() -> None:
    text = "word and $x = 5$ then \\boxed{3}. " * 25_000 + "\\boxed{7}"
    calls, verdict = work("7", text)
    assert verdict.is_correct
    assert calls < CALLS
    assert verify("7", "a" * 1_000_001).rule == "text_too_long"


@pytest.mark.parametrize("parts", [("a(a=", ")"), ("1\\frac{", "}{2}")])
def test_nesting_does_not_double_the_work(parts: tuple[str, str]) -> None:
    """Half as deep again is at most twice the work; doubling by level would be 4,096 times."""
    shallow, deep = (
        work("7", f"\\boxed{{{parts[0] * depth + '1' + parts[1] * depth}}}")[0]
        for depth in (24, 36)
    )
    assert deep < 2.5 * shallow + 2000
