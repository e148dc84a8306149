"""The embedded engine: batched, cached, on a CPU or one GPU.

A prompt is computed once, and its keys and values are shared by the samples of its group.
Finished rows leave, and waiting prompts enter when enough slots are free. Llama, Qwen2 and Qwen3
run through `_decoder`; any other causal LM through its own forward pass (`_forward`), with a
warning. What is computed in float32 on a CPU with a C++ compiler runs through code that is
compiled once for the machine (`_decode.cpp`, `_compiled`), everything else through torch with the
cache of `_cache`; on a GPU a step is a CUDA graph (`_graphs`).

What a sample depends on: (run seed, step, prompt id, sample index) alone, through the hash
behind each of its draws (`_random`). Its neighbours, the number of slots and the order of the
prompts change nothing. In compiled code no row's sums depend on another row, so log-probs are
equal to the last bit, also with another number of threads. With torch the rounding of float32
sums may change, on a CPU not even that wherever the products of a row come out the same in
batches of any size: positions are padded to multiples of 16 and no product has a lone row, which
is enough with oneDNN and MKL on the processors that were tried. Elsewhere log-probs may differ in
the last bits, and a token only where its random number falls into that gap, about once in a
million tokens. That is also how far the two ways are apart, so a stage's plan says which it was.
Vectors of another width, or another compiler, are as far: they are the machine's, in no plan, and
a stage that goes on on another kind of processor says so (`data_prep.run_folder`).
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Iterable
from ctypes import CDLL
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from data_prep.errors import UserError
from pipeline.engines import EngineConfig, Group, Prompt, Sampling
from pipeline.engines._compiled import STEPS, CompiledSession
from pipeline.engines._decoder import ARCHITECTURES, PACK_BYTES, Decoder, Unwritten
from pipeline.engines._forward import ForwardDecoder
from pipeline.engines._graphs import StepGraphs, coarse
from pipeline.engines._library import Unbuilt, library_for
from pipeline.engines._packs import packs
from pipeline.engines._rows import Rows, Size, fitting_size
from pipeline.model import load_model, load_tokenizer, pick_device


class Config(EngineConfig):
    """Settings of the embedded engine.

    Attributes:
        slots: Samples that run side by side.
        refill_share: Share of free slots at which waiting prompts enter.
        memory_gib: Most memory for keys and values, GiB; where `slots` samples of full length and
            their prompts would not fit, fewer run side by side, though at least those of one
            prompt. Where torch computes, half as much again is taken for a moment when completions
            outgrow what they have. A model that runs through its own forward pass is not counted.
        cuda_graphs: Whether steps on a GPU are captured and replayed.
        compiled: Whether steps run through code that is compiled for this machine, which takes
            float32 on a CPU and a C++ compiler; by default wherever these are. Weights of more
            than 1 GiB, of which it would take a copy, run through torch all the same.
        trust_remote_code: Whether Python files that come with a model may run; in a run's
            configuration `model.trust_remote_code` sets it.
    """

    incidental: ClassVar[frozenset[str]] = frozenset({"trust_remote_code"})

    kind: str = "embedded"
    slots: int = Field(default=512, ge=1)
    refill_share: float = Field(default=0.25, gt=0.0, le=1.0)
    memory_gib: float = Field(default=16.0, gt=0.0)
    cuda_graphs: bool = True
    compiled: bool | None = None
    trust_remote_code: bool = False

    def settled(self, model: str | Path) -> Config:
        """Return these settings with `compiled` as it is for a model on this machine.

        Raises:
            UserError: It is asked for and cannot be had.
        """
        is_compiled = self.library() is not None and packs(model, self.trust_remote_code)
        return self.model_copy(update={"compiled": is_compiled})

    def deciding(self, model: str | Path) -> dict[str, Any]:
        """Return the settings that decide the samples, for a stage's plan."""
        settings = super().deciding(model)
        if not settings["compiled"]:
            del settings["compiled"]  # samples that were drawn before there was this key stay good
        return settings

    def library(self) -> CDLL | None:
        """Return the compiled code that is to be used; None for torch.

        Raises:
            UserError: `compiled` asks for it and it cannot be had.
        """
        if self.compiled is False:
            return None
        try:
            return library_for(pick_device(self.device), getattr(torch, self.dtype))
        except Unbuilt as reason:
            if self.compiled is None:
                return None
            raise UserError(
                "engine.compiled = true",
                str(reason),
                "float32, a CPU and a C++ compiler",
                "leave the key out: torch then computes where these are missing",
            ) from None


