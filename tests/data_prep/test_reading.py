import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.config import validate
from data_prep.errors import UserError
from data_prep.mixture_config import Ingredient
from data_prep.reading import Rejected, _table, items, read_stretch, stretches

ROWS = [{"question": f"What is {n}+1?", "answer": f"{n}+1={n + 1}\n#### {n + 1}"} for n in range(7)]


def source(train, kind="gsm8k"):
    return validate(Ingredient, {"source": {"kind": kind, "train": str(train)}}, "test").source


@pytest.fixture
def tables(tmp_path):
    """The same rows in every kind of file, and in a local folder in the hub's layout."""
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    (tmp_path / "rows.jsonl").write_text(lines)
    (tmp_path / "rows.json").write_text(json.dumps(ROWS))
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "rows.parquet")
    (tmp_path / "hub").mkdir()
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "hub" / "train-00000.parquet")
    return tmp_path


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.parquet", "hub"])
def test_every_kind_of_file_gives_the_same_rows(tables, name):
    path = f"hub:{tables / 'hub'}:train" if name == "hub" else tables / name
    settings = source(path)
    found = list(items(settings))
    assert [item.question for item in found] == [row["question"] for row in ROWS]
    unit = "line 3" if name == "rows.jsonl" else "row 3"
    assert found[2].where.endswith(unit)
    parts = list(stretches(settings, 3))
    assert [part.rows for part in parts] == [3, 3, 1]
    assert [p.number for part in parts for p, _ in read_stretch(part)] == list(range(7))


def test_hub_stands_for_the_sources_own_data_set(tables, monkeypatch):
    import datasets

    asked = []

    def load(identity, name=None, split=None, **more):
        asked.append((identity, name, split))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert len(list(items(source("hub")))) == 7
    assert len(list(items(source("hub:someone/mirror:extra")))) == 7
    list(items(source("hub", "ultrachat")))
    assert asked == [
        ("openai/gsm8k", "main", "train"),
        ("someone/mirror", None, "extra"),
        ("HuggingFaceH4/ultrachat_200k", None, "train_sft"),
    ]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("absent.jsonl", None, "no such file"),
        ("rows.txt", "x", "a file that ends in '.txt'"),
        ("rows.json", "{", "not JSON"),
        ("rows.json", "{}", "a JSON dict"),
        ("rows.parquet", "not parquet", "datasets cannot open it"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path, name, text, message):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        list(items(source(tmp_path / name)))
    assert name in str(caught.value)


def test_a_data_set_in_pieces_is_read_whole_with_ids_of_its_own(monkeypatch):
    import datasets

    asked = []

    def load(identity, name=None, split=None, **more):
        asked.append((identity, name, split))
        rows = [
            {"problem": f"{name} {n}", "solution": r"\boxed{1}", "level": "", "type": ""}
            for n in range(2)
        ]
        return datasets.Dataset.from_list(rows)

    monkeypatch.setattr(datasets, "load_dataset", load)
    _table.cache_clear()
    settings = validate(Ingredient, {"source": {"kind": "math", "test": "hub"}}, "test").source
    found = list(items(settings))
    assert [problem.question for problem in found[:3]] == [
        "algebra 0",
        "algebra 1",
        "counting_and_probability 0",
    ]
    assert asked[0] == ("EleutherAI/hendrycks_math", "algebra", "test")
    assert len(found) == len({problem.id for problem in found}) == 14
    assert found[2].where == ("hub:EleutherAI/hendrycks_math/counting_and_probability:test, row 1")
    parts = [p for part in stretches(settings, 1) for p, _ in read_stretch(part)]
    assert [place.number for place in parts] == list(range(14))
    _table.cache_clear()


@pytest.mark.parametrize(
    ("kind", "expected"), [("metamathqa", "one of train"), ("ultrafeedback", "one of train, test")]
)
def test_a_split_that_the_hub_does_not_have_is_named(kind, expected):
    settings = validate(Ingredient, {"source": {"kind": kind, "validation": "hub"}}, "test").source
    with pytest.raises(UserError, match="no such split") as caught:
        list(items(settings))
    assert expected in str(caught.value)


def test_an_empty_file_is_one_bad_row(tmp_path):
    (tmp_path / "rows.jsonl").write_text("\n\n")
    for rows in (0, 3):
        found = [
            raw
            for part in stretches(source(tmp_path / "rows.jsonl"), rows)
            for raw in read_stretch(part)
        ]
        assert len(found) == 1
    (rejected,) = items(source(tmp_path / "rows.jsonl"))
    assert isinstance(rejected, Rejected)
    assert rejected.reason == "bad_row"
    assert "no rows" in str(rejected.error)
