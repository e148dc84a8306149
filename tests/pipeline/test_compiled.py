"""Compiled decoding: the same bits in any batch, the model's own numbers, and how it is built."""

from __future__ import annotations

import json
import random
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch

from data_prep.errors import UserError
from pipeline import doctor
from pipeline.engines import Prompt, Sampling, _library
from pipeline.engines._compiled import PAGE, Pages
from pipeline.engines._library import Unbuilt, library_for
from pipeline.engines._packs import at_a_glance
from pipeline.engines._rows import Size
from pipeline.engines.embedded import Config, create
from pipeline.model import load_model

from .conftest import make_checkpoint

CPU = torch.device("cpu")


@pytest.fixture
def library():
    try:
        return library_for(CPU, torch.float32)
    except Unbuilt as reason:
        pytest.skip(f"nothing is compiled here: {reason}")


# Widths that fill no whole vector or panel, heads of any size, groups of queries, three families.
SHAPES = [
    ("qwen2", {"context": 512}),
    ("qwen3", {"context": 512, "width": 40, "heads": 2, "kv_heads": 1, "feed_forward": 20}),
    ("llama", {"context": 512, "width": 36, "heads": 6, "kv_heads": 3, "layers": 3}),
    ("llama", {"context": 512, "width": 128, "heads": 2, "kv_heads": 2, "feed_forward": 72}),
]


def make_prompts(vocabulary, lengths=(1, 15, 16, 17, 40, 127, 130, 260)):
    draw = random.Random(4)
    return [
        Prompt(f"p{i}", tuple(draw.randrange(5, vocabulary) for _ in range(length)))
        for i, length in enumerate(lengths)
    ]


def samples_of(groups):
    return {
        (g.prompt.id, c.seed): (c.token_ids, c.logprobs, c.finish_reason)
        for g in groups
        for c in g.completions
    }