class EmbeddedEngine:
    """Samples from a Llama, Qwen2 or Qwen3 model by its weights.

    Args:
        config: Settings.
        model: A model folder or hub id.
    """

    def __init__(self, config: Config, model: str | Path) -> None:
        """Load the model and keep its weights in the decoder's own layout."""
        self.config = config
        self.policy_version = 0
        self.device = pick_device(config.device)
        loaded: Any = load_model(model, config.dtype, config.trust_remote_code)
        self.tokenizer: Any = load_tokenizer(model)
        self._batch: _Batch | None = None
        self.decoder: Decoder | ForwardDecoder
        try:
            self.decoder = Decoder(loaded, self.device, config.library())
        except Unwritten as reason:
            warnings.warn(
                f"{model}: {loaded.config.model_type} with {reason} is not written for the "
                f"embedded engine (which has {', '.join(ARCHITECTURES)}): it runs through the "
                'model\'s own forward pass, which is slower. engine.kind = "vllm" may know it.',
                stacklevel=2,
            )
            self.decoder = ForwardDecoder(loaded, self.device)
        if config.compiled and isinstance(self.decoder, Decoder) and not self.decoder.compiled:
            warnings.warn(
                f"{model}: torch computes in spite of engine.compiled = true: the compiled code "
                f"takes a copy of the weights, and they have more than {PACK_BYTES >> 20} MiB",
                stacklevel=2,
            )
        ends = loaded.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        self.end_token_ids = sorted({*ends, self.tokenizer.eos_token_id} - {None})
        self.context = int(loaded.config.max_position_embeddings)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Take a policy's parameters, named as in its `state_dict`."""
        self.decoder.load(weights)
        self.policy_version = version

    def close(self) -> None:
        """Drop the weights and the caches."""
        self._batch = None
        del self.decoder

    @torch.inference_mode()
    def generate(self, prompts: list[Prompt], sampling: Sampling) -> list[Group]:
        """Return one group a prompt, in order.

        Raises:
            UserError: A prompt or `stop_token_ids` has a token that the model does not know.
        """
        groups = [Group(prompt) for prompt in prompts]
        waiting: list[Group] = []
        for group in groups:
            length = len(group.prompt.token_ids)
            if not 0 < length < self.context:
                group.error = (
                    f"the prompt has {length} tokens; the model's context holds {self.context} "
                    "with at least one to sample"
                )
            else:
                require_known(group.prompt, self.decoder.config.vocab_size)
                waiting.append(group)
        if waiting:
            # A batch of the same shape is used again, with its memory and its CUDA graphs.
            batch, self._batch = self._batch, None
            if batch is None or not batch.suits(waiting, sampling):
                batch = None  # its memory is free before there is more
                batch = _Batch(self, waiting, sampling)
            if batch.run(waiting, sampling):
                self._batch = batch
        whole = [completion for group in groups for completion in group.completions]
        if not whole:
            return groups  # every prompt is too long; of no row the tokenizer makes an empty text
        texts = self.tokenizer.batch_decode(
            [completion.token_ids for completion in whole], skip_special_tokens=True
        )
        for completion, text in zip(whole, texts, strict=True):
            completion.text = text
        return groups


def require_known(prompt: Prompt, vocabulary: int) -> None:
    """Refuse tokens that the model has no embedding for.

    Raises:
        UserError: The prompt has one.
    """
    if unknown := [token for token in prompt.token_ids if not 0 <= token < vocabulary]:
        raise UserError(
            f"prompt {prompt.id!r}",
            f"token {unknown[0]}",
            f"tokens of the model's vocabulary, 0 to {vocabulary - 1}",
            "render prompts with the model's own tokenizer",
        )


