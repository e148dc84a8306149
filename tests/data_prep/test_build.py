import hashlib
import json
import math

import pytest

from data_prep import build as script
from data_prep.build import DataConfig, build, tokenizer_of_run
from data_prep.config import validate
from data_prep.errors import UserError
from data_prep.formatting import load_formatter
from data_prep.jsonl import read_json
from data_prep.loader import Sequences
from data_prep.normalise import normalise
from data_prep.schema import Problem, read_problems, require_texts
from data_prep.tokenizer import load_tokenizer, with_tokenizer

SMALL = {
    "profile": "embedded",
    "sources": [{"kind": "embedded", "train": 300, "validation": 40, "test": 60}],
    "tokenizer": {"vocab_size": 400},
    "rows": 500,
    "sft_validation_rows": 30,
    "workers": 1,
    "phases": [
        {"share": 0.6, "styles": {"worked": 1}},
        {"share": 0.4, "styles": {"worked": 3, "bare": 1}},
    ],
}
GSM = [
    {
        "question": f"Tom has {n} pens and buys {n}. How many?",
        "answer": f"He has {n}+{n}=<<{n}+{n}={2 * n}>>{2 * n} pens.\n#### {2 * n:,}",
    }
    for n in range(600, 620)
]


def config(**changes):
    return validate(DataConfig, {**SMALL, **changes}, "test")


def gsm(path, **changes):
    table = {"sources": [{"kind": "gsm8k", "train": str(path)}], "rows": 0, "phases": []}
    return config(**table, **changes)


def digest(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "manifest.json"
    }


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return build(config(), tmp_path_factory.mktemp("run"), 7)


def rows_of(folder, split="train"):
    """Every row with its problem and the style of its solution."""
    problems = list(read_problems(folder / f"{split}.jsonl"))
    formatter = load_formatter(load_tokenizer(str(folder / "tokenizer")), "embedded")
    styles = {
        (number, tuple(formatter.training_row(problem.question, text)[0])): style
        for number, problem in enumerate(problems)
        for style, text in problem.solutions.items()
    }
    data = Sequences(folder, split)
    rows = []
    for index in range(len(data)):
        ((ids, mask),), ((source, number),) = data[index], data.origins(index)
        rows.append(
            {
                "problem_id": problems[number].id,
                "source": source,
                "mask": mask.tolist(),
                "input_ids": ids.tolist(),
                "style": styles[number, tuple(ids.tolist())],
            }
        )
    return rows


def test_the_stage_has_every_file(built):
    names = {path.name for path in built.iterdir()}
    assert names == {
        "train.jsonl",
        "validation.jsonl",
        "test.jsonl",
        "tokenizer",
        "train-00000-of-00001.arrow",
        "validation-00000-of-00001.arrow",
        "statistics.json",
        "manifest.json",
    }
    assert built.name == "data"


def test_rows_are_what_the_formatter_makes_of_the_problems(built):
    problems = {problem.id: problem for problem in read_problems(built / "train.jsonl")}
    formatter = load_formatter(load_tokenizer(str(built / "tokenizer")), "embedded")
    rows = rows_of(built)
    assert len(rows) == 500
    for row in rows[::17]:
        problem = problems[row["problem_id"]]
        expected = formatter.training_row(problem.question, problem.solutions[row["style"]])
        assert (row["input_ids"], row["mask"]) == expected
        assert row["source"] == "embedded"


