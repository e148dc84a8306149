from __future__ import annotations

import sys

import psutil
import pytest
import torch

from pipeline import logprobs
from pipeline.logprobs import selected_logprobs


def dense(hidden, weight, targets, temperature):
    logp = torch.log_softmax(hidden @ weight.T / temperature, dim=-1)
    entropy = -(logp.exp() * logp).sum(-1)
    return logp.gather(-1, targets[:, None]).squeeze(-1), entropy


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("chunk_bytes", [8 * 11 * 3, 1 << 26])
@pytest.mark.parametrize("keep_bytes", [0, 1 << 26])
@pytest.mark.parametrize("asked", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 1)])
def test_value_and_gradient_equal_the_dense_form(
    monkeypatch, temperature, chunk_bytes, keep_bytes, asked
):
    monkeypatch.setattr(logprobs, "CHUNK_BYTES", chunk_bytes)
    monkeypatch.setattr(logprobs, "KEEP_BYTES", keep_bytes)
    torch.manual_seed(0)
    hidden = torch.randn(10, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(11, 5, dtype=torch.float64, requires_grad=True)
    other = torch.randn(10, 3, dtype=torch.float64), torch.randn(11, 3, dtype=torch.float64)
    targets = torch.randint(0, 11, (10,))
    upstream = torch.randn(3, 10, dtype=torch.float64)

    found = selected_logprobs(hidden, weight, targets, temperature, other)
    log_q = torch.log_softmax(other[0] @ other[1].T / temperature, dim=-1)
    logp, entropy = dense(hidden, weight, targets, temperature)
    everything = torch.log_softmax(hidden @ weight.T / temperature, dim=-1)
    kl = (everything.exp() * (everything - log_q)).sum(-1)
    expected = (logp, entropy, kl)
    for one, two in zip(found, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)

    def gradient(values):
        terms = [(v * u).sum() for v, u, a in zip(values, upstream, asked, strict=True) if a]
        return torch.autograd.grad(sum(terms), [hidden, weight], retain_graph=True)

    for one, two in zip(gradient(found), gradient(expected), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-11, atol=1e-11)


def test_without_a_reference_the_kl_is_zero():
    hidden = torch.randn(3, 4, requires_grad=True)
    found = selected_logprobs(hidden, torch.randn(6, 4), torch.tensor([0, 1, 2]))
    assert found.kl.tolist() == [0.0, 0.0, 0.0]


def test_a_frozen_head_gets_no_gradient_and_changes_none():
    hidden = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(6, 4, dtype=torch.float64)
    targets = torch.tensor([0, 1, 2, 3, 4])
    (one,) = torch.autograd.grad(selected_logprobs(hidden, weight, targets).logp.sum(), hidden)
    (two,) = torch.autograd.grad(dense(hidden, weight, targets, 1.0)[0].sum(), hidden)
    torch.testing.assert_close(one, two, rtol=1e-11, atol=1e-11)


def test_bfloat16_sums_in_float32():
    torch.manual_seed(1)
    hidden = torch.randn(4, 8).bfloat16()
    weight = torch.randn(9, 8).bfloat16()
    logp = selected_logprobs(hidden, weight, torch.tensor([1, 2, 3, 4])).logp
    assert logp.dtype == torch.float32
    expected, _ = dense(hidden.float(), weight.float(), torch.tensor([1, 2, 3, 4]), 1.0)
    torch.testing.assert_close(logp, expected, rtol=2e-2, atol=6e-2)


@pytest.mark.slow
def test_peak_memory_of_a_large_vocabulary_is_below_an_eighth_of_the_dense_path(root):
    """V = 151,936, T = 4,096, hidden 896, each path in a process of its own."""
    sys.path.insert(0, str(root / "tests" / "benchmarks"))
    try:
        from bench_logprobs import measure, parse
    finally:
        sys.path.pop(0)
    available = psutil.virtual_memory().available
    if available < 10 << 30:
        pytest.skip(f"the dense path takes 8 GiB; {available >> 30} GiB are free")
    found = measure(parse([]))
    assert found["memory_ratio"] < 1 / 8
    assert found["largest_difference_logp"] < 1e-5
    for name in ("by_hidden", "by_weight"):
        assert found[f"largest_difference_{name}"] < 1e-5 * found[f"largest_{name}"]
