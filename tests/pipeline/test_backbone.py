"""The pass over packed tokens beside transformers' own, and where it does not stand in for it."""

from __future__ import annotations

import copy

import pytest
import torch

from pipeline.backbone import final_states, serves
from pipeline.batch import Sequence, flatten, micro_batches
from pipeline.kernels import round_up
from pipeline.model import load_model
from pipeline.policy import hidden_states, logprobs_of, reading_of

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


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.layers[0].register_forward_hook(lambda *_: None),
        lambda m: m.layers[1].self_attn.register_full_backward_hook(lambda *_: None),
        lambda m: m.norm.register_full_backward_pre_hook(lambda *_: None),
        lambda m: m.layers[0].mlp.down_proj.register_full_backward_hook(lambda *_: None),
        lambda m: setattr(m.layers[0].mlp, "forward", m.layers[0].mlp.forward),
        lambda m: setattr(m, "forward", m.forward),
        lambda m: setattr(m.layers[1], "mlp", Doubled(m.layers[1].mlp)),
        lambda m: m.layers[0].compile(),
    ],
    ids=["forward", "backward", "pre", "linear", "replaced", "whole", "module", "compiled"],
)
def test_a_model_that_somebody_changed_goes_by_its_own_forward(checkpoint, change):
    model = load_model(checkpoint)
    change(model.base_model)
    assert not serves(model.base_model)


class Doubled(torch.nn.Module):
    """A feed-forward of somebody's own."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return 2 * self.module(x)


def test_what_was_put_into_a_model_takes_part_and_a_backward_hook_is_called(checkpoint):
    sequences = [Sequence([21, 22], [30, 31, 32], [True] * 3, 0)]
    (micro,) = micro_batches(sequences, flatten(sequences), 10_000)
    model = load_model(checkpoint).train()
    plain = hidden_states(model.base_model, micro.layout).before.detach()
    model.base_model.layers[1].mlp = Doubled(model.base_model.layers[1].mlp)
    with torch.no_grad():
        own = model.base_model(input_ids=torch.tensor([[21, 22, 30, 31, 32]])).last_hidden_state
    seen = []
    model.base_model.layers[0].register_full_backward_hook(lambda *_: seen.append("layer"))
    states = hidden_states(model.base_model, micro.layout).before
    torch.testing.assert_close(states.detach(), own[0, 1:4], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(states.detach(), plain, atol=1e-2)
    states.sum().backward()
    assert seen == ["layer"]


def test_a_replaced_class_wide_forward_is_seen(checkpoint, monkeypatch):
    model = load_model(checkpoint)
    kind = type(model.base_model.layers[0].mlp)
    monkeypatch.setattr(kind, "forward", lambda self, x: x)
    assert not serves(model.base_model)


# Layers that do not look at everything before them, or count positions by themselves. The
# windows are shorter than the texts of `layout`, so that they matter.
READ = {
    "qwen2": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    "mistral": {"sliding_window": 4},
    "gemma2": {"sliding_window": 4, "head_dim": 8, "final_logit_softcapping": None},
    "gemma3_text": {
        "sliding_window": 4, "head_dim": 8, "layer_types": ["sliding_attention", "full_attention"],
    },
    "qwen3_next": {
        "layer_types": ["linear_attention", "full_attention"], "head_dim": 8, "num_experts": 2,
        "num_experts_per_tok": 1, "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16, "linear_num_value_heads": 2,
        "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    },
    "mamba": {"state_size": 4},
    "bloom": {"n_layer": 2, "n_head": 4},
    "gpt_neo": {
        "num_layers": 2, "num_heads": 4, "window_size": 4,
        "attention_types": [[["global", "local"], 1]],
    },
    "gpt2": {"n_layer": 2, "n_head": 4},
}  # fmt: skip
READINGS = {
    **dict.fromkeys(("qwen2", "mistral", "gemma2", "gemma3_text"), "packed"),
    **dict.fromkeys(("qwen3_next", "mamba", "bloom", "gpt_neo"), "alone"),
    "gpt2": "shared",
}


def random_model(kind: str, **more):
    """A tiny one of an architecture, with weights that make every token matter."""
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    torch.manual_seed(5)
    # Its experts' products know no float64.
    dtype = torch.float32 if kind == "qwen3_next" else torch.float64
    config = AutoConfig.for_model(kind, **{**shape, **READ[kind], **more})
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(4.0)
    return model


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", READ)
def test_log_probs_are_those_of_each_text_alone(kind, attention):
    """Packed texts that share prompts, beside transformers' own forward of one text at a time."""
    model = random_model(kind)
    try:
        model.set_attn_implementation(attention)
    except ValueError:
        pytest.skip(f"{kind} has no {attention} attention")
    assert reading_of(model.base_model, 20) == READINGS[kind]
    sequences = texts()
    (micro,) = micro_batches(sequences, flatten(sequences), 10_000)
    with torch.no_grad():
        found = torch.zeros(len(micro.token_index), dtype=torch.float64)
        found[micro.token_index] = logprobs_of(model, micro.layout).logp.double()
        expected = []
        for s in sequences:
            ids = torch.tensor([[*s.prompt, *s.completion]])
            logp = torch.log_softmax(model(ids, use_cache=False).logits[0].double(), -1)
            at = range(len(s.prompt), ids.shape[1])
            wanted = [i for i, flag in zip(at, s.mask, strict=True) if flag]
            expected += [float(logp[i - 1, ids[0, i]]) for i in wanted]
    assert len(expected) == len(found) > 20
    assert min(expected) < -2.0
    atol = 2e-6 if model.dtype == torch.float64 else 1e-4
    torch.testing.assert_close(found, torch.tensor(expected).double(), rtol=0, atol=atol)


def texts() -> list[Sequence]:
    """Groups behind a prompt, and texts alone, some shorter than the windows of `READ`."""
    shared = [
        Sequence([21, 22, 23, 3, 4], list(range(30, 30 + n)), [True] * n, 0) for n in (9, 1, 14)
    ]
    alone = [Sequence([24] * n, [50, 51, 52], [False, True, True], n) for n in (2, 9, 17)]
    return shared + alone


def test_a_window_that_holds_every_text_needs_no_mask_of_its_own():
    model = random_model("mistral", sliding_window=19)
    assert reading_of(model.base_model, 19) == "shared"
    assert reading_of(model.base_model, 20) == "packed"
    unused = random_model("qwen2", use_sliding_window=False)
    assert reading_of(unused.base_model, 20) == "shared"


def test_gradients_pass_through_prompts_that_stand_in_several_rows():
    """d/dθ of a group's log-probs, beside the sum over texts alone."""
    sequences = texts()
    (micro,) = micro_batches(sequences, flatten(sequences), 10_000)
    for kind in ("mistral", "mamba"):
        model = random_model(kind)
        logprobs_of(model, micro.layout).logp.sum().backward()
        found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        for s in sequences:
            (one,) = micro_batches([s], flatten([s]), 10_000)
            logprobs_of(model, one.layout).logp.sum().backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                scale = float(parameter.grad.abs().max())
                torch.testing.assert_close(found[name], parameter.grad, rtol=0, atol=1e-5 * scale)


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
