"""The probes: what passes, what is refused, and which cause is named."""

from __future__ import annotations

import json
import re

import pytest
import torch

from data_prep.config import PluginConfig
from data_prep.errors import UserError
from pipeline.agreement import LONG, PROBE_TOKENS, Agreement, AgreementConfig, probe_prompts
from pipeline.batch import Sequence
from pipeline.engines import Prompt, Sampling, create_engine
from pipeline.engines import embedded as embedded_engine
from pipeline.generate import render_prompts
from pipeline.model import load_model

from .conftest import make_checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("agreement") / "tiny", context=512)


@pytest.fixture
def model(folder):
    return load_model(folder)


@pytest.fixture
def engine(folder):
    made = embedded_engine.create(embedded_engine.Config(), folder)
    yield made
    made.close()


@pytest.fixture
def prompts(engine, problems):
    return render_prompts(problems[:12], engine.tokenizer, "embedded")


def agreement(model, temperature=1.0, bos=None, **options):
    return Agreement(
        AgreementConfig(**options),
        model,
        temperature,
        4096,
        autocast=False,
        sampler_dtype="float32",
        bos_token_id=bos,
    )


def sampled(engine, prompts, temperature=1.0, change=lambda p: p, step=0):
    """What an engine gives, as the trainer takes it; the engine may be asked something else."""
    asked = [Prompt(p.id, tuple(change(list(p.token_ids)))) for p in prompts]
    sampling = Sampling(n=2, temperature=temperature, max_tokens=12, step=step)
    return [
        Sequence(list(p.token_ids), c.token_ids, [True] * len(c.token_ids), n, logprobs=c.logprobs)
        for n, (p, g) in enumerate(zip(prompts, engine.generate(asked, sampling), strict=True))
        for c in g.completions
    ]


class Faulty:
    """An engine with one fault."""

    policy_version = 0

    def __init__(self, inner):
        self.inner = inner
        self.pushed: list[int] = []

    def generate(self, prompts, sampling):
        return self.inner.generate(prompts, sampling)

    def load_weights(self, weights, version):
        self.pushed.append(version)
        self.inner.load_weights(weights, version)

    def close(self):
        self.inner.close()


class Deaf(Faulty):
    """Takes no weights after the first ones."""

    def load_weights(self, weights, version):
        if not self.pushed:
            super().load_weights(weights, version)


class Forgetful(Faulty):
    """Keeps one tensor as it first was."""

    def load_weights(self, weights, version):
        name, found = "model.layers.1.mlp.down_proj.weight", {n: w.clone() for n, w in weights}
        self.first = getattr(self, "first", found)
        super().load_weights({**found, name: self.first[name]}.items(), version)


class Scaled(Faulty):
    """Reports the log-probs of another temperature than it was asked for."""

    def generate(self, prompts, sampling):
        return self.inner.generate(prompts, sampling.model_copy(update={"temperature": 0.6}))


class Sparing(Faulty):
    """Leaves the last completion of each prompt out."""

    def generate(self, prompts, sampling):
        groups = self.inner.generate(prompts, sampling)
        for group in groups:
            group.completions = group.completions[:-1]
        return groups


def test_an_engine_that_gives_less_than_it_is_asked_for_is_refused(model, engine, prompts):
    with pytest.raises(UserError, match="gave 0 completions of a prompt"):
        agreement(model).prove_push(Sparing(engine), prompts, 512, 0)


