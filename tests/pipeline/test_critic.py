"""Values, rewards of steps and reward models: worked by hand, and against slow references."""

from __future__ import annotations

import math

import pytest
import torch

from pipeline.advantage import (
    generalised_advantages,
    process_normalised,
    token_rewards,
    whitened,
)
from pipeline.batch import Sequence, flatten, micro_batches
from pipeline.critic import Critic, critic_of, load_scalar_model, value_head
from pipeline.methods import create_method, ppo, process_reward_model, reward_model
from pipeline.model import load_model
from pipeline.policy import hidden_states
from pipeline.scorer import ModelScorer, load_scorer

EXACT = {"rtol": 1e-12, "atol": 1e-12}


def double(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def two_samples(second_reason: str = "length"):
    """Three tokens that end, and two that were cut off."""
    sequences = [
        Sequence([1], [2, 3, 4], [True] * 3, 0, reward=1.0, finish_reason="stop"),
        Sequence([1], [5, 6], [True] * 2, 0, reward=0.0, finish_reason=second_reason),
    ]
    tokens = flatten(sequences, torch.float64)
    tokens.old_value = double([0.5, 0.6, 0.8, 0.4, 0.2])
    tokens.end_value = double([9.0, 9.0, 9.0, 9.0, 0.3])
    return tokens


def test_gae_with_truncation_by_hand():
    tokens = two_samples()
    rewards = token_rewards(tokens)
    assert rewards.tolist() == [0.0, 0.0, 1.0, 0.0, 0.0]
    found = generalised_advantages(tokens, rewards, gamma=0.9, lam=0.5, bootstrap=True)
    # δ: 0.9·0.6−0.5 = 0.04, 0.9·0.8−0.6 = 0.12, 1−0.8 = 0.2 (an end: V after it is 0);
    #    0.9·0.2−0.4 = −0.22, 0.9·0.3−0.2 = 0.07 (cut off: V of the last state).
    # A: backwards with γλ = 0.45: 0.2, 0.12+0.45·0.2 = 0.21, 0.04+0.45·0.21 = 0.1345;
    #    0.07, −0.22+0.45·0.07 = −0.1885.
    torch.testing.assert_close(found, double([0.1345, 0.21, 0.2, -0.1885, 0.07]), **EXACT)
    found = generalised_advantages(tokens, rewards, gamma=0.9, lam=0.5, bootstrap=False)
    # An end for all: δ of the last token is −0.2, and −0.22−0.45·0.2 = −0.31 before it.
    torch.testing.assert_close(found, double([0.1345, 0.21, 0.2, -0.31, -0.2]), **EXACT)
    stopped = two_samples("stop")
    same = generalised_advantages(stopped, rewards, gamma=0.9, lam=0.5, bootstrap=True)
    torch.testing.assert_close(same, found, **EXACT)


def test_gae_equals_the_double_sum():
    generator = torch.Generator().manual_seed(0)
    lengths = [1, 7, 3, 12, 2]
    sequences = [
        Sequence([1], [2] * n, [True] * n, 0, reward=0.5, finish_reason=reason)
        for n, reason in zip(lengths, ["stop", "length", "stop", "stop", "length"], strict=True)
    ]
    tokens = flatten(sequences, torch.float64)
    shape = (sum(lengths),)
    tokens.old_value = torch.randn(shape, dtype=torch.float64, generator=generator)
    tokens.end_value = torch.randn(shape, dtype=torch.float64, generator=generator)
    rewards = torch.randn(shape, dtype=torch.float64, generator=generator)
    found = generalised_advantages(tokens, rewards, gamma=0.97, lam=0.9, bootstrap=True)
    start = 0
    for n, sequence in zip(lengths, sequences, strict=True):
        value = [float(v) for v in tokens.old_value[start : start + n]]
        cut = sequence.finish_reason == "length"
        value.append(float(tokens.end_value[start + n - 1]) if cut else 0.0)
        reward = [float(r) for r in rewards[start : start + n]]
        for t in range(n):
            expected = sum(
                (0.97 * 0.9) ** (s - t) * (reward[s] + 0.97 * value[s + 1] - value[s])
                for s in range(t, n)
            )
            assert float(found[start + t]) == pytest.approx(expected, abs=1e-12)
        start += n


def test_rewards_of_steps_stand_at_their_tokens():
    sequences = [
        Sequence([1], [2, 3, 4], [True] * 3, 0, reward=1.0, steps=[(0, 0.5), (2, 1.25)]),
        Sequence([1], [5, 6], [True] * 2, 0, reward=0.75),
    ]
    assert token_rewards(flatten(sequences)).tolist() == [0.5, 0.0, 1.25, 0.0, 0.75]


def test_process_advantages_of_two_outputs_with_three_steps():
    steps = [[(0, 0.0), (1, 0.0), (2, 1.0)], [(0, 0.0), (1, 0.0), (2, 0.0)]]
    found = process_normalised(steps, [3, 3], 0.0)
    root = math.sqrt(5)
    assert found[0] == pytest.approx([3 / root, 4 / root, 5 / root])
    assert found[1] == pytest.approx([-3 / root, -2 / root, -1 / root])


def test_process_advantages_of_steps_of_several_tokens():
    # Rewards 1, 0 and 0, 1: mean ½, std ½, so normalised ±1. A token sees the steps that end
    # at or after it: tokens 0-1 both steps, token 2-3 the second; token 4 is after the last.
    found = process_normalised([[(1, 1.0), (3, 0.0)], [(0, 0.0), (1, 1.0)]], [5, 2], 0.0)
    assert found == [[0.0, 0.0, -1.0, -1.0, 0.0], [0.0, 1.0]]


def test_equal_step_rewards_give_no_signal():
    assert process_normalised([[(0, 1.0)], [(1, 1.0)]], [1, 2], 0.0) == [[0.0], [0.0, 0.0]]


def test_one_step_a_solution_is_outcome_supervision():
    config = {"beta": 0.0}
    from pipeline.methods import grpo

    def samples():
        return [
            Sequence([1], [2] * n, [True] * n, 0, reward=r, steps=[(n - 1, r)])
            for n, r in ((2, 1.0), (3, 0.0), (1, 0.0))
        ]

    outcome, process = samples(), samples()
    grpo.create(grpo.Config(**config)).advantages(outcome)
    grpo.create(grpo.Config(**config, supervision="process")).advantages(process)
    one = flatten(outcome, torch.float64).advantage
    torch.testing.assert_close(one, flatten(process, torch.float64).advantage, **EXACT)


def test_whitened_advantages_have_no_mean_and_unit_spread():
    found = whitened(double([1.0, 2.0, 3.0, 6.0]))
    assert float(found.mean()) == pytest.approx(0.0, abs=1e-12)
    assert float(found.std(unbiased=False)) == pytest.approx(1.0, abs=1e-6)


def test_the_clipped_value_loss_by_hand():
    method = ppo.create(ppo.Config(value_clip=0.2))
    tokens = flatten([Sequence([1], [2] * 3, [True] * 3, 0, reward=1.0)], torch.float64)
    tokens.weight = double([1.0, 1.0, 1.0])
    tokens.old_value, tokens.target = double([0.0, 0.0, 0.0]), double([1.0, 1.0, -1.0])
    value = double([0.1, 0.5, 0.5])
    # Within the clip: ½·0.81. Beyond, towards the target: V_clip = 0.2 is worse, ½·0.64, and has
    # no slope. Beyond, away from it: V itself is worse, ½·2.25.
    assert float(method.value_loss(tokens, value)) == pytest.approx(0.405 + 0.32 + 1.125)
    assert method.value_coefficient(tokens, value).tolist() == pytest.approx([-0.9, 0.0, 1.5])


def test_bradley_terry_by_hand():
    method = create_method(reward_model.Config())
    pair = [Sequence([1], [2], [True], 0, sign=1), Sequence([1], [3], [True], 0, sign=-1)]
    tokens = flatten(pair, torch.float64)
    tokens.weight = method.weights(tokens, 8)
    assert float(method.objective(tokens, double([0.3, 0.3]))) == pytest.approx(-math.log(2))
    assert method.gradient_coefficient(tokens, double([0.3, 0.3])).tolist() == [0.5, -0.5]
    # A margin of log 3: σ(−log 3) = ¼.
    scores = double([math.log(3), 0.0])
    assert float(method.objective(tokens, scores)) == pytest.approx(math.log(0.75))
    assert method.gradient_coefficient(tokens, scores).tolist() == pytest.approx([0.25, -0.25])
    # Swapping the pair flips every sign.
    tokens.sign = -tokens.sign
    flipped = method.gradient_coefficient(tokens, scores.flip(0)).tolist()
    assert flipped == pytest.approx([-0.25, 0.25])


def test_calibration_of_a_judge_that_knows_its_error():
    # Says 0.75 four times and is right three times.
    right = math.log(3)
    assert reward_model.calibration_error(double([right, right, right, -right] * 10)) < 0.11
    # Always wrong at 0.75.
    assert reward_model.calibration_error(double([-right] * 8)) == pytest.approx(0.75)


def test_process_labels_by_hand():
    method = create_method(process_reward_model.Config())
    steps = [(0, 1.0), (2, 0.0)]
    sequence = Sequence([1], [2, 3, 4], [True, False, True], 0, steps=steps)
    tokens = flatten([sequence], torch.float64)
    tokens.weight = method.weights(tokens, 8)
    assert tokens.weight.tolist() == [0.5, 0.5]
    at_zero = double([0.0, 0.0])
    assert float(method.objective(tokens, at_zero)) == pytest.approx(-math.log(2))
    assert method.gradient_coefficient(tokens, at_zero).tolist() == [0.5, -0.5]


def test_lines_of_samples_become_labels():
    method = process_reward_model.create(process_reward_model.Config(data="samples", epochs=2))
    samples = [
        Sequence([1], [2, 3, 4], [True] * 3, 0, correct=True, steps=[(0, 1.0), (2, 1.0)]),
        Sequence([1], [2, 3], [True] * 2, 0, correct=False, steps=[(0, 0.5), (1, 0.0)]),
        Sequence([1], [2], [True], 0, correct=None, steps=[(0, 1.0)]),
        Sequence([1], [2], [True], 0, correct=True),
    ]
    units = method.select(samples, 0)
    assert len(units) == 4  # two samples, twice: unjudged ones and those without steps are left out
    first = next(unit[0] for unit in units if unit[0].correct)
    other = next(unit[0] for unit in units if not unit[0].correct)
    assert (first.mask, first.steps) == ([True, False, True], [(0, 1.0), (2, 1.0)])
    assert (other.mask, other.steps) == ([True, True], [(0, 0.0), (1, 0.0)])


@pytest.fixture(scope="module")
def judge(checkpoint):
    model = load_scalar_model(checkpoint, "float64")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        model.score.weight.normal_(generator=generator)  # type: ignore[union-attr]
    return model.eval().requires_grad_(False)


def test_a_new_head_says_nothing_yet(checkpoint):
    model = load_scalar_model(checkpoint)
    assert float(model.score.weight.detach().abs().sum()) == 0.0  # type: ignore[union-attr]
    assert ModelScorer(model.eval()).score([[5, 6]], [[7, 8, 9]]) == [0.0]


@pytest.mark.parametrize("micro_tokens", [1, 10_000])
def test_scores_are_those_of_the_model_alone(judge, micro_tokens):
    prompts = [[5, 6, 7], [5, 6, 7], [8, 9]]
    completions = [[10, 11], [12, 13, 14, 15], [16]]
    found = ModelScorer(judge, micro_tokens).score(prompts, completions)
    for prompt, completion, score in zip(prompts, completions, found, strict=True):
        alone = judge(torch.tensor([prompt + completion])).logits[0, -1]
        assert score == pytest.approx(float(alone), rel=1e-5)


def test_scores_of_steps_are_read_where_they_end(judge):
    prompts, completions = [[5, 6], [7], [8, 9]], [[10, 11, 12, 13], [14, 15], [16]]
    found = ModelScorer(judge).score_steps(prompts, completions, [[1, 3, 3], [], [0]])
    for ends, prompt, completion, scores in zip(
        [[1, 3, 3], [], [0]], prompts, completions, found, strict=True
    ):
        expected = [
            float(torch.sigmoid(judge(torch.tensor([prompt + completion[: e + 1]])).logits[0, -1]))
            for e in ends
        ]
        assert scores == pytest.approx(expected, rel=1e-5)


def test_a_saved_judge_comes_back_and_knows_its_kind(judge, checkpoint, tmp_path):
    from data_prep.errors import UserError
    from pipeline.model import load_tokenizer, save_checkpoint

    save_checkpoint(tmp_path / "rm", judge, load_tokenizer(checkpoint), [0], "embedded", "end")
    back = load_scorer(tmp_path / "rm", "end", "cpu")
    asked = ([[5, 6]], [[7, 8, 9]])
    assert back.score(*asked) == pytest.approx(ModelScorer(judge).score(*asked), rel=1e-4)
    with pytest.raises(UserError, match="process reward model"):
        load_scorer(tmp_path / "rm", "steps", "cpu")


@pytest.mark.parametrize("own", [False, True])
def test_values_before_and_after_are_of_neighbouring_states(checkpoint, judge, own):
    """After token t and before token t + 1 is one state, whatever the layout."""
    policy = load_model(checkpoint, "float64")
    head = value_head(policy)
    with torch.no_grad():
        head.head.weight.normal_(generator=torch.Generator().manual_seed(2))
    critic: Critic = critic_of(judge) if own else head
    sequences = [
        Sequence([5, 6, 7], [8, 9, 10, 11], [True] * 4, 0),
        Sequence([5, 6, 7], [12, 13], [True] * 2, 0),
    ]
    tokens = flatten(sequences, torch.float64)
    (micro,) = micro_batches(sequences, tokens, 1000)
    with torch.no_grad():
        before, after = critic(micro.layout, hidden_states(policy.base_model, micro.layout))
    where = micro.tokens.sequence
    inside = where[1:] == where[:-1]
    torch.testing.assert_close(before[1:][inside], after[:-1][inside], rtol=1e-9, atol=1e-9)
    # Both samples begin in the same state.
    firsts = [int((where == n).nonzero()[0]) for n in (0, 1)]
    assert float(before[firsts[0]]) == pytest.approx(float(before[firsts[1]]), rel=1e-9)
