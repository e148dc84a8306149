"""What the embedded engine is made of: random numbers, inversion, truncation, the cache."""

from __future__ import annotations

import pytest
import torch

from pipeline.engines import Sampling, sample_seed
from pipeline.engines._cache import Cache, Store, rounded
from pipeline.engines._random import seed_states, uniforms
from pipeline.engines._sampler import LARGE, Sampler, invert, truncate

MASK = 2**64 - 1


def finalise(z):
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & MASK
    return z ^ (z >> 31)


def test_random_numbers_are_splitmix_in_python_integers():
    seeds = [0, 1, 2**62 - 1, sample_seed(1, 2, "p", 3)]
    # SplitMix64 started at 0 gives this first output (Vigna's reference implementation).
    assert finalise(0x9E3779B97F4A7C15) == 0xE220A8397B1DCDAF
    states = seed_states(torch.tensor(seeds))
    assert [state & MASK for state in states.tolist()] == [
        finalise((seed + 0x9E3779B97F4A7C15) & MASK) for seed in seeds
    ]
    for counter in (0, 1, 63, 40000):
        drawn = uniforms(states, torch.full((4,), counter)).tolist()
        for state, value in zip(states.tolist(), drawn, strict=True):
            z = (state & MASK) ^ ((counter + 1) * 0x9E3779B97F4A7C15 & MASK)
            assert value == (finalise(z) >> 11) * 2.0**-53


def test_random_numbers_are_even():
    """Mean and variance over many seeds and counters, within five standard errors."""
    seeds = torch.tensor([sample_seed(0, 0, f"p{i}", i % 8) for i in range(400)])
    u = torch.stack([uniforms(seed_states(seeds), torch.full((400,), t)) for t in range(100)])
    assert 0.0 <= float(u.min()) < float(u.max()) < 1.0
    assert abs(float(u.mean()) - 0.5) < 5 * (1 / 12 / u.numel()) ** 0.5
    assert abs(float(u.var()) - 1 / 12) < 5 * (1 / 180 / u.numel()) ** 0.5


