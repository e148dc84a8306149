"""Every source keeps the contract of `data_prep.sources`.

Run on a source of your own with a file of a few rows:

    BOXED_SOURCE=my/own.py BOXED_SOURCE_ROWS=my/rows.jsonl \\
        python -m pytest tests/conformance/test_sources.py
"""

import copy
import json
import os
from pathlib import Path

import pytest

from data_prep.config import validate
from data_prep.errors import UserError
from data_prep.mixture_config import Ingredient
from data_prep.plugins import load_plugin, plugin_names
from data_prep.reading import Drop, Place, Rejected, items, read_stretch, stretches
from data_prep.schema import Chat, LabelledSteps, Preference, Problem
from data_prep.sources._files import FilesConfig
from verifiers import verify

PACKAGE = "data_prep.sources"
TURNS = [{"content": "Hi", "role": "user"}, {"content": "Hello.", "role": "assistant"}]
RATED = {"a": {"Rating": "5"}, "b": {"Rating": "N/A"}}
# Two rows of each published format, written for this test.
ROWS = {
    "questions": [
        {"question": "Tom has 2 pens and buys 3. How many?", "answer": 5},
        {"problem": "What is half?", "final_answer": ["\\frac12"]},
    ],
    "gsm8k": [
        {"question": "Tom has 2 pens and buys 3. How many?", "answer": "2+3=<<2+3=5>>5\n#### 5"},
        {"question": "A car costs 1,500 coins. And two?", "answer": "It is 3000.\n#### 3,000"},
    ],
    "math": [
        {
            "problem": "What is $1+1$?",
            "solution": "It is $\\boxed{2}$.",
            "level": "Level 1",
            "type": "Algebra",
        },
        {
            "problem": "What is half?",
            "solution": "So \\boxed{\\frac12} of it.",
            "level": "Level ?",
            "type": "Algebra",
        },
    ],
    "numina_math_cot": [
        {
            "source": "cn_k12",
            "problem": "What is 2+2?",
            "solution": "It is $\\boxed{4}$.",
            "messages": TURNS,
        },
        {
            "source": "olympiads",
            "problem": "What is 9/3?",
            "solution": "So \\boxed{3}, as said.",
            "messages": TURNS,
        },
    ],
    "openmathinstruct2": [
        {
            "problem": "What is 2+2?",
            "generated_solution": "So \\boxed{4}.",
            "expected_answer": "4",
            "problem_source": "augmented_math",
        },
        {
            "problem": "What is 2/4?",
            "generated_solution": "\\[ \\boxed{0.5} \\]",
            "expected_answer": "\\frac{1}{2}",
            "problem_source": "math",
        },
    ],
    "metamathqa": [
        {
            "type": "GSM_Rephrased",
            "query": "What are 2 and 2?",
            "original_question": "2+2?",
            "response": "2+2=4.\n#### 4\nThe answer is: 4",
        },
        {
            "type": "MATH_AnsAug",
            "query": "How far?",
            "original_question": "How far?",
            "response": "It is $\\boxed{\\sqrt{5}}$ units.\nThe answer is: \\sqrt{5}",
        },
    ],
    "orca_math": [
        {
            "question": "Jo is in 5th place. How many are ahead?",
            "answer": "In 5th place, then 4 people are ahead.",
        },
        {"question": "What is 3 times 4?", "answer": "3 * 4 = 12.\nThe answer is 12."},
    ],
    "ultrachat": [
        {"prompt": "Hi", "prompt_id": "x", "messages": TURNS},
        {"prompt": "Hi", "prompt_id": "y", "messages": [*TURNS, {"content": "?", "role": "user"}]},
    ],
    "mgsm": [
        {"question": "一共多少？", "answer_number": 18, "answer": None, "equation_solution": None},
        {"question": "How many?", "answer": "70,000"},
    ],
    "cmath": [
        {"grade": 1, "question": "一共多少？", "golden": "18", "reasoning_step": 1},
        {"grade": 6, "question": "还剩多少？", "answer": "0.5", "reasoning_step": 1},
    ],
    "svamp": [
        {
            "ID": "chal-1",
            "Body": "Each pack costs 76 dollars",
            "Question": "How much are two?",
            "Equation": "( 76.0 * 2.0 )",
            "Answer": 152.0,
            "Type": "Multiplication",
        },
        {
            "ID": "chal-2",
            "Body": "Dan had $ 4.",
            "Question": "How much is half?",
            "Equation": "( 4.0 / 2.0 )",
            "Answer": "2",
            "Type": "Common-Division",
        },
    ],
    "prm800k": [
        {
            "labeler": "a",
            "question": {"problem": "2+2?", "ground_truth_answer": "4"},
            "label": {
                "steps": [
                    {
                        "completions": [
                            {"text": "2+2=5", "rating": -1},
                            {"text": "2+2=4", "rating": 1},
                        ],
                        "human_completion": None,
                        "chosen_completion": 1,
                    },
                    {
                        "completions": None,
                        "human_completion": {"text": "So 4."},
                        "chosen_completion": None,
                    },
                ]
            },
        },
        {
            "labeler": "a",
            "question": {"problem": "2+3?", "ground_truth_answer": "5"},
            "label": {
                "steps": [
                    {
                        "completions": [{"text": "2+3=6", "rating": -1}],
                        "human_completion": None,
                        "chosen_completion": None,
                    }
                ]
            },
        },
    ],
    "math_shepherd": [
        {
            "input": "What is 2+2? Step 1: 2+2=4. ки\nStep 2: So 5. The answer is: 5 ки",
            "label": "What is 2+2? Step 1: 2+2=4. +\nStep 2: So 5. The answer is: 5 -",
            "task": "GSM8K",
        },
        {"input": "Why? Step 1: Because. ки", "label": "Why? Step 1: Because. +", "task": "MATH"},
    ],
    "hh_rlhf": [
        {
            "chosen": "\n\nHuman: Hi\n\nAssistant: Hello.",
            "rejected": "\n\nHuman: Hi\n\nAssistant: No.",
        },
        {
            "chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d",
            "rejected": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: e",
        },
    ],
    "ultrafeedback": [
        {
            "source": "s",
            "instruction": "Hi",
            "models": [],
            "correct_answers": [],
            "incorrect_answers": [],
            "completions": [
                {"response": "Hello.", "annotations": RATED},
                {"response": "No.", "annotations": {"a": {"Rating": "1"}}},
            ],
        },
        {
            "prompt": "Hi",
            "chosen": TURNS,
            "rejected": [TURNS[0], {"content": "No.", "role": "assistant"}],
            "score_chosen": 8.0,
            "score_rejected": 3.5,
        },
    ],
}
OWN = os.environ.get("BOXED_SOURCE")
KINDS = [OWN] if OWN else plugin_names(PACKAGE)


