"""Every method learns: real model, engine and trainer, and a mean reward that is known exactly.

A completion is correct where its first token has an even id. The mean reward of a policy is then
the probability of an even first token, read off the model: nothing about the check is sampled.
"""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
import torch

from data_prep.config import validate
from data_prep.plugins import load_plugin, plugin_names
from pipeline.batch import Sequence, flatten
from pipeline.config import TrainConfig
from pipeline.critic import critic_of, load_scalar_model, value_head
from pipeline.engines import Prompt, Sampling
from pipeline.engines.embedded import Config as EngineConfig
from pipeline.engines.embedded import EmbeddedEngine
from pipeline.methods import create_method
from pipeline.model import load_model
from pipeline.pairs import verified_pairs
from pipeline.trainer import Trainer

from .small_run import small_run

PROMPTS = [Prompt(f"p{i}", (20 + i, 41, 62 - i)) for i in range(4)]
MAX_TOKENS, STEPS, GROUP = 3, 12, 8
OPTIONS = {
    "dapo": [{}, {"overlong_share": 0.0, "normaliser": "group_token"}],
    "grft": [{}, {"mode": "tail"}],
    "grpo": [
        {},
        {"beta": 0.05, "kl": "k1"},
        {"beta": 0.05, "kl": "k2"},
        {"supervision": "process"},
    ],
    "gspo": [{"clip_low": 0.1, "clip_high": 0.1}],
    "ppo": [{}, {"critic": "separate", "beta": 0.02}, {"entropy": 0.01, "kl": "k3"}],
    "online_rft": [{}, {"denominator": "sampled"}],
    "segment_rft": [{}, {"critic": "separate", "kl": "policy", "beta": 0.02, "whiten": "batch"}],
}
JUDGES = ("reward_model", "process_reward_model")
POLICIES = [n for n in plugin_names("pipeline.methods") if n not in JUDGES]
CASES = [(n, o) for n in POLICIES for o in OPTIONS.get(n, [{}])]


@torch.no_grad()
def mean_reward(model) -> float:
    ids = torch.tensor([p.token_ids for p in PROMPTS])
    probs = torch.softmax(model(ids).logits[:, -1], -1)
    return float(probs[:, ::2].sum(-1).mean())


def draw(
    engine: EmbeddedEngine, step: int, n: int = GROUP, prompts: list[Prompt] = PROMPTS
) -> list[Sequence]:
    sampling = Sampling(n=n, max_tokens=MAX_TOKENS, seed=1, step=step)
    return [
        Sequence(
            list(group.prompt.token_ids),
            completion.token_ids,
            [True] * len(completion.token_ids),
            number,
            reward=float(completion.token_ids[0] % 2 == 0),
            correct=completion.token_ids[0] % 2 == 0,
            # The first token is a step of its own, the rest another that is always right.
            steps=[(0, float(completion.token_ids[0] % 2 == 0))],
            segments=[min(1, place) for place in range(len(completion.token_ids))],
            finish_reason=completion.finish_reason,
            logprobs=completion.logprobs,
            text=str(completion.token_ids),
        )
        for number, group in enumerate(engine.generate(prompts, sampling))
        for completion in group.completions
    ]


def trainer_of(checkpoint, run, config, method, model) -> Trainer:
    dtype = str(model.dtype).removeprefix("torch.")
    reference = load_model(checkpoint, dtype).requires_grad_(False) if method.reference else None
    critic = None
    if method.critic == "head":
        critic = value_head(model)
    elif method.critic == "separate":
        critic = critic_of(load_scalar_model(checkpoint, dtype))
    return Trainer(run, config, method, model, reference, critic)


def learn(checkpoint, folder, name: str, options: dict, **changes) -> tuple[float, float]:
    """Train; return the mean reward before and after."""
    method = create_method(load_plugin("pipeline.methods", name).Config(kind=name, **options))
    run = small_run(folder)
    run = run.model_copy(
        update={"sampling": run.sampling.model_copy(update={"max_tokens": MAX_TOKENS})}
    )
    table = {
        "name": name,
        "method": {"kind": name, **options},
        "steps": STEPS,
        "optimizer": {"learning_rate": 3e-3, "warmup_steps": 0, "schedule": "constant"},
        **changes,
    }
    config = validate(TrainConfig, table, name)
    model = load_model(checkpoint)
    trainer = trainer_of(checkpoint, run, config, method, model.train())
    engine = EmbeddedEngine(EngineConfig(device="cpu"), checkpoint)
    before = mean_reward(model)
    fixed = draw(engine, 0, n=32)
    units = (
        method.select(fixed, 0) if method.source == "samples" else [[s] for s in fixed if s.correct]
    )
    for step in range(STEPS):
        if method.source == "policy":
            engine.load_weights(model.state_dict().items(), step)
            sequences = method.advantages(
                [
                    s
                    for group in groups_of(draw(engine, step))
                    if method.usable(group)
                    for s in group
                ]
            )
        else:
            chosen = [units[(step * 8 + i) % len(units)] for i in range(min(8, len(units)))]
            sequences = [s.in_group(g) for g, unit in enumerate(chosen) for s in unit]
        if sequences:
            trainer.update(sequences, step, STEPS)
    return before, mean_reward(model)


