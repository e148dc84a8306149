"""From files of judgements to reward models and DPO, through the data stage."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from data_prep.build import build
from data_prep.config import read_toml, validate
from data_prep.jsonl import read_rows
from pipeline.config import RunConfig, load_run
from pipeline.run import stages_of
from pipeline.train import train

ROOT = Path(__file__).resolve().parents[2]


def files(folder: Path) -> tuple[Path, Path]:
    """Pairs that prefer the short answer, and solutions whose wrong step says so."""
    rng = random.Random(2)
    pairs, steps = [], []
    for number in range(40):
        prompt = f"\n\nHuman: question {number}\n\nAssistant: "
        pairs.append({"chosen": f"{prompt}yes", "rejected": f"{prompt}no no no"})
        signs = [rng.choice("+-") for _ in range(3)]
        words = [f"Step {i}: {'right' if s == '+' else 'wrong'} " for i, s in enumerate(signs, 1)]
        steps.append(
            {
                "input": f"How many, {number}? " + "".join(f"{word}ки\n" for word in words),
                "label": f"How many, {number}? "
                + "".join(f"{word}{sign}\n" for word, sign in zip(words, signs, strict=True)),
                "task": "GSM8K",
            }
        )
    paths = folder / "pairs.jsonl", folder / "steps.jsonl"
    for path, rows in zip(paths, (pairs, steps), strict=True):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return paths


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> RunConfig:
    """Problems, pairs and steps in one data stage, and a model that has seen the problems."""
    folder = tmp_path_factory.mktemp("judged")
    pairs, steps = files(folder)
    common = {"batch": 8, "steps": 16, "save_every": 100, "validate_every": 16}
    optimizer = {"learning_rate": 1e-2, "warmup_steps": 1}
    stages = [
        {"name": "sft", "batch": 8, "steps": 2, "method": {"kind": "sft"}},
        {"name": "rm", "init": "sft", "method": {"kind": "reward_model"}, **common},
        {"name": "prm", "init": "sft", "method": {"kind": "process_reward_model"}, **common},
        {"name": "dpo", "init": "sft", "method": {"kind": "dpo", "data": "pairs"}, **common},
    ]
    table = {
        "name": "judged",
        "seed": 1,
        "out": str(folder / "run"),
        "data": {
            "profile": "embedded",
            "rows": 32,
            "sft_validation_rows": 0,
            "judged_validation_rows": 8,
            "tokenizer": {"vocab_size": 300},
            "sources": [
                {"kind": "embedded", "train": 30, "validation": 4, "test": 4},
                {"kind": "hh_rlhf", "train": str(pairs)},
                {"kind": "math_shepherd", "train": str(steps)},
            ],
        },
        "model": {
            "width": 32,
            "layers": 2,
            "heads": 2,
            "kv_heads": 1,
            "feed_forward": 48,
            "context": 256,
        },
        "train": [{**stage, "optimizer": optimizer} for stage in stages],
    }
    made = validate(RunConfig, table, "test")
    assert made.data is not None
    build(made.data, Path(made.out), made.seed)
    train(made, made.train[0])
    return made


@pytest.mark.parametrize("index", [1, 2, 3], ids=["reward model", "process", "dpo"])
def test_it_learns_held_out_judgements(run, index):
    config = run.train[index]
    rows = [row for _, row in read_rows(train(run, config) / "steps.jsonl")]
    assert [row["step"] for row in rows] == list(range(16))
    assert rows[-1]["validation_accuracy"] >= 0.9


def test_the_shipped_run_is_complete():
    path = ROOT / "data_prep" / "configs" / "judged.toml"
    run = load_run(path)
    assert [name for name, _ in stages_of(run)] == [
        "data",
        "reward_model",
        "process_reward_model",
        "dpo",
    ]
    assert read_toml(path)["data"]["sources"][0]["kind"] == "ultrafeedback"
