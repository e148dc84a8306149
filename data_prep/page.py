"""The report of a mixture: one HTML file without scripts or anything to fetch."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data_prep.formatting import Formatter, load_formatter

COLOURS = ("#3b6fb6", "#e08a1e", "#5a9e5a", "#b5484c", "#7d65a8", "#8a6a52", "#c877a8", "#7a7a7a")
STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}
table{border-collapse:collapse;margin:1rem 0}td,th{padding:.2rem .7rem;border-bottom:1px solid #ddd;
text-align:right}td:first-child,th:first-child{text-align:left}pre{white-space:pre-wrap;
background:#f6f6f6;padding:.7rem;border-radius:4px;overflow-wrap:anywhere}
.loss{background:#cfe8cf}.control{color:#a33;font-weight:600}.small{color:#666;font-size:13px}
"""
SHOWN = 3000


def write_page(
    folder: Path, figures: Mapping[str, Any], names: Sequence[str], tokenizer: Any
) -> None:
    """Write `report.html` into a mixture's folder.

    Args:
        folder: The stage's folder.
        figures: What `data_prep.mixture_figures` returns.
        names: Names of the sources.
        tokenizer: The mixture's, for the rendered rows.
    """
    formatter = load_formatter(tokenizer, "boxed")
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8><title>Mixture</title>",
        f"<style>{STYLE}</style><h1>Mixture</h1>", _summary(figures),
        "<h2>Source composition</h2>", _composition(figures["sources"]),
        "<h2>Lengths</h2>", _histogram(figures["histogram"]), _lengths(figures),
        "<h2>Left out</h2>", _left_out(figures["sources"]),
        "<h2>Duplicates</h2>", _counts(figures["duplicates"]),
        "<h2>Contamination and bad rows</h2>", _findings(figures["findings"]),
        "<h2>Ten rows</h2><p>Tokens that carry loss are green, control tokens red.</p>",
        *(_rendered(formatter, example) for example in figures["examples"]),
    ]
    (folder / "report.html").write_text("\n".join(parts), encoding="utf-8")


def _summary(figures: Mapping[str, Any]) -> str:
    rows, tokens, packing = figures["rows"], figures["tokens"], figures["packing"]
    loss = sum(figures["assistant_tokens"].values())
    return (
        f"<p>{sum(rows.values()):,} rows: {rows['train']:,} train, {rows['validation']:,} "
        f"validation. {sum(tokens.values()):,} tokens, {loss:,} of them carry loss. "
        f"{packing['train']['sequences']:,} training sequences of up to "
        f"{figures['max_length']:,} tokens, filled to {packing['train']['efficiency']:.2%}.</p>"
    )


def _composition(sources: Mapping[str, Any]) -> str:
    """A bar of shares, and the table behind it."""
    total = max(1, sum(source["rows"] for source in sources.values()))
    position, bars = 0.0, []
    for index, (name, source) in enumerate(sources.items()):
        width = 900 * source["rows"] / total
        bars.append(
            f"<rect x='{position:.1f}' width='{width:.1f}' height='40' "
            f"fill='{COLOURS[index % len(COLOURS)]}'><title>{html.escape(name)}: "
            f"{source['rows']:,}</title></rect>"
        )
        position += width
    body = [
        [f"<span style='color:{COLOURS[index % len(COLOURS)]}'>■</span> {html.escape(name)}",
         f"{source['rows']:,}", f"{source['validation_rows']:,}", f"{source['missing']:,}",
         f"{source['implied_weight']:.4f}", f"{source['weight']:.4f}", f"{source['tokens']:,}",
         f"{source['assistant_tokens']:,}"]
        for index, (name, source) in enumerate(sources.items())
    ]
    head = ["source", "rows", "of them validation", "missing", "implied weight", "weight",
            "tokens", "with loss"]
    return (
        f"<svg viewBox='0 0 900 40' width='100%'>{''.join(bars)}</svg>{_table(head, body)}"
        "<p class=small>Weight: share of the mixture's rows. Implied: the share that the rows left "
        "after duplicates would have without counts or weights.</p>"
    )


def _histogram(histogram: Mapping[str, list[int]]) -> str:
    counts, edges = histogram["counts"], histogram["edges"]
    top = max([1, *counts])
    width = 900 / len(counts)
    bars = "".join(
        f"<rect x='{index * width:.1f}' y='{150 - 150 * count / top:.1f}' width='{width - 2:.1f}' "
        f"height='{150 * count / top:.1f}' fill='{COLOURS[0]}'><title>{edges[index]} to "
        f"{edges[index + 1]} tokens: {count:,} rows</title></rect>"
        for index, count in enumerate(counts)
    )
    ends = f"<text y='170'>0</text><text x='900' y='170' text-anchor='end'>{edges[-1]}</text>"
    return f"<svg viewBox='0 0 900 175' width='100%' font-size='13'>{bars}{ends}</svg>"


def _lengths(figures: Mapping[str, Any]) -> str:
    head = ["tokens a row", "min", "p50", "p90", "p99", "mean", "max"]
    rows = {"all": figures["length"], **{n: s["length"] for n, s in figures["sources"].items()}}
    return _table(head, [
        [html.escape(name), *(f"{lengths[key]:,.0f}" for key in head[1:])]
        for name, lengths in rows.items() if lengths
    ])


def _left_out(sources: Mapping[str, Any]) -> str:
    return _table(["source", "reason", "rows"], [
        [html.escape(name), html.escape(reason), f"{count:,}"]
        for name, source in sources.items() for reason, count in source["left_out"].items()
    ])


def _counts(counts: Mapping[str, int]) -> str:
    if not counts:
        return "<p>None.</p>"
    return _table(["which", "rows"], [[html.escape(k), f"{v:,}"] for k, v in counts.items()])


def _findings(findings: Mapping[str, Any]) -> str:
    parts = [_counts(findings["counts"])]
    for reason, examples in findings["examples"].items():
        parts.append(f"<h3>{html.escape(reason)}</h3>")
        for example in examples[:10]:
            text = html.escape(example.get("text") or example.get("found", ""))
            parts.append(f"<p class=small>{html.escape(example['where'])}</p><pre>{text}</pre>")
            if "suite_text" in example:
                parts.append(
                    f"<p class=small>is in {html.escape(example['suite'])}: "
                    f"{html.escape(example['suite_where'])}</p>"
                    f"<pre>{html.escape(example['suite_text'])}</pre>"
                )
    return "".join(parts)


def _rendered(formatter: Formatter, example: Mapping[str, Any]) -> str:
    messages = [{"role": role, "content": text} for role, text in example["messages"]]
    spans, shown = [], 0
    for text, token, generated in formatter.pieces(messages):
        if shown > SHOWN:
            spans.append("<span class=small> … cut here for the page</span>")
            break
        shown += len(text)
        kinds = " ".join(["loss"] * generated + ["control"] * (token is not None))
        spans.append(f"<span class='{kinds}'>{html.escape(text[:SHOWN])}</span>")
    return f"<p class=small>{html.escape(example['source'])}</p><pre>{''.join(spans)}</pre>"


def _table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    top = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    rows = "".join(
        "<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in body
    )
    return f"<table><tr>{top}</tr>{rows}</table>"
