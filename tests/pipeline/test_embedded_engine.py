"""The embedded engine against transformers, against itself, and against exact probabilities."""

from __future__ import annotations

import contextlib
import math
import random
import weakref
from collections import Counter

import pytest
import torch

from data_prep.errors import UserError
from data_prep.sources.embedded import Config as EmbeddedSource
from data_prep.sources.embedded import read
from pipeline.batch import Sequence, flatten, micro_batches
from pipeline.engines import Prompt, Sampling, _graphs, embedded, sample_seed
from pipeline.engines._decoder import Decoder
from pipeline.engines._library import Unbuilt, library_for
from pipeline.engines.embedded import Config, create
from pipeline.generate import render_prompts
from pipeline.model import load_model, load_tokenizer
from pipeline.policy import logprobs_of

from .conftest import make_checkpoint
from .exact import exact_distribution


def prompts_of(engine, problems):
    return render_prompts(problems, engine.tokenizer, "embedded")


@pytest.fixture(scope="module", params=[True, False], ids=["compiled", "torch"])
def compiled(request):
    """What holds for one way holds for the other."""
    if request.param:
        try:
            library_for(torch.device("cpu"), torch.float32)
        except Unbuilt as reason:
            pytest.skip(f"nothing is compiled here: {reason}")
    return request.param


@pytest.fixture(scope="module")
def engine(checkpoint, compiled):
    return create(Config(compiled=compiled), checkpoint)


@torch.no_grad()
def reference_logprobs(model, prompt, token_ids, temperature):
    ids = torch.tensor([[*prompt.token_ids, *token_ids]])
    logp = torch.log_softmax(model(ids).logits[0].float() / temperature, dim=-1)
    start = len(prompt.token_ids)
    return [float(logp[start + i - 1, token]) for i, token in enumerate(token_ids)]


@pytest.mark.parametrize(
    ("architecture", "shape"),
    [("qwen2", {}), ("qwen3", {}), ("llama", {"kv_heads": 4}), ("llama", {"kv_heads": 1})],
)
def test_greedy_tokens_equal_transformers(tmp_path, problems, architecture, shape, compiled):
    folder = make_checkpoint(tmp_path / "m", architecture, **shape)
    engine, model = create(Config(slots=3, compiled=compiled), folder), load_model(folder)
    prompts = prompts_of(engine, problems[:8])
    groups = engine.generate(prompts, Sampling(n=1, temperature=0.0, max_tokens=16))
    for prompt, group in zip(prompts, groups, strict=True):
        ids = torch.tensor([prompt.token_ids])
        made = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            temperature=None,
            max_new_tokens=16,
        )
        assert group.completions[0].token_ids == made[0, ids.shape[1] :].tolist()
    lengths = {len(g.completions[0].token_ids) for g in groups}
    assert len(lengths) > 1 or lengths == {16}


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampled_logprobs_equal_a_fresh_forward(engine, checkpoint, problems, temperature):
    model = load_model(checkpoint)
    prompts = prompts_of(engine, problems[:12])
    groups = engine.generate(prompts, Sampling(n=3, temperature=temperature, max_tokens=20))
    for prompt, group in zip(prompts, groups, strict=True):
        for completion in group.completions:
            expected = reference_logprobs(model, prompt, completion.token_ids, temperature)
            assert completion.logprobs == pytest.approx(expected, abs=1e-4)


def tokens_of(groups):
    return {g.prompt.id: [c.token_ids for c in g.completions] for g in groups}


def test_a_sample_does_not_depend_on_its_neighbours_or_on_the_slots(
    engine, checkpoint, problems, compiled
):
    sampling = Sampling(n=4, max_tokens=20, seed=3, step=2)
    prompts = prompts_of(engine, problems[:20])
    whole = tokens_of(engine.generate(prompts, sampling))
    assert len({tuple(t) for ts in whole.values() for t in ts}) > 40
    alone = tokens_of(engine.generate(prompts[5:6], sampling))
    assert alone[prompts[5].id] == whole[prompts[5].id]
    cramped = create(Config(slots=9, refill_share=0.1, compiled=compiled), checkpoint)
    assert tokens_of(cramped.generate(prompts[::-1], sampling)) == whole
    other_step = engine.generate(prompts, sampling.model_copy(update={"step": 3}))
    assert tokens_of(other_step) != whole


