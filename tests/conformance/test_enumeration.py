"""Exact expectations: a policy whose every completion can be summed over, in float64.

Vocabulary of 7 tokens, one of them the end; completions of at most 3 tokens: 259 of them. The
policy is a table of logits, one row a prefix. Nothing is sampled, so what a method's coefficient
adds up to is its expected gradient itself, and that is compared with the gradient it should be.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from data_prep.plugins import load_plugin, plugin_names
from pipeline.batch import Sequence, Tokens, flatten
from pipeline.correction import CorrectionConfig, importance
from pipeline.divergence import estimate
from pipeline.methods import Method, create_method

VOCABULARY, LONGEST, END = 7, 3, 0
WORDS = range(1, VOCABULARY)
PREFIXES = [p for n in range(LONGEST) for p in itertools.product(WORDS, repeat=n)]
ROW = {prefix: row for row, prefix in enumerate(PREFIXES)}
COMPLETIONS = [(*p, END) for p in PREFIXES] + list(itertools.product(WORDS, repeat=LONGEST))
STATES = torch.tensor([ROW[o[:t]] for o in COMPLETIONS for t in range(len(o))])
ACTIONS = torch.tensor([a for o in COMPLETIONS for a in o])
CORRECT = torch.tensor([sum(o) % 3 == 1 for o in COMPLETIONS])
GROUP = 3
TOLERANCE = {"rtol": 1e-9, "atol": 1e-12}


def make(name: str, **options) -> Method:
    return create_method(load_plugin("pipeline.methods", name).Config(kind=name, **options))


def table(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(len(PREFIXES), VOCABULARY, dtype=torch.float64, generator=generator)


def log_probs(logits: Tensor) -> Tensor:
    """log π of every token of every completion, [T]."""
    return torch.log_softmax(logits, -1)[STATES, ACTIONS]


def every_completion() -> Tokens:
    return flatten(
        [
            Sequence([9], list(o), [True] * len(o), 0, reward=float(c), correct=bool(c))
            for o, c in zip(COMPLETIONS, CORRECT, strict=True)
        ],
        torch.float64,
    )


def probability(tokens: Tokens, logp: Tensor) -> Tensor:
    """π(o) of every completion, [N]."""
    return torch.exp(tokens.per_sequence(logp))


def gradient_of_coefficient(
    method: Method, tokens: Tokens, logits: Tensor, factor: Tensor | float = 1.0
) -> Tensor:
    """Σ_o Σ_t weight · GC · factor · ∇ log π, as the training loop adds it up."""
    logp = log_probs(logits)
    c = method.gradient_coefficient(tokens, logp.detach()) * tokens.weight * factor
    return torch.autograd.grad((c.detach() * logp).sum(), logits)[0]


def test_the_enumeration_is_complete():
    tokens = every_completion()
    assert len(COMPLETIONS) == len(set(COMPLETIONS)) == 259
    assert float(probability(tokens, log_probs(table(0))).sum()) == pytest.approx(1.0, abs=1e-12)


# Their variables are not log-probs of completions: pairs, and scores.
OTHER = {"dpo", "reward_model", "process_reward_model"}


@pytest.mark.parametrize("per_token", [True, False])
@pytest.mark.parametrize("name", [n for n in plugin_names("pipeline.methods") if n not in OTHER])
def test_off_policy_the_coefficient_is_the_gradient_of_the_objective(name, per_token):
    """Behaviour policy, policy and reference all differ; clips bind on part of the tokens."""
    method = make(name)
    logits = table(1).requires_grad_()
    old, ref = log_probs(logits.detach() + 0.2 * table(2)), log_probs(table(3))
    tokens = every_completion()
    tokens.old_logp, tokens.ref_logp = old, ref
    weight = probability(tokens, old)
    tokens.weight = (weight / tokens.lengths if per_token else weight)[tokens.sequence]
    generator = torch.Generator().manual_seed(4)
    advantage = torch.randn(len(COMPLETIONS), dtype=torch.float64, generator=generator)
    tokens.advantage = advantage[tokens.sequence]
    tokens.old_value = tokens.value = torch.zeros_like(tokens.weight)
    tokens.target = tokens.advantage
    (expected,) = torch.autograd.grad(method.objective(tokens, log_probs(logits)), logits)
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(
        gradient_of_coefficient(method, tokens, logits), expected, **TOLERANCE
    )


@pytest.mark.parametrize("length_norm", [True, False])
def test_dpo_over_every_pair_is_the_gradient_of_its_loss(length_norm):
    beta = 0.4
    method = make("dpo", beta=beta, length_norm=length_norm)
    logits, ref_logits = table(1).requires_grad_(), table(3)
    # Every 5th of each side keeps the pairs to some hundreds.
    good = [o for o, c in zip(COMPLETIONS, CORRECT, strict=True) if c][::5]
    bad = [o for o, c in zip(COMPLETIONS, CORRECT, strict=True) if not c][::5]
    pairs = list(itertools.product(good, bad))
    sequences = [
        Sequence([9], list(o), [True] * len(o), number, sign=sign)
        for number, pair in enumerate(pairs)
        for o, sign in zip(pair, (1, -1), strict=True)
    ]
    tokens = flatten(sequences, torch.float64)
    states = torch.tensor(
        [ROW[tuple(s.completion[:t])] for s in sequences for t in range(len(s.completion))]
    )
    actions = torch.tensor([a for s in sequences for a in s.completion])
    tokens.ref_logp = torch.log_softmax(ref_logits, -1)[states, actions]
    tokens.weight = method.weights(tokens, LONGEST)
    logp = torch.log_softmax(logits, -1)[states, actions]
    c = method.gradient_coefficient(tokens, logp.detach()) * tokens.weight
    (found,) = torch.autograd.grad((c * logp).sum(), logits)

    # The same loss from whole completions, written down without the flat axis.
    whole = every_completion()
    h = whole.per_sequence(log_probs(logits) - log_probs(ref_logits))
    h = h / whole.lengths if length_norm else h
    at = {o: i for i, o in enumerate(COMPLETIONS)}
    first, second = (torch.tensor([at[pair[side]] for pair in pairs]) for side in (0, 1))
    loss = torch.nn.functional.logsigmoid(beta * (h[first] - h[second])).mean()
    (expected,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(found, expected, **TOLERANCE)


def expected_advantage(method: Method, p: float, correct: bool) -> float:
    """E over the rest of its group of Â·G/N_kept, for a sample of known verdict."""
    total = 0.0
    for others in itertools.product((True, False), repeat=GROUP - 1):
        group = [
            Sequence([9], [1], [True], 0, reward=float(c), correct=c) for c in (correct, *others)
        ]
        chance = math.prod(p if c else 1.0 - p for c in others)
        kept = method.advantages(group)
        if any(s is group[0] for s in kept):
            total += chance * group[0].advantage * GROUP / len(kept)
    return total


def spread_factor(p: float) -> float:
    """Σ_k Binomial(k; G, p) √(k(G−k)) / (G p (1−p)): what dividing by the spread does to ∇p.

    A group with k correct adds (1/G)(k·√((G−k)/k)/p + (G−k)·√(k/(G−k))/(1−p)) ∇p.
    """
    return sum(
        math.comb(GROUP, k) * p**k * (1 - p) ** (GROUP - k) * math.sqrt(k * (GROUP - k))
        for k in range(GROUP + 1)
    ) / (GROUP * p * (1 - p))


EXPECTED = [
    ("rloo", {}, lambda p: 1.0),
    ("dr_grpo", {}, lambda p: (GROUP - 1) / GROUP),
    ("reinforce", {}, lambda p: (GROUP - 1) / GROUP),
    ("online_rft", {"denominator": "sampled"}, lambda p: 1.0),
    ("online_rft", {"denominator": "kept"}, lambda p: (1 - (1 - p) ** GROUP) / p),
    ("grpo", {"beta": 0.0, "epsilon": 0.0}, spread_factor),
    ("dapo", {"epsilon": 0.0}, spread_factor),
    ("grft", {"epsilon": 0.0, "beta": 0.0, "mode": "tail"}, spread_factor),
    ("gspo", {"epsilon": 0.0}, spread_factor),
    ("cispo", {"epsilon": 0.0}, spread_factor),
]


def test_every_method_that_samples_has_an_expected_gradient():
    sampling = {n for n in plugin_names("pipeline.methods") if make(n).source == "policy"}
    with_critic = {n for n in sampling if make(n).critic != "none"}
    assert {name for name, _, _ in EXPECTED} == sampling - with_critic
    assert with_critic == {"ppo", "segment_rft"}


@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_ppo_with_any_critic_follows_the_accuracy_minus_the_divergence(beta):
    """λ = γ = 1: whatever V says of the states, it is a baseline and leaves no bias."""
    method = make("ppo", beta=beta, lam=1.0, gamma=1.0, whiten=False, truncation="terminal")
    logits, ref = table(5).requires_grad_(), table(6)
    tokens = every_completion()
    tokens.old_logp, tokens.ref_logp = log_probs(logits.detach()), log_probs(ref)
    tokens.weight = probability(tokens, tokens.old_logp)[tokens.sequence]
    generator = torch.Generator().manual_seed(8)
    of_prefix = torch.randn(len(PREFIXES), dtype=torch.float64, generator=generator)
    tokens.old_value = of_prefix[STATES]
    tokens.end_value = torch.zeros_like(tokens.weight)
    method.prepare(tokens)
    found = gradient_of_coefficient(method, tokens, logits)
    accuracy = probability(tokens, log_probs(logits))[CORRECT].sum()
    kl = (reach(logits) * divergence(logits, ref)).sum()
    (slope,) = torch.autograd.grad(accuracy - beta * kl, logits)
    torch.testing.assert_close(found, slope, **TOLERANCE)


def test_ppo_with_the_true_value_needs_no_more_than_one_step():
    """λ = 0 looks one state ahead; with the true V that too is the exact gradient."""
    method = make("ppo", lam=0.0, whiten=False, truncation="terminal")
    logits = table(5).requires_grad_()
    tokens = every_completion()
    tokens.old_logp = log_probs(logits.detach())
    chance = probability(tokens, tokens.old_logp)
    tokens.weight = chance[tokens.sequence]
    # V(prefix) = P(correct | prefix), summed over the completions that begin with it.
    total, good = (torch.zeros(len(PREFIXES), dtype=torch.float64) for _ in range(2))
    for o, p, c in zip(COMPLETIONS, chance, CORRECT, strict=True):
        for t in range(len(o)):
            total[ROW[o[:t]]] += p
            good[ROW[o[:t]]] += p * c
    tokens.old_value = (good / total)[STATES]
    tokens.end_value = torch.zeros_like(tokens.weight)
    method.prepare(tokens)
    accuracy = probability(tokens, log_probs(logits))[CORRECT].sum()
    (slope,) = torch.autograd.grad(accuracy, logits)
    torch.testing.assert_close(gradient_of_coefficient(method, tokens, logits), slope, **TOLERANCE)


def segmented(every_token: bool) -> Tokens:
    """Every completion, its reward at its end, as one segment or a segment a token."""
    return flatten(
        [
            Sequence(
                [9],
                list(o),
                [True] * len(o),
                0,
                reward=float(c),
                steps=[(len(o) - 1, float(c))],
                segments=list(range(len(o))) if every_token else [0] * len(o),
            )
            for o, c in zip(COMPLETIONS, CORRECT, strict=True)
        ],
        torch.float64,
    )


def test_segment_rft_with_one_segment_and_no_critic_is_reinforce_by_sequence_ratios():
    """Σ_o π_old(o) ρ(o) R(o) ∇log π(o) = ∇P(correct), however far π_old is."""
    method = make("segment_rft", beta=0.0, clip_low=0.999, clip_high=1e9)
    logits = table(5).requires_grad_()
    tokens = segmented(every_token=False)
    tokens.old_logp = log_probs(logits.detach() + 0.3 * table(7))
    tokens.weight = probability(tokens, tokens.old_logp)[tokens.sequence]
    tokens.old_value = tokens.value = torch.zeros_like(tokens.weight)
    method.prepare(tokens)
    assert torch.equal(_known(tokens.target), CORRECT.to(torch.float64)[tokens.sequence])
    accuracy = probability(tokens, log_probs(logits))[CORRECT].sum()
    (slope,) = torch.autograd.grad(accuracy, logits)
    torch.testing.assert_close(gradient_of_coefficient(method, tokens, logits), slope, **TOLERANCE)


def test_segment_rft_with_the_true_values_is_the_policy_gradient():
    """A segment a token; V is what is to be expected from each prefix."""
    method = make("segment_rft", beta=0.0)
    logits = table(5).requires_grad_()
    tokens = segmented(every_token=True)
    tokens.old_logp = log_probs(logits.detach())
    chance = probability(tokens, tokens.old_logp)
    tokens.weight = chance[tokens.sequence]
    total, good = (torch.zeros(len(PREFIXES), dtype=torch.float64) for _ in range(2))
    for o, p, c in zip(COMPLETIONS, chance, CORRECT, strict=True):
        for t in range(len(o)):
            total[ROW[o[:t]]] += p
            good[ROW[o[:t]]] += p * c
    tokens.old_value = tokens.value = (good / total)[STATES]
    method.prepare(tokens)
    accuracy = probability(tokens, log_probs(logits))[CORRECT].sum()
    (slope,) = torch.autograd.grad(accuracy, logits)
    torch.testing.assert_close(gradient_of_coefficient(method, tokens, logits), slope, **TOLERANCE)


def _known(values: Tensor | None) -> Tensor:
    assert values is not None
    return values


@pytest.mark.parametrize(("name", "options", "factor"), EXPECTED)
def test_on_policy_the_expected_gradient_is_that_of_the_accuracy(name, options, factor):
    method = make(name, **options)
    logits = table(5).requires_grad_()
    tokens = every_completion()
    logp = log_probs(logits)
    chance = probability(tokens, logp)
    accuracy = chance[CORRECT].sum()
    (slope,) = torch.autograd.grad(accuracy, logits)
    p = float(accuracy.detach())
    assert 0.1 < p < 0.9
    tokens.old_logp = log_probs(logits.detach())
    tokens.weight = chance.detach()[tokens.sequence]
    sides = torch.tensor(
        [expected_advantage(method, p, correct) for correct in (False, True)], dtype=torch.float64
    )
    tokens.advantage = sides[CORRECT.to(torch.int64)][tokens.sequence]
    found = gradient_of_coefficient(method, tokens, logits)
    torch.testing.assert_close(found, factor(p) * slope, **TOLERANCE)


def from_state(method: Method, prefix: tuple[int, ...], logits: Tensor) -> tuple[Tensor, Tensor]:
    """GRFT in one prefix state: its expected gradient, and P(correct | prefix), differentiable."""
    further = [
        (o, bool(c))
        for o, c in zip(COMPLETIONS, CORRECT, strict=True)
        if o[: len(prefix)] == prefix and len(o) > len(prefix)
    ]
    whole = [
        Sequence([9, *prefix], list(o[len(prefix) :]), [True] * (len(o) - len(prefix)), 0, reward=1)
        for o, _ in further
    ]
    log_p = torch.log_softmax(logits, -1)

    def logp_of(sequences: list[Sequence]) -> Tensor:
        at = [(*prefix, *s.completion) for s in sequences]
        places = [(ROW[o[:t]], o[t]) for o in at for t in range(len(prefix), len(o))]
        rows, actions = torch.tensor(places).T
        return log_p[rows, actions]

    chance = probability(flatten(whole, torch.float64), logp_of(whole))
    accuracy = sum((p for p, (_, c) in zip(chance, further, strict=True) if c), torch.zeros(()))
    p = float(accuracy.detach())
    trained = []
    for sequence, (_, correct) in zip(whole, further, strict=True):
        # Every token is a segment. Given the others, this sample's own advantage is set.
        sequence.segments = list(range(len(sequence.completion)))
        mean, own = 0.0, sequence
        for others in itertools.product((True, False), repeat=GROUP - 1):
            group = [replace(sequence, reward=float(c)) for c in (correct, *others)]
            kept = method.advantages(group)
            if kept:
                own = kept[0]
                mean += math.prod(p if c else 1.0 - p for c in others) * own.advantage
        trained.append(replace(own, advantage=mean))
    tokens = flatten(trained, torch.float64)
    logp = logp_of(trained)
    tokens.old_logp, tokens.weight = logp.detach(), chance.detach()[tokens.sequence]
    c = method.gradient_coefficient(tokens, logp.detach()) * tokens.weight
    return torch.autograd.grad((c * logp).sum(), logits, retain_graph=True)[0], accuracy


@pytest.mark.parametrize("prefix", [(), (2,), (4,), (3, 5)])
def test_grft_from_a_prefix_follows_the_accuracy_from_there(prefix):
    """From any state the tail's expected gradient is GRPO's: the spread's factor times ∇p."""
    logits = table(5).requires_grad_()
    method = make("grft", mode="tail", beta=0.0, epsilon=0.0)
    found, accuracy = from_state(method, prefix, logits)
    (slope,) = torch.autograd.grad(accuracy, logits)
    p = float(accuracy.detach())
    assert 0.05 < p < 0.95
    torch.testing.assert_close(found, spread_factor(p) * slope, **TOLERANCE)