def groups_of(sequences: list[Sequence]) -> list[list[Sequence]]:
    return [[s for s in sequences if s.group == g] for g in range(len(PROMPTS))]


@pytest.mark.parametrize(("name", "options"), CASES)
def test_every_method_moves_the_mean_reward_up(checkpoint, tmp_path, name, options):
    before, after = learn(checkpoint, tmp_path, name, options)
    assert 0.2 < before < 0.8
    assert after > before + 0.1


@pytest.mark.parametrize("kind", ["token", "sequence"])
def test_corrected_for_the_sampler_it_learns_too(checkpoint, tmp_path, kind):
    before, after = learn(checkpoint, tmp_path, "grpo", {}, correction={"kind": kind})
    assert after > before + 0.1


@torch.no_grad()
def mean_reward_of_two(model) -> float:
    """P(the first two tokens are even), summed over the first."""
    total = 0.0
    for prompt in PROMPTS:
        start = torch.tensor([prompt.token_ids])
        first = torch.softmax(model(start).logits[0, -1], -1)
        even = torch.arange(0, len(first), 2)
        ids = torch.cat([start.expand(len(even), -1), even[:, None]], 1)
        second = torch.softmax(model(ids).logits[:, -1], -1)
        total += float((first[even] * second[:, ::2].sum(-1)).sum()) / len(PROMPTS)
    return total


@pytest.mark.parametrize("mode", ["segment", "tail"])
def test_grft_learns_a_later_segment_from_its_prefix(checkpoint, tmp_path, mode):
    """The first two tokens are to be even. Each is a segment, the second a prefix away."""
    options = {"mode": mode, "prefixes": 2, "beta": 0.0}
    method = create_method(load_plugin("pipeline.methods", "grft").Config(kind="grft", **options))
    optimizer = {"learning_rate": 3e-3, "warmup_steps": 0, "schedule": "constant"}
    table = {"name": "grft", "method": {"kind": "grft", **options}, "optimizer": optimizer}
    config = validate(TrainConfig, table, "grft")
    model = load_model(checkpoint)
    trainer = Trainer(small_run(tmp_path), config, method, model.train())
    engine = EmbeddedEngine(EngineConfig(device="cpu"), checkpoint)
    before = mean_reward_of_two(model)
    for step in range(STEPS):
        engine.load_weights(model.state_dict().items(), step)
        own = draw(engine, step)
        asks = [
            Prompt(f"{p.id}/{length}", (*p.token_ids, *group[sample].completion[:length]))
            for p, group in zip(PROMPTS, groups_of(own), strict=True)
            for sample, length in method.prefixes(group, random.Random(step))
        ]
        assert {len(ask.token_ids) for ask in asks} == {4}
        further = draw(engine, step, prompts=asks)
        for sequence in own + further:
            known = sequence.prompt[3:]
            sequence.reward = float(all(t % 2 == 0 for t in (known + sequence.completion)[:2]))
            sequence.group += len(PROMPTS) * len(known)
            if known:
                sequence.segments = [0] * len(sequence.completion)
        trainer.update(method.advantages(own + further), step, STEPS)
    assert 0.1 < before < 0.5
    assert mean_reward_of_two(model) > before + 0.1


SPLIT = [
    *((n, {}) for n in plugin_names("pipeline.methods")),
    ("ppo", {"beta": 0.1, "critic": "separate"}),
    ("ppo", {"beta": 0.1, "entropy": 0.02, "kl": "k2"}),
    ("grpo", {"supervision": "process"}),
    ("grft", {"mode": "tail", "beta": 0.1, "kl": "k1"}),
    ("gspo", {"clip_low": 0.2, "clip_high": 0.2, "beta": 0.1, "kl": "k1"}),
    ("grpo", {"beta": 0.1, "kl": "k1", "normaliser": "group_token"}),
    ("dr_grpo", {"beta": 0.1, "kl": "k2"}),
    ("grpo", {"normaliser": "trajectory"}),
    ("segment_rft", {"beta": 0.1, "kl": "policy", "critic": "separate", "gamma": 0.9}),
    ("segment_rft", {"value_clip": 0.0, "clip_low": 0.05, "clip_high": 0.05}),
]


