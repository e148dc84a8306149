"""Grade a log with a second checker, and list where the two graders disagree.

    python -m eval.regrade runs/cpu/eval-grpo --checker math_verify
    python -m eval.regrade runs/cpu/eval-grpo --checker boxed --option policy=answer

Nothing is sampled. The second verdicts go into a folder `second` inside each suite's, which the
report's browser picks up; what the evaluation itself says stays as it is.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_prep.errors import UserError, command
from data_prep.jsonl import read_json, write_json, write_rows
from data_prep.schema import read_problems
from eval.figures import intervals, suite_values
from eval.grading import Graded, grade, read_graded, write_graded
from eval.sample_log import log_shards
from pipeline.samples import Sample, read_samples
from pipeline.verify import open_pool
from verifiers import VerifierPool

FILES = {"samples": "verdicts.jsonl", "greedy": "greedy_verdicts.jsonl"}


def read_log(folder: Path, label: str) -> Iterator[Sample]:
    """Yield a suite's samples, shard by shard."""
    for path in log_shards(folder, label):
        yield from read_samples(path)


def regrade(folder: Path, pool: VerifierPool, checker: dict[str, Any]) -> dict[str, Any]:
    """Grade one suite's log again; return both graders' figures and the disagreements.

    Args:
        folder: A suite's folder in an evaluation.
        pool: The second grader.
        checker: What it is, for the record.
    """
    problems = list(read_problems(folder / "problems.jsonl"))
    first = read_json(folder / "figures.json")
    tools = bool(read_json(folder / "generation.json").get("tool_rounds"))
    ids = [problem.id for problem in problems]
    second = folder / "second"
    second.mkdir(exist_ok=True)
    rows: dict[str, list[list[Graded]]] = {}
    differing: list[dict[str, Any]] = []
    for label, name in FILES.items():
        n = first["n"] if label == "samples" else 1
        graded = grade(problems, read_log(folder, label), pool, f"regrade {label}", tools)
        write_graded(second / name, graded)
        rows[label] = read_graded(second / name, ids, n)
        for before, after in zip(read_graded(folder / name, ids, n), rows[label], strict=True):
            for a, b in zip(before, after, strict=True):
                if a.is_correct != b.is_correct:
                    differing.append(
                        {
                            "problem_id": a.problem_id,
                            "label": label,
                            "sample_index": a.sample_index,
                            "first": a.outcome,
                            "first_rule": a.rule,
                            "first_answer": a.extracted,
                            "second": b.outcome,
                            "second_rule": b.rule,
                            "second_answer": b.extracted,
                        }
                    )
    values = suite_values(rows["samples"], [group[0] for group in rows["greedy"]], first["k"])
    found = intervals(values, resamples=2000, seed=0)
    write_rows(second / "disagreements.jsonl", differing)
    result = {
        "checker": checker,
        "figures": {m: i.to_dict() for m, i in found.items()},
        "samples": sum(map(len, rows["samples"])) + len(problems),
        "disagreements": len(differing),
    }
    write_json(second / "figures.json", result)
    return result | {"rows": differing, "first": first["figures"]}


def main(arguments: list[str]) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        "python -m eval.regrade",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("evaluation", type=Path, help="an evaluation's folder, RUN/eval-NAME")
    parser.add_argument("--checker", required=True, help="kind of the second checker")
    parser.add_argument("--option", action="append", default=[], help="KEY=VALUE of the checker")
    parser.add_argument("--workers", type=int, default=2, help="judging processes")
    parser.add_argument("--time-limit-s", type=float, default=2.0, help="of one verdict")
    known = parser.parse_args(arguments)
    if not all("=" in option for option in known.option):
        raise UserError("--option", repr(known.option), "KEY=VALUE", "mend it")
    checker: dict[str, Any] = {"kind": known.checker}
    checker |= dict(option.split("=", 1) for option in known.option)
    folders = sorted(path.parent for path in known.evaluation.glob("*/figures.json"))
    if not folders:
        raise UserError(
            str(known.evaluation), "not an evaluation's folder", "RUN/eval-NAME", "check the path"
        )
    with open_pool(checker, known.workers, known.time_limit_s) as pool:
        for folder in folders:
            found = regrade(folder, pool, checker)
            avg = next(m for m in found["first"] if m.startswith("avg@"))
            print(
                f"{folder.name}: {avg} {100 * found['first'][avg]['value']:.2f} → "
                f"{100 * found['figures'][avg]['value']:.2f}; the graders disagree on "
                f"{found['disagreements']} of {found['samples']} samples"
            )
            for row in found["rows"][:10]:
                print(
                    f"  {row['problem_id']} {row['label']} {row['sample_index']}: "
                    f"{row['first']} ({row['first_rule']}, {row['first_answer']!r}) → "
                    f"{row['second']} ({row['second_rule']}, {row['second_answer']!r})"
                )


if __name__ == "__main__":
    command(main)
