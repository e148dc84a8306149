"""What the benchmark of growth says of its times: rates, exponents, README's table, the chart."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

AXES = ("prompts", "group", "length")
PIECES = ("step", "generate", "judge", "update")
LABELS = {
    "prompts": "prompts a step",
    "group": "samples a group",
    "length": "tokens a completion",
    "verifiers": "processes that judge",
    "samplers": "Ray workers that sample",
}


def exponent(work: Sequence[float], seconds: Sequence[float]) -> dict[str, float]:
    """Return the slope of log(seconds) in log(work), Student's 95 % interval, and the last slope.

    Least squares over the points. The interval is of their distances from the line, so a curve that
    bends widens it; NaN for fewer than three points.
    """
    from scipy.stats import linregress, t

    x, y = [math.log(w) for w in work], [math.log(s) for s in seconds]
    line: Any = linregress(x, y)
    reach = float(t.ppf(0.975, len(x) - 2)) * line.stderr if len(x) > 2 else math.nan
    return {
        "exponent": float(line.slope),
        "low": float(line.slope) - reach,
        "high": float(line.slope) + reach,
        "last": (y[-1] - y[-2]) / (x[-1] - x[-2]),
    }


def median_of(row: dict[str, Any], piece: str, clock: str) -> float:
    """Return the median seconds of a piece over a point's rounds."""
    return statistics.median(found[piece][clock] for found in row["rounds"])


def rate_of(row: dict[str, Any], piece: str, clock: str) -> float:
    """Return samples a second."""
    return row["rounds"][0]["samples"] / median_of(row, piece, clock)


def summary(
    steps: dict[str, list[dict[str, Any]]], workers: dict[str, list[dict[str, Any]]], clock: str
) -> dict[str, Any]:
    """Return rates and exponents by one clock."""
    found: dict[str, Any] = {}
    for axis, rows in steps.items():
        values = [row["value"] for row in rows]
        table: dict[str, Any] = {
            "values": values,
            "samples_per_s": [rate_of(row, "step", clock) for row in rows],
            "ms_a_sample": [1e3 / rate_of(row, "step", clock) for row in rows],
            "exponent": {},
        }
        for piece in PIECES:
            seconds = [median_of(row, piece, clock) for row in rows]
            # Processor time of judges, other processes, comes in hundredths of a second.
            if clock == "wall" or piece != "judge":
                table["exponent"][piece] = exponent(values, seconds)
            table[f"{piece}_s"] = seconds
        found[axis] = table
    for kind, rows in workers.items():
        piece = {"verifiers": "judge", "samplers": "generate"}[kind]
        found[kind] = {
            "values": [row["value"] for row in rows],
            "samples_per_s": [rate_of(row, piece, clock) for row in rows],
        }
    return found


def markdown(found: dict[str, Any], clock: str) -> str:
    """Return README's table."""
    unit = "samples a second" + (" of processor time" if clock == "cpu" else "")
    lines = [
        f"| varied | from, to | {unit} | step | generate | judge | update |",
        "|---|---|---|---|---|---|---|",
    ]
    for axis in AXES:
        table = found[axis]
        cells = []
        for piece in PIECES:
            e = table["exponent"].get(piece)
            cells.append(
                f"{e['exponent']:.2f} [{e['low']:.2f}, {e['high']:.2f}]; {e['last']:.2f}"
                if e
                else ""
            )
        rates = f"{table['samples_per_s'][0]:.0f}, {table['samples_per_s'][-1]:.0f}"
        ends = f"{table['values'][0]}, {table['values'][-1]}"
        lines.append(f"| {LABELS[axis]} | {ends} | {rates} | {' | '.join(cells)} |")
    for kind in ("verifiers", "samplers"):
        if kind in found:
            table = found[kind]
            rates = ", ".join(f"{rate:,.0f}" for rate in table["samples_per_s"])
            counts = ", ".join(map(str, table["values"]))
            lines.append(f"| {LABELS[kind]} | {counts} | {rates} | | | | |")
    return "\n".join(lines)


def draw(found: dict[str, Any], base: dict[str, int], clock: str) -> Any:
    """Return the chart: samples a second against what is varied, relative to the base point."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    canvas, axis = pyplot.subplots(figsize=(9, 5.4), layout="constrained")
    styles = {
        "prompts": ("o-", "#1f77b4"),
        "group": ("s-", "#2ca02c"),
        "length": ("^-", "#d62728"),
        "verifiers": ("D-", "#9467bd"),
        "samplers": ("v-", "#ff7f0e"),
    }
    factors: set[float] = {1.0}
    for name, (style, colour) in styles.items():
        if name not in found:
            continue
        table = found[name]
        values, rates = table["values"], table["samples_per_s"]
        start = base.get(name, values[0])
        at = values.index(start)
        x, y = [v / start for v in values], [r / rates[at] for r in rates]
        factors |= {*x}
        label = f"{LABELS[name]}, {values[0]} to {values[-1]}; at {start}: {rates[at]:,.0f}/s"
        axis.plot(x, y, style, color=colour, label=label, lw=1.8, ms=6)
    ends = [min(factors), max(factors)]
    grey = {"color": "#888", "lw": 1.0, "zorder": 0}
    axis.plot(ends, [1.0, 1.0], "--", **grey, label="linear: the same for more samples")
    axis.plot(ends, [1 / e for e in ends], ":", **grey, label="linear: half for twice the tokens")
    if clock == "wall" and ({"verifiers", "samplers"} & {*found}):
        axis.plot([1.0, 2.0], [1.0, 2.0], "-.", **grey, label="linear: twice with two workers")
    ticks = sorted(factors)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log", base=2)
    axis.set_xticks(ticks, [f"{t:g}×" for t in ticks])
    marks = [0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0]
    low, high = axis.get_ylim()
    shown = [m for m in marks if low <= m <= high]
    axis.set_yticks(shown, [f"{m:g}×" for m in shown])
    axis.minorticks_off()
    axis.grid(color="#ddd", lw=0.6)
    point = ", ".join(f"{base[name]} {LABELS[name]}" for name in AXES)
    second = "second of processor time" if clock == "cpu" else "second"
    axis.set(
        title=f"GRPO end to end: samples a {second}\nbase: {point}",
        xlabel="what is varied, relative to its base (workers: to one)",
        ylabel=f"samples a {second}, relative to the base",
    )
    axis.legend(fontsize=8.5, loc="lower left")
    return canvas
