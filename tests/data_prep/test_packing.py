import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.packing import best_fit, efficiency, training_sequences


def plain_best_fit(lengths, capacity):
    """Best-fit decreasing by looking at every sequence."""
    rooms, bins, stack = [], [], {}
    for row in sorted(range(len(lengths)), key=lambda row: (-lengths[row], row)):
        fitting = [i for i, room in enumerate(rooms) if room >= lengths[row]]
        if fitting:
            best = min(rooms[i] for i in fitting)
            # Among equal rooms the one that came to it last, as on a stack.
            index = stack[best].pop()
        else:
            index, best = len(bins), capacity
            bins.append([])
            rooms.append(capacity)
        bins[index].append(row)
        rooms[index] = best - lengths[row]
        stack.setdefault(rooms[index], []).append(index)
    return bins


@given(st.lists(st.integers(1, 40), max_size=60))
def test_it_is_best_fit_decreasing(lengths):
    assert best_fit(lengths, 40) == plain_best_fit(lengths, 40)


@given(st.lists(st.integers(1, 100), max_size=200), st.integers(0, 5))
def test_every_row_is_packed_once_and_whole(lengths, seed):
    for packing in ("best_fit", "none"):
        sequences = training_sequences(lengths, 100, packing, seed)
        assert sorted(row for sequence in sequences for row in sequence) == list(
            range(len(lengths))
        )
        assert all(sum(lengths[row] for row in sequence) <= 100 for sequence in sequences)


def test_a_worked_example():
    # 6 goes first, then 5, 4 joins 6 (room 4 is the least that fits), 3 joins 5, 2 joins them.
    assert best_fit([3, 6, 4, 5, 2], 10) == [[1, 2], [3, 0, 4]]


def test_sequences_are_nearly_full_on_lengths_like_real_ones():
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(5.8, 0.7, 20000).astype(int), 20, 4096)
    sequences = best_fit(lengths, 4096)
    assert efficiency(lengths, len(sequences), 4096) > 0.98


def test_a_row_that_does_not_fit_is_an_error():
    with pytest.raises(ValueError, match="a row of 11 tokens, more than 10"):
        best_fit([3, 11], 10)


def test_no_rows_are_no_sequences():
    assert best_fit([], 10) == []
    assert efficiency([], 0, 10) == 0.0
