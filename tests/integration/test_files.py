"""The benchmark of real files, kept small: killed with SIGKILL, resumed, the same samples."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

CONFTEST = Path(__file__).parent.parent / "pipeline" / "conftest.py"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    spec = importlib.util.spec_from_file_location("pipeline_conftest", CONFTEST)
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    folder = tmp_path_factory.mktemp("model") / "tiny"
    return made.make_checkpoint(folder, width=64, heads=2, kv_heads=1, context=1024)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["embedded", pytest.param("vllm", marks=pytest.mark.vllm)])
def test_killed_and_resumed_on_four_files(root, shared, checkpoint, tmp_path, engine):
    done = subprocess.run(
        [
            sys.executable,
            "tests/benchmarks/bench_files.py",
            *("--model", str(checkpoint), "--data", str(shared / "data"), "--engines", engine),
            *("--limit", "12", "--n", "2", "--max-tokens", "24", "--shard-size", "4"),
            *("--out", str(tmp_path / "out")),
        ],
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)["engines"][engine]
    killed, total = found["cut"][0]["killed_after_shards"], found["shards"]
    assert total == 24 and 0 < killed < total
    assert found["processes_left_by_kills"] == 0
    for suite, row in found["whole_against_cut"].items():
        assert row["samples"] == 36, suite
        # vLLM promises the same tokens for the same batches on one build and device; shards are
        # drawn whole, so a resumed run has the batches of an uninterrupted one.
        assert row["differing_samples"] == 0, suite
        assert row["identical_figures"], suite
