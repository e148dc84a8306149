import numpy as np
import pytest

from data_prep.candidates import Candidates, token_offsets
from data_prep.selection import select


def candidates(rows):
    """Rows as (source, rank, text, question, group); every signature differs."""
    source, rank, text, question, group = (np.array(column) for column in zip(*rows, strict=True))
    n = len(rows)
    rng = np.random.default_rng(0)
    return Candidates(
        source=source.astype(np.int32),
        chunk=source.astype(np.int32),
        row=np.arange(n, dtype=np.int32),
        number=np.arange(n),
        rank=rank.astype(np.uint64),
        text_key=text.astype(np.uint64),
        question_key=question.astype(np.uint64),
        group_key=group.astype(np.uint64),
        numbers_key=np.arange(n, dtype=np.uint64),
        length=np.full(n, 10, dtype=np.int32),
        assistant=np.full(n, 4, dtype=np.int32),
        signature=rng.integers(0, 2**32, (n, 60), dtype=np.uint32),
    )


def chosen(selection):
    return sorted([*selection.train.tolist(), *selection.validation.tolist()])


def test_the_lowest_ranks_of_each_source_are_taken():
    rows = [(0, 30, 1, 1, 1), (0, 10, 2, 2, 2), (0, 20, 3, 3, 3), (1, 5, 4, 4, 4)]
    selection = select(candidates(rows), ["a", "b"], [2, 0], 0, 0.85, 0)
    assert chosen(selection) == [1, 2, 3]
    assert selection.available == [3, 1]
    assert selection.missing() == [0, 0]


def test_the_earlier_source_keeps_a_text_that_both_have():
    rows = [(1, 1, 7, 1, 1), (0, 9, 7, 1, 1), (1, 2, 8, 2, 2), (1, 3, 8, 2, 2)]
    selection = select(candidates(rows), ["a", "b"], [0, 3], 0, 0.85, 0)
    assert chosen(selection) == [1, 2]
    assert selection.duplicates == {"exact, b, also in a": 1, "exact, b, also in b": 1}
    assert selection.missing() == [0, 2]


def test_near_duplicates_lose_to_the_earlier_row_unless_their_numbers_differ():
    made = candidates([(0, n, n, n, n) for n in range(3)])
    made.signature[:] = made.signature[0]
    made.numbers_key[:] = [5, 5, 6]
    selection = select(made, ["a"], [0], 0, 0.85, 0)
    assert chosen(selection) == [0, 2]
    assert selection.duplicates == {"near, a, also in a": 1}
    assert chosen(select(made, ["a"], [0], 0, 0.0, 0)) == [0, 1, 2]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("wanted", [1, 4, 7])
def test_whole_problems_are_held_out_and_the_number_is_exact(seed, wanted):
    # Rows 0-3 are one problem through a chain of keys, 4-5 another, the rest alone.
    rows = [
        (0, 0, 0, 100, 100),
        (0, 1, 1, 101, 100),
        (0, 2, 2, 102, 101),
        (0, 3, 3, 103, 102),
        (0, 4, 4, 200, 200),
        (0, 5, 5, 200, 200),
    ]
    rows += [(0, n, n, 300 + n, 300 + n) for n in range(6, 20)]
    selection = select(candidates(rows), ["a"], [0], wanted, 0.85, seed)
    held_out = set(selection.validation.tolist())
    assert len(held_out) == wanted
    assert held_out & {0, 1, 2, 3} in (set(), {0, 1, 2, 3})
    assert held_out & {4, 5} in (set(), {4, 5})
    assert chosen(selection) == list(range(20))


def test_offsets_restart_at_every_chunk():
    made = candidates([(0, 0, 0, 0, 0), (0, 1, 1, 1, 1), (2, 2, 2, 2, 2), (2, 3, 3, 3, 3)])
    made.length[:] = [3, 4, 5, 6]
    assert token_offsets(made, 3).tolist() == [0, 3, 0, 5]
