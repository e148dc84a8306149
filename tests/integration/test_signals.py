"""Ctrl-C, SIGTERM and a starter that dies, with the processes that a user has."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from data_prep.interruption import Interruption

SMALL_RUN = Path(__file__).parent.parent / "pipeline" / "small_run.py"


@pytest.fixture
def config(tmp_path) -> Path:
    """A run whose first training stage takes long, and saves nothing by itself."""
    spec = importlib.util.spec_from_file_location("small_run", SMALL_RUN)
    assert spec is not None
    assert spec.loader is not None
    small: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(small)
    text = small.SMALL.replace("steps = 8\nsave_every = 3", "steps = 100000\nsave_every = 100000")
    assert text != small.SMALL
    return small.write_small(tmp_path, text=text.replace("validate_every = 4", "", 1))


def start(root: Path, config: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "pipeline.run", "--config", str(config), "--no-forecast"],
        cwd=root,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
        # Whatever it is for who runs the tests: a background job of a shell has it ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def wait_for_steps(process: subprocess.Popen[str], records: Path, more_than: int) -> None:
    while not records.is_file() or records.read_bytes().count(b"\n") <= more_than:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


def saved(folder: Path) -> int:
    """Return the steps of the newest state, and look at the records: no step is lost."""
    states = sorted((folder / "state").glob("step-*"))
    note = json.loads((states[-1] / "state.json").read_text("utf-8"))
    rows = (folder / "steps.jsonl").read_bytes().splitlines()
    assert note["step"] == len(rows)
    return note["step"]


def test_a_signal_ends_the_step_and_says_how_to_go_on(root, tmp_path, config):
    folder = tmp_path / "run" / "sft.partial"
    # As a terminal sends Ctrl-C: to the run and to its stage.
    process = start(root, config)
    wait_for_steps(process, folder / "steps.jsonl", 2)
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 130, said[-2000:]
    assert "Traceback" not in said
    resolved = tmp_path / "run" / "config.toml"
    assert f"go on with: python -m pipeline.train --config {resolved} --stage sft" in said
    assert f"go on with: python -m pipeline.run --config {config} --no-forecast" in said
    first = saved(folder)

    # The run alone is killed: its stage ends by itself, and nothing is lost.
    process = start(root, config)
    wait_for_steps(process, folder / "steps.jsonl", first + 2)
    process.kill()
    process.communicate(timeout=120)
    assert saved(folder) > first


# A method that sends its own process SIGTERM while the last of three steps is taken.
LAST_STEP = '''
import os
import signal

from pipeline.methods.sft import Config, Sft


class Last(Sft):
    """Trains as SFT does."""

    seen = 0

    def gradient_coefficient(self, tokens, logp):
        self.seen += 1
        if self.seen == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().gradient_coefficient(tokens, logp)


def create(config):
    return Last(config)
'''


def test_a_signal_of_the_last_step_ends_the_run_when_the_stage_is_published(root, tmp_path, config):
    method = tmp_path / "last_step.py"
    method.write_text(LAST_STEP, encoding="utf-8")
    text = config.read_text("utf-8").replace("steps = 100000\nsave_every = 100000", "steps = 3", 1)
    text = text.replace('method = { kind = "sft" }', f'method = {{ kind = "{method}" }}', 1)
    config.write_text(text.partition("[generate]")[0], "utf-8")
    process = start(root, config)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 130, said[-2000:]
    assert "stopping when this step is complete" in said
    assert "Traceback" not in said
    resolved = tmp_path / "run" / "config.toml"
    assert f"go on with: python -m pipeline.train --config {resolved} --stage sft" in said
    assert f"go on with: python -m pipeline.run --config {config} --no-forecast" in said
    # Nothing is left to be done of this stage, and the next one has not begun.
    made = tmp_path / "run" / "sft"
    assert (made / "manifest.json").is_file()
    assert not (tmp_path / "run" / "sft.partial").exists()
    assert len((made / "steps.jsonl").read_bytes().splitlines()) == 3
    process = start(root, config)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 0, said[-2000:]
    assert "stopping when" not in said


def test_a_signal_that_is_ignored_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Interruption("step") as interruption:
            os.kill(os.getpid(), signal.SIGINT)
            interruption.check()
        assert not interruption.asked
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
