import json

import pytest

from data_prep.decontaminate import Index, Question, content, is_copy
from data_prep.normalise import normalise

COPIES = [
    ("Find $x+y+z.$", "What is the value of $x+y+z$?"),
    (
        "Let $S$ be the set of all segments of length 2.",
        "Let $\\cal S$ be the set of all segments of length $2$.",
    ),
    (
        "What is the length of $\\overline{PQ}$ tangent to $C_1$ at $P$?",
        "What is the length of $PQ$ tangent to $C_1$ at $P$?",
    ),
    (
        "Find the ordered pair $(a,b)$ with $x^2+ax+b=0$.",
        "What is the pair $(a,b)$ with $x^{2} + ax + b = 0$?",
    ),
]
TWINS = [
    ("Compute $\\sin 30$ and add 4 to it.", "Compute $\\cos 30$ and add 4 to it."),
    (
        "What is the minimum value of $x^2+y^2=14x+48y$?",
        "What is the maximum value of $x^2+y^2=14x+48y$?",
    ),
    ("What is the sum of the factors of 315?", "What is the sum of the factors of 735?"),
    ("How many digits if none may be repeated?", "How many digits if any may be repeated?"),
    ("How many if a digit may be repeated?", "How many if a digit may not be repeated?"),
    ("Find the letter of the graph of $y=f(-x)$.", "Find the letter of the graph of $y=-f(x)$."),
    (
        "Put 4 distinguishable balls into 2 indistinguishable boxes.",
        "Put 4 indistinguishable balls into 2 distinguishable boxes.",
    ),
    ("Let $x^8 - 98x^4 + 1 = p(x)q(x)$.", "Let $x^8 + 98x^4 + 1 = p(x)q(x)$."),
    ("Tom has six of the ten boxes.", "Tom has five of the ten boxes."),
]


@pytest.mark.parametrize(("one", "two"), COPIES)
def test_copies_are_found_in_both_directions(one, two):
    assert is_copy(content(one), content(two))
    assert is_copy(content(two), content(one))


@pytest.mark.parametrize(("one", "two"), TWINS)
def test_twins_of_a_family_are_not_copies(one, two):
    assert not is_copy(content(one), content(two))


def test_an_exact_copy_is_told_from_a_flagged_one():
    index = Index([Question("s", "s.jsonl, line 1", "What is $\\dfrac{1}{2}$ of  7 PENS?")])
    exact = index.find("what is \\frac{1}{2} of 7 pens?")
    assert exact is not None
    assert exact.is_exact
    flagged = index.find("Calculate \\frac{1}{2} of 7 pens.")
    assert flagged is not None
    assert not flagged.is_exact
    assert index.find("What is \\frac{1}{2} of 8 pens?") is None


def test_short_questions_are_compared_whole():
    index = Index([Question("s", "x", "小明有 5 个苹果，吃了 2 个，还剩几个？")])
    assert index.find("小明有5个苹果，吃了2个，还剩几个?") is not None
    assert index.find("小明有5个苹果，吃了3个，还剩几个?") is None


def test_normalising_keeps_what_matters():
    assert normalise("$ X  +  1 $") == normalise("x+1")
    assert normalise("“Ｆｕｌｌ” width—dash") == normalise('"full" width-dash')
    assert normalise("$\\left( \\dfrac12 \\right)$") == normalise("(\\frac12)")
    assert normalise("a -b") != normalise("a +b")
    assert normalise("12") != normalise("1 2")
    assert normalise("\\leftarrow x") != normalise("\\rightarrow x")


def test_on_maths_own_splits_only_real_copies_are_flagged(shared):
    def read(name):
        lines = shared(name).read_text(encoding="utf-8").splitlines()
        return [json.loads(line)["problem"] for line in lines]

    train, test = read("math/train.jsonl"), read("math/test.jsonl")
    index = Index([Question("math", str(n), text) for n, text in enumerate(test)])
    leaks = {}
    for text in train:
        leak = index.find(text)
        if leak is not None:
            leaks[int(leak.question.where)] = leak.is_exact
    # All eleven were read side by side: the same question with the same answer. (13-grams of
    # words flag 589 of these 5,000.)
    assert sorted(leaks) == [119, 311, 320, 1038, 1086, 1921, 2087, 2436, 2752, 3023, 4656]
    assert sorted(n for n, is_exact in leaks.items() if is_exact) == [119, 1038, 3023, 4656]


def test_gsm8k_has_no_copies_across_its_splits(shared):
    def read(name):
        lines = shared(name).read_text(encoding="utf-8").splitlines()
        return [json.loads(line)["question"] for line in lines]

    index = Index([Question("gsm8k", str(n), t) for n, t in enumerate(read("gsm8k/test.jsonl"))])
    assert [text for text in read("gsm8k/train.jsonl") if index.find(text)] == []
