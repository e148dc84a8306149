"""Several processes train one model: who does which share, and how the shares become one step.

A process is a *rank*; a launcher starts them (`pipeline.launch`). What a step is does not depend on
how many there are:

    every rank     knows the whole step's sequences and their flat view, so that 1/Z, advantages
                   and everything a method finds out about a step are of the whole step
    a rank         runs the documents of its share, balanced by tokens, through the model
    gradients      are summed over ranks, never averaged: the weights 1/Z are global already
    figures        of all ranks' passes are joined before they are averaged
    rollouts       prompts, verdicts and scores are dealt out, and everybody gets everybody's
    rank 0         writes: steps.jsonl, rollouts, training states, checkpoints

`parallel = "ddp"` keeps a whole model on every rank; the sum is taken once an optimizer step, in
buckets, so accumulation costs no traffic. `parallel = "fsdp2"` splits parameters, gradients and
the optimizer over the ranks by torch's `fully_shard`, a decoder layer at a time: a layer is
gathered when it runs and let go after. Ranks then have to make equally many passes; one that has
nothing left runs a document of another's share and adds nothing. The rest of this program calls a
sharded model through `pipeline.policy.in_one_pass`, because FSDP2 acts at the entry of a forward
pass, and ours reads the output embedding beside the backbone.

A saved training state holds whole tensors under plain names, whoever trained it, so it goes on
with another number of processes or the other kind: which kind decides no number beyond rounding.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stderr
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from types import MethodType
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from data_prep import errors
from pipeline.batch import MicroBatch, Tokens, documents_of, micro_batches, subset
from pipeline.batch import Sequence as Sample
from pipeline.engines import Engine, Group, Prompt, Sampling
from pipeline.split import is_split
from verifiers import Verdict, VerifierPool

Item = TypeVar("Item")
Found = TypeVar("Found")

# A rank that fails closes its connections, which the others notice at once; waiting is for those
# that sample long texts or write a large checkpoint.
TIMEOUT = timedelta(hours=4)
BUCKET_BYTES = 64 << 20
# Key of the processes' store that names the first one that failed.
FAILED = "boxed/failed"


class Ranks:
    """The processes of one training stage, as one of them sees them.

    Args:
        index: Which this is; 0 leads.
        count: How many there are.
        kind: Whether each has the whole model, or a part of it.
        device: Where models are.

    Attributes:
        words: Group for Python objects of the trainer.
        sampling: Another one, for what samples: `pipeline.ahead` does that in a thread of its own.
        mesh: What FSDP2 splits over.
    """

    def __init__(
        self,
        index: int = 0,
        count: int = 1,
        kind: Literal["ddp", "fsdp2"] = "ddp",
        device: torch.device | None = None,
    ) -> None:
        """Make the groups."""
        self.index, self.count = index, count
        self.kind: Literal["ddp", "fsdp2"] = kind
        self.device = device or torch.device("cpu")
        self.words: Any = None
        self.sampling: Any = None
        self.mesh: Any = None
        if count > 1:
            self.words = dist.new_group(backend="gloo", timeout=TIMEOUT)
            self.sampling = dist.new_group(backend="gloo", timeout=TIMEOUT)
            if kind == "fsdp2":
                self.mesh = init_device_mesh(self.device.type, (count,))

    @property
    def leads(self) -> bool:
        """Whether this rank writes and speaks."""
        return self.index == 0

    @property
    def shards(self) -> bool:
        """Whether models are split over ranks."""
        return self.mesh is not None

    def speaks(self) -> bool:
        """Return whether this rank tells what goes on: the leader, unless a rank has failed."""
        if self.count == 1:
            return True
        store = dist.distributed_c10d._get_default_store()
        return self.leads and not store.check([FAILED])

    def any(self, flag: bool, group: Any = None) -> bool:
        """Return whether any rank says yes."""
        return flag if self.count == 1 else any(self.gather(flag, group))

    def replicated(self) -> Ranks:
        """Return the same ranks for a model that each of them keeps whole."""
        if not self.shards:
            return self
        other = Ranks(device=self.device)
        other.index, other.count = self.index, self.count
        other.words, other.sampling = self.words, self.sampling
        return other

    def quiet(self) -> AbstractContextManager[Any]:
        """Let only the leader write to the screen."""
        if self.leads:
            return nullcontext()
        return _silence()

    def lead(self, function: Callable[[], Found]) -> Found:
        """Return what the leader finds; the others wait for it."""
        if self.count == 1:
            return function()
        found = [function() if self.leads else None]
        dist.broadcast_object_list(found, src=0, group=self.words)
        return found[0]  # type: ignore[return-value]

    def gather(self, value: Found, group: Any = None) -> list[Found]:
        """Return every rank's value, in their order."""
        if self.count == 1:
            return [value]
        found: list[Any] = [None] * self.count
        dist.all_gather_object(found, value, group=group or self.words)
        return found

    def joined(self, values: list[Found]) -> list[Found]:
        """Return all ranks' lists as one."""
        return values if self.count == 1 else [v for part in self.gather(values) for v in part]

    def dealt(
        self, function: Callable[[list[Item]], list[Found]], items: list[Item]
    ) -> list[Found]:
        """Return what a function finds for each item, where each rank asks it for its share.

        Args:
            function: One result an item, in order.
            items: The same on every rank.
        """
        if self.count == 1:
            return function(items)
        own = items[self.index :: self.count]
        parts = self.gather(function(own) if own else [], self.sampling)
        found: list[Any] = [None] * len(items)
        for rank, part in enumerate(parts):
            found[rank :: self.count] = part
        return found

    def summed(self, values: dict[str, Tensor], like: Tensor) -> dict[str, Tensor]:
        """Sum tensors over ranks by name; a rank that lacks one counts as zeros.

        Args:
            values: On the CPU, shaped as `like`; changed in place.
            like: What zeros are made like.
        """
        if self.count == 1:
            return values
        names = sorted({name for part in self.gather(list(values)) for name in part})
        found = {name: values.get(name, torch.zeros_like(like)) for name in names}
        for value in found.values():
            dist.all_reduce(value, group=self.words)
        return found

    def sum_gradients(self, modules: Iterable[nn.Module]) -> None:
        """Sum the gradients of parameters that each rank keeps whole, in place.

        FSDP2 has summed those of split ones. One that no rank has a gradient of is left without.
        """
        if self.count == 1:
            return
        parameters = {
            id(p): p
            for module in modules
            for p in module.parameters()
            if p.requires_grad and not is_split(p)
        }
        if not parameters:
            return
        every = list(parameters.values())
        used = torch.tensor([p.grad is not None for p in every], dtype=torch.int32)
        dist.all_reduce(used, op=dist.ReduceOp.MAX, group=self.words)
        chosen = [p for p, flag in zip(every, used.tolist(), strict=True) if flag]
        for parameter in chosen:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        for bucket in _buckets(chosen):
            flat = torch.cat([p.grad.flatten() for p in bucket])  # type: ignore[union-attr]
            dist.all_reduce(flat)
            for parameter, part in zip(
                bucket, flat.split([p.numel() for p in bucket]), strict=True
            ):
                parameter.grad.copy_(part.view_as(parameter))  # type: ignore[union-attr]

    def shard(self, module: nn.Module, backbone: Any = None) -> None:
        """Split a model's parameters over the ranks, where this stage does that.

        Args:
            module: What is called: a causal LM through `in_one_pass`, or a critic.
            backbone: The transformers model whose layers are gathered one at a time; empty for
                `module` itself.
        """
        if not self.shards:
            return
        from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

        for layer in layers_of(module if backbone is None else backbone):
            fully_shard(layer, mesh=self.mesh)
        # Gathered during a pass alone: whoever reads or changes weights in between meets the
        # parts, never a gathered copy that has gone stale.
        fully_shard(module, mesh=self.mesh, reshard_after_forward=True)
        module.within = MethodType(lambda _, function: function(), module)  # type: ignore[assignment]
        register_fsdp_forward_method(module, "within")
        for part in module.modules():
            if isinstance(part, FSDPModule):
                part.set_gradient_divide_factor(1.0)  # a sum, no mean
                part.set_force_sum_reduction_for_comms(True)

    def micro_batches(
        self, sequences: list[Sample], tokens: Tokens, micro_tokens: int
    ) -> Iterator[MicroBatch]:
        """Yield the forward passes of this rank's share of a step.

        With a split model every rank gets equally many, idle ones among them.

        Args:
            sequences: The whole step's.
            tokens: Their flat view; `token_index` of what is yielded points into it.
            micro_tokens: As in `pipeline.batch.micro_batches`.
        """
        if self.count == 1:
            yield from micro_batches(sequences, tokens, micro_tokens)
            return
        shares = balanced(sequences, self.count)
        own = self._passes(sequences, tokens, micro_tokens, shares[self.index])
        if not self.shards:
            yield from own
            return
        spare = None
        while True:
            micro = next(own, None)
            more = torch.tensor(int(micro is not None))
            dist.all_reduce(more, op=dist.ReduceOp.MAX, group=self.words)
            if not more:
                return
            if micro is None:
                if spare is None:
                    short = min(range(len(sequences)), key=lambda i: _length(sequences[i]))
                    (spare,) = self._passes(sequences, tokens, micro_tokens, [short])
                micro = replace(spare, idle=True)
            yield micro

    def _passes(
        self, sequences: list[Sample], tokens: Tokens, micro_tokens: int, members: list[int]
    ) -> Iterator[MicroBatch]:
        if not members:
            return
        starts = torch.zeros(len(sequences) + 1, dtype=torch.int64)
        starts[1:] = torch.cumsum(tokens.lengths.to(torch.int64), 0)
        index = torch.cat([torch.arange(int(starts[m]), int(starts[m + 1])) for m in members])
        view = subset(tokens, members, index)
        for micro in micro_batches([sequences[m] for m in members], view, micro_tokens):
            yield replace(micro, token_index=index[micro.token_index])

    def engine(self, engine: Engine | None, is_shared: bool) -> Engine:
        """Return an engine that each rank asks for all samples and that draws each one once.

        Args:
            engine: This rank's; None where only the leader has one.
            is_shared: Whether the leader's one serves all ranks (servers), or each has its own.
        """
        if self.count == 1:
            assert engine is not None  # noqa: S101 - for the type checker
            return engine
        return _RankedEngine(self, engine, is_shared)

    def pool(self, pool: VerifierPool) -> VerifierPool:
        """Return a pool that judges this rank's share and knows everybody's verdicts."""
        return pool if self.count == 1 else _RankedPool(self, pool)  # type: ignore[return-value]

    def wait(self) -> None:
        """Wait until every rank is here."""
        if self.count > 1:
            dist.barrier(group=self.words)

    def close(self) -> None:
        """Wait for the others and part from them."""
        if self.count > 1:
            self.wait()
            dist.destroy_process_group()
            errors.speaks = lambda: True


