"""The sample browser's data: a small index to filter by, and compressed blocks of texts.

A page that holds 5,000 questions × 64 samples must open at once, so the texts stand in it as
gzip blocks of some questions each, which the page unpacks when one of them is opened.
"""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from data_prep.schema import read_problems
from eval.collect import Results, load_suite
from eval.grading import Graded, read_graded
from eval.reward_model import read_scores
from eval.sample_log import log_shards
from pipeline.samples import Sample, read_samples

# Samples in one block: a few hundred kilobytes of text, unpacked in a few milliseconds.
BLOCK_SAMPLES = 800
# A sample of a model that never stops must not fill the page.
LONGEST_TEXT = 20_000
CODES = {
    "correct": "c",
    "incorrect": "i",
    "no_answer": "n",
    "timeout": "t",
    "gold_unparseable": "g",
    "error": "e",
}


def browser_index(results: Results) -> dict[str, Any]:
    """Return what the page needs to list and filter, without any sample's text.

    Returns:
        For every suite its items (id, question, gold, level, subject), the number of items a
        block, and for every checkpoint the outcome of the greedy sample (one letter an item)
        and the numbers of correct, truncated and silent samples.
    """
    suites: dict[str, Any] = {}
    for checkpoint, name in results.pairs():
        problems, sampled, greedy = load_suite(results, checkpoint, name)
        if name not in suites:
            n = len(sampled[0])
            suites[name] = {
                "n": n,
                "block": block_size(n),
                "items": [[p.id, p.question, p.answer, p.level, p.subject] for p in problems],
                "results": {},
            }
        suite = suites[name]
        place = {row[0]: index for index, row in enumerate(suite["items"])}
        if [p.id for p in problems] != list(place):
            continue  # evaluated on other questions; its figures stand in the table
        suite["results"][checkpoint] = {
            "greedy": "".join(CODES[row.outcome] for row in greedy),
            "right": [sum(r.is_correct for r in group) for group in sampled],
            "cut": [
                _count(group, row, "length") for group, row in zip(sampled, greedy, strict=True)
            ],
            "silent": [sum(r.answer_class is None for r in group) for group in sampled],
        }
        second = second_outcomes(results, checkpoint, name)
        if second:
            suite["results"][checkpoint]["disputed"] = [
                sum(
                    row.is_correct != (code == "c")
                    for row, code in zip((single, *group), codes, strict=True)
                )
                for group, single, codes in zip(sampled, greedy, second, strict=True)
            ]
    return {"checkpoints": results.checkpoints, "suites": suites}


def second_outcomes(results: Results, checkpoint: str, suite: str) -> list[str]:
    """Return a second grader's outcomes: letters a question, the greedy sample's first.

    Empty where `eval.regrade` did not run.
    """
    folder = results.folders[checkpoint] / suite
    if not (folder / "second" / "figures.json").is_file():
        return []
    ids = [problem.id for problem in read_problems(folder / "problems.jsonl")]
    n = results.figures[checkpoint][suite]["n"]
    sampled = read_graded(folder / "second" / "verdicts.jsonl", ids, n)
    greedy = read_graded(folder / "second" / "greedy_verdicts.jsonl", ids, 1)
    return [
        "".join(CODES[row.outcome] for row in (*single, *group))
        for single, group in zip(greedy, sampled, strict=True)
    ]


def _count(group: Sequence[Graded], greedy: Graded, reason: str) -> int:
    return sum(row.finish_reason == reason for row in (*group, greedy))


def block_size(n: int) -> int:
    """Return the number of items a block for n samples an item."""
    return max(1, BLOCK_SAMPLES // (n + 1))


def browser_blocks(results: Results, index: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield (name, base64 of gzip of JSON) of every block; name is "suite/checkpoint/number".

    A block is a list of items; an item is a list of samples, the greedy one first; a sample is
    [text, outcome letter, extracted answer, rule, class, tokens, finish reason, detail, second
    grader's outcome letter or null, reward model's score or null].
    """
    for checkpoint, suite in results.pairs():
        known = index["suites"][suite]
        if checkpoint not in known["results"]:
            continue
        folder = results.folders[checkpoint] / suite
        _, sampled, greedy = load_suite(results, checkpoint, suite)
        texts = _texts(folder, "samples")
        first = _texts(folder, "greedy")
        second = second_outcomes(results, checkpoint, suite)
        letters = second or [[None] * (known["n"] + 1)] * len(sampled)
        scores = [[None] * (known["n"] + 1)] * len(sampled)
        if (scored := folder / "scores.jsonl").is_file():
            wanted = {group[0].problem_id: range(known["n"]) for group in sampled}
            scores = [[None, *row] for row in read_scores(scored, wanted)]
        size = known["block"]
        items: list[list[Any]] = []
        number = 0
        for group, row, several, single, other, values in zip(
            sampled, greedy, texts, first, letters, scores, strict=True
        ):
            items.append(
                [
                    _sample(g, t, o, v)
                    for g, t, o, v in zip(
                        [row, *group], [*single, *several], other, values, strict=True
                    )
                ]
            )
            if len(items) == size:
                yield f"{suite}/{checkpoint}/{number}", _pack(items)
                items, number = [], number + 1
        if items:
            yield f"{suite}/{checkpoint}/{number}", _pack(items)


def _texts(folder: Path, label: str) -> Iterator[list[str]]:
    """Yield the texts of one question after the other, from the shards of a log."""

    def log() -> Iterable[Sample]:
        for path in log_shards(folder, label):
            yield from read_samples(path)

    for _, group in groupby(log(), key=lambda sample: sample.problem_id):
        yield [sample.text for sample in group]


def _sample(row: Graded, text: str, second: str | None, score: float | None) -> list[Any]:
    if len(text) > LONGEST_TEXT:
        text = f"{text[:LONGEST_TEXT]} … ({len(text) - LONGEST_TEXT} characters more in the log)"
    return [
        text,
        CODES[row.outcome],
        row.extracted,
        row.rule,
        row.answer_class,
        row.tokens,
        row.finish_reason,
        row.detail,
        second,
        score,
    ]


def _pack(items: list[list[Any]]) -> str:
    raw = json.dumps(items, ensure_ascii=False, separators=(",", ":")).encode()
    return base64.b64encode(gzip.compress(raw, 6, mtime=0)).decode("ascii")
