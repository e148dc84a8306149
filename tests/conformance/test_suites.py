"""Every suite keeps the contract of `eval.suites`, on rows of its published format.

A suite of your own is tested by adding a row of its format here, or by calling
`check_suite(kind, path)` from a test of yours.
"""

from __future__ import annotations

import json

import pytest

from data_prep.errors import UserError
from data_prep.plugins import load_plugin, plugin_names
from data_prep.schema import Problem
from eval.suites import GROUPS, SuiteConfig, choose_suites
from verifiers import verify

# kind → (a row of the published format, its gold)
ROWS = {
    "aime": ({"ID": "2024-I-1", "Problem": "What is $n$?", "Solution": "…", "Answer": "073"}, "73"),
    "amc": ({"id": 0, "problem": "What is $n$?", "answer": 27.0}, "27"),
    "cmath": (
        {
            "grade": 1,
            "question": "一盒茶叶有6小包，3盒有多少小包？",
            "golden": "18",
            "reasoning_step": 1,
            "num_digits": 2,
        },
        "18",
    ),
    "cmath_dev": (
        {
            "grade": 2,
            "question": "99页看了90页，还剩多少页？",
            "answer": "9",
            "reasoning_step": 1,
            "num_digits": 2,
        },
        "9",
    ),
    "embedded": (Problem("e-1", "What is 1+1?", "2", "embedded", "test").to_row(), "2"),
    "gsm8k": ({"question": "How many?", "answer": "<<1000+5=1005>>\n#### 1,005"}, "1005"),
    "gsm_hard": ({"input": "How much?", "code": "…", "target": 3244047.0999999996}, "3244047.1"),
    "math": (
        {
            "problem": "Find $x$.",
            "level": "Level 3",
            "type": "Algebra",
            "solution": r"So \boxed{1}, no, $\boxed{\frac{1}{2}}$.",
        },
        r"\frac{1}{2}",
    ),
    "math500": (
        {
            "problem": "Find $x$.",
            "solution": "…",
            "answer": r"\frac{3}{4}",
            "subject": "Algebra",
            "level": 2,
            "unique_id": "test/algebra/1.json",
        },
        r"\frac{3}{4}",
    ),
    "mgsm_en": ({"question": "How much?", "answer": "2,125"}, "2125"),
    "mgsm_zh": (
        {
            "dataset": "mgsm-zh",
            "id": "0",
            "answer": "18",
            "messages": [
                {"role": "user", "content": "赚多少钱？"},
                {"role": "assistant", "content": ""},
            ],
        },
        "18",
    ),
    "minerva": (
        {"problem": "How far?", "solution": r"It is \boxed{1.6}.", "type": "astronomy"},
        "1.6",
    ),
    "olympiadbench": (
        {
            "id": 7,
            "subfield": "Algebra",
            "context": None,
            "question": "Find all.",
            "solution": ["…"],
            "final_answer": [r"$\frac{1}{2 n+2}$"],
            "unit": None,
            "is_multiple_answer": False,
            "answer_type": "Expression",
            "error": None,
        },
        r"\frac{1}{2 n+2}",
    ),
    "own": ({"question": "What is 1/2?", "answer": 0.5}, "0.5"),
    "svamp": (
        {
            "ID": "chal-1",
            "Body": "Ann had 3 pens",
            "Question": "How many?",
            "Answer": 3.0,
            "Type": "Addition",
            "Equation": "3",
        },
        "3",
    ),
}
# Real file of each suite, below ../shared/data.
FILES = {
    "cmath": ("cmath/test_deepseek.jsonl", 1098),
    "cmath_dev": ("cmath/test_qwen.jsonl", 600),
    "gsm8k": ("gsm8k/test.jsonl", 1319),
    "gsm_hard": ("gsm_hard/test.jsonl", 1319),
    "math": ("math/test.jsonl", 5000),
    "math500": ("math500/test.jsonl", 500),
    "mgsm_en": ("mgsm_en/mgsm_en_tsv.jsonl", 250),
    "mgsm_zh": ("mgsm_zh/mgsm_zh.jsonl", 250),
    "olympiadbench": ("olympiadbench/test.jsonl", 675),
    "svamp": ("svamp/test.jsonl", 1000),
}