ALONE = Ranks()


@contextmanager
def _silence() -> Iterator[None]:
    with Path(os.devnull).open("w", encoding="utf-8") as nowhere, redirect_stderr(nowhere):
        yield


class _RankedEngine:
    """Draws shares, each by its rank, or all by the leader's engine."""

    def __init__(self, ranks: Ranks, engine: Engine | None, is_shared: bool) -> None:
        self._ranks, self._engine, self._is_shared = ranks, engine, is_shared
        self.policy_version = 0 if engine is None else engine.policy_version
        # Whether this rank needs the weights that it gathers with the others.
        self.takes_weights = engine is not None

    def generate(self, prompts: list[Prompt], sampling: Sampling) -> list[Group]:
        """Return one group a prompt, in order."""
        if not self._is_shared:
            assert self._engine is not None  # noqa: S101 - for the type checker
            own = self._engine
            return self._ranks.dealt(lambda part: own.generate(part, sampling), prompts)
        found = [self._engine.generate(prompts, sampling) if self._engine else None]
        dist.broadcast_object_list(found, src=0, group=self._ranks.sampling)
        return found[0]  # type: ignore[return-value]

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Take a policy's parameters."""
        self.policy_version = version
        if self._engine is not None:
            self._engine.load_weights(weights, version)
        else:
            for _ in weights:  # a split model is gathered by all ranks together
                pass

    def close(self) -> None:
        """Give back memory and processes."""
        if self._engine is not None:
            self._engine.close()


