"""What a training stage takes.

With P parameters of b bytes, P' of them trained, T tokens of one pass, V vocabulary (the model's
numbers stand in `pipeline.shape`):

    weights       P b, and P 2 for copies in bfloat16 where products run in it (with gradient
                  checkpointing a layer's)
    gradients     P' b
    optimizer     2 P' b for AdamW's moments, and P' b more while it steps
    activations   T · kept · b of every layer, and one more layer at work; with gradient
                  checkpointing T H b a layer, and one layer at work; without gradient (validation,
                  a reference) one layer at work
    attention     b for each position that a token sees, head and layer; on a GPU 5 bytes for each
                  pair of positions in a row that holds several samples, which is their mask
    log-probs     V · 4 bytes a token: three chunks at work, and what is kept for the backward pass
    reference, critic, judges    P b each, a critic's with gradients and optimizer

Where several processes train (N of them), memory is that of one process. `parallel = "fsdp2"`:

    split         weights, gradients, optimizer, reference, critic by N
    gathered      the embeddings and two layers, whole; gradients of the embeddings and one layer
    on the first  the whole training state while it is saved, in main memory

`parallel = "ddp"` splits none of that, and adds a bucket of gradients under way. Engines, reward
models and what judges are whole in each; passes and samples are a process's share of a step. On
CPUs a machine's processes share its memory, and time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from pipeline.attention import CHUNK
from pipeline.config import TrainConfig
from pipeline.estimate import (
    JUDGING_PROCESS,
    LONGER,
    SAMPLING_SHARE,
    TRAINING_SHARE,
    VERDICT_BYTES,
    VERDICTS_PER_S,
    Book,
    Forecast,
    log_bytes,
)
from pipeline.logprobs import CHUNK_BYTES, KEEP_BYTES
from pipeline.machine import MIB
from pipeline.methods import create_method
from pipeline.plan import models_of
from pipeline.ranks import BUCKET_BYTES
from pipeline.shape import Shape

# What torch loads to split a model, measured on a model of nothing.
SHARDING = 150 * MIB
# What processes that split the model hold a part of (`pipeline.ranks`).
SPLIT = {"weights", "gradients", "optimizer", "reference", "critic", "policy that samples"}
# A token's row of the coefficients on disk.
COEFFICIENT_BYTES = 14


@dataclass(frozen=True, slots=True)
class _Work:
    """What a training stage goes through.

    Attributes:
        batch: Documents a step: rows, pairs, or prompts with their samples.
        document: Tokens of one.
        completion: Tokens that carry loss, of one of its members.
        steps: Optimizer steps.
        members: Completions of a document.
    """

    batch: int
    document: float
    completion: float
    steps: int
    members: int = 1

    @property
    def tokens(self) -> float:
        """Tokens of a step."""
        return self.batch * self.document


def forecast_training(book: Book, config: TrainConfig) -> Forecast:
    """Return the forecast of one training stage."""
    shape = book.shape(config.name)
    if shape is None:
        return Forecast(config.name, unknown=book.absent(config.init))
    return _Training(book, config, shape).forecast()


class _Training:
    """Adds up what one training stage takes.

    Args:
        book: What the run's stages share.
        config: The stage's.
        shape: Of its model.
    """

    def __init__(self, book: Book, config: TrainConfig, shape: Shape) -> None:
        self.book, self.config, self.shape = book, config, shape
        self.method = create_method(config.method)
        self.where = f"of stage {config.name!r}"
        self.bytes, self.parameters = book.bytes, shape.parameters
        adapters = config.lora.rank
        self.trained = shape.adapters(adapters) if adapters else self.parameters
        # Of the states that a killed run goes on from, and of one that is being written.
        self.state = 3 * self.trained * self.bytes
        models = models_of(config, self.method)
        self.judges = len([key for key in models if key.startswith("reward")])
        # Time goes by what is usual, memory by what may come.
        self.usual, self.worst = self._work(1.0), self._work(LONGER)
        self.sampled = 0
        if self.method.source == "policy":
            group = self.method.samples(config.group_size)
            self.sampled = self.usual.steps * config.batch * group
        # Filled part by part: bytes of one process, what would lower them, and what the first of
        # several processes takes beyond the others.
        self.memory: dict[str, int] = {}
        self.keys: dict[str, str] = {}
        self.first = 0

    def forecast(self) -> Forecast:
        """Return the sum."""
        book, config = self.book, self.config
        self._own_model()
        self._other_models()
        passes = self._passes()
        self.memory |= passes
        few = f"lower micro_tokens {self.where}"
        checkpointing = "" if config.gradient_checkpointing else " or set gradient_checkpointing"
        self.keys |= {"activations": few + checkpointing, "attention": few, "log-probs": few}
        if self.method.source == "policy":
            self._sampler()
        kept = self._kept()
        if book.launch.count > 1:
            if book.launch.kind(config.parallel) == "fsdp2":
                self._split(sum(passes.values()))
            else:
                self._replicated()
        operations, other_s = self._work_done()
        return Forecast(
            config.name,
            memory=self.memory,
            kept=kept,
            scratch=(config.keep_states + 1) * self.state,
            tokens=self._tokens(),
            operations=operations,
            share=TRAINING_SHARE if book.on_gpu else 1.0,
            other_s=other_s,
            keys=self.keys,
            processes=1 if book.on_gpu else book.launch.here,
            first=self.first,
        )

    # Memory

    def _own_model(self) -> None:
        """Add the model that is trained, with gradients and optimizer."""
        config, where, b = self.config, self.where, self.bytes
        parameters, trained = self.parameters, self.trained
        # Products in bfloat16 keep their factors for the backward pass, or a layer's at a time.
        copies = 2 * parameters * (config.precision == "bfloat16")
        if config.gradient_checkpointing:
            copies //= self.shape.layers
        self.memory |= {
            **self.book.program("train"),
            "weights": parameters * b + trained * b * bool(config.lora.rank),
            "gradients": trained * b,
            "optimizer": 3 * trained * b,
        }
        if copies:
            self.memory["copies in bfloat16"] = copies
        self.keys |= {
            "copies in bfloat16": f"set gradient_checkpointing {where}",
            "weights": "take a smaller model (model.path, or the keys of [model])",
            "gradients": f"set lora.rank {where}, which trains adapters alone",
            "optimizer": f"set lora.rank {where}, which trains adapters alone",
        }

    def _other_models(self) -> None:
        """Add the reference, the critic, the policy that samples, and the reward models."""
        config, method, where = self.config, self.method, self.where
        memory, keys = self.memory, self.keys
        b, parameters, trained = self.bytes, self.parameters, self.trained
        if (method.reference or config.watch_reference) and not config.lora.rank:
            memory["reference"] = parameters * b
            keys["reference"] = f"set lora.rank {where}, or method.beta = 0 where it has one"
        if method.critic == "separate":
            memory["critic"] = parameters * b + 4 * trained * b
            keys["critic"] = f'set method.critic = "head" {where}'
        if method.refresh > 1:
            memory["policy that samples"] = parameters * b
            keys["policy that samples"] = f"set method.refresh = 1 {where}"
        if self.judges:
            retrained = 4 * parameters * b if config.reward.retrain else 0
            memory["reward models"] = self.judges * parameters * b + retrained
            keys["reward models"] = f"remove reward.model or reward.process {where}"

    def _passes(self) -> dict[str, int]:
        """Return what a forward and backward pass keeps."""
        config, shape, work = self.config, self.shape, self.worst
        b = 2 if config.precision == "bfloat16" else self.bytes
        document = min(work.document, shape.context * max(1, work.members))
        tokens = min(max(config.micro_tokens, document), work.tokens)
        tokens = min(tokens, max(document, work.tokens / self.book.launch.count))
        layer = tokens * shape.kept * b
        if config.gradient_checkpointing:
            activations = tokens * shape.width * b * shape.layers + layer
        else:
            activations = layer * (shape.layers + 1)
        lengths = self.book.lengths
        held_out = lengths.held_out * lengths.row if config.validate_every else 0.0
        if self.method.source == "rows":
            looked_at = min(float(config.micro_tokens), held_out)
            activations = max(activations, looked_at * shape.kept * b)
        rows = max(1.0, tokens / document)
        if self.book.on_gpu:
            attention = rows * document**2 * 5 if work.members > 1 else 0.0
        else:
            seen = min(document, document - (work.members - 1) * work.completion, float(CHUNK))
            attention = tokens * seen * shape.heads * shape.layers * b
        answers = tokens * min(1.0, work.members * work.completion / work.document)
        logits = answers * shape.vocabulary * 4
        chunks = 3 * min(CHUNK_BYTES, logits)
        return {
            "activations": round(activations),
            "attention": round(attention),
            "log-probs": round(chunks + (logits if logits <= KEEP_BYTES else 0)),
        }

    def _sampler(self) -> None:
        """Add the engine that samples the policy, and what judges its samples."""
        book, config, ranks = self.book, self.config, self.book.launch.count
        engine, keys = book.engine(
            self.shape,
            self.method.samples(config.group_size),
            math.ceil(config.batch / ranks),
            self.worst.completion,
        )
        if "vLLM" in engine and getattr(book.run.engine, "sleep", False):
            # It sleeps while a pass keeps something.
            kept = ("activations", "attention", "log-probs", "copies in bfloat16")
            engine["vLLM"] -= min(engine["vLLM"], sum(self.memory.get(part, 0) for part in kept))
        if ranks > 1 and book.run.engine.among == "leader":
            self.first = 0 if book.on_gpu else sum(engine.values())
        else:
            self.memory |= engine
        self.keys |= keys
        if not book.on_gpu:
            self.memory["program"] += book.run.verify.workers * JUDGING_PROCESS
        # Moving every parameter once, to see that the engine takes them.
        self.memory["optimizer"] = max(self.memory["optimizer"], self.trained * self.bytes)

    def _split(self, passes: int) -> None:
        """Split the models over the processes, and add what of them is gathered at one moment.

        Args:
            passes: Bytes that a forward and backward pass keeps.
        """
        shape, memory, b = self.shape, self.memory, self.bytes
        for part in SPLIT & memory.keys():
            memory[part] //= self.book.launch.count
        # The embeddings, and a layer at work beside the one that is fetched; then gradients
        # of the embeddings and a layer on their way to those who keep them.
        embeddings = shape.vocabulary * shape.width * (2 - shape.tied)
        layer = (self.parameters - embeddings) // shape.layers
        memory["gathered"] = (2 * embeddings + (min(2, shape.layers) + 1) * layer) * b
        self.keys["gathered"] = "take a smaller model (model.path)"
        if not self.book.on_gpu:
            memory["program"] += SHARDING
            # Saved between the steps, when nothing is gathered and no pass is under way.
            self.first += max(0, self.state - memory["gathered"] - passes)

    def _replicated(self) -> None:
        """Add the gradients that are on their way between processes with a whole model each."""
        b, largest = self.bytes, self.shape.vocabulary * self.shape.width
        bucket = min(self.trained, BUCKET_BYTES // b + largest) * b
        self.memory["gradients under way"] = bucket
        self.keys["gradients under way"] = self.keys["gradients"]

    # Disk and time

    def _kept(self) -> dict[str, int]:
        """Return what stays on disk."""
        config, run, usual = self.config, self.book.run, self.usual
        kept = {"checkpoint": self.parameters * self.bytes + 2 * MIB * (not run.model.path)}
        self.keys["checkpoint"] = "take a smaller model, or another disk (out)"
        if self.sampled:
            coefficients = (
                COEFFICIENT_BYTES / config.coefficients_every if config.coefficients_every else 0
            )
            kept["rollouts"] = round(
                log_bytes(self.sampled, self.sampled * usual.completion)
                + self.sampled * (VERDICT_BYTES + coefficients * usual.completion)
            )
            self.keys["rollouts"] = (
                f"lower steps, batch or group_size, or set coefficients_every = 0 {self.where}"
            )
        return kept

    def _tokens(self) -> int:
        """Return the tokens that are trained on."""
        return round(self.usual.steps * self.usual.tokens)

    def _work_done(self) -> tuple[float, float]:
        """Return the operations of matrix products, and the seconds of what is none."""
        book, method, launch = self.book, self.method, self.book.launch
        factor = method.config.updates * 6.0  # type: ignore[attr-defined]
        factor += 2.0 * ("reference" in self.memory or bool(method.reference)) + 6.0 * (
            "critic" in self.memory
        )
        factor += 2.0 * self.judges + 2.0 * self.config.gradient_checkpointing
        # A machine's processes share its cores, and the rate was measured by them or by all.
        ranks = launch.count
        shared = ranks if launch.is_one or book.on_gpu else ranks / launch.here
        operations = factor * self.shape.products * self._tokens() / shared
        decoding = 2.0 * self.shape.products * self.sampled * self.usual.completion / shared
        rest = book.rest(self.shape, operations, decoding)
        if book.on_gpu:
            # Sampled tokens as if they were trained ones, so that one share serves both.
            decoding *= TRAINING_SHARE / SAMPLING_SHARE
        verdicts = self.sampled / (VERDICTS_PER_S * book.run.verify.workers * ranks)
        return operations + decoding, rest + verdicts

    # What is gone through

    def _work(self, longer: float) -> _Work:
        """Return the documents of a step with completions so much longer, and the steps."""
        config, method, lengths = self.config, self.method, self.book.lengths
        prompt, answer = lengths.prompt, lengths.completion
        size, steps = config.batch, config.steps
        if method.source == "rows":
            if config.batch_tokens:
                size = max(1, round(config.batch_tokens / lengths.row))
            epoch = lengths.rows
            return _Work(size, lengths.row, lengths.row, steps or math.ceil(epoch / size))
        if method.source == "policy":
            # A row of the trainer shares a prompt among the samples of a group.
            answer = self.book.completion(config.init, self.book.run.sampling.max_tokens, longer)
            members = config.group_size
            return _Work(size, prompt + members * answer, answer, steps, members)
        if method.source == "samples":
            generated = self.book.generated()
            sampler = self.book.run.generate.model if self.book.run.generate else ""
            answer = self.book.completion(sampler, self.book.run.sampling.max_tokens, longer)
            pairs = 2 if method.trains == "scores" or method.reference else 1
            return _Work(
                size,
                prompt + pairs * answer,
                answer,
                # How many can be used shows only in the verdicts: at most every other sample.
                steps or math.ceil(generated / (2 * pairs) / size),
                pairs,
            )
        members = 2 if method.source == "pairs" else 1
        epoch = math.ceil(lengths.judged / size)
        return _Work(size, prompt + members * answer, answer, steps or epoch, members)