@pytest.mark.parametrize("vocabulary", [11, 512, LARGE - 1, LARGE, 2 * LARGE + 256])
def test_inversion_is_the_first_token_past_the_point(vocabulary):
    generator = torch.Generator().manual_seed(3)
    p = torch.rand(40, vocabulary, generator=generator).pow_(8)
    p[:, torch.randperm(vocabulary, generator=generator)[: vocabulary // 2]] = 0.0
    p /= 3.0  # need not sum to 1
    point = torch.rand(40, dtype=torch.float64, generator=generator)
    tokens, total = invert(p, point)
    cumulative = p.double().cumsum(-1)
    torch.testing.assert_close(total, cumulative[:, -1], rtol=1e-12, atol=0)
    for row, token in enumerate(tokens.tolist()):
        threshold = float(point[row] * cumulative[row, -1])
        assert float(p[row, token]) > 0.0
        before = float(cumulative[row, token]) - float(p[row, token].double())
        assert before <= threshold + 1e-9
        assert float(cumulative[row, token]) > threshold - 1e-9


@pytest.mark.parametrize("vocabulary", [16, LARGE])
def test_a_token_without_probability_is_never_drawn(vocabulary):
    p = torch.zeros(3, vocabulary)
    p[0, 5], p[1, vocabulary - 1], p[2, 0] = 1.0, 1e-30, 0.3
    for point in (0.0, 0.5, 1.0 - 2.0**-53):
        tokens, _ = invert(p, torch.full((3,), point, dtype=torch.float64))
        assert tokens.tolist() == [5, vocabulary - 1, 0]


def test_truncation_by_hand():
    p = torch.tensor([[0.5, 0.25, 0.125, 0.0625, 0.0625]])

    def kept(**options):
        return (truncate(p, Sampling(**options)) > 0)[0].tolist()

    assert kept(top_k=2) == [True, True, False, False, False]
    # The third token starts at 0.75, which is not below.
    assert kept(top_p=0.75) == [True, True, False, False, False]
    assert kept(top_p=0.76) == [True, True, True, False, False]
    assert kept(top_p=1e-9) == [True, False, False, False, False]
    assert kept(min_p=0.25) == [True, True, True, False, False]
    assert kept(min_p=1.0) == [True, False, False, False, False]
    # Each on what the one before has left: two thirds of 0.75 is 0.5.
    assert kept(top_k=2, top_p=0.7) == [True, True, False, False, False]
    assert kept(top_k=2, top_p=0.6) == [True, False, False, False, False]


def test_truncation_and_penalty_are_those_of_transformers():
    """Against transformers' own processors; min-p comes before top-k and top-p, as in vLLM."""
    from transformers import (
        MinPLogitsWarper,
        RepetitionPenaltyLogitsProcessor,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(64, 50, generator=generator) * 3
    ids = torch.randint(50, (64, 12), generator=generator)
    sampling = Sampling(temperature=0.8, top_k=20, top_p=0.9, min_p=0.03, repetition_penalty=1.3)
    scores = logits
    for processor in (
        RepetitionPenaltyLogitsProcessor(1.3),
        TemperatureLogitsWarper(0.8),
        MinPLogitsWarper(0.03),
        TopKLogitsWarper(20),
        TopPLogitsWarper(0.9),
    ):
        scores = processor(ids, scores)
    expected = torch.log_softmax(scores.double(), dim=-1)
    seen = torch.zeros(64, 50, dtype=torch.bool).scatter_(1, ids, True)
    for counter in range(20):
        states = seed_states(torch.arange(64))
        tokens, logps = Sampler(sampling).draw(
            logits.clone(), states, torch.full((64,), counter), seen
        )
        chosen = expected.gather(1, tokens[:, None])[:, 0]
        torch.testing.assert_close(logps.double(), chosen, atol=1e-5, rtol=0)


def test_the_cache_holds_a_prompt_once_and_keeps_rows_dense():
    cache = Cache(Store(), 2, 1, 4, 3, 1, 9, 4, 20, 240, torch.float32, torch.device("cpu"))
    kept = torch.arange(2 * 2 * 3 * 20 * 4, dtype=torch.float32).view(2, 2, 3, 1, 20, 4)
    cache.add(kept, [20, 5, 7])
    assert cache.rows == 9
    assert cache.prompt.shape[2] == 4
    assert torch.equal(cache.prompt[:, :, :3, :, :20], kept)
    assert torch.isfinite(cache.prompt_mask).sum(1).tolist() == [20, 5, 7, 0]
    cache.fit(1, coarse=False)
    where = cache.destinations(torch.zeros(9, dtype=torch.int64))
    for layer in range(2):
        values = torch.arange(9.0)[:, None] + 100 * layer
        cache.flat(layer).index_copy_(0, where, values.repeat_interleave(2, 0).expand(-1, 4))
    # Block 0 loses all rows: block 2 takes its place.
    cache.keep([8, 7, 6, 3])
    assert cache.blocks == 2
    assert torch.equal(cache.prompt[:, :, 0, :, :20], kept[:, :, 2])
    assert torch.equal(cache.prompt[:, :, 1, :, :20], kept[:, :, 1])
    assert cache.completion[1, 0, :4, 0, 1, 0].tolist() == [108.0, 107.0, 106.0, 103.0]
    cache.fit(1, coarse=False)
    assert cache.block_of == [0, 0, 0, 1]
    assert cache.place[:4].tolist() == [0, 1, 2, 3]
    assert cache.occupant[:4].tolist() == [0, 1, 2, 3]
    # Two rows of one lane each: steps have one lane.
    cache.keep([0, 3])
    cache.fit(1, coarse=False)
    assert cache.step_lanes == 1
    assert cache.place[:2].tolist() == [0, 1]
    # What is there survives growth.
    cache.fit(200, coarse=False)
    assert cache.completion.shape[4] > 200
    assert cache.completion[1, 0, :2, 0, 1, 0].tolist() == [108.0, 103.0]
    assert torch.isfinite(cache.completion_mask[:2]).sum(1).tolist() == [1, 1]


@pytest.mark.parametrize("longest", [1, 60, 100, 130, 1000, 1040, 1500])
@pytest.mark.parametrize("before", [0, 30, 60, 90, 200])
def test_completions_grow_to_what_they_can_need_and_no_further(longest, before):
    """A growth holds what it copies beside what it makes: at most half of that, whatever was."""
    store, like = Store(), torch.zeros(0)
    full = rounded(longest)
    # An earlier batch's memory, in hundredths of what this one can need.
    if before:
        store.take("completion", (8 * 10 * full * before // 100,), like)
    cache = Cache(store, 1, 1, 4, 2, 1, 10, 5, 20, longest, torch.float32, torch.device("cpu"))
    cache.add(torch.zeros(1, 2, 5, 1, 20, 4), [20] * 5)
    for tokens in range(longest):
        width, held = cache.completion.shape[4], store.size("completion")
        cache.fit(tokens, coarse=False)
        if cache.completion.shape[4] != width:
            assert held <= 8 * 10 * rounded(full // 2)
    need = 8 * 10 * full, 8 * 5 * 32
    assert store.size("completion") >= need[0] and store.size("prompt") == need[1]
    # No more than this batch needs, or the one before it had.
    held = sum(map(store.size, ("completion", "prompt")))
    assert held <= max(sum(need), need[0] * before // 100)


def test_rows_that_have_ended_write_into_their_own_memory():
    """They stay until gaps are closed, and may be longer than any row that there is room for."""
    cache = Cache(Store(), 1, 2, 4, 2, 1, 4, 2, 3, 60, torch.float32, torch.device("cpu"))
    cache.add(torch.zeros(1, 2, 2, 2, 3, 4), [3, 3])
    cache.fit(5, coarse=False)
    positions = cache.completion.shape[4]
    where = cache.destinations(torch.tensor([4, positions - 1, positions + 9, 0]))
    for row, places in enumerate(where.view(4, 4).tolist()):
        keys, values = row * 2, (4 + row) * 2
        owners = [place // positions for place in places]
        assert owners == [keys, keys + 1, values, values + 1]
