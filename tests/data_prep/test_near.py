import random

import numpy as np

from data_prep.near import near_duplicates, numbers_key, signatures
from data_prep.normalise import normalise

WORDS = [f"word{letter}{other}" for letter in "abcdefghij" for other in "klmnopqrst"]


def text(seed, length=120):
    rng = random.Random(seed)
    return " ".join(rng.choices(WORDS, k=length)) + f" costs {seed} coins"


def found(texts, threshold=0.8):
    normals = [normalise(one) for one in texts]
    numbers = np.array([numbers_key(one) for one in normals], dtype=np.uint64)
    return near_duplicates(signatures(normals), numbers, threshold)


def test_a_text_with_a_word_changed_is_a_near_duplicate():
    originals = [text(seed) for seed in range(40)]
    changed = [one.replace(one.split()[50], "other", 1) for one in originals]
    assert found(originals + changed) == {40 + n: n for n in range(40)}


def test_texts_with_other_numbers_are_other_problems():
    originals = [text(seed) for seed in range(40)]
    other = [one.replace(" coins", "0 coins") for one in originals]
    assert found(originals + other) == {}


def test_different_texts_are_not_near():
    assert found([text(seed) for seed in range(300)], threshold=0.5) == {}


def test_the_earlier_row_stays():
    one = text(1)
    near = one.replace(one.split()[30], "other", 1)
    assert found([near, one]) == {1: 0}


def test_the_estimate_is_close_to_the_true_similarity():
    one = [f"w{n}" for n in range(400)]
    two = one[:300] + [f"v{n}" for n in range(100)]
    a, b = signatures([" ".join(one), " ".join(two)])
    shingles = [{tuple(x[i : i + 5]) for i in range(396)} for x in (one, two)]
    true = len(shingles[0] & shingles[1]) / len(shingles[0] | shingles[1])
    # Standard deviation of the estimate with 60 permutations is about 0.063.
    assert abs(float((a == b).mean()) - true) < 4 * 0.063
    assert signatures([]).shape == (0, 60)
