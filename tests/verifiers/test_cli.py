"""The command line, as a person runs it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from verifiers.__main__ import main

ROOT = Path(__file__).resolve().parents[2]


def test_explain_tells_the_steps(capsys: pytest.CaptureFixture) -> None:
    assert main(["1/2", r"so \boxed{x = 0.5}"]) == 0
    out = capsys.readouterr().out
    for part in ("by box", "characters 10 to 17", "as a relation", "value_of_name", "correct in"):
        assert part in out
    assert main(["explain", "7", r"\boxed{8}", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["outcome"] == "incorrect"
    assert main(["7", "no box", "--policy", "boxed_only"]) == 1
    assert "none: no_box" in capsys.readouterr().out


def test_a_misspelt_command_is_not_silently_a_gold(capsys: pytest.CaptureFixture) -> None:
    assert main(["chek", "my_checker.py"]) == 1
    assert "note: 'chek' is taken for a gold answer; commands are" in capsys.readouterr().err
    assert main(["12", r"\boxed{12}"]) == 0
    assert capsys.readouterr().err == ""


def test_grade_keeps_the_order(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    kinds = [
        ("1", "answer"), (r"\boxed{1}", "response"), ("x = 2", "answer"), ("", "answer"),
    ]  # fmt: skip
    rows = [
        {"id": f"r{i}", "gold": str(i % 3), "pred": p, "kind": k}
        for i, (p, k) in enumerate(kinds * 20)
    ]  # fmt: skip
    source, target = tmp_path / "rows.jsonl", tmp_path / "verdicts.jsonl"
    source.write_text("\n".join(map(json.dumps, rows)))
    assert main(["grade", "--input", str(source), "--output", str(target), "--workers", "2"]) == 0
    out = [json.loads(line) for line in target.read_text().splitlines()]
    assert [row["id"] for row in out] == [row["id"] for row in rows]
    assert all(set(row) == {"id", "outcome", "extracted", "rule", "ms"} for row in out)
    expected = ["correct" if i % 3 == 1 else "incorrect" for i in range(80)]
    assert [row["outcome"] for i, row in enumerate(out) if i % 4 < 2] == [
        e for i, e in enumerate(expected) if i % 4 < 2
    ]
    assert {row["outcome"] for i, row in enumerate(out) if i % 4 == 3} == {"no_answer"}
    assert "80 rows" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir() if "part" in p.name] == []


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: not JSON"),
        ("[1]", "line 2: found list, expected a JSON object"),
        ('{"gold": "1"}', "line 2: no key 'pred'; found ['gold']"),
        ('{"gold": null, "pred": "1"}', "line 2, key 'gold': found NoneType, expected text"),
        ('{"gold": "1", "pred": "1", "kind": "bare"}', "line 2, key 'kind': found 'bare'"),
    ],
)
def test_grade_names_the_row_at_fault(
    tmp_path: Path, capsys: pytest.CaptureFixture, line: str, message: str
) -> None:
    source = tmp_path / "rows.jsonl"
    source.write_text(f'{{"gold": "1", "pred": "1"}}\n{line}\n')
    target = tmp_path / "out.jsonl"
    assert main(["grade", "--input", str(source), "--output", str(target)]) == 2
    assert f"{source}, {message}" in capsys.readouterr().err
    assert not target.exists()


def test_audit_lists_what_fails(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    source = tmp_path / "data.jsonl"
    golds = ["12", r"\frac{1}{2}", "", r"\weird{x}", "the whole plane"]
    source.write_text("\n".join(json.dumps({"answer": gold}) for gold in golds))
    assert main(["audit", str(source)]) == 1
    seen = capsys.readouterr()
    found = [json.loads(line) for line in seen.out.splitlines()]
    assert [(f["line"], f["problem"]) for f in found] == [(3, "empty"), (4, "unread"), (5, "words")]
    assert "5 golds, 3 findings: 1 empty, 1 unread, 1 words" in seen.err
    assert main(["audit", str(source), "--field", "gold"]) == 2
    assert "no key 'gold'; found ['answer']" in capsys.readouterr().err


def test_check_runs_the_conformance_tests(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    good = tmp_path / "even.py"
    good.write_text(
        "from verifiers.checkers import Checker, Outcome, Verdict\n"
        "class Even(Checker):\n"
        "    examples = (('', '12', 'correct'), ('', '13', 'incorrect'))\n"
        "    def check(self, gold, text):\n"
        "        even = text.strip()[-1:] in tuple('02468')\n"
        "        return Verdict(Outcome.CORRECT if even else Outcome.INCORRECT, rule='even')\n"
    )
    assert main(["check", str(good)]) == 0
    assert "8 passed, 0 failed" in capsys.readouterr().out
    bad = tmp_path / "bad.py"
    bad.write_text(good.read_text().replace("text.strip()[-1:]", "text.strip()[-1]"))
    assert main(["check", str(bad)]) == 1
    assert (
        "FAILED strange texts neither raise nor take long: raised IndexError"
        in capsys.readouterr().out
    )
    assert main(["check", "bxoed"]) == 2
    assert "did you mean 'boxed'" in capsys.readouterr().err


def test_import_is_light() -> None:
    """Quick because little is loaded: 139 modules, a tenth of a second on an idle machine."""
    code = (
        "import sys; before = set(sys.modules); import verifiers; from verifiers import "
        "verify, VerifierPool, group_answers, load_checker; loaded = set(sys.modules) - before; "
        "print(len(loaded), sorted({'sympy', 'torch', 'math_verify', 'mpmath', 'numpy'} & loaded))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    count, heavy = done.stdout.split(maxsplit=1)
    assert heavy.strip() == "[]"
    assert int(count) < 220


def test_the_program_starts(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "verifiers", "7", r"\boxed{7}"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "correct" in done.stdout