@pytest.mark.parametrize(
    ("name", "options", "correction"),
    [
        (name, options, correction)
        for name, options in SPLIT
        # A correction belongs to methods that sample; a stage refuses it for the others.
        for correction in (
            ["off"] if name in ("sft", "rft", "dpo", *JUDGES) else ["off", "token", "sequence"]
        )
    ],
)
def test_a_step_is_the_same_however_it_is_split(checkpoint, tmp_path, name, options, correction):
    """Ratios, returns to go and corrections of whole sequences, in passes of any size."""
    method = create_method(load_plugin("pipeline.methods", name).Config(kind=name, **options))
    judge = method.trains == "scores"
    load = load_scalar_model if judge else load_model
    model = load(checkpoint, "float64")
    if judge:
        with torch.no_grad():
            model.score.weight.normal_(generator=torch.Generator().manual_seed(5))
    engine = EmbeddedEngine(EngineConfig(device="cpu"), checkpoint)
    sequences = draw(engine, 0)
    if method.source == "policy":
        sequences = method.advantages(sequences)
    elif judge:
        units = verified_pairs(sequences, random.Random(0), 4)
        sequences = [
            s for g, u in enumerate(units) for s in method.marked([s.in_group(g) for s in u])
        ]
        if name == "process_reward_model":
            sequences = [replace(s, mask=[True] + [False] * (len(s.mask) - 1)) for s in sequences]
    elif method.source == "samples":
        units = method.select(sequences, 0)
        sequences = [s.in_group(g) for g, unit in enumerate(units) for s in unit]
    gradients = []
    for micro_tokens in (1, 30, 100_000):
        table = {
            "name": name,
            "method": {"kind": name, **options},
            "micro_tokens": micro_tokens,
            "correction": {"kind": correction},
        }
        config = validate(TrainConfig, table, name)
        trainer = trainer_of(checkpoint, small_run(tmp_path), config, method, model)
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for parameter in trainer.reference.parameters() if trainer.reference else ():
                parameter.mul_(0.9)
            if trainer.critic is not None:
                trainer.critic.head.weight.normal_(generator=generator)
        tokens = flatten(sequences, torch.float64)
        tokens.weight = method.weights(tokens, MAX_TOKENS)
        if trainer.critic is not None:
            trainer._observe(sequences, tokens)
            method.prepare(tokens)
        noise = torch.randn(len(tokens.weight), dtype=torch.float64, generator=generator)
        # A sampler and a behaviour policy that are both some way off.
        tokens.old_logp = tokens.sampler_logp + 0.1 * noise
        trainer._accumulate(sequences, tokens)
        found = [p.grad.flatten() for m in trainer.trained.values() for p in m.parameters()]
        gradients.append(torch.cat(found))
    assert gradients[0].abs().max() > 1e-4
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", JUDGES)
def test_a_judge_learns_what_is_right(checkpoint, tmp_path, name):
    """Held-out samples: pairs are ranked right, and first tokens judged, far better than chance."""
    method = create_method(load_plugin("pipeline.methods", name).Config(kind=name))
    table = {
        "name": name,
        "method": {"kind": name},
        "optimizer": {"learning_rate": 3e-3, "warmup_steps": 0, "schedule": "constant"},
    }
    config = validate(TrainConfig, table, name)
    trainer = Trainer(small_run(tmp_path), config, method, load_scalar_model(checkpoint))
    engine = EmbeddedEngine(EngineConfig(device="cpu"), checkpoint)

    def batch(step: int) -> list[Sequence]:
        samples = draw(engine, step, n=32)
        if name == "process_reward_model":
            return [replace(s, mask=[True] + [False] * (len(s.mask) - 1)) for s in samples]
        units = verified_pairs(samples, random.Random(step), 16)
        return [s for g, u in enumerate(units) for s in method.marked([s.in_group(g) for s in u])]

    held_out = batch(100)
    before = trainer.held_out(held_out)
    for step in range(100):
        trainer.update(batch(step), step, 100)
    after = trainer.held_out(held_out)
    assert before["validation_loss"] == pytest.approx(math.log(2), rel=1e-6)
    assert after["validation_loss"] < before["validation_loss"] - 0.1
    assert after["validation_accuracy"] > 0.75
