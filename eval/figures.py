"""Figures: from graded rows to named numbers with intervals, a pure function.

A figure is the mean over questions of one number a question, with the 95 % interval of a
bootstrap clustered by question. Denominators never move: a sample that was cut off, not drawn
or not judged counts as not correct, and its share is a figure of its own.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from data_prep.schema import Problem
from eval.grading import Graded
from eval.metrics import (
    average,
    best_of_k,
    majority_at_k,
    majority_first,
    pass_at_k,
    softmax,
    weighted_vote,
)
from eval.statistics import Interval, bootstrap_means, widen_constant
from eval.styles import style_figures

# Of `figures.json`. A higher one is computed anew from the samples that are there.
SCHEMA = 2
DEFINITIONS = {
    "greedy": "share of questions that the greedy sample answers correctly",
    "avg@n": "share of correct samples, averaged over questions",
    "pass@k": "chance that k of the n samples hold a correct one: 1 − C(n−c,k)/C(n,k)",
    "maj@k": "chance that the vote of k of the n samples is correct: exact expectation over all "
    "subsets, ties split evenly, samples without an answer never vote",
    "maj@k_strict": "as maj@k, every tie counted against",
    "maj@k_oracle": "as maj@k, every tie counted for",
    "maj@k_first": "vote of the first k samples, the first class wins a tie (depends on order)",
    "maj@k_string": "as maj@k, votes grouped by spelling instead of by mathematical equality",
    "best@k": "chance that the sample which the reward model scores highest among k of the n is "
    "correct: exact expectation over all subsets, equal scores split evenly",
    "weighted@n": "the vote of all n samples, each weighing exp(score) of the reward model "
    "(a softmax over the question's samples: only differences of scores count)",
    "truncated": "share of samples that reached the token limit",
    "no_answer": "share of samples in which no answer was found",
    "timeouts": "share of samples whose verdict reached the time limit",
    "unjudged": "share of samples whose gold or answer the verifier could not judge",
    "not_run": "share of samples that were not drawn (prompt longer than the context)",
    "mean_tokens": "length of a sample in tokens, end token included",
}
# Figures that a breakdown by level or subject repeats.
_BROKEN_DOWN = ("greedy", "avg@", "pass@", "maj@", "best@", "weighted@")
# Not a share, so 0 and 1 are not its ends.
_NOT_SHARES = frozenset({"mean_tokens", "greedy_tokens"})


@dataclass(frozen=True, slots=True)
class Votes:
    """One question's samples as the metrics see them, in order.

    Attributes:
        correct: Verdicts, shape [n].
        classes: Equivalence classes, None without an answer; shape [n].
    """

    correct: Sequence[bool]
    classes: Sequence[Hashable]


def vote_metrics(questions: Sequence[Votes], ks: Sequence[int]) -> dict[str, np.ndarray]:
    """Return metric name to one number a question, shape [Q].

    Args:
        questions: All with the same number of samples n.
        ks: The K of Pass@K and Maj@K, each at most n.
    """
    n = len(questions[0].correct)
    rows: dict[str, list[float]] = {f"avg@{n}": [average(q.correct) for q in questions]}
    majorities = [majority_at_k(q.classes, q.correct, ks) for q in questions]  # type: ignore[arg-type]
    for position, k in enumerate(ks):
        at_k = [majority[position] for majority in majorities]
        rows[f"pass@{k}"] = [pass_at_k(n, sum(map(bool, q.correct)), k) for q in questions]
        rows[f"maj@{k}"] = [majority.expected for majority in at_k]
        rows[f"maj@{k}_strict"] = [majority.strict for majority in at_k]
        rows[f"maj@{k}_oracle"] = [majority.oracle for majority in at_k]
        rows[f"maj@{k}_first"] = [majority_first(q.classes, q.correct, k) for q in questions]  # type: ignore[arg-type]
    return {name: np.array(values) for name, values in rows.items()}


def reward_metrics(
    questions: Sequence[Votes], scores: Sequence[Sequence[float]], ks: Sequence[int]
) -> dict[str, np.ndarray]:
    """Return what a reward model's scores add: metric name to one number a question, shape [Q].

    Args:
        questions: All with the same number of samples n.
        scores: Higher is better, shape [Q][n].
        ks: The K of best-of-K, each at most n.
    """
    pairs = list(zip(questions, scores, strict=True))
    values = {f"best@{k}": [best_of_k(q.correct, s, k) for q, s in pairs] for k in ks}
    values[f"weighted@{len(questions[0].correct)}"] = [
        weighted_vote(q.classes, q.correct, softmax(s))  # type: ignore[arg-type]
        for q, s in pairs
    ]
    return {name: np.array(row) for name, row in values.items()}


def votes_of(group: Sequence[Graded]) -> Votes:
    """Return a question's votes, grouped by mathematical equality."""
    return Votes([row.is_correct for row in group], [row.answer_class for row in group])


def spelled_votes_of(group: Sequence[Graded]) -> Votes:
    """Return a question's votes, grouped by spelling without white space."""
    spelled = [
        None if r.answer_class is None else "".join((r.extracted or "").split()) for r in group
    ]
    return Votes([row.is_correct for row in group], spelled)


