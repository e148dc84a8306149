"""What methods say of themselves and of a step, and how they choose: worked by hand."""

from __future__ import annotations

import json
import math
import random

import pytest
import torch

from data_prep.errors import UserError
from pipeline.batch import Sequence, Tokens, flatten
from pipeline.methods import (
    cispo,
    create_method,
    dapo,
    dpo,
    grft,
    grpo,
    online_rft,
    ppo,
    process_reward_model,
    reinforce,
    reward_model,
    rft,
    rloo,
    segment_rft,
    sft,
)
from pipeline.methods.reward_model import calibration_error
from pipeline.segment_grader import GraderConfig


def double(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def sample(group: int, correct: bool | None, length: int = 3, **more) -> Sequence:
    reward = None if correct is None else float(correct)
    given = {"reward": reward, "correct": correct, **more}
    return Sequence([1], [2] * length, [True] * length, group, **given)


def line(lengths: list[int], advantages: list[float], **more) -> Tokens:
    """Sequences of a group, each with one advantage."""
    return flatten(
        [
            Sequence([1], [2] * n, [True] * n, 0, reward=1.0, advantage=a, **more)
            for n, a in zip(lengths, advantages, strict=True)
        ],
        torch.float64,
    )


# What a method asks for


def test_what_each_method_asks_for():
    assert sft.create(sft.Config()).source == "rows"
    assert sft.create(sft.Config(data="chosen")).source == "pairs"
    assert dpo.create(dpo.Config()).source == "samples"
    assert dpo.create(dpo.Config(data="pairs")).source == "pairs"
    assert dpo.create(dpo.Config()).reference is True
    assert reward_model.create(reward_model.Config()).source == "pairs"
    assert reward_model.create(reward_model.Config(data="samples")).source == "samples"
    assert reward_model.create(reward_model.Config()).config == reward_model.Config()
    made = process_reward_model.create(process_reward_model.Config(data="samples"))
    assert (made.source, made.takes_steps, made.trains) == ("samples", True, "scores")
    assert rft.create(rft.Config()).kept_share == 1.0
    assert grft.create(grft.Config(cut="sentence")).cut == "sentence"
    assert dapo.create(dapo.Config(refill=3)).refill == 3
    assert [grpo.create(grpo.Config(beta=b)).reference for b in (0.0, 0.1)] == [False, True]
    outcome, process = (
        grpo.create(grpo.Config(supervision=kind))  # type: ignore[arg-type]
        for kind in ("outcome", "process")
    )
    assert (outcome.takes_steps, outcome.takes_outcomes) == (False, True)
    assert (process.takes_steps, process.takes_outcomes) == (True, False)
    made = ppo.create(
        ppo.Config(critic="separate", critic_init="a/b", critic_rate=3.0, entropy=0.25)
    )
    assert (made.critic, made.critic_init, made.critic_rate) == ("separate", "a/b", 3.0)
    assert (made.value_weight, made.entropy_weight, made.takes_steps) == (0.5, 0.25, True)


def test_what_segment_level_rft_asks_for(tmp_path):
    path = tmp_path / "grades.jsonl"
    grades = {"problem_id": "p", "overall": 1.0, "thoughts": [1.0], "progress": [1.0]}
    path.write_text(json.dumps(grades) + "\n")
    by_rule = segment_rft.create(
        segment_rft.Config(grader=GraderConfig(kind="rule", continuations=3), thoughts=2)
    )
    assert (by_rule.needs_verdicts, by_rule.continuations, by_rule.files) == (True, 3, {})
    assert by_rule.samples(5) == 5 * (1 + 2 * 3)
    by_model = segment_rft.create(segment_rft.Config(grader=GraderConfig(kind="model", model="m")))
    assert (by_model.needs_verdicts, by_model.continuations, by_model.files) == (False, 0, {})
    assert by_model.samples(5) == 5
    made = segment_rft.create(
        segment_rft.Config(
            grader=GraderConfig(kind="fixed", path=str(path)), refresh=4, cut="sentence", beta=0.5
        )
    )
    assert made.files == {"method.grader.path": str(path)}
    assert (made.refresh, made.cut, made.thoughts, made.critic) == (4, "sentence", 8, "head")
    assert (made.kl_weight, made.observes_kl, made.reference) == (0.0, True, True)
    other = segment_rft.create(segment_rft.Config(beta=0.5, kl="policy"))
    assert (other.kl_weight, other.observes_kl) == (0.5, False)


def test_what_a_method_is_not_made_for_is_refused_by_name():
    made = reinforce.create(reinforce.Config())
    tokens, values = line([1], [1.0]), torch.zeros(1, dtype=torch.float64)
    asked = {
        "does not train on a fixed log": lambda: made.select([], 0),
        "has no critic": lambda: made.prepare(tokens),
        "has no values": lambda: made.value_loss(tokens, values),
        "reinforce has no values": lambda: made.value_coefficient(tokens, values),
        "rft does not train on rollouts": lambda: rft.create(rft.Config()).advantages([]),
    }
    for words, ask in asked.items():
        with pytest.raises(TypeError, match=f"^pipeline.methods.*{words}$"):
            ask()
    assert made.figures(tokens, values) == {}
    assert made.prefixes([], random.Random(0)) == []
    assert made.samples(7) == 7
    assert made.usable([])
    assert made.score([], [sample(0, True), sample(0, True)]) == [{}, {}]
    assert made.marked([sample(0, True)]) == [sample(0, True)]
    assert made.shape(0.25, sample(0, True), 9) == 0.25


def test_a_wrong_kind_names_the_key():
    with pytest.raises(UserError, match=r"^method\.kind: unknown kind 'grpoo'"):
        create_method(grpo.Config(kind="grpoo"))


@pytest.mark.parametrize(
    ("make", "ask", "words"),
    [
        (dpo, "objective", "^DPO needs reference log-probs$"),
        (ppo, "value_loss", "^PPO needs the values of its critic and the targets made of them$"),
        (
            segment_rft,
            "value_loss",
            "^segment-level RFT needs the values of its critic and its targets$",
        ),
        (grpo, "objective", "^a ratio needs the log-probs of the behaviour policy$"),
    ],
)
def test_what_is_missing_is_said(make, ask, words):
    method = make.create(make.Config())
    tokens = line([2, 2], [1.0, -1.0])
    with pytest.raises(ValueError, match=words):
        getattr(method, ask)(tokens, torch.zeros(4, dtype=torch.float64))


def test_a_missing_reference_is_said():
    tokens = line([2], [1.0])
    tokens.old_logp = torch.zeros(2, dtype=torch.float64)
    words = "^a KL term needs the log-probs of the reference$"
    with pytest.raises(ValueError, match=words):
        grpo.create(grpo.Config(beta=0.1)).objective(tokens, tokens.old_logp)


# Which rows and pairs


def log_of(problems: int = 12) -> list[Sequence]:
    found = []
    for group in range(problems):
        found += [sample(group, True, 2 + group), sample(group, False, 5), sample(group, True, 9)]
    return found


@pytest.mark.parametrize("make", [dpo, reward_model])
def test_pairs_follow_the_seed_and_come_once_an_epoch(make):
    data = {"data": "samples"}

    def chosen(seed: int, **options):
        units = make.create(make.Config(**data, **options)).select(log_of(), seed)
        return [(good.group, len(good.completion), len(bad.completion)) for good, bad in units]

    assert chosen(1) == chosen(1) != chosen(2)
    assert sorted(group for group, _, _ in chosen(1, pairs=1)) == list(range(12))
    twice = chosen(1, pairs=1, epochs=2)
    assert sorted(twice[:12]) == sorted(twice[12:])
    assert twice[:12] != twice[12:] and len(twice) == 24
    # The incorrect one has 5 tokens: of 2 + group and 9 the nearer one is chosen.
    nearest = chosen(1, pairs=1, equal_length=True)
    assert {length - (2 + group) for group, length, _ in nearest if group < 5} == {0}
    assert any(length == 9 for group, length, _ in nearest if group > 7)
    for good, bad in make.create(make.Config(**data)).select(log_of(), 1):
        assert (good.sign, bad.sign, good.correct, bad.correct) == (1, -1, True, False)


def test_rejection_sampling_follows_the_seed():
    log = [sample(g, True, text=f"{g}={g}\n{i}={i}") for g in range(9) for i in range(3)]

    def order(seed: int) -> list[str]:
        method = rft.create(rft.Config(per_problem=2))
        found = [unit[0].text for unit in method.select(log, seed)]
        assert method.kept_share == pytest.approx(18 / 27)
        return found

    assert order(1) == order(1) != order(2)
    method = rft.create(rft.Config())
    assert method.select([], 0) == [] and method.kept_share == 0.0
    method.select([sample(0, True, text="a")], 0)
    assert method.kept_share == 1.0


def test_steps_of_samples_become_labels():
    method = process_reward_model.create(process_reward_model.Config(data="samples", epochs=2))
    steps = [(1, 1.0), (2, 0.5), (3, 1.0)]
    log = [sample(0, True, 4, steps=steps, problem_id=f"p{i}") for i in range(8)]
    log += [sample(1, None, 4, steps=[(1, 1.0)]), sample(2, True, 4)]
    units = method.select(log, 3)
    assert len(units) == 16
    for (unit,) in units:
        assert unit.steps == [(1, 1.0), (2, 0.0), (3, 1.0)]
        assert unit.mask == [False, True, True, True]
    names = [unit.problem_id for (unit,) in units]
    assert sorted(names[:8]) == sorted(names[8:]) and names[:8] != names[8:]
    again = [unit.problem_id for (unit,) in method.select(log, 3)]
    other = [unit.problem_id for (unit,) in method.select(log, 4)]
    assert names == again != other
    assert log[0].mask == [True] * 4, "the log stays as it is"


def test_an_end_is_labelled_by_the_verdict_whatever_its_step_says():
    """A completion that was cut off behind an equation that holds: its share adds to the reward."""
    method = process_reward_model.create(process_reward_model.Config(data="samples"))
    wrong = sample(0, False, 4, steps=[(1, 1.0), (3, 1.0)])
    right = sample(0, True, 4, steps=[(1, 0.5), (3, 1.5)])
    labels = {u.correct: u.steps for (u,) in method.select([wrong, right], 0)}
    assert labels == {False: [(1, 1.0), (3, 0.0)], True: [(1, 0.0), (3, 1.0)]}


def test_pairs_have_one_denominator():
    for module in (dpo, reward_model):
        with pytest.raises(ValueError, match="normaliser"):
            module.Config(normaliser="token")  # type: ignore[arg-type]


def test_what_carries_loss_in_a_pair():
    pair = [sample(0, True).signed(1), sample(0, False).signed(-1)]
    assert sft.create(sft.Config(data="chosen")).marked(pair) == pair[:1]
    assert sft.create(sft.Config()).marked(pair) == pair
    zero = [sample(0, True)]
    assert sft.create(sft.Config(data="chosen")).marked(zero) == []
    marked = reward_model.create(reward_model.Config()).marked(pair)
    assert [s.mask for s in marked] == [[False, False, True]] * 2
    assert [s.sign for s in marked] == [1, -1]
    one = reward_model.create(reward_model.Config()).marked([sample(0, True, 1)])
    assert one[0].mask == [True]


def test_a_prompt_of_mixed_accuracy_is_one_of_which_some_and_not_all_are_correct():
    method = dapo.create(dapo.Config())
    for right, count, usable in ((0, 3, False), (1, 3, True), (2, 3, True), (3, 3, False)):
        group = [sample(0, i < right) for i in range(count)]
        assert method.usable(group) is usable


# Advantages


def test_process_supervision_of_a_group_by_hand():
    """Rewards of steps 1, 0 | 1, 1 | the whole 0: mean 3/5, std √(6/25)."""
    method = grpo.create(grpo.Config(supervision="process", epsilon=0.0))
    first = sample(0, True, 4, steps=[(1, 1.0), (3, 0.0)])
    second = sample(0, True, 3, steps=[(0, 1.0), (2, 1.0)])
    third = sample(0, False, 2)
    flat = [sample(1, True, 2), sample(1, True, 3)]
    again = [s.in_group(2) for s in (first, second, third)]
    kept = method.advantages([first, second, third, *flat, *again])
    assert [s.group for s in kept] == [0, 0, 0, 2, 2, 2]
    std = math.sqrt(6 / 25)
    up, down = 0.4 / std, -0.6 / std
    assert first.advantages == pytest.approx([up + down] * 2 + [down] * 2)
    assert second.advantages == pytest.approx([2 * up] + [up] * 2)
    assert third.advantages == pytest.approx([down] * 2)
    assert [s.advantages for s in kept[3:]] == [s.advantages for s in kept[:3]]
    shifted = grpo.create(grpo.Config(supervision="process", epsilon=1.0))
    shifted.advantages([first, second, third])
    assert third.advantages == pytest.approx([-0.6 / (std + 1.0)] * 2)


@pytest.mark.parametrize("make", [grpo, rloo, cispo])
def test_groups_are_kept_together_and_several_stay(make):
    method = make.create(make.Config())
    batch = [sample(g, i == 0) for g in range(3) for i in range(4)]
    kept = method.advantages(batch)
    assert [s.group for s in kept] == [0] * 4 + [1] * 4 + [2] * 4
    assert sum(s.advantage for s in kept) == pytest.approx(0.0, abs=1e-5)


@pytest.mark.parametrize("make", [grpo, rloo])
def test_as_many_advantages_as_samples(make, monkeypatch):
    method = make.create(make.Config())
    monkeypatch.setattr(method, "compare", lambda rewards: [1.0])
    with pytest.raises(ValueError, match="zip"):
        method.advantages([sample(0, True), sample(0, False)])


def test_prefixes_are_cut_points_no_two_of_the_same_tokens():
    """Eight tokens in four segments; the second sample shares its first four tokens."""
    first = Sequence(
        [1], [1, 2, 3, 4, 5, 6, 7, 8], [True] * 8, 0, segments=[0, 0, 1, 1, 2, 2, 3, 3]
    )
    second = Sequence([1], [1, 2, 3, 4, 9, 9], [True] * 6, 0, segments=[0, 0, 1, 1, 2, 3])
    third = Sequence([1], [7, 7], [True] * 2, 0, segments=[0, 1])

    def prefixes(count: int, group: list[Sequence], seed: int = 0) -> list[tuple[int, int]]:
        return grft.create(grft.Config(prefixes=count)).prefixes(group, random.Random(seed))

    assert prefixes(1, [first]) == []
    assert prefixes(4, [first]) == [(0, 2), (0, 4), (0, 6)]
    # (1, 2) and (1, 4) are the same tokens as the first sample's; (1, 5) is new.
    assert prefixes(5, [first, second]) == [(0, 2), (0, 4), (0, 6), (1, 5)]
    assert prefixes(6, [first, second, third]) == [(0, 2), (0, 4), (0, 6), (1, 5), (2, 1)]
    assert prefixes(9, [first, second]) == [(0, 2), (0, 4), (0, 6), (1, 5)]
    assert prefixes(9, [third, first]) == [(0, 1), (1, 2), (1, 4), (1, 6)]
    assert prefixes(2, []) == []
    drawn = {tuple(prefixes(3, [first], seed)) for seed in range(60)}
    assert drawn == {((0, 2), (0, 4)), ((0, 2), (0, 6)), ((0, 4), (0, 6))}
    assert prefixes(3, [first], 5) == prefixes(3, [first], 5)
    assert grft.create(grft.Config(prefixes=4)).samples(8) == 32


def test_the_first_segment_alone_is_trained_on():
    whole = Sequence(
        [1],
        [1, 2, 3, 4],
        [True, False, True, True],
        0,
        segments=[0, 0, 1, 1],
        pieces=["a", "b"],
        logprobs=[-1.0, -2.0, -3.0, -4.0],
        reward=1.0,
    )
    part = grft.first_segment(whole)
    assert (part.completion, part.mask) == ([1, 2], [True, False])
    assert (part.segments, part.pieces, part.logprobs) == ([0, 0], ["a"], [-1.0, -2.0])
    assert len(whole.completion) == 4 and part.reward == 1.0
    uncut = grft.first_segment(Sequence([1], [1, 2, 3], [True] * 3, 0, segments=[0] * 3))
    assert uncut.completion == [1, 2, 3]


def test_segments_rewards_are_whitened_as_asked():
    def rewards(whiten: str) -> list[list[float]]:
        method = segment_rft.create(segment_rft.Config(whiten=whiten))  # type: ignore[arg-type]
        first = sample(0, True, 4, steps=[(1, 3.0), (3, 1.0)])
        second = sample(0, True, 4, steps=[(1, 5.0), (3, 7.0)])
        kept = method.advantages([first, second, sample(0, None, 4, steps=[(1, 9.0)])])
        assert [[end for end, _ in s.steps] for s in kept] == [[1, 3], [1, 3]]
        return [[value for _, value in s.steps] for s in kept]

    assert rewards("off") == [[3.0, 1.0], [5.0, 7.0]]
    each = rewards("trajectory")
    assert each[0] == pytest.approx([1.0, -1.0], abs=1e-3)
    assert each[1] == pytest.approx([-1.0, 1.0], abs=1e-3)
    # 1, 3, 5, 7: mean 4, std √5.
    whole = rewards("batch")
    root = math.sqrt(5.0)
    assert whole[0] == pytest.approx([-1 / root, -3 / root], abs=1e-3)
    assert whole[1] == pytest.approx([1 / root, 3 / root], abs=1e-3)


# Figures


def test_figures_of_a_surrogate_by_hand():
    """Ratios ½, 1, 2, ½, 1, 3 with Â = +1, +1, +1, −1, −1, −1: two clipped, one on each side."""
    method = grpo.create(grpo.Config(beta=0.0))
    tokens = line([3, 3], [1.0, -1.0])
    tokens.old_logp = torch.zeros(6, dtype=torch.float64)
    found = method.figures(tokens, torch.log(double(0.5, 1.0, 2.0, 0.5, 1.0, 3.0)))
    assert found == {
        "clip_share": pytest.approx(2 / 6),
        "clip_share_low": pytest.approx(1 / 6),
        "clip_share_high": pytest.approx(1 / 6),
        "ratio_mean": pytest.approx(8 / 6),
        "ratio_min": pytest.approx(0.5),
        "ratio_max": pytest.approx(3.0),
    }
    # Where a ratio beyond 2 is clipped it is the upper side, and nothing else is.
    wide = grpo.create(grpo.Config(beta=0.0, clip_high=1.5, clip_low=0.4))
    found = wide.figures(tokens, torch.log(double(4.0, 1.8, 1.0, 0.9, 1.0, 1.0)))
    assert (found["clip_share"], found["clip_share_low"]) == (pytest.approx(1 / 6), 0.0)
    assert found["clip_share_high"] == pytest.approx(1 / 6)


def test_figures_of_cispo_count_bounded_weights_on_either_side():
    method = cispo.create(cispo.Config(clip_low=0.2, clip_high=0.5))
    tokens = line([3, 3], [1.0, -1.0])
    tokens.old_logp = torch.zeros(6, dtype=torch.float64)
    found = method.figures(tokens, torch.log(double(0.5, 1.0, 2.0, 0.7, 1.2, 1.6)))
    assert found["clip_share"] == pytest.approx(4 / 6)
    assert found["clip_share_low"] == pytest.approx(2 / 6)
    assert found["clip_share_high"] == pytest.approx(2 / 6)
    # At the bounds themselves nothing is bounded.
    edges = method.figures(tokens, torch.log(double(1.0, 1.0, 1.0, 1.0, 1.25, 1.25)))
    assert edges["clip_share"] == 0.0


def pairs(*lengths: tuple[int, int]) -> list[Sequence]:
    found = []
    for group, (good, bad) in enumerate(lengths):
        found += [sample(group, True, good).signed(1), sample(group, False, bad).signed(-1)]
    return found


def test_figures_of_dpo_by_hand():
    """h⁺ − h⁻ is 1 − (−2) = 3 and −1 − 0 = −1 and 0; β = ½."""
    method = dpo.create(dpo.Config(beta=0.5))
    tokens = flatten(pairs((1, 2), (2, 1), (1, 1)), torch.float64)
    tokens.ref_logp = torch.zeros(8, dtype=torch.float64)
    found = method.figures(tokens, double(1.0, -1.5, -0.5, -0.25, -0.75, 0.0, 0.5, 0.5))
    assert found == {"margin": pytest.approx(1 / 3), "accuracy": pytest.approx(1 / 3)}


def test_figures_and_weights_of_a_reward_model_by_hand():
    method = reward_model.create(reward_model.Config())
    tokens = flatten(method.marked(pairs((3, 2), (1, 4), (2, 2))), torch.float64)
    assert method.weights(tokens, 8).tolist() == pytest.approx([1 / 3] * 6)
    tokens.weight = method.weights(tokens, 8)
    scores = double(2.0, 1.0, -1.0, 0.0, 0.5, 0.5)
    found = method.figures(tokens, scores)
    assert set(found) == {"margin", "accuracy", "calibration_error"}
    assert found["margin"] == pytest.approx(0.0)
    assert found["accuracy"] == pytest.approx(1 / 3)
    sigmoid = 1 / (1 + math.exp(-1.0))
    # In bins of one: ½ was said of the tie, σ(1) of a pair ranked right and of one ranked wrong.
    assert found["calibration_error"] == pytest.approx(((1 - sigmoid) + sigmoid + 0.0) / 3)
    loss = (math.log(sigmoid) + math.log(1 - sigmoid) + math.log(0.5)) / 3
    assert float(method.objective(tokens, scores)) == pytest.approx(loss)
    strengths = [1 - sigmoid, sigmoid, 0.5]
    expected = [sign * s for s in strengths for sign in (1.0, -1.0)]
    assert method.gradient_coefficient(tokens, scores).tolist() == pytest.approx(expected)


def test_calibration_error_by_hand():
    """Twenty pairs in ten bins of two: what is said against the share that is right."""
    said = [0.5 + 0.02 * (i + 1) for i in range(20)]
    margins = [math.log(p / (1 - p)) for p in said]
    wrong = {0, 1, 5, 12}
    margin = double(*[-m if i in wrong else m for i, m in enumerate(margins)])
    expected = 0.0
    for first in range(0, 20, 2):
        right = sum(i not in wrong for i in (first, first + 1)) / 2
        expected += 2 * abs((said[first] + said[first + 1]) / 2 - right)
    assert calibration_error(margin) == pytest.approx(expected / 20)
    shuffled = margin[torch.randperm(20, generator=torch.Generator().manual_seed(1))]
    assert calibration_error(shuffled) == pytest.approx(expected / 20)
    # A tie is half right, and says one half.
    assert calibration_error(torch.zeros(3, dtype=torch.float64)) == 0.0
    assert calibration_error(double(50.0)) == pytest.approx(0.0)
    assert calibration_error(double(-50.0)) == pytest.approx(1.0)


def test_figures_of_a_process_reward_model_by_hand():
    method = process_reward_model.create(process_reward_model.Config())
    steps = [(0, 1.0), (1, 0.0), (2, 1.0), (3, 0.0)]
    tokens = flatten([sample(0, True, 4, steps=steps)], torch.float64)
    scores = torch.logit(double(0.75, 0.25, 0.375, 0.875))
    assert method.figures(tokens, scores) == {
        "accuracy": pytest.approx(0.5),
        "said_of_good": pytest.approx(0.5625),
        "said_of_bad": pytest.approx(0.5625),
    }
    good = flatten([sample(0, True, 2, steps=[(0, 1.0), (1, 1.0)])], torch.float64)
    assert method.figures(good, torch.logit(double(0.75, 0.25))) == {
        "accuracy": pytest.approx(0.5),
        "said_of_good": pytest.approx(0.5),
    }
    # Exactly one half says "bad".
    assert method.figures(good, double(0.0, 1.0))["accuracy"] == pytest.approx(0.5)


def test_values_and_figures_of_ppo_by_hand():
    """V_old = 1; c_v = ¼: V = 2 and 0 are taken for 1¼ and ¾, and Y = 1½, ½, 3."""
    method = ppo.create(ppo.Config(value_clip=0.25, whiten=False))
    tokens = line([3], [1.0])
    tokens.old_logp = torch.zeros(3, dtype=torch.float64)
    tokens.weight = double(0.5, 0.25, 0.25)
    tokens.old_value, tokens.target = double(1.0, 1.0, 1.0), double(1.5, 0.5, 3.0)
    value = double(2.0, 0.0, 2.0)
    # (2−1½)² = ¼ > (1¼−1½)²; (0−½)² = ¼ > (¾−½)²; (2−3)² = 1 < (1¼−3)² = 3.0625.
    expected = 0.5 * (0.5 * 0.25 + 0.25 * 0.25 + 0.25 * 3.0625)
    assert float(method.value_loss(tokens, value)) == pytest.approx(expected)
    assert method.value_coefficient(tokens, value).tolist() == pytest.approx([0.5, -0.5, 0.0])
    # Below the lower bound: 0 is taken for ¾, so the clipped branch is the larger for Y = −1.
    tokens.target = double(-1.0, -1.0, 1.0)
    assert method.value_coefficient(tokens, double(0.0, 1.1, 1.0)).tolist() == pytest.approx(
        [0.0, 2.1, 0.0]
    )
    assert float(method.value_loss(tokens, double(0.0, 1.1, 1.0))) == pytest.approx(
        0.5 * (0.5 * 1.75**2 + 0.25 * 2.1**2)
    )
    found = method.figures(tokens, torch.zeros(3, dtype=torch.float64))
    assert found["value_error"] == pytest.approx((4 + 4 + 0) / 3)
    assert found["value_target"] == pytest.approx(-1 / 3)
    assert found["ratio_mean"] == 1.0
    assert len(found) == 8


def test_advantages_of_ppo_are_whitened_and_bootstrapped_as_asked():
    def prepared(**options) -> Tokens:
        sequences = [
            sample(0, True, 2, finish_reason="length"),
            sample(0, False, 2, finish_reason="stop"),
        ]
        tokens = flatten(sequences, torch.float64)
        tokens.old_value, tokens.end_value = double(0.5, 0.25, 0.5, 0.25), double(0, 0.75, 0, 9)
        tokens.old_logp = tokens.ref_logp = torch.zeros(4, dtype=torch.float64)
        ppo.create(ppo.Config(gamma=1.0, lam=1.0, **options)).prepare(tokens)
        return tokens

    plain = prepared(whiten=False)
    # Cut off: 1 + V of the last state; ended: nothing follows.
    assert plain.advantage.tolist() == pytest.approx([1.25, 1.5, -0.5, -0.25])
    assert plain.target is not None
    assert plain.target.tolist() == pytest.approx([1.75, 1.75, 0.0, 0.0])
    ended = prepared(whiten=False, truncation="terminal")
    assert ended.advantage.tolist() == pytest.approx([0.5, 0.75, -0.5, -0.25])
    white = prepared(whiten=True)
    assert white.advantage.tolist() != plain.advantage.tolist()
    assert float(white.advantage.mean()) == pytest.approx(0.0, abs=1e-9)
    assert float(white.advantage.std(correction=0)) == pytest.approx(1.0, abs=1e-3)
    assert white.target is not None
    assert white.target.tolist() == pytest.approx([1.75, 1.75, 0.0, 0.0])
    method = ppo.create(ppo.Config())
    kept = [sample(0, True), sample(1, None), sample(2, False)]
    assert method.advantages(kept) == [kept[0], kept[2]]
    assert method.compare([1.0, 2.0]) == [1.0, 2.0]


def test_the_dual_clip_bounds_negative_advantages_alone():
    """c = 2: for Â < 0 nothing falls below 2Â; Â = 0 and Â > 0 are as they were."""
    method = ppo.create(ppo.Config(dual_clip=2.0, clip_low=0.5, clip_high=0.5))
    ratio, advantage = double(3.0, 2.0, 1.0, 3.0, 3.0), double(-1.0, -1.0, -1.0, 1.0, 0.0)
    terms = method.surrogate(ratio, advantage, torch.log(ratio))
    assert terms.tolist() == pytest.approx([-2.0, -2.0, -1.0, 1.5, 0.0])
    assert method.clipped(ratio, advantage).tolist() == [True, False, False, True, False]


def test_values_and_figures_of_segment_level_rft_by_hand():
    """Two segments of two tokens: only their first tokens have a value."""
    method = segment_rft.create(segment_rft.Config(value_clip=0.25, beta=0.5))
    sequence = sample(0, True, 4, segments=[0, 0, 1, 1], steps=[(1, 0.5), (3, 2.0)])
    tokens = flatten([sequence], torch.float64)
    tokens.old_logp = torch.zeros(4, dtype=torch.float64)
    tokens.weight = double(0.5, 0.5, 0.5, 0.5)
    tokens.old_value = double(1.0, 7.0, 1.0, 7.0)
    method.prepare(tokens)
    # Y_1 = ½ + V(s_2) = 1½, Y_2 = 2.
    assert tokens.target is not None
    assert tokens.target.tolist() == pytest.approx([1.5, 1.5, 2.0, 2.0])
    assert tokens.advantage.tolist() == pytest.approx([0.5, 0.5, 1.0, 1.0])
    value = double(2.0, 5.0, 0.0, 5.0)
    # (2−1½)² = ¼ > (1¼−1½)²; (0−2)² = 4 > (¾−2)².
    assert float(method.value_loss(tokens, value)) == pytest.approx(0.5 * 0.5 * (0.25 + 4.0))
    assert method.value_coefficient(tokens, value).tolist() == pytest.approx([0.5, 0, -2.0, 0])
    # V = ½ goes away from Y on the far side of its bound: the clipped branch is the larger.
    tokens.target = double(-1.0, -1.0, 4.0, 4.0)
    other = double(0.5, 5.0, 2.0, 5.0)
    assert method.value_coefficient(tokens, other).tolist() == pytest.approx([0.0, 0, 0.0, 0])
    bounded = 0.5 * 0.5 * (1.75**2 + 2.75**2)
    assert float(method.value_loss(tokens, other)) == pytest.approx(bounded)
    tokens.value, tokens.old_kl = tokens.old_value, double(0.1, 0.2, 0.3, 0.4)
    found = method.figures(tokens, torch.zeros(4, dtype=torch.float64))
    assert found["value_error"] == pytest.approx((4.0 + 9.0) / 2)
    assert found["value_target"] == pytest.approx(1.5)
    assert found["kl_rollout"] == pytest.approx(0.25)
    tokens.old_kl = None
    assert "kl_rollout" not in method.figures(tokens, torch.zeros(4, dtype=torch.float64))


def test_samples_that_no_grader_could_grade_are_passed_over(monkeypatch):
    """The second of three has no grades: it leaves the step, the third stays."""
    from pipeline.segment_reward import Grades

    method = segment_rft.create(segment_rft.Config())
    asked = []
    found = [Grades(2.0, [0.5, 1.0], [0.0, 0.0]), None, Grades(4.0, [1.0, 0.0], [0.0, 0.0])]

    class Fixed:
        def grade(self, problems, sequences):
            asked.append(problems)
            return found

    monkeypatch.setattr(method, "grader", Fixed())
    group = [sample(0, True, 4, segments=[0, 0, 1, 1], pieces=["a", "b"]) for _ in range(3)]
    log = method.score(["p", "q", "r"], group)  # type: ignore[list-item]
    assert asked == [["p", "q", "r"]]
    assert [s.reward for s in group] == [2.0, None, 4.0]
    assert [[end for end, _ in s.steps] for s in group] == [[1, 3], [], [1, 3]]
    assert log[1] == {} and log[2]["grades"]["overall"] == 4.0 and log[0]["pieces"] == ["a", "b"]
    with pytest.raises(ValueError, match="zip"):
        method.score([], group[:2])


def test_online_rft_counts_what_it_sampled():
    method = online_rft.create(online_rft.Config(denominator="sampled"))
    batch = [sample(0, True), sample(0, False)]
    assert [s.advantage for s in method.advantages(batch)] == [1.0, 0.0]
