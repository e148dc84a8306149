"""One HTML file that says what a run achieved, and the same numbers as JSON.

    python -m eval.report --run runs/cpu

Writes `<run>/report/report.html` (self-contained, works offline) and `report.json`. Every
number comes from the `figures.json` files of `eval.run`; nothing is computed twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup

from data_prep.arguments import Arguments
from data_prep.content_policy import content_policy
from data_prep.errors import command
from data_prep.files import writing
from data_prep.jsonl import script_json, write_json
from eval.browser import browser_blocks, browser_index
from eval.charts import SERIES, breakdown_chart, k_curves, training_curve
from eval.collect import Results, collect
from eval.figures import DEFINITIONS
from eval.reading import reading, spell

PAGE = Path(__file__).parent / "page"
# What the training curves show, in this order, where a stage has it.
CURVES = (
    "loss",
    "validation_loss",
    "objective",
    "reward_mean",
    "accuracy",
    "entropy",
    "completion_length",
    "zero_signal_share",
    "truncated_share",
    "grad_norm",
    "kl_k3",
    "clip_share",
    "clip_share_low",
    "clip_share_high",
    "length_correct",
    "length_incorrect",
    "distinct_answers",
    "learning_rate",
)
EXTRA_COLUMNS = ("truncated", "no_answer", "timeouts", "unjudged", "not_run")


def report_json(results: Results) -> dict[str, Any]:
    """Return the content of `report.json`: what the page shows, by name."""
    return {
        "name": results.name,
        "seed": results.seed,
        "versions": results.versions,
        "fingerprint": results.fingerprint,
        "reading": reading(results),
        "checkpoints": results.checkpoints,
        "suites": results.suites,
        "figures": {
            checkpoint: {suite: content["figures"] for suite, content in found.items()}
            for checkpoint, found in results.figures.items()
        },
        "styles": {
            checkpoint: {suite: content["styles"] for suite, content in found.items()}
            for checkpoint, found in results.figures.items()
        },
        "breakdown": {
            checkpoint: {suite: content["breakdown"] for suite, content in found.items()}
            for checkpoint, found in results.figures.items()
        },
        "decomposition": results.decomposition,
        "contamination": results.contamination,
        "training": results.training,
        "definitions": DEFINITIONS,
    }


def write_report(
    run: Path, config_file: Path | None = None, training: Sequence[Path] | None = None
) -> Path:
    """Write both files; return the page's path.

    Args:
        run: The run folder.
        config_file: The run's TOML, where it is not the one in the folder.
        training: Files of training questions to hold the suites against, where it is not the
            run's own data stage.

    Raises:
        UserError: Nothing was evaluated, or a file is broken.
    """
    results = collect(run, config_file, training)
    folder = run / "report"
    folder.mkdir(exist_ok=True)
    write_json(folder / "report.json", report_json(results))
    index = browser_index(results)
    environment = Environment(
        loader=FileSystemLoader(PAGE), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(percent=_percent, points=_points, position=_position, spell=spell)
    template = environment.get_template("page.html.jinja")
    script = (PAGE / "page.js").read_text(encoding="utf-8")
    page = folder / "report.html"
    with writing(page) as temporary, temporary.open("w", encoding="utf-8") as file:
        # A stream: the blocks of a large run are never in memory together.
        stream = template.stream(
            results=results,
            reading=reading(results),
            tables=[_table(results, suite) for suite in results.suites],
            extra=EXTRA_COLUMNS,
            curves=_curves(results),
            best=any(
                name.startswith("best@")
                for checkpoint, suite in results.pairs()
                for name in results.figures[checkpoint][suite]["figures"]
            ),
            breakdowns=_breakdowns(results),
            training=_training(results),
            colours=len(SERIES),
            definitions=DEFINITIONS,
            css=Markup((PAGE / "page.css").read_text(encoding="utf-8")),  # noqa: S704 - own file
            script=Markup(script),  # noqa: S704 - own file
            policy=content_policy(script),
            index=Markup(script_json(index)),  # noqa: S704 - escaped there
            blocks=browser_blocks(results, index),
        )
        stream.enable_buffering(16)
        file.writelines(stream)
    return page


def _by_suite(results: Results) -> dict[str, dict[str, Any]]:
    """Return suite → checkpoint → content of `figures.json`."""
    return {
        suite: {
            c: results.figures[c][suite] for c in results.checkpoints if suite in results.figures[c]
        }
        for suite in results.suites
    }


def _table(results: Results, suite: str) -> dict[str, Any]:
    """Return the accuracy table of one suite."""
    rows = _by_suite(results)[suite]
    head = next(iter(rows.values()))
    n, top = head["n"], max(head["k"])
    metrics = [
        m
        for m in ("greedy", f"avg@{n}", f"maj@{top}", f"weighted@{n}", f"best@{top}", f"pass@{top}")
        if any(m in content["figures"] for content in rows.values())
    ]
    return {
        "suite": suite,
        "questions": head["questions"],
        "n": n,
        "metrics": metrics,
        "rows": rows,
    }


def _curves(results: Results) -> list[tuple[str, list[Markup]]]:
    """Return Maj@K and Pass@K over K of every suite with more than one sample a question."""
    return [
        (suite, [Markup(svg) for svg in k_curves(content, results.checkpoints, f"k{number}")])  # noqa: S704 - own SVG
        for number, (suite, content) in enumerate(_by_suite(results).items())
        if max(next(iter(content.values()))["k"]) > 1
    ]


def _breakdowns(results: Results) -> list[tuple[str, Markup]]:
    """Return charts by level and subject, for suites that have either."""
    found = []
    for number, (suite, content) in enumerate(_by_suite(results).items()):
        metric = f"avg@{next(iter(content.values()))['n']}"
        for by in ("level", "subject"):
            groups = {g for c in content.values() for g in c["breakdown"][by]}
            if 2 <= len(groups) <= 40:
                chart = breakdown_chart(content, by, metric, results.checkpoints, f"b{number}{by}")
                found.append((suite, Markup(chart)))  # noqa: S704 - own SVG
    return found


def _training(results: Results) -> list[tuple[str, list[Markup]]]:
    """Return the training curves of every stage that recorded steps."""
    stages = []
    for number, (stage, rows) in enumerate(results.steps.items()):
        colour = results.checkpoints.index(stage) if stage in results.checkpoints else number
        charts = []
        for name in CURVES:
            points = [
                (row["step"], row[name]) for row in rows if isinstance(row.get(name), int | float)
            ]
            # A figure that never moved is no curve.
            if len({value for _, value in points}) > 1:
                steps, values = zip(*points, strict=True)
                title = name.replace("_", " ")
                chart = training_curve(steps, values, title, colour, f"t{number}{name}")
                charts.append(Markup(chart))  # noqa: S704 - own SVG
        if charts:
            stages.append((stage, charts))
    return stages


def _percent(value: float | None, digits: int = 1) -> str:
    return "–" if value is None else f"{100 * value:.{digits}f}"


def _points(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{round(100 * value, 1) + 0.0:+.1f}".replace("-", "−")


def _position(value: float | None) -> str:
    """Return a share as a CSS length along a track."""
    return f"{100 * min(1.0, max(0.0, value or 0.0)):.2f}%"


def main(arguments: list[str]) -> None:
    """Command line."""
    parser = Arguments("python -m eval.report", __doc__)
    parser.add_argument("--run", required=True, type=Path, help="run folder")
    parser.add_argument("--config", type=Path, help="the run's TOML (default <run>/config.toml)")
    parser.add_argument(
        "--training",
        nargs="+",
        type=Path,
        help="training questions, JSON lines (default: those of the data stage)",
    )
    known = parser.parse_args(arguments)
    print(write_report(known.run, known.config, known.training))


if __name__ == "__main__":
    command(main)
