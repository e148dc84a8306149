"""Numbers worked by hand."""

from __future__ import annotations

import math

import pytest
import torch

from pipeline.advantage import centred, leave_one_out, normalised
from pipeline.batch import Sequence, Tokens, flatten
from pipeline.correction import CorrectionConfig, gap_figures, importance
from pipeline.divergence import estimate
from pipeline.methods import (
    cispo,
    dapo,
    dpo,
    dr_grpo,
    grpo,
    gspo,
    online_rft,
    reinforce,
    rft,
    rloo,
)
from pipeline.records import over_parts
from pipeline.reward import overlong_penalty, reward_of
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
    # What nobody could judge is in no denominator.
    method.select([*log, sample(1, None, "e"), sample(2, None, "f")], seed=0)
    assert method.kept_share == 0.5


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


@pytest.mark.parametrize("rewards", [[1.0, 0, 0, 0], [0.25, 1.0, -1.0], [2.0, 3.0]])
def test_leave_one_out_is_the_centred_reward_times_g_over_g_less_one(rewards):
    count = len(rewards)
    by_hand = [r - (sum(rewards) - r) / (count - 1) for r in rewards]
    assert leave_one_out(rewards) == pytest.approx(by_hand)
    assert leave_one_out(rewards) == pytest.approx(
        [count / (count - 1) * value for value in centred(rewards)]
    )


def test_advantages_by_hand():
    assert centred([1.0, 0, 0, 0]) == pytest.approx([0.75, -0.25, -0.25, -0.25])
    assert leave_one_out([1.0, 0, 0, 0]) == pytest.approx([1.0, -1 / 3, -1 / 3, -1 / 3])
    assert leave_one_out([1.0]) == centred([1.0]) == [0.0]
    assert centred([0.1] * 7) == leave_one_out([0.1] * 7) == [0.0] * 7


def test_reinforce_compares_prompts_and_keeps_equal_groups():
    method = reinforce.create(reinforce.Config())
    batch = [sample(0, True), sample(0, True), sample(1, False), sample(1, None)]
    kept = method.advantages(batch)
    assert [s.advantage for s in kept] == pytest.approx([1 / 3, 1 / 3, -2 / 3])
    assert method.advantages([sample(0, True), sample(1, True)]) == []
    # A reward that is just the mean weighs nothing, and is counted in the denominators.
    batch[2].reward, batch[3].reward = 0.0, 0.5
    assert [s.advantage for s in method.advantages(batch[1:])] == [0.5, -0.5, 0.0]


def test_online_rft_names_its_denominator():
    batch = [sample(0, True), sample(0, False), sample(1, None), sample(1, False)]
    kept = online_rft.create(online_rft.Config()).advantages(batch)
    assert kept == [batch[0]]
    method = online_rft.create(online_rft.Config(denominator="sampled"))
    sampled = method.advantages(batch)
    assert [s.advantage for s in sampled] == [1.0, 0.0, 0.0]
    tokens = flatten(sampled, torch.float64)
    tokens.weight = method.weights(tokens, 8)
    c = tokens.weight * method.gradient_coefficient(tokens, torch.zeros(9))
    assert c.tolist() == pytest.approx([1 / 9] * 3 + [0.0] * 6)
    for chosen in ("kept", "sampled"):
        config = online_rft.Config(denominator=chosen)
        assert online_rft.create(config).advantages(batch[1:]) == []


def off_policy(lengths: list[int], seed: int = 0) -> tuple[Tokens, torch.Tensor]:
    """A group with advantages of both signs and ratios away from 1."""
    sequences = [
        Sequence([1], [2] * n, [True] * n, 0, reward=1.0, advantage=(-1.0) ** i * (i + 1.0))
        for i, n in enumerate(lengths)
    ]
    tokens = flatten(sequences, torch.float64)
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(3, sum(lengths), dtype=torch.float64, generator=generator)
    tokens.old_logp, tokens.ref_logp = -1.0 + 0.5 * noise[0], -1.0 + 0.5 * noise[1]
    return tokens, -1.0 + 0.5 * noise[2]


def same(one, other, tokens: Tokens, logp: torch.Tensor) -> None:
    """Two methods weigh every token alike, and have the same objective."""
    found = []
    for method in (one, other):
        tokens.weight = method.weights(tokens, 8)
        found.append(
            (
                tokens.weight * method.gradient_coefficient(tokens, logp),
                method.objective(tokens, logp),
            )
        )
    assert found[0][0].abs().max() > 0
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=0.0)


