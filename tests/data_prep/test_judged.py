import json

import pyarrow.parquet as pq
import pytest

from data_prep.config import validate
from data_prep.errors import UserError
from data_prep.formatting import load_formatter
from data_prep.jsonl import read_json
from data_prep.judged import JudgedConfig, build_judged
from data_prep.tokenizer import load_tokenizer

PAIRS = [
    {"chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d",
     "rejected": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: no<|end|>"},
    {"chosen": "\n\nHuman: a\n\nAssistant: same", "rejected": "\n\nHuman: a\n\nAssistant: same"},
]
STEPS = [
    {"input": "What is 2+2? Step 1: 2+2=4. ки\nStep 2: So 5. The answer is: 5 ки",
     "label": "What is 2+2? Step 1: 2+2=4. +\nStep 2: So 5. The answer is: 5 -", "task": "GSM8K"},
]


@pytest.fixture
def tokenizer(tmp_path, make_tokenizer):
    make_tokenizer("markers").save_pretrained(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


def config(tokenizer, pairs, steps, **changes):
    return validate(JudgedConfig, {
        "tokenizer": str(tokenizer), **changes, "sources": [
            {"kind": "hh_rlhf", "train": str(pairs)},
            {"kind": "math_shepherd", "train": str(steps)},
        ],
    }, "test")


def test_pairs_and_steps_come_out_as_tokens(tmp_path, tokenizer, write_lines):
    settings = config(tokenizer, write_lines("p.jsonl", PAIRS), write_lines("s.jsonl", STEPS))
    stage = build_judged(settings, tmp_path / "run", 0)
    formatter = load_formatter(load_tokenizer(str(stage / "tokenizer")), "boxed")
    decode = formatter.tokenizer.decode
    (pair,) = pq.read_table(stage / "preferences_train.parquet").to_pylist()
    assert decode(pair["prompt_ids"]).endswith("b<|end|><|user|>c<|end|><|assistant|>")
    assert decode(pair["chosen_ids"]) == "d<|end|><|eos|>"
    # The answer spells an end token: it is text, and the real ends come after it.
    assert decode(pair["rejected_ids"]) == "no<|end|><|end|><|eos|>"
    assert pair["rejected_ids"].count(formatter.tokenizer.convert_tokens_to_ids("<|end|>")) == 1
    (row,) = pq.read_table(stage / "steps_train.parquet").to_pylist()
    assert row["labels"] == [1, -1]
    ids, ends = row["input_ids"], row["step_ends"]
    assert ids[: row["prompt_tokens"]] == formatter.prompt_ids("What is 2+2?")
    assert decode(ids[row["prompt_tokens"] : ends[0] + 1]) == "Step 1: 2+2=4.\n\n"
    assert decode(ids[ends[0] + 1 : ends[1] + 1]) == "Step 2: So 5. The answer is: 5\n\n"
    assert ends[1] == len(ids) - 1
    figures = read_json(stage / "statistics.json")
    assert figures == {
        "rows": {"preferences_train": 1, "steps_train": 1},
        "left_out": {"hh_rlhf": {"same_answer": 1}, "math_shepherd": {}},
    }


def test_long_and_bad_rows_are_counted_or_end_the_build(tmp_path, tokenizer, write_lines):
    bad = [*PAIRS, b"{broken", {"chosen": "no turn", "rejected": "no turn"}]
    pairs, steps = write_lines("p.jsonl", bad), write_lines("s.jsonl", STEPS)
    with pytest.raises(UserError, match=r"p.jsonl, line 3"):
        build_judged(config(tokenizer, pairs, steps), tmp_path / "run", 0)
    assert not (tmp_path / "run").exists()
    settings = config(tokenizer, pairs, steps, on_bad_row="skip", max_length=60)
    stage = build_judged(settings, tmp_path / "run", 0)
    assert read_json(stage / "statistics.json")["left_out"] == {
        "hh_rlhf": {"bad_row": 2, "same_answer": 1}, "math_shepherd": {"too_long": 1},
    }
    assert build_judged(settings, tmp_path / "run", 0) == stage


def test_a_source_of_problems_is_refused(tmp_path, tokenizer, write_lines):
    path = write_lines("g.jsonl", [{"question": "a", "answer": "#### 1"}])
    settings = validate(JudgedConfig, {
        "tokenizer": str(tokenizer), "sources": [{"kind": "gsm8k", "train": str(path)}]
    }, "test")
    with pytest.raises(UserError, match="it gives Problem rows"):
        build_judged(settings, tmp_path / "run", 0)


@pytest.mark.parametrize(
    ("kind", "name", "rows"),
    [
        ("prm800k", "prm/prm800k_phase1_test.jsonl", 103),
        ("math_shepherd", "prm/math_shepherd_samples.jsonl", 7),
        ("hh_rlhf", "preference/hh_rlhf_harmless_base_test_first200.jsonl", 199),
    ],
)
def test_real_files_come_out(tmp_path, tokenizer, shared, kind, name, rows):
    settings = validate(JudgedConfig, {
        "tokenizer": str(tokenizer), "max_length": 100000,
        "sources": [{"kind": kind, "train": str(shared(name))}],
    }, "test")
    figures = read_json(build_judged(settings, tmp_path / "run", 0) / "statistics.json")
    assert sum(figures["rows"].values()) == rows
    json.dumps(figures, allow_nan=False)