def suite_values(
    sampled: Sequence[Sequence[Graded]],
    greedy: Sequence[Graded],
    ks: Sequence[int],
    scores: Sequence[Sequence[float]] | None = None,
) -> dict[str, np.ndarray]:
    """Return every metric of a suite, one number a question.

    Args:
        sampled: n rows a question.
        greedy: One row a question, in the same order; empty where greedy was not drawn.
        ks: The K of Pass@K and Maj@K.
        scores: A reward model's, n a question; None without one.
    """
    values: dict[str, np.ndarray] = {}
    if greedy:
        values["greedy"] = np.array([float(row.is_correct) for row in greedy])
    values |= vote_metrics([votes_of(group) for group in sampled], ks)
    spelled = [
        majority_at_k(votes.classes, votes.correct, ks)  # type: ignore[arg-type]
        for votes in map(spelled_votes_of, sampled)
    ]
    values |= {
        f"maj@{k}_string": np.array([found[position].expected for found in spelled])
        for position, k in enumerate(ks)
    }
    if scores is not None:
        values |= reward_metrics([votes_of(group) for group in sampled], scores, ks)
    tests = {
        "truncated": lambda row: row.finish_reason == "length",
        "no_answer": lambda row: row.outcome == "no_answer",
        "timeouts": lambda row: row.outcome == "timeout",
        "unjudged": lambda row: row.outcome in ("gold_unparseable", "error"),
        "not_run": lambda row: row.finish_reason == "error",
        "mean_tokens": lambda row: row.tokens,
    }
    for name, test in tests.items():
        values[name] = np.array([sum(map(test, group)) / len(group) for group in sampled])
    if greedy:
        values["greedy_truncated"] = np.array([float(r.finish_reason == "length") for r in greedy])
        values["greedy_no_answer"] = np.array([float(r.outcome == "no_answer") for r in greedy])
        values["greedy_tokens"] = np.array([float(row.tokens) for row in greedy])
    return values


def merges(sampled: Sequence[Sequence[Graded]], most: int = 50) -> dict[str, Any]:
    """Return where voting by equality joins answers that are spelled differently.

    Args:
        sampled: n rows a question.
        most: Examples to list.

    Returns:
        `count` of classes with more than one spelling, and the first of them with their
        spellings, which is where maj@k and maj@k_string can differ.
    """
    found = []
    for group in sampled:
        spellings: dict[int, dict[str, None]] = {}
        for row in group:
            if row.answer_class is not None:
                spelling = "".join((row.extracted or "").split())
                spellings.setdefault(row.answer_class, {})[spelling] = None
        found += [
            {"problem_id": group[0].problem_id, "spellings": list(members)}
            for members in spellings.values()
            if len(members) > 1
        ]
    return {"count": len(found), "examples": found[:most]}


def intervals(values: dict[str, np.ndarray], *, resamples: int, seed: int) -> dict[str, Interval]:
    """Return the mean of each metric with its 95 % interval.

    Args:
        values: Metric name to one number a question, shape [Q].
        resamples: Resampled sets of questions.
        seed: Seed of the resampling.
    """
    names = list(values)
    stacked = np.stack([values[name] for name in names])
    found = bootstrap_means(stacked, resamples=resamples, seed=seed)
    return {
        name: interval if name in _NOT_SHARES else widen_constant(interval)
        for name, interval in zip(names, found, strict=True)
    }


def suite_figures(
    problems: Sequence[Problem],
    sampled: Sequence[Sequence[Graded]],
    greedy: Sequence[Graded],
    ks: Sequence[int],
    *,
    scores: Sequence[Sequence[float]] | None = None,
    resamples: int,
    seed: int,
) -> dict[str, Any]:
    """Return what `figures.json` holds: every figure of a suite, from its rows alone.

    Args:
        problems: The suite's problems.
        sampled: n rows a question, in the order of the problems.
        greedy: One row a question; empty where greedy was not drawn.
        ks: The K of Pass@K and Maj@K.
        scores: A reward model's, n a question; None without one.
        resamples: Resampled sets of questions.
        seed: Seed of the resampling.
    """
    values = suite_values(sampled, greedy, ks, scores)
    found = intervals(values, resamples=resamples, seed=seed)
    styles = style_figures(sampled, resamples=resamples, seed=seed)
    return {
        "schema": SCHEMA,
        "questions": len(problems),
        "n": len(sampled[0]),
        "k": list(ks),
        "figures": {metric: interval.to_dict() for metric, interval in found.items()},
        "styles": {
            style: {"share": f.share.to_dict(), "accuracy": f.accuracy.to_dict()}
            for style, f in styles.items()
        },
        "breakdown": {
            by: _breakdown(values, [str(getattr(p, by)) for p in problems], resamples, seed)
            for by in ("level", "subject")
        },
        "merges": merges(sampled),
        "definitions": DEFINITIONS,
    }


def _breakdown(
    values: dict[str, np.ndarray], keys: Sequence[str], resamples: int, seed: int
) -> dict[str, Any]:
    """Return key to metric to interval; empty where all problems share one key."""
    places: dict[str, list[int]] = defaultdict(list)
    for index, key in enumerate(keys):
        places[key].append(index)
    if len(places) < 2:
        return {}
    kept = {
        name: row
        for name, row in values.items()
        if name.startswith(_BROKEN_DOWN) and "_" not in name
    }
    return {
        key or "not stated": {
            metric: interval.to_dict()
            for metric, interval in intervals(
                {name: row[places[key]] for name, row in kept.items()},
                resamples=resamples,
                seed=seed,
            ).items()
        }
        for key in sorted(places)
    }