def test_grft_by_segments_in_every_state_is_the_policy_gradient():
    """Σ_s reach(s) · E[gradient in s] = (G − 1)/G ∇P(correct), where Â = r − mean.

    ε_R that is far above the spread makes Â·ε_R of it.
    """
    logits = table(5).requires_grad_()
    large = 1e13
    method = make("grft", mode="segment", beta=0.0, epsilon=large)
    visits = reach(logits.detach())
    total = torch.zeros_like(logits)
    for prefix in PREFIXES:
        total += visits[ROW[prefix]] * large * from_state(method, prefix, logits)[0]
    accuracy = probability(every_completion(), log_probs(logits))[CORRECT].sum()
    (slope,) = torch.autograd.grad(accuracy, logits)
    torch.testing.assert_close(total, (GROUP - 1) / GROUP * slope, **TOLERANCE)


def reach(logits: Tensor) -> Tensor:
    """Probability of coming to every prefix, [rows]."""
    probs = torch.softmax(logits, -1)
    return torch.stack(
        [
            torch.stack([probs[ROW[p[:t]], p[t]] for t in range(len(p))]).prod()
            if p
            else torch.ones((), dtype=torch.float64)
            for p in PREFIXES
        ]
    )


def divergence(first: Tensor, second: Tensor) -> Tensor:
    """KL between rows of logits, [rows]."""
    a, b = torch.log_softmax(first, -1), torch.log_softmax(second, -1)
    return (a.exp() * (a - b)).sum(-1)


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
@pytest.mark.parametrize("name", ["grpo", "gspo", "cispo", "rloo"])
def test_each_kl_estimate_follows_its_divergence(name, kind):
    beta = 0.7
    method = make(name, beta=beta, kl=kind)
    logits, ref = table(5).requires_grad_(), table(6)
    tokens = every_completion()
    tokens.old_logp, tokens.ref_logp = log_probs(logits.detach()), log_probs(ref)
    tokens.weight = probability(tokens, tokens.old_logp)[tokens.sequence]
    tokens.advantage = torch.zeros_like(tokens.weight)
    found = gradient_of_coefficient(method, tokens, logits)
    if kind == "k1":
        # The whole sequence's KL: how often a state is visited depends on the policy too.
        target = (reach(logits) * divergence(logits, ref)).sum()
    elif kind == "k2":
        target = (reach(logits).detach() * divergence(logits, ref)).sum()
    else:
        target = (reach(logits).detach() * divergence(ref, logits)).sum()
    (slope,) = torch.autograd.grad(target, logits)
    torch.testing.assert_close(found, -beta * slope, **TOLERANCE)


