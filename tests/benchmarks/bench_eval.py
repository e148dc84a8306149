"""How long grading, scoring and the report take for 5,000 problems × 64 samples.

    python tests/benchmarks/bench_eval.py [--problems 5000] [--n 64]

A generated log stands in for a model's: worked solutions of a few lines, answers in several
spellings, some without a box, some cut off. Prints JSON with machine, versions and commit.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from data_prep.errors import UserError
from data_prep.jsonl import write_json, write_rows
from data_prep.schema import Problem
from data_prep.versions import versions
from eval.figures import suite_figures
from eval.grading import grade, read_graded, write_graded
from eval.report import write_report
from eval.sandbox import SandboxConfig, Session
from eval.score import read_answers, score
from pipeline.samples import Sample, read_samples
from pipeline.verify import open_pool

SHARD = 250
FORMS = (
    lambda v: f"\\boxed{{{v}}}",
    lambda v: f"$\\boxed{{{v}.0}}$",
    lambda v: f"\\boxed{{{v:,}}}",
    lambda v: f"\\boxed{{\\frac{{{2 * v}}}{{2}}}}",
    lambda v: f"\\boxed{{{v}\\text{{ pens}}}}",
)


def problems(count: int) -> list[Problem]:
    """Return word problems with numbers of their own."""
    return [
        Problem(
            f"p{i:05d}",
            f"Ann has {1000 + i} pens and buys {i % 97 + 2} boxes of {i % 13 + 2} "
            "pens each. How many pens does she have now?",
            str(1000 + i + (i % 97 + 2) * (i % 13 + 2)),
            "bench",
            "test",
            level=str(i % 5 + 1),
        )
        for i in range(count)
    ]


def samples(rows: list[Problem], n: int, skill: float, seed: int) -> Iterator[Sample]:
    """Yield n samples a problem: right with a chance of the problem's own."""
    rng = random.Random(seed)
    for problem in rows:
        chance = min(1.0, rng.betavariate(2, 2) * 2 * skill)
        gold = int(problem.answer)
        for index in range(n):
            value = gold if rng.random() < chance else gold + rng.choice((-10, -1, 1, 7, 10, 100))
            steps = "\n".join(
                f"Step {k}: she has {value - rng.randrange(99)} pens, so we go on counting."
                for k in range(rng.randrange(1, 6))
            )
            text = f"{steps}\nSo the answer is {rng.choice(FORMS)(value)}."
            draw = rng.random()
            if draw < 0.03:
                text = steps
            tokens = [rng.randrange(500) for _ in range(len(text) // 4)]
            yield Sample(
                problem.id,
                index,
                tokens,
                [-0.5] * len(tokens),
                text,
                "length" if draw < 0.02 else "stop",
                0,
                rng.getrandbits(60),
            )


def write_log(folder: Path, rows: list[Problem], n: int, skill: float, seed: int) -> None:
    """Write a suite's shards."""
    folder.mkdir(parents=True)
    write_rows(folder / "problems.jsonl", (p.to_row() for p in rows))
    for label, count in (("samples", n), ("greedy", 1)):
        for start in range(0, len(rows), SHARD):
            part = samples(rows[start : start + SHARD], count, skill, seed + start)
            write_rows(folder / f"{label}-{start // SHARD:05d}.jsonl", (s.to_row() for s in part))


def log(folder: Path, label: str) -> Iterator[Sample]:
    """Yield the samples of a log."""
    for path in sorted(folder.glob(f"{label}-*.jsonl")):
        yield from read_samples(path)


def evaluate(folder: Path, rows: list[Problem], n: int, name: str) -> dict[str, float]:
    """Grade and score a log as `eval.run` does; return the times."""
    began = time.perf_counter()
    with open_pool({"kind": "boxed"}, os.cpu_count() or 2, 1.0) as pool:
        write_graded(folder / "verdicts.jsonl", grade(rows, log(folder, "samples"), pool, "grade"))
        write_graded(
            folder / "greedy_verdicts.jsonl", grade(rows, log(folder, "greedy"), pool, "greedy")
        )
    graded = time.perf_counter()
    ids = [p.id for p in rows]
    sampled = read_graded(folder / "verdicts.jsonl", ids, n)
    greedy = [g[0] for g in read_graded(folder / "greedy_verdicts.jsonl", ids, 1)]
    ks = [2**i for i in range(n.bit_length()) if 2**i <= n]
    figures = suite_figures(rows, sampled, greedy, ks, resamples=2000, seed=0)
    write_json(folder / "figures.json", {"checkpoint": name, "suite": "bench", **figures})
    write_json(
        folder.parent / "manifest.json",
        {"plan": {"config": {"generation": {"bench": {"seed": 0}}}}, "versions": versions()},
    )
    write_rows(
        folder.parent / "rows.jsonl",
        (
            {
                "problem_id": r.problem_id,
                "sample_index": r.sample_index,
                "answer": r.extracted,
                "correct": r.is_correct,
                "class": r.answer_class,
            }
            for g in sampled
            for r in g
        ),
    )
    done = time.perf_counter()
    return {"grade_s": graded - began, "figures_s": done - graded}


def open_in_chromium(page: Path) -> float | None:
    """Return seconds from navigation to a usable page, or None without Chromium."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    if browser is None:
        return None
    probe = page.with_name("probe.html")
    script = (
        "<script>addEventListener('load',()=>setTimeout(()=>{document.title='ready '+"
        "performance.now()+' '+document.querySelectorAll('.item').length},0))</script>"
    )
    with page.open(encoding="utf-8") as source, probe.open("w", encoding="utf-8") as target:
        for line in source:
            target.write(line.replace("</body>", f"{script}</body>"))
    with tempfile.TemporaryDirectory() as profile:
        dom = subprocess.run(
            [
                browser,
                "--headless",
                "--no-sandbox",
                "--disable-gpu",
                "--no-first-run",
                "--disable-background-networking",
                f"--user-data-dir={profile}",
                "--timeout=60000",
                "--dump-dom",
                probe.as_uri(),
            ],
            capture_output=True,
            text=True,
            check=True,
            timeout=180,
        ).stdout
    probe.unlink()
    found = re.search(r"<title>ready ([\d.]+) (\d+)</title>", dom)
    if found is None or int(found.group(2)) == 0:
        raise SystemExit("the page did not become usable in Chromium")
    return float(found.group(1)) / 1000


def sandbox_runs_per_s(runs: int = 120) -> float | None:
    """Return programs a second, a fresh session each, two at a time; None without isolation."""
    config = SandboxConfig.model_validate({})

    def one(number: int) -> str:
        with Session(config) as session:
            return session.run(f"print({number} ** 2)").output

    try:
        one(0)
    except UserError:
        return None
    began = time.perf_counter()
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(one, range(runs))) == [f"{n * n}\n" for n in range(runs)]
    return runs / (time.perf_counter() - began)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--problems", type=int, default=5000)
    parser.add_argument("--n", type=int, default=64)
    known = parser.parse_args()
    rows = problems(known.problems)
    rate = sandbox_runs_per_s()
    with tempfile.TemporaryDirectory() as scratch:
        run = Path(scratch)
        times: dict[str, float] = {}
        for name, skill in (("before", 0.5), ("after", 0.75)):
            folder = run / f"eval-{name}" / "bench"
            write_log(folder, rows, known.n, skill, seed=len(name))
            times |= {
                f"{name}_{key}": value
                for key, value in evaluate(folder, rows, known.n, name).items()
            }
        began = time.perf_counter()
        answers = read_answers(run / "eval-after" / "rows.jsonl")
        score(answers, [2**i for i in range(known.n.bit_length()) if 2**i <= known.n])
        times["score_alone_s"] = time.perf_counter() - began
        began = time.perf_counter()
        page = write_report(run)
        times["report_s"] = time.perf_counter() - began
        size = page.stat().st_size
        opening = open_in_chromium(page)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    largest_child = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    print(
        json.dumps(
            {
                "benchmark": "eval",
                "problems": known.problems,
                "n": known.n,
                "checkpoints": 2,
                **{key: round(value, 2) for key, value in times.items()},
                "verdicts_per_s": round(known.problems * (known.n + 1) / times["after_grade_s"]),
                "peak_memory_gib": round(peak, 2),
                "largest_child_gib": round(largest_child, 2),  # a judge, or Chromium
                "page_mib": round(size / 2**20, 1),
                "sandbox_runs_per_s": None if rate is None else round(rate, 1),
                "open_s": None if opening is None else round(opening, 2),
                "machine": platform.machine(),
                "cores": os.cpu_count(),
                "versions": versions(),
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    main()
