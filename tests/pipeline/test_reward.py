"""Rewards of verdicts and models, term by term."""

from __future__ import annotations

import math

import pytest
from pydantic import ValidationError

from pipeline.batch import Sequence
from pipeline.model import load_tokenizer
from pipeline.reward import RewardConfig, RewardMaker, corrected
from pipeline.segments import piece_ends, token_ends
from verifiers import Outcome, Verdict

RIGHT, WRONG = Verdict(Outcome.CORRECT), Verdict(Outcome.INCORRECT)
MASKED = [Verdict(o) for o in (Outcome.TIMEOUT, Outcome.ERROR, Outcome.GOLD_UNPARSEABLE)]


class Judge:
    """Scores a completion by its first token, and a step by the place it ends at."""

    def __init__(self, factor: float = 1.0):
        self.factor = factor

    def score(self, prompts, completions):
        return [self.factor * completion[0] for completion in completions]

    def score_steps(self, prompts, completions, ends):
        return [[self.factor * (end + 1) / 10 for end in row] for row in ends]


def sample(length: int, text: str = "", first: int = 1, group: int = 0) -> Sequence:
    return Sequence([9], [first] * length, [True] * length, group, text=text)


def rewards(sequences, verdicts, judge: Judge | None = None, **options) -> list[float | None]:
    maker = RewardMaker(RewardConfig(**options), str, judge, judge)
    maker.fill(sequences, verdicts)
    return [s.reward for s in sequences]


def test_a_verdict_is_one_or_nought_and_never_a_guess():
    sequences = [sample(2) for _ in range(5)]
    assert rewards(sequences, [RIGHT, WRONG, *MASKED]) == [1.0, 0.0, None, None, None]


def test_a_missing_answer_is_wrong():
    assert rewards([sample(1)], [Verdict(Outcome.NO_ANSWER)]) == [0.0]


def test_terms_add_up_with_their_weights():
    text = r"2+2=4 \boxed{4}"
    found = rewards(
        [sample(2, text, first=3), sample(4, "no box", first=2)],
        [RIGHT, WRONG],
        Judge(),
        rule=2.0, model=0.5, model_init="x/y", format=0.25, length=0.1,
    )  # fmt: skip
    # Shortest and right: +½ of the length term; longest and wrong: −½, and half of the form (tags).
    assert found == pytest.approx([2.0 + 0.5 * 3 + 0.25 + 0.05, 0.5 * 2 + 0.25 * 0.5 - 0.05])


def test_a_wrong_answer_earns_nothing_by_being_short():
    found = rewards([sample(1), sample(3), sample(5)], [WRONG, RIGHT, RIGHT], length=1.0)
    assert found == pytest.approx([0.0, 1.0, 0.5])


def test_the_squashed_score_is_a_probability():
    found = rewards(
        [sample(1, first=2)], [None], Judge(), rule=0.0, model=1.0, model_init="x/y",
        squash="sigmoid",
    )  # fmt: skip
    assert found == pytest.approx([1 / (1 + math.exp(-2))])


def test_without_a_weight_for_the_verdict_nothing_is_masked():
    found = rewards(
        [sample(1, first=4), sample(1, first=5)], [None, MASKED[0]], Judge(),
        rule=0.0, model=1.0, model_init="x/y",
    )  # fmt: skip
    assert found == [4.0, 5.0]


def test_the_noise_correction_is_unbiased():
    """E over the verifier's errors of r′ is the true reward, for any rates."""
    for wrong, missed in ((0.0, 0.0), (0.1, 0.2), (0.3, 0.4)):
        one, nought = corrected(1.0, wrong, missed), corrected(0.0, wrong, missed)
        assert (1 - missed) * one + missed * nought == pytest.approx(1.0)
        assert wrong * one + (1 - wrong) * nought == pytest.approx(0.0)
    assert rewards([sample(1)], [RIGHT], false_accept=0.1, false_reject=0.1) == [1.125]