def test_masks_equal_the_templates_own(built):
    tokenizer = load_tokenizer(str(built / "tokenizer"))
    problems = {problem.id: problem for problem in read_problems(built / "train.jsonl")}
    for row in rows_of(built)[::29]:
        problem = problems[row["problem_id"]]
        whole = tokenizer.apply_chat_template(
            [
                {"role": "user", "content": problem.question},
                {"role": "assistant", "content": problem.solutions[row["style"]]},
            ],
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        assert (row["input_ids"], row["mask"]) == (whole["input_ids"], whole["assistant_masks"])


def test_rows_follow_the_phases(built):
    styles = [row["style"] for row in rows_of(built)]
    assert set(styles[:300]) == {"worked"}
    bare = styles[300:].count("bare")
    # Binomial with n = 200, p = 1/4: within four standard deviations.
    assert abs(bare - 50) < 4 * math.sqrt(200 * 0.25 * 0.75)


def test_a_phase_takes_every_problem_before_it_repeats_one(built):
    ids = [row["problem_id"] for row in rows_of(built)]
    assert len(set(ids[:300])) == 300
    assert len(set(ids[300:])) == 200
    assert ids[:200] != ids[300:]


def test_splits_share_no_question(built):
    keys = {
        split: {normalise(problem.question) for problem in read_problems(built / f"{split}.jsonl")}
        for split in ("train", "validation", "test")
    }
    assert [len(keys[split]) for split in keys] == [300, 40, 60]
    assert not keys["train"] & keys["test"]
    assert not keys["train"] & keys["validation"]
    assert not keys["validation"] & keys["test"]
    tokenizer = load_tokenizer(str(built / "tokenizer"))
    trained = {tokenizer.decode(row["input_ids"]) for row in rows_of(built)}
    for problem in read_problems(built / "test.jsonl"):
        assert not any(problem.question in text for text in trained)


def test_statistics_agree_with_the_rows(built):
    figures = read_json(built / "statistics.json")
    rows = rows_of(built)
    assert figures["sft_train"]["rows"] == len(rows)
    assert figures["sft_train"]["tokens"]["all"] == sum(len(row["input_ids"]) for row in rows)
    assert figures["sft_train"]["tokens"]["assistant"] == sum(sum(row["mask"]) for row in rows)
    assert figures["sft_train"]["length"]["max"] == max(len(row["input_ids"]) for row in rows)
    assert figures["golds"] == {"embedded": {"correct": 400}}
    assert sum(figures["sft_train"]["by_level"].values()) == 500


def test_a_complete_stage_is_kept_and_a_changed_one_is_built_again(built):
    stamp = (built / "manifest.json").stat().st_mtime_ns
    assert build(config(), built.parent, 7) == built
    assert (built / "manifest.json").stat().st_mtime_ns == stamp


def test_two_builds_are_byte_identical_and_a_seed_changes_them(built, tmp_path):
    assert digest(build(config(), tmp_path / "a", 7)) == digest(built)
    assert digest(build(config(), tmp_path / "b", 8)) != digest(built)


def test_one_pass_takes_every_problem_and_style_once(tmp_path):
    folder = build(config(rows=0, phases=[]), tmp_path, 7)
    pairs = [(row["problem_id"], row["style"]) for row in rows_of(folder)]
    assert len(pairs) == len(set(pairs)) == 600


def test_a_source_with_one_style_uses_it_in_every_phase(tmp_path, write_lines):
    path = write_lines("gsm.jsonl", GSM)
    table = {**SMALL, "sources": [*SMALL["sources"], {"kind": "gsm8k", "train": str(path)}]}
    folder = build(validate(DataConfig, table, "test"), tmp_path / "run", 7)
    reference = [row for row in rows_of(folder) if row["source"] == "gsm8k"]
    assert reference
    assert {row["style"] for row in reference} == {"reference"}


def test_gsm8k_solutions_end_in_a_box_without_annotations(tmp_path, write_lines):
    folder = build(gsm(write_lines("gsm.jsonl", GSM)), tmp_path / "run", 7)
    problem = next(read_problems(folder / "train.jsonl"))
    assert problem.answer == "1200"
    assert problem.solutions["reference"] == "He has 600+600=1200 pens.\n\\boxed{1200}"
    assert problem.where.endswith("gsm.jsonl, line 1")


def test_held_out_copies_win_over_train_copies(tmp_path, write_lines):
    other = [{**GSM[0], "question": f"  {GSM[0]['question'].upper()} "}, *GSM[1:3]]
    train, test = write_lines("train.jsonl", [*GSM, GSM[5]]), write_lines("test.jsonl", other)
    sources = [{"kind": "gsm8k", "train": str(train), "test": str(test)}]
    folder = build(config(sources=sources, rows=0, phases=[]), tmp_path / "run", 7)
    assert len(list(read_problems(folder / "test.jsonl"))) == 3
    assert len(list(read_problems(folder / "train.jsonl"))) == 17
    assert read_json(folder / "statistics.json")["dropped"]["duplicates"] == {
        "train, also in test": 3,
        "train, also in train": 1,
    }


def test_too_long_rows_are_dropped_and_counted(tmp_path, write_lines):
    long = {"question": "Q " * 400, "answer": "so\n#### 1"}
    path = write_lines("gsm.jsonl", [*GSM, long])
    folder = build(gsm(path, max_length=200), tmp_path / "run", 7)
    assert len(rows_of(folder)) == 20
    assert read_json(folder / "statistics.json")["dropped"]["too_long"]["train"] == 1
    with pytest.raises(UserError, match="line 21: a row of"):
        build(gsm(path, max_length=200, on_too_long="fail"), tmp_path / "other", 7)


BROKEN = {
    "broken JSON": (b'{"question": "a"', "line 3: not JSON"),
    "not UTF-8": (b'{"question": "\xff"}', "line 3: invalid UTF-8"),
    "not an object": (b"[1]", "line 3: a JSON list"),
    "half a surrogate": (b'{"question": "\\ud800", "answer": "#### 1"}', "line 3: half of a"),
    "too many digits": (b'{"question": ' + b"1" * 5000 + b"}", "line 3: JSON that cannot"),
    "nested too deep": (b'{"a":' * 100_000, "line 3: JSON that cannot"),
    "missing column": ({"question": "a"}, "line 3: no column 'answer'"),
    "wrong type": ({"question": 3, "answer": "#### 1"}, "line 3: column 'question' is int"),
    "no gold": ({"question": "a", "answer": "it is 3"}, "line 3: no gold"),
    "empty gold": ({"question": "a", "answer": "#### "}, "line 3: no gold"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_row_ends_the_build_or_is_counted(tmp_path, write_lines, name):
    row, message = BROKEN[name]
    path = write_lines("gsm.jsonl", [*GSM[:2], row, *GSM[2:]])
    with pytest.raises(UserError, match=message) as caught:
        build(gsm(path), tmp_path / "run", 7)
    assert str(path) in str(caught.value)
    assert "what to do" in str(caught.value)
    assert not (tmp_path / "run").exists()
    folder = build(gsm(path, on_bad_row="skip", on_bad_gold="skip"), tmp_path / "run", 7)
    reasons = read_json(folder / "statistics.json")["dropped"]["rows"]["gsm8k"]
    assert reasons == {"bad_gold" if "gold" in name else "bad_row": 1}
    # The rows after it kept their numbers and contents.
    whole = {p.question: p.answer for p in read_problems(folder / "train.jsonl")}
    assert whole == {r["question"]: str(2 * n) for n, r in zip(range(600, 620), GSM, strict=True)}


def test_a_gold_that_its_solution_contradicts_ends_the_build(tmp_path, write_lines):
    bad = {
        "problem": "What is 1+1?",
        "solution": "It is $\\boxed{2}$.",
        "level": "Level 1",
        "type": "Algebra",
    }
    path = write_lines("math.jsonl", [bad])
    own = tmp_path / "own.py"
    own.write_text(
        "from data_prep.schema import Problem\n"
        "from data_prep.sources import math\n"
        "class Config(math.Config):\n    kind: str = ''\n"
        "def read(config, seed):\n"
        "    for p in math.read(math.Config(train=config.train), seed):\n"
        "        row = p.to_row()\n"
        "        yield Problem(**{**row, 'answer': '3'})\n"
        "def convert(row, place):\n"
        "    p = math.convert(row, place)\n"
        "    return Problem(**{**p.to_row(), 'answer': '3'})\n"
    )
    table = {"sources": [{"kind": str(own), "train": str(path)}], "rows": 0, "phases": []}
    with pytest.raises(UserError, match=r"math.jsonl, line 1: gold '3', but its own solution"):
        build(config(**table), tmp_path / "run", 7)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"sources": [{"kind": "gms8k", "train": "x"}]}, "did you mean 'gsm8k'"),
        ({"sources": [{"kind": "gsm8k"}]}, "a path for at least one"),
        ({"sources": [{"kind": "gsm8k", "train": "x.jsonl", "tset": "y"}]}, "'tset'|tset"),
        ({"sources": []}, "sources"),
        ({"row": 3}, "did you mean 'rows'"),
        ({"phases": [{"share": 0, "styles": {"worked": 1}}]}, "share"),
        ({"phases": [{"share": 1, "styles": {}}]}, "positive weights"),
    ],
)
def test_a_broken_configuration_is_named(table, message):
    with pytest.raises(UserError, match=message):
        config(**table)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"profile": "bxed"}, "did you mean 'boxed'"),
        ({"sources": [{"kind": "gsm8k", "train": "absent.jsonl"}]}, "no such file: absent.jsonl"),
        ({"tokenizer": {"path": "./absent/tokenizer"}}, "absent/tokenizer"),
        ({"tokenizer": {"layout": "chatlm"}}, "did you mean 'chatml'"),
        ({"phases": [{"share": 1, "styles": {"wroked": 1}}]}, "none is a style of"),
        ({"max_length": 8}, "no row has at most 8 tokens"),
    ],
)
def test_what_cannot_be_built_leaves_nothing_behind(tmp_path, table, message):
    with pytest.raises(UserError, match=message):
        build(config(**table), tmp_path / "run", 7)
    assert not (tmp_path / "run").exists()


