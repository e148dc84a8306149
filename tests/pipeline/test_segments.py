"""Solutions cut into segments: by hand, and never inside a formula, whatever the text."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.model import load_tokenizer
from pipeline.segments import cut, formulas, segments_of

WAYS = ["paragraph", "line", "sentence"]
WORKED = "12+5=17\n17-3=14\n\\boxed{14}"


def test_a_worked_solution_by_hand():
    assert cut(WORKED, "line") == (["12+5=17\n", "17-3=14\n", "\\boxed{14}"], True)
    # One paragraph of thought; the answer is a line of its own whatever the cut.
    assert cut(WORKED, "paragraph") == (["12+5=17\n17-3=14\n", "\\boxed{14}"], True)
    assert cut(WORKED, "sentence") == cut(WORKED, "line")


def test_paragraphs_lines_and_sentences_by_hand():
    text = "\nSo x=1.5. Then\ny=2.\n \n\nHence \\(z=3\\). It is $\\boxed{3}$.\nDone.\n"
    assert cut(text, "paragraph").pieces == [
        "\nSo x=1.5. Then\ny=2.\n \n\n",
        "Hence \\(z=3\\). It is $\\boxed{3}$.\nDone.\n",
    ]
    assert cut(text, "line").pieces == [
        "\nSo x=1.5. Then\n",
        "y=2.\n \n\n",
        "Hence \\(z=3\\). It is $\\boxed{3}$.\nDone.\n",
    ]
    assert cut(text, "sentence").pieces == [
        "\nSo x=1.5. ",
        "Then\n",
        "y=2.\n \n\n",
        "Hence \\(z=3\\). ",
        "It is $\\boxed{3}$.\nDone.\n",
    ]


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("See Eq. 3 and e.g. 4. Now 5.", ["See Eq. 3 and e.g. 4. ", "Now 5."]),
        ("1. First. 2 is even! Is it? yes", ["1. First. ", "2 is even! ", "Is it? yes"]),
        ("他有三。共五！", ["他有三。", "共五！"]),
        ("Pay $5. Then pay $6. End", ["Pay $5. ", "Then pay $6. ", "End"]),
        ("Say $a. B$ now. End", ["Say $a. B$ now. ", "End"]),
        ("Say $ a. B $ now. End", ["Say $ a. B $ now. ", "End"]),
        ("Say \\$a. B\\$ now.", ["Say \\$a. ", "B\\$ now."]),
    ],
)
def test_where_a_sentence_ends(text, pieces):
    assert cut(text, "sentence") == (pieces, False)


def test_the_answer_is_the_last_box_and_what_follows():
    text = "First \\boxed{1}\nno\nso $\\boxed{2}$ and $\\boxed{3}$\nbye"
    assert cut(text, "line").pieces == [
        "First \\boxed{1}\n",
        "no\n",
        "so $\\boxed{2}$ and $\\boxed{3}$\nbye",
    ]
    assert cut("\\boxed{7}", "line") == (["\\boxed{7}"], True)
    assert cut("\\[\na=1\n\n\\boxed{7}\n\\]", "line") == (["\\[\na=1\n\n\\boxed{7}\n\\]"], True)
    assert cut("no box\nhere", "line") == (["no box\n", "here"], False)
    assert cut("a box\n\\boxed{1\n2", "line") == (["a box\n", "\\boxed{1\n2"], True)
    assert cut("", "line") == ([], False)
    assert cut(" \n\n", "line") == ([" \n\n"], False)


SEPARATORS = ["\n", "\n\n", "\n \n", ". ", "! ", "。", " "]
FORMULAS = [
    "$a=1{}b$",
    "$$a{}b$$",
    "\\(a{}b\\)",
    "\\[{}a\\]",
    "\\begin{{align*}}a{}b\\end{{align*}}",
    "\\begin{{cases}}a{}\\begin{{cases}}b{}\\end{{cases}}c{}\\end{{cases}}",
    "<<1+1{}=2>>",
]
WORDS = ["Then", "x=1.5", "12+5=17", "so", "e.g.", "他有三"]
formula = st.builds(
    lambda form, inner: form.format(*[inner] * form.count("{}")),
    st.sampled_from(FORMULAS),
    st.sampled_from(SEPARATORS),
).filter(lambda text: not (text.startswith("$a") and "\n\n" in text) and "\n \n" not in text)
block = st.one_of(st.sampled_from(WORDS), formula, st.just("\\boxed{3}"))
blocks = st.lists(st.tuples(block, st.sampled_from(SEPARATORS)), max_size=12)


@given(blocks, st.sampled_from(WAYS))
def test_pieces_add_up_and_no_formula_is_cut(parts, by):
    text = "".join(a + b for a, b in parts)
    pieces, answered = cut(text, by)
    assert "".join(pieces) == text
    assert answered is ("\\boxed" in text)
    assert all(piece.strip() for piece in pieces) or len(pieces) == 1
    if answered:
        assert "\\boxed" in pieces[-1]
    ends, position = set(), 0
    for piece in pieces[:-1]:
        position += len(piece)
        ends.add(position)
    position = 0
    for inner, separator in parts:
        assert not ends & set(range(position + 1, position + len(inner)))
        position += len(inner) + len(separator)


@given(st.text(alphabet="ab$\\[]()\n .!<>{}1", max_size=60), st.sampled_from(WAYS))
def test_any_text_adds_up_again(text, by):
    assert "".join(cut(text, by).pieces) == text


def test_finer_ways_keep_the_coarser_cuts():
    text = "One. Two.\nThree\n\nFour. $a$ Five\n\n\\boxed{6}"
    ends = []
    for by in WAYS:
        pieces = cut(text, by).pieces
        ends.append({sum(map(len, pieces[: i + 1])) for i in range(len(pieces))})
    assert ends[0] < ends[1] < ends[2]


def test_formulas_that_never_end_are_none():
    assert formulas("\\[ a \\( b $ c $$ d \\begin{x} e << f") == []
    assert formulas("\\[ a $b$") == [(5, 8)]
    # Ends of environments that are crossed over end what they name.
    assert formulas("\\begin{a}\\begin{b}\\end{a}\\end{b}") == [(0, 25)]


@pytest.mark.parametrize("unit", ["\\begin{a}", "\\[", "$a ", "<<", "\\end{a}", ". ", "\n \n"])
def test_a_long_text_of_marks_is_cut(unit):
    """A quarter million characters, on which a quadratic way would take minutes."""
    text = unit * (250_000 // len(unit))
    assert "".join(cut(text, "sentence").pieces) == text


@pytest.fixture(scope="module")
def tokenizer(checkpoint):
    return load_tokenizer(checkpoint)


@given(parts=blocks, by=st.sampled_from(WAYS))
def test_every_token_is_in_exactly_one_segment(tokenizer, parts, by):
    text = "".join(a + b for a, b in parts) or "x"
    ids = tokenizer.encode(text, add_special_tokens=False)
    ids.append(tokenizer.eos_token_id)

    def decode(tokens):
        return tokenizer.decode(tokens, skip_special_tokens=True)

    texts, numbers, answered = segments_of(decode, ids, text, by)
    assert len(numbers) == len(ids)
    assert sorted(set(numbers)) == list(range(len(texts)))
    assert numbers == sorted(numbers)
    assert "".join(texts) == text
    assert answered is cut(text, by).answered
    # What a segment's tokens say is its text, but for a token that lies across a cut.
    for number, expected in enumerate(texts):
        said = decode([t for t, n in zip(ids, numbers, strict=True) if n == number])
        assert said.strip() in text
        assert abs(len(said) - len(expected)) <= 8


def test_segments_of_tokens_by_hand(tokenizer):
    ids = tokenizer.encode(WORKED, add_special_tokens=False)
    found = segments_of(tokenizer.decode, [*ids, tokenizer.eos_token_id], WORKED, "line")
    assert found.texts == ["12+5=17\n", "17-3=14\n", "\\boxed{14}"]
    breaks = [i for i, t in enumerate(ids) if "\n" in tokenizer.decode([t])]
    first, second = breaks
    assert found.numbers == [0] * (first + 1) + [1] * (second - first) + [2] * (len(ids) - second)


def test_only_an_end_token_is_one_segment(tokenizer):
    assert segments_of(str, [tokenizer.eos_token_id], "", "line") == ([""], [0], False)
