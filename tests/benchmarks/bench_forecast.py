"""The forecast's times beside the processor time that the stages take, as JSON.

    python tests/benchmarks/bench_forecast.py
    python tests/benchmarks/bench_forecast.py --sizes 1m

The demo's stages, a few steps each, in this process and on one thread, with the demo's model and
with one of 25 million parameters. All is processor time, the rate of matrix products that the
forecast is given too, so that a busy machine shows little. A model of a few steps would write
until it is cut off: it is cut off where one that has learnt would end.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from data_prep.build import build
from data_prep.versions import versions
from pipeline.config import RunConfig
from pipeline.forecast import forecast
from pipeline.generate import generate
from pipeline.kernels import product
from pipeline.run import resolve
from pipeline.train import train
from pipeline.verify import verify

ROOT = Path(__file__).resolve().parents[2]
SIZES: dict[str, dict[str, int]] = {
    "1m": {},
    "25m": {"width": 512, "layers": 8, "heads": 8, "kv_heads": 8, "feed_forward": 1408},
}
STEPS = {
    "1m": {"sft": 100, "rft": 20, "dpo": 20, "grpo": 6},
    "25m": {"sft": 10, "rft": 4, "dpo": 4, "grpo": 2},
}
PROBLEMS = {"1m": 256, "25m": 64}
CHECKER = """
from verifiers.checkers import Checker, Outcome, Verdict


class EvenLength(Checker):
    examples = (("", "ab", "correct"), ("", "a", "incorrect"))

    def check(self, gold, text):
        outcome = Outcome.INCORRECT if len(text) % 2 else Outcome.CORRECT
        return Verdict(outcome, extracted=text, rule="even_length")
"""


def small(folder: Path, size: str) -> RunConfig:
    """Return the demo's run with few steps."""
    run = resolve(ROOT / "pipeline" / "configs" / "cpu.toml", {"out": str(folder / "run")})
    checker = folder / "even_length.py"
    checker.write_text(CHECKER, encoding="utf-8")
    stages = tuple(
        stage.model_copy(
            update={"steps": STEPS[size][stage.name], "validate_every": 0, "save_every": 10**6}
        )
        for stage in run.train
    )
    changes: dict[str, Any] = {
        "train": stages,
        "model": run.model.model_copy(update=SIZES[size]),
        "sampling": run.sampling.model_copy(update={"max_tokens": 32}),
        "verify": run.verify.model_copy(update={"checker": {"kind": str(checker)}}),
    }
    if run.generate is not None:
        changes["generate"] = run.generate.model_copy(update={"limit": PROBLEMS[size]})
    return run.model_copy(update=changes)


def spent(function: Callable[[], object]) -> float:
    """Return the processor time of a call, seconds."""
    began = time.process_time()
    function()
    return time.process_time() - began


def product_rate(width: int, inner: int) -> float:
    """Return the operations a second of processor time, as `pipeline.machine` asks for them."""
    a, b = torch.ones(2048, width), torch.ones(inner, width)
    with torch.inference_mode():
        best = min(spent(lambda: product(a, b)) for _ in range(50))
    return 2.0 * 2048 * width * inner / best


def beside(folder: Path, size: str) -> dict[str, Any]:
    """Return seconds by stage: measured, forecast, and their ratio."""
    run = small(folder, size)
    assert run.data is not None
    assert run.generate is not None
    sampling = run.generate
    build(run.data, Path(run.out), run.seed)
    found: dict[str, Any] = {}
    for name in ("sft", "generate", "rft", "dpo", "grpo"):
        rate = product_rate(run.model.width, min(1024, run.model.feed_forward))
        if name == "generate":
            seconds = spent(lambda: generate(run, sampling))
            verify(run, run.verify)
        else:
            config = next(stage for stage in run.train if stage.name == name)
            seconds = spent(lambda config=config: train(run, config))
        (expected,) = forecast(run, [name])
        # Without what a process takes to start, which this one has behind it.
        work = expected.seconds(rate) - expected.start_s
        found[name] = {
            "measured_s": round(seconds, 2),
            "forecast_s": round(work, 2),
            "forecast_over_measured": round(work / seconds, 2),
            "gflops": round(rate / 1e9),
        }
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=list(SIZES))
    known = parser.parse_args()
    torch.set_num_threads(1)
    result: dict[str, Any] = {"machine": platform.machine(), "versions": versions(), "threads": 1}
    for size in known.sizes:
        with tempfile.TemporaryDirectory() as folder:
            result[size] = beside(Path(folder), size)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
