"""The whole pipeline as a user starts it: accuracy rises."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


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
