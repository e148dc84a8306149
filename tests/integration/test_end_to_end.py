"""The whole pipeline as a user starts it: accuracy rises, and a kill loses nothing."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SMALL_RUN = HERE.parent / "pipeline" / "small_run.py"


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def start(root: Path, *words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", *words],
        cwd=root,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str], timeout: float = 800) -> str:
    """Wait; return the last line printed, which is the report's path."""
    out, err = process.communicate(timeout=timeout)
    assert process.returncode == 0, err[-3000:]
    return out.strip().splitlines()[-1]


def report(folder: Path) -> dict:
    return json.loads((folder / "report" / "report.json").read_text(encoding="utf-8"))


@pytest.mark.timeout(900)
def test_accuracy_rises_from_end_to_end(root, tmp_path):
    out = tmp_path / "run"
    last = finish(
        start(root, "pipeline.run", "--config", str(HERE / "learn.toml"), "--out", str(out))
    )
    assert Path(last) == out / "report" / "report.html"
    page = Path(last).read_text(encoding="utf-8")
    figures = report(out)["figures"]
    assert set(figures) == {"sft", "rft", "dpo", "grpo"}
    sft, rft, dpo, grpo = (figures[name]["embedded"] for name in ("sft", "rft", "dpo", "grpo"))
    for metrics in (sft, rft, dpo, grpo):
        for name in ("greedy", "avg@8", "pass@8", "maj@8"):
            assert metrics[name]["n"] == 200
            assert 0 <= metrics[name]["low"] <= metrics[name]["value"] <= metrics[name]["high"] <= 1
        assert metrics["pass@1"]["value"] == pytest.approx(metrics["avg@8"]["value"])
        assert (
            metrics["pass@8"]["value"] >= metrics["pass@4"]["value"] >= metrics["pass@1"]["value"]
        )
    assert grpo["avg@8"]["low"] > sft["avg@8"]["high"]
    assert rft["avg@8"]["value"] > sft["avg@8"]["value"]
    assert dpo["greedy"]["value"] >= sft["greedy"]["value"]
    # The page shows the very figures of the JSON.
    assert f"{100 * grpo['avg@8']['value']:.1f}" in page


def kill(process: subprocess.Popen[str], *, group: bool) -> None:
    """Kill the run with its stage, or the run alone: then the stage ends by itself."""
    if group:
        os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()
    # Until the last process that holds the pipes is gone.
    process.communicate(timeout=60)


@pytest.mark.timeout(900)
def test_a_run_that_is_killed_five_times_ends_with_the_same_figures(root, tmp_path):
    spec = importlib.util.spec_from_file_location("small_run", SMALL_RUN)
    assert spec is not None
    assert spec.loader is not None
    small = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(small)
    config = small.write_small(tmp_path)
    finish(start(root, "pipeline.run", "--config", str(config), "--out", str(tmp_path / "whole")))

    # Each time as soon as a stage has begun, and a seeded moment more.
    killed = tmp_path / "killed"
    rng = random.Random(11)
    for stage in ("data", "sft", "generate", "grpo", "eval-dpo"):
        process = start(root, "pipeline.run", "--config", str(config), "--out", str(killed))
        while not (killed / f"{stage}.partial").exists():
            assert process.poll() is None, process.communicate()
            time.sleep(0.005)
        time.sleep(rng.random() * 0.3)
        kill(process, group=stage != "generate")
        assert not (killed / "report").exists()
    finish(start(root, "pipeline.run", "--config", str(config), "--out", str(killed)))

    one, two = report(tmp_path / "whole"), report(tmp_path / "killed")
    assert one["figures"] == two["figures"]
    for name in ("sft", "rft", "dpo", "grpo"):
        files = [
            tmp_path / run / name / "checkpoint" / "model.safetensors"
            for run in ("whole", "killed")
        ]
        assert files[0].read_bytes() == files[1].read_bytes()
    assert not list((tmp_path / "killed").glob("*.partial"))