@pytest.mark.parametrize(("architecture", "shape"), SHAPES)
def test_logits_after_prompts_are_the_models(tmp_path, library, architecture, shape):
    folder = make_checkpoint(tmp_path / "m", architecture, **shape)
    engine, model = create(Config(compiled=True), folder), load_model(folder).double()
    prompts = make_prompts(model.config.vocab_size)
    session = engine.decoder.compiled.open(1, Size(len(prompts), len(prompts), 260, 1))
    found = session.admit([prompt.token_ids for prompt in prompts])
    for prompt, logits in zip(prompts, found, strict=True):
        with torch.no_grad():
            expected = model(torch.tensor([prompt.token_ids])).logits[0, -1]
        torch.testing.assert_close(logits.double(), expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize(("architecture", "shape"), SHAPES)
def test_a_sample_is_the_same_bits_in_any_batch(tmp_path, library, architecture, shape):
    """Alone, in few slots, in another order and with more threads: tokens and log-probs."""
    folder = make_checkpoint(tmp_path / "m", architecture, **shape)
    engine = create(Config(compiled=True), folder)
    prompts = make_prompts(engine.decoder.config.vocab_size)
    sampling = Sampling(n=20, max_tokens=40, temperature=0.9, seed=3)
    whole = samples_of(engine.generate(prompts, sampling))
    assert len(whole) == 160
    assert max(len(tokens) for tokens, _, _ in whole.values()) > 2 * PAGE
    for number in (0, 3, 7):
        alone = samples_of(engine.generate(prompts[number : number + 1], sampling))
        assert alone == {key: whole[key] for key in alone}
    cramped = create(Config(compiled=True, slots=27, refill_share=0.1), folder)
    assert samples_of(cramped.generate(prompts[::-1], sampling)) == whole
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert samples_of(engine.generate(prompts, sampling)) == whole
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(("architecture", "shape"), SHAPES)
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_samples_are_those_of_the_torch_path(tmp_path, library, architecture, shape, temperature):
    folder = make_checkpoint(tmp_path / "m", architecture, **shape)
    ours, theirs = (create(Config(compiled=compiled), folder) for compiled in (True, False))
    prompts = make_prompts(ours.decoder.config.vocab_size)
    sampling = Sampling(n=8, max_tokens=40, temperature=temperature)
    found, expected = (samples_of(e.generate(prompts, sampling)) for e in (ours, theirs))
    same = [key for key in expected if found[key][0] == expected[key][0]]
    # A random number, or the gap between two logits, may fall between the two roundings.
    assert len(same) >= 0.9 * len(expected)
    assert all(found[key][2] == expected[key][2] for key in same)
    gaps = torch.cat([torch.tensor(found[key][1]) - torch.tensor(expected[key][1]) for key in same])
    # Beside float64 the two and transformers err alike: by 2e-6 to 1e-5 on average.
    assert float(gaps.abs().mean()) < 5e-5
    assert float(gaps.abs().max()) < 2e-3


def test_all_pages_come_back(tmp_path, library):
    folder = make_checkpoint(tmp_path / "m", context=512)
    engine = create(Config(compiled=True, slots=24, refill_share=0.2), folder)
    prompts = make_prompts(engine.decoder.config.vocab_size)
    pages = engine.decoder.compiled.pages
    for stop in ((), ("a",)):
        engine.generate(prompts, Sampling(n=6, max_tokens=60, stop=stop))
        whole = [address for slab in pages._slabs for address in pages._addresses(slab)]
        assert sorted(pages.free) == sorted(whole)


def test_pages_are_distinct_and_grow():
    pages = Pages(1 << 20)
    first, second = pages.take(3), pages.take(2)
    assert len({*first, *second}) == 5
    assert min(abs(a - b) for a in first for b in second) >= 4 << 20
    pages.reset(5)
    assert {*first, *second} <= set(pages.free)
    held = len(pages._slabs)
    pages.take(5)
    assert len(pages._slabs) == held


def test_pushed_weights_are_packed_anew(tmp_path, library):
    folder = make_checkpoint(tmp_path / "m")
    engine, model = create(Config(compiled=True), folder), load_model(folder)
    prompts, sampling = make_prompts(300, (9, 20)), Sampling(n=4, max_tokens=20)
    before = samples_of(engine.generate(prompts, sampling))
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    engine.load_weights(((name, value * 1.2) for name, value in weights.items()), 1)
    other = samples_of(engine.generate(prompts, sampling))
    assert all(other[key][1] != before[key][1] for key in before)
    engine.load_weights(weights.items(), 2)
    assert samples_of(engine.generate(prompts, sampling)) == before


def test_weights_that_are_not_packed_run_through_torch(library, checkpoint, monkeypatch):
    monkeypatch.setattr("pipeline.engines._decoder.PACK_BYTES", 1000)
    assert create(Config(), checkpoint).decoder.compiled is None
    with pytest.warns(UserWarning, match="torch computes in spite of"):
        engine = create(Config(compiled=True), checkpoint)
    (group,) = engine.generate([Prompt("p", (5, 6, 7))], Sampling(n=2, max_tokens=4))
    assert len(group.completions) == 2


def test_a_token_that_the_model_does_not_know_is_refused(checkpoint):
    engine = create(Config(), checkpoint)
    for token in (-1, engine.decoder.config.vocab_size):
        with pytest.raises(UserError, match=f"'odd': token {token}"):
            engine.generate([Prompt("odd", (5, token, 6))], Sampling())


# How the library comes about -------------------------------------------------------------------


@pytest.fixture
def workshop(tmp_path, monkeypatch):
    """An empty cache folder, and a source that compiles in no time."""
    if not any(map(shutil.which, _library.COMPILERS)):
        pytest.skip("no C++ compiler is on the path")
    source = tmp_path / "small.cpp"
    source.write_text('extern "C" int answer() { return 42; }\n')
    monkeypatch.setattr(_library, "SOURCE", source)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    _library._library_or_reason.cache_clear()
    yield tmp_path / "cache" / "boxed"
    _library._library_or_reason.cache_clear()


def commands(monkeypatch):
    """Return a list that takes the compiler's command lines."""
    seen, run = [], _library._run
    monkeypatch.setattr(_library, "_run", lambda *command: seen.append(command) or run(*command))
    return seen


def test_a_library_is_built_once_in_a_folder_of_ones_own(workshop, monkeypatch):
    seen = commands(monkeypatch)
    assert _library._load().answer() == 42
    assert workshop.stat().st_mode & 0o777 == 0o700
    (made,) = workshop.iterdir()
    assert len(seen) == 2
    assert _library._load().answer() == 42
    assert [command[1] for command in seen[2:]] == ["--version"]
    # Another source, another library; the old one stays for whoever runs it.
    _library.SOURCE.write_text('extern "C" int answer() { return 43; }\n')
    assert _library._load().answer() == 43
    assert len(list(workshop.iterdir())) == 2
    assert made.is_file()


@pytest.mark.parametrize("damage", [lambda data: data[:900], lambda data: data[:-1] + b"x"])
def test_a_damaged_library_is_built_again(workshop, monkeypatch, damage):
    _library._load()
    (made,) = workshop.iterdir()
    data = made.read_bytes()
    made.unlink()  # this process runs the old file
    made.write_bytes(damage(data))
    seen = commands(monkeypatch)
    assert _library._load().answer() == 42
    assert len(seen) == 2
    assert made.read_bytes() != damage(data)


def test_what_does_not_compile_leaves_nothing_and_torch_computes(workshop, checkpoint):
    _library.SOURCE.write_text("#error this is not for you\n")
    with pytest.raises(Unbuilt, match="this is not for you"):
        _library._load()
    assert list(workshop.iterdir()) == []
    engine = create(Config(), checkpoint)
    assert engine.decoder.compiled is None
    (group,) = engine.generate([Prompt("p", (5, 6, 7))], Sampling(n=2, max_tokens=4))
    assert len(group.completions) == 2


def test_what_a_killed_compiler_left_is_cleared_away(workshop):
    workshop.mkdir(parents=True, mode=0o700)
    old, running = workshop / "old.tmp", workshop / "running.tmp"
    old.touch()
    running.touch()
    _library.os.utime(old, (0, 0))
    _library._load()
    assert not old.exists() and running.exists()


def test_a_source_that_is_not_there_is_no_error(workshop):
    _library.SOURCE.unlink()
    with pytest.raises(Unbuilt, match="cannot be read"):
        _library._load()


def test_a_folder_that_others_may_write_to_is_refused(workshop, monkeypatch):
    workshop.mkdir(parents=True)
    workshop.chmod(0o770)
    with pytest.raises(Unbuilt, match="written to by others"):
        _library._load()
    workshop.chmod(0o700)
    own = _library.os.getuid()
    monkeypatch.setattr(_library.os, "getuid", lambda: own + 1)
    with pytest.raises(Unbuilt, match="another user"):
        _library._load()


def test_a_folder_that_cannot_be_made_is_no_error(workshop):
    workshop.parent.write_text("a file where a folder is wanted")
    with pytest.raises(Unbuilt, match="no folder"):
        _library._load()


def test_a_plan_says_which_way_it_was(workshop, checkpoint, monkeypatch):
    """Samples of the two ways differ in their last bits, so neither goes on with the other's."""
    assert Config().settled(checkpoint).compiled is True
    assert Config().deciding(checkpoint)["compiled"] is True
    assert "compiled" not in Config(compiled=False).deciding(checkpoint)
    assert "compiled" not in Config(dtype="bfloat16").deciding(checkpoint)
    for changed in ({"dtype": "bfloat16"}, {"device": "cuda"}):
        with pytest.raises(UserError, match=r"engine\.compiled = true: .*float32 on a CPU"):
            Config(compiled=True, **changed).settled(checkpoint)
    _library._library_or_reason.cache_clear()
    monkeypatch.setenv("PATH", "")
    assert Config().settled(checkpoint).compiled is False
    assert "compiled" not in Config().deciding(checkpoint)
    with pytest.raises(UserError, match=r"no C\+\+ compiler is on the path"):
        Config(compiled=True).settled(checkpoint)


# What the compiled code takes, and what it leaves to torch: by family, and keys of `config.json`.
CONFIGURATIONS = [
    ("qwen2", {}, True),
    ("llama", {}, True),
    ("llama", {"num_key_value_heads": 4, "tie_word_embeddings": True}, True),
    ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2, "rope_theta": 1e4}}, True),
    ("qwen3", {"head_dim": 16}, True),
    ("llama", {"attention_bias": True}, False),
    ("llama", {"mlp_bias": True}, False),
    ("qwen3", {"hidden_act": "gelu"}, False),
    ("qwen2", {"use_sliding_window": True, "max_window_layers": 1}, False),
    ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2, "rope_theta": 1e4}}, False),
    ("mistral", {}, False),
]  # fmt: skip