def rows_of(kind):
    if OWN:
        text = Path(os.environ["BOXED_SOURCE_ROWS"]).read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines() if line.strip()]
    assert kind in ROWS, f"add two rows of the format of {kind!r} to ROWS"
    return ROWS[kind]


def is_file_source(kind):
    return issubclass(load_plugin(PACKAGE, kind).Config, FilesConfig)


FILE_KINDS = [kind for kind in KINDS if is_file_source(kind)]


@pytest.fixture
def config(tmp_path):
    def make(kind, rows):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return validate(Ingredient, {"source": {"kind": kind, "train": str(path)}}, "test").source

    return make


def place(kind, split="train"):
    return Place(Path(kind).stem, split, "rows.jsonl", 7, 6)


@pytest.mark.parametrize("kind", KINDS)
def test_it_has_one_way_to_give_rows(kind):
    module = load_plugin(PACKAGE, kind)
    assert hasattr(module, "convert" if is_file_source(kind) else "read")
    assert module.__doc__
    if not OWN:
        assert module.Config.model_fields["kind"].default == kind


@pytest.mark.parametrize("kind", KINDS)
def test_an_unknown_key_is_refused(kind):
    with pytest.raises(UserError, match="trian"):
        validate(Ingredient, {"source": {"kind": kind, "trian": "x"}}, "test")


@pytest.mark.parametrize("kind", [kind for kind in KINDS if not is_file_source(kind)])
def test_a_generator_is_deterministic_and_disjoint(kind):
    module = load_plugin(PACKAGE, kind)
    settings = module.Config(train=200, validation=30, test=30)
    one, two = (list(module.read(settings, 5)) for _ in range(2))
    assert one == two != list(module.read(settings, 6))
    check(one)
    by_split = {}
    for item in one:
        by_split.setdefault(item.split, set()).add(item.question)
    assert not by_split["train"] & (by_split["validation"] | by_split["test"])


