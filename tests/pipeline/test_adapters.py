"""Adapters beside peft itself, the reference that costs no second model, and what is written."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from data_prep.config import validate
from data_prep.errors import UserError
from pipeline.adapters import Adapters, LoraConfig, merge, plain_weights
from pipeline.agreement import Agreement, AgreementConfig
from pipeline.batch import Sequence, flatten, micro_batches
from pipeline.config import TrainConfig
from pipeline.critic import critic_of, load_scalar_model
from pipeline.engines import Prompt, Sampling
from pipeline.engines.embedded import Config as EngineConfig
from pipeline.engines.embedded import EmbeddedEngine
from pipeline.methods import create_method
from pipeline.model import load_model, load_tokenizer, save_checkpoint
from pipeline.policy import logprobs_of
from pipeline.scorer import ModelScorer
from pipeline.state import Part
from pipeline.trainer import Trainer

from .small_run import small_run

LORA = LoraConfig(rank=4, alpha=8.0)


def adapted(checkpoint, task="policy", dtype="float32", resets=False, config=LORA):
    """Return a model and its adapters, both moved away from where they start."""
    load = load_model if task == "policy" else load_scalar_model
    model = load(checkpoint, dtype)
    adapters = Adapters(model, config, task, seed=3, resets=resets)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model, adapters


def some_sequences(n=4) -> list[Sequence]:
    return [Sequence([30, 31, 40 + i], [50, 60 + i, 41], [True] * 3, i) for i in range(n)]


def logprobs(model, sequences=None):
    sequences = sequences or some_sequences()
    tokens = flatten(sequences)
    (micro,) = micro_batches(sequences, tokens, 10_000)
    return logprobs_of(model, micro.layout).logp


@pytest.mark.parametrize("targets", [(), ("q_proj", "down_proj")])
def test_merged_weights_are_those_of_peft_bit_for_bit(checkpoint, targets):
    config = LoraConfig(rank=4, alpha=8.0, targets=targets)
    model, adapters = adapted(checkpoint, config=config)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    ours = {name: value.clone() for name, value in plain_weights(model)}
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    plain = load_model(checkpoint).state_dict()
    assert list(ours) == list(plain)
    changed = {name for name in ours if not torch.equal(ours[name], plain[name])}
    assert {name.split(".")[-2] for name in changed} == (
        set(targets)
        or {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    )
    theirs = copy.deepcopy(adapters.wrapped).merge_and_unload().state_dict()
    for name, value in theirs.items():
        assert torch.equal(value, ours[name]), name


def test_without_adapters_it_is_the_base_bit_for_bit(checkpoint):
    model, adapters = adapted(checkpoint)
    base = logprobs(load_model(checkpoint))
    now = logprobs(model)
    assert (now - base).abs().max() > 1e-3
    with adapters.reference():
        assert torch.equal(logprobs(model), base)
    assert torch.equal(logprobs(model), now)


def test_log_probs_are_those_of_the_whole_model_and_of_peft(checkpoint):
    """Backbone and output embedding are reached past peft's wrapping."""
    model, adapters = adapted(checkpoint, dtype="float64")
    ids = torch.tensor([[30, 31, 40, 50, 60, 41]])
    logits = adapters.wrapped(input_ids=ids).logits[0]
    expected = torch.log_softmax(logits, -1)[torch.arange(2, 5), ids[0, 3:]]
    found = logprobs(model, some_sequences(1))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    merged = load_model(checkpoint, "float64")
    merged.load_state_dict(dict(plain_weights(model)))
    torch.testing.assert_close(logprobs(merged, some_sequences(1)), found, rtol=1e-9, atol=1e-9)


def test_only_adapters_are_trained_and_saved(checkpoint):
    model, _ = adapted(checkpoint)
    names = Part(model, torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])).parameters()
    assert names
    assert all(".lora_A." in name or ".lora_B." in name for name in names)


def test_a_reset_reference_stays_where_the_policy_was(checkpoint):
    model, adapters = adapted(checkpoint, resets=True)
    base = logprobs(load_model(checkpoint))
    with adapters.reference():
        assert torch.equal(logprobs(model), base)
    adapters.reset_reference()
    then = logprobs(model).detach()
    now = logprobs(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02)
    with adapters.reference():
        assert torch.equal(logprobs(model), then)
    assert (logprobs(model) - now).abs().max() > 1e-4


