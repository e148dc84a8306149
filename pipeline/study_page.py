"""What a study found, as `study.html`, `study.md`, `study.png` and `study.json`."""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from data_prep.content_policy import content_policy
from data_prep.jsonl import write_json
from pipeline.interval import Interval, share_over_seeds

# As `pipeline.study.collect` returns them.
Figures = Mapping[str, Any]
COLOURS = [
    "#4477aa",
    "#ee6677",
    "#228833",
    "#ccbb44",
    "#66ccee",
    "#aa3377",
    "#bb5566",
    "#000000",
    "#997700",
    "#555555",
    "#332288",
]


class Curve(NamedTuple):
    """Solved share of the validation problems against samples used, of one seed."""

    samples: list[int]
    accuracy: list[float]


def table(figures: Figures) -> list[list[str]]:
    """Return the table of final figures, the header first."""
    n, most = figures["n"], max(figures["k"])
    metrics = ["greedy", f"avg@{n}", f"maj@{most}", f"pass@{most}"]
    start = [f"{100 * figures['before'][m]['value']:.1f}" for m in metrics]
    rows = [["stage", *metrics], [figures["start"], *start]]
    for name, values in figures["after"].items():
        rows.append([name, *(share_over_seeds(values[m]).text() for m in metrics)])
    return rows


def markdown(rows: list[list[str]]) -> str:
    """Return a table in Markdown."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    lines.insert(1, "|" + "---|" * len(rows[0]))
    return "\n".join(lines)


def write_page(figures: Figures, folder: Path) -> Path:
    """Write `study.json`, `study.md`, `study.png` and `study.html`; return the page."""
    write_json(folder / "study.json", figures)
    rows = table(figures)
    claims = [["finding of DeepSeekMath", "measured", "difference, points", "here"]] + [
        [f["finding"], f["measure"], f["text"], f["verdict"]] for f in figures["findings"]
    ]
    (folder / "study.md").write_text(f"{markdown(rows)}\n\n{markdown(claims)}\n", encoding="utf-8")
    picture = draw(figures)
    (folder / "study.png").write_bytes(picture)
    image = base64.b64encode(picture).decode()
    seeds = len(figures["seeds"])
    page = PAGE.format(
        title=html.escape(figures["name"]),
        policy=html.escape(content_policy()),
        seeds=seeds,
        budget=f"{figures['budget']:,}",
        questions=figures["questions"],
        image=image,
        rows=_html_table(rows),
        claims=_html_table(claims),
    )
    path = folder / "study.html"
    path.write_text(page, encoding="utf-8")
    return path


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}"><title>{title}</title>
<meta name="viewport" content="width=device-width">
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem;
  color: #222; background: #fff }}
table {{ border-collapse: collapse; margin: 1rem 0 }}
td, th {{ padding: .25rem .8rem; border-bottom: 1px solid #ddd; text-align: left;
  font-variant-numeric: tabular-nums }}
td.figure {{ white-space: nowrap }}
.wide {{ overflow-x: auto }}
img {{ width: 100%; min-width: 48rem }}
</style></head><body>
<h1>{title}</h1>
<p>One start, {seeds} seeds, {budget} samples a method. Final figures on {questions} held-out
problems in per cent: mean over seeds with Student's t interval (95 %). Differences are taken
within each seed.</p>
<div class="wide"><img alt="Learning curves, iterations, Maj@K and Pass@K"
src="data:image/png;base64,{image}"></div>
<h2>Final figures</h2>{rows}
<h2>Findings of DeepSeekMath, and whether they held here</h2>{claims}
</body></html>
"""


def _html_table(rows: list[list[str]]) -> str:
    head, *body = rows
    cells = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    lines = "".join("<tr>" + "".join(map(_cell, row)) + "</tr>" for row in body)
    return f'<div class="wide"><table><tr>{cells}</tr>{lines}</table></div>'


def _cell(text: str) -> str:
    # A figure stays on one line with its interval; on a narrow screen the table is scrolled.
    kind = ' class="figure"' if text[:1] in "0123456789+−" else ""
    return f"<td{kind}>{html.escape(text)}</td>"


def draw(figures: Figures) -> bytes:
    """Return the three figures side by side, as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    count = 3 if figures["iterations"] else 2
    canvas, axes = pyplot.subplots(1, count, figsize=(6 * count, 5), layout="constrained")
    for number, (name, curves) in enumerate(figures["curves"].items()):
        _band(axes[0], [Curve(**c) for c in curves], name, COLOURS[number % len(COLOURS)])
    axes[0].set(
        title="Learning curves", xlabel="samples used", ylabel="validation problems solved, %"
    )
    axes[0].legend(fontsize=8)
    if figures["iterations"]:
        found = figures["iterations"]
        _band(axes[1], [Curve(**c) for c in found["curves"]], found["stage"], COLOURS[0])
        for at in found["begin"]:
            axes[1].axvline(at, color="#999", lw=1, ls=":")
        axes[1].set(
            title=f"Iterations of {found['stage']}",
            xlabel="samples used (dotted: π_ref ← π_θ, reward model trained on)",
            ylabel="validation problems solved, %",
        )
    name = figures["reinforced"]
    for metric, colour in (("maj", COLOURS[0]), ("pass", COLOURS[1])):
        ks = figures["k"]
        before = [100 * figures["before"][f"{metric}@{k}"]["value"] for k in ks]
        after = [share_over_seeds(figures["after"][name][f"{metric}@{k}"]) for k in ks]
        label = {"maj": "Maj@K", "pass": "Pass@K"}[metric]
        axes[-1].plot(ks, before, "o--", color=colour, label=f"{label}, {figures['start']}")
        axes[-1].plot(
            ks, [100 * a.mean for a in after], "o-", color=colour, label=f"{label}, {name}"
        )
        _shade(axes[-1], ks, after, colour)
    axes[-1].set(title=f"Before and after {name}", xlabel="K", ylabel="%", xscale="log")
    axes[-1].set_xticks(figures["k"], [str(k) for k in figures["k"]])
    axes[-1].minorticks_off()
    axes[-1].legend(fontsize=8)
    buffer = io.BytesIO()
    # Without a date or a version the same figures give the same bytes.
    canvas.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    pyplot.close(canvas)
    return buffer.getvalue()


def _band(axis: Any, curves: list[Curve], label: str, colour: str) -> None:
    """Draw the mean of the seeds' curves with its interval; a curve that ends early is left out
    beyond its end.
    """  # noqa: D205
    length = min((len(c.samples) for c in curves), default=0)
    if not length:
        return
    xs = [sum(c.samples[i] for c in curves) / len(curves) for i in range(length)]
    values = [share_over_seeds([c.accuracy[i] for c in curves]) for i in range(length)]
    axis.plot(xs, [100 * v.mean for v in values], "-", color=colour, label=label, lw=1.8)
    _shade(axis, xs, values, colour)


def _shade(axis: Any, xs: Sequence[float], values: list[Interval], colour: str) -> None:
    if any(math.isnan(v.low) for v in values):
        return
    low, high = [100 * v.low for v in values], [100 * v.high for v in values]
    axis.fill_between(xs, low, high, color=colour, alpha=0.12, lw=0)
