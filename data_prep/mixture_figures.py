"""The figures of a mixture: what its page shows and its JSON holds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from data_prep.candidates import Candidates
from data_prep.figures import length_figures
from data_prep.mixture_config import MixtureConfig
from data_prep.selection import Selection

BUCKETS = 32
# Pairs of near-duplicates, and characters of each text.
EXAMPLES, SHOWN = 10, 400
FINDINGS = 50


def mixture_figures(
    config: MixtureConfig,
    names: Sequence[str],
    candidates: Candidates,
    selection: Selection,
    reports: Sequence[dict[str, Any]],
    packing: dict[str, Any],
    raw: Sequence[int],
    text_of: Callable[[int], str],
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
        text_of: Returns the text of a candidate.
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
            {
                "dropped": _name(names, candidates, row),
                "kept": _name(names, candidates, first),
                "dropped_text": text_of(row)[:SHOWN],
                "kept_text": text_of(first)[:SHOWN],
            }
            for row, first in selection.pairs[:EXAMPLES]
        ],
        "length": length_figures(candidates.length[mixture]),
        "histogram": _histogram(names, candidates.length[mixture], candidates.source[mixture]),
        "packing": packing,
        "findings": _findings(reports),
        "suites": [suite.name for suite in config.suites],
        "max_length": config.max_length,
    }


def _sources(
    names: Sequence[str],
    candidates: Candidates,
    selection: Selection,
    reports: Sequence[dict[str, Any]],
    mixture: np.ndarray,
    raw: Sequence[int],
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


def _histogram(names: Sequence[str], lengths: np.ndarray, sources: np.ndarray) -> dict[str, Any]:
    """Return how many rows have how many tokens, in all and by source.

    `edges` are the least tokens of each bucket; the last one is open, so that a few long rows do
    not press all others into one bar.
    """
    usual = int(np.quantile(lengths, 0.99, method="higher")) if len(lengths) else 0
    step = -(-(usual + 1) // (BUCKETS - 1))
    bucket = np.minimum(lengths // step, BUCKETS - 1)
    counts = {"all": np.bincount(bucket, minlength=BUCKETS).tolist()}
    for index, name in enumerate(names):
        counts[name] = np.bincount(bucket[sources == index], minlength=BUCKETS).tolist()
    return {"edges": [step * number for number in range(BUCKETS)], "counts": counts}


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
