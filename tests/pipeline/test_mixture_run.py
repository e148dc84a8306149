"""A run whose supervised rows are a mixture: from files to a checkpoint, by the one loop."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
import tomli_w

from data_prep.build import build, tokenizer_of_run
from data_prep.config import validate
from data_prep.errors import UserError
from data_prep.jsonl import read_rows
from data_prep.loader import Sequences
from data_prep.mixture import build_mixture
from data_prep.tokenizer import with_tokenizer
from pipeline import train as train_module
from pipeline.config import RunConfig, load_run
from pipeline.model import load_tokenizer
from pipeline.run import stages_of
from pipeline.train import train

WORDS = ["pens", "books", "coins", "cards", "shells", "stamps"]


class Killed(Exception):
    pass


def files(folder: Path) -> dict[str, Path]:
    """Word problems in GSM8K's format, and conversations of one to three turns."""
    rng = random.Random(4)
    problems, chats = [], []
    for number in range(90):
        a, b, word = rng.randrange(2, 60), rng.randrange(2, 60), rng.choice(WORDS)
        problems.append(
            {
                "question": f"Ann has {a} {word} and buys {b}, number {number}. How many?",
                "answer": f"She has {a}+{b}=<<{a}+{b}={a + b}>>{a + b}.\n#### {a + b}",
            }
        )
        turns = [
            {"role": role, "content": f"{role} {number} {turn} {rng.choice(WORDS)} " * 3}
            for turn in range(rng.randrange(1, 4))
            for role in ("user", "assistant")
        ]
        chats.append({"prompt": "p", "prompt_id": str(number), "messages": turns})
    paths = {name: folder / f"{name}.jsonl" for name in ("gsm8k", "ultrachat")}
    for path, rows in zip(paths.values(), (problems, chats), strict=True):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return paths