class _RankedPool:
    """Judges a share of what is asked."""

    def __init__(self, ranks: Ranks, pool: VerifierPool) -> None:
        self._ranks, self._pool = ranks, pool

    def verify_many(self, pairs: Sequence[tuple[str, str]]) -> list[Verdict]:
        """Return a verdict for each (gold, text), in order."""
        return self._ranks.dealt(lambda part: list(self._pool.verify_many(part)), list(pairs))


def balanced(sequences: list[Sample], count: int) -> list[list[int]]:
    """Return each rank's sequences, whole documents, with nearly equally many tokens a rank.

    The longest document left goes to the rank that has least.

    Args:
        sequences: A step's.
        count: Number of ranks.
    """
    shares: list[list[int]] = [[] for _ in range(count)]
    loads = [0] * count
    for document in sorted(documents_of(sequences, share=True), key=lambda d: -d.length):
        rank = loads.index(min(loads))
        loads[rank] += document.length
        shares[rank] += document.members
    return [sorted(share) for share in shares]


def _length(sequence: Sample) -> int:
    return len(sequence.prompt) + len(sequence.completion)


def _buckets(parameters: list[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Yield parameters of one dtype and device that make a message together."""
    bucket: list[nn.Parameter] = []
    size = 0
    for parameter in parameters:
        if bucket and (size > BUCKET_BYTES or parameter.dtype != bucket[0].dtype):
            yield bucket
            bucket, size = [], 0
        bucket.append(parameter)
        size += parameter.nbytes
    if bucket:
        yield bucket


def layers_of(model: Any) -> list[nn.Module]:
    """Return the modules of a transformers model that should not be split within."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    return [module for module in model.modules() if type(module).__name__ in names]