@pytest.mark.parametrize("resets", [False, True])
def test_asking_the_reference_leaves_the_gradient_alone(checkpoint, resets):
    """The reference is asked between the policy's forward and backward pass."""
    gradients = []
    for ask in (False, True):
        model, adapters = adapted(checkpoint, dtype="float64", resets=resets)
        model.train().gradient_checkpointing_enable({"use_reentrant": False})
        now = logprobs(model)
        if ask:
            with torch.no_grad(), adapters.reference():
                logprobs(model)
        now.sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))


def trainer_of(checkpoint, tmp_path, method, **changes) -> Trainer:
    table = {"name": "lora", "method": method, "lora": LORA.model_dump(), **changes}
    config = validate(TrainConfig, table, "lora")
    model = load_model(checkpoint)
    adapters = Adapters(model, config.lora, seed=1)
    reference = model if create_method(config.method).reference else None
    made = create_method(config.method)
    return Trainer(small_run(tmp_path), config, made, model.train(), reference, None, adapters)


@torch.no_grad()
def mean_reward(model) -> float:
    ids = torch.tensor([s.prompt for s in some_sequences()])
    return float(torch.softmax(model(ids).logits[:, -1], -1)[:, ::2].sum(-1).mean())


def test_a_policy_learns_through_its_adapters_and_an_engine_follows(checkpoint, tmp_path):
    """Reward: an even first token. The engine samples from merged weights at every step."""
    optimizer = {"learning_rate": 2e-2, "warmup_steps": 0, "schedule": "constant"}
    method = {"kind": "grpo", "beta": 0.02, "updates": 2}
    trainer = trainer_of(checkpoint, tmp_path, method, optimizer=optimizer)
    engine = EmbeddedEngine(EngineConfig(device="cpu"), checkpoint)
    frozen = {n: p.clone() for n, p in trainer.model.named_parameters() if not p.requires_grad}
    before = mean_reward(trainer.model)
    prompts = [Prompt(f"p{i}", tuple(s.prompt)) for i, s in enumerate(some_sequences())]
    for step in range(10):
        engine.load_weights(trainer.weights(), step)
        groups = engine.generate(prompts, Sampling(n=8, max_tokens=3, seed=1, step=step))
        sequences = [
            Sequence(
                list(g.prompt.token_ids),
                c.token_ids,
                [True] * len(c.token_ids),
                number,
                reward=float(c.token_ids[0] % 2 == 0),
                logprobs=c.logprobs,
            )
            for number, g in enumerate(groups)
            for c in g.completions
        ]
        figures = trainer.update(trainer.method.advantages(sequences), step, 10)
        assert figures["sampler_gap_mean"] < 1e-4
    assert figures["kl_k3"] > 0
    assert mean_reward(trainer.model) > before + 0.1
    for name, parameter in trainer.model.named_parameters():
        assert name not in frozen or torch.equal(parameter, frozen[name])


def test_a_push_of_merged_weights_passes_the_probe(checkpoint, tmp_path):
    model, _ = adapted(checkpoint)
    engine = EmbeddedEngine(EngineConfig(device="cpu"), checkpoint)
    agreement = Agreement(
        AgreementConfig(), model, 1.0, 4096, autocast=False, sampler_dtype="float32"
    )
    prompts = [Prompt(f"p{i}", tuple(range(30, 40 + i))) for i in range(6)]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    agreement.prove_push(engine, prompts, 128, 0, tmp_path / "note.json")
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())