def check_suite(kind: str, path: str) -> list[Problem]:
    """Load a suite and check what the contract promises; return its problems."""
    module = load_plugin("eval.suites", kind)
    assert issubclass(module.Config, SuiteConfig)
    assert (module.__doc__ or "").strip(), "a suite says what it is"
    config = module.Config.model_validate({"kind": kind, "path": path})
    problems = module.load(config)
    assert problems == module.load(config), "the same file gives the same problems"
    assert len({problem.id for problem in problems}) == len(problems)
    for problem in problems:
        assert isinstance(problem, Problem)
        assert problem.question == problem.question.strip() != ""
        assert problem.answer == problem.answer.strip() != ""
        assert problem.split == "test"
        assert json.dumps(problem.to_row())
    return problems


def test_every_suite_has_a_row_here():
    assert set(ROWS) == set(plugin_names("eval.suites"))
    assert {name for group in GROUPS.values() for name in group} <= set(ROWS)


@pytest.mark.parametrize("kind", sorted(ROWS))
def test_published_row_gives_its_gold(kind, tmp_path):
    row, gold = ROWS[kind]
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    (problem,) = check_suite(kind, str(path))
    assert problem.answer == gold
    assert verify(gold, f"\\boxed{{{problem.answer}}}").is_correct


@pytest.mark.parametrize("kind", sorted(ROWS))
def test_wrong_columns_name_file_and_line(kind, tmp_path):
    path = tmp_path / "wrong.jsonl"
    path.write_text('{"foo": 1}\n', encoding="utf-8")
    (suite,) = choose_suites([f"{kind}={path}"], {})
    with pytest.raises(UserError, match=r"wrong\.jsonl, line 1"):
        suite.load()


@pytest.mark.parametrize("kind", sorted(FILES))
def test_real_file_has_all_its_rows(kind, shared):
    name, rows = FILES[kind]
    problems = check_suite(kind, str(shared / "data" / name))
    assert len(problems) == rows


def test_the_two_cmath_sets_are_not_taken_for_each_other(shared):
    (suite,) = choose_suites([f"cmath_dev={shared}/data/cmath/test_deepseek.jsonl"], {})
    with pytest.raises(UserError, match="the other public CMATH set"):
        suite.load()


def test_a_downloaded_copy_of_the_hub_is_read_by_datasets(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    copy = tmp_path / "copy"
    copy.mkdir()
    rows = [{"question": f"How many are {i}?", "answer": f"#### {i}"} for i in range(3)]
    (copy / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    module = load_plugin("eval.suites", "gsm8k")
    problems = module.load(module.Config(hub=str(copy)))
    assert [problem.answer for problem in problems] == ["0", "1", "2"]
    with pytest.raises(UserError, match="could not be loaded from the hub"):
        module.load(module.Config(hub=str(tmp_path / "absent")))


def test_names_groups_and_files(tmp_path):
    own = tmp_path / "mine.jsonl"
    own.write_text('{"question": "a", "answer": "1"}\n')
    chosen = choose_suites(["chinese", str(own)], {"cmath": "c.jsonl"})
    assert [suite.name for suite in chosen] == ["mgsm_zh", "cmath", "cmath_dev", "mine"]
    assert chosen[1].config.path == "c.jsonl"
    assert [suite.language for suite in chosen] == ["zh", "zh", "zh", "en"]
    # A group's suite is read from the file that stands beside the group; groups may overlap.
    core = choose_suites(["gsm8k=g.jsonl", "core", "chinese"], {})
    assert [s.name for s in core] == ["gsm8k", "math500", "mgsm_zh", "cmath", "cmath_dev"]
    assert core[0].config.path == "g.jsonl"
    with pytest.raises(UserError, match="'cmath' twice"):
        choose_suites(["cmath", "cmath=c.jsonl"], {})
    with pytest.raises(UserError, match=r"(?s)no suite 'cmth' did you mean.*group \(core"):
        choose_suites(["cmth"], {})
