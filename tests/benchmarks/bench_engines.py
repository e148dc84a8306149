"""Tokens a second of the embedded engine, transformers' `generate` and vLLM, in one run.

    python tests/benchmarks/bench_engines.py [--rounds 3] [--out FILE]

The same model, prompts and lengths for all: 32 prompts × 8 samples at temperature 1, completions
that stop by themselves, with log-probs where an engine returns them. Two models, of 1.9 and 25.8
million parameters, are first trained for some steps on the embedded source, so that their
completions end as real ones do (kept under --work; a second run finds them there). Every engine is
a process of its own, and they take turns, so that a quieter minute favours none.

Where other work shares the machine, wall time says little: tokens a second of processor time, and
`--threads 1`, say more.

`embedded_torch` is our engine without its compiled code, as it is where there is no C++ compiler.

Beside that: the share of the machine's own matrix-product rate that decoding at batch 256 reaches,
both ways, and prompts of 300 tokens on 512 slots. Prints JSON with machine, versions and commit.

Where our time goes, with the 1.9 M model on one core of a machine under load 10, by counters put
into `_decode.cpp`: of 104 ms of processor time a call (torch's way 323), 69 are matrix products,
15.2 Gflop at 220 Gflop/s (oneDNN's large ones reach 269 on the idle core); 20 attention, whose
keys and values, 25 MB for 256 samples, outgrow the second-level cache; 7 rotation and writing them;
2 norms and draws; under 10 Python, half of that the tokenizer's decoding.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from data_prep.versions import versions
from pipeline.engines import Group, Prompt, Sampling

ROOT = Path(__file__).resolve().parents[2]
PROMPTS, SAMPLES, LONGEST = 32, 8, 64
MODELS = {
    "2m": {"width": 192, "layers": 4, "heads": 6, "kv_heads": 6, "feed_forward": 512, "steps": 200},
    "25m": {
        "width": 512,
        "layers": 8,
        "heads": 8,
        "kv_heads": 8,
        "feed_forward": 1408,
        "steps": 60,
    },
}
ENGINES = ("embedded", "embedded_torch", "transformers", "vllm", "vllm_seeded")
CONFIG = """
name = "bench"
seed = 1
out = "{out}"
[data]
profile = "embedded"
rows = 8192
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
kv_heads = {kv_heads}
feed_forward = {feed_forward}
context = 1024
[[train]]
name = "sft"
batch = 32
steps = {steps}
save_every = 50
method = {{ kind = "sft" }}
optimizer = {{ learning_rate = 1e-3, warmup_steps = 10, schedule = "cosine" }}
"""


def prepare(work: Path, name: str) -> Path:
    """Train a model with the pipeline's own stages; return its checkpoint."""
    from data_prep.build import main as build
    from pipeline.config import load_run
    from pipeline.train import train

    path = work / f"{name}.toml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(CONFIG.format(out=work / name, **MODELS[name]), encoding="utf-8")
    run = load_run(path)
    if not (Path(run.out) / "sft" / "checkpoint").is_dir():
        build(["--config", str(path)])
        train(run, run.train[0])
    return Path(run.out) / "sft" / "checkpoint"


def prompts_of(checkpoint: Path, count: int, tokens: int = 0) -> list[Prompt]:
    """Return rendered problems; with `tokens`, each filled up to that length by others."""
    from data_prep.sources.embedded import Config, read
    from pipeline.generate import render_prompts
    from pipeline.model import load_tokenizer

    problems = list(read(Config(train=1, validation=1, test=max(64, count)), 5))[-count:]
    prompts = render_prompts(problems, load_tokenizer(checkpoint), "embedded")
    if not tokens:
        return prompts
    whole = [token for prompt in prompts for token in prompt.token_ids] * 40
    return [
        Prompt(p.id, (*whole[31 * i : 31 * i + tokens - len(p.token_ids)], *p.token_ids))
        for i, p in enumerate(prompts)
    ]


def count_tokens(groups: list[Group]) -> int:
    """Return how many tokens were sampled, end tokens included."""
    return sum(len(c.token_ids) for group in groups for c in group.completions)


def open_embedded(
    checkpoint: Path, compiled: bool | None = None
) -> Callable[[list[Prompt], Sampling], int]:
    """Our engine."""
    from pipeline.engines.embedded import Config, create

    engine = create(Config(compiled=compiled), checkpoint)
    return lambda prompts, sampling: count_tokens(engine.generate(prompts, sampling))


def open_vllm(checkpoint: Path) -> Callable[[list[Prompt], Sampling], int]:
    """vLLM as it is fastest: n samples a request, no seed of their own."""
    from pipeline.engines.vllm import Config, create

    engine: Any = create(Config(), checkpoint)
    import vllm

    def generate(prompts: list[Prompt], sampling: Sampling) -> int:
        parameters = vllm.SamplingParams(
            n=sampling.n,
            temperature=sampling.temperature,
            top_p=1.0,
            top_k=0,
            max_tokens=sampling.max_tokens,
            logprobs=0,
            detokenize=False,
        )
        requests = [{"prompt_token_ids": list(p.token_ids)} for p in prompts]
        outputs = engine._llm.generate(requests, parameters, use_tqdm=False)
        return sum(len(sample.token_ids) for output in outputs for sample in output.outputs)

    return generate