def test_seeds_are_hashes_that_never_coincide():
    seeds = {
        sample_seed(run, step, f"p{problem}", index)
        for run in range(3)
        for step in range(3)
        for problem in range(20)
        for index in range(8)
    }
    assert len(seeds) == 3 * 3 * 20 * 8
    assert all(0 <= seed < 2**62 for seed in seeds)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_sampled_distribution_is_the_exact_one(engine, checkpoint, problems, temperature):
    """Chi-square over the first token; 4000 draws, seeds fixed, so the test is deterministic."""
    prompt = prompts_of(engine, problems[:1])[0]
    model = load_model(checkpoint)
    with torch.no_grad():
        logits = model(torch.tensor([prompt.token_ids])).logits[0, -1].double()
    p = torch.softmax(logits / temperature, dim=-1)
    draws = 4000
    groups = engine.generate([prompt], Sampling(n=draws, temperature=temperature, max_tokens=1))
    counts = Counter(c.token_ids[0] for c in groups[0].completions)
    expected = p * draws
    large = expected >= 5
    statistic = sum(
        (counts.get(int(i), 0) - float(expected[i])) ** 2 / float(expected[i])
        for i in large.nonzero()
    )
    rest = draws - sum(counts.get(int(i), 0) for i in large.nonzero())
    expected_rest = float(expected[~large].sum())
    cells = int(large.sum())
    if expected_rest >= 5:
        statistic += (rest - expected_rest) ** 2 / expected_rest
    # Mean of a chi-square is its degrees of freedom, its variance twice that: 4 sigma.
    assert cells > 10
    assert statistic < cells + 4 * (2 * cells) ** 0.5


@pytest.mark.parametrize(("top_k", "top_p"), [(3, 1.0), (0, 0.5), (5, 0.6)])
def test_truncated_sampling_stays_inside_and_renormalises(
    engine, checkpoint, problems, top_k, top_p
):
    prompt = prompts_of(engine, problems[:1])[0]
    model = load_model(checkpoint)
    with torch.no_grad():
        p = torch.softmax(model(torch.tensor([prompt.token_ids])).logits[0, -1].double(), dim=-1)
    order = p.argsort(descending=True).tolist()
    if top_k:
        order = order[:top_k]
    mass = sum(float(p[i]) for i in order)
    allowed, total = [], 0.0
    for i in order:
        if total >= top_p * mass:
            break
        allowed.append(i)
        total += float(p[i])
    sampling = Sampling(n=200, top_k=top_k, top_p=top_p, max_tokens=1)
    for completion in engine.generate([prompt], sampling)[0].completions:
        (token,), (logprob,) = completion.token_ids, completion.logprobs
        assert token in allowed
        assert logprob == pytest.approx(float(torch.log(p[token] / total)), abs=1e-4)


def test_ends_and_truncation_are_told_apart(engine, problems):
    prompts = prompts_of(engine, problems)
    groups = engine.generate(prompts, Sampling(n=4, max_tokens=30))
    seen = Counter()
    for group in groups:
        for completion in group.completions:
            last = completion.token_ids[-1]
            assert (completion.finish_reason == "stop") is (last in engine.end_token_ids)
            assert not set(completion.token_ids[:-1]) & set(engine.end_token_ids)
            if completion.finish_reason == "length":
                assert len(completion.token_ids) == 30
            seen[completion.finish_reason] += 1
    assert seen["stop"]
    assert seen["length"]


def test_a_stop_string_ends_a_completion(engine, problems):
    prompts = prompts_of(engine, problems[:10])
    free = engine.generate(prompts, Sampling(n=4, max_tokens=30))
    some = next(c.text for g in free for c in g.completions if len(c.text) > 8)
    stop = some[3:5]
    stopped = engine.generate(prompts, Sampling(n=4, max_tokens=30, stop=(stop,)))
    found = 0
    for before, after in zip(free, stopped, strict=True):
        for one, two in zip(before.completions, after.completions, strict=True):
            assert one.token_ids[: len(two.token_ids)] == two.token_ids
            if stop in one.text:
                assert stop in two.text
                assert two.finish_reason == "stop"
                found += 1
    assert found


def test_a_prompt_longer_than_the_context_fails_alone(engine, problems):
    good = prompts_of(engine, problems[:1])[0]
    groups = engine.generate(
        [Prompt("long", (30,) * 128), good, Prompt("empty", ())], Sampling(n=2, max_tokens=5)
    )
    assert "128 tokens" in str(groups[0].error)
    assert groups[0].completions == []
    assert groups[1].error is None
    assert len(groups[1].completions) == 2
    assert groups[2].error is not None


def test_when_no_prompt_fits_all_say_so(engine, problems):
    long = [Prompt(f"long-{n}", (5,) * 4096) for n in range(2)]
    groups = engine.generate(long, Sampling(n=2, max_tokens=4))
    assert ["4096 tokens" in str(group.error) for group in groups] == [True, True]
    assert not any(group.completions for group in groups)
    assert engine.generate([], Sampling()) == []


def test_a_completion_never_passes_the_context(engine):
    group = engine.generate([Prompt("p", (30,) * 120)], Sampling(n=16, max_tokens=50))[0]
    assert max(len(c.token_ids) for c in group.completions) == 8


def test_pushed_weights_are_the_ones_used(engine, checkpoint, problems):
    model = load_model(checkpoint)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    prompts = prompts_of(engine, problems[:8])
    sampling = Sampling(n=2, max_tokens=12)
    before = tokens_of(engine.generate(prompts, sampling))
    try:
        engine.load_weights(model.state_dict().items(), 5)
        assert engine.policy_version == 5
        groups = engine.generate(prompts, sampling)
        assert tokens_of(groups) != before
        for group in groups:
            for completion in group.completions:
                expected = reference_logprobs(model, group.prompt, completion.token_ids, 1.0)
                assert completion.logprobs == pytest.approx(expected, abs=1e-4)
    finally:
        engine.load_weights(load_model(checkpoint).state_dict().items(), 0)