def test_a_given_models_tokenizer_is_used(built, tmp_path):
    given = with_tokenizer(config(), str(built / "tokenizer"))
    folder = build(given, tmp_path, 7)
    assert rows_of(folder) == rows_of(built)
    assert with_tokenizer(given, "another") == given
    assert with_tokenizer(config(), "") == config()


def test_the_tokenizer_is_the_models_or_the_mixtures(tmp_path):
    mixture = str(tmp_path / "mixture" / "tokenizer")
    assert tokenizer_of_run({"model": {}}, tmp_path) == ""
    assert tokenizer_of_run({"mixture": {}}, tmp_path) == mixture
    assert tokenizer_of_run({"model": {"path": ""}, "mixture": {}}, tmp_path) == mixture
    assert tokenizer_of_run({"model": {"path": "a"}, "mixture": {}}, tmp_path) == "a"


def run_toml(tmp_path, text):
    path = tmp_path / "run.toml"
    path.write_text(text)
    return str(path)


TOML = """
seed = 7
out = "{out}"
[data]
profile = "embedded"
workers = 1
sources = [{{ kind = "embedded", train = 60, validation = 10, test = 10 }}]
[model]
path = ""
[other]
stage = "has its own table"
"""


def test_the_command_builds_with_overrides(tmp_path, capsys):
    path = run_toml(tmp_path, TOML.format(out=tmp_path / "run"))
    script.main(["--config", path, "--rows", "90", "--tokenizer.vocab-size", "300", "--seed", "3"])
    assert capsys.readouterr().out.strip() == str(tmp_path / "run" / "data")
    figures = read_json(tmp_path / "run" / "data" / "statistics.json")
    assert (figures["seed"], figures["vocabulary"]) == (3, 300)
    assert figures["sft_train"]["rows"] == 90