@pytest.mark.parametrize("kind", FILE_KINDS)
def test_rows_become_items(config, kind):
    found = list(items(config(kind, rows_of(kind))))
    assert not [item for item in found if isinstance(item, Rejected)]
    assert len(found) == len(rows_of(kind))
    check(found)
    assert [item.where.endswith(f"line {n}") for n, item in enumerate(found, 1)] == [True] * len(
        found
    )


def check(found):
    assert len({item.id for item in found}) == len(found)
    for item in found:
        assert item.split in ("train", "validation", "test")
        if isinstance(item, Problem):
            assert item.question.strip() == item.question != ""
            assert item.answer.strip() == item.answer != ""
            for text in item.solutions.values() or [f"\\boxed{{{item.answer}}}"]:
                assert "\\boxed{" in text.splitlines()[-1]
                assert verify(item.answer, text).is_correct, (item.answer, text)
        elif isinstance(item, Chat):
            assert item.messages[-1][0] == "assistant"
        elif isinstance(item, Preference):
            assert item.chosen != item.rejected
            assert item.prompt[-1][0] == "user"
        elif isinstance(item, LabelledSteps):
            assert len(item.steps) == len(item.labels) > 0
            assert set(item.labels) <= {1, 0, -1, None}


@pytest.mark.parametrize("kind", FILE_KINDS)
def test_convert_is_a_pure_function_of_its_row(kind):
    module = load_plugin(PACKAGE, kind)
    for row in rows_of(kind):
        before = copy.deepcopy(row)
        assert module.convert(row, place(kind)) == module.convert(row, place(kind))
        assert row == before


def needed_columns(kind):
    """Columns without which a row is malformed, found by leaving each out."""
    module = load_plugin(PACKAGE, kind)
    needed = []
    for row in rows_of(kind)[:1]:
        for name in row:
            less = {key: value for key, value in row.items() if key != name}
            try:
                module.convert(less, place(kind))
            except UserError as error:
                needed.append((name, str(error)))
            except Drop:
                pass
    return needed


@pytest.mark.parametrize("kind", FILE_KINDS)
def test_a_missing_column_is_named_with_file_and_line(kind):
    needed = needed_columns(kind)
    assert needed
    for _, message in needed:
        assert "rows.jsonl, line 7" in message
        assert "column" in message
        assert "what to do" in message


@pytest.mark.parametrize("value", [None, 3.5, [], {"x": 1}, True])
@pytest.mark.parametrize("kind", FILE_KINDS)
def test_a_wrong_type_never_passes_as_something_else(kind, value):
    module = load_plugin(PACKAGE, kind)
    for name, _ in needed_columns(kind):
        row = {**rows_of(kind)[0], name: value}
        try:
            item = module.convert(row, place(kind))
        except UserError as error:
            assert "rows.jsonl, line 7" in str(error)
        except Drop:
            pass
        else:
            # Golds may be numbers, and lists may be empty; nothing else is let through.
            assert value in (3.5, []), (name, value, item)


@pytest.mark.parametrize("kind", FILE_KINDS)
def test_a_bad_row_never_shifts_another(config, kind):
    good = rows_of(kind)
    settings = config(kind, good)
    whole = list(items(settings))
    Path(settings.train).write_bytes(
        json.dumps(good[0]).encode() + b"\n\n{broken\n\xff\n[1]\n" + json.dumps(good[1]).encode()
    )
    found = list(items(settings))
    assert [item.reason for item in found if isinstance(item, Rejected)] == ["bad_row"] * 3
    kept = [item for item in found if not isinstance(item, Rejected)]
    assert [item.where.rsplit(" ", 1)[1] for item in kept] == ["1", "6"]
    for one, other in zip(kept, whole, strict=True):
        assert getattr(one, "question", None) == getattr(other, "question", None)
        assert getattr(one, "messages", None) == getattr(other, "messages", None)


@pytest.mark.parametrize("kind", FILE_KINDS)
def test_stretches_together_are_the_whole(config, kind):
    settings = config(kind, rows_of(kind) * 5)
    whole = [raw for part in stretches(settings, 0) for raw in read_stretch(part)]
    parts = [raw for part in stretches(settings, 3) for raw in read_stretch(part)]
    assert parts == whole
    assert len(whole) == 10