def test_k1_and_k3_are_unbiased_and_k1_as_a_loss_is_nothing():
    logits, ref = table(5).requires_grad_(), table(6)
    tokens = every_completion()
    logp = log_probs(logits)
    chance = probability(tokens, logp).detach()[tokens.sequence]
    expected = float((reach(logits) * divergence(logits, ref)).sum().detach())
    for kind in ("k1", "k3"):
        value = (chance * estimate(kind, logp, log_probs(ref))).sum()
        assert float(value.detach()) == pytest.approx(expected, rel=1e-9)
    loss = (chance * estimate("k1", logp, log_probs(ref))).sum()
    (slope,) = torch.autograd.grad(loss, logits)
    assert float(slope.abs().max()) < 1e-12


def test_the_sequence_correction_undoes_the_sampler_exactly():
    """Samples of another distribution, weighted by `is`, give the policy's own gradient."""
    method = make("rloo")
    logits = table(5).requires_grad_()
    sampler = log_probs(logits.detach() + 0.3 * table(7))
    tokens = every_completion()
    tokens.old_logp = log_probs(logits.detach())
    tokens.sampler_logp = sampler
    tokens.advantage = CORRECT.to(torch.float64)[tokens.sequence]
    tokens.weight = probability(tokens, sampler)[tokens.sequence]

    def found(**options) -> Tensor:
        return gradient_of_coefficient(
            method, tokens, logits, importance(tokens, CorrectionConfig(**options))
        )

    accuracy = probability(tokens, log_probs(logits))[CORRECT].sum()
    (slope,) = torch.autograd.grad(accuracy, logits)
    torch.testing.assert_close(found(kind="sequence", cap=1e12), slope, **TOLERANCE)
    # What the other settings leave: none, too little, and the capped part.
    for options in ({"kind": "off"}, {"kind": "token", "cap": 1e12}, {"kind": "sequence"}):
        assert float((found(**options) - slope).abs().max()) > 1e-4
