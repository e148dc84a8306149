"""Decoding on a CPU by compiled code: the Python half of `_decode.cpp`.

What a sample remembers lies in pages of 16 positions, all layers of a position in one page: first
the pages of its prompt, which a group shares, then its own. A row of a table holds their addresses,
so nothing is copied when a completion grows or when samples change places. Several tokens are drawn
at a time, and every torch thread has samples of its own, so they wait for each other seldom.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from pipeline.engines._rows import ALIVE, BUDGET, COUNT, Rows, Size

if TYPE_CHECKING:
    from pipeline.engines._decoder import Decoder

PAGE = 16
SLAB_BYTES = 8 << 20
# Most tokens of a sample between two looks at who has ended.
STEPS = 8
# Rows that take as long as one: with fewer, a thread waits for its own products.
FEWEST = 4

_Pointer, _Integer = ctypes.c_void_p, ctypes.c_int64


class _Layer(ctypes.Structure):
    _fields_ = [
        *((name, _Pointer) for name in ("norm", "qkv", "qkv_bias", "q_norm", "k_norm")),
        *((name, _Pointer) for name in ("out", "norm2", "gate_up", "down")),
    ]


class _Model(ctypes.Structure):
    _fields_ = [
        *((name, _Integer) for name in ("layers", "width", "heads", "kv_heads", "head_dim")),
        *((name, _Integer) for name in ("inner", "vocabulary")),
        *((name, _Pointer) for name in ("embedding", "norm", "head", "cosines", "sines", "layer")),
        ("epsilon", ctypes.c_float),
    ]


class _Rows(ctypes.Structure):
    _fields_ = [
        ("state", _Pointer),
        ("capacity", _Integer),
        ("pages", _Pointer),
        ("pages_stride", _Integer),
        ("tokens", _Pointer),
        ("logprobs", _Pointer),
        ("columns", _Integer),
        ("is_end", _Pointer),
        ("temperature", ctypes.c_double),
    ]


class Compiled:
    """A decoder as the compiled code takes it.

    Args:
        library: The compiled code.
        decoder: Holds the weights, which `pack` takes over.
    """

    def __init__(self, library: ctypes.CDLL, decoder: Decoder) -> None:
        """Describe the model."""
        self.library, self.decoder = library, decoder
        self._held: dict[str, Tensor] = {}
        self._layers = (_Layer * len(decoder.layers))()
        config = decoder.config
        self.model = _Model(
            layers=len(decoder.layers),
            width=config.hidden_size,
            heads=decoder.heads,
            kv_heads=decoder.kv_heads,
            head_dim=decoder.head_dim,
            inner=config.intermediate_size,
            vocabulary=config.vocab_size,
            embedding=decoder.embedding.data_ptr(),
            norm=decoder.norm.data_ptr(),
            cosines=self._hold("cosines", decoder.rotations.real),
            sines=self._hold("sines", decoder.rotations.imag),
            layer=ctypes.addressof(self._layers),
            epsilon=decoder.epsilon,
        )
        library.panel.restype = library.page_size.restype = _Integer
        self.panel = int(library.panel())
        self.pages = Pages(int(library.page_size(ctypes.byref(self.model))))

    def call(self, name: str, *arguments: Any) -> None:
        """Call a function of the library with this model; other threads may run meanwhile.

        Raises:
            MemoryError: There was none for what lies between the layers.
        """
        function = getattr(self.library, name)
        function.restype = _Integer
        given = (_Integer(each) if isinstance(each, int) else each for each in arguments)
        if not function(ctypes.byref(self.model), *given):
            raise MemoryError("a pass of the embedded engine's compiled code")

    def _hold(self, name: str, values: Tensor) -> int:
        """Keep a copy, its last dimension dense; return its address."""
        held = self._held.get(name)
        if held is None:
            held = self._held[name] = torch.empty(values.shape)
        return held.copy_(values).data_ptr()

    def pack(self) -> None:
        """Take over the decoder's weights as they are now."""
        decoder, inner, half = self.decoder, self.model.inner, self.panel // 2
        turning = (decoder.heads + decoder.kv_heads) * decoder.head_dim

        def panels(weight: Tensor) -> Tensor:
            """Turn [out, in] into [out / panel, in, panel]."""
            weight = pad(weight, (0, 0, 0, -len(weight) % self.panel))
            return weight.unflatten(0, (-1, self.panel)).transpose(1, 2)

        def apart(rows: Tensor) -> Tensor:
            """Put a head's dimensions that turn together half a head apart; not the values'."""
            turned = rows[:turning].unflatten(0, (-1, decoder.head_dim // 2, 2))
            return torch.cat([turned.transpose(1, 2).flatten(0, 2), rows[turning:]])

        def interleaved(gate_up: Tensor) -> Tensor:
            """Put gate and up beside each other, half a panel of each in turn."""
            gate, up = (
                pad(part, (0, 0, 0, -inner % half)).unflatten(0, (-1, half))
                for part in gate_up.split(inner)
            )
            return torch.cat([gate, up], dim=1).flatten(0, 1)

        self.model.head = self._hold("head", panels(decoder.head.plain))
        for index, layer in enumerate(decoder.layers):
            bias = layer.qkv_bias
            if bias is None:
                bias = torch.zeros(len(layer.qkv.plain))
            weights = {
                "norm": layer.norm,
                "qkv": panels(apart(layer.qkv.plain)),
                "qkv_bias": pad(apart(bias), (0, -len(bias) % self.panel)),
                "out": panels(layer.out.plain),
                "norm2": layer.norm2,
                "gate_up": panels(interleaved(layer.gate_up.plain)),
                "down": panels(layer.down.plain),
            }
            if layer.q_norm is not None and layer.k_norm is not None:
                weights |= {"q_norm": apart(layer.q_norm), "k_norm": apart(layer.k_norm)}
            for name, values in weights.items():
                setattr(self._layers[index], name, self._hold(f"{index}.{name}", values))

    def cache_bytes(self, size: Size) -> int:
        """Return the most bytes that the pages of a batch take."""
        return 4 * self.pages.size * self._most_pages(size)

    def _most_pages(self, size: Size) -> int:
        # A completion's last token is drawn and never run: it has no keys and values.
        own = -(-(size.completion - 1) // PAGE)
        return size.blocks * -(-size.prompt // PAGE) + size.rows * own

    def open(self, lanes: int, size: Size) -> CompiledSession:
        """Return an empty batch for n = `lanes` samples a prompt; the one before it is over."""
        self.pages.reset(self._most_pages(size))
        return CompiledSession(self, lanes, size.rows, size.blocks)


class Pages:
    """Memory that is handed out in pages, by address; it outlives a `generate` call.

    Args:
        size: Numbers in a page.
    """

    def __init__(self, size: int) -> None:
        """Start with nothing."""
        self.size, self.free, self._slabs = size, list[int](), list[Tensor]()
        self.most = 0

    @property
    def held(self) -> int:
        """Pages that there are, free or not."""
        return sum(map(len, self._slabs))

    def reset(self, most: int) -> None:
        """Take all pages back; from now on at most so many will be asked for."""
        self.most = most
        self.free = [address for slab in self._slabs for address in self._addresses(slab)]

    def take(self, count: int) -> list[int]:
        """Return so many pages; what stands in them is old."""
        missing = count - len(self.free)
        if missing > 0:
            slab = min(SLAB_BYTES // (4 * self.size), self.most - self.held)
            slab = torch.empty((max(missing, slab), self.size))
            self._slabs.append(slab)
            self.free += self._addresses(slab)
        kept = len(self.free) - count
        taken, self.free = self.free[kept:], self.free[:kept]
        return taken

    def _addresses(self, slab: Tensor) -> range:
        first, size = slab.data_ptr(), 4 * self.size
        return range(first, first + len(slab) * size, size)


class CompiledSession:
    """A running batch.

    Attributes:
        joins: Whether prompts may enter while others run.
    """

    joins = True

    def __init__(self, compiled: Compiled, lanes: int, rows: int, blocks: int) -> None:
        """Start empty."""
        self.compiled, self.lanes, self.blocks = compiled, lanes, blocks
        # By row: the addresses of its pages, how many are its prompt's, and how many there are.
        self.table = np.zeros((rows, 8), np.int64)
        self.of_prompt, self.held = np.zeros((2, rows), np.int64)
        self.rows = 0

    @property
    def free_blocks(self) -> int:
        """Prompts that have room."""
        return self.blocks - len(np.unique(self.table[: self.rows, 0]))

    def admit(self, prompts: list[tuple[int, ...]]) -> Tensor:
        """Run prompts and add n rows for each; return the logits after each prompt, [B, V]."""
        first, lanes = self.rows, self.lanes
        counts = [-(-len(prompt) // PAGE) for prompt in prompts]
        self._widen(max(counts))
        for number, count in enumerate(counts):
            rows = slice(first + number * lanes, first + (number + 1) * lanes)
            self.table[rows, :count] = self.compiled.pages.take(count)
            self.of_prompt[rows] = self.held[rows] = count
        self.rows += lanes * len(prompts)
        ids = np.array([token for prompt in prompts for token in prompt])
        starts = np.cumsum([0, *map(len, prompts)])
        logits = self._logits(len(prompts))

        def run(begin: int, end: int) -> None:
            self.compiled.call(
                "prefill",
                _address(ids),
                _address(starts[begin:]),
                end - begin,
                _address(self.table[first + begin * lanes :]),
                lanes * self.table.shape[1],
                _Pointer(logits[begin:].data_ptr()),
            )

        _in_threads(run, starts)
        return logits[:, : self.compiled.model.vocabulary]

    def _logits(self, rows: int) -> Tensor:
        """Return memory of whole panels for logits, [rows, V or more]."""
        panel = self.compiled.panel
        return torch.zeros((rows, -(-self.compiled.model.vocabulary // panel) * panel))

    def _widen(self, pages: int) -> None:
        """Make room in the table for so many pages a row."""
        width = self.table.shape[1]
        if pages > width:
            self.table = np.pad(self.table, ((0, 0), (0, max(pages, 2 * width) - width)))

    def _reserve(self, index: np.ndarray, tokens: np.ndarray) -> None:
        """Let the rows at `index` have pages for so many tokens of completion."""
        needed = self.of_prompt[index] + -(-tokens // PAGE)
        short = needed > self.held[index]
        if not short.any():
            return
        self._widen(int(needed.max()))
        for row, count in zip(index[short].tolist(), needed[short].tolist(), strict=True):
            held = int(self.held[row])
            self.table[row, held:count] = self.compiled.pages.take(count - held)
        self.held[index[short]] = needed[short]

    def fit(self, tokens: int, coarse: bool) -> tuple[int, ...]:
        """Do nothing: rows get pages as they need them."""
        del tokens, coarse
        return ()

    def keep(self, order: list[int]) -> None:
        """Keep the rows at these indices, in this order; take back the pages of the others."""
        table, free = self.table, self.compiled.pages.free
        gone = np.setdiff1d(np.arange(self.rows), order).tolist()
        prompts = {int(table[row, 0]): row for row in gone}
        for first in prompts.keys() - set(table[order, 0].tolist()):
            free += table[prompts[first], : self.of_prompt[prompts[first]]].tolist()
        for row in gone:
            free += table[row, self.of_prompt[row] : self.held[row]].tolist()
        self.rows = len(order)
        for part in (self.table, self.of_prompt, self.held):
            part[: self.rows] = part[order]

    def step(self, state: Tensor) -> Tensor:
        """Run the last token of the first rows; return the logits after it [B, V].

        Args:
            state: [7, B] of `_rows.Rows`. Rows that have ended get logits of 0.
        """
        index = state[ALIVE].nonzero()[:, 0].numpy()
        index = self._beside(index)
        self._reserve(index, state[COUNT].numpy()[index])
        found, logits = self._logits(len(index)), self._logits(state.shape[1])

        def run(begin: int, end: int) -> None:
            rows = self._rows(state)
            at, to = _address(index[begin:]), _Pointer(found[begin:].data_ptr())
            self.compiled.call("step", ctypes.byref(rows), at, end - begin, to)

        _in_threads(run, np.arange(len(index) + 1))
        logits[torch.from_numpy(index)] = found
        return logits[:, : self.compiled.model.vocabulary]

    def draw(self, rows: Rows, steps: int) -> None:
        """Draw up to so many tokens for every row that runs, and note them in its state."""
        index = self._beside(np.flatnonzero(rows.alive[: self.rows]))
        last = np.minimum(rows.count[index] + steps, rows.state[BUDGET].numpy()[index])
        self._reserve(index, last - 1)  # the last token's keys and values are not needed yet

        def run(begin: int, end: int) -> None:
            ours = self._rows(rows.state)
            ours.tokens, ours.logprobs = rows.tokens.data_ptr(), rows.logprobs.data_ptr()
            ours.columns, ours.is_end = rows.tokens.shape[1], rows.is_end.data_ptr()
            ours.temperature = rows.sampling.temperature
            at = _address(index[begin:])
            self.compiled.call("decode", ctypes.byref(ours), at, end - begin, steps)

        _in_threads(run, np.arange(len(index) + 1))

    def _beside(self, index: np.ndarray) -> np.ndarray:
        """Return rows so that those of one prompt are neighbours, which meet it together."""
        return index[np.argsort(self.table[index, 0], kind="stable")]

    def _rows(self, state: Tensor) -> _Rows:
        return _Rows(
            state=state.data_ptr(),
            capacity=state.stride(0),
            pages=self.table.ctypes.data,
            pages_stride=self.table.shape[1],
        )


def _address(array: np.ndarray) -> ctypes.c_void_p:
    return _Pointer(array.ctypes.data)


def _in_threads(run: Callable[[int, int], None], work: np.ndarray) -> None:
    """Run equal shares of some work side by side, in as many threads as torch has.

    Args:
        run: Does what lies from one index to before another.
        work: [count + 1], rising from 0: the rows that lie before each index.
    """
    threads = max(1, min(torch.get_num_threads(), int(work[-1]) // FEWEST))
    cuts = np.searchsorted(work, work[-1] * np.arange(threads + 1) / threads).tolist()
    mine, *others = [share for share in pairwise(cuts) if share[0] < share[1]]
    running = [_pool(torch.get_num_threads()).submit(run, *share) for share in others]
    try:
        run(*mine)
    finally:
        wait(running)  # they write to memory that is ours
    for each in running:
        each.result()


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads - 1, thread_name_prefix="decode")
