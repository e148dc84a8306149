"""Each operation beside the plain lines that it stands for, value and gradient."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import linear as plain_linear
from torch.nn.functional import silu

from pipeline.kernels import gated_unit, linear, product, rms_norm, rotate, round_up


def made(*shape: int, dtype=torch.float64, seed=0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype)


def plain_norm(x, weight):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * weight


def plain_rotation(x, cosines, sines):
    one, two = x.chunk(2, -1)
    half = x.shape[-1] // 2
    cosine, sine = cosines[..., :half], sines[..., half:]
    return torch.cat([one * cosine - two * sine, two * cosine + one * sine], -1)


def angles():
    angle = made(7, 1, 3)
    cosine, sine = angle.cos(), angle.sin()
    return torch.cat([cosine, cosine], -1), torch.cat([-sine, sine], -1)


# Ours, plainly, and the tensors that both take.
PAIRS = {
    "linear": (linear, plain_linear, (made(7, 6), made(5, 6))),
    "linear with bias": (linear, plain_linear, (made(7, 6), made(5, 6), made(5))),
    "linear with residual": (
        linear,
        lambda x, w, b, r: plain_linear(x, w, b) + r,
        (made(7, 6), made(5, 6), made(5), made(7, 5)),
    ),
    "rms_norm": (lambda x, w: rms_norm(x, w, 1e-6), plain_norm, (made(7, 6), made(6))),
    "rms_norm of heads": (
        lambda x, w: rms_norm(x, w, 1e-6),
        plain_norm,
        (made(7, 2, 6), made(6)),
    ),
    "gated_unit": (gated_unit, lambda a, b: silu(a) * b, (made(7, 6), made(7, 6, seed=9))),
    "rotate": (
        lambda x: rotate(x, *angles()),
        lambda x: plain_rotation(x, *angles()),
        (made(7, 2, 6),),
    ),
}


def both(name: str, dtype: torch.dtype):
    """Return value and gradients of ours in `dtype`, and of the plain lines in float64."""
    ours, plain, tensors = PAIRS[name]
    found = []
    for action, precision in ((ours, dtype), (plain, torch.float64)):
        leaves = [t.to(precision, copy=True).requires_grad_() for t in tensors]
        value = action(*leaves)
        value.backward(made(*value.shape, seed=5).to(precision))
        found.append([value.detach().double(), *(leaf.grad.double() for leaf in leaves)])
    return found


@pytest.mark.parametrize("name", [n for n in PAIRS if n != "rotate"])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-13), (torch.float32, 3e-6)])
def test_value_and_gradient(name, dtype, limit):
    for one, two in zip(*both(name, dtype), strict=True):
        torch.testing.assert_close(one, two, rtol=limit, atol=limit)


def test_a_rotation_and_the_way_back():
    for one, two in zip(*both("rotate", torch.float64), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-13, atol=1e-13)
    cosines, sines = angles()
    x = made(7, 2, 6)
    torch.testing.assert_close(rotate(rotate(x, cosines, sines), cosines, -sines), x)


def test_frozen_weights_get_no_gradient():
    x, weight = made(7, 6).requires_grad_(), made(5, 6)
    linear(x, weight).sum().backward()
    assert weight.grad is None
    torch.testing.assert_close(x.grad, weight.sum(0).expand(7, 6))


def test_rounded_factors_are_bfloat16_and_sums_are_not():
    x, weight = made(64, 48, dtype=torch.float32), made(32, 48, dtype=torch.float32)
    leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
    value = linear(*leaves, bfloat16=True)
    assert value.dtype == torch.float32
    exact = x.bfloat16().double() @ weight.bfloat16().double().T
    # The product itself comes out in bfloat16: one rounding of 2⁻⁸.
    torch.testing.assert_close(value.detach().double(), exact, rtol=2**-8, atol=1e-3)
    value.sum().backward()
    assert [leaf.grad.dtype for leaf in leaves] == [torch.float32] * 2
    expected = weight.bfloat16().float().sum(0).expand(64, 48)
    torch.testing.assert_close(leaves[0].grad, expected, rtol=2**-6, atol=2**-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_products_of_any_strides(dtype):
    limit = 1e-5 if dtype == torch.float32 else 1e-12
    x, weight = made(6, 9).to(dtype), made(9, 4).to(dtype)
    for rows in (1, 6):
        found = product(x[:rows], weight.t())
        torch.testing.assert_close(
            found.double(), x[:rows].double() @ weight.double(), rtol=limit, atol=limit
        )


def test_few_numbers_of_rows_are_met_and_little_is_added():
    found = [round_up(n) for n in range(1, 20_000)]
    assert all(n <= r <= n + max(63, n / 16) for n, r in enumerate(found, 1))
    assert all(r == round_up(r) for r in found)
    assert len({round_up(n) for n in range(1024, 2048)}) == 17
