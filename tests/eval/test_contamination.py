"""Suites against training data: exact and near questions are found, relatives are not."""

from __future__ import annotations

import json

import pytest

from data_prep.config import validate
from data_prep.errors import UserError
from data_prep.mixture import build_mixture
from data_prep.mixture_config import MixtureConfig
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


def test_a_mixture_is_read_back_from_its_tokens(tmp_path):
    questions = [
        f"Mia has {n} pens near the lake and finds {n + 7} more. How many?" for n in range(20, 60)
    ]
    rows = [
        {
            "source": "cn_k12",
            "problem": q,
            "messages": [],
            "solution": f"There are $\\boxed{{{2 * n + 7}}}$.",
        }
        for n, q in enumerate(questions, start=20)
    ]
    file = tmp_path / "numina.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    table = {
        "max_length": 256,
        "validation_rows": 4,
        "workers": 1,
        "tokenizer": {"vocab_size": 400},
        "sources": [{"source": {"kind": "numina_math_cot", "train": str(file)}, "count": 30}],
    }
    stage = build_mixture(validate(MixtureConfig, table, "test"), tmp_path / "run", 1)
    found = list(training_questions(stage))
    assert len(found) >= 26 and {question for _, question in found} <= set(questions)
    assert len({question for _, question in found}) == len(found)
    identity, question = found[3]
    assert rows[int(identity.rpartition(" ")[2])]["problem"] == question
    suite = [problem("a", question.upper()), problem("b", "What is 1?")]
    leak = contamination({"s": suite}, training_questions(stage))["s"]
    assert (leak["exact"], leak["near"]) == (1, 0)
