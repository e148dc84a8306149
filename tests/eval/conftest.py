"""A small checkpoint with random weights, and suites to evaluate it on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data_prep.tokenizer import train_tokenizer
from pipeline.model import ModelConfig, build_model, save_checkpoint
from prompts import load_layout, load_profile

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data beside the repository."""
    if not SHARED.is_dir():
        pytest.skip("../shared/data is absent")
    return SHARED


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    """A complete model folder; its random weights answer nothing."""
    folder = tmp_path_factory.mktemp("run") / "sft" / "checkpoint"
    profile = load_profile("embedded")
    layout = load_layout(profile.layout)
    texts = ["What is 1+2?", "1+2=3 \\boxed{3}", profile.system] * 20
    tokenizer = train_tokenizer(texts, 300, layout, profile.system)
    model = build_model(
        ModelConfig(width=32, layers=2, heads=2, kv_heads=2, feed_forward=64, context=160),
        tokenizer, seed=0,
    )
    ends = [tokenizer.convert_tokens_to_ids(layout.end)]
    save_checkpoint(folder, model, tokenizer, ends, "embedded")
    return folder


@pytest.fixture
def gsm8k_file(tmp_path) -> Path:
    """Twelve rows in GSM8K's published format."""
    rows = [
        {"question": f"What is {i} + {i}?", "answer": f"{i}+{i}=<<{i}+{i}={2 * i}>>{2 * i}\n#### {2 * i}"}
        for i in range(12)
    ]
    return write_jsonl(tmp_path / "gsm8k_test.jsonl", rows)
