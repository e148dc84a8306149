"""What one unit costs of what grows with the number of GPUs, as JSON.

    python tests/benchmarks/bench_scale.py

A sample here is 1,024 tokens of a vocabulary of 152,064 with log-probs in float32: its row in the
sample log, the row's time to be written and read, the message in which ranks hand it to each
other, and its share of the flat view that every rank makes of a step. Times are of one core's
processor time, so that a busy machine does not show.
"""

from __future__ import annotations

import gzip
import json
import pickle
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np

from data_prep.jsonl import dump_row
from data_prep.versions import versions
from pipeline.batch import Sequence, flatten
from pipeline.engines import Completion, Group, Prompt
from pipeline.ranks import balanced
from pipeline.samples import samples_of

SAMPLES, TOKENS, GROUP, VOCABULARY = 256, 1024, 8, 152_064


def cost(function: Callable[[], object]) -> float:
    """Return the least of three calls' processor time, seconds."""
    times = []
    for _ in range(3):
        began = time.process_time()
        function()
        times.append(time.process_time() - began)
    return min(times)


def main() -> None:
    """Measure and print."""
    rng = np.random.default_rng(0)
    groups = []
    for number in range(SAMPLES // GROUP):
        prompt = Prompt(f"problem-{number:06d}", tuple(rng.integers(VOCABULARY, size=128).tolist()))
        completions = []
        for _ in range(GROUP):
            ids = rng.integers(VOCABULARY, size=TOKENS).tolist()
            logprobs = (-rng.exponential(0.3, TOKENS)).astype(np.float32).tolist()
            text = "the " * TOKENS  # four characters a token, as English has
            completions.append(Completion(ids, logprobs, text, "stop", int(rng.integers(2**62))))
        groups.append(Group(prompt, completions))
    rows = [sample.to_row() for sample in samples_of(groups, GROUP, 0)]
    lines = "".join(map(dump_row, rows))
    sequences = [
        Sequence(
            list(group.prompt.token_ids), c.token_ids, [True] * TOKENS, number, logprobs=c.logprobs
        )
        for number, group in enumerate(groups)
        for c in group.completions
    ]
    message = pickle.dumps(groups)
    tokens = SAMPLES * TOKENS
    found = {
        "samples": SAMPLES,
        "tokens_a_sample": TOKENS,
        "log_bytes_a_token": len(lines.encode()) / tokens,
        "log_bytes_a_token_gzip": len(gzip.compress(lines.encode(), 6)) / tokens,
        "log_write_us_a_token": 1e6 * cost(lambda: [dump_row(row) for row in rows]) / tokens,
        "log_read_us_a_token": 1e6
        * cost(lambda: [json.loads(line) for line in lines.splitlines()])
        / tokens,
        "message_bytes_a_token": len(message) / tokens,
        "message_us_a_token": 1e6 * cost(lambda: pickle.loads(message)) / tokens,  # noqa: S301 - our own bytes
        "flat_view_us_a_token": 1e6 * cost(lambda: flatten(sequences)) / tokens,
        "shares_us_a_sample": 1e6 * cost(lambda: balanced(sequences, 8)) / SAMPLES,
        "machine": platform.processor() or platform.machine(),
        "versions": versions(),
    }
    print(json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in found.items()}))


if __name__ == "__main__":
    main()
