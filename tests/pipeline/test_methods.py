"""Numbers worked by hand."""

from __future__ import annotations

import math

import pytest
import torch

from pipeline.advantage import normalised
from pipeline.batch import Sequence, flatten
from pipeline.methods import dpo, grpo, rft
from pipeline.reward import reward_of
from verifiers import Outcome, Verdict


def test_group_advantage_known_value():
    advantages = normalised([1.0, 0, 0, 0, 0, 0, 0, 0], 0.0)
    assert advantages[0] == pytest.approx(2.6458, abs=5e-5)
    assert advantages[1:] == pytest.approx([-0.3780] * 7, abs=5e-5)


@pytest.mark.parametrize("value", [0.0, 1.0, 0.1])
def test_equal_rewards_give_exactly_zero(value):
    assert normalised([value] * 7, 1e-6) == [0.0] * 7


def sample(group: int, correct: bool | None, text: str = "", length: int = 3) -> Sequence:
    reward = None if correct is None else float(correct)
    return Sequence(
        [1], [2] * length, [True] * length, group, reward=reward, correct=correct, text=text
    )


def test_grpo_drops_groups_without_signal_and_unscored_samples():
    method = grpo.create(grpo.Config())
    sequences = [
        sample(0, True),
        sample(0, True),
        sample(1, True),
        sample(1, False),
        sample(1, None),
    ]
    kept = method.advantages(sequences)
    assert [s.group for s in kept] == [1, 1]
    assert [s.advantage for s in kept] == pytest.approx([1.0, -1.0], abs=1e-5)


def test_dpo_at_the_reference_is_log_two_and_half_beta():
    method = dpo.create(dpo.Config(beta=0.3))
    pair = [sample(0, True, length=2).signed(1), sample(0, False, length=5).signed(-1)]
    tokens = flatten(pair, torch.float64)
    logp = torch.full((7,), -1.3, dtype=torch.float64)
    tokens.ref_logp = logp.clone()
    tokens.weight = method.weights(tokens, 8)
    assert float(method.objective(tokens, logp)) == pytest.approx(-math.log(2))
    coefficient = method.gradient_coefficient(tokens, logp).tolist()
    assert coefficient == pytest.approx([0.15] * 2 + [-0.15] * 5)
    swapped = flatten([pair[0].signed(-1), pair[1].signed(1)], torch.float64)
    swapped.ref_logp, swapped.weight = tokens.ref_logp, tokens.weight
    assert method.gradient_coefficient(swapped, logp).tolist() == pytest.approx(
        [-0.15] * 2 + [0.15] * 5
    )


def test_dpo_pairs_one_correct_with_one_incorrect_of_the_same_prompt():
    method = dpo.create(dpo.Config(pairs=2))
    log = [
        sample(0, True),
        sample(0, False),
        sample(0, False),
        sample(1, True),
        sample(2, None),
        sample(3, True),
        sample(3, True),
        sample(3, False),
        sample(3, False),
        sample(3, False),
    ]
    pairs = method.select(log, seed=1)
    assert sorted(pair[0].group for pair in pairs) == [0, 3, 3]
    for chosen, rejected in pairs:
        assert chosen.group == rejected.group
        assert (chosen.correct, rejected.correct) == (True, False)
        assert (chosen.sign, rejected.sign) == (1, -1)


def test_dpo_prefers_equal_lengths_where_asked():
    method = dpo.create(dpo.Config(equal_length=True))
    log = [sample(0, True, length=4), sample(0, True, length=9), sample(0, False, length=10)]
    ((chosen, rejected),) = method.select(log, seed=1)
    assert (len(chosen.completion), len(rejected.completion)) == (9, 10)


def test_rft_keeps_correct_distinct_samples_up_to_the_limit():
    log = [
        sample(0, True, "1+1=2\n2+2=4"),
        sample(0, True, "1 + 1 = 2\n2 + 2 = 4"),
        sample(0, True, "2+2=4"),
        sample(0, False, "1+1=3"),
        sample(1, None, "x"),
    ]
    kept = rft.create(rft.Config(per_problem=4)).select(log, seed=0)
    assert len(kept) == 2
    assert {rft.reasoning_path(unit[0].text) for unit in kept} == {("1+1=2", "2+2=4"), ("2+2=4",)}
    assert len(rft.create(rft.Config(per_problem=1)).select(log, seed=0)) == 1
    shortest = rft.create(rft.Config(per_problem=1, prefer="shortest"))
    log[2].completion = [2]
    assert shortest.select(log, seed=0)[0][0].text == "2+2=4"
    twice = rft.create(rft.Config(per_problem=4, epochs=2)).select(log, seed=0)
    assert len(twice) == 4


def test_the_sampled_denominator_scales_by_the_kept_share():
    log = [sample(0, True, "a"), sample(0, False, "b"), sample(0, False, "c"), sample(1, True, "d")]
    method = rft.create(rft.Config(denominator="sampled"))
    method.select(log, seed=0)
    tokens = flatten([log[0]], torch.float64)
    assert method.gradient_coefficient(tokens, torch.zeros(3)).tolist() == pytest.approx([0.5] * 3)


@pytest.mark.parametrize(
    ("outcome", "reward"),
    [
        ("correct", 1.0),
        ("incorrect", 0.0),
        ("no_answer", 0.0),
        ("timeout", None),
        ("gold_unparseable", None),
        ("error", None),
    ],
)
def test_what_nobody_could_judge_is_masked(outcome, reward):
    assert reward_of(Verdict(Outcome(outcome))) == reward
