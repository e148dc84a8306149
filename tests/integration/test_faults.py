"""Faults: whatever ends a run, or damages its folder, nothing silently differs afterwards."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

DRIVER = Path(__file__).with_name("fault_run.py")
STAGES = {
    "data_prep.mixture",
    "data_prep.build",
    "sft",
    "pipeline.generate",
    "pipeline.verify",
    "rft",
    "dpo",
    "grpo",
    "ppo",
    "eval.run",
    "eval.report",
}


def drive(root: Path, fault: str, folder: Path, times: int, seed: int = 1) -> dict[str, Any]:
    """Run the driver; return what it found."""
    done = subprocess.run(
        [
            *(sys.executable, str(DRIVER), fault, "--out", str(folder)),
            *("--times", str(times), "--seed", str(seed)),
        ],
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, f"{done.stdout[-3000:]}{done.stderr[-3000:]}"
    return json.loads(done.stdout.splitlines()[-1])


def test_a_run_that_is_killed_five_times_ends_bit_for_bit_the_same(root, tmp_path):
    found = drive(root, "kill", tmp_path, times=5)
    assert len(found["kills"]) == 5
    assert len({kill["in"] for kill in found["kills"]}) >= 3
    assert found["files"] > 150
    assert found["differences"] == []


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_run_that_is_killed_fifty_times_ends_bit_for_bit_the_same(root, tmp_path):
    found = drive(root, "kill", tmp_path, times=50)
    assert len(found["kills"]) == 50
    assert {kill["in"] for kill in found["kills"]} == STAGES
    assert {kill["kind"] for kill in found["kills"]} == {"before", "torn", "moment"}
    assert found["differences"] == []
