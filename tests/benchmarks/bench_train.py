"""Training steps beside TRL, in one run: SFT, DPO and GRPO from the same weights on the same data.

    python tests/benchmarks/bench_train.py [--models 1m 25m] [--kinds sft dpo grpo grpo_natural]
    python tests/benchmarks/bench_train.py --out FILE.json
    python tests/benchmarks/bench_train.py --profile     # where an SFT step of ours goes

Both sides load one model folder and take the same rows, pairs or prompts in the same order, with
the same optimizer and batch, in float32; lengths are those of the embedded source, and only real
tokens are counted. Ours is `pipeline.train.train` as it is, data, records and all; TRL's is
`trainer.train()` in its default configuration, and in every other one that could be faster here
(no gradient checkpointing, padding-free, packing, batches of like lengths). Each side is a process
of its own; they take turns by chunks of steps, so that a quieter minute favours none.

GRPO is end to end: generation, rewards, update. `grpo` is rewarded by the parity of the text's
length, so that nearly every group carries signal; `grpo_natural` by the answer.

On a shared machine processor time says more than wall time; both are printed, as JSON, with loss
or reward curves, peak memory, machine, versions and commit.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

MODELS = {
    "1m": {"width": 128, "layers": 4, "heads": 4, "feed_forward": 384, "steps": 400, "limit": 512},
    "25m": {"width": 512, "layers": 8, "heads": 8, "feed_forward": 1408, "steps": 80, "limit": 128},
}
BATCH = {"sft": 32, "dpo": 16, "grpo": 8, "grpo_natural": 8}
GROUP, LONGEST = 8, 64
# Steps of a turn.
TURN = {
    "1m": {"sft": 8, "dpo": 6, "grpo": 3, "grpo_natural": 3},
    "25m": {"sft": 2, "dpo": 2, "grpo": 1, "grpo_natural": 1},
}
UNIT = {"sft": "tokens", "dpo": "pairs", "grpo": "samples", "grpo_natural": "samples"}
RATE = {"sft": 1e-3, "dpo": 3e-5, "grpo": 1e-4, "grpo_natural": 1e-4}
FREE = {"gradient_checkpointing": False}
# TRL's configurations, beside its default.
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "sft": {
        "trl": {},
        "trl_free": FREE,
        "trl_lengths": {**FREE, "train_sampling_strategy": "group_by_length"},
        "trl_padding_free": {**FREE, "padding_free": True, "max_length": None},
        "trl_packing": {
            **FREE,
            "packing": True,
            "max_length": 1024,
            "per_device_train_batch_size": 1,
        },
    },
    "dpo": {
        "trl": {},
        "trl_free": FREE,
        "trl_padding_free": {**FREE, "padding_free": True, "max_length": None},
    },
    "grpo": {"trl": {}, "trl_free": FREE},
    "grpo_natural": {"trl": {}, "trl_free": FREE},
}
CONFIG = """
name = "bench"
seed = 1
out = "{out}"
[data]
profile = "embedded"
rows = 16384
sft_validation_rows = 8
[[data.sources]]
kind = "embedded"
train = 4000
validation = 8
test = 64
[data.tokenizer]
vocab_size = 512
[model]
width = {width}
layers = {layers}
heads = {heads}
kv_heads = {heads}
feed_forward = {feed_forward}
context = 1024
[sampling]
max_tokens = {longest}
[[train]]
name = "start"
batch = 32
steps = {steps}
save_every = 100
method = {{ kind = "sft" }}
optimizer = {{ learning_rate = 1e-3, warmup_steps = 10, schedule = "cosine" }}
[generate]
model = "start"
limit = {limit}
group_size = 8
[verify]
checker = {{ kind = "{checker}" }}
"""
PARITY = '''
from verifiers.checkers import Checker, Outcome, Verdict


class EvenLength(Checker):
    """Correct where the completion has an even number of characters."""

    examples = (("", "ab", "correct"), ("", "a", "incorrect"))

    def check(self, gold, text):
        outcome = Outcome.INCORRECT if len(text) % 2 else Outcome.CORRECT
        return Verdict(outcome, extracted=text, rule="even_length")
'''


def prepare(work: Path, name: str) -> None:
    """Make data, the models to start from, and a log of samples to make pairs of."""
    from data_prep.build import main as build
    from pipeline.config import load_run
    from pipeline.generate import main as generate
    from pipeline.model import build_model, load_tokenizer, save_checkpoint
    from pipeline.train import train
    from pipeline.verify import main as verify

    folder = work / name
    if (folder / "ready").is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "parity.py").write_text(PARITY, encoding="utf-8")
    path = folder / "run.toml"
    shape = {**MODELS[name], "longest": LONGEST, "checker": folder / "parity.py"}
    path.write_text(CONFIG.format(out=folder / "run", **shape), encoding="utf-8")
    build(["--config", str(path)])
    run = load_run(path)
    start = train(run, run.train[0]) / "checkpoint"
    tokenizer = load_tokenizer(start)
    model = build_model(run.model, tokenizer, run.seed)
    ends = [int(model.config.eos_token_id)]
    save_checkpoint(folder / "fresh", model, tokenizer, ends, "embedded")
    generate(["--config", str(path)])
    verify(["--config", str(path)])
    (folder / "ready").touch()


def stage_of(folder: Path, kind: str) -> tuple[Any, Any]:
    """Return the run and the training stage of ours."""
    from pipeline.config import RunConfig, TrainConfig, load_run

    run = load_run(folder / "run.toml")
    method: dict[str, Any] = {"kind": "grpo", "normaliser": "token", "beta": 0.0}
    if kind in ("sft", "dpo"):
        method = {"kind": kind}
    options: dict[str, Any] = {
        "name": f"bench_{kind}_{os.getpid()}",
        "init": str(folder / "fresh") if kind == "sft" else "start",
        "method": method,
        "batch": BATCH[kind],
        "steps": 100_000 if kind.startswith("grpo") else 200,
        "save_every": 10_000,
        "coefficients_every": 0,
        "optimizer": {
            "learning_rate": RATE[kind],
            "betas": (0.9, 0.999),
            "warmup_steps": 0,
            "schedule": "constant",
        },
    }
    if kind.startswith("grpo"):
        options["group_size"] = GROUP
    config = TrainConfig(**options)
    changes = {"train": (*run.train, config)}
    if kind == "grpo_natural":
        changes["verify"] = run.verify.model_copy(update={"checker": {"kind": "boxed"}})
    return RunConfig(**{**run.model_dump(), **changes}), config


def cpu_seconds() -> float:
    """Return the processor time of this process and those that it started."""
    import psutil

    me = psutil.Process()
    times = [p.cpu_times() for p in (me, *me.children(recursive=True))]
    return sum(t.user + t.system for t in times)


class Gate:
    """Lets a training loop run by turns: so many steps for every line on standard input."""

    def __init__(self) -> None:
        """Keep standard output for the answers."""
        self._answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # whatever libraries print goes to standard error
        self.curve: list[float] = []
        self.tokens = self.samples = self.steps = 0
        self.before = 0
        self._left = self._wait()

    def _wait(self) -> int:
        line = sys.stdin.readline()
        if not line:
            self._answers.close()
            os._exit(0)  # in the middle of training, which nobody wants the end of
        self.tokens = self.samples = self.steps = 0
        self._cpu, self._wall = cpu_seconds(), time.perf_counter()
        return int(line)

    def begins(self) -> None:
        """Note the memory before the first step."""
        import psutil

        self.before = self.before or psutil.Process().memory_info().rss

    def step(self) -> None:
        """Count a step; at the end of a turn, answer and wait for the next."""
        self.steps += 1
        self._left -= 1
        if self._left:
            return
        answer = {
            "seconds": time.perf_counter() - self._wall,
            "cpu_s": cpu_seconds() - self._cpu,
            "tokens": self.tokens,
            "samples": self.samples,
            "steps": self.steps,
            "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            "before_mb": self.before / 2**20,
            "curve": self.curve,
        }
        print(json.dumps(answer), file=self._answers, flush=True)
        self._left = self._wait()


def work_ours(folder: Path, kind: str) -> None:
    """Train by the pipeline's loop."""
    gate = Gate()
    from pipeline.records import Records
    from pipeline.train import train
    from pipeline.trainer import Trainer

    run, config = stage_of(folder, kind)
    update, write = Trainer.update, Records.write

    def counted(trainer: Any, sequences: list[Any], *rest: Any) -> Any:
        gate.begins()
        prompts: dict[Any, int] = {}
        for s in sequences:
            prompts[s.group, tuple(s.prompt)] = len(s.prompt)
        gate.tokens += sum(prompts.values()) + sum(len(s.completion) for s in sequences)
        if kind == "dpo":
            gate.samples += len(sequences) // 2
        return update(trainer, sequences, *rest)

    def written(records: Any, step: int, figures: Any, timing: Any) -> None:
        write(records, step, figures, timing)
        if kind.startswith("grpo"):
            gate.samples += int(figures["samples"])
            gate.curve.append(figures["reward_mean"])
        else:
            gate.curve.append(-figures["objective"])
        gate.step()

    Trainer.update, Records.write = counted, written  # type: ignore[method-assign]
    train(run, config)