def test_a_checkpoint_is_complete_with_the_adapter_beside_it(checkpoint, tmp_path):
    from transformers import AutoModelForCausalLM

    model, adapters = adapted(checkpoint)
    tokenizer = load_tokenizer(checkpoint)
    save_checkpoint(tmp_path / "made", model, tokenizer, [1], "embedded")
    adapters.save(tmp_path / "made" / "adapter")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "made")
    expected = dict(plain_weights(model))
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, expected[name]), name
    files = {p.name for p in (tmp_path / "made" / "adapter").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= files
    merge(str(checkpoint), tmp_path / "made" / "adapter", tmp_path / "merged")
    one, two = (load_file(tmp_path / n / "model.safetensors") for n in ("made", "merged"))
    assert set(one) == set(two)
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert (tmp_path / "merged" / "boxed.json").is_file()
    with pytest.raises(UserError, match="is there already"):
        merge(str(checkpoint), tmp_path / "made" / "adapter", tmp_path / "merged")


def test_a_reward_model_is_merged_with_its_head(checkpoint, tmp_path):
    model, adapters = adapted(checkpoint, "scores")
    critic = critic_of(model)
    assert critic.head.weight.requires_grad
    save_checkpoint(tmp_path / "judge", model, load_tokenizer(checkpoint), [1], "embedded", "end")
    adapters.save(tmp_path / "judge" / "adapter")
    loaded = load_scalar_model(tmp_path / "judge")
    assert torch.equal(loaded.score.weight, critic.head.weight)
    sequences = some_sequences()
    asked = [s.prompt for s in sequences], [s.completion for s in sequences]
    one, two = (ModelScorer(m).score(*asked) for m in (model, loaded))
    assert one == pytest.approx(two, rel=1e-4)
    merge(str(checkpoint), tmp_path / "judge" / "adapter", tmp_path / "merged")
    assert torch.equal(load_scalar_model(tmp_path / "merged").score.weight, critic.head.weight)


def test_wrong_targets_are_named(checkpoint):
    with pytest.raises(UserError, match=r"(?s)q_prj.*down_proj"):
        Adapters(load_model(checkpoint), LoraConfig(rank=2, targets=("q_prj",)))
    with pytest.raises(UserError, match="an embedding among them"):
        Adapters(load_model(checkpoint), LoraConfig(rank=2, targets=("q_proj", "embed_tokens")))


def test_a_missing_peft_is_said(checkpoint, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=r"pip install -e '\.\[lora\]'"):
        Adapters(load_model(checkpoint), LORA)


@pytest.mark.parametrize("autocast", [False, True])
def test_gradient_checkpointing_changes_no_gradient(checkpoint, tmp_path, autocast):
    """Bit for bit, with and without bfloat16 products, for shared prompts and packed rows."""
    gradients = []
    for on in (False, True):
        model = load_model(checkpoint).train()
        if on:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        sequences = [s.in_group(0) for s in some_sequences()] + some_sequences()
        tokens = flatten(sequences)
        for micro in micro_batches(sequences, tokens, 10_000):
            logprobs_of(model, micro.layout, 1.0, autocast).logp.sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))


def saved_bytes(model, layout) -> int:
    """Return the bytes that the forward pass keeps for the backward pass."""
    kept: dict[int, int] = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        logprobs_of(model, layout).logp.sum()
    return sum(kept.values()) - sum(p.nbytes for p in model.parameters())


def test_gradient_checkpointing_keeps_less(checkpoint):
    sequences = [Sequence([30 + i] * 20, [50 + i] * 40, [True] * 40, i) for i in range(16)]
    (micro,) = micro_batches(sequences, flatten(sequences), 100_000)
    model = load_model(checkpoint).train()
    plain = saved_bytes(model, micro.layout)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert saved_bytes(model, micro.layout) < 0.6 * plain


def test_nonsense_is_refused(run_config):
    from pipeline.train import train

    run, stage = run_config
    for changes, match in (
        ({"lora": {"rank": 4, "dropout": 0.1}}, "not those of the policy that sampled"),
        ({"lora": {"alpha": 4.0}}, "which is no adapter"),
        ({"method": {"kind": "reward_model"}, "watch_reference": True}, "trains no policy"),
    ):
        with pytest.raises(UserError, match=match):
            train(run, validate(TrainConfig, {**stage.model_dump(), **changes}, "x"))


@pytest.fixture
def run_config(tmp_path):
    run = small_run(Path(tmp_path))
    return run, next(s for s in run.train if s.name == "grpo")


def test_making_adapters_sets_up_no_other_gpu(checkpoint, monkeypatch):
    """With several GPUs torch's own way warns, and asks each for the state of its numbers."""
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.random._fork_rng_warned_already", False)
    before = torch.get_rng_state()
    Adapters(load_model(checkpoint), LoraConfig(rank=2))
    assert torch.equal(torch.get_rng_state(), before)
