"""The processes that train together, as a launcher starts them.

    accelerate launch --num_processes 8 -m pipeline.train --config C --stage S
    torchrun --nproc-per-node 8 -m pipeline.train --config C --stage S

The launcher tells each of them by its environment which one it is (`RANK`, `WORLD_SIZE`,
`LOCAL_RANK`, `LOCAL_WORLD_SIZE`, `MASTER_ADDR`, `MASTER_PORT`); what they do then stands in
`pipeline.ranks`. `parallel = "auto"` takes what accelerate's configuration says
(`ACCELERATE_USE_FSDP`), and "ddp" without one.

The first rank that fails says why, and the others end without a word (`data_prep.errors.command`).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist

from data_prep import errors
from data_prep.errors import UserError
from pipeline.ranks import ALONE, FAILED, TIMEOUT, Ranks

Parallel = Literal["auto", "ddp", "fsdp2"]

# What MPI's launchers (Open MPI, MPICH, Intel's) and accelerate call the processes of all
# machines, those of one, and the machines.
NAMES = {
    "n": "num-processes",
    "np": "num-processes",
    "npernode": "nproc-per-node",
    "ppn": "nproc-per-node",
    "num-machines": "nnodes",
}


@dataclass(frozen=True, slots=True)
class Launch:
    """How many processes train together.

    Attributes:
        count: In all.
        here: On this machine.
        is_one: Whether this process is one of them, and no other starts them later.
    """

    count: int = 1
    here: int = 1
    is_one: bool = True

    def kind(self, parallel: Parallel) -> Literal["ddp", "fsdp2"]:
        """Return what they do where a stage's key says `parallel`."""
        if parallel != "auto":
            return parallel
        asked = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("1", "true", "yes")
        return "fsdp2" if asked else "ddp"


def launched() -> Launch:
    """Return what the launcher of this process says."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    return Launch(count, int(os.environ.get("LOCAL_WORLD_SIZE", str(count))))


def launch_of(words: Sequence[str]) -> Launch:
    """Return what a launcher's command line asks for, as far as it says.

    Args:
        words: Such as "torchrun", "--nproc-per-node", "8"; empty for one process. Where one
            launcher starts another, as "mpirun … torchrun …", the last starts what trains.
    """
    inner = [at for at, word in enumerate(words) if Path(word).name in ("torchrun", "accelerate")]
    words = words[inner[-1] :] if inner else words
    found: dict[str, int] = {}
    for word, following in pairwise([*words, ""]):
        name, given, value = word.lstrip("-").replace("_", "-").partition("=")
        name = NAMES.get(name, name)
        text = value if given else following
        # Of a range of machines the fewest: with them each process holds most.
        text = text.partition(":")[0] if name == "nnodes" else text
        if name == "nproc-per-node" and text in ("gpu", "cpu", "auto"):
            cards = 0 if text == "cpu" else torch.cuda.device_count()
            found[name] = cards or os.cpu_count() or 1
        elif word.startswith("-") and text.isdecimal():
            found[name] = int(text)
    nodes = max(1, found.get("nnodes", 1))
    if "num-processes" in found:
        count = found["num-processes"]
        here = found.get("nproc-per-node", count // nodes)
        return Launch(count, max(1, min(here, count)), False)
    here = found.get("nproc-per-node", 1)
    return Launch(nodes * here, here, False)


def meet() -> bool:
    """Meet the processes that a launcher started beside this one; return whether it leads.

    From here on the first of them that fails speaks for all.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return True
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, timeout=TIMEOUT)
        index, store = dist.get_rank(), dist.distributed_c10d._get_default_store()
        errors.speaks = lambda: _is_first_to_fail(store, index)
    return dist.get_rank() == 0


def open_ranks(parallel: Parallel, device: torch.device, where: str = "parallel") -> Ranks:
    """Return the processes that train a stage together; this one alone without a launcher.

    Args:
        parallel: The stage's key.
        device: Of the stage's models.
        where: Names the stage in errors.

    Raises:
        UserError: One process is to split a model, or there are more processes than GPUs.
    """
    meet()
    count = dist.get_world_size() if dist.is_initialized() else 1
    if count == 1:
        if parallel == "fsdp2":
            raise UserError(
                where,
                "'fsdp2' with one process, which has nobody to split the model with",
                "several processes",
                "start them with `accelerate launch --num_processes N -m pipeline.train …` or "
                "`torchrun --nproc-per-node N -m pipeline.train …`, or leave the key out",
            )
        return ALONE
    if device.type == "cuda":
        local = int(os.environ.get("LOCAL_RANK", "0"))
        if local >= torch.cuda.device_count():
            raise UserError(
                where,
                f"process {local + 1} of this machine, which has {torch.cuda.device_count()} GPUs",
                "a process a GPU",
                "lower the launcher's number of processes",
            )
        torch.cuda.set_device(local)
        device = torch.device("cuda", local)
    return Ranks(dist.get_rank(), count, launched().kind(parallel), device)


def _is_first_to_fail(store: Any, index: int) -> bool:
    """Note that this rank ends early; return whether none did so before."""
    try:
        return store.compare_set(FAILED, "", str(index)) == str(index).encode()
    except Exception:  # the store's own process is gone, so that one was the first
        return False
