"""Keys and values of running samples: those of a prompt once a group, the rest once a sample.

A *block* is the prompt of one group, a *row* one sample; a row has a block and in it a lane. Rows
are kept dense: the running ones are always the first, so that every step works on views, and
fill the first lanes of their block. Prompts have room for the longest from the beginning;
completions grow, each time about twofold, to what the longest can need.

    prompt      [layers, 2, blocks, kv heads, prompt positions, head dim]
    completion  [layers, 2, rows, kv heads, completion positions, head dim]

Attention of a decode step is over the block's prompt and the row's own completion. The queries
of a block's lanes meet the prompt in one matrix product; its result joins the softmax over
the completion as one more key, whose score is the log-sum-exp of the prompt's scores:

    o = w_0 · o_prompt + Σ_s w_s v_s,    w = softmax(lse_prompt, q·k_1/√D, …)

which is exact. Position 0 of a completion stays empty for that key: the keys there are 0, so that
the score is what stands in its place in the mask. Positions are rounded up to multiples of
`ROUND`, which keeps a row's arithmetic the same whatever is beside it (see
`pipeline.engines.embedded`).
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from pipeline.engines import _graphs as graphs

ROUND = 16


def rounded(positions: int) -> int:
    """Return the next multiple of `ROUND`."""
    return _multiple(positions, ROUND)


def _multiple(count: int, of: int) -> int:
    return -(-count // of) * of


class Store:
    """Memory that outlives a `generate` call: to clear it anew each time costs many steps.

    What it hands out holds old numbers, all of them finite; a position's mask is what counts.
    """

    def __init__(self) -> None:
        """Start with nothing."""
        self._held: dict[str, Tensor] = {}

    def size(self, name: str) -> int:
        """Return how many numbers are held under a name."""
        return len(self._held.get(name, ()))

    def prepare(self, **need: int) -> None:
        """Forget what would make a batch hold more than it needs and than the last one held.

        Args:
            **need: The most numbers that will be asked for, by name.
        """
        for name, count in need.items():
            # What grows a little would for a moment be held twice.
            if count < 2 * self.size(name) < 2 * count:
                del self._held[name]
        both = sum(max(count, self.size(name)) for name, count in need.items())
        if both > max(sum(need.values()), sum(map(self.size, need))):
            self.clear()

    def take(self, name: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """Return memory of this shape, and of the dtype and on the device of `like`.

        What was handed out under the name before is forgotten if it was smaller, and otherwise
        handed out again.
        """
        size = math.prod(shape)
        if self.size(name) < size:
            self._held.pop(name, None)  # before there is more
            self._held[name] = like.new_zeros(size)
        return self._held[name][:size].view(shape)

    def clear(self) -> None:
        """Give the memory back."""
        self._held.clear()


class Cache:
    """The cache of one `generate` call.

    Args:
        store: Where the memory comes from.
        layers: Decoder layers.
        kv_heads: Key-value heads.
        head_dim: Size of one head.
        lanes: Samples a group (n).
        fewest_lanes: Lanes that a step has at least, where there are as many.
        rows: Samples that run side by side.
        blocks: Prompts that run side by side.
        prompt: Tokens of the longest prompt.
        completion: Most tokens of a completion.
        dtype: Of keys and values.
        device: Where they live.
    """

    def __init__(
        self,
        store: Store,
        layers: int,
        kv_heads: int,
        head_dim: int,
        lanes: int,
        fewest_lanes: int,
        rows: int,
        blocks: int,
        prompt: int,
        completion: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Allocate for the prompts, and for short completions."""
        self.lanes, self.fewest_lanes, self.kv_heads = lanes, fewest_lanes, kv_heads
        self._moved = False
        self.shape = (layers, 2, kv_heads, head_dim)
        self.store, self.dtype, self.device = store, dtype, device
        self.rows_capacity, self.blocks_capacity = rows, blocks
        widest, self.widest = rounded(prompt), rounded(completion)
        numbers = layers * 2 * kv_heads * head_dim
        store.prepare(prompt=numbers * blocks * widest, completion=numbers * rows * self.widest)
        self.prompt = self._new("prompt", blocks, widest)
        self.completion = self._new("completion", rows, self._growth(1))
        # What is added to scores: 0 at positions that are there, −inf elsewhere.
        self.prompt_mask = self._mask(blocks, self.prompt.shape[4])
        self.completion_mask = self._mask(rows, self.completion.shape[4])
        self.blocks = 0
        self.lengths: list[int] = []
        self.block_of: list[int] = []
        # What a step looks at: so many blocks with so many lanes, and so many positions of prompts
        # and completions. Never less than there is; CUDA graphs round them up.
        self.step_blocks = self.growths = 0
        self.step_lanes = lanes
        self.prompt_width = self.completion_width = ROUND
        # Which (block, head, lane) place a row's head has, and which row's head is at a place.
        self.place = torch.zeros(rows * kv_heads, dtype=torch.int64, device=device)
        self.occupant = torch.zeros(blocks * kv_heads * lanes, dtype=torch.int64, device=device)
        self._set_base()

    def _growth(self, positions: int) -> int:
        """Return the size to grow to for so many positions: the widest, halved while they fit.

        So the last growth too holds at most half as much again beside what it makes.
        """
        width = max(self.widest, rounded(positions))
        while rounded(width // 2) >= max(positions, 4 * ROUND):
            width = rounded(width // 2)
        return width

    def _new(self, name: str, count: int, positions: int) -> Tensor:
        """Return memory for at least so many positions: for all that the store has room."""
        layers, two, kv_heads, head_dim = self.shape
        fits = self.store.size(name) // (layers * two * count * kv_heads * head_dim)
        positions = max(positions, fits // ROUND * ROUND)
        like = torch.empty(0, dtype=self.dtype, device=self.device)
        shape = (layers, two, count, kv_heads, positions, head_dim)
        memory = self.store.take(name, shape, like)
        memory[..., 0, :] = 0.0
        return memory

    def _mask(self, count: int, positions: int) -> Tensor:
        return torch.full((count, positions), -torch.inf, dtype=self.dtype, device=self.device)

    def _wider(self, name: str, positions: int) -> tuple[Tensor, Tensor]:
        """Return "prompt" or "completion" with more positions, and its mask."""
        self.growths += 1
        old, old_mask = getattr(self, name), getattr(self, f"{name}_mask")
        new = self._new(name, old.shape[2], positions)
        mask = self._mask(*new.shape[2:5:2])
        new[..., : old.shape[4], :], mask[:, : old.shape[4]] = old, old_mask
        return new, mask

    def fit(self, tokens: int, coarse: bool) -> tuple[int, ...]:
        """Make room for completions of so many tokens, and set what a step looks at.

        Args:
            tokens: The longest completion after the next step.
            coarse: Whether sizes are rounded up so that few of them occur (for CUDA graphs).

        Returns:
            What a captured step must have in common with this one.
        """
        positions = graphs.POSITIONS if coarse else ROUND
        self._reserve(tokens)
        if self._moved:
            self._set_places(coarse)
        self.step_blocks = self.blocks
        self.prompt_width = _multiple(max(self.lengths), positions)
        self.completion_width = _multiple(tokens + 1, positions)
        if coarse:
            self.step_blocks = graphs.coarse(self.blocks, self.blocks_capacity)
            self.prompt_width = min(self.prompt_width, self.prompt.shape[4])
            self.completion_width = min(self.completion_width, self.completion.shape[4])
        return (
            self.step_blocks,
            self.step_lanes,
            self.prompt_width,
            self.completion_width,
            self.growths,
        )

    @property
    def rows(self) -> int:
        """Rows that are held."""
        return len(self.block_of)

    def add(self, kept: Tensor, lengths: list[int]) -> None:
        """Take prompts in, each with one row a lane, after those that are there.

        Args:
            kept: [layers, 2, B, kv heads, P, head dim], positions past a length are not read.
            lengths: Tokens of each prompt.
        """
        first, count, width = self.blocks, len(lengths), kept.shape[4]
        if width > self.prompt_mask.shape[1]:
            self.prompt, self.prompt_mask = self._wider("prompt", rounded(width))
        part = slice(first, first + count)
        self.prompt[:, :, part, :, :width] = kept
        columns = torch.arange(self.prompt_mask.shape[1], device=self.device)
        ends = torch.tensor(lengths, device=self.device)[:, None]
        self.prompt_mask[part] = torch.where(columns < ends, 0.0, -torch.inf).to(self.dtype)
        self.lengths += lengths
        self.completion_mask[self.rows : self.rows + count * self.lanes] = -torch.inf
        for block in range(first, first + count):
            self.block_of += [block] * self.lanes
        self.blocks += count
        self._moved = True

    def keep(self, order: list[int]) -> None:
        """Let the rows at `order`'s indices stay, in this order; free blocks without rows.

        To move little, an index stays where it is wherever it can.
        """
        moved = [(new, old) for new, old in enumerate(order) if new != old]
        if moved:
            new, old = (torch.tensor(part, device=self.device) for part in zip(*moved, strict=True))
            # Before the first step nothing is there to be moved.
            width = self.completion_width
            self.completion[:, :, new, :, :width] = self.completion[:, :, old, :, :width]
            self.completion_mask[new] = self.completion_mask[old]
        self.block_of = [self.block_of[row] for row in order]
        used = set(self.block_of)
        if len(used) < self.blocks:
            holes = [block for block in range(len(used)) if block not in used]
            last = [block for block in sorted(used) if block >= len(used)]
            if holes:
                new, old = (torch.tensor(part, device=self.device) for part in (holes, last))
                width = rounded(max(self.lengths))
                self.prompt[:, :, new, :, :width] = self.prompt[:, :, old, :, :width]
                self.prompt_mask[new] = self.prompt_mask[old]
                renamed = dict(zip(last, holes, strict=True))
                self.block_of = [renamed.get(block, block) for block in self.block_of]
                for hole, block in zip(holes, last, strict=True):
                    self.lengths[hole] = self.lengths[block]
            self.blocks = len(used)
            del self.lengths[self.blocks :]
        self._moved = True

    def _reserve(self, tokens: int) -> None:
        """Make room for completions of so many tokens."""
        held, positions = self.completion_mask.shape[1], tokens + 1
        if positions <= held:
            return
        width = self._growth(positions)
        self.completion, self.completion_mask = self._wider("completion", width)
        self._set_base()

    def destinations(self, columns: Tensor) -> Tensor:
        """Open one position a row; return where its keys and values go in `flat(layer)`.

        Args:
            columns: [B], which token of its completion each of the first B rows writes, from 0.

        Returns:
            [B · 2 · kv heads], a row's keys before its values.
        """
        batch = len(columns)
        # A row that has ended stays until gaps are closed, longer perhaps than any that runs, for
        # which there is room; what is written for it is never read by another.
        columns = (columns[:, None] + 1).clamp(max=self.completion_mask.shape[1] - 1)
        self.completion_mask[:batch].scatter_(1, columns, 0.0)
        return (self._base[:batch] + columns).view(-1)

    def flat(self, layer: int) -> Tensor:
        """Return a layer's completion cache as [2 · rows · kv heads · positions, head dim]."""
        return self.completion[layer].view(-1, self.shape[3])

    def _set_base(self) -> None:
        """Set where position 0 of every (row, key or value, head) is in `flat`."""
        positions = self.completion_mask.shape[1]
        rows, heads = self.rows_capacity, self.kv_heads
        row = torch.arange(rows, device=self.device)[:, None]
        head = torch.arange(heads, device=self.device)[None]
        keys = (row * heads + head) * positions
        self._base = torch.cat([keys, keys + rows * heads * positions], dim=1)

    def _set_places(self, coarse: bool) -> None:
        """Give every row a lane, and write the maps between rows and (block, head, lane)."""
        self._moved = False
        block, heads = np.array(self.block_of), self.kv_heads
        order = np.argsort(block, kind="stable")
        counts = np.bincount(block)
        lane = np.empty_like(block)
        lane[order] = np.arange(len(block)) - (np.cumsum(counts) - counts)[block[order]]
        self.step_lanes = self.lanes
        if not coarse:
            self.step_lanes = min(self.lanes, max(self.fewest_lanes, int(counts.max())))
        place = (
            (block[:, None] * heads + np.arange(heads)) * self.step_lanes + lane[:, None]
        ).ravel()
        # A place without a row computes with row 0, and nobody reads the result.
        occupant = np.zeros(len(self.occupant), dtype=np.int64)
        occupant[place] = np.arange(len(place))
        self.place[: len(place)] = torch.from_numpy(place).to(self.device)
        self.place[len(place) :] = 0
        self.occupant.copy_(torch.from_numpy(occupant))
