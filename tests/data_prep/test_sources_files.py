import pytest

from data_prep.reading import Drop
from data_prep.sources._files import end_in_box, final_answer, last_box, settle
from data_prep.sources.gsm8k import split_answer
from data_prep.sources.orca_math import find_answer
from verifiers import verify


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("so $\\boxed{5}$.", "5"),
        ("\\boxed{1} then \\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
        ("\\boxed {a\\}b} end", "a\\}b"),
        ("it is \\boxed 7.", "7"),
        ("\\fbox{9}", "9"),
    ],
)
def test_the_last_box_is_read(text, expected):
    content, end = last_box(text)
    assert content == expected
    assert text[:end].rstrip("}").endswith(expected.rstrip("}"))


@pytest.mark.parametrize("text", ["no box", "\\boxed{5", "\\boxed", "\\boxed{{5}", "\\boxedfoo{5}"])
def test_an_incomplete_box_is_none(text):
    assert last_box(text) is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("$\\boxed{(-2,18)}$ and $\\boxed{(8,38)}$.", "(-2,18), (8,38)"),
        ("$\\boxed{x+11}$ or $\\boxed{11+x}$.", "11+x"),
        ("first \\boxed{3}. But no: it is \\boxed{4}.", "4"),
        ("\\boxed{}", None),
        ("nothing", None),
    ],
)
def test_boxes_side_by_side_are_one_answer(text, expected):
    assert final_answer(text) == expected
    if expected is not None:
        assert verify(expected, end_in_box(text, expected)).is_correct


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("so \\boxed{5}", True),
        ("so $\\boxed{5}$.", True),
        ("so \\[ x = \\boxed{5} \\]", True),
        ("so \\boxed{5} pens are left", False),
        ("so 5", False),
    ],
)
def test_a_solution_ends_in_its_box(text, kept):
    ended = end_in_box(text, "5")
    assert ended == (text if kept else f"{text}\nThe answer is \\boxed{{5}}")


def test_a_box_that_contradicts_the_gold_drops_the_row():
    assert settle("so \\boxed{0.5}", "\\frac{1}{2}") == "so \\boxed{0.5}"
    with pytest.raises(Drop, match="answer_contradicts_box"):
        settle("so \\boxed{4}", "5")
    # Also where the text goes on after it, so that a box with the gold would be added.
    with pytest.raises(Drop, match="answer_contradicts_box"):
        settle("so \\boxed{4} pens", "5")


@pytest.mark.parametrize(
    ("question", "answer", "expected"),
    [
        ("Jo is in 5th place.", "If Jo is in 5th place, then 4 people were faster.", "4"),
        ("What is 3 times 4?", "3 * 4 = 12\nSo the answer is 1,200.", "1200"),
        ("He has 7 pens and 2 caps.", "Of the 7 pens, 5 are left.", "5"),
        ("He has 7 pens.", "He gives 3 and 2 of them away.", None),
        ("Who won?", "Mia won.", None),
        ("How much?", "It costs $\\boxed{3}$ and 4 more.", "3"),
        ("How much?", "It costs 3.50 dollars.", "3.50"),
    ],
)
def test_an_answer_in_free_text_is_taken_only_where_there_is_no_choice(question, answer, expected):
    assert find_answer(question, answer) == expected


def test_gsm8ks_annotations_and_separators_go():
    gold, solution = split_answer("He has 2*3=<<2*3=6>>6,000.\n#### $6,000 ", "x, line 1")
    assert (gold, solution) == ("6000", "He has 2*3=6,000.")
