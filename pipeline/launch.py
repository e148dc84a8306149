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
import re
from collections.abc import Mapping, Sequence
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
    "ntasks": "num-processes",
    "ntasks-per-node": "nproc-per-node",
}
# Launchers that tell their processes nothing of ranks, and those that do, also as modules.
STARTERS = ("mpirun", "mpiexec", "mpiexec.hydra", "orterun", "prterun", "srun", "horovodrun")
RANKERS = (
    "torchrun", "accelerate", "torch.distributed.run", "torch.distributed.launch",
    "accelerate.commands.launch",
)  # fmt: skip
# How many processes such a launcher started (Open MPI; MPICH and Intel's; MVAPICH; a step of
# srun's). Slurm's comes last: mpirun may itself be in a step. SLURM_NTASKS is not of use, since a
# batch script that is one process has it too.
SIZES = {
    "OMPI_COMM_WORLD_SIZE": "mpirun",
    "PMI_SIZE": "mpiexec or srun",
    "MV2_COMM_WORLD_SIZE": "mpirun",
    "SLURM_STEP_NUM_TASKS": "srun",
}
INSTEAD = (
    "`torchrun --nproc-per-node N` or `accelerate launch --num_processes N` start them with ranks; "
    "on several machines, one such launcher on each"
)


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
    inner = [at for at, word in enumerate(words) if Path(word).name in RANKERS]
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


def refuse_without_ranks(words: Sequence[str]) -> None:
    """Refuse a launcher's command line whose processes would each train alone.

    Args:
        words: Of the command line, which the module to be run follows. Where a program of the
            user's own comes last, it may set the ranks; the processes look themselves.

    Raises:
        UserError: It starts Python in several processes, and nothing tells them their ranks.
    """
    names = [Path(word).name for word in words]
    starter = next((name for name in names if name in STARTERS), None)
    if starter is None or any(name in RANKERS for name in names) or launch_of(words).count == 1:
        return
    # An option's value, an option, or Python: then there is no other program.
    if re.fullmatch(r"-.*|\d+|python[\d.]*|mpi.*|srun", names[-1]):
        raise UserError(
            "--launch",
            f"{starter}, which starts {launch_of(words).count} processes and tells none its rank: "
            "each would train alone, in the same folder",
            "a launcher that sets RANK and WORLD_SIZE",
            INSTEAD,
        )


def _refuse_one_of_several(environment: Mapping[str, str]) -> None:
    """Refuse to train alone beside others that train alone in the same folder.

    Raises:
        UserError: This process is one of several, and nothing tells it its rank.
    """
    if "WORLD_SIZE" in environment:
        return
    key = next((key for key in SIZES if key in environment), "")
    size = environment.get(key, "")
    if size.isdecimal() and int(size) > 1:
        raise UserError(
            f"environment, {key}",
            f"one of {size} processes that {SIZES[key]} started, without RANK and WORLD_SIZE: "
            "each would train alone, in the same folder",
            "processes that know their ranks",
            f"{INSTEAD}; WORLD_SIZE=1 says that each is meant to train alone, in a run folder of "
            "its own",
        )


def meet() -> bool:
    """Meet the processes that a launcher started beside this one; return whether it leads.

    From here on the first of them that fails speaks for all.

    Raises:
        UserError: This process is one of several that were not told their ranks.
    """
    _refuse_one_of_several(os.environ)
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
        UserError: One process is to split a model, or several do not have a GPU each.
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
        if device.index is not None:
            raise UserError(
                "engine.device",
                f"'{device}' with {count} processes",
                "a GPU for each process: two cannot share one",
                'set engine.device = "cuda" or leave the key out; CUDA_VISIBLE_DEVICES chooses '
                "GPUs",
            )
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
