"""The run that is disturbed: its configuration, and what it leaves."""

from __future__ import annotations

import hashlib
import json
import subprocess
from pathlib import Path

CONFIG = """
name = "faults"
seed = {seed}
out = "{out}"

[mixture]
profile = "embedded"
max_length = 96
packing = "none"
validation_rows = 6
near_duplicates = 0.0
chunk_rows = 12
shard_sequences = 8
workers = 1
tokenizer = {{ vocab_size = 320 }}
sources = [{{ source = {{ kind = "gsm8k", train = "{rows}" }} }}]

[data]
profile = "embedded"
rows = 8
sft_validation_rows = 4
workers = 1

[[data.sources]]
kind = "embedded"
train = 24
validation = 6
test = 4
families = {{ expression = 1.0 }}

[model]
width = 16
layers = 1
heads = 2
kv_heads = 1
feed_forward = 16
context = 96

[sampling]
max_tokens = 12

[[train]]
name = "sft"
batch = 4
steps = 5
save_every = 2
validate_every = 2
method = {{ kind = "sft" }}
optimizer = {{ learning_rate = 5e-3, warmup_steps = 2 }}

[generate]
limit = 6
group_size = 3
shard_size = 2

[verify]
checker = {{ kind = "{checker}" }}
workers = 1

[[train]]
name = "rft"
init = "sft"
batch = 2
steps = 3
save_every = 1
method = {{ kind = "rft" }}

[[train]]
name = "dpo"
init = "sft"
batch = 2
steps = 3
save_every = 2
method = {{ kind = "dpo" }}

[[train]]
name = "grpo"
init = "sft"
batch = 2
group_size = 3
steps = 4
save_every = 1
staleness = 1
correction = {{ kind = "token" }}
method = {{ kind = "grpo", updates = 2, beta = 0.05 }}

[[train]]
name = "ppo"
init = "sft"
batch = 2
group_size = 3
steps = 4
save_every = 2
iterations = 2
method = {{ kind = "ppo", critic = "separate", beta = 0.05 }}

[evaluate]
n = 2
k = [1, 2]
max_tokens = 12
shard_size = 2
bootstrap = 100
workers = 1
"""
# A model of five steps solves nothing; this verifier gives both verdicts.
CHECKER = '''
from verifiers.checkers import Checker, Outcome, Verdict


class EvenLength(Checker):
    """Correct where the completion has an even number of characters."""

    examples = (("", "ab", "correct"), ("", "a", "incorrect"))

    def check(self, gold, text):
        outcome = Outcome.INCORRECT if len(text) % 2 else Outcome.CORRECT
        return Verdict(outcome, extracted=text, rule="even_length")
'''
# Differs between two equal runs: times, and the notes about shards that were drawn again.
VOLATILE = ("timing.json", "timing.jsonl", "written.jsonl")


def write_config(folder: Path, out: Path, seed: int = 1) -> Path:
    """Write configuration, verifier and training rows; return the configuration's path."""
    folder.mkdir(parents=True, exist_ok=True)
    checker, rows = folder / "even_length.py", folder / "rows.jsonl"
    checker.write_text(CHECKER, encoding="utf-8")
    found = []
    for number in range(40):
        a, b = number % 7 + 2, number % 11 + 3
        answer = f"{a}+{b}=<<{a}+{b}={a + b}>>{a + b}\n#### {a + b}"
        found.append({"question": f"Compute {a}+{b}, number {number}.", "answer": answer})
    rows.write_text("".join(json.dumps(row) + "\n" for row in found), encoding="utf-8")
    path = folder / "faults.toml"
    text = CONFIG.format(seed=seed, out=out, checker=checker, rows=rows)
    path.write_text(text, encoding="utf-8")
    return path


def contents(folder: Path) -> dict[str, str]:
    """Return the hash of every file whose bytes must be equal in two equal runs."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if not path.is_file() or path.name in VOLATILE or path.suffix == ".lock":
            continue
        data = path.read_bytes()
        if path.name == "manifest.json":
            manifest = json.loads(data)
            changing = ("seconds", "seal", "beside")
            manifest = {k: v for k, v in manifest.items() if k not in changing}
            data = json.dumps(manifest).encode()
        found[str(path.relative_to(folder))] = hashlib.sha256(data).hexdigest()
    return found


def differences(one: dict[str, str], two: dict[str, str]) -> list[str]:
    """Return the files that are not the same in two runs."""
    return sorted(name for name in one.keys() | two.keys() if one.get(name) != two.get(name))


def copy(source: Path, target: Path) -> None:
    """Copy a run folder; files of two names stay one file."""
    target.mkdir(parents=True, exist_ok=True)
    subprocess.run(["cp", "-a", f"{source}/.", str(target)], check=True)