def open_vllm_seeded(checkpoint: Path) -> Callable[[list[Prompt], Sampling], int]:
    """vLLM as the pipeline runs it: a request and a seed for each sample."""
    from pipeline.engines.vllm import Config, create

    engine = create(Config(), checkpoint)
    return lambda prompts, sampling: count_tokens(engine.generate(prompts, sampling))


def open_transformers(checkpoint: Path) -> Callable[[list[Prompt], Sampling], int]:
    """`generate` on the whole batch, prompts padded on the left."""
    from pipeline.model import load_model, load_tokenizer

    model, tokenizer = load_model(checkpoint), load_tokenizer(checkpoint)
    ends = model.generation_config.eos_token_id
    ends = torch.tensor(ends if isinstance(ends, list) else [ends])

    @torch.inference_mode()
    def generate(prompts: list[Prompt], sampling: Sampling) -> int:
        width = max(len(p.token_ids) for p in prompts)
        ids = torch.full((len(prompts), width), tokenizer.pad_token_id)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt.token_ids) :] = torch.tensor(prompt.token_ids)
            mask[row, width - len(prompt.token_ids) :] = 1
        made = model.generate(
            ids,
            attention_mask=mask,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            num_return_sequences=sampling.n,
            max_new_tokens=sampling.max_tokens,
        )[:, width:]
        over = torch.isin(made, ends).int()
        # Tokens up to the first end token, that included.
        return int(((over.cumsum(1) - over) == 0).sum())

    return generate


def matmul_gflops() -> dict[str, float]:
    """Return the rate of large float32 products: PyTorch's own, and oneDNN's."""
    size = 2048
    a, b = torch.randn(size, size), torch.randn(size, size)
    ways: dict[str, Callable[[], Any]] = {"torch": lambda: a @ b}
    if torch.backends.mkldnn.is_available():
        packed = torch.ops.mkldnn._reorder_linear_weight(b, size)
        ways["onednn"] = lambda: torch.ops.mkldnn._linear_pointwise(a, packed, None, "none", [], "")
    found = {}
    for name, way in ways.items():
        way()
        times = [timed(way)[0] for _ in range(7)]
        found[name] = 2 * size**3 / min(times) / 1e9
    return found


def timed(action: Callable[[], Any]) -> tuple[float, Any]:
    """Return seconds and the result."""
    # With one thread processor time is the same where the machine is quiet, and right where not.
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    began = clock()
    result = action()
    return clock() - began, result


def decode_share(checkpoint: Path, compiled: bool | None = None) -> dict[str, Any]:
    """Return the arithmetic rate of decoding at batch 256, and where torch's time goes.

    The difference between runs of 65 and 33 tokens, of rows that never end, is 32 full steps.
    """
    from torch.profiler import ProfilerActivity, profile

    from pipeline.engines.embedded import Config, create

    engine = create(Config(compiled=compiled), checkpoint)
    engine.end_token_ids = []
    prompts = prompts_of(checkpoint, PROMPTS)
    decoder = engine.decoder

    def run(tokens: int) -> float:
        return timed(lambda: engine.generate(prompts, Sampling(n=SAMPLES, max_tokens=tokens)))[0]

    run(65)
    rates, steps = [], 32
    for _ in range(3):
        rates.append(matmul_gflops())
        rates[-1]["seconds"] = (run(65) - run(33)) / steps
    layers = decoder.layers
    matrices = [decoder.head, *(m for x in layers for m in (x.qkv, x.out, x.gate_up, x.down))]
    rows = PROMPTS * SAMPLES
    positions = statistics.mean(len(p.token_ids) for p in prompts) + 49
    products = 2 * rows * sum(m.plain.numel() for m in matrices)
    attention = 4 * rows * positions * decoder.heads * decoder.head_dim * len(layers)
    step_s = statistics.median(rate["seconds"] for rate in rates)
    best = {k: statistics.median(rate[k] for rate in rates) for k in rates[0] if k != "seconds"}
    done = (products + attention) / step_s / 1e9
    figures = {
        "step_ms": step_s * 1e3,
        "tokens_per_s": rows / step_s,
        "decode_gflops": done,
        "matmul_gflops": best,
        "share_of_matmul_rate": done / max(best.values()),
    }
    if decoder.compiled is None:
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            run(33)
        events = sorted(profiled.key_averages(), key=lambda e: -e.self_cpu_time_total)
        whole = sum(e.self_cpu_time_total for e in events)
        figures["time_by_operation"] = {e.key: e.self_cpu_time_total / whole for e in events[:10]}
    return figures


