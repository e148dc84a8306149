import json

import pyarrow.parquet as pq
import pytest

from data_prep.build import DataConfig, build
from data_prep.config import validate
from data_prep.errors import UserError
from data_prep.formatting import load_formatter
from data_prep.jsonl import read_json
from data_prep.judged import hold_out, steps_row, without_held_out_prompts
from data_prep.loader import Pairs, Steps
from data_prep.schema import LabelledSteps, Preference
from data_prep.tokenizer import load_tokenizer

PAIRS = [
    {
        "chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d",
        "rejected": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: no<|end|>",
    },
    {"chosen": "\n\nHuman: a\n\nAssistant: same", "rejected": "\n\nHuman: a\n\nAssistant: same"},
]
STEPS = [
    {
        "input": "What is 2+2? Step 1: 2+2=4. ки\nStep 2: So 5. The answer is: 5 ки",
        "label": "What is 2+2? Step 1: 2+2=4. +\nStep 2: So 5. The answer is: 5 -",
        "task": "GSM8K",
    },
]


@pytest.fixture
def tokenizer(tmp_path, make_tokenizer):
    make_tokenizer("markers").save_pretrained(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


def config(tokenizer, pairs, steps, **changes):
    return validate(
        DataConfig,
        {
            "tokenizer": {"path": str(tokenizer)},
            **changes,
            "sources": [
                {"kind": "hh_rlhf", "train": str(pairs)},
                {"kind": "math_shepherd", "train": str(steps)},
            ],
        },
        "test",
    )


def labelled(steps, labels, question="q", split="train"):
    return LabelledSteps("id", question, tuple(steps), tuple(labels), "s", split)


def preference(prompt, split="train", number=0):
    return Preference(f"{prompt}{number}", (("user", prompt),), "a", "b", "s", split)


def test_pairs_and_steps_come_out_as_tokens(tmp_path, tokenizer, write_lines):
    settings = config(tokenizer, write_lines("p.jsonl", PAIRS), write_lines("s.jsonl", STEPS))
    stage = build(settings, tmp_path / "run", 0)
    formatter = load_formatter(load_tokenizer(str(stage / "tokenizer")), "boxed")
    decode = formatter.tokenizer.decode
    (pair,) = Pairs(stage / "preference_train.parquet")
    assert decode(pair.prompt).endswith("b<|end|><|user|>c<|end|><|assistant|>")
    assert decode(pair.chosen) == "d<|end|><|eos|>"
    # The answer spells an end token: it is text, and the real ends come after it.
    assert decode(pair.rejected) == "no<|end|><|end|><|eos|>"
    assert pair.rejected.count(formatter.tokenizer.convert_tokens_to_ids("<|end|>")) == 1
    (row,) = Steps(stage / "steps_train.parquet")
    assert row.labels == [1, 0]
    assert row.prompt == formatter.prompt_ids("What is 2+2?")
    text = "Step 1: 2+2=4.\n\nStep 2: So 5. The answer is: 5"
    assert row.prompt + row.completion == formatter.training_row("What is 2+2?", text)[0]
    first, last = row.step_ends
    assert decode(row.completion[: first + 1]).rstrip("\n") == "Step 1: 2+2=4."
    assert decode(row.completion[: last + 1]) == text
    figures = read_json(stage / "statistics.json")
    assert figures["dropped"]["rows"] == {"hh_rlhf": {"same_answer": 1}}
    assert figures["preference"]["train"]["rows"] == 1
    assert figures["steps"]["train"]["labels"] == {"good": 1, "bad": 1}
    assert len(Pairs(stage / "preference_validation.parquet")) == 0


def test_the_columns_are_the_schemas(tmp_path, tokenizer, write_lines):
    settings = config(tokenizer, write_lines("p.jsonl", PAIRS), write_lines("s.jsonl", STEPS))
    stage = build(settings, tmp_path / "run", 0)
    for kind, item in (("preference", Preference), ("steps", LabelledSteps)):
        schema = pq.read_schema(stage / f"{kind}_train.parquet")
        assert all(f"\n        {field.name} " in item.__doc__ for field in schema)


@pytest.mark.parametrize("layout", ["markers", "qwen25", "llama3", "plain"])
@pytest.mark.parametrize(
    "steps",
    [
        ["12+5=17", "so 17."],
        ["π ≤ 3.5%", "名字", "名"],
        ["a\n\nb", "c", "."],
        ["(", ")", " x", "<|im_end|>"],
    ],
)
def test_a_steps_last_token_holds_its_last_character(make_tokenizer, layout, steps):
    formatter = load_formatter(make_tokenizer(layout), "boxed", layout)
    row = steps_row(formatter, labelled(steps, [1, -1, 1, -1][: len(steps)]))
    decode = formatter.tokenizer.decode
    for number, end in enumerate(row["step_ends"].tolist()):
        written = "\n\n".join(steps[: number + 1])
        # With the token the step is whole, without it it is not; a break may be in the token.
        assert decode(row["completion"][: end + 1]).lstrip(" ").startswith(written)
        assert not decode(row["completion"][:end]).lstrip(" ").startswith(written)
    assert list(row["labels"]) == [1, 0, 1, 0][: len(steps)]


def test_neutral_and_unjudged_steps_are_context(make_tokenizer):
    formatter = load_formatter(make_tokenizer("markers"), "boxed")
    steps = ["one", "two", "three", "four"]
    every = steps_row(formatter, labelled(steps, [1, 1, 1, 1]))
    some = steps_row(formatter, labelled(steps, [1, 0, None, -1]))
    assert some["completion"].tolist() == every["completion"].tolist()
    assert some["step_ends"].tolist() == [every["step_ends"][0], every["step_ends"][3]]
    assert some["labels"].tolist() == [1, 0]


def test_held_out_rows_are_whole_prompts(tmp_path):
    items = [preference(f"p{n % 7}", number=n) for n in range(30)]
    items += [labelled(["s"], [1], f"q{n % 9}") for n in range(40)]
    moved = hold_out(items, 10, seed=3)
    for kind, count in ((Preference, 10), (LabelledSteps, 10)):
        own = [item for item in moved if isinstance(item, kind)]
        held = {
            str(i.prompt if kind is Preference else i.question)
            for i in own
            if i.split == "validation"
        }
        rest = {
            str(i.prompt if kind is Preference else i.question) for i in own if i.split == "train"
        }
        assert not held & rest
        # Prompts have 4 or 5 rows each, so 10 are two of five, or as near as whole prompts get.
        assert count - 2 <= sum(item.split == "validation" for item in own) <= count
    assert hold_out(items, 10, seed=3) == moved != hold_out(items, 10, seed=4)
    assert hold_out(items, 0, seed=3) == items


def test_a_prompt_of_the_validation_split_is_not_trained_on():
    items = [
        preference("Same  prompt"),
        preference("other"),
        preference("same prompt", "test"),
        labelled(["s"], [1], "same prompt"),
    ]
    kept, left_out = without_held_out_prompts(items)
    assert kept == items[1:]
    assert left_out == {"s": 1}


def test_long_bad_and_unlabelled_rows_are_counted_or_end_the_build(
    tmp_path, tokenizer, write_lines
):
    bad = [*PAIRS, b"{broken", {"chosen": "no turn", "rejected": "no turn"}]
    pairs, steps = write_lines("p.jsonl", bad), write_lines("s.jsonl", STEPS)
    with pytest.raises(UserError, match=r"p.jsonl, line 3"):
        build(config(tokenizer, pairs, steps), tmp_path / "run", 0)
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match=r"s.jsonl, line 1: a row of \d+ tokens"):
        build(
            config(tokenizer, pairs, steps, on_bad_row="skip", max_length=60, on_too_long="fail"),
            tmp_path / "run",
            0,
        )
    settings = config(tokenizer, pairs, steps, on_bad_row="skip", max_length=60)
    stage = build(settings, tmp_path / "run", 0)
    dropped = read_json(stage / "statistics.json")["dropped"]
    assert dropped["rows"] == {"hh_rlhf": {"bad_row": 2, "same_answer": 1}}
    assert dropped["judged"] == {"math_shepherd": {"too_long": 1}}
    assert not (stage / "steps_train.parquet").exists()


