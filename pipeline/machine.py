"""What this machine has: memory, disk, GPU, and the rate of its matrix products."""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from pipeline.kernels import product

MIB, GIB = 2**20, 2**30
# Sizes beyond which a product runs no faster, and tokens of the one that is tried.
WIDEST = {"cpu": 1024, "cuda": 8192}
ROWS = {"cpu": 2048, "cuda": 8192}
# Where the kernel says how much memory a container may use: control groups of version 2 and 1.
LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


@dataclass(frozen=True, slots=True)
class Machine:
    """Bytes, all of them.

    Attributes:
        memory: Of the machine, or of the container where that is less.
        available: Free now, or freed at once when asked for.
        disk: Free where the run folder stands.
        gpu: Memory of one GPU; 0 where there is none.
        gpu_free: Free of it now.
    """

    memory: int
    available: int
    disk: int
    gpu: int = 0
    gpu_free: int = 0


def this_machine(out: str | Path) -> Machine:
    """Look at this machine.

    Args:
        out: The run folder; it need not be there.
    """
    memory = psutil.virtual_memory()
    total = min([memory.total, *_limits()])
    gpu_free, gpu = torch.cuda.mem_get_info() if torch.cuda.is_available() else (0, 0)
    return Machine(total, min(memory.available, total), free_disk(out), gpu, gpu_free)


def _limits() -> list[int]:
    found = []
    for name in LIMITS:
        path = Path(name)
        text = path.read_text(encoding="ascii").strip() if path.is_file() else ""
        if text.isdigit():
            found.append(int(text))
    return found


def free_disk(out: str | Path) -> int:
    """Return the free bytes of the disk that a folder stands on, or would stand on."""
    path = Path(out).absolute()
    there = next(p for p in (path, *path.parents) if p.exists())
    return shutil.disk_usage(there).free


def product_rate(width: int, inner: int, device: str = "cpu", dtype: str = "float32") -> float:
    """Return the operations a second (two a multiply-add) of [rows, width] × [width, inner].

    By the library that training takes (`pipeline.kernels.product`). Products wider than `WIDEST`
    run no faster, and are not tried. On a GPU, where a small product is over before the next one is
    launched, they are four times as tall.

    The best of a few tries in a fifth of a second, after one that loads what is needed: other work
    on the machine only slows it.

    Args:
        width: H of the model that is asked about: small products are slower.
        inner: F of it.
        device: Where.
        dtype: In which precision.
    """
    place = torch.device(device)
    widest, rows = WIDEST[place.type], ROWS[place.type]
    width, inner = min(width, widest), min(inner, widest)
    kind = torch.bfloat16 if dtype == "bfloat16" else torch.float32
    a = torch.ones(rows, width, device=place, dtype=kind)
    b = torch.ones(inner, width, device=place, dtype=kind)
    best = float("inf")

    def once() -> float:
        started = time.perf_counter()
        product(a, b)
        if place.type == "cuda":
            torch.cuda.synchronize(place)
        return time.perf_counter() - started

    with torch.inference_mode():
        once()  # a GPU's libraries may take longer to load than all tries together
        began = time.perf_counter()
        while time.perf_counter() - began < 0.2:
            best = min(best, once())
    return 2.0 * rows * width * inner / best
