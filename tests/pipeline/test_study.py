"""The study: which runs it makes, what it reads from them, and what it says of the findings."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest

from data_prep.errors import UserError
from data_prep.jsonl import write_json, write_rows
from pipeline.interval import over_seeds, share_over_seeds
from pipeline.run import stages_of
from pipeline.study import base_of, collect, curve_of, load_study, seed_run
from pipeline.study_page import markdown, table, write_page

from ..hostile import ALL, EVIL, check
from .small_run import SMALL, write_small

ONLINE = """
[[train]]
name = "{name}"
init = "sft"
batch = 2
group_size = 3
steps = 5
iterations = {iterations}
validate_every = 2
method = {{{{ kind = "grpo", beta = 0.05 }}}}
"""
STUDY = """
[study]
seeds = [3, 4]
budget = 30
online = ["one", "rft"]
relative = ["one", "dpo"]
supervision = ["two", "one"]
reinforced = "one"
iterative = "two"
"""


@pytest.fixture
def path(tmp_path) -> Path:
    start = SMALL.index('[[train]]\nname = "grpo"')
    end = SMALL.index("[evaluate]")
    stages = ONLINE.format(name="one", iterations=1) + ONLINE.format(name="two", iterations=2)
    text = SMALL[:start] + stages + SMALL[end:] + STUDY
    return write_small(tmp_path, text=text)


def load(path: Path, **changes):
    return load_study(path, changes.get("out"), changes.get("seeds", ()))


def test_the_start_is_made_once_and_every_seed_has_its_own_samples(path):
    study = load(path)
    base, runs = base_of(study), [seed_run(study, seed) for seed in (3, 4)]
    assert [name for name, _ in stages_of(base)] == ["data", "sft", "evaluate", "report"]
    for seed, run in zip((3, 4), runs, strict=True):
        names = [name for name, _ in stages_of(run)]
        assert "sft" not in names and {"generate", "rft", "one", "two"} <= set(names)
        assert run.seed == seed and run.data is not None and run.data.seed == base.seed
        assert all(s.init == f"{base.out}/sft/checkpoint" for s in run.train)
        assert run.generate is not None and run.generate.model == f"{base.out}/sft/checkpoint"
    assert len({run.out for run in (base, *runs)}) == 3


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("budget = 30", "budget = 60", "uses 30 samples"),
        ('"one", "rft"', '"one", "rtf"', "rtf"),
        ("seeds = [3, 4]", "seeds = [3, 3]", "twice"),
        ("[study]", "[study]\nsuite = 'gsm8k'", "evaluate.suites"),
        ("[study]", "[study]\nseed = 3", "seeds"),
    ],
)
def test_a_study_that_makes_no_sense_is_refused(path, old, new, words):
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(UserError, match=words):
        load(path)


def test_intervals_over_seeds_are_students():
    # Mean 2, standard error 1/√3, t(0.975, 2) = 4.302653.
    found = over_seeds([1.0, 2.0, 3.0])
    reach = 4.302653 / math.sqrt(3)
    assert found == pytest.approx((2.0, 2.0 - reach, 2.0 + reach), rel=1e-6)
    assert math.isnan(over_seeds([1.0]).low)
    assert over_seeds([0.5]).text() == "50.0"
    assert over_seeds([0.1, 0.3]).text(sign=True).startswith("+20.0 [−")
    assert over_seeds([-0.0004]).text(sign=True) == "+0.0"
    assert over_seeds([0.1, 0.3]).low < 0.0
    assert share_over_seeds([0.1, 0.3]).low == 0.0
    assert share_over_seeds([0.7, 0.9]).high == 1.0
    assert math.isnan(share_over_seeds([0.5]).low)


def figures_file(folder: Path, values: dict[str, float], questions: int = 6) -> None:
    figures = {k: {"value": v, "low": v, "high": v} for k, v in values.items()}
    folder.mkdir(parents=True)
    write_json(folder / "figures.json", {"questions": questions, "figures": figures})


@pytest.fixture
def finished(path):
    """A study whose runs left the figures of this table behind."""
    study = load(path)

    def row(avg, maj, best):
        return {"greedy": avg, "avg@2": avg, "maj@1": avg, "maj@2": maj, "pass@1": avg,
                "pass@2": best}  # fmt: skip

    figures_file(Path(base_of(study).out) / "eval-sft" / "embedded", row(0.4, 0.5, 0.8))
    after = {
        "rft": [(0.5, 0.6, 0.8), (0.52, 0.6, 0.8)],
        "dpo": [(0.9, 0.9, 0.9), (0.9, 0.9, 0.9)],
        "one": [(0.7, 0.7, 0.8), (0.72, 0.72, 0.81)],
        "two": [(0.6, 0.7, 0.8), (0.9, 0.9, 0.9)],
    }
    for index, seed in enumerate((3, 4)):
        out = Path(seed_run(study, seed).out)
        for name, rows in after.items():
            figures_file(out / f"eval-{name}" / "embedded", row(*rows[index]))
            (out / name).mkdir()
            online = name in ("one", "two")
            steps = [
                {"step": s, **({"samples": 6} if online else {})} for s in range(5 if online else 4)
            ]
            steps[0]["validation_accuracy_before"] = 0.3
            for at, value in ((1, 0.5), (3, 0.6)):
                steps[at]["validation_accuracy"] = value + 0.01 * index
            write_rows(out / name / "steps.jsonl", steps)
    return study


def test_curves_count_samples_that_were_used(finished):
    assert curve_of(finished, 3, "one")._asdict() == {
        "samples": [0, 12, 24],
        "accuracy": [0.3, 0.5, 0.6],
    }
    # Offline methods spread the budget over their steps.
    assert curve_of(finished, 4, "rft").samples == [0, 15, 30]


def test_findings_are_judged_by_differences_within_seeds(finished):
    figures = collect(finished)
    found = {f["finding"]: f for f in figures["findings"]}
    by_words = {words.split()[0]: f for words, f in found.items()}
    assert by_words["online"]["verdict"] == "held"  # +0.20 and +0.20
    assert by_words["online"]["difference"][0] == pytest.approx(0.2)
    assert by_words["group-relative"]["verdict"] == "did not hold"  # −0.20 and −0.18
    assert by_words["process"]["verdict"] == "open"  # −0.1 and +0.18
    # Iterations of 3 steps: 0.3 → 0.5 → 0.6 (+0.01 for the second seed).
    assert figures["iterations"]["accuracy"] == [[0.3, 0.5, 0.6], [0.3, 0.51, 0.61]]
    assert by_words["iterating"]["difference"][0] == pytest.approx((0.1 + 0.11) / 2)
    assert by_words["reinforcement"]["difference"][0] == pytest.approx(0.21)
    more = next(f for words, f in found.items() if "more than" in words)
    assert more["difference"][0] == pytest.approx(0.21 - 0.005)


def test_a_hostile_name_stays_text_on_the_page(finished, tmp_path, chromium):
    page = write_page({**collect(finished), "name": ALL}, tmp_path)
    check(page, chromium, EVIL[:4])


def test_the_table_and_the_page_hold_the_figures(finished, tmp_path):
    figures = collect(finished)
    rows = table(figures)
    assert rows[0] == ["stage", "greedy", "avg@2", "maj@2", "pass@2"]
    assert rows[1] == ["sft", "40.0", "40.0", "50.0", "80.0"]
    assert markdown(rows).splitlines()[1] == "|---|---|---|---|---|"
    page = write_page(figures, tmp_path)
    text = page.read_text()
    shown = re.findall(r'<td class="figure">([^<]*)', text)
    assert len(shown) > 20 and not any("-" in figure for figure in shown)
    assert any("−" in figure for figure in shown)
    assert "data:image/png;base64," in text and "<script" not in text and "http:" not in text
    assert "https:" not in text
    assert json.loads((tmp_path / "study.json").read_text())["findings"]
    first = (tmp_path / "study.png").read_bytes()
    write_page(figures, tmp_path)
    assert (tmp_path / "study.png").read_bytes() == first


def test_names_are_escaped(finished, tmp_path):
    run = finished.run.model_copy(update={"name": "<script>alert(1)</script>"})
    study = finished.model_copy(update={"run": run})
    page = write_page(collect(study), tmp_path)
    assert "<script>" not in page.read_text()


@pytest.mark.slow
def test_a_whole_small_study_runs_and_goes_on(path):
    import subprocess
    import sys

    command = [sys.executable, "-m", "pipeline.study", "--config", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-2000:]
    page = Path(done.stdout.strip().splitlines()[-1])
    first = (page.parent / "study.json").read_bytes()
    again = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert again.returncode == 0
    assert (page.parent / "study.json").read_bytes() == first