def table(folder: Path, **train_changes) -> dict:
    paths = files(folder)
    stage = {
        "name": "sft",
        "batch": 3,
        "steps": 6,
        "save_every": 2,
        "validate_every": 3,
        "method": {"kind": "sft"},
        "optimizer": {"learning_rate": 5e-3, "warmup_steps": 1},
    }
    return {
        "name": "mixed",
        "seed": 3,
        "out": str(folder / "run"),
        "mixture": {
            "max_length": 256,
            "validation_rows": 12,
            "near_duplicates": 0.0,
            "workers": 1,
            "tokenizer": {"vocab_size": 320},
            "sources": [
                {"count": 60, "source": {"kind": name, "train": str(path)}}
                for name, path in paths.items()
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
        "train": [{**stage, **train_changes}],
    }


def run_of(folder: Path, **changes) -> RunConfig:
    return validate(RunConfig, table(folder, **changes), "test")


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("mixed")
    run = run_of(folder)
    assert run.mixture is not None
    build_mixture(run.mixture, Path(run.out), run.seed)
    return folder


@pytest.fixture
def folder(base, tmp_path) -> Path:
    shutil.copytree(base / "run", tmp_path / "run")
    return tmp_path


def interrupt_at(monkeypatch, step: int) -> None:
    """Let the process die right before a step's record is written."""
    original = train_module.Records.write

    def write(self, at, *rest):
        if at == step:
            raise Killed
        original(self, at, *rest)

    monkeypatch.setattr(train_module.Records, "write", write)


@pytest.mark.parametrize("changes", [{}, {"batch_tokens": 512}], ids=["packed", "by length"])
def test_a_killed_training_on_a_mixture_ends_bit_for_bit_the_same(
    folder, monkeypatch, tmp_path, changes
):
    run = run_of(folder, **changes)
    config = run.train[0]
    whole = tmp_path / "whole"
    shutil.copytree(run.out, whole)
    expected = train(run.model_copy(update={"out": str(whole)}), config)
    with monkeypatch.context() as patch:
        interrupt_at(patch, 5)
        with pytest.raises(Killed):
            train(run, config)
    found = train(run, config)
    for name in ("checkpoint/model.safetensors", "steps.jsonl"):
        assert (found / name).read_bytes() == (expected / name).read_bytes()
    losses = [
        row["validation_loss"]
        for _, row in read_rows(found / "steps.jsonl")
        if "validation_loss" in row
    ]
    assert len(losses) == 2
    assert losses[1] < losses[0]


def test_a_second_training_starts_from_the_first(folder):
    run = run_of(folder)
    first = run.train[0]
    second = first.model_copy(update={"name": "more", "init": "sft"})
    run = run.model_copy(update={"train": (first, second)})
    train(run, first)
    steps = list(read_rows(train(run, second) / "steps.jsonl"))
    assert len(steps) == 6


def test_an_epoch_is_every_sequence_once(folder):
    run = run_of(folder, steps=0, validate_every=0)
    rows = len(Sequences(run.rows, "train"))
    steps = list(read_rows(train(run, run.train[0]) / "steps.jsonl"))
    assert len(steps) == -(-rows // 3)


def test_the_mixture_comes_first_and_gives_the_data_stage_its_tokenizer(base, tmp_path):
    source = {"kind": "gsm8k", "train": str(base / "gsm8k.jsonl")}
    whole = {**table(tmp_path), "data": {"sources": [source], "sft_validation_rows": 0}}
    run = validate(RunConfig, whole, "test")
    assert [name for name, _ in stages_of(run)] == ["mixture", "data", "sft"]
    assert run.rows == Path(run.out) / "mixture"
    shutil.copytree(base / "run", tmp_path / "run")
    assert run.data is not None
    data = with_tokenizer(run.data, tokenizer_of_run(whole, Path(run.out)))
    stage = build(data, Path(run.out), run.seed)
    made = load_tokenizer(run.rows / "tokenizer")
    assert load_tokenizer(stage / "tokenizer").get_vocab() == made.get_vocab()
    assert run.tokenizer == stage / "tokenizer"


def test_a_file_without_data_or_mixture_is_refused(tmp_path):
    whole = table(tmp_path)
    path = tmp_path / "run.toml"
    path.write_text(tomli_w.dumps({k: v for k, v in whole.items() if k != "mixture"}))
    with pytest.raises(UserError, match="key 'data': missing"):
        load_run(path)
    path.write_text(tomli_w.dumps(whole))
    assert [name for name, _ in stages_of(load_run(path))] == ["mixture", "sft"]


@pytest.mark.parametrize(
    ("data", "match"),
    [
        ({"profile": "embedded"}, "profile"),
        ({"tokenizer": {"path": "b"}}, "a run has one tokenizer"),
    ],
)
def test_data_and_mixture_that_do_not_fit_are_refused(tmp_path, data, match):
    whole = table(tmp_path)
    whole["mixture"]["tokenizer"] = {"path": "a"}
    source = {"kind": "gsm8k", "train": str(tmp_path / "gsm8k.jsonl")}
    with pytest.raises(UserError, match=match):
        validate(RunConfig, {**whole, "data": {"sources": [source], **data}}, "test")


def test_a_method_that_needs_problems_is_refused_without_data(folder):
    run = run_of(folder, method={"kind": "rft"})
    with pytest.raises(UserError, match=r"without \[data\]"):
        train(run, run.train[0])


def test_grouping_by_length_is_for_supervised_rows(tmp_path):
    whole = table(tmp_path, method={"kind": "rft"}, batch_tokens=64)
    source = {"kind": "gsm8k", "train": str(tmp_path / "gsm8k.jsonl")}
    run = validate(RunConfig, {**whole, "data": {"sources": [source]}}, "test")
    with pytest.raises(UserError, match="batch_tokens"):
        train(run, run.train[0])


def test_rows_of_another_vocabulary_are_refused(folder, checkpoint):
    run = run_of(folder)
    run = run.model_copy(update={"model": run.model.model_copy(update={"path": str(checkpoint)})})
    with pytest.raises(UserError, match="vocabulary is not the rows'"):
        train(run, run.train[0])


def test_a_document_above_the_context_is_refused(folder):
    run = run_of(folder)
    run = run.model_copy(update={"model": run.model.model_copy(update={"context": 32})})
    with pytest.raises(UserError, match="context holds 32"):
        train(run, run.train[0])


def test_a_mixture_without_held_out_rows_has_no_held_out_loss(tmp_path):
    whole = table(tmp_path)
    whole["mixture"]["validation_rows"] = 0
    run = validate(RunConfig, whole, "test")
    assert run.mixture is not None
    build_mixture(run.mixture, Path(run.out), run.seed)
    with pytest.raises(UserError, match="nothing held out"):
        train(run, run.train[0])
