"""Figures for other tools: CSV, and results as lm-evaluation-harness writes them.

    python -m eval.export --run runs/cpu --output runs/cpu/export

Writes `figures.csv` (one figure a row, breakdowns included) and, for every checkpoint,
`results_<checkpoint>.json` and `samples_<checkpoint>_<suite>.jsonl` in the harness's layout.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_prep.arguments import Arguments
from data_prep.errors import UserError, command
from data_prep.jsonl import read_json, write_json, write_rows
from eval.collect import Results, collect, load_suite
from eval.profile import load_evaluation_profile

COLUMNS = ("checkpoint", "suite", "by", "group", "metric", "value", "low", "high", "n")
# Two standard errors of a normal estimate span this much of its 95 % interval's width.
_WIDTH = 2 * 1.959964
# What a formula begins with in one spreadsheet or another.
_FORMULA = ("=", "+", "-", "@")


# Figures of which less is better; lengths are neither, and counted among them.
LOWER = frozenset(
    {
        "truncated",
        "no_answer",
        "timeouts",
        "unjudged",
        "not_run",
        "mean_tokens",
        "greedy_truncated",
        "greedy_no_answer",
        "greedy_tokens",
    }
)


def csv_rows(results: Results) -> Iterator[tuple[Any, ...]]:
    """Yield one row a figure, in the order of `COLUMNS`; `by` and `group` name a breakdown."""
    for checkpoint, suite in results.pairs():
        content = results.figures[checkpoint][suite]
        parts = [("", "", content["figures"])]
        parts += [
            (by, group, figures)
            for by, groups in content["breakdown"].items()
            for group, figures in groups.items()
        ]
        for by, group, figures in parts:
            for metric, f in figures.items():
                yield (
                    checkpoint,
                    suite,
                    by,
                    group,
                    metric,
                    f["value"],
                    f["low"],
                    f["high"],
                    f["n"],
                )


def spreadsheet_cell(value: Any) -> Any:
    """Return a cell that a spreadsheet takes for text where it is text, never for a formula.

    A name from the data such as "=HYPERLINK(…)" gets an apostrophe before it, which spreadsheets
    do not show. Numbers stay as they are.
    """
    if isinstance(value, str) and value.lstrip().startswith(_FORMULA):
        return f"'{value}"
    return value


def harness_results(results: Results, checkpoint: str) -> dict[str, Any]:
    """Return one checkpoint's figures as lm-evaluation-harness lays out `results_*.json`.

    The harness's filter name stands after the comma; its `exact_match` is the greedy accuracy.
    Standard errors come from the bootstrap's interval, which is clustered by question.
    """
    suites = results.figures[checkpoint]
    table: dict[str, dict[str, Any]] = {}
    for suite, content in suites.items():
        row: dict[str, Any] = {"alias": suite}
        for metric, figure in content["figures"].items():
            name = "exact_match" if metric == "greedy" else metric
            row[f"{name},none"] = figure["value"]
            row[f"{name}_stderr,none"] = (figure["high"] - figure["low"]) / _WIDTH
        table[suite] = row
    return {
        "results": table,
        "n-shot": {suite: _shots(results, checkpoint, suite) for suite in suites},
        "configs": {suite: {"task": suite, "output_type": "generate_until"} for suite in suites},
        "higher_is_better": {
            suite: {
                name.partition(",")[0]: name.partition(",")[0] not in LOWER
                for name in row
                if name.endswith(",none") and "_stderr" not in name
            }
            for suite, row in table.items()
        },
        "n-samples": {
            suite: {"original": c["questions"], "effective": c["questions"]}
            for suite, c in suites.items()
        },
        "config": {"model": "boxed", "model_args": checkpoint, "random_seed": results.seed},
        "versions": dict.fromkeys(suites, 1),
        "group_subtasks": {suite: [] for suite in suites},
        "environment": results.versions,
    }


def _shots(results: Results, checkpoint: str, suite: str) -> int:
    """Return the exemplars of the profile that an evaluation was made under."""
    plan = read_json(results.folders[checkpoint] / suite / "generation.json")
    try:
        return load_evaluation_profile(plan["profile"])[0].shots
    except UserError:  # a profile of one's own that is gone
        return 0


def harness_samples(results: Results, checkpoint: str, suite: str) -> Iterator[dict[str, Any]]:
    """Yield a suite's greedy samples as the harness lays out `samples_*.jsonl`."""
    problems, _, greedy = load_suite(results, checkpoint, suite)
    for number, (problem, row) in enumerate(zip(problems, greedy, strict=True)):
        yield {
            "doc_id": number,
            "doc": {"id": problem.id, "question": problem.question},
            "target": problem.answer,
            "filtered_resps": [row.extracted],
            "filter": "none",
            "metrics": ["exact_match"],
            "exact_match": float(row.is_correct),
        }


def export(run: Path, output: Path, config_file: Path | None = None) -> list[Path]:
    """Write every file; return their paths.

    Raises:
        UserError: Nothing was evaluated, a file is broken, or `output` is one.
    """
    if output.exists() and not output.is_dir():
        raise UserError(str(output), "is a file", "a folder", "give another --output")
    results = collect(run, config_file)
    output.mkdir(parents=True, exist_ok=True)
    table = output / "figures.csv"
    with table.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        writer.writerows([spreadsheet_cell(cell) for cell in row] for row in csv_rows(results))
    written = [table]
    for checkpoint in results.checkpoints:
        path = output / f"results_{checkpoint}.json"
        write_json(path, harness_results(results, checkpoint))
        written.append(path)
        for suite in results.figures[checkpoint]:
            path = output / f"samples_{checkpoint}_{suite}.jsonl"
            write_rows(path, harness_samples(results, checkpoint, suite))
            written.append(path)
    return written


def main(arguments: list[str]) -> None:
    """Command line."""
    parser = Arguments("python -m eval.export", __doc__)
    parser.add_argument("--run", required=True, type=Path, help="run folder")
    parser.add_argument("--output", type=Path, help="folder (default <run>/export)")
    known = parser.parse_args(arguments)
    for path in export(known.run, known.output or known.run / "export"):
        print(path)


if __name__ == "__main__":
    command(main)
