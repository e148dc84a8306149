"""The embedded engine against transformers, against itself, and against exact probabilities."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from data_prep.errors import UserError
from pipeline.engines import Prompt, Sampling, create_engine, sample_seed
from pipeline.engines.embedded import Config, create
from pipeline.generate import render_prompts
from pipeline.model import load_model

from .conftest import make_checkpoint


def prompts_of(engine, problems):
    return render_prompts(problems, engine.tokenizer, "embedded")


@pytest.fixture(scope="module")
def engine(checkpoint):
    return create(Config(), checkpoint)


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
def test_greedy_tokens_equal_transformers(tmp_path, problems, architecture, shape):
    folder = make_checkpoint(tmp_path / "m", architecture, **shape)
    engine, model = create(Config(slots=3), folder), load_model(folder)
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


def test_a_sample_does_not_depend_on_its_neighbours_or_on_the_slots(engine, checkpoint, problems):
    sampling = Sampling(n=4, max_tokens=20, seed=3, step=2)
    prompts = prompts_of(engine, problems[:20])
    whole = tokens_of(engine.generate(prompts, sampling))
    assert len({tuple(t) for ts in whole.values() for t in ts}) > 40
    alone = tokens_of(engine.generate(prompts[5:6], sampling))
    assert alone[prompts[5].id] == whole[prompts[5].id]
    cramped = create(Config(slots=9, refill_share=0.1), checkpoint)
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
def test_repetition_penalty_is_that_of_transformers(engine, checkpoint, problems, temperature):
    from transformers import RepetitionPenaltyLogitsProcessor

    model, penalise = load_model(checkpoint), RepetitionPenaltyLogitsProcessor(1.4)
    sampling = Sampling(n=3, temperature=temperature, repetition_penalty=1.4, max_tokens=16)
    prompts = prompts_of(engine, problems[:12])
    small = create(Config(slots=4, refill_share=0.1), checkpoint)
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


def test_an_architecture_that_is_not_written_here_is_refused(tmp_path):
    from tokenizers import Tokenizer, models
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    GPT2LMHeadModel(
        GPT2Config(vocab_size=8, n_embd=8, n_layer=1, n_head=1, bos_token_id=0, eos_token_id=0)
    ).save_pretrained(tmp_path)
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE())).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="gpt2"):
        create_engine(Config(), tmp_path)