def test_dapo_with_equal_clips_and_sequence_normaliser_is_grpo_without_kl():
    options = {"clip_high": 0.2, "normaliser": "sequence", "overlong_share": 0.0}
    one = dapo.create(dapo.Config(**options))  # type: ignore[arg-type]
    other = grpo.create(grpo.Config(beta=0.0))
    same(one, other, *off_policy([3, 1, 5, 2]))
    batch = [sample(0, True), sample(0, False), sample(0, False), sample(1, True), sample(1, True)]
    kept = [[(s.group, s.advantage) for s in m.advantages(batch)] for m in (one, other)]
    assert kept[0] == kept[1]
    assert len(kept[0]) == 3


def test_gspo_with_one_token_a_sequence_is_grpo():
    clips = {"clip_low": 0.2, "clip_high": 0.3}
    for kl in ({"beta": 0.0}, {"beta": 0.3, "kl": "k1"}, {"beta": 0.3, "kl": "k3"}):
        one = gspo.create(gspo.Config(**clips, **kl))  # type: ignore[arg-type]
        other = grpo.create(grpo.Config(**clips, **kl))  # type: ignore[arg-type]
        same(one, other, *off_policy([1] * 12))


def test_gspo_by_hand():
    method = gspo.create(gspo.Config(clip_low=0.2, clip_high=0.2))
    tokens, _ = off_policy([2, 2])
    logp = torch.tensor([0.1, 0.2, 0.5, 0.3], dtype=torch.float64)
    tokens.old_logp = torch.zeros(4, dtype=torch.float64)
    # ρ = e^0.15 inside the clip for Â = 1; e^0.4 beyond the upper one, which Â = −2 ignores.
    expected = [math.exp(0.15)] * 2 + [-2 * math.exp(0.4)] * 2
    assert method.gradient_coefficient(tokens, logp).tolist() == pytest.approx(expected)
    assert method.gradient_coefficient(tokens, 2 * logp).tolist()[:2] == [0.0, 0.0]


def test_gspo_weighs_each_token_by_its_own_advantage():
    """Process supervision: one ratio a sequence, and Â of each token."""
    method = gspo.create(gspo.Config(clip_low=0.2, clip_high=0.2, supervision="process"))
    tokens, _ = off_policy([2, 2])
    tokens.weight = method.weights(tokens, 8)
    tokens.advantage = torch.tensor([1.0, 3.0, -2.0, 5.0], dtype=torch.float64)
    logp = torch.tensor([0.1, 0.2, 0.5, 0.3], dtype=torch.float64, requires_grad=True)
    tokens.old_logp = torch.zeros(4, dtype=torch.float64)
    # e^0.15 is inside the clip; e^0.4 beyond its upper edge, where Â > 0 goes no further.
    expected = torch.tensor([1.0, 3.0, 0.0, 0.0], dtype=torch.float64) * math.exp(0.15)
    expected[2] = -2.0 * math.exp(0.4)
    found = method.gradient_coefficient(tokens, logp.detach())
    torch.testing.assert_close(found, expected)
    (slope,) = torch.autograd.grad(method.objective(tokens, logp), logp)
    torch.testing.assert_close(slope, tokens.weight * expected)


def test_cispo_inside_the_clip_is_grpo_and_beyond_it_keeps_a_bounded_weight():
    tokens, logp = off_policy([3, 4])
    assert tokens.old_logp is not None
    wide = cispo.create(cispo.Config(clip_high=1e6))
    tokens.weight = wide.weights(tokens, 8)
    ratio = torch.exp(logp - tokens.old_logp)
    torch.testing.assert_close(wide.gradient_coefficient(tokens, logp), ratio * tokens.advantage)
    narrow = cispo.create(cispo.Config(clip_low=0.1, clip_high=0.1))
    found = narrow.gradient_coefficient(tokens, logp) / tokens.advantage
    assert sorted({round(float(v), 6) for v in found} & {0.9, 1.1}) == [0.9, 1.1]
    assert bool(((found >= 0.9) & (found <= 1.1)).all())


@pytest.mark.parametrize("create", [dr_grpo, rloo])
def test_methods_without_a_spread_are_the_surrogate_of_grpo(create):
    one = create.create(create.Config(normaliser="constant"))
    same(one, grpo.create(grpo.Config(beta=0.0, normaliser="constant")), *off_policy([3, 1, 4]))