@pytest.mark.parametrize(
    ("made", "words"),
    [("None", "create returned nothing"), ("3", "create returned int, without generate")],
)
def test_a_plugin_that_makes_no_engine_is_refused(folder, tmp_path, made, words):
    own = tmp_path / "own.py"
    own.write_text(f"def create(config, model):\n    return {made}\n")
    with pytest.raises(UserError, match=words):
        create_engine(PluginConfig(kind=str(own)), folder)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_a_sound_engine_passes_and_the_model_is_what_it_was(
    model, engine, prompts, tmp_path, temperature
):
    before = {name: p.clone() for name, p in model.named_parameters()}
    watched = Faulty(engine)
    note = tmp_path / "agreement.json"
    agreement(model, temperature).prove_push(watched, prompts, 512, 5, note)
    assert watched.pushed == [5, -1]
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
    found = json.loads(note.read_text())
    assert found["gap_before"] < 1e-4
    assert found["gap_after_push"] < 1e-4
    assert found["distance_of_pushed_weights"] > 0.05
    assert found["tokens"] > 8 * PROBE_TOKENS


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (Deaf, r"after a push of other weights.*stale weights"),
        (Forgetful, r"after a push of other weights.*a push that left tensors out"),
        (Scaled, r"before the first step.*temperature 0\.60, the trainer's of 1\b"),
    ],
)
def test_a_fault_is_refused_and_named(model, engine, prompts, tmp_path, fault, words):
    before = {name: p.clone() for name, p in model.named_parameters()}
    note = tmp_path / "agreement.json"
    with pytest.raises(UserError) as error:
        agreement(model).prove_push(fault(engine), prompts, 512, 0, note)
    assert re.search(words, str(error.value)), str(error.value)
    assert not note.exists()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])


class Caching(Faulty):
    """Keeps keys and values of 128-token blocks of prompts over a push, as vLLM would.

    A slow sampler on transformers' own forward pass; greedy, which leaves the log-probs true.
    """

    def __init__(self, inner, folder, reset):
        super().__init__(inner)
        self.model, self.reset = load_model(folder), reset
        self.kept: dict[tuple[int, ...], object] = {}

    def load_weights(self, weights, version):
        self.model.load_state_dict({n: w.clone() for n, w in weights})
        if self.reset:
            self.kept.clear()

    @torch.no_grad()
    def generate(self, prompts, sampling):
        groups = self.inner.generate(prompts, sampling)
        for group in groups:
            ids = list(group.prompt.token_ids)
            length = (len(ids) - 1) // 128 * 128
            key = tuple(ids[:length])
            if length and key not in self.kept:
                self.kept[key] = self._layers(
                    self.model(input_ids=torch.tensor([ids[:length]]), use_cache=True)
                )
            for c in group.completions:
                rest = [*ids[length:], *c.token_ids]
                cache = self._cache(self.kept[key]) if length else None
                out = self.model(
                    input_ids=torch.tensor([rest]), past_key_values=cache, use_cache=True
                )
                logp = torch.log_softmax(out.logits[0], -1)
                first = len(ids) - length - 1
                c.logprobs = [float(logp[first + i, t]) for i, t in enumerate(c.token_ids)]
        return groups

    def _layers(self, out):
        return [(layer.keys.clone(), layer.values.clone()) for layer in out.past_key_values.layers]

    def _cache(self, layers):
        from transformers import DynamicCache

        cache = DynamicCache()
        for index, (keys, values) in enumerate(layers):
            cache.update(keys.clone(), values.clone(), index)
        return cache


def test_a_prefix_cache_that_outlives_a_push_is_named(model, engine, folder, prompts, tmp_path):
    note = tmp_path / "agreement.json"
    agreement(model).prove_push(Caching(engine, folder, True), prompts, 512, 0, note)
    with pytest.raises(UserError, match=r"(?s)after a push.*stale cache: .*not reset"):
        agreement(model).prove_push(Caching(engine, folder, False), prompts, 512, 0, note)


def test_raw_logprobs_at_another_temperature_are_named(model, engine, prompts):
    """What vLLM's default gives: drawn at 0.7, reported at 1."""
    sequences = sampled(engine, prompts, 0.7)
    values = agreement(model).logprobs(sequences).tolist()
    for s in sequences:
        s.logprobs, values = values[: len(s.completion)], values[len(s.completion) :]
    probe = agreement(model, 0.7)
    assert "those of temperature 1, not of 0.7" in probe.diagnose(sequences)
    assert "processed_logprobs" in probe.diagnose(sequences)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda p: [1, *p], "begin with one BOS token more"),
        (lambda p: p[1:], "lack their first token"),
        (lambda p: p[:-1], "lack their last token"),
    ],
)
def test_another_prompt_is_named(model, engine, prompts, change, words):
    sequences = sampled(engine, prompts, change=change)
    assert words in agreement(model, bos=1).diagnose(sequences)