def worker(kind: str, checkpoint: Path) -> None:
    """Answer every line on standard input, a JSON request, by one of figures."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever libraries print goes to standard error
    generate = {
        "embedded": open_embedded,
        "embedded_torch": lambda checkpoint: open_embedded(checkpoint, compiled=False),
        "transformers": open_transformers,
        "vllm": open_vllm,
        "vllm_seeded": open_vllm_seeded,
    }[kind](checkpoint)
    print(json.dumps({"threads": torch.get_num_threads()}), file=answers, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        prompts = prompts_of(checkpoint, asked["prompts"], asked["tokens"])
        sampling = Sampling(n=SAMPLES, max_tokens=asked["longest"], seed=asked["seed"])
        used, began = time.process_time(), time.perf_counter()
        tokens = generate(prompts, sampling)
        seconds, cpu_s = time.perf_counter() - began, time.process_time() - used
        figures = {"seconds": seconds, "cpu_s": cpu_s, "tokens": tokens}
        print(json.dumps(figures), file=answers, flush=True)


class Worker:
    """A process with one engine."""

    def __init__(self, kind: str, checkpoint: Path, threads: int) -> None:
        """Start it and wait until the engine is there."""
        # As many cores as the others have threads; vLLM would keep some for itself.
        cores = sorted(os.sched_getaffinity(0))[:threads]
        environment = os.environ | {
            "OMP_NUM_THREADS": str(threads),
            "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
        }
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--worker", kind, "--model", str(checkpoint)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )
        self.threads = self._read()["threads"]

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"a worker ended with status {self.process.wait()}")
        return json.loads(line)

    def ask(self, **request: int) -> dict[str, Any]:
        """Measure once."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return self._read()

    def close(self) -> None:
        """End it."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(60)


def compare(
    checkpoint: Path, kinds: list[str], rounds: int, threads: int, **request: int
) -> dict[str, Any]:
    """Return tokens a second of every engine, which take turns, and ours over theirs."""
    workers = {kind: Worker(kind, checkpoint, threads) for kind in kinds}
    found: dict[str, list[dict[str, Any]]] = {kind: [] for kind in kinds}
    try:
        for turn in range(rounds + 1):
            for kind, process in workers.items():
                figures = process.ask(seed=turn, **request)
                if turn:  # the first turn warms up
                    found[kind].append(figures)
    finally:
        for process in workers.values():
            process.close()
    table: dict[str, Any] = {}
    for kind, rows in found.items():
        rates = [row["tokens"] / row["seconds"] for row in rows]
        table[kind] = {
            "tokens_per_s": statistics.median(rates),
            "tokens_per_cpu_s": statistics.median(row["tokens"] / row["cpu_s"] for row in rows),
            "all": [round(rate) for rate in rates],
            "mean_length": statistics.mean(row["tokens"] for row in rows)
            / (request["prompts"] * SAMPLES),
            "threads": workers[kind].threads,
        }
    for figure, name in (("tokens_per_s", "ratio"), ("tokens_per_cpu_s", "ratio_of_cpu_time")):
        ours = table["embedded"][figure]
        table[name] = {k: ours / table[k][figure] for k in kinds if k != "embedded"}
    return table


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "bench_engines")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--prepare", action="store_true", help="train the models and stop")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--worker", choices=ENGINES, help=argparse.SUPPRESS)
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    known = parser.parse_args()
    if known.worker:
        worker(known.worker, known.model)
        return
    checkpoints = {name: prepare(known.work.resolve(), name) for name in known.models}
    if known.prepare:
        return
    torch.set_num_threads(known.threads)
    kinds = ["embedded", *(k for k in known.engines if k != "embedded")]
    if importlib.util.find_spec("vllm") is None:
        kinds = [kind for kind in kinds if not kind.startswith("vllm")]
    shape = {"prompts": PROMPTS, "tokens": 0, "longest": LONGEST}
    result: dict[str, Any] = {
        "machine": {"cores": len(os.sched_getaffinity(0)), "processor": platform.processor()},
        "threads": known.threads,
        "commit": subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.strip(),
        "versions": versions(),
    }

    def note(name: str, figures: dict[str, Any]) -> None:
        """Keep what there is: a part may take minutes."""
        result[name] = figures
        if known.out:
            known.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")

    for name, checkpoint in checkpoints.items():
        note(name, compare(checkpoint, kinds, known.rounds, known.threads, **shape))
    if "2m" in checkpoints:
        long = {"prompts": 64, "tokens": 300, "longest": LONGEST}
        plain = [kind for kind in kinds if not kind.startswith("vllm")]
        note("long_prompts_2m", compare(checkpoints["2m"], plain, 1, known.threads, **long))
    for name, checkpoint in checkpoints.items():
        note(f"decode_{name}", decode_share(checkpoint))
        note(f"decode_{name}_torch", decode_share(checkpoint, compiled=False))
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