@torch.no_grad()
def first_probabilities(model, token_ids):
    return torch.softmax(model(torch.tensor([token_ids])).logits[0, -1].double(), dim=-1)


@pytest.mark.parametrize("min_p", [0.3, 0.05])
def test_min_p_keeps_what_is_probable_enough_and_renormalises(engine, checkpoint, problems, min_p):
    prompt = prompts_of(engine, problems[:1])[0]
    p = first_probabilities(load_model(checkpoint), prompt.token_ids)
    allowed = p >= min_p * p.max()
    assert 1 < int(allowed.sum()) < len(p)
    p = torch.where(allowed, p, 0.0) / p[allowed].sum()
    sampling = Sampling(n=400, min_p=min_p, max_tokens=1)
    completions = engine.generate([prompt], sampling)[0].completions
    assert {c.token_ids[0] for c in completions} == set(allowed.nonzero()[:, 0].tolist())
    for c in completions:
        assert c.logprobs[0] == pytest.approx(float(p[c.token_ids[0]].log()), abs=1e-4)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_repetition_penalty_is_that_of_transformers(
    engine, checkpoint, problems, temperature, compiled
):
    from transformers import RepetitionPenaltyLogitsProcessor

    model, penalise = load_model(checkpoint), RepetitionPenaltyLogitsProcessor(1.4)
    sampling = Sampling(n=3, temperature=temperature, repetition_penalty=1.4, max_tokens=16)
    prompts = prompts_of(engine, problems[:12])
    small = create(Config(slots=4, refill_share=0.1, compiled=compiled), checkpoint)
    groups = engine.generate(prompts, sampling)
    assert tokens_of(small.generate(prompts, sampling)) == tokens_of(groups)
    for prompt, group in zip(prompts, groups, strict=True):
        for completion in group.completions:
            ids = list(prompt.token_ids)
            for token, logprob in zip(completion.token_ids, completion.logprobs, strict=True):
                with torch.no_grad():
                    logits = model(torch.tensor([ids])).logits[:, -1].float()
                scores = penalise(torch.tensor([ids]), logits)[0]
                if not temperature:
                    assert token == int(scores.argmax())
                logp = torch.log_softmax(scores / (temperature or 1.0), dim=-1)
                assert logprob == pytest.approx(float(logp[token]), abs=1e-4)
                ids.append(token)


def test_a_stop_token_ends_a_completion_and_stays_in_it(engine, problems):
    prompts = prompts_of(engine, problems[:10])
    free = engine.generate(prompts, Sampling(n=4, max_tokens=30))
    counts = Counter(t for g in free for c in g.completions for t in c.token_ids[2:-2])
    stops = [token for token, _ in counts.most_common(2)]
    stopped = engine.generate(prompts, Sampling(n=4, max_tokens=30, stop_token_ids=stops))
    cut = 0
    for before, after in zip(free, stopped, strict=True):
        for one, two in zip(before.completions, after.completions, strict=True):
            where = [i for i, token in enumerate(one.token_ids) if token in stops]
            assert two.token_ids == one.token_ids[: where[0] + 1 if where else None]
            if where:
                cut += 1
                assert two.finish_reason == "stop"
    assert cut > 10
    with pytest.raises(UserError, match="token 99999"):
        engine.generate(prompts, Sampling(stop_token_ids=(99999,)))


def test_a_prefix_is_gone_on_from_as_a_prompt_of_its_own(engine, checkpoint, problems):
    """Its own id, seeds and budget, beside prompts that keep the common budget."""
    model = load_model(checkpoint)
    prompt, other = prompts_of(engine, problems[:2])
    sampling = Sampling(n=6, max_tokens=20)
    whole = max(engine.generate([prompt], sampling)[0].completions, key=lambda c: len(c.token_ids))
    assert len(whole.token_ids) > 8
    goes_on = Prompt(
        f"{prompt.id}/prefix-5", (*prompt.token_ids, *whole.token_ids[:5]), max_tokens=15
    )
    short = Prompt(f"{prompt.id}/short", prompt.token_ids, max_tokens=3)
    groups = engine.generate([other, goes_on, short], sampling)
    assert tokens_of(groups[:1]) == tokens_of(engine.generate([other], sampling))
    longest = [max(len(c.token_ids) for c in group.completions) for group in groups]
    assert longest[0] == 20
    assert longest[1] == 15
    assert longest[2] == 3
    for group in groups:
        for completion in group.completions:
            expected = reference_logprobs(model, group.prompt, completion.token_ids, 1.0)
            assert completion.logprobs == pytest.approx(expected, abs=1e-4)
    seeds = {c.seed for group in groups for c in group.completions} | {whole.seed}
    assert len(seeds) == 19
    # A budget above the common one is no way round it.
    generous = Prompt(short.id, prompt.token_ids, max_tokens=99)
    group = engine.generate([generous], sampling)[0]
    assert max(len(c.token_ids) for c in group.completions) <= 20
    with pytest.raises(ValueError, match="below 1"):
        Prompt("none", (1,), max_tokens=0)


