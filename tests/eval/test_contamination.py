"""Suites against training data: exact and near questions are found, relatives are not."""

from __future__ import annotations

import json

import pytest

from data_prep.errors import UserError
from data_prep.schema import Problem
from eval.contamination import contamination, training_questions
from eval.suites import choose_suites


def problem(identity, question):
    return Problem(identity, question, "1", "s", "train")


def asked(problems):
    return ((p.id, p.question) for p in problems)


def test_exact_near_and_related():
    ask = "Ann buys three boxes of nine pens at the market and gives four pens to Ben"
    suite = [
        problem("a", f"{ask}. How many pens are left?"),
        problem("b", "What is $2 + 2$?"),
        problem("c", f"{ask}. How many boxes are left over in the end?"),
    ]
    training = [
        problem("t1", f"{ask.upper()}.  How many PENS are left?"),
        problem("t2", "What is $2+2$?"),
        problem("t3", "What is $2+3$?"),
        problem("t4", f"{ask}. How many boxes are left over at the end?".replace("at the", "the")),
        problem("t5", ask.replace("nine", "eight") + ". How many pens are left?"),
    ]
    found = contamination({"s": suite, "part": suite[:1]}, asked(training))
    assert (found["s"]["questions"], found["s"]["exact"]) == (3, 2)
    assert found["part"]["exact"] == 1  # in both suites, counted in both
    assert {(row["id"], row["training_id"]) for row in found["s"]["examples"]} >= {
        ("a", "t1"),
        ("b", "t2"),
    }
    assert all(row["training_id"] not in ("t3", "t5") for row in found["s"]["examples"])


def test_gsm8k_test_in_a_training_set_is_found_and_its_train_split_is_clean(real):
    paths = [f"gsm8k={real}/gsm8k/test.jsonl"]
    test = choose_suites(paths, {})[0].load()
    train = choose_suites([f"gsm8k={real}/gsm8k/train.jsonl"], {})[0].load(2000)
    clean = contamination({"gsm8k": test}, asked(train))["gsm8k"]
    assert clean["exact"] == 0
    leaked = contamination({"gsm8k": test}, asked([*train[:50], *test[:25]]))["gsm8k"]
    assert leaked["exact"] - clean["exact"] == 25
    assert len(leaked["examples"]) == 5


def test_training_files_of_several_layouts(tmp_path):
    rows = [
        problem("p", "What is 1?").to_row(),
        {"query": "What is 2?", "response": "2"},
        {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "3?"}]},
    ]
    file = tmp_path / "train.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert list(training_questions(file)) == [
        ("p", "What is 1?"),
        ("train.jsonl, line 2", "What is 2?"),
        ("train.jsonl, line 3", "3?"),
    ]
    file.write_text('{"text": "no question"}\n')
    with pytest.raises(UserError, match=r"line 1: columns 'text'"):
        list(training_questions(file))