def test_dr_grpo_divides_by_a_constant():
    method = dr_grpo.create(dr_grpo.Config())
    tokens, _ = off_policy([3, 1])
    assert method.weights(tokens, 10).tolist() == pytest.approx([1 / 20] * 4)


def test_kl_estimates_by_hand():
    logp, ref = torch.tensor([-3.0], dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    found = [float(estimate(kind, logp, ref)) for kind in ("k1", "k2", "k3")]
    # d = −3: methods.md gives k3 = 16.1, unclamped.
    assert found == pytest.approx([-3.0, 4.5, math.exp(3) - 4.0])
    assert found[2] == pytest.approx(16.1, abs=0.05)


def test_k1_in_the_reward_is_what_is_still_to_come():
    method = grpo.create(grpo.Config(beta=0.5, kl="k1"))
    tokens, _ = off_policy([3, 2])
    tokens.old_logp = torch.tensor([0.1, 0.2, 0.4, 1.0, 2.0], dtype=torch.float64)
    tokens.ref_logp = torch.zeros(5, dtype=torch.float64)
    found = method.gradient_coefficient(tokens, tokens.old_logp)
    expected = [1 - 0.35, 1 - 0.3, 1 - 0.2, -2 - 1.5, -2 - 1.0]
    assert found.tolist() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("length", "penalty"),
    [(1, 0.0), (80, 0.0), (81, -0.05), (90, -0.5), (100, -1.0), (140, -1.0)],
)
def test_the_overlong_penalty_sets_in_softly(length, penalty):
    assert overlong_penalty(length, 100, 20) == pytest.approx(penalty)
    assert overlong_penalty(length, 100, 0) == 0.0


def test_dapo_rewards():
    def reward(base: float, length: int, reason: str = "stop", **options) -> float | None:
        own = Sequence([1], [1] * length, [True] * length, 0, finish_reason=reason)
        return dapo.create(dapo.Config(**options)).shape(base, own, 100)

    assert reward(1.0, 90) == pytest.approx(0.5)
    assert reward(0.0, 100, "length") == pytest.approx(-1.0)
    assert reward(1.0, 90, overlong_share=0.0) == 1.0
    assert reward(0.0, 100, "length", overlong_mask=True) is None
    assert reward(0.0, 100, overlong_mask=True) == pytest.approx(-1.0)


def test_dapo_uses_prompts_of_mixed_accuracy_whatever_the_lengths():
    method = dapo.create(dapo.Config())
    group = [sample(0, True), sample(0, True)]
    group[1].reward = 0.5  # a penalty alone does not make a prompt teach
    assert not method.usable(group)
    assert not method.usable([])
    assert method.usable([*group, sample(0, False)])


def test_the_correction_by_hand():
    tokens, _ = off_policy([2, 1])
    tokens.old_logp = torch.log(torch.tensor([0.9, 0.8, 0.1], dtype=torch.float64))
    tokens.sampler_logp = torch.log(torch.tensor([0.3, 0.5, 0.2], dtype=torch.float64))

    def weights(**options) -> list[float]:
        return importance(tokens, CorrectionConfig(**options)).tolist()

    assert weights() == [1.0, 1.0, 1.0]
    assert weights(kind="token", cap=2.0) == pytest.approx([2.0, 1.6, 0.5])
    assert weights(kind="sequence", cap=5.0) == pytest.approx([4.8, 4.8, 0.5])
    assert weights(kind="sequence", cap=2.0) == pytest.approx([2.0, 2.0, 0.5])
    found = gap_figures(tokens, CorrectionConfig(kind="token", cap=2.0))
    assert found["sampler_gap_max"] == pytest.approx(math.log(3))
    assert found["sampler_gap_mean"] == pytest.approx(math.log(3 * 1.6 * 2) / 3)
    assert found["sampler_kl"] == pytest.approx(-math.log(3 * 1.6 / 2) / 3)
    assert found["correction_mean"] == pytest.approx(4.1 / 3)
    assert found["correction_capped_share"] == pytest.approx(1 / 3)


def test_extremes_of_a_step_are_extremes_of_its_parts():
    parts = [
        (3, {"a": 1.0, "a_min": 1.0, "a_max": 4.0}),
        (1, {"a": 5.0, "a_min": 2.0, "a_max": 9.0}),
    ]
    assert over_parts(parts) == {"a": 2.0, "a_min": 1.0, "a_max": 9.0}
