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
@pytest.mark.parametrize("block_rows", [1, 4, 1 << 12])
@pytest.mark.parametrize("asked", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 1)])
def test_value_and_gradient_equal_the_dense_form(
    monkeypatch, temperature, chunk_bytes, keep_bytes, block_rows, asked
):
    monkeypatch.setattr(logprobs, "CHUNK_BYTES", chunk_bytes)
    monkeypatch.setattr(logprobs, "KEEP_BYTES", keep_bytes)
    monkeypatch.setattr(logprobs, "BLOCK_ROWS", block_rows)
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk_bytes", [4 * 128 * 70, 1 << 26])
def test_blocks_lose_no_precision(monkeypatch, dtype, chunk_bytes):
    """Against float64, in float32 and with factors in bfloat16, as under autocast."""
    torch.manual_seed(2)
    leaves = [torch.randn(100, 24).to(dtype), (0.5 * torch.randn(1000, 24)).to(dtype)]
    other = torch.randn(100, 16).to(dtype), (0.5 * torch.randn(1000, 16)).to(dtype)
    targets, upstream = torch.randint(0, 1000, (100,)), torch.randn(3, 100, dtype=torch.float64)

    def values_and_gradients(kind: torch.dtype) -> list[torch.Tensor]:
        h, w = (x.to(kind).requires_grad_() for x in leaves)
        found = selected_logprobs(h, w, targets, 0.9, tuple(x.to(kind) for x in other))
        sum((v * u).sum() for v, u in zip(found, upstream, strict=True)).backward()
        return [x.detach().double() for x in (*found, h.grad, w.grad)]

    exact = values_and_gradients(torch.float64)
    errors = []
    for rows in (128, 1000):
        monkeypatch.setattr(logprobs, "CHUNK_BYTES", chunk_bytes)
        monkeypatch.setattr(logprobs, "BLOCK_ROWS", rows)
        found = values_and_gradients(dtype)
        errors.append([float((a - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True)])
    limit = 1e-6 if dtype == torch.float32 else 1e-2
    for of_blocks, of_whole in zip(*errors, strict=True):
        assert of_blocks < max(limit, 1.2 * of_whole)


@pytest.mark.parametrize("target", [-1, 6])
def test_a_target_beyond_the_vocabulary_is_an_error(target):
    with pytest.raises(RuntimeError, match="targets are below 6"):
        selected_logprobs(torch.randn(2, 4), torch.randn(6, 4), torch.tensor([0, target]))


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