def test_a_missing_or_old_file_is_named(tmp_path):
    with pytest.raises(UserError, match="preference pairs"):
        Pairs(tmp_path / "preference_train.parquet")
    (tmp_path / "steps_train.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match="cannot be read"):
        Steps(tmp_path / "steps_train.parquet")


@pytest.mark.parametrize(
    ("kind", "table", "name", "rows"),
    [
        ("prm800k", "steps", "prm/prm800k_phase1_test.jsonl", 103),
        ("math_shepherd", "steps", "prm/math_shepherd_samples.jsonl", 7),
        ("hh_rlhf", "preference", "preference/hh_rlhf_harmless_base_test_first200.jsonl", 199),
    ],
)
def test_real_files_come_out(tmp_path, tokenizer, shared, kind, table, name, rows):
    settings = validate(
        DataConfig,
        {
            "tokenizer": {"path": str(tokenizer)},
            "max_length": 100000,
            "judged_validation_rows": 5,
            "sources": [{"kind": kind, "train": str(shared(name))}],
        },
        "test",
    )
    figures = read_json(build(settings, tmp_path / "run", 0) / "statistics.json")
    found = figures[table]
    assert (found["train"]["rows"], found["validation"]["rows"]) == (rows - 5, 5)
    json.dumps(figures, allow_nan=False)


def test_a_template_that_trains_the_wrong_thing_is_refused(tmp_path, tokenizer, write_lines):
    made = load_tokenizer(str(tokenizer))
    # Everything said is generated, the user's turns too.
    made.chat_template = (
        "{{ bos_token }}{% generation %}{% for m in messages %}{{ m['content'] }}"
        "{{ eos_token }}{% endfor %}{% endgeneration %}"
    )
    made.save_pretrained(tokenizer)
    pairs, steps = write_lines("p.jsonl", PAIRS), write_lines("s.jsonl", STEPS)
    with pytest.raises(UserError, match="preflight, row 0"):
        build(config(tokenizer, pairs, steps), tmp_path / "run", 0)
