"""Real GSM8K, from raw JSONL to an accuracy with an interval, through both engines."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

CONFTEST = Path(__file__).parent.parent / "pipeline" / "conftest.py"
LIMIT = 12


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    spec = importlib.util.spec_from_file_location("pipeline_conftest", CONFTEST)
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    folder = tmp_path_factory.mktemp("model") / "tiny"
    return made.make_checkpoint(folder, width=64, heads=2, kv_heads=1, context=1024)


def evaluate(root: Path, shared: Path, checkpoint: Path, engine: str, out: Path) -> dict:
    file = shared / "data" / "gsm8k" / "test.jsonl"
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "eval.run",
            "--model",
            str(checkpoint),
            "--suites",
            f"gsm8k={file}",
            "--limit",
            str(LIMIT),
            "--n",
            "2",
            "--k",
            "1",
            "2",
            "--max-tokens",
            "24",
            "--engine.kind",
            engine,
            "--out",
            str(out),
            "--name",
            "tiny",
        ],
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "gsm8k" in done.stdout
    (path,) = out.rglob("figures.json")
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("engine", ["embedded", pytest.param("vllm", marks=pytest.mark.vllm)])
def test_the_same_file_gives_an_accuracy_with_an_interval(
    root, shared, checkpoint, tmp_path, engine
):
    found = evaluate(root, shared, checkpoint, engine, tmp_path / "out")
    metrics = found.get("figures", found)
    for name in ("greedy", "avg@2", "pass@2", "maj@2"):
        metric = metrics[name]
        assert metric["n"] == LIMIT
        assert 0 <= metric["low"] <= metric["value"] <= metric["high"] <= 1
