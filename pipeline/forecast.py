"""What each stage of a run will take: memory, tokens, time and disk, before anything is started.

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
    engine        P b, twice where its products are packed for a CPU
    keys and values   rows · positions · cache · b, and half of it again while they grow
    program       Python with its libraries, and the processes that judge

Where several processes train (N of them), memory is that of one process. `parallel = "fsdp2"`:

    split         weights, gradients, optimizer, reference, critic by N
    gathered      the embeddings and two layers, whole; gradients of the embeddings and one layer
    on the first  the whole training state while it is saved, in main memory

`parallel = "ddp"` splits none of that, and adds a bucket of gradients under way. Engines, reward
models and what judges are whole in each; passes and samples are a process's share of a step. On
CPUs a machine's processes share its memory, and time.

vLLM takes its share of a GPU, or on a CPU its key-value cache, whatever it is asked to do.

Time on a CPU, with W operations of matrix products (6 a parameter and trained token, 2 a sampled
one), r the rate of products measured on the model's own shapes just before, H its width and c
cores:

    W / r + REST · W / (H c)

What is no product goes over numbers, not over pairs of them, hence the width; REST is measured
(`tests/benchmarks/bench_forecast.py`). On a GPU it is W at a share of r, assumed and not measured.
Both say minutes or hours, not seconds.

A stage that cannot fit into memory or on the disk is refused, with the key that would help most.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from data_prep.errors import UserError
from pipeline.attention import CHUNK
from pipeline.config import RunConfig, TrainConfig
from pipeline.engines._decoder import PACK_BYTES, PREFILL_TOKENS
from pipeline.lengths import Lengths, lengths_of, vocabulary_of
from pipeline.logprobs import CHUNK_BYTES, KEEP_BYTES
from pipeline.machine import Machine, product_rate, this_machine
from pipeline.methods import Method, create_method
from pipeline.model import torch_dtype
from pipeline.plan import models_of
from pipeline.ranks import BUCKET_BYTES, Launch, launched
from pipeline.shape import Shape, shape_of_config, shape_of_model

MIB, GIB = 2**20, 2**30
# Measured: a training process after its first step on a model of nothing; others load less.
PROGRAM = {"train": 580 * MIB, "sample": 600 * MIB, "judge": 220 * MIB, "data": 180 * MIB}
JUDGING_PROCESS, CONVERTING_PROCESS = 100 * MIB, 30 * MIB
# What torch loads to split a model, measured on a model of nothing.
SHARDING = 150 * MIB
CUDA_CONTEXT = 600 * MIB
# Shares of the rate of matrix products on a GPU.
TRAINING_SHARE, SAMPLING_SHARE = 0.5, 0.15
# Seconds of one core for what is no product, by operations over the model's width.
TRAINING_REST, SAMPLING_REST = 1.1e-9, 3.3e-9
# Rates of other work, as the demo reaches them.
VERDICTS_PER_S, ROWS_PER_S, START_S = 3000.0, 5000.0, 6.0
# What processes that split the model hold a part of (`pipeline.ranks`).
SPLIT = {"weights", "gradients", "optimizer", "reference", "critic", "policy that samples"}
# A row of a sample log: what it always has, and each token's id, log-prob and text.
SAMPLE_BYTES, TOKEN_BYTES, VERDICT_BYTES, COEFFICIENT_BYTES = 200, 30, 250, 14
# Supervised rows on disk: id and mask of a token.
ROW_TOKEN_BYTES, PROBLEM_BYTES = 5, 400
# Completions of a model that learnt from our rows are about as long as those; at most this much.
LONGER = 1.5


@dataclass(frozen=True, slots=True)
class Forecast:
    """What one stage takes.

    Attributes:
        stage: Its name.
        memory: Part → bytes at the peak of one process, on its GPU where there is one.
        kept: Part → bytes that stay on disk.
        scratch: Bytes that are on disk only until it is complete.
        tokens: Tokens that are trained on, sampled or made.
        operations: Of its matrix products.
        share: Of the machine's rate at which they run.
        other_s: Seconds of what is no matrix product.
        start_s: Seconds of a process's start.
        processes: How many share this machine's main memory.
        first: Bytes of main memory that the first of several processes takes beyond the others:
            for the whole training state while it saves, and for servers that it starts.
        unknown: What could not be told, such as a model that is not on this machine yet.
        keys: Part → what would make it smaller.
    """

    stage: str
    memory: dict[str, int] = field(default_factory=dict)
    kept: dict[str, int] = field(default_factory=dict)
    scratch: int = 0
    tokens: int = 0
    operations: float = 0.0
    share: float = 1.0
    other_s: float = 0.0
    start_s: float = START_S
    processes: int = 1
    first: int = 0
    unknown: str = ""
    keys: dict[str, str] = field(default_factory=dict)

    @property
    def peak(self) -> int:
        """Bytes of memory of one process at the worst moment."""
        return sum(self.memory.values())

    @property
    def on_machine(self) -> int:
        """Bytes of memory of all processes that share this machine's."""
        return self.peak * self.processes + self.first

    @property
    def disk(self) -> int:
        """Bytes that stay on disk."""
        return sum(self.kept.values())

    def seconds(self, rate: float) -> float:
        """Return the time at a rate of matrix products, operations a second."""
        return self.start_s + self.other_s + self.operations / (rate * self.share)