def work_theirs(folder: Path, kind: str, variant: str) -> None:
    """Train by TRL."""
    gate = Gate()
    import importlib

    # TRL is not told of vLLM, which it would import whole.
    importlib.import_module("trl.import_utils").is_vllm_available = lambda *_, **__: False
    import trl
    from datasets import Dataset
    from transformers import TrainerCallback

    from data_prep.schema import read_problems
    from pipeline.fixed import Rows, read_log
    from pipeline.generate import render_prompts
    from pipeline.methods import create_method
    from pipeline.model import load_model, load_tokenizer
    from verifiers import load_checker

    class Turns(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            gate.begins()

        def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
            name = "reward" if kind.startswith("grpo") else "loss"
            if name in logs:
                gate.curve.append(float(logs[name]))

        def on_step_end(self, *_: Any, **__: Any) -> None:
            gate.samples += BATCH[kind] * (GROUP if kind.startswith("grpo") else 1)
            gate.step()

    run, config = stage_of(folder, kind)
    start = folder / "fresh" if kind == "sft" else folder / "run" / "start" / "checkpoint"
    model, tokenizer = load_model(start), load_tokenizer(start)
    options: dict[str, Any] = {
        "output_dir": str(folder / "trl"),
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "max_steps": 100_000,
        "learning_rate": RATE[kind],
        "lr_scheduler_type": "constant",
        "train_sampling_strategy": "sequential",
        "per_device_train_batch_size": BATCH[kind],
        **VARIANTS[kind][variant],
    }
    more: dict[str, Any] = {}
    if kind == "sft":
        rows = Rows(run.rows, "train")
        documents = rows.take(range(200 * BATCH[kind]))
        table = {
            "input_ids": [s.prompt + s.completion for s in documents],
            "labels": [
                [-100] * len(s.prompt)
                + [t if kept else -100 for t, kept in zip(s.completion, s.mask, strict=True)]
                for s in documents
            ],
        }
        trainer_of, config_of = trl.SFTTrainer, trl.SFTConfig
    elif kind == "dpo":
        log = read_log(Path(run.out) / "generate", Path(run.out) / "verify")
        pairs = create_method(config.method).select(log, run.seed)
        table = {
            "prompt_ids": [chosen.prompt for chosen, _ in pairs],
            "chosen_ids": [chosen.completion for chosen, _ in pairs],
            "rejected_ids": [rejected.completion for _, rejected in pairs],
        }

        class PairsTrainer(trl.DPOTrainer):
            """Takes the pairs as tokens, as they are."""

            def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
                return dataset

        trainer_of, config_of = PairsTrainer, trl.DPOConfig
        more["ref_model"] = load_model(start)
    else:
        problems = list(read_problems(Path(run.out) / "data" / "train.jsonl"))
        prompts = render_prompts(problems, tokenizer, run.profile)
        tokens = {prompt.id: list(prompt.token_ids) for prompt in prompts}
        checker = load_checker(**run.verify.checker)

        def reward(completions: list[str], answer: list[str], **_: Any) -> list[float]:
            pairs = zip(answer, completions, strict=True)
            return [float(checker.check(gold, text).is_correct) for gold, text in pairs]

        class PromptsTrainer(trl.GRPOTrainer):
            """Takes the prompts as tokens, as they are."""

            def _tokenize_prompts(self, prompts: list[str]) -> Any:
                return [tokens[prompt] for prompt in prompts], None, {}

        table = {
            "prompt": [p.id for p in prompts],
            "answer": [p.answer for p in problems],
        }
        trainer_of, config_of = PromptsTrainer, trl.GRPOConfig
        options |= {
            "per_device_train_batch_size": BATCH[kind] * GROUP,
            "num_generations": GROUP,
            "max_completion_length": LONGEST,
        }
        options.pop("train_sampling_strategy")
        more["reward_funcs"] = reward
    trainer = trainer_of(
        model=model,
        args=config_of(**options),
        train_dataset=Dataset.from_dict(table),
        processing_class=tokenizer,
        callbacks=[Turns()],
        **more,
    )
    step = trainer.training_step

    def counted(model: Any, inputs: Any, *rest: Any) -> Any:
        if kind == "sft":
            mask = inputs.get("attention_mask")
            gate.tokens += int(inputs["input_ids"].numel() if mask is None else mask.sum())
        return step(model, inputs, *rest)

    trainer.training_step = counted
    trainer.train()


class Worker:
    """A process that trains by turns."""

    def __init__(self, work: Path, name: str, kind: str, side: str, threads: int) -> None:
        """Start it."""
        words = ["--work", str(work), "--worker", name, kind, side]
        self.process = subprocess.Popen(
            [sys.executable, __file__, *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=(work / name / f"{kind}_{side}.log").open("w"),
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": str(threads)},
        )

    def ask(self, steps: int) -> dict[str, Any]:
        """Return the figures of so many steps."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(f"{steps}\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"a worker ended with status {self.process.wait()}, see its log")
        return json.loads(line)

    def close(self) -> None:
        """End it."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(60)


def compare(work: Path, name: str, kind: str, known: argparse.Namespace) -> dict[str, Any]:
    """Return the rates of both sides, which take turns, and ours over theirs."""
    wanted = {side: v for side, v in VARIANTS[kind].items() if side in known.sides or not v}
    sides = ["boxed", *wanted]
    workers = {s: Worker(work, name, kind, s, known.threads) for s in sides}
    found: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    try:
        for turn in range(known.rounds + 1):
            for side, process in workers.items():
                figures = process.ask(TURN[name][kind] if turn else 2)
                if turn:  # the first turn warms up
                    found[side].append(figures)
    finally:
        for process in workers.values():
            process.close()
    count = "tokens" if UNIT[kind] == "tokens" else "samples"
    table: dict[str, Any] = {}
    for side, rows in found.items():
        last = rows[-1]
        table[side] = {
            f"{UNIT[kind]}_per_s": statistics.median(r[count] / r["seconds"] for r in rows),
            f"{UNIT[kind]}_per_cpu_s": statistics.median(r[count] / r["cpu_s"] for r in rows),
            "peak_mb": round(last["peak_mb"]),
            "training_mb": round(last["peak_mb"] - last["before_mb"]),
            "curve": [round(value, 4) for value in last["curve"]],
        }
    for figure, words in (("per_s", "ratio"), ("per_cpu_s", "ratio_of_cpu_time")):
        key = f"{UNIT[kind]}_{figure}"
        table[words] = {s: table["boxed"][key] / table[s][key] for s in wanted}
    if kind in ("sft", "dpo"):
        curves = [table[side]["curve"] for side in ("boxed", "trl")]
        both = list(zip(*curves, strict=False))
        table["largest_loss_difference"] = max(abs(ours - theirs) for ours, theirs in both)
    return table


def own_clock() -> Callable[[], float]:
    """Return processor time for one thread, right on a busy machine too, else wall time."""
    import torch

    return time.process_time if torch.get_num_threads() == 1 else time.perf_counter


def product_rates() -> dict[str, float]:
    """Return the rate of large float32 products in GFLOP/s: PyTorch's own, and oneDNN's."""
    import torch

    from pipeline.kernels import product

    size, clock = 2048, own_clock()
    a, b = torch.randn(size, size), torch.randn(size, size)
    x, y = a.bfloat16(), b.bfloat16()
    found = {}
    for name, way in {
        "torch": lambda: a @ b,
        "onednn": lambda: product(a, b),
        "onednn_bfloat16": lambda: product(x, y),
    }.items():
        way()
        times = []
        for _ in range(7):
            began = clock()
            way()
            times.append(clock() - began)
        found[name] = 2 * size**3 / min(times) / 1e9
    return found


def profile_sft(work: Path, name: str, threads: int) -> dict[str, Any]:
    """Return the useful arithmetic rate of our SFT steps, and where their time goes."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    from pipeline.fixed import Rows
    from pipeline.methods import create_method
    from pipeline.model import load_tokenizer
    from pipeline.trainer import Trainer, build_trainer

    torch.set_num_threads(threads)
    run, config = stage_of(work / name, "sft")
    rows = Rows(run.rows, "train")
    batches = [rows.take(range(32 * i, 32 * i + 32)) for i in range(12)]
    tokens = sum(len(s.prompt) + len(s.completion) for batch in batches for s in batch)
    result: dict[str, Any] = {"threads": threads, "product_gflops": product_rates()}
    start = work / name / "fresh"
    for precision in ("float32", "bfloat16"):
        chosen = config.model_copy(update={"precision": precision})
        method = create_method(chosen.method)
        trainer: Trainer = build_trainer(run, chosen, method, start, load_tokenizer(start))
        parameters = sum(p.numel() for p in trainer.model.parameters())

        clock = own_clock()

        def epoch(trainer: Trainer = trainer, clock: Callable[[], float] = clock) -> float:
            began = clock()
            for step, batch in enumerate(batches):
                trainer.update(batch, step, 1000)
            return clock() - began

        epoch()
        seconds = min(epoch() for _ in range(5))
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            epoch()
        events = sorted(profiled.key_averages(), key=lambda e: -e.self_cpu_time_total)
        whole = sum(e.self_cpu_time_total for e in events)
        rate = 6 * parameters * tokens / seconds / 1e9
        result[precision] = {
            "tokens_per_s": tokens / seconds,
            "useful_gflops": rate,
            "share_of_product_rate": {k: rate / v for k, v in result["product_gflops"].items()},
            "time_by_operation": {
                e.key: round(e.self_cpu_time_total / whole, 4) for e in events[:16]
            },
        }
    return result


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--kinds", nargs="+", choices=BATCH, default=list(BATCH))
    every = sorted({side for sides in VARIANTS.values() for side in sides})
    parser.add_argument("--sides", nargs="+", choices=every, default=every)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "bench_train")
    parser.add_argument("--prepare", action="store_true", help="make data and models, and stop")
    parser.add_argument("--profile", action="store_true", help="where our SFT steps go, and stop")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    known = parser.parse_args()
    if known.worker:
        name, kind, side = known.worker
        folder = known.work / name
        return work_ours(folder, kind) if side == "boxed" else work_theirs(folder, kind, side)
    work = known.work.resolve()
    for name in known.models:
        prepare(work, name)
    if known.prepare:
        return None
    from data_prep.versions import versions

    commit = ["git", "rev-parse", "HEAD"]
    result: dict[str, Any] = {
        "machine": {"cores": len(os.sched_getaffinity(0)), "processor": platform.processor()},
        "threads": known.threads,
        "date": time.strftime("%Y-%m-%d"),
        "commit": subprocess.run(
            commit, cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.strip(),
        "versions": versions(),
    }
    for name in known.models:
        if known.profile:
            result[name] = profile_sft(work, name, known.threads)
            continue
        for kind in known.kinds:
            result.setdefault(name, {})[kind] = compare(work, name, kind, known)
            if known.out:  # what there is: the whole takes minutes
                known.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    if known.out:
        known.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))
    return None


if __name__ == "__main__":
    main()
