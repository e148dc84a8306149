"""CUDA graphs of a decode step, one for each shape that it takes.

A step of a small model is a few hundred small kernels, and launching them takes longer than
running them. A graph launches all of them at once, on tensors that stay where they are. So that
few graphs are needed, shapes are rounded up: rows and prompts to eighths of what there is room
for, positions to multiples of 64.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable

import torch
from torch import Tensor

POSITIONS = 64
PARTS = 8


def coarse(count: int, capacity: int) -> int:
    """Return the next eighth of the capacity."""
    part = -(-capacity // PARTS)
    return min(capacity, -(-count // part) * part)


class StepGraphs:
    """Runs a function of nothing, by a captured graph from the second call of a key on.

    The first call of a key runs it plainly, which is also the warm-up that a capture needs. What
    the function reads and writes must be the same memory for the same key.
    """

    def __init__(self, device: torch.device) -> None:
        """Start without graphs."""
        self._device = device
        self._held: dict[Hashable, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._seen: set[Hashable] = set()
        self._pool = torch.cuda.graph_pool_handle()

    def run(self, key: Hashable, function: Callable[[], Tensor]) -> Tensor:
        """Return the function's result; a later call overwrites it."""
        if key in self._held:
            graph, result = self._held[key]
        elif key in self._seen:
            # What is captured is a stream's, and a stream is a GPU's: not always the current one.
            with torch.cuda.device(self._device):
                graph = torch.cuda.CUDAGraph()
                # "thread_local": a trainer may be at work in another thread (`pipeline.ahead`).
                with torch.cuda.graph(
                    graph,
                    pool=self._pool,
                    stream=_capture_stream(torch.cuda.current_device()),
                    capture_error_mode="thread_local",
                ):
                    result = function()
            self._held[key] = graph, result
        else:
            self._seen.add(key)
            return function()
        graph.replay()
        return result


@functools.cache
def _capture_stream(index: int) -> torch.cuda.Stream:
    """Return the stream of a GPU on which graphs are captured: each has a workspace of cuBLAS's."""
    return torch.cuda.Stream(index)
