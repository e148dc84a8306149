"""The figures of a mixture: what its page shows and its JSON holds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from data_prep.candidates import Candidates
from data_prep.figures import length_figures
from data_prep.mixture_config import MixtureConfig
from data_prep.selection import Selection

BUCKETS = 32
EXAMPLES = 10
FINDINGS = 50


def mixture_figures(
    config: MixtureConfig, names: Sequence[str], candidates: Candidates, selection: Selection,
    reports: Sequence[dict[str, Any]], packing: dict[str, Any], raw: Sequence[int],
) -> dict[str, Any]:
    """Return every figure of a mixture.

    Args:
        config: The mixture's.
        names: Names of the sources.
        candidates: All converted rows.
        selection: The chosen ones.
        reports: What each chunk left out and found, in order.
        packing: Sequences and efficiency by split.
        raw: Raw rows of each source.
    """
    mixture = np.concatenate([selection.train, selection.validation])
    splits = {"train": selection.train, "validation": selection.validation}
    return {
        "rows": {split: len(rows) for split, rows in splits.items()},
        "tokens": {split: int(candidates.length[rows].sum()) for split, rows in splits.items()},
        "assistant_tokens": {
            split: int(candidates.assistant[rows].sum()) for split, rows in splits.items()
        },
        "sources": _sources(names, candidates, selection, reports, mixture, raw),
        "duplicates": selection.duplicates,
        "near_duplicates": [
            {"dropped": _name(names, candidates, row), "kept": _name(names, candidates, first)}
            for row, first in selection.pairs[:FINDINGS]
        ],
        "length": length_figures(candidates.length[mixture]),
        "histogram": _histogram(candidates.length[mixture], config.max_length),
        "packing": packing,
        "findings": _findings(reports),
        "examples": _examples(reports),
        "max_length": config.max_length,
    }


def _sources(
    names: Sequence[str], candidates: Candidates, selection: Selection,
    reports: Sequence[dict[str, Any]], mixture: np.ndarray, raw: Sequence[int],
) -> dict[str, dict[str, Any]]:
    left_out: dict[str, Counter[str]] = {name: Counter() for name in names}
    for report in reports:
        left_out[report["source"]].update(report["reasons"])
    for how, count in selection.duplicates.items():
        kind, source, _ = how.split(", ")
        left_out[source][f"{kind} duplicate"] += count
    available = max(1, sum(selection.available))
    sources = {}
    for index, name in enumerate(names):
        own = mixture[candidates.source[mixture] == index]
        lengths = candidates.length[own]
        sources[name] = {
            "raw": raw[index],
            "available": selection.available[index],
            "asked": selection.asked[index],
            "missing": selection.missing()[index],
            "rows": len(own),
            "validation_rows": int((candidates.source[selection.validation] == index).sum()),
            "implied_weight": round(selection.available[index] / available, 6),
            "weight": round(len(own) / max(1, len(mixture)), 6),
            "tokens": int(lengths.sum()),
            "assistant_tokens": int(candidates.assistant[own].sum()),
            "length": length_figures(lengths),
            "left_out": dict(sorted(left_out[name].items())),
        }
    return sources


def _name(names: Sequence[str], candidates: Candidates, row: int) -> str:
    return f"{names[candidates.source[row]]}, row {int(candidates.number[row]) + 1}"


def _histogram(lengths: np.ndarray, longest: int) -> dict[str, list[int]]:
    counts, edges = np.histogram(lengths, bins=BUCKETS, range=(0, longest))
    return {"edges": [round(edge) for edge in edges.tolist()], "counts": counts.tolist()}


def _findings(reports: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return counts and first examples of leaks and bad rows."""
    found = [finding for report in reports for finding in report["findings"]]
    counts = Counter(
        f"{finding['reason']}, {finding['suite']}" if "suite" in finding else finding["reason"]
        for finding in found
    )
    examples: dict[str, list[Any]] = {}
    for finding in found:
        shown = examples.setdefault(finding["reason"], [])
        if len(shown) < FINDINGS:
            shown.append(finding)
    return {"counts": dict(sorted(counts.items())), "examples": examples}


def _examples(reports: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return rows to show, from every source in turn."""
    by_source: dict[str, list[Any]] = {}
    for report in reports:
        by_source.setdefault(report["source"], []).extend(report["examples"])
    shown = []
    for turn in range(EXAMPLES):
        for source, rows in by_source.items():
            if turn < len(rows) and len(shown) < EXAMPLES:
                shown.append({"source": source, "messages": rows[turn]})
    return shown