def forecast(
    run: RunConfig, names: Iterable[str] | None = None, launch: Launch | None = None
) -> list[Forecast]:
    """Return the forecast of a run's stages, in the order of their inputs.

    Args:
        run: The run.
        names: Only these stages.
        launch: The processes that train together; empty for those that a launcher started.
    """
    from pipeline.run import stages_of

    wanted = [name for name, _ in stages_of(run) if names is None or name in set(names)]
    book = _Book(run, lengths_of(run), launch or launched())
    return [book.stage(name) for name in wanted if name != "report"]


class _Book:
    """A run with what all its stages share: lengths and shapes."""

    def __init__(self, run: RunConfig, lengths: Lengths, launch: Launch) -> None:
        self.run, self.lengths, self.launch = run, lengths, launch
        self.bytes = torch_dtype(run.model.dtype).itemsize
        self.on_gpu = _device(run) != "cpu"
        self.stages = {stage.name: stage for stage in run.train}

    def origin(self, name: str) -> str:
        """Return the model that a stage began with, or another's did; "" for the run's own."""
        seen: set[str] = set()
        while name in self.stages and name not in seen:
            seen.add(name)
            name = self.stages[name].init
        return self.run.model.path if name == "model" else name

    def shape(self, name: str) -> Shape | None:
        """Return the shape of the model that a stage's name, or a path, stands for."""
        origin = self.origin(name)
        if origin:
            return shape_of_model(origin)
        return shape_of_config(self.run.model, vocabulary_of(self.run))

    def absent(self, name: str) -> str:
        """Return why nothing is known of a model."""
        return f"the model {self.origin(name)!r} is not on this machine yet"

    def ours(self, name: str) -> bool:
        """Return whether a model learnt from this run's rows, so that it writes as they do."""
        return name in self.stages

    def program(self, kind: str, judges: int = 0) -> dict[str, int]:
        """Return the memory of a process and of those that judge for it."""
        if self.on_gpu:
            return {"program": CUDA_CONTEXT}
        return {"program": PROGRAM[kind] + judges * JUDGING_PROCESS}

    def stage(self, name: str) -> Forecast:
        """Return the forecast of one stage."""
        if name in ("data", "mixture"):
            return self._data(name)
        if name == "generate":
            return self._generate()
        if name == "verify":
            return self._verify()
        if name == "evaluate":
            return self._evaluate()
        return self._train(self.stages[name])

    def rest(self, shape: Shape, trained: float, sampled: float = 0.0) -> float:
        """Return the seconds of what is no matrix product, by the operations of what is."""
        if self.on_gpu:
            return 0.0
        work = TRAINING_REST * trained + SAMPLING_REST * sampled
        return work / shape.width / torch.get_num_threads()

    # The stages

    def _data(self, name: str) -> Forecast:
        lengths = self.lengths
        tokens = round(lengths.rows * lengths.row)
        workers = (self.run.mixture or self.run.data).workers  # type: ignore[union-attr]
        text = lengths.problems * PROBLEM_BYTES
        return Forecast(
            name,
            memory={
                "program": PROGRAM["data"] + workers * CONVERTING_PROCESS,
                # Problems as objects, rows as token ids in lists and arrays.
                "rows": 6 * text + 4 * tokens,
            },
            kept={"rows": tokens * ROW_TOKEN_BYTES, "problems": text},
            tokens=tokens,
            other_s=max(lengths.rows, lengths.problems) / ROWS_PER_S,
            keys={"rows": f"lower {name}.rows, or give it fewer sources"},
        )

    def _generate(self) -> Forecast:
        config = self.run.generate
        assert config is not None  # noqa: S101 - asked for where there is one
        problems = config.limit or self.lengths.problems
        samples = problems * config.group_size
        length = self._completion(config.model, self.run.sampling.max_tokens)
        shape = self.shape(config.model)
        if shape is None:
            return Forecast("generate", unknown=self.absent(config.model))
        longest = self._completion(config.model, self.run.sampling.max_tokens, LONGER)
        memory, keys = self._engine(shape, config.group_size, problems, longest)
        tokens = round(samples * length)
        operations = 2.0 * shape.products * (tokens + problems * self.lengths.prompt)
        return Forecast(
            "generate",
            memory={**self.program("sample"), **memory, "samples": 4 * _log(samples, tokens)},
            kept={"samples": _log(samples, tokens)},
            tokens=tokens,
            operations=operations,
            share=SAMPLING_SHARE if self.on_gpu else 1.0,
            other_s=self.rest(shape, 0.0, operations),
            keys=keys | {"samples": "lower generate.limit or generate.group_size"},
        )

    def _verify(self) -> Forecast:
        generated, workers = self._generate_counts(), self.run.verify.workers
        return Forecast(
            "verify",
            memory={"program": PROGRAM["judge"] + workers * JUDGING_PROCESS},
            kept={"verdicts": generated * VERDICT_BYTES},
            other_s=generated / (VERDICTS_PER_S * workers),
            start_s=2.0,
            keys={"program": "lower verify.workers", "verdicts": "lower generate.limit"},
        )

    def _generate_counts(self) -> int:
        config = self.run.generate
        if config is None:
            return 0
        return (config.limit or self.lengths.problems) * config.group_size

    def _evaluate(self) -> Forecast:
        run, config = self.run, self.run.evaluate
        assert config is not None  # noqa: S101 - asked for where there is one
        names = [s.name for s in run.train if create_method(s.method).trains == "policy"]
        shape = self.shape(names[-1]) if names else None
        if shape is None:
            return Forecast("evaluate", unknown=self.absent(names[-1] if names else "model"))
        questions = self._questions()
        length = self._completion(names[-1], config.max_tokens)
        samples = questions * (config.n + 1) * len(names)
        tokens = round(samples * length)
        longest = self._completion(names[-1], config.max_tokens, LONGER)
        memory, keys = self._engine(shape, max(1, config.n), config.shard_size, longest)
        one = _log(samples, tokens) // max(1, len(names))
        # A question's greedy sample and the others compute its prompt once each.
        prompts = 2 * questions * len(names) * self.lengths.prompt
        operations = 2.0 * shape.products * (tokens + prompts)
        return Forecast(
            "evaluate",
            memory={
                **self.program("sample", config.workers),
                **memory,
                "samples": 4 * one,
            },
            kept={"samples": _log(samples, tokens) + samples * VERDICT_BYTES},
            tokens=tokens,
            operations=operations,
            share=SAMPLING_SHARE if self.on_gpu else 1.0,
            other_s=self.rest(shape, 0.0, operations) + samples / (VERDICTS_PER_S * config.workers),
            keys=keys | {"samples": "lower evaluate.n, or set evaluate.limit"},
        )

    def _questions(self) -> int:
        """Return the questions of all suites; those of a file that is not here count as 1,000."""
        config, total = self.run.evaluate, 0
        assert config is not None  # noqa: S101 - asked for where there is one
        for suite in config.suites:
            name, _, given = suite.partition("=")
            path = Path(given or config.paths.get(name, ""))
            count = 1000
            if name == "embedded" and self.run.data is not None:
                sizes = [getattr(source, "test", 0) for source in self.run.data.sources]
                count = sum(size for size in sizes if isinstance(size, int)) or count
            elif path.is_file():
                with path.open("rb") as file:
                    count = sum(1 for line in file if line.strip())
            total += min(count, config.limit) if config.limit else count
        return total

    def _train(self, config: TrainConfig) -> Forecast:
        run, method = self.run, create_method(config.method)
        shape = self.shape(config.name)
        if shape is None:
            return Forecast(config.name, unknown=self.absent(config.init))
        where = f"of stage {config.name!r}"
        b, parameters = self.bytes, shape.parameters
        trained = shape.adapters(config.lora.rank) if config.lora.rank else parameters
        # Time goes by what is usual, memory by what may come.
        work, worst = self._work(config, method, 1.0), self._work(config, method, LONGER)
        # Products in bfloat16 keep their factors for the backward pass, or a layer's at a time.
        copies = 2 * parameters * (config.precision == "bfloat16")
        if config.gradient_checkpointing:
            copies //= shape.layers
        memory = {
            **self.program("train"),
            "weights": parameters * b + trained * b * bool(config.lora.rank),
            "gradients": trained * b,
            "optimizer": 3 * trained * b,
        }
        if copies:
            memory["copies in bfloat16"] = copies
        keys = {
            "copies in bfloat16": f"set gradient_checkpointing {where}",
            "weights": "take a smaller model (model.path, or the keys of [model])",
            "gradients": f"set lora.rank {where}, which trains adapters alone",
            "optimizer": f"set lora.rank {where}, which trains adapters alone",
        }
        if (method.reference or config.watch_reference) and not config.lora.rank:
            memory["reference"] = parameters * b
            keys["reference"] = f"set lora.rank {where}, or method.beta = 0 where it has one"
        if method.critic == "separate":
            memory["critic"] = parameters * b + 4 * trained * b
            keys["critic"] = f'set method.critic = "head" {where}'
        if method.refresh > 1:
            memory["policy that samples"] = parameters * b
            keys["policy that samples"] = f"set method.refresh = 1 {where}"
        judges = len([key for key in models_of(config, method) if key.startswith("reward")])
        if judges:
            retrained = 4 * parameters * b if config.reward.retrain else 0
            memory["reward models"] = judges * parameters * b + retrained
            keys["reward models"] = f"remove reward.model or reward.process {where}"
        ranks = self.launch.count
        passes = self._passes(config, method, shape, worst)
        memory |= passes
        few = f"lower micro_tokens {where}"
        checkpointing = "" if config.gradient_checkpointing else " or set gradient_checkpointing"
        keys |= {"activations": few + checkpointing, "attention": few, "log-probs": few}
        sampled, first = 0, 0
        if method.source == "policy":
            engine, engine_keys = self._engine(
                shape,
                method.samples(config.group_size),
                math.ceil(config.batch / ranks),
                worst.completion,
            )
            if ranks > 1 and run.engine.among == "leader":
                first = 0 if self.on_gpu else sum(engine.values())
            else:
                memory |= engine
            keys |= engine_keys
            if not self.on_gpu:
                memory["program"] += run.verify.workers * JUDGING_PROCESS
            # Moving every parameter once, to see that the engine takes them.
            memory["optimizer"] = max(memory["optimizer"], trained * b)
            sampled = work.steps * config.batch * method.samples(config.group_size)
        kept = {"checkpoint": parameters * b + 2 * MIB * (not self.run.model.path)}
        keys["checkpoint"] = "take a smaller model, or another disk (out)"
        if sampled:
            coefficients = (
                COEFFICIENT_BYTES / config.coefficients_every if config.coefficients_every else 0
            )
            kept["rollouts"] = round(
                _log(sampled, sampled * work.completion)
                + sampled * (VERDICT_BYTES + coefficients * work.completion)
            )
            keys["rollouts"] = (
                f"lower steps, batch or group_size, or set coefficients_every = 0 {where}"
            )
        factor = method.config.updates * 6.0  # type: ignore[attr-defined]
        factor += 2.0 * ("reference" in memory or bool(method.reference)) + 6.0 * (
            "critic" in memory
        )
        factor += 2.0 * judges + 2.0 * config.gradient_checkpointing
        tokens = round(work.steps * work.tokens)
        # The states that a killed run goes on from, and one that is being written.
        state = 3 * trained * b
        if ranks > 1 and self.launch.kind(config.parallel) == "fsdp2":
            for part in SPLIT & memory.keys():
                memory[part] //= ranks
            # The embeddings, and a layer at work beside the one that is fetched; then gradients
            # of the embeddings and a layer on their way to those who keep them.
            embeddings = shape.vocabulary * shape.width * (2 - shape.tied)
            layer = (parameters - embeddings) // shape.layers
            memory["gathered"] = (2 * embeddings + (min(2, shape.layers) + 1) * layer) * b
            keys["gathered"] = "take a smaller model (model.path)"
            if not self.on_gpu:
                memory["program"] += SHARDING
                # Saved between the steps, when nothing is gathered and no pass is under way.
                first += max(0, state - memory["gathered"] - sum(passes.values()))
        elif ranks > 1:
            largest = shape.vocabulary * shape.width
            memory["gradients under way"] = min(trained, BUCKET_BYTES // b + largest) * b
            keys["gradients under way"] = keys["gradients"]
        # A machine's processes share its cores, and the rate was measured by them or by all.
        shared = ranks if self.launch.is_one or self.on_gpu else ranks / self.launch.here
        operations = factor * shape.products * tokens / shared
        decoding = 2.0 * shape.products * sampled * work.completion / shared
        rest = self.rest(shape, operations, decoding)
        if self.on_gpu:
            # Sampled tokens as if they were trained ones, so that one share serves both.
            decoding *= TRAINING_SHARE / SAMPLING_SHARE
        return Forecast(
            config.name,
            memory=memory,
            kept=kept,
            scratch=(config.keep_states + 1) * state,
            tokens=tokens,
            operations=operations + decoding,
            share=TRAINING_SHARE if self.on_gpu else 1.0,
            other_s=rest + sampled / (VERDICTS_PER_S * run.verify.workers * ranks),
            keys=keys,
            processes=1 if self.on_gpu else self.launch.here,
            first=first,
        )

    # What they are made of

    def _completion(self, model: str, most: int, longer: float = 1.0) -> float:
        """Return the tokens of a completion, or so many times what is usual."""
        if not self.ours(model):
            return float(most)
        return min(float(most), longer * self.lengths.completion)

    def _work(self, config: TrainConfig, method: Method, longer: float) -> _Work:
        """Return the documents of a step with completions so much longer, and the steps."""
        lengths = self.lengths
        prompt, answer = lengths.prompt, lengths.completion
        size, steps = config.batch, config.steps
        if method.source == "rows":
            if config.batch_tokens:
                size = max(1, round(config.batch_tokens / lengths.row))
            epoch = lengths.rows
            return _Work(size, lengths.row, lengths.row, steps or math.ceil(epoch / size))
        if method.source == "policy":
            # A row of the trainer shares a prompt among the samples of a group.
            answer = self._completion(config.init, self.run.sampling.max_tokens, longer)
            members = config.group_size
            return _Work(size, prompt + members * answer, answer, steps, members)
        if method.source == "samples":
            generated = self._generate_counts()
            sampler = self.run.generate.model if self.run.generate else ""
            answer = self._completion(sampler, self.run.sampling.max_tokens, longer)
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

    def _passes(
        self, config: TrainConfig, method: Method, shape: Shape, work: _Work
    ) -> dict[str, int]:
        """Return what a forward and backward pass keeps."""
        b = 2 if config.precision == "bfloat16" else self.bytes
        document = min(work.document, shape.context * max(1, work.members))
        tokens = min(max(config.micro_tokens, document), work.tokens)
        tokens = min(tokens, max(document, work.tokens / self.launch.count))
        layer = tokens * shape.kept * b
        if config.gradient_checkpointing:
            activations = tokens * shape.width * b * shape.layers + layer
        else:
            activations = layer * (shape.layers + 1)
        held_out = self.lengths.held_out * self.lengths.row if config.validate_every else 0.0
        if method.source == "rows":
            looked_at = min(float(config.micro_tokens), held_out)
            activations = max(activations, looked_at * shape.kept * b)
        rows = max(1.0, tokens / document)
        if self.on_gpu:
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

    def _engine(
        self, shape: Shape, n: int, prompts: int, length: float
    ) -> tuple[dict[str, int], dict[str, str]]:
        """Return the memory of who samples, and what would make it less."""
        engine: Any = self.run.engine
        b = 2 if engine.dtype == "bfloat16" else 4
        weights = shape.parameters * b
        if engine.kind == "vllm_server":
            workers = engine.servers * engine.tensor_parallel
            # Running already, or on other GPUs than the trainer's.
            if engine.urls or (self.on_gpu and torch.cuda.device_count() > workers):
                return {}, {}
        if engine.kind.startswith("vllm"):
            if self.on_gpu:
                share = round(engine.gpu_memory_share * this_machine(self.run.out).gpu)
                return {"vLLM": share}, {"vLLM": "lower engine.gpu_memory_share"}
            cache = engine.memory_gib * GIB
            return {"engine": weights, "keys and values": cache, "vLLM": GIB}, {
                "keys and values": "lower engine.memory_gib",
                "engine": 'set engine.kind = "embedded"',
            }
        if engine.kind != "embedded":
            return {}, {}
        if not self.on_gpu and b == 4 and weights <= PACK_BYTES:
            weights *= 2
        row = shape.cache * b * length
        slots = min(
            max(min(engine.slots, int(engine.memory_gib * GIB / max(1.0, row))), n), n * prompts
        )
        blocks = min(2 * max(1, slots // n), prompts)
        cache = 1.5 * (slots * row + blocks * shape.cache * b * self.lengths.prompt)
        prefill = min(PREFILL_TOKENS, blocks * self.lengths.prompt)
        wide = 3 * shape.feed_forward + 4 * shape.width + shape.queries + 2 * shape.keys
        logits = 3 * slots * shape.vocabulary * 4
        return {
            "engine": weights,
            "keys and values": round(cache),
            "sampling": round(prefill * wide * b + logits),
        }, {
            "engine": "take a smaller model",
            "keys and values": "lower engine.memory_gib or engine.slots",
            "sampling": "lower engine.slots",
        }


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


def _log(samples: float, tokens: float) -> int:
    return round(samples * SAMPLE_BYTES + tokens * TOKEN_BYTES)


def _device(run: RunConfig) -> str:
    from pipeline.model import pick_device

    return pick_device(run.engine.device).type  # type: ignore[attr-defined]


def rate_of(run: RunConfig) -> float:
    """Return this machine's rate of matrix products of the run's model, operations a second."""
    book = _Book(run, Lengths(), Launch())
    shape = book.shape("model")
    width, inner = (1024, 4096) if shape is None else (shape.width, shape.feed_forward)
    precisions = {stage.precision for stage in run.train} or {"float32"}
    return product_rate(width, inner, _device(run), min(precisions))


def table(found: Sequence[Forecast], rate: float, lengths: Lengths) -> str:
    """Return the forecast as text.

    Args:
        found: Stage by stage.
        rate: Of matrix products, operations a second.
        lengths: What it was made from.
    """
    head = ("stage", "memory", "tokens", "time", "disk", "most of the memory")
    lines: list[tuple[str, ...]] = [head]
    for stage in found:
        if stage.unknown:
            lines.append((stage.stage, "?", "?", "?", "?", stage.unknown))
            continue
        largest = sorted(stage.memory.items(), key=lambda part: -part[1])[:3]
        parts = ", ".join(f"{name} {size_text(size)}" for name, size in largest)
        lines.append(
            (
                stage.stage,
                (f"{stage.processes} × " if stage.processes > 1 else "") + size_text(stage.peak),
                count_text(stage.tokens),
                time_text(stage.seconds(rate)),
                size_text(stage.disk),
                parts,
            )
        )
    known = [stage for stage in found if not stage.unknown]
    total = (
        "all",
        size_text(max((s.on_machine for s in known), default=0)),
        count_text(sum(s.tokens for s in known)),
        time_text(sum(s.seconds(rate) for s in known)),
        size_text(sum(s.disk for s in known) + max((s.scratch for s in known), default=0)),
        "(largest memory; disk with training states)",
    )
    rows = [*lines, total] if len(known) > 1 else lines
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    text = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    source = "counted by the data stage" if lengths.counted else "estimated from the first rows"
    text.append(
        f"lengths {source}: prompts {lengths.prompt:.0f} tokens, answers {lengths.completion:.0f}; "
        f"matrix products {rate / 1e9:.0f} Gflop/s here"
    )
    return "\n".join(text)


def refuse_what_cannot_fit(
    run: RunConfig, found: Sequence[Forecast], machine: Machine | None = None
) -> list[str]:
    """Refuse a run that memory or disk cannot hold; return warnings about what is tight.

    Args:
        run: The run.
        found: Its forecast.
        machine: What there is; by default this one.

    Raises:
        UserError: A stage needs more than the machine has, with the key that would help most.
    """
    machine = machine or this_machine(run.out)
    on_gpu = machine.gpu > 0 and _device(run) != "cpu"
    warnings: list[str] = []
    for stage in found:
        needs_gpu = on_gpu and stage.stage not in ("data", "mixture", "verify")
        need = stage.on_machine
        total = machine.gpu if needs_gpu else machine.memory
        free = machine.gpu_free if needs_gpu else machine.available
        what = "GPU memory" if needs_gpu else "memory"
        among = f" in {stage.processes} processes" if stage.processes > 1 else ""
        if need > total:
            part, size, fix = _largest(stage, stage.memory)
            raise UserError(
                f"stage {stage.stage!r}",
                f"it would take about {size_text(need)} of {what}{among}, "
                f"{size_text(size * stage.processes)} of it for {part}",
                f"at most {size_text(total)}, which this machine has",
                f"{fix}; or go on in spite of it with --no-forecast",
            )
        if need > free:
            warnings.append(
                f"stage {stage.stage!r} would take about {size_text(need)} of {what}{among}, and "
                f"{size_text(free)} is free now"
            )
    there = _size_of(Path(run.out))
    need = sum(s.disk for s in found) + max((s.scratch for s in found), default=0) - there
    if need > machine.disk:
        stage = max(found, key=lambda s: s.disk + s.scratch)
        parts = {**stage.kept, "training states": stage.scratch}
        keys = {**stage.keys, "training states": "set lora.rank, or take a smaller model"}
        part, size, fix = _largest(replace(stage, keys=keys), parts)
        raise UserError(
            f"out = {run.out!r}",
            f"it would take about {size_text(need)} of disk, {size_text(size)} of it for {part} "
            f"of stage {stage.stage!r}",
            f"at most {size_text(machine.disk)}, which is free there",
            f"give out another disk, or {fix}; or go on with --no-forecast",
        )
    return warnings


def _largest(stage: Forecast, parts: dict[str, int]) -> tuple[str, int, str]:
    """Return the largest part that a key can make smaller, its size, and how."""
    some = {name: size for name, size in parts.items() if name in stage.keys} or parts
    name = max(some, key=lambda part: some[part])
    return name, some[name], stage.keys.get(name, "take a smaller model")


def _size_of(folder: Path) -> int:
    if not folder.is_dir():
        return 0
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def announce(
    run: RunConfig, names: Iterable[str] | None = None, launch: Launch | None = None
) -> None:
    """Print what the stages will take, and refuse what cannot fit.

    Args:
        run: The run.
        names: Only these stages.
        launch: As `forecast` takes it.

    Raises:
        UserError: A stage needs more than this machine has.
    """
    found = forecast(run, names, launch)
    print(table(found, rate_of(run), lengths_of(run)), file=sys.stderr)
    for warning in refuse_what_cannot_fit(run, found):
        print(f"warning: {warning}", file=sys.stderr)


def size_text(size: float) -> str:
    """Return bytes as "1.2 GiB"."""
    for unit, scale in (("GiB", GIB), ("MiB", MIB)):
        if size >= scale:
            digits = 1 if size < 10 * scale else 0
            return f"{size / scale:,.{digits}f} {unit}"
    return f"{size / 1024:.0f} KiB"


def count_text(count: float) -> str:
    """Return a count as "2.2 M"."""
    for unit, scale in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count:.0f}" if count else "–"


def time_text(seconds: float) -> str:
    """Return seconds as "3 min"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 172800 else f"{seconds / 86400:.1f} days"