@pytest.mark.parametrize(
    ("shift", "words"),
    [(lambda v: [-1.0, *v[:-1]], "the token before it"), (lambda v: [*v[1:], -1.0], "after it")],
)
def test_logprobs_one_place_off_are_named(model, engine, prompts, shift, words):
    sequences = sampled(engine, prompts)
    for s in sequences:
        s.logprobs = shift(s.logprobs)
    assert words in agreement(model).diagnose(sequences)


def test_rounding_is_named(model, engine, prompts):
    sequences = sampled(engine, prompts)
    low = agreement(model)._logprobs(sequences, 1.0, True).tolist()
    for s in sequences:
        s.logprobs, low = low[: len(s.completion)], low[len(s.completion) :]
    assert "bfloat16" in agreement(model).diagnose(sequences)


def test_only_the_first_two_batches_stop_a_run(model, engine, prompts, capsys):
    sequences = sampled(engine, prompts)
    probe = agreement(model)
    probe.judge(1e-5, sequences)
    with pytest.raises(UserError, match="after the first push"):
        probe.judge(0.5, sequences)
    probe = agreement(model)
    for gap in (1e-5, 1e-5, 0.5, 0.5):
        probe.judge(gap, sequences)
    assert capsys.readouterr().err.count("disagree in a later batch") == 1


def test_stale_batches_are_not_judged_and_a_nan_of_the_sampler_is(model, engine, prompts):
    sequences = sampled(engine, prompts)
    probe = agreement(model)
    probe.judge(float("nan"), sequences)
    for s in sequences:
        s.staleness = 1
    probe.judge(0.5, sequences)
    for s in sequences:
        s.staleness, s.logprobs = 0, [float("nan")] * len(s.completion)
    with pytest.raises(UserError, match="in the first batch"):
        probe.judge(float("nan"), sequences)


def test_warn_and_off(model, engine, prompts, tmp_path, capsys):
    note = tmp_path / "agreement.json"
    agreement(model, on_gap="warn").prove_push(Scaled(engine), prompts, 512, 0, note)
    assert "likely cause: temperature" in capsys.readouterr().err
    agreement(model, on_gap="off").prove_push(Scaled(engine), prompts, 512, 0, note)
    assert capsys.readouterr().err == ""


def test_the_tolerance_follows_the_lower_precision(model):
    for autocast, sampler, expected in (
        (False, "float32", 1e-3),
        (True, "float32", 0.05),
        (False, "bfloat16", 0.05),
    ):
        probe = Agreement(
            AgreementConfig(), model, 1.0, 64, autocast=autocast, sampler_dtype=sampler
        )
        assert probe.tolerance == expected
    assert agreement(model, tolerance=0.2).tolerance == 0.2


def test_probe_prompts_reach_past_the_blocks_of_a_cache_and_fit_the_context():
    prompts = [Prompt(f"p{i}", tuple(range(20 + i))) for i in range(3)]
    long = [len(p.token_ids) for p in probe_prompts(prompts, 1024)]
    assert long[:3] == [20, 21, 22]
    assert long[3:] == [LONG, LONG]
    assert max(len(p.token_ids) for p in probe_prompts(prompts, 100)) == 100 - PROBE_TOKENS
    assert len({p.id for p in probe_prompts(prompts, 100)}) == 5
    short = probe_prompts([Prompt("p", tuple(range(90)))], 64)
    assert all(0 < len(p.token_ids) <= 64 - PROBE_TOKENS for p in short)
