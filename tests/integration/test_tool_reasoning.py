"""Tool-integrated reasoning end to end: a small model learns to write programs, and is evaluated
with the sandbox running them, two rounds a conversation, the second using the first's variable.

Its arithmetic is far beyond what such a model can do in its head, so that what tools add shows.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest

from data_prep.errors import UserError
from data_prep.jsonl import read_json, read_rows
from eval.sandbox import Session
from eval.transcripts import OUTPUT, PROGRAM

SOURCE = '''
"""Products and sums of two-digit numbers, solved by two programs."""

import random

from data_prep.schema import Problem
from data_prep.sources import SourceConfig


class Config(SourceConfig):
    train: int = 6000
    test: int = 96


def read(config, seed):
    rng = random.Random(seed)
    seen = set()
    while len(seen) < config.train + config.test:
        a, b, c = (rng.randrange(10, 100) for _ in range(3))
        if (a, b, c) in seen:
            continue
        seen.add((a, b, c))
        split = "test" if len(seen) <= config.test else "train"
        solution = (
            f"```python\\nx={a}*{b}\\nprint(x)\\n```\\n```output\\n{a * b}\\n```\\n"
            f"```python\\nprint(x+{c})\\n```\\n```output\\n{a * b + c}\\n```\\n"
            f"\\\\boxed{{{a * b + c}}}"
        )
        yield Problem(f"p-{a}-{b}-{c}", f"{a}*{b}+{c}", str(a * b + c), "programs", split,
                      solutions={"worked": solution})
'''
PROFILE = """
description = "The bare question, tools or not"
[question]
en = "{question}"
[tool_question]
en = "{question}"
[checkers]
[checker]
kind = "boxed"
"""
CONFIG = """
name = "tools"
seed = 1
out = "OUT"

[data]
profile = "embedded"
rows = 25600
sft_validation_rows = 0

[[data.sources]]
kind = "SOURCE"

[data.tokenizer]
vocab_size = 320

[model]
width = 128
layers = 3
heads = 4
kv_heads = 4
feed_forward = 256
context = 384

[[train]]
name = "sft"
batch = 32
method = { kind = "sft" }
optimizer = { learning_rate = 2e-3, betas = [0.9, 0.98], warmup_steps = 30, schedule = "cosine" }
"""


@pytest.mark.slow
def test_programs_are_written_run_and_used(root, tmp_path):
    try:
        Session().close()
    except UserError as error:
        pytest.skip(str(error))
    (tmp_path / "source.py").write_text(SOURCE, encoding="utf-8")
    (tmp_path / "bare.toml").write_text(PROFILE, encoding="utf-8")
    out = tmp_path / "run"
    text = CONFIG.replace("OUT", str(out)).replace("SOURCE", str(tmp_path / "source.py"))
    (tmp_path / "run.toml").write_text(text, encoding="utf-8")

    def python(*words):
        done = subprocess.run(
            [sys.executable, "-m", *words], cwd=root, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr[-3000:]

    python("pipeline.run", "--config", str(tmp_path / "run.toml"))
    found = {}
    for rounds in ("0", "2"):
        results = tmp_path / f"rounds-{rounds}"
        python(
            "eval.run",
            "--model",
            str(out / "sft" / "checkpoint"),
            "--suites",
            "embedded",
            "--profile",
            str(tmp_path / "bare.toml"),
            "--name",
            "sft",
            "--tool-rounds",
            rounds,
            "--n",
            "2",
            "--max-tokens",
            "160",
            "--temperature",
            "0.3",
            "--out",
            str(results),
        )
        found[rounds] = read_json(results / "eval-sft" / "embedded" / "figures.json")["figures"]
    print(
        json.dumps({r: {m: f[m] for m in ("greedy", "avg@2", "maj@2")} for r, f in found.items()})
    )
    # What the sandbox printed is what Python would: every output in the log is checked here.
    checked = 0
    folder = tmp_path / "rounds-2" / "eval-sft" / "embedded"
    for path in folder.glob("greedy-*.jsonl"):
        for _, row in read_rows(path):
            programs, outputs = PROGRAM.findall(row["text"]), OUTPUT.findall(row["text"])
            first = re.fullmatch(r"x=(\d+)\*(\d+)\nprint\(x\)\n", programs[0] if programs else "")
            then = re.fullmatch(r"print\(x\+(\d+)\)\n", programs[1] if len(programs) > 1 else "")
            if first and then and len(outputs) == 2:
                a, b, c = map(int, (*first.groups(), *then.groups()))
                assert [o.strip() for o in outputs] == [str(a * b), str(a * b + c)]
                checked += 1
    assert checked > 48
    # A model of this size copies numbers into programs; it does not multiply them.
    assert found["2"]["greedy"]["low"] > 0.5
    assert found["0"]["greedy"]["high"] < 0.1