class _Batch:
    """The batch that runs, and what waits for it.

    Args:
        engine: Holds the weights.
        groups: Prompts to complete.
        sampling: How.
    """

    def __init__(self, engine: EmbeddedEngine, groups: list[Group], sampling: Sampling) -> None:
        """Make room."""
        self.engine, self.sampling, self.waiting = engine, sampling, deque[Group]()
        self.size = self._size(groups, sampling)
        self.slots = self.size.rows
        self.session = engine.decoder.open(sampling.n, self.size)
        self.rows = Rows(
            sampling,
            self.slots,
            self.size.completion,
            engine.decoder.config.vocab_size,
            engine.end_token_ids,
            engine.tokenizer,
            torch.promote_types(engine.decoder.dtype, torch.float32),
            engine.device,
        )
        captures = engine.decoder.graphs and engine.config.cuda_graphs
        self.graphs = StepGraphs(engine.device) if captures else None

    def _size(self, groups: list[Group], sampling: Sampling, prompt: int = 0) -> Size:
        """Return what there is to be room for, with room for prompts of at least so many tokens."""
        config = self.engine.config
        return fitting_size(
            config.slots,
            sampling.n,
            len(groups),
            max(prompt, *(len(group.prompt.token_ids) for group in groups)),
            max(self._budget(group, sampling) for group in groups),
            self.engine.decoder.cache_bytes,
            config.memory_gib * 2**30,
        )

    def _budget(self, group: Group, sampling: Sampling) -> int:
        """Return the most tokens that a sample of this group can have."""
        room = self.engine.context - len(group.prompt.token_ids)
        return min(group.prompt.budget(sampling), room)

    def suits(self, groups: list[Group], sampling: Sampling) -> bool:
        """Return whether this batch, with the prompts it has room for, does for another call.

        Room for longer prompts than there are does no harm, but where memory binds it leaves fewer
        rows; so prompts of less than half the length are worth a new batch if more would run.
        """
        ours, theirs = (s.model_dump(exclude={"seed", "step"}) for s in (self.sampling, sampling))
        tight = self._size(groups, sampling)
        is_cramped = 2 * tight.prompt < self.size.prompt and tight.rows > self.size.rows
        return (
            ours == theirs
            and self._size(groups, sampling, self.size.prompt) == self.size
            and not is_cramped
        )

    def run(self, groups: list[Group], sampling: Sampling) -> bool:
        """Complete all groups; return whether the batch can be used again."""
        self.sampling = self.rows.sampling = sampling
        # The longest first: neighbours in a batch are of like length, and none starts late.
        self.waiting = deque(sorted(groups, key=lambda group: -len(group.prompt.token_ids)))
        while self.waiting or len(self.rows):
            if self.waiting:
                self._admit()
            self._step()
            self._close_gaps()
        if bool(torch.isfinite(self.rows.logprobs).all()):
            return True
        # What is not finite in a cache would get past every mask.
        self.engine.decoder.store.clear()
        return False

    def _admit(self) -> None:
        """Let waiting prompts in, if enough slots are free."""
        rows, n = self.rows, self.sampling.n
        free = self.slots - rows.running
        if len(rows) and (
            not self.session.joins or free < self.engine.config.refill_share * self.slots
        ):
            return
        if rows.running < len(rows):
            self.session.keep(rows.leave())
        count = min(len(self.waiting), free // n, self.session.free_blocks)
        if not count:
            return
        groups = [self.waiting.popleft() for _ in range(count)]
        logits = self.session.admit([group.prompt.token_ids for group in groups])
        first = len(rows)
        rows.enter(groups, [self._budget(group, self.sampling) for group in groups])
        ended = rows.draw(logits.repeat_interleave(n, dim=0), first, len(rows))
        rows.settle(ended, first)
        self._close_gaps()

    def _step(self) -> None:
        """Sample one more token for every running row; several, where compiled code draws."""
        rows = self.rows
        if not rows.running:
            return
        if isinstance(self.session, CompiledSession) and rows.sampler.is_plain:
            self.session.draw(rows, 1 if rows.stops else STEPS)
            rows.take()
            return
        key = self.session.fit(rows.longest, coarse=self.graphs is not None)
        if self.graphs is None:
            ended = self._compute(len(rows))
        else:
            batch = coarse(len(rows), self.slots)
            ended = self.graphs.run((batch, *key), lambda: self._compute(batch))
        rows.settle(ended, 0)

    def _compute(self, batch: int) -> Tensor:
        """Run one token of the first rows and draw the next; return who has ended, [batch]."""
        logits = self.session.step(self.rows.state[:, :batch])
        return self.rows.draw(logits, 0, batch)

    def _close_gaps(self) -> None:
        """Take ended rows out, once they are many enough to be worth the moving."""
        rows = self.rows
        gaps = len(rows) - rows.running
        if gaps and (not rows.running or gaps >= len(rows) / 8):
            self.session.keep(rows.leave())


def create(config: Config, model: str | Path) -> EmbeddedEngine:
    """Return the engine."""
    return EmbeddedEngine(config, model)
