"""Every method file: autograd of `objective` equals the closed form, weight · GC, to 1e-9."""

from __future__ import annotations

import pytest
import torch

from data_prep.plugins import load_plugin, plugin_names
from pipeline.batch import Sequence, Tokens, flatten
from pipeline.methods import Method, create_method

NAMES = plugin_names("pipeline.methods")
NORMALISERS = [
    {"normaliser": kind} for kind in ("sequence", "token", "group_token", "constant", "trajectory")
]
KL = [{"beta": 0.3, "kl": kind} for kind in ("k1", "k2", "k3")]
WIDE = {"clip_low": 0.1, "clip_high": 0.4}
SURROGATE = [{}, WIDE, *KL, *NORMALISERS]
VARIANTS = {
    "cispo": [*SURROGATE, {"clip_low": 0.3}],
    "dapo": [*SURROGATE, {"overlong_share": 0.0, "overlong_mask": True, "refill": 0}],
    "dpo": [{}, {"length_norm": True}, {"beta": 0.7}],
    "dr_grpo": SURROGATE,
    "grft": [*SURROGATE, {"mode": "tail"}],
    "grpo": [*SURROGATE, {"beta": 0.0}, {"epsilon": 0.1}, {"supervision": "process"}],
    "gspo": [*SURROGATE, {**WIDE, "beta": 0.3, "kl": "k1"}],
    "online_rft": [*NORMALISERS, {"denominator": "sampled"}],
    "ppo": [*SURROGATE, {"dual_clip": 1.3}, {"value_clip": 0.0}, {"critic": "separate"}],
    "process_reward_model": NORMALISERS,
    "reinforce": NORMALISERS,
    "reward_model": [{}],
    "rft": [{}, {"denominator": "sampled"}],
    "rloo": SURROGATE,
    "segment_rft": [
        {},
        WIDE,
        *NORMALISERS,
        {"beta": 0.0},
        {"beta": 0.3, "kl": "policy"},
        {"critic": "separate"},
    ],
    "sft": NORMALISERS,
}
CLIPPED = ["cispo", "dapo", "dr_grpo", "grft", "grpo", "gspo", "ppo", "rloo", "segment_rft"]
CASES = [(name, options) for name in NAMES for options in VARIANTS.get(name, [{}])]


def make(name: str, options: dict) -> Method:
    config = load_plugin("pipeline.methods", name).Config(kind=name, **options)
    method = create_method(config)
    if name == "rft":
        method.kept_share = 0.37  # type: ignore[attr-defined]
    return method


