"""The list of errors: every one says what was found, what is expected and what to do."""

from __future__ import annotations

import pytest

from data_prep.arguments import Arguments, above_zero, at_least, writable_file
from data_prep.catalogue import catalogue, main
from data_prep.errors import UserError


def test_every_error_has_all_four_parts():
    entries = list(catalogue())
    assert len(entries) > 250
    for entry in entries:
        # What is passed on from another error has its parts.
        for part in entry[1:]:
            assert part.strip(), entry


def test_the_list_can_be_searched(capsys):
    main(["finite"])
    out = capsys.readouterr().out
    assert "what to do: " in out
    assert "pipeline/weights.py" in out
    with pytest.raises(UserError, match="no error holds 'zzzz'"):
        main(["zzzz"])


def parser() -> Arguments:
    made = Arguments("python -m test", "Words.")
    made.add_argument("--steps", type=at_least(1), default=1, help="how many")
    made.add_argument("--limit-s", type=above_zero, default=1.0)
    made.add_argument("--kind", choices=("one", "two"))
    made.add_argument("--out", type=writable_file)
    return made


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--stepps", "3"], "unknown argument '--stepps' did you mean '--steps'?"),
        (["--step", "3"], "did you mean '--steps'"),
        (["--steps", "0"], "0 is below 1"),
        (["--steps", "x"], "'x' is no whole number"),
        (["--steps"], "expected one argument"),
        (["--limit-s", "-1"], "not a finite number above 0"),
        (["--limit-s", "nan"], "not a finite number above 0"),
        (["--kind", "tow"], "unknown value 'tow' did you mean 'two'?"),
        (["--out", "/no/such/folder/file"], "no folder '/no/such/folder'"),
        (["--out", "/"], "is a folder"),
        (["stray"], "unknown argument 'stray'"),
    ],
)
def test_wrong_words_are_answered(words, expected):
    with pytest.raises(UserError) as caught:
        parser().parse_args(words)
    assert expected in str(caught.value)
    assert caught.value.expected
    assert caught.value.fix


def test_right_words_are_taken():
    known = parser().parse_args(["--steps", "3", "--limit-s", "0.5", "--kind", "one"])
    assert (known.steps, known.limit_s, known.kind) == (3, 0.5, "one")