def test_missing_and_unknown_weights_are_named(engine, checkpoint):
    weights = dict(load_model(checkpoint).state_dict())
    norm = weights.pop("model.norm.weight")
    with pytest.raises(UserError, match=r"model\.norm\.weight"):
        engine.load_weights(weights.items(), 1)
    with pytest.raises(UserError, match=r"model\.strange"):
        engine.load_weights(
            [*weights.items(), ("model.norm.weight", norm), ("model.strange", norm)], 1
        )
    engine.load_weights([*weights.items(), ("model.norm.weight", norm)], 0)


def trainer_logprobs(model, groups, temperature):
    """The training side: packed layouts, one forward pass, chunked vocabulary."""
    sequences = [
        Sequence(list(g.prompt.token_ids), c.token_ids, [True] * len(c.token_ids), number)
        for number, g in enumerate(groups)
        for c in g.completions
    ]
    tokens = flatten(sequences)
    found = torch.zeros(len(tokens.weight))
    with torch.no_grad():
        for micro in micro_batches(sequences, tokens, 2048):
            found[micro.token_index] = logprobs_of(model, micro.layout, temperature).logp
    return found


@pytest.mark.parametrize(
    ("architecture", "shape"),
    [("qwen2", {}), ("qwen3", {"kv_heads": 1}), ("llama", {"kv_heads": 4})],
)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logprobs_are_the_trainers(tmp_path, problems, architecture, shape, temperature, compiled):
    """With rows that leave and prompts that enter: few slots for many samples."""
    folder = make_checkpoint(tmp_path / "m", architecture, **shape)
    engine = create(Config(slots=20, refill_share=0.2, compiled=compiled), folder)
    sampling = Sampling(n=4, temperature=temperature, max_tokens=40)
    groups = engine.generate(prompts_of(engine, problems), sampling)
    expected = trainer_logprobs(load_model(folder), groups, temperature)
    ours = torch.tensor([v for g in groups for c in g.completions for v in c.logprobs])
    assert len(ours) > 2000
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=0)


KINDS = {
    "plain": {},
    "cold": {"temperature": 0.6},
    "top_k": {"top_k": 4},
    "top_p": {"top_p": 0.8, "temperature": 0.9},
    "min_p": {"min_p": 0.15},
    "all": {"temperature": 1.3, "min_p": 0.05, "top_k": 6, "top_p": 0.95},
    "penalty": {"repetition_penalty": 1.5, "temperature": 1.2},
}


@pytest.mark.parametrize("kind", KINDS)
def test_logprobs_are_those_of_the_distribution_drawn_from(engine, checkpoint, problems, kind):
    sampling = Sampling(n=3, max_tokens=12, **KINDS[kind])
    model = load_model(checkpoint)
    for group in engine.generate(prompts_of(engine, problems[:6]), sampling):
        for completion in group.completions:
            ids = list(group.prompt.token_ids)
            for token, logprob in zip(completion.token_ids, completion.logprobs, strict=True):
                p = exact_distribution(model, ids, sampling)
                assert logprob == pytest.approx(math.log(p[token]), abs=1e-4)
                ids.append(token)


