"""What the stages that do not train take, and what the estimates of all stages share.

With P parameters of b bytes and the model's numbers (`pipeline.shape`):

    engine        P b, twice where its products are packed for a CPU
    keys and values   rows · positions · cache · b, and half of it again while they grow
    program       Python with its libraries, and the processes that judge

vLLM takes its share of a GPU, or on a CPU its key-value cache, whatever it is asked to do.

Time on a CPU, with W operations of matrix products (6 a parameter and trained token, 2 a sampled
one), r the rate of products measured on the model's own shapes just before, H its width and c
cores:

    W / r + REST · W / (H c)

What is no product goes over numbers, not over pairs of them, hence the width; REST is measured
(`tests/benchmarks/bench_forecast.py`). On a GPU it is W at a share of r, assumed and not measured.
Both say minutes or hours, not seconds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from pipeline.config import RunConfig
from pipeline.engines._decoder import PACK_BYTES, PREFILL_TOKENS
from pipeline.engines._rows import Size, fitting_size
from pipeline.launch import Launch
from pipeline.lengths import Lengths, vocabulary_of
from pipeline.machine import GIB, MIB, this_machine
from pipeline.methods import create_method
from pipeline.model import pick_device, torch_dtype
from pipeline.shape import Shape, shape_of_config, shape_of_model

# Measured: a training process after its first step on a model of nothing; others load less.
PROGRAM = {"train": 580 * MIB, "sample": 600 * MIB, "judge": 220 * MIB, "data": 180 * MIB}
JUDGING_PROCESS, CONVERTING_PROCESS = 100 * MIB, 30 * MIB
CUDA_CONTEXT = 600 * MIB
# Shares of the rate of matrix products on a GPU.
TRAINING_SHARE, SAMPLING_SHARE = 0.5, 0.15
# Seconds of one core for what is no product, by operations over the model's width.
TRAINING_REST, SAMPLING_REST = 1.1e-9, 3.3e-9
# Rates of other work, as the demo reaches them.
VERDICTS_PER_S, ROWS_PER_S, START_S = 3000.0, 5000.0, 6.0
# A row of a sample log: what it always has, and each token's id, log-prob and text.
SAMPLE_BYTES, TOKEN_BYTES, VERDICT_BYTES = 200, 30, 250
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


class Book:
    """A run with what all its stages share: lengths and shapes.

    Args:
        run: The run.
        lengths: Of its texts.
        launch: The processes that train together.
    """

    def __init__(self, run: RunConfig, lengths: Lengths, launch: Launch) -> None:
        """Look at what it computes on."""
        self.run, self.lengths, self.launch = run, lengths, launch
        self.bytes = torch_dtype(run.model.dtype).itemsize
        self.on_gpu = device_of(run) != "cpu"
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

    def rest(self, shape: Shape, trained: float, sampled: float = 0.0) -> float:
        """Return the seconds of what is no matrix product, by the operations of what is."""
        if self.on_gpu:
            return 0.0
        work = TRAINING_REST * trained + SAMPLING_REST * sampled
        return work / shape.width / torch.get_num_threads()

    def completion(self, model: str, most: int, longer: float = 1.0) -> float:
        """Return the tokens of a completion, or so many times what is usual."""
        if not self.ours(model):
            return float(most)
        return min(float(most), longer * self.lengths.completion)

    def engine(
        self, shape: Shape, n: int, prompts: int, length: float
    ) -> tuple[dict[str, int], dict[str, str]]:
        """Return the memory of who samples, and what would make it less."""
        engine: Any = self.run.engine
        b = 2 if engine.dtype == "bfloat16" else 4
        weights = shape.parameters * b
        beside = 1  # vLLMs on one GPU
        if engine.kind == "vllm_server":
            workers = engine.servers * engine.tensor_parallel
            gpus = torch.cuda.device_count() if self.on_gpu else 0
            # Running already, or on other GPUs than the trainers'.
            if engine.urls or (self.on_gpu and gpus >= workers + self.launch.here):
                return {}, {}
            beside = engine.servers if engine.transfer == "ipc" else -(-workers // max(1, gpus))
        if engine.kind.startswith("vllm"):
            if self.on_gpu:
                share = engine.gpu_memory_share * this_machine(self.run.out).gpu
                return {"vLLM": round(beside * share)}, {"vLLM": "lower engine.gpu_memory_share"}
            cache = engine.memory_gib * GIB
            return {"engine": weights, "keys and values": cache, "vLLM": GIB}, {
                "keys and values": "lower engine.memory_gib",
                "engine": 'set engine.kind = "embedded"',
            }
        if engine.kind != "embedded":
            return {}, {}
        if not self.on_gpu and b == 4 and weights <= PACK_BYTES:
            weights *= 2

        def cached(size: Size) -> int:
            tokens = size.rows * size.completion + size.blocks * size.prompt
            return shape.cache * b * tokens

        prompt = math.ceil(self.lengths.prompt)
        most = engine.memory_gib * GIB
        size = fitting_size(engine.slots, n, prompts, prompt, math.ceil(length), cached, most)
        prefill = min(PREFILL_TOKENS, size.blocks * size.prompt)
        wide = 3 * shape.feed_forward + 4 * shape.width + shape.queries + 2 * shape.keys
        logits = 3 * size.rows * shape.vocabulary * 4
        return {
            "engine": weights,
            "keys and values": round(1.5 * cached(size)),
            "sampling": round(prefill * wide * b + logits),
        }, {
            "engine": "take a smaller model",
            "keys and values": "lower engine.memory_gib or engine.slots",
            "sampling": "lower engine.slots",
        }

    # The stages

    def data(self, name: str) -> Forecast:
        """Return the forecast of what makes the rows: "data" or "mixture"."""
        lengths = self.lengths
        tokens = round(lengths.rows * lengths.row)
        workers = (self.run.mixture or self.run.data).workers  # type: ignore[union-attr]
        text = lengths.problems * PROBLEM_BYTES
        made = max(lengths.rows, lengths.problems)
        if name == "mixture" and (mixture := self.run.mixture) is not None:
            # Its sequences are packed of many rows, and more are read than are taken.
            asked = zip(mixture.sources, mixture.asked(), strict=True)
            made = max(made, sum(max(mixture.scaled(s.pool), rows) for s, rows in asked))
        return Forecast(
            name,
            memory={
                "program": PROGRAM["data"] + workers * CONVERTING_PROCESS,
                # Problems as objects, rows as token ids in lists and arrays.
                "rows": 6 * text + 4 * tokens,
            },
            kept={"rows": tokens * ROW_TOKEN_BYTES, "problems": text},
            tokens=tokens,
            other_s=made / ROWS_PER_S,
            keys={"rows": f"lower {name}.rows, or give it fewer sources"},
        )

    def generate(self) -> Forecast:
        """Return the forecast of sampling for the log."""
        config = self.run.generate
        assert config is not None  # noqa: S101 - asked for where there is one
        problems = config.limit or self.lengths.problems
        samples = problems * config.group_size
        length = self.completion(config.model, self.run.sampling.max_tokens)
        shape = self.shape(config.model)
        if shape is None:
            return Forecast("generate", unknown=self.absent(config.model))
        longest = self.completion(config.model, self.run.sampling.max_tokens, LONGER)
        memory, keys = self.engine(shape, config.group_size, problems, longest)
        tokens = round(samples * length)
        operations = 2.0 * shape.products * (tokens + problems * self.lengths.prompt)
        return Forecast(
            "generate",
            memory={**self.program("sample"), **memory, "samples": 4 * log_bytes(samples, tokens)},
            kept={"samples": log_bytes(samples, tokens)},
            tokens=tokens,
            operations=operations,
            share=SAMPLING_SHARE if self.on_gpu else 1.0,
            other_s=self.rest(shape, 0.0, operations),
            keys=keys | {"samples": "lower generate.limit or generate.group_size"},
        )

    def verify(self) -> Forecast:
        """Return the forecast of judging that log."""
        generated, workers = self.generated(), self.run.verify.workers
        return Forecast(
            "verify",
            memory={"program": PROGRAM["judge"] + workers * JUDGING_PROCESS},
            kept={"verdicts": generated * VERDICT_BYTES},
            other_s=generated / (VERDICTS_PER_S * workers),
            start_s=2.0,
            keys={"program": "lower verify.workers", "verdicts": "lower generate.limit"},
        )

    def generated(self) -> int:
        """Return the samples of that log; 0 without one."""
        config = self.run.generate
        if config is None:
            return 0
        return (config.limit or self.lengths.problems) * config.group_size

    def evaluate(self) -> Forecast:
        """Return the forecast of the evaluation."""
        run, config = self.run, self.run.evaluate
        assert config is not None  # noqa: S101 - asked for where there is one
        names = [s.name for s in run.train if create_method(s.method).trains == "policy"]
        shape = self.shape(names[-1]) if names else None
        if shape is None:
            return Forecast("evaluate", unknown=self.absent(names[-1] if names else "model"))
        questions = self._questions()
        length = self.completion(names[-1], config.max_tokens)
        samples = questions * (config.n + 1) * len(names)
        tokens = round(samples * length)
        longest = self.completion(names[-1], config.max_tokens, LONGER)
        memory, keys = self.engine(shape, max(1, config.n), config.shard_size, longest)
        one = log_bytes(samples, tokens) // max(1, len(names))
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
            kept={"samples": log_bytes(samples, tokens) + samples * VERDICT_BYTES},
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


def log_bytes(samples: float, tokens: float) -> int:
    """Return the size of a log of samples with so many tokens together."""
    return round(samples * SAMPLE_BYTES + tokens * TOKEN_BYTES)


def device_of(run: RunConfig) -> str:
    """Return what a run computes on: "cpu" or a kind of GPU."""
    return pick_device(run.engine.device).type  # type: ignore[attr-defined]
