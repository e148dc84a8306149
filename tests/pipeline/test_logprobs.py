from __future__ import annotations

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
def test_value_and_gradient_equal_the_dense_form(monkeypatch, temperature, chunk_bytes, keep_bytes):
    monkeypatch.setattr(logprobs, "CHUNK_BYTES", chunk_bytes)
    monkeypatch.setattr(logprobs, "KEEP_BYTES", keep_bytes)
    torch.manual_seed(0)
    hidden = torch.randn(10, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(11, 5, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 11, (10,))
    upstream = torch.randn(10, dtype=torch.float64)

    logp, entropy = selected_logprobs(hidden, weight, targets, temperature)
    expected, expected_entropy = dense(hidden, weight, targets, temperature)
    torch.testing.assert_close(logp, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(entropy, expected_entropy, rtol=1e-12, atol=1e-12)

    ours = torch.autograd.grad((logp * upstream).sum(), [hidden, weight])
    theirs = torch.autograd.grad((expected * upstream).sum(), [hidden, weight])
    for one, two in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-11, atol=1e-11)


def test_entropy_carries_no_gradient():
    hidden = torch.randn(3, 4, requires_grad=True)
    _, entropy = selected_logprobs(hidden, torch.randn(6, 4), torch.tensor([0, 1, 2]))
    assert not entropy.requires_grad


def test_bfloat16_sums_in_float32():
    torch.manual_seed(1)
    hidden = torch.randn(4, 8).bfloat16()
    weight = torch.randn(9, 8).bfloat16()
    logp, _ = selected_logprobs(hidden, weight, torch.tensor([1, 2, 3, 4]))
    assert logp.dtype == torch.float32
    expected, _ = dense(hidden.float(), weight.float(), torch.tensor([1, 2, 3, 4]), 1.0)
    torch.testing.assert_close(logp, expected, rtol=2e-2, atol=6e-2)