def make_tiny_vocabulary(folder, ends=(0,)):
    """A model with 6 tokens, so that every completion can be written down."""
    from tokenizers import Tokenizer, models
    from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen2Config

    config = Qwen2Config(
        vocab_size=6, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64,
        tie_word_embeddings=False,
    )  # fmt: skip
    from transformers import AutoModelForCausalLM

    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    model.generation_config = GenerationConfig(eos_token_id=list(ends))
    model.save_pretrained(folder)
    words = {word: i for i, word in enumerate(["</s>", *"abcde"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="a"))  # noqa: S106 - a token of a vocabulary
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")  # noqa: S106 - a token of a vocabulary
    fast.save_pretrained(folder)
    return folder


def exact_completions(model, prompt, ends, sampling):
    """Every completion and its probability."""
    running, done = {(): 1.0}, {}
    for _ in range(sampling.max_tokens):
        longer = {}
        for completion, mass in running.items():
            for token, p in exact_distribution(model, [*prompt, *completion], sampling).items():
                (done if token in ends else longer)[(*completion, token)] = mass * p
        running = longer
    return done | running


@pytest.mark.parametrize("kind", KINDS)
def test_completions_have_their_exact_probabilities(tmp_path, kind, compiled):
    """Chi-square over all completions of three tokens; the seeds are fixed, so it cannot flake.

    20,000 samples, 4,000 at a time: rows leave at end tokens and others take their places.
    """
    folder = make_tiny_vocabulary(tmp_path / "m")
    sampling = Sampling(n=500, max_tokens=3, seed=11, **KINDS[kind])
    prompt = (1, 4, 2)
    exact = exact_completions(load_model(folder), prompt, {0}, sampling)
    assert sum(exact.values()) == pytest.approx(1.0, abs=1e-9)
    engine = create(Config(slots=4000, compiled=compiled), folder)
    groups = engine.generate([Prompt(f"p{i}", prompt) for i in range(40)], sampling)
    counts = Counter(tuple(c.token_ids) for g in groups for c in g.completions)
    assert set(counts) <= set(exact)
    draws = sum(counts.values())
    assert draws == 20_000
    large = {c: p for c, p in exact.items() if p * draws >= 5}
    rest = 1.0 - sum(large.values())
    cells = [(counts[c], p * draws) for c, p in large.items()]
    if rest * draws >= 5:
        cells.append((draws - sum(found for found, _ in cells), rest * draws))
    statistic = sum((found - expected) ** 2 / expected for found, expected in cells)
    freedom = len(cells) - 1
    assert freedom >= 10
    # Mean of a chi-square is its degrees of freedom, its variance twice that: 3 sigma.
    assert abs(statistic - freedom) < 3 * (2 * freedom) ** 0.5


def test_every_end_token_ends_and_stays_in_the_completion(tmp_path, compiled):
    engine = create(Config(compiled=compiled), make_tiny_vocabulary(tmp_path / "m", ends=(0, 3, 5)))
    assert engine.end_token_ids == [0, 3, 5]
    (group,) = engine.generate([Prompt("p", (1, 2))], Sampling(n=200, max_tokens=5))
    last = Counter()
    for completion in group.completions:
        assert not {0, 3, 5} & set(completion.token_ids[:-1])
        over = completion.token_ids[-1] in (0, 3, 5)
        assert completion.finish_reason == ("stop" if over else "length")
        assert over or len(completion.token_ids) == 5
        last[completion.token_ids[-1] if over else None] += 1
    assert min(last[token] for token in (0, 3, 5)) > 5
    assert last[None] > 5


def test_an_end_token_at_the_last_place_is_a_stop(engine, problems):
    prompts = prompts_of(engine, problems[:20])
    free = engine.generate(prompts, Sampling(n=8, max_tokens=30))
    length = next(
        len(c.token_ids)
        for g in free
        for c in g.completions
        if c.finish_reason == "stop" and len(c.token_ids) > 1
    )
    cut = engine.generate(prompts, Sampling(n=8, max_tokens=length))
    seen = Counter()
    for one, two in zip(free, cut, strict=True):
        for before, after in zip(one.completions, two.completions, strict=True):
            assert after.token_ids == before.token_ids[:length]
            if len(before.token_ids) == length:
                assert after.finish_reason == before.finish_reason
                seen[after.finish_reason] += 1
            elif len(before.token_ids) > length:
                assert after.finish_reason == "length"
    assert seen["stop"]


@pytest.mark.parametrize("first", [True, False])
def test_several_stop_strings_over_several_tokens(engine, checkpoint, problems, first, compiled):
    """Stop strings that begin in one token and end in another, in few slots."""
    prompts = prompts_of(engine, problems[:16])
    cramped = (
        engine
        if first
        else create(Config(slots=8, refill_share=0.1, compiled=compiled), checkpoint)
    )
    free = engine.generate(prompts, Sampling(n=4, max_tokens=30))
    decode = engine.tokenizer.decode
    stops = set()
    for group in free[:6]:
        ids = group.completions[0].token_ids
        if len(ids) > 10:
            stops.add(decode(ids[4:7]))
    stops = tuple(sorted(s for s in stops if len(s) > 2 and "\ufffd" not in s))
    assert len(stops) >= 2
    stopped = cramped.generate(prompts, Sampling(n=4, max_tokens=30, stop=stops))
    found = 0
    for before, after in zip(free, stopped, strict=True):
        for one, two in zip(before.completions, after.completions, strict=True):
            ids = one.token_ids
            ends = [
                i
                for i in range(1, len(ids) + 1)
                if any(stop in decode(ids[max(0, i - 40) : i]) for stop in stops)
            ]
            assert two.token_ids == ids[: ends[0] if ends else None]
            if ends:
                assert two.finish_reason == "stop"
                found += 1
    assert found >= 2


def test_less_memory_makes_fewer_slots_and_the_same_samples(engine, checkpoint, problems, compiled):
    prompts, sampling = prompts_of(engine, problems[:12]), Sampling(n=3, max_tokens=16)
    small = create(Config(memory_gib=1e-4, compiled=compiled), checkpoint)
    assert tokens_of(small.generate(prompts, sampling)) == tokens_of(
        engine.generate(prompts, sampling)
    )
    assert small._batch.slots < engine._batch.slots == 36


def held_bytes(decoder):
    """What is allocated for keys and values."""
    if decoder.compiled is not None:
        return sum(slab.nbytes for slab in decoder.compiled.pages._slabs)
    return sum(memory.nbytes for memory in decoder.store._held.values())


# Heads that fill no whole vectors, and heads of two; many key-value heads, and one.
HEADS = [
    ("qwen2", {"context": 512}),
    ("qwen3", {"context": 512, "width": 40, "heads": 2, "kv_heads": 1}),
    ("llama", {"context": 512, "width": 64, "heads": 2, "kv_heads": 2}),
]


@pytest.mark.parametrize(("architecture", "shape"), HEADS)
def test_memory_gib_holds(tmp_path, architecture, shape, compiled):
    """Long prompts, short ones, long completions, in turn: never more than may be held."""
    folder = make_checkpoint(tmp_path / "m", architecture, **shape)
    most, seen = int(0.002 * 2**30), set()
    engine = create(Config(memory_gib=0.002, compiled=compiled), folder)
    engine.end_token_ids = []  # every completion is as long as it can be
    decoder, draw = engine.decoder, random.Random(1)
    for length, max_tokens, n in [
        (300, 20, 2), (20, 200, 4), (300, 100, 1), (40, 16, 8), (16, 1, 3), (300, 20, 2),
    ]:  # fmt: skip
        prompts = [
            Prompt(f"p{i}", tuple(draw.randrange(5, 200) for _ in range(length - i % 3)))
            for i in range(60)
        ]
        groups = engine.generate(prompts, Sampling(n=n, max_tokens=max_tokens))
        assert all(len(c.token_ids) == max_tokens for g in groups for c in g.completions)
        size = engine._batch.size
        assert held_bytes(decoder) <= most
        assert decoder.cache_bytes(size) <= most
        if size.rows < 60 * n:  # one sample more would not have fitted
            seen.add(length)
            more = size._replace(rows=size.rows + 1, blocks=min(2 * ((size.rows + 1) // n), 60))
            assert decoder.cache_bytes(more) > most
    assert {300, 20} <= seen


def test_memory_gib_holds_while_a_batch_takes_the_place_of_another(tmp_path, monkeypatch):
    """The old cache is gone before there is a new one: all that is alive is counted."""
    engine = create(
        Config(memory_gib=0.002, compiled=False), make_checkpoint(tmp_path / "m", context=512)
    )
    engine.end_token_ids = []
    caches, held, open_ = [], [], Decoder.open

    def opened(decoder, lanes, size):
        session = open_(decoder, lanes, size)
        caches.append(weakref.ref(session.cache))
        alive = [
            part for ref in caches if (cache := ref()) for part in (cache.prompt, cache.completion)
        ]
        memories = [part.untyped_storage() for part in (*alive, *decoder.store._held.values())]
        held.append(sum({memory.data_ptr(): memory.nbytes() for memory in memories}.values()))
        return session

    monkeypatch.setattr(Decoder, "open", opened)
    for length, max_tokens, n in [
        (300, 20, 2), (20, 200, 4), (300, 100, 1), (40, 16, 8), (300, 20, 2),
    ]:  # fmt: skip
        prompts = [Prompt(f"p{i}", tuple(range(5, 5 + length))) for i in range(60)]
        engine.generate(prompts, Sampling(n=n, max_tokens=max_tokens))
    assert len(held) == 5
    assert 0 < max(held) <= 0.002 * 2**30


def calls(lengths):
    """Prompts of training steps, the longest of each step given."""
    draw = random.Random(2)
    for longest in lengths:
        counts = [longest, *(draw.randrange(longest // 5, longest) for _ in range(39))]
        yield [Prompt(f"p{i}", tuple(range(5, 5 + count))) for i, count in enumerate(counts)]


def test_a_batch_that_memory_binds_is_used_for_shorter_prompts_too(tmp_path, compiled, monkeypatch):
    """On a GPU each new one costs its CUDA graphs, so only much shorter prompts get one."""
    folder = make_checkpoint(tmp_path / "m", context=256)
    tight = create(Config(memory_gib=0.002, compiled=compiled), folder)
    wide, sampling = create(Config(compiled=compiled), folder), Sampling(n=4, max_tokens=8)
    made, init = [], embedded._Batch.__init__

    def counted(batch, *arguments):
        init(batch, *arguments)
        made.append(batch.size)

    monkeypatch.setattr(embedded._Batch, "__init__", counted)
    for prompts in calls([199, 150, 180, 120, 198, 100, 199]):
        tight.generate(prompts, sampling)
    assert [size.prompt for size in made] == [199]
    assert made[0].rows < 160
    for prompts in calls([99, 80, 50]):  # less than half as long: more rows fit
        tight.generate(prompts, sampling)
    assert [size.prompt for size in made[1:]] == [99]
    assert made[0].rows < made[1].rows
    for prompts in calls([100]):
        tight.generate(prompts, sampling)
    assert [size.prompt for size in made[2:]] == [100]
    made.clear()
    for prompts in calls([199, 99, 80, 50]):  # where all rows fit, there is nothing to be won
        wide.generate(prompts, sampling)
    assert [size.rows for size in made] == [160]


def test_a_batch_holds_what_was_counted_for_it(tmp_path, compiled):
    """Prompts and completions of full length, all of them at once."""
    folder = make_checkpoint(tmp_path / "m", "qwen3", context=512, width=40, heads=2, kv_heads=1)
    for length, max_tokens in ((16, 129), (100, 300), (33, 16), (1, 2)):
        engine = create(Config(compiled=compiled), folder)
        engine.end_token_ids = []
        prompts = [Prompt(f"p{i}", tuple(range(5, 5 + length))) for i in range(3)]
        engine.generate(prompts, Sampling(n=4, max_tokens=max_tokens))
        assert engine._batch.size == (12, 3, length, max_tokens)
        assert held_bytes(engine.decoder) == engine.decoder.cache_bytes(engine._batch.size)


def test_calls_share_memory_and_nothing_else(engine, checkpoint, problems, compiled):
    """A reused batch, another shape in between, and a policy that became NaN in between."""
    prompts, sampling = prompts_of(engine, problems[:10]), Sampling(n=4, max_tokens=20)
    fresh = create(Config(compiled=compiled), checkpoint)
    first = tokens_of(fresh.generate(prompts, sampling))
    batch = fresh._batch
    assert tokens_of(fresh.generate(prompts, sampling)) == first
    assert fresh._batch is batch
    fresh.generate(prompts[:3], Sampling(n=2, max_tokens=60))
    assert tokens_of(fresh.generate(prompts, sampling)) == first
    weights = load_model(checkpoint).state_dict()
    fresh.load_weights(((name, value * torch.nan) for name, value in weights.items()), 1)
    assert all(math.isnan(c.logprobs[0]) for c in fresh.generate(prompts, sampling)[0].completions)
    fresh.load_weights(weights.items(), 2)
    assert tokens_of(fresh.generate(prompts, sampling)) == first


def test_rounded_shapes_change_nothing(checkpoint, problems, monkeypatch):
    """The shapes of CUDA graphs, without a GPU: rows, prompts and positions beyond those there."""

    class Plain:
        def __init__(self, device):
            self.device, self.keys = device, []

        def run(self, key, function):
            self.keys.append(key)
            return function()

    plain = create(Config(compiled=False), checkpoint)
    prompts, sampling = prompts_of(plain, problems[:30]), Sampling(n=4, max_tokens=40)
    expected = plain.generate(prompts, sampling)
    monkeypatch.setattr(embedded, "StepGraphs", Plain)
    monkeypatch.setattr(Decoder, "graphs", True)
    rounded = create(Config(slots=40, compiled=False), checkpoint)
    groups = rounded.generate(prompts, sampling)
    assert tokens_of(groups) == tokens_of(expected)
    for one, two in zip(groups, expected, strict=True):
        for ours, theirs in zip(one.completions, two.completions, strict=True):
            assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-5)
    keys = rounded._batch.graphs.keys
    assert {key[0] for key in keys} <= set(range(5, 41, 5))
    assert len(set(keys)) < len(keys) / 2


def test_greedy_tokens_of_200_prompts_equal_transformers(tmp_path, compiled):
    folder = make_checkpoint(tmp_path / "m", width=64, heads=2, kv_heads=1)
    engine, model = create(Config(slots=64, compiled=compiled), folder), load_model(folder)
    many = list(read(EmbeddedSource(train=1, validation=1, test=200), 3))[-200:]
    prompts = prompts_of(engine, many)
    groups = engine.generate(prompts, Sampling(n=1, temperature=0.0, max_tokens=24))
    assert len(groups) == 200
    for prompt, group in zip(prompts, groups, strict=True):
        (completion,) = group.completions
        ids = torch.tensor([[*prompt.token_ids, *completion.token_ids]])
        with torch.no_grad():
            logits = model(ids).logits[0, len(prompt.token_ids) - 1 : -1]
        assert completion.token_ids == logits.argmax(-1).tolist()
        if len(completion.token_ids) < 24:
            assert completion.token_ids[-1] in engine.end_token_ids


def other_architecture(folder, checkpoint, kind):
    """A model that is not written for the engine, with the tokenizer of one that is."""
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    tokenizer = load_tokenizer(checkpoint)
    common = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if kind == "gpt2":
        shape = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
    else:
        shape = {
            "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
        }  # fmt: skip
    if kind == "gemma2":
        # A window shorter than the texts, so that the sliding layers matter.
        shape |= {"head_dim": 8, "sliding_window": 24}
    if kind == "qwen2":
        shape |= {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1}
    torch.manual_seed(2)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **common, **shape))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0) if parameter.ndim >= 2 else parameter.add_(0.05)
    model.generation_config = GenerationConfig(eos_token_id=[tokenizer.eos_token_id])
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["gpt_neox", "gemma2", "phi", "gpt2", "qwen2"])
def test_other_architectures_run_through_their_own_forward(tmp_path, checkpoint, problems, kind):
    folder = other_architecture(tmp_path / "m", checkpoint, kind)
    model = load_model(folder)
    with pytest.warns(UserWarning, match=f"{kind} with .* is not written"):
        engine = create(Config(slots=24), folder)
    prompts = render_prompts(problems[:10], engine.tokenizer, "embedded")
    greedy = engine.generate(prompts, Sampling(n=1, temperature=0.0, max_tokens=16))
    sampling = Sampling(n=4, temperature=0.8, max_tokens=24)
    groups = engine.generate(prompts, sampling)
    for group in (*greedy, *groups):
        for completion in group.completions:
            temperature = 0.8 if len(group.completions) > 1 else 1.0
            expected = reference_logprobs(model, group.prompt, completion.token_ids, temperature)
            assert completion.logprobs == pytest.approx(expected, abs=1e-4)
    for prompt, group in zip(prompts, greedy, strict=True):
        ids = torch.tensor([[*prompt.token_ids, *group.completions[0].token_ids]])
        with torch.no_grad():
            logits = model(ids).logits[0, len(prompt.token_ids) - 1 : -1]
        assert group.completions[0].token_ids == logits.argmax(-1).tolist()
    # Neither neighbours nor slots matter.
    assert tokens_of(engine.generate(prompts[3:4], sampling))[prompts[3].id] == [
        c.token_ids for c in groups[3].completions
    ]
    # Pushed weights are used.
    weights = {name: value * 1.1 for name, value in model.state_dict().items()}
    engine.load_weights(weights.items(), 3)
    model.load_state_dict(weights)
    for group in engine.generate(prompts[:3], sampling):
        for completion in group.completions:
            expected = reference_logprobs(model, group.prompt, completion.token_ids, 0.8)
            assert completion.logprobs == pytest.approx(expected, abs=1e-4)
    with pytest.raises(UserError, match="missing"):
        engine.load_weights([], 4)
    with pytest.raises(UserError, match="strange"):
        engine.load_weights([("strange", torch.zeros(1))], 4)


def test_bfloat16_weights_sample_close_to_float32(checkpoint, problems):
    """The same tokens scored in float32: bfloat16 keeps 8 bits, so a few per cent."""
    engine = create(Config(dtype="bfloat16"), checkpoint)
    model = load_model(checkpoint, "bfloat16").float()
    groups = engine.generate(prompts_of(engine, problems[:8]), Sampling(n=4, max_tokens=12))
    gaps = [
        abs(ours - theirs)
        for group in groups
        for c in group.completions
        for ours, theirs in zip(
            c.logprobs, reference_logprobs(model, group.prompt, c.token_ids, 1.0), strict=True
        )
    ]
    assert sum(gaps) / len(gaps) < 0.1


def test_a_step_is_captured_on_the_engines_own_gpu(monkeypatch):
    """A stream is one GPU's: on the current one's nothing of another would be captured."""
    current, said = [0], []

    @contextlib.contextmanager
    def on(device):
        before, current[0] = current[0], device.index
        yield
        current[0] = before

    @contextlib.contextmanager
    def capture(graph, *, stream, **_):
        assert graph.device == stream == current[0]
        yield

    class Graph:
        def __init__(self):
            self.device = current[0]

        def replay(self):
            said.append(f"replays on {self.device}")

    _graphs._capture_stream.cache_clear()
    for name, stand_in in {
        "graph_pool_handle": object,
        "device": on,
        "CUDAGraph": Graph,
        "graph": capture,
        "Stream": lambda index: index,
        "current_device": lambda: current[0],
    }.items():
        monkeypatch.setattr(f"torch.cuda.{name}", stand_in)
    graphs = _graphs.StepGraphs(torch.device("cuda", 1))

    def step():
        said.append(f"runs on {current[0]}")
        return torch.ones(1)

    for _ in range(3):
        graphs.run("key", step)
    # Plainly, then captured (which runs nothing) and replayed, then replayed.
    assert said == ["runs on 0", "runs on 1", "replays on 1", "replays on 1"]
    assert current == [0]
    _graphs._capture_stream.cache_clear()


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU or none")
def test_a_gpu_that_is_not_the_current_one_gives_the_same_samples(checkpoint, problems):
    first, second = (create(Config(device=f"cuda:{n}", slots=40), checkpoint) for n in range(2))
    prompts, sampling = prompts_of(first, problems[:30]), Sampling(n=4, max_tokens=40)
    for _ in range(2):
        found = second.generate(prompts, sampling)
        assert tokens_of(found) == tokens_of(first.generate(prompts, sampling))
    assert second._batch.graphs._held


@pytest.mark.gpu
def test_cuda_graphs_give_the_same_samples(checkpoint, problems):
    """On a GPU: with graphs and without, and close to the CPU's log-probs."""
    plain = create(Config(device="cuda", cuda_graphs=False, slots=40), checkpoint)
    graphs = create(Config(device="cuda", slots=40), checkpoint)
    prompts, sampling = prompts_of(plain, problems[:30]), Sampling(n=4, max_tokens=40)
    model = load_model(checkpoint)
    expected = plain.generate(prompts, sampling)
    for _ in range(2):  # the second call replays what the first has captured
        groups = graphs.generate(prompts, sampling)
        assert tokens_of(groups) == tokens_of(expected)
    for group in groups[:5]:
        for completion in group.completions:
            expected = reference_logprobs(model, group.prompt, completion.token_ids, 1.0)
            assert completion.logprobs == pytest.approx(expected, abs=1e-3)
    assert graphs._batch.graphs._held
    weights = {name: value * 1.1 for name, value in model.state_dict().items()}
    for engine in (plain, graphs):
        engine.load_weights(weights.items(), 1)
    assert tokens_of(graphs.generate(prompts, sampling)) == tokens_of(
        plain.generate(prompts, sampling)
    )
