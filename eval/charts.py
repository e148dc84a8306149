"""Charts as inline SVG: drawn by matplotlib, coloured by the page.

Lines and text take placeholder colours that become CSS variables, so that one drawing serves
light and dark; text stays text, in the page's own font. The same figures give the same bytes.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import Any

import matplotlib

matplotlib.use("svg")

from matplotlib import pyplot

# Placeholder → CSS variable. The series colours are Okabe and Ito's, safe for colour-blind eyes.
SERIES = ("#a00001", "#a00002", "#a00003", "#a00004", "#a00005", "#a00006", "#a00007")
INK, MUTED, GRID = "#b00001", "#b00002", "#b00003"
_VARIABLES = {
    **{colour: f"var(--series-{index})" for index, colour in enumerate(SERIES)},
    INK: "var(--ink)",
    MUTED: "var(--muted)",
    GRID: "var(--line)",
}
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_STYLE = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9.5,
    # A "$" in a subject's name is a dollar.
    "text.parse_math": False,
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.titlepad": 9,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "text.color": INK,
    "lines.linewidth": 1.9,
}


def k_curves(suite: dict[str, dict[str, Any]], order: Sequence[str], prefix: str) -> list[str]:
    """Return Maj@K and Pass@K over K on one scale, a line a checkpoint with its interval.

    Best-of-K comes third where a reward model scored the samples.

    Args:
        suite: checkpoint → content of `figures.json`.
        order: All checkpoints of the report, which decides the colours.
        prefix: Makes the drawings' ids unique on the page.
    """
    titles = {"maj": "Maj@K: the vote is right, %", "pass": "Pass@K: at least one is right, %"}
    if any(f"best@{k}" in c["figures"] for c in suite.values() for k in c["k"]):
        titles["best"] = "Best-of-K: the reward model's choice is right, %"
    every = [
        c["figures"][f"{m}@{k}"]
        for c in suite.values()
        for k in c["k"]
        for m in titles
        if f"{m}@{k}" in c["figures"]
    ]
    lowest, highest = min(f["low"] for f in every), max(f["high"] for f in every)
    room = max(0.04 * (highest - lowest), 1e-3)
    drawings = []
    for metric, title in titles.items():
        with _style(prefix):
            figure, axis = pyplot.subplots(figsize=(4.4, 3.0))
            ticks: set[int] = set()
            for checkpoint, content in suite.items():
                index = order.index(checkpoint)
                ks = [k for k in content["k"] if f"{metric}@{k}" in content["figures"]]
                if not ks:
                    continue
                colour = SERIES[index % len(SERIES)]
                ticks.update(ks)
                rows = [content["figures"][f"{metric}@{k}"] for k in ks]
                axis.fill_between(
                    ks,
                    [100 * r["low"] for r in rows],
                    [100 * r["high"] for r in rows],
                    color=colour,
                    alpha=0.15,
                    linewidth=0,
                )
                axis.plot(
                    ks,
                    [100 * r["value"] for r in rows],
                    color=colour,
                    clip_on=False,
                    marker=MARKERS[index % len(MARKERS)],
                    markersize=4.5,
                )
            axis.set_title(title)
            axis.set_xscale("log", base=2)
            axis.set_xticks(sorted(ticks), [str(k) for k in sorted(ticks)])
            axis.minorticks_off()
            axis.set_xlabel("K")
            axis.set_ylim(100 * (lowest - room), 100 * (highest + room))
            figure.tight_layout()
            label = f"{title} for {', '.join(suite)}; the numbers stand in the table of figures"
            drawings.append(_svg(figure, f"{prefix}{metric}", label))
    return drawings


def training_curve(
    steps: Sequence[float], values: Sequence[float], title: str, index: int, prefix: str
) -> str:
    """Return one training curve: the values faint, their running mean over them.

    Args:
        steps: Step numbers.
        values: One figure a step.
        title: Its name.
        index: Which series colour.
        prefix: Makes the drawing's ids unique on the page.
    """
    with _style(prefix):
        figure, axis = pyplot.subplots(figsize=(3.1, 1.75))
        # A few hundred points draw the same picture as thousands.
        stride = max(1, len(steps) // 400)
        colour = SERIES[index % len(SERIES)]
        smooth = running_mean(values, max(1, len(values) // 25))
        dense = len(values) > 20
        if dense:
            axis.plot(steps[::stride], values[::stride], color=colour, alpha=0.28, linewidth=0.9)
        axis.plot(
            steps[::stride],
            smooth[::stride],
            color=colour,
            marker=None if dense else "o",
            markersize=3,
        )
        axis.set_title(title)
        axis.locator_params(axis="y", nbins=4)
        axis.locator_params(axis="x", nbins=5, integer=True)
        axis.ticklabel_format(axis="y", scilimits=(-3, 4))
        # The same frame for every chart, so that they line up in their grid.
        figure.subplots_adjust(left=0.16, right=0.98, bottom=0.14, top=0.8)
        label = f"{title}: from {smooth[0]:.4g} to {smooth[-1]:.4g} over {len(values)} steps"
        return _svg(figure, prefix, label)


def breakdown_chart(
    content: dict[str, dict[str, Any]], by: str, metric: str, order: Sequence[str], prefix: str
) -> str:
    """Return a dot plot of one metric by level or subject, a dot a checkpoint.

    Args:
        content: checkpoint → content of `figures.json`.
        by: "level" or "subject".
        metric: Name of the figure.
        order: All checkpoints of the report, which decides the colours.
        prefix: Makes the drawing's ids unique on the page.
    """
    groups = sorted({g for c in content.values() for g in c["breakdown"][by]}, reverse=True)
    with _style(prefix, **{"axes.grid.axis": "x"}):
        height = 0.75 + 0.34 * len(groups)
        figure, axis = pyplot.subplots(figsize=(3.7, height))
        for checkpoint, found in content.items():
            index = order.index(checkpoint)
            offset = 0.13 * (index - (len(order) - 1) / 2)
            places, rows = [], []
            for row, group in enumerate(groups):
                figures = found["breakdown"][by].get(group)
                if figures and metric in figures:
                    places.append(row - offset)
                    rows.append(figures[metric])
            if not rows:
                continue
            colour = SERIES[index % len(SERIES)]
            axis.hlines(
                places,
                [100 * r["low"] for r in rows],
                [100 * r["high"] for r in rows],
                color=colour,
                linewidth=1.3,
                alpha=0.6,
            )
            axis.plot(
                [100 * r["value"] for r in rows],
                places,
                linestyle="none",
                color=colour,
                marker=MARKERS[index % len(MARKERS)],
                markersize=4.2,
            )
        axis.set_yticks(range(len(groups)), [_short(group) for group in groups])
        axis.spines["left"].set_visible(False)
        axis.set_xlim(left=min(0, axis.get_xlim()[0]))
        axis.set_title(f"{metric} by {by}, %")
        figure.tight_layout()
        return _svg(figure, prefix, f"{metric} by {by} for {', '.join(content)}")


def _short(name: str, most: int = 28) -> str:
    """Return a name that leaves room for the chart: a subject of the data may be any text."""
    name = " ".join(name.split())
    return name if len(name) <= most else f"{name[: most - 1]}…"


def _style(prefix: str, **more: Any) -> Any:
    """Return the drawings' style; the prefix makes ids the same from run to run."""
    settings: dict[Any, Any] = {**_STYLE, "svg.hashsalt": prefix, **more}
    return matplotlib.rc_context(settings)