def test_a_score_that_is_not_finite_stops():
    with pytest.raises(FloatingPointError, match="reward model"):
        rewards([sample(1)], [RIGHT], Judge(math.nan), model=1.0, model_init="x/y")


@pytest.fixture(scope="module")
def tokenizer(checkpoint):
    return load_tokenizer(checkpoint)


def of_text(tokenizer, text: str) -> Sequence:
    ids = [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]
    return Sequence([9], ids, [True] * len(ids), 0, text=text)


def decoder(tokenizer):
    return lambda ids: tokenizer.decode(ids, skip_special_tokens=True)


def test_equations_are_rewarded_where_their_line_ends(tokenizer):
    text = "2+5=7\nnow what\n7+1=9\n\\boxed{9}"
    sequence = of_text(tokenizer, text)
    maker = RewardMaker(RewardConfig(process="steps", process_weight=0.5), decoder(tokenizer))
    maker.fill([sequence], [RIGHT])
    assert [value for _, value in sequence.steps] == [0.5, 0.0, 1.0]
    shown = [
        tokenizer.decode(sequence.completion[: end + 1], skip_special_tokens=True)
        for end, _ in sequence.steps
    ]
    assert shown[0].rstrip("\n") == "2+5=7"
    assert shown[1].rstrip("\n") == "2+5=7\nnow what\n7+1=9"
    # The whole's stands at the end token.
    assert sequence.steps[-1][0] == len(sequence.completion) - 1
    assert sequence.reward == 1.0


def test_a_process_reward_model_judges_every_line(tokenizer):
    sequence = of_text(tokenizer, "2+5=7\nso it is\n\\boxed{7}")
    config = RewardConfig(process="model", process_init="x/y", rule=0.0, format=1.0)
    maker = RewardMaker(config, decoder(tokenizer), process_scorer=Judge())
    maker.fill([sequence], [None])
    places = [end for end, _ in sequence.steps]
    assert len(places) == 4 and places == sorted(places)
    assert [v for _, v in sequence.steps] == pytest.approx(
        [(place + 1) / 10 for place in places[:3]] + [1.0]
    )


def test_a_masked_sample_has_no_steps(tokenizer):
    sequence = of_text(tokenizer, "2+5=7")
    RewardMaker(RewardConfig(process="steps"), decoder(tokenizer)).fill([sequence], [MASKED[0]])
    assert sequence.reward is None and sequence.steps == []


@pytest.mark.parametrize("text", ["2+5=7\n\\boxed{7}", "naïve 数学 ½ — 🙂 done", "", "   a  b "])
def test_token_ends_measure_the_text(tokenizer, text):
    ids = tokenizer.encode(text, add_special_tokens=False)
    decode = decoder(tokenizer)
    ends = token_ends(decode, ids)
    assert len(ends) == len(ids) and ends == sorted(ends)
    whole = decode(ids)
    assert (ends[-1] if ends else 0) == len(whole)
    for index, end in enumerate(ends):
        shown = decode(ids[: index + 1])
        if "\ufffd" not in shown:
            assert shown == whole[:end]


def test_pieces_end_in_the_token_that_holds_their_last_character():
    # Tokens "ab", "c\n", "d": lines "abc" and "d".
    assert piece_ends("abc\nd", ["abc", "d"], [2, 4, 5]) == [1, 2]
    # A piece that occurs twice is looked for after the one before.
    assert piece_ends("x x", ["x", "x"], [1, 2, 3]) == [0, 2]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"false_accept": 0.6, "false_reject": 0.4}, "below 1"),
        ({"rule": 0.0}, "every weight is 0"),
        ({"model": 1.0}, "needs model_init"),
        ({"model_init": "rm"}, "does not use it"),
        ({"process": "model"}, "needs process_init"),
        ({"retrain": 3}, "needs a reward model"),
        ({"rule": 0.0, "format": 1.0, "length": 0.1}, "needs rule"),
        ({"require": {"box": True, "boxes": True}}, "boxes"),
    ],
)
def test_a_reward_that_makes_no_sense_is_refused(options, words):
    with pytest.raises(ValidationError, match=words):
        RewardConfig(**options)