def test_a_dry_run_prints_the_configuration_and_writes_nothing(tmp_path, capsys):
    path = run_toml(tmp_path, TOML.format(out=tmp_path / "run"))
    script.main(["--config", path, "--rows", "90", "--dry-run"])
    printed = capsys.readouterr().out
    assert "rows = 90" in printed
    assert 'kind = "embedded"' in printed
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("[data]", "[dta]"), "key 'data': missing"),
        (('profile = "embedded"', 'profil = "embedded"'), r"'data.profil'.*did you mean 'profile'"),
        (('kind = "embedded"', 'kind = "embeded"'), "did you mean 'embedded'"),
        (("seed = 7", "seed = -7"), "key 'seed'"),
        (("seed = 7", "seed ="), "not TOML"),
    ],
)
def test_a_broken_file_is_named(tmp_path, change, message):
    path = run_toml(tmp_path, TOML.format(out=tmp_path / "run").replace(*change))
    with pytest.raises(UserError, match=message) as caught:
        script.main(["--config", path])
    assert path in str(caught.value)


def test_real_files_build(tmp_path, shared):
    sources = [
        {"kind": "gsm8k", "train": str(shared("gsm8k/test.jsonl"))},
    ]
    folder = build(config(sources=sources, rows=0, phases=[], workers=2), tmp_path, 7)
    figures = read_json(folder / "statistics.json")
    assert figures["golds"] == {"gsm8k": {"correct": 1319}}
    json.dumps(figures, allow_nan=False)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"answer": 4}, ("mine.py", "answer is 4", "answer=str(…)")),
        ({"level": None}, ("level is None",)),
        ({"split": "training"}, ("split is 'training'", "one of train, validation, test")),
    ],
)
def test_a_problem_that_a_plugin_makes_wrong_is_refused(change, expected):
    given = {"id": "1", "question": "2+2?", "answer": "4", "source": "mine", "split": "train"}
    assert require_texts(Problem(**given), "mine.py").answer == "4"
    with pytest.raises(UserError) as caught:
        require_texts(Problem(**{**given, **change}), "mine.py")
    assert all(part in str(caught.value) for part in expected)
    with pytest.raises(UserError, match="it gives dict rows"):
        require_texts(given, "mine.py")