def running_mean(values: Sequence[float], width: int) -> list[float]:
    """Return the mean of each value and the up to `width` - 1 before it."""
    means, total = [], 0.0
    for index, value in enumerate(values):
        total += value
        if index >= width:
            total -= values[index - width]
        means.append(total / min(index + 1, width))
    return means


def _svg(figure: Any, prefix: str, label: str) -> str:
    """Return a figure as an SVG element with its own ids and the page's colours."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    pyplot.close(figure)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    # A style element inside would apply to the whole page; `.chart svg *` has it in page.css.
    text = re.sub(r"<(metadata|style)\b.*?</\1>", "", text, flags=re.DOTALL)
    text = re.sub(r'\bid="([^"]+)"', rf'id="{prefix}-\1"', text)
    text = re.sub(r"url\(#([^)]+)\)", rf"url(#{prefix}-\1)", text)
    text = re.sub(r'href="#([^"]+)"', rf'href="#{prefix}-\1"', text)
    for placeholder, variable in _VARIABLES.items():
        text = text.replace(placeholder, variable)
    # The page's font, and a size that follows the column.
    text = re.sub(r"(font: [^;\"]*?)'[^\"]*?sans-serif", r"\1inherit", text)
    text = re.sub(r"font-family: [^;\"]*", "font-family: inherit", text)
    text = re.sub(r'<svg height="[^"]*"', "<svg", text, count=1)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    safe = label.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    return text.replace("<svg", f'<svg role="img" aria-label="{safe}"', 1)