def random_step(seed: int, name: str = "") -> Tokens:
    """Twelve sequences in pairs, with ratios on both sides of every clip edge."""
    generator = torch.Generator().manual_seed(seed)
    sequences = []
    for index in range(12):
        length = int(torch.randint(1, 7, (), generator=generator))
        length = 1 if name == "reward_model" else length  # it reads one score an answer
        advantage = float(torch.randn((), generator=generator))
        mask = [True] * length
        sequences.append(
            Sequence(
                [1],
                [2] * length,
                mask,
                index // 2,
                reward=1.0,
                advantage=advantage,
                steps=[(place, float((place + index) % 2)) for place in range(length)],
                segments=[place // 2 for place in range(length)],
                logprobs=[-1.0] * length,
                sign=1 if index % 2 == 0 else -1,
            )
        )
    return flatten(sequences, torch.float64)


@pytest.mark.parametrize(("name", "options"), CASES)
@pytest.mark.parametrize("seed", range(8))
def test_objective_and_coefficient_agree(name, options, seed):
    method = make(name, options)
    tokens = random_step(seed, name)
    generator = torch.Generator().manual_seed(seed + 100)

    def noise(scale: float) -> torch.Tensor:
        shape = tokens.weight.shape
        return torch.randn(shape, dtype=torch.float64, generator=generator) * scale

    logp = (-1.0 + noise(0.5)).requires_grad_()
    tokens.old_logp = logp.detach() + noise(0.4)
    tokens.ref_logp = logp.detach() + noise(0.8)
    tokens.target, tokens.value, tokens.old_kl = noise(1.0), noise(1.0), noise(1.0).abs()
    tokens.weight = method.weights(tokens, max_tokens=8)
    (expected,) = torch.autograd.grad(method.objective(tokens, logp), logp)
    found = tokens.weight * method.gradient_coefficient(tokens, logp.detach())
    assert expected.abs().max() > 0
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", CLIPPED)
@pytest.mark.parametrize("seed", range(4))
def test_they_agree_where_advantages_differ_within_a_sequence(name, seed):
    method = make(name, WIDE)
    tokens = random_step(seed, name)
    generator = torch.Generator().manual_seed(seed + 300)
    noise = torch.randn((4, *tokens.weight.shape), dtype=torch.float64, generator=generator)
    logp = noise[0].requires_grad_()
    tokens.old_logp, tokens.advantage = logp.detach() + 0.4 * noise[1], noise[2]
    tokens.ref_logp = logp.detach() + noise[3]
    tokens.target, tokens.value, tokens.old_kl = noise[2], noise[3], noise[3].abs()
    tokens.weight = method.weights(tokens, max_tokens=8)
    (expected,) = torch.autograd.grad(method.objective(tokens, logp), logp)
    found = tokens.weight * method.gradient_coefficient(tokens, logp.detach())
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("options", [{}, {"value_clip": 0.0}, {"value_clip": 0.05}])
@pytest.mark.parametrize("name", [n for n in NAMES if make(n, {}).critic != "none"])
@pytest.mark.parametrize("seed", range(8))
def test_value_loss_and_coefficient_agree(name, options, seed):
    method = make(name, options)
    tokens = random_step(seed)
    generator = torch.Generator().manual_seed(seed + 200)

    def noise(scale: float) -> torch.Tensor:
        shape = tokens.weight.shape
        return torch.randn(shape, dtype=torch.float64, generator=generator) * scale

    value = noise(1.0).requires_grad_()
    tokens.old_logp = tokens.ref_logp = noise(0.1)
    # On both sides of the clip, and on both sides of the target.
    tokens.old_value, tokens.end_value = value.detach() + noise(0.3), noise(1.0)
    tokens.weight = method.weights(tokens, max_tokens=8)
    method.prepare(tokens)
    (expected,) = torch.autograd.grad(method.value_loss(tokens, value), value)
    found = tokens.weight * method.value_coefficient(tokens, value.detach())
    assert expected.abs().max() > 0
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_every_kind_is_here():
    assert set(VARIANTS) == set(NAMES)


@pytest.mark.parametrize("name", CLIPPED)
def test_the_random_steps_lie_on_both_sides_of_every_edge(name):
    method = make(name, {"clip_low": 0.1, "clip_high": 0.1})
    found = set()
    for seed in range(8):
        tokens = random_step(seed)
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(tokens.weight.shape, dtype=torch.float64, generator=generator)
        tokens.old_logp = 0.4 * noise
        tokens.target, tokens.value = tokens.advantage, torch.zeros_like(noise)
        ratio = method.ratio(tokens, torch.zeros_like(noise))  # type: ignore[attr-defined]
        where = torch.bucketize(ratio, torch.tensor([0.9, 1.1], dtype=torch.float64))
        found |= set(zip(where.tolist(), tokens.advantage.sign().tolist(), strict=True))
    assert found == {(part, sign) for part in (0, 1, 2) for sign in (-1.0, 1.0)}


@pytest.mark.parametrize("name", CLIPPED)
@pytest.mark.parametrize("side", [-1.0, 1.0])
@pytest.mark.parametrize("edge", ["low", "high"])
@pytest.mark.parametrize("nudge", [-1e-9, 0.0, 1e-9])
def test_at_the_edges_of_the_clip(name, side, edge, nudge):
    # Edges that float64 holds exactly, so that "at the edge" is really at it.
    method = make(name, {"beta": 0.0, "clip_low": 0.5, "clip_high": 0.5})
    tokens = flatten([Sequence([1], [2], [True], 0, reward=1.0, advantage=side)], torch.float64)
    tokens.weight = method.weights(tokens, 8)
    tokens.target, tokens.value = tokens.advantage, torch.zeros_like(tokens.advantage)
    logp = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    ratio = (0.5 if edge == "low" else 1.5) + nudge
    tokens.old_logp = -torch.log(torch.tensor([ratio], dtype=torch.float64))
    if nudge == 0.0 and float(torch.exp(-tokens.old_logp)) != ratio:
        pytest.fail("this edge is not exact in float64; choose another")
    (expected,) = torch.autograd.grad(method.objective(tokens, logp), logp)
    found = tokens.weight * method.gradient_coefficient(tokens, logp.detach())
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    beyond = (edge == "high" and side > 0 and nudge > 0) or (
        edge == "low" and side < 0 and nudge < 0
    )
    weight = float(tokens.weight) * side
    if name == "cispo":
        # A bounded weight beyond the edge, on whichever side the advantage points.
        assert float(found) == pytest.approx(weight * min(1.5, max(0.5, ratio)), rel=1e-12)
    else:
        assert float(found) == pytest.approx(0.0 if beyond else weight * ratio, rel=1e-12)


@pytest.mark.parametrize("name", [n for n in CLIPPED if n != "segment_rft"])
def test_a_term_without_its_log_probs_is_an_error(name):
    tokens = random_step(0)
    logp = torch.zeros_like(tokens.weight)
    method = make(name, {"beta": 0.3})
    # With a critic the KL stands in the reward, and `prepare` looks at both.
    ask = method.prepare if method.critic != "none" else None
    for match in ("behaviour policy", "reference"):
        with pytest.raises(ValueError, match=match):
            ask(tokens) if ask else method.gradient_coefficient(tokens, logp)
        tokens.old_logp = logp
