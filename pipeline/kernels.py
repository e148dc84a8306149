"""Differentiable operations of a decoder for tensors on a CPU, their gradients written out.

Each stands for a few lines of plain torch and equals them, in float64 to the last digits. They
are here for speed: PyTorch multiplies float32 matrices by MKL, which on AMD's processors reaches
less than half of oneDNN's rate, and has no kernels of its own on a CPU for RMSNorm, gated units
and rotations, whose compositions walk through memory two to three times as often.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear as plain_linear
from torch.nn.functional import silu

# oneDNN brings weights into a layout of its own at each product: not worth it for a vocabulary
# of a hundred thousand and a few tokens.
ONEDNN_BYTES = 64 << 20


def round_up(rows: int) -> int:
    """Return a number of rows, not less and hardly more, that others share.

    oneDNN compiles a product for each shape that it meets, at half a millisecond and half a
    megabyte; the tokens of a pass are a new number at every step.
    """
    step = max(16 if rows < 64 else 64, 1 << max(0, rows.bit_length() - 5))
    return -(-rows // step) * step


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x Wᵀ + b without a gradient, by the faster of torch's libraries.

    Args:
        x: [T, I], of any strides.
        weight: [O, I], of any strides.
        bias: [O].
    """
    if by_onednn(x, weight):
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return plain_linear(x, weight, bias)


def by_onednn(x: Tensor, weight: Tensor) -> bool:
    """Return whether `product` of these goes through oneDNN."""
    return (
        x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.bfloat16)
        and weight.dtype == x.dtype
        and weight.nbytes <= ONEDNN_BYTES
        and len(x) > 1
        and torch.backends.mkldnn.is_available()
    )


class _Linear(Function):
    """Y = x Wᵀ + b + r;  ∂x = g W,  ∂W = gᵀ x,  ∂b = Σ_t g_t,  ∂r = g."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        bfloat16: bool,
    ) -> Tensor:
        if bfloat16:
            kept, matrix = x.bfloat16(), weight.bfloat16()
            y = product(kept, matrix).to(x.dtype)
            if bias is not None:
                y += bias
            if residual is not None:
                y += residual
        elif residual is not None and by_onednn(x, weight):
            kept, matrix = x, weight
            y = torch.ops.mkldnn._linear_pointwise.binary(x, residual, weight, bias, "add")
        else:
            kept, matrix = x, weight
            y = product(x, weight, bias)
            if residual is not None:
                y += residual
        ctx.save_for_backward(kept, matrix)
        ctx.dtype = weight.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        by_x, by_weight, by_bias, by_residual, _ = ctx.needs_input_grad
        g = gradient.to(x.dtype)
        return (
            product(g, weight.t()).to(gradient.dtype) if by_x else None,
            product(g.t(), x.t()).to(ctx.dtype) if by_weight else None,
            gradient.sum(0) if by_bias else None,
            gradient if by_residual else None,
            None,
        )


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    bfloat16: bool = False,
) -> Tensor:
    """Return x Wᵀ + b + r.

    Args:
        x: [T, I].
        weight: [O, I].
        bias: [O].
        residual: r, [T, O].
        bfloat16: Whether factors are rounded to bfloat16; sums stay in x's precision.
    """
    return _Linear.apply(x, weight, bias, residual, bfloat16)  # type: ignore[no-any-return]


class _RmsNorm(Function):
    """With s = (mean x² + ε)^-½, y = s w x;  ∂x = s (g w − x s² mean(g w x))."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        size = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale = size.square_().mul_(1.0 / x.shape[-1]).add_(epsilon).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight, scale = ctx.saved_tensors
        both = gradient * x
        by_weight = torch.mv(both.t(), scale[:, 0]) if ctx.needs_input_grad[1] else None
        by_x = None
        if ctx.needs_input_grad[0]:
            pull = torch.mv(both, weight)[:, None].mul_(scale.square()).div_(x.shape[-1])
            by_x = torch.mul(gradient, weight, out=both).addcmul_(x, pull, value=-1.0).mul_(scale)
        return by_x, by_weight, None


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Return x / sqrt(mean x² + ε) · w over the last axis, in x's precision."""
    flat = x.reshape(-1, x.shape[-1])
    return _RmsNorm.apply(flat, weight, epsilon).view(x.shape)  # type: ignore[union-attr]


class _GatedUnit(Function):
    """Y = silu(a) b;  ∂b = g silu(a),  ∂a = g b silu'(a).

    silu(a) is made again on the way back: it is as wide as the widest tensors of a layer, and
    kept from the forward pass it would be an eighth of what training holds.
    """

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        gate, up = ctx.saved_tensors
        by_gate = torch.ops.aten.silu_backward(gradient * up, gate)
        return by_gate, silu(gate).mul_(gradient)


def gated_unit(gate: Tensor, up: Tensor) -> Tensor:
    """Return silu(gate) · up."""
    return _GatedUnit.apply(gate, up)  # type: ignore[no-any-return]


class _Rotate(Function):
    """A rotation of pairs; the gradient is rotated back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
        ctx.save_for_backward(cosines, sines)
        return (x * cosines).addcmul_(_swapped(x), sines)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        cosines, sines = ctx.saved_tensors
        turned = (gradient * cosines).addcmul_(_swapped(gradient), sines, value=-1.0)
        return turned, None, None


def _swapped(x: Tensor) -> Tensor:
    """Return the halves of the last axis, swapped."""
    return x.unflatten(-1, (2, -1)).flip(-2).flatten(-2)


def rotate(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Rotate dimensions i and i + D/2 of every head by its position's angle.

    Args:
        x: [T, heads, D].
        cosines: Broadcastable to x; both halves are the same.
        sines: The same, the first half negated.
    """
    return _Rotate.apply(x, cosines, sines)  # type: ignore[no-any-return]


def is_plain_linear(module: nn.Module) -> bool:
    """Return whether a layer is a linear one and nothing more."""
    return type(module) is nn.Linear
