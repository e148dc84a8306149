"""The pass over packed tokens beside transformers' own, and where it does not stand in for it."""

from __future__ import annotations

import copy

import pytest
import torch

from pipeline.backbone import final_states, serves
from pipeline.batch import Sequence, flatten, micro_batches
from pipeline.kernels import round_up
from pipeline.model import load_model
from pipeline.policy import hidden_states

from .conftest import make_checkpoint


def layout():
    shared = [Sequence([21, 22, 23], list(range(30, 30 + n)), [True] * n, 0) for n in (4, 1, 6)]
    alone = [Sequence([24] * n, [50, 51, 52], [False, True, True], n) for n in (2, 9)]
    sequences = shared + alone
    (micro,) = micro_batches(sequences, flatten(sequences), 10_000)
    return micro.layout


def through_both(model, monkeypatch):
    """Return states and gradients of our pass and of transformers' own."""
    found = []
    for ours in (True, False):
        with monkeypatch.context() as patch:
            if not ours:
                patch.setattr("pipeline.policy.serves", lambda _: False)
            model.zero_grad()
            found_states = hidden_states(model.base_model, layout())
            states = found_states.all[: len(found_states.layout.kept)]
        generator = torch.Generator().manual_seed(8)
        states.backward(torch.randn(states.shape, dtype=states.dtype, generator=generator))
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        found.append({"states": states.detach(), **gradients})
    return found


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_states_and_gradients_are_those_of_transformers(architecture, tmp_path, monkeypatch):
    model = load_model(make_checkpoint(tmp_path / "m", architecture), "float64").train()
    assert serves(model.base_model)
    ours, theirs = through_both(model, monkeypatch)
    assert set(ours) == set(theirs) and len(ours) > 20
    for name, value in theirs.items():
        scale = float(value.abs().max())
        assert scale > 0, name
        torch.testing.assert_close(ours[name], value, rtol=0, atol=1e-11 * scale)


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_in_float32_both_are_equally_near_to_the_truth(architecture, tmp_path, monkeypatch):
    folder = make_checkpoint(tmp_path / "m", architecture)
    truth, _ = through_both(load_model(folder, "float64").train(), monkeypatch)
    ours, theirs = through_both(load_model(folder).train(), monkeypatch)
    for name, value in truth.items():
        errors = [float((found[name] - value).abs().max()) for found in (ours, theirs)]
        assert errors[0] < 3 * errors[1] + 1e-6 * float(value.abs().max()), name


def test_a_pass_repeats_bit_for_bit(checkpoint):
    model = load_model(checkpoint).train()
    found = []
    for _ in range(2):
        model.zero_grad()
        states = hidden_states(model.base_model, layout()).all
        states.square().sum().backward()
        found.append([states.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


def test_only_states_that_somebody_reads_are_made(checkpoint):
    model = load_model(checkpoint)
    found = layout()
    states = final_states(model.base_model, found)
    assert len(found.kept) < len(found.input_ids)
    assert len(states) == round_up(len(found.kept))


def test_where_it_does_not_stand_in(checkpoint):
    model = load_model(checkpoint)
    assert serves(model.base_model)
    assert not serves(load_model(checkpoint, "bfloat16").base_model)
    hooked = copy.deepcopy(model)
    hooked.base_model.layers[0].register_forward_pre_hook(lambda *_: None)
    assert not serves(hooked.base_model)
    for key, value in (
        ("hidden_act", "gelu"),
        ("layer_types", ["sliding_attention"] * 2),
        ("rope_parameters", {"rope_type": "default", "partial_rotary_factor": 0.5}),
    ):
        other = copy.deepcopy(model)
        setattr(other.base_model.config, key, value)
        assert not serves(other.base_model), key
    dropping = copy.deepcopy(model)
    dropping.base_model.config.attention_dropout = 0.1
    assert serves(dropping.eval().base_model)
    assert not serves(dropping.train().base_model)


def test_eager_attention_is_masked_as_the_others_are(tmp_path, monkeypatch):
    """It adds what it is given to the scores, where the others take True for "seen"."""
    make_checkpoint(tmp_path, architecture="llama")
    model = load_model(tmp_path, "float64")
    monkeypatch.setattr("pipeline.policy.serves", lambda _: False)
    found = {}
    for kind in ("sdpa", "eager"):
        model.set_attn_implementation(kind)
        with torch.no_grad():
            found[kind] = hidden_states(model.base_model, layout()).all
    torch.testing.assert_close(found["eager"], found["sdpa"], rtol=0, atol=1e-5)
