"""A whole run's configuration in seconds: tiny model, few rows, few steps."""

from __future__ import annotations

from pathlib import Path

from pipeline.config import RunConfig, load_run

SMALL = """
name = "small"
seed = {seed}
out = "{out}"

[data]
profile = "embedded"
rows = 96
sft_validation_rows = 8

[[data.sources]]
kind = "embedded"
train = 60
validation = 8
test = 6
families = {{ expression = 1.0 }}

[data.tokenizer]
vocab_size = 288

[model]
width = 32
layers = 2
heads = 2
kv_heads = 1
feed_forward = 48
context = 96

[sampling]
max_tokens = 20

[[train]]
name = "sft"
batch = 8
steps = 8
save_every = 3
validate_every = 4
method = {{ kind = "sft" }}
optimizer = {{ learning_rate = 5e-3, warmup_steps = 2 }}

[generate]
limit = 10
group_size = 3
shard_size = 4

[verify]
checker = {{ kind = "{checker}" }}
workers = 1

[[train]]
name = "rft"
init = "sft"
batch = 2
steps = 6
save_every = 2
method = {{ kind = "rft" }}

[[train]]
name = "dpo"
init = "sft"
batch = 2
steps = 6
save_every = 2
method = {{ kind = "dpo" }}

[[train]]
name = "grpo"
init = "sft"
batch = 3
group_size = 4
steps = 6
save_every = 2
method = {{ kind = "grpo", updates = 2, beta = 0.05 }}

[evaluate]
n = 2
k = [1, 2]
max_tokens = 20
shard_size = 4
bootstrap = 100
workers = 1
"""


# A model of eight steps solves nothing; this verifier of the user's own gives both verdicts.
CHECKER = '''
from verifiers.checkers import Checker, Outcome, Verdict


class EvenLength(Checker):
    """Correct where the completion has an even number of characters."""

    examples = (("", "ab", "correct"), ("", "a", "incorrect"))

    def check(self, gold, text):
        outcome = Outcome.INCORRECT if len(text) % 2 else Outcome.CORRECT
        return Verdict(outcome, extracted=text, rule="even_length")
'''


def write_small(folder: Path, seed: int = 1, text: str = SMALL) -> Path:
    """Write the configuration to `<folder>/small.toml`, its run folder and verifier beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    checker = folder / "even_length.py"
    checker.write_text(CHECKER, encoding="utf-8")
    path = folder / "small.toml"
    path.write_text(text.format(seed=seed, out=folder / "run", checker=checker), encoding="utf-8")
    return path


def small_run(folder: Path, seed: int = 1) -> RunConfig:
    """Return the configuration, read back from its file."""
    return load_run(write_small(folder, seed))