@pytest.mark.parametrize(("family", "keys", "expected"), CONFIGURATIONS)
@pytest.mark.parametrize("asked", [None, True])
@pytest.mark.filterwarnings("ignore:.*is not written for the embedded engine")
def test_a_plan_says_what_computes_whatever_was_asked_for(
    tmp_path, checkpoint, library, family, keys, expected, asked
):
    """The plan knows the model's configuration alone; the engine is made from its weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = {
        "vocab_size": 320, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, **keys,
    }  # fmt: skip
    folder = shutil.copytree(checkpoint, tmp_path / "m")
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **shape))
    model.save_pretrained(folder)
    weights = folder / "model.safetensors"
    aside, state = weights.rename(tmp_path / "aside"), torch.get_rng_state()
    config = Config(compiled=asked)
    plan = config.deciding(folder)
    assert at_a_glance(folder) in (None, expected)
    assert torch.equal(torch.get_rng_state(), state)
    aside.rename(weights)
    assert plan.get("compiled", False) is expected
    assert config.settled(folder).compiled is expected
    decoder = create(config, folder).decoder
    assert (getattr(decoder, "compiled", None) is not None) is expected


def test_a_plan_says_that_torch_computes_with_large_weights(checkpoint, library, monkeypatch):
    size = sum(m.plain.nbytes for m in create(Config(), checkpoint).decoder._matrices())
    for most, expected in ((size, True), (size - 1, False)):
        monkeypatch.setattr("pipeline.engines._decoder.PACK_BYTES", most)
        assert Config().deciding(checkpoint).get("compiled", False) is expected
        assert (create(Config(), checkpoint).decoder.compiled is not None) is expected


@pytest.mark.parametrize("family", ["qwen2", "llama", "qwen3"])
def test_a_plan_needs_no_model_code_for_common_models(tmp_path, library, monkeypatch, family):
    """To import it takes seconds, also where a stage that is complete is only looked at."""
    folder = make_checkpoint(tmp_path / "m", family)
    path = folder / "config.json"
    table = json.loads(path.read_text())
    monkeypatch.setitem(sys.modules, "transformers", None)
    for changed, expected in (
        ({}, True), ({"hidden_size": 1 << 20}, False), ({"model_type": "mistral"}, False),
    ):  # fmt: skip
        path.write_text(json.dumps(table | changed))
        assert Config().deciding(folder).get("compiled", False) is expected


@pytest.mark.parametrize("changed", [
    {"model_type": None}, {"model_type": 5}, {"model_type": "mistral", "auto_map": {"x": "y"}},
    {"num_key_value_heads": None}, {"head_dim": None}, {"head_dim": 7}, {"hidden_act": "gelu"},
    {"hidden_size": "32"}, {"num_experts": 8}, {"attention_bias": True}, {"mlp_bias": True},
    {"use_sliding_window": True}, {"rope_scaling": {"type": "dynamic"}}, {"rope_parameters": [1]},
    {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
    {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
])  # fmt: skip
def test_what_is_not_plain_is_not_guessed(tmp_path, changed):
    """The configuration alone answers only where it leaves nothing to what transformers makes."""
    folder = make_checkpoint(tmp_path / "m", "qwen3")
    path = folder / "config.json"
    table = json.loads(path.read_text())
    assert at_a_glance(folder) is True
    path.write_text(json.dumps({k: v for k, v in (table | changed).items() if v is not None}))
    assert at_a_glance(folder) is None
    path.write_text("[")
    assert at_a_glance(folder) is None


def test_a_model_that_is_not_there_is_refused_where_it_is_loaded(tmp_path, library):
    assert Config().settled(tmp_path / "none").compiled is True
    with pytest.raises(UserError, match="cannot be loaded"):
        create(Config(), tmp_path / "none")


def test_the_doctor_says_whether_there_is_a_compiler(workshop, monkeypatch):
    found = doctor.check_compiled(None)
    assert (found.state, found.fix) == ("ok", "")
    _library._library_or_reason.cache_clear()
    monkeypatch.setenv("PATH", "")
    found = doctor.check_compiled(None)
    assert found.state == "note"
    assert "no C++ compiler" in found.found
    asking = SimpleNamespace(engine=Config(compiled=True))
    assert doctor.check_compiled(asking).state == "fail"
