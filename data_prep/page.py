"""The report of a mixture: one HTML file without scripts or anything to fetch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from data_prep.content_policy import content_policy
from data_prep.files import writing
from data_prep.loader import Document, Sequences
from data_prep.tokenizer import control_tokens

TEMPLATE = Path(__file__).with_name("mixture_page.html.jinja")
COLOURS = 7
QUANTILES = ("min", "p50", "p90", "p99", "mean", "max")
# Rows that are rendered, and how many characters of each.
ROWS, SHOWN = 10, 3000
MEANINGS = {
    "not_in_pool": "outside the pool that was considered",
    "bad_row": "malformed",
    "bad_gold": "no gold answer where one is expected",
    "leaked": "an evaluation question, word for word",
    "flagged": "an evaluation question but for markup and a few plain words",
    "too_long": "more tokens than the longest row may have",
    "shortened (kept)": "whole turns were taken off the end; the row is in the mixture",
    "exact duplicate": "its text is that of a row with precedence",
    "near duplicate": "its text is nearly that of a row with precedence",
    "proof_without_answer": "the solution has no boxed answer",
    "no_final_answer": "no final answer was found in the text",
    "answer_contradicts_box": "the stated gold differs from the box of the solution",
    "answer_not_verifiable": "the verifier cannot read the gold",
    "no_assistant_turn": "nobody answers in the conversation",
    "empty_turn": "an answer is empty",
}


def write_page(folder: Path, figures: Mapping[str, Any], tokenizer: Any) -> None:
    """Write `report.html` into a mixture's folder.

    Args:
        folder: The stage's folder, with its shards.
        figures: What `data_prep.mixture_figures` returns.
        tokenizer: The mixture's, for the rendered rows.
    """
    environment = Environment(
        loader=FileSystemLoader(TEMPLATE.parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = lambda value: f"{value:,}"
    environment.filters["percent"] = lambda value, digits=1: f"{100 * value:.{digits}f} %"
    sources, findings = figures["sources"], figures["findings"]
    text = environment.get_template(TEMPLATE.name).render(
        f=figures,
        policy=content_policy(),
        colours=COLOURS,
        quantiles=QUANTILES,
        meanings=MEANINGS,
        rows=_shares(sources, "rows"),
        tokens=_shares(sources, "tokens"),
        lengths={
            name: found
            for name, found in [
                ("all", figures["length"]),
                *((name, s["length"]) for name, s in sources.items()),
            ]
            if found
        },
        left_out=[
            (name, reason, count)
            for name, source in sources.items()
            for reason, count in source["left_out"].items()
        ],
        leaks=[
            (*which.split(", ", 1), count)
            for which, count in findings["counts"].items()
            if ", " in which
        ],
        bad=[
            finding
            for reason, found in findings["examples"].items()
            if reason not in ("leaked", "flagged")
            for finding in found[:10]
        ],
        shown=[_rendered(*row, tokenizer) for row in _rows(Sequences(folder, "train"))],
    )
    with writing(folder / "report.html") as temporary:
        temporary.write_text(text, encoding="utf-8")


def _shares(sources: Mapping[str, Any], what: str) -> list[dict[str, Any]]:
    total = max(1, sum(source[what] for source in sources.values()))
    return [
        {"index": index, "name": name, "count": source[what], "share": source[what] / total}
        for index, (name, source) in enumerate(sources.items())
    ]


def _rows(data: Sequences) -> Iterator[tuple[str, int, Document]]:
    """Yield (source, number, tokens) of the first rows of every source, sources in turn."""
    by_source: dict[str, list[tuple[str, int, Document]]] = {name: [] for name in data.sources}
    for index in range(len(data)):
        if all(len(found) == ROWS for found in by_source.values()):
            break
        for (source, number), document in zip(data.origins(index), data[index], strict=True):
            if len(by_source[source]) < ROWS:
                by_source[source].append((source, number, document))
    turns = [
        found[turn] for turn in range(ROWS) for found in by_source.values() if turn < len(found)
    ]
    yield from turns[:ROWS]


def _rendered(source: str, number: int, document: Document, tokenizer: Any) -> dict[str, Any]:
    """Return a row as stretches of text with the classes that colour them."""
    control = control_tokens(tokenizer)
    tokens = list(zip(document.input_ids.tolist(), document.mask.tolist(), strict=True))
    spans: list[tuple[str, str]] = []
    room = SHOWN
    for (bit, is_control), group in groupby(tokens, lambda token: (token[1], token[0] in control)):
        # Decoded together: a character may be several tokens.
        text = tokenizer.decode([token for token, _ in group], skip_special_tokens=False)
        spans.append((text[:room], " ".join(["loss"] * bit + ["control"] * is_control)))
        room -= len(text)
        if room <= 0:
            break
    return {
        "source": source,
        "number": number,
        "tokens": len(tokens),
        "loss": int(document.mask.sum()),
        "spans": spans,
        "is_cut": room < 0,
    }
