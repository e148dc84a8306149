"""Tensors that are split over processes (`pipeline.ranks`), and those that are not, alike."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def is_split(tensor: Any) -> bool:
    """Return whether a tensor is spread over ranks."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Any) -> Tensor:
    """Return all of a tensor; for a split one every rank has to ask at the same place."""
    return tensor.full_tensor() if is_split(tensor) else tensor


def own_part(tensor: Any) -> Tensor:
    """Return what this rank holds of a tensor, to be read and written in place."""
    return tensor.to_local() if is_split(tensor) else tensor


def part_for(parameter: Any, value: Tensor) -> Tensor:
    """Return a whole value as the parameter is spread, each rank keeping its part.

    Args:
        parameter: What it is for.
        value: The same on every rank.
    """
    if not is_split(parameter):
        return value.to(parameter.device)
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(
        value.to(parameter.device),
        parameter.device_mesh,
        parameter.placements,
        src_data_rank=None,  # every rank has the value: nothing is sent
    )
