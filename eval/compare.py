"""Compare checkpoints on the same questions: what differs, and what cannot be told apart.

    python -m eval.compare runs/cpu/eval-sft runs/cpu/eval-grpo --output compare.json
    python -m eval.compare a.jsonl b.jsonl c.jsonl --metric maj@8

A candidate is an evaluation's folder or a file of graded answers (see `eval.score`). For every
pair: the paired bootstrap of the difference, McNemar's exact test, the smallest difference that
these questions would show (80 % power), and the items gained and lost. p-values are Holm-adjusted
over all pairs; a rank is a range wherever neighbours cannot be told apart.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.arguments import Arguments, at_least, writable_file
from data_prep.errors import UserError, command, nearest
from data_prep.jsonl import read_json, write_json
from data_prep.schema import read_problems
from eval.figures import Votes, suite_values, vote_metrics
from eval.grading import read_graded
from eval.reward_model import read_scores
from eval.score import read_answers
from eval.statistics import bootstrap_means, holm, mcnemar, paired_difference
from verifiers.plain import plain

LEVEL = 0.05


@dataclass(slots=True)
class Candidate:
    """One checkpoint on one suite.

    Attributes:
        name: What the comparison calls it.
        ids: The questions.
        values: Metric → one number a question, shape [Q].
        questions: Question texts by id, where they are known.
    """

    name: str
    ids: list[str]
    values: dict[str, np.ndarray]
    questions: dict[str, str] = field(default_factory=dict)

    def only(self, ids: Sequence[str]) -> Candidate:
        """Return the candidate on these questions, in this order."""
        place = {identity: row for row, identity in enumerate(self.ids)}
        rows = [place[identity] for identity in ids]
        return Candidate(
            self.name, list(ids), {m: v[rows] for m, v in self.values.items()}, self.questions
        )


def load_candidates(path: Path) -> dict[str, Candidate]:
    """Return suite → candidate of an evaluation's folder or a file of graded answers.

    Raises:
        UserError: There is neither.
    """
    if path.is_file():
        answers = read_answers(path)
        votes = [Votes(group.correct, group.classes) for group in answers.values()]
        n = len(votes[0].correct)
        values = vote_metrics(votes, sorted({*(2**i for i in range(n.bit_length())), n}))
        if n == 1:
            values["greedy"] = values["avg@1"]
        return {"answers": Candidate(path.stem, list(answers), values)}
    files = sorted(path.glob("*/figures.json"))
    if not files:
        raise UserError(
            str(path),
            "neither an evaluation's folder nor a file of graded answers",
            "RUN/eval-NAME, or rows of eval.score",
            "check the path",
        )
    found = {}
    for file in files:
        figures = read_json(file)
        problems = list(read_problems(file.parent / "problems.jsonl"))
        ids = [problem.id for problem in problems]
        sampled = read_graded(file.parent / "verdicts.jsonl", ids, figures["n"])
        greedy = read_graded(file.parent / "greedy_verdicts.jsonl", ids, 1)
        texts = {problem.id: problem.question for problem in problems}
        scores = None
        if (scored := file.with_name("scores.jsonl")).is_file():
            scores = read_scores(scored, {i: range(figures["n"]) for i in ids})
        values = suite_values(sampled, [group[0] for group in greedy], figures["k"], scores)
        found[file.parent.name] = Candidate(figures["checkpoint"], ids, values, texts)
    return found


def compare(
    candidates: Sequence[Candidate], metric: str, *, resamples: int = 2000, seed: int = 0
) -> dict[str, Any]:
    """Return the comparison of candidates on one suite.

    Args:
        candidates: On the same questions in the same order.
        metric: Name of the metric to rank by.
        resamples: Resampled sets of questions.
        seed: Seed of the resampling.

    Returns:
        `ranking` (name, value, interval, rank range), and `pairs` with the paired bootstrap,
        Holm-adjusted p-value, the smallest detectable difference, and McNemar's test with the
        ids gained and lost: of the greedy sample where both have one, else of the vote of all
        samples (a tie is not right).
    """
    columns = np.stack([candidate.values[metric] for candidate in candidates])
    means = bootstrap_means(columns, resamples=resamples, seed=seed)
    pairs: list[dict[str, Any]] = []
    for a, b in combinations(range(len(candidates)), 2):
        found = paired_difference(columns[a], columns[b], resamples=resamples, seed=seed)
        pair: dict[str, Any] = {
            "a": candidates[a].name,
            "b": candidates[b].name,
            "difference": found.difference.to_dict(),
            "p_value": found.p_value,
            "smallest_detectable": found.smallest,
        }
        decided = _decided(candidates[a], candidates[b])
        before, after = (candidates[c].values[decided] > 0.5 for c in (a, b))
        test = mcnemar(before, after)
        pair["decided_by"] = decided
        pair["mcnemar"] = {"gained": test.gained, "lost": test.lost, "p_value": test.p_value}
        ids = np.array(candidates[a].ids)
        pair["gained"] = [str(identity) for identity in ids[~before & after]]
        pair["lost"] = [str(identity) for identity in ids[before & ~after]]
        pairs.append(pair)
    for pair, adjusted in zip(pairs, holm([pair["p_value"] for pair in pairs]), strict=True):
        pair["p_adjusted"] = adjusted
        pair["distinguishable"] = adjusted < LEVEL
    return {
        "metric": metric,
        "questions": len(candidates[0].ids),
        "ranking": _ranking(candidates, means, pairs),
        "pairs": pairs,
    }


def _decided(a: Candidate, b: Candidate) -> str:
    """Return the metric by which an item is right or wrong for both."""
    if "greedy" in a.values and "greedy" in b.values:
        return "greedy"
    shared = [name for name in a.values if re.fullmatch(r"maj@\d+", name) and name in b.values]
    return max(shared, key=lambda name: int(name[4:]))


def _ranking(
    candidates: Sequence[Candidate], means: Sequence[Any], pairs: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Return the candidates with the range of ranks that the pairs allow."""
    better = {candidate.name: 0 for candidate in candidates}
    worse = dict(better)
    for pair in pairs:
        if pair["distinguishable"]:
            a, b = pair["a"], pair["b"]
            up, down = (b, a) if pair["difference"]["value"] > 0 else (a, b)
            better[down] += 1
            worse[up] += 1
    rows = [
        {
            "name": c.name,
            **mean.to_dict(),
            "rank": [1 + better[c.name], len(candidates) - worse[c.name]],
        }
        for c, mean in zip(candidates, means, strict=True)
    ]
    return sorted(rows, key=lambda row: (row["rank"], row["name"]))


def align(candidates: Sequence[Candidate], common: bool, suite: str) -> list[Candidate]:
    """Return the candidates on the same questions.

    Raises:
        UserError: They have different questions and `common` is not set, or none in common.
    """
    first = set(candidates[0].ids)
    shared = first.intersection(*(candidate.ids for candidate in candidates))
    if not common and any(set(candidate.ids) != first for candidate in candidates):
        sizes = ", ".join(f"{c.name}: {len(c.ids)}" for c in candidates)
        raise UserError(
            f"suite {suite!r}",
            f"different questions ({sizes}; {len(shared)} in common)",
            "the same questions for every candidate",
            "evaluate all with the same --limit, or compare the common ones with --common",
        )
    if not shared:
        raise UserError(f"suite {suite!r}", "no question in common", "some", "check the files")
    order = [identity for identity in candidates[0].ids if identity in shared]
    return [candidate.only(order) for candidate in candidates]


def render(suite: str, result: dict[str, Any], questions: dict[str, str], shown: int) -> str:
    """Return a comparison as text."""
    lines = [f"{suite}: {result['metric']} on {result['questions']} questions", ""]
    width = max(len(row["name"]) for row in result["ranking"])
    for row in result["ranking"]:
        low, high = row["rank"]
        rank = f"{low}" if low == high else f"{low}–{high}"
        lines.append(
            f"  {rank:>5}  {row['name']:{width}} {100 * row['value']:6.2f} "
            f"[{100 * row['low']:.2f}, {100 * row['high']:.2f}]"
        )
    lines.append("")
    for pair in result["pairs"]:
        d = pair["difference"]
        verdict = "differ" if pair["distinguishable"] else "cannot be told apart"
        lines.append(
            f"  {pair['a']} → {pair['b']}: {100 * d['value']:+.2f} points "
            f"[{100 * d['low']:+.2f}, {100 * d['high']:+.2f}], p {_p(pair['p_value'])}, "
            f"adjusted {_p(pair['p_adjusted'])}: they {verdict}"
        )
        lines.append(
            f"    smallest difference these questions would show: "
            f"{100 * pair['smallest_detectable']:.2f} points"
        )
        test = pair["mcnemar"]
        lines.append(
            f"    {pair['decided_by']}: {test['gained']} gained, {test['lost']} lost, "
            f"McNemar p {_p(test['p_value'])}"
        )
        for word in ("gained", "lost"):
            for identity in pair[word][:shown]:
                text = " ".join(questions.get(identity, "").split())
                lines.append(f"      {word}: {identity}  {text[:70]}")
            if len(pair[word]) > shown:
                lines.append(f"      … and {len(pair[word]) - shown} more {word}")
    return "\n".join(lines)


def _p(value: float) -> str:
    """Return a p-value as text, never as 0."""
    return f"= {value:.4f}" if value >= 0.0001 else "< 0.0001"


def main(arguments: list[str]) -> None:
    """Command line."""
    parser = Arguments("python -m eval.compare", __doc__)
    parser.add_argument("candidates", nargs="+", type=Path, help="evaluations or graded answers")
    parser.add_argument("--metric", default="", help="rank by this (default: avg@n)")
    parser.add_argument("--suites", nargs="+", default=[], help="only these")
    parser.add_argument("--common", action="store_true", help="compare common questions only")
    parser.add_argument("--items", type=at_least(0), default=3, help="items to print of each kind")
    parser.add_argument("--bootstrap", type=at_least(100), default=10_000, help="resamples")
    parser.add_argument("--seed", type=at_least(0), default=0, help="of the resampling")
    parser.add_argument("--output", type=writable_file, help="write everything as JSON")
    known = parser.parse_args(arguments)
    if len(known.candidates) < 2:
        raise UserError("candidates", "one", "at least two", "name another evaluation")
    loaded = [load_candidates(path) for path in known.candidates]
    suites = known.suites or [s for s in loaded[0] if all(s in other for other in loaded)]
    if not suites:
        raise UserError(
            "candidates",
            "no suite that all of them have",
            "at least one",
            "evaluate them on the same suite",
        )
    results = {}
    for suite in suites:
        for path, candidate in zip(known.candidates, loaded, strict=True):
            if suite not in candidate:
                raise UserError(
                    str(path),
                    f"no suite {suite!r} {nearest(suite, candidate)}".rstrip(),
                    f"one of {', '.join(candidate)}",
                    "mend --suites",
                )
        named = _named([candidate[suite] for candidate in loaded], known.candidates)
        candidates = align(named, known.common, suite)
        metric = known.metric or next(m for m in candidates[0].values if m.startswith("avg@"))
        for candidate in candidates:
            if metric not in candidate.values:
                raise UserError(
                    "--metric",
                    f"{candidate.name} has no {metric!r} "
                    f"{nearest(metric, candidate.values)}".rstrip(),
                    f"one of {', '.join(candidate.values)}",
                    "choose a metric that all have",
                )
        results[suite] = compare(candidates, metric, resamples=known.bootstrap, seed=known.seed)
        print(plain(render(suite, results[suite], candidates[0].questions, known.items)))
    if known.output is not None:
        write_json(known.output, results)


def _named(candidates: list[Candidate], paths: Sequence[Path]) -> list[Candidate]:
    """Give candidates of one name the path's instead."""
    names = [candidate.name for candidate in candidates]
    for candidate, path in zip(candidates, paths, strict=True):
        if names.count(candidate.name) > 1:
            candidate.name = str(path)
    return candidates


if __name__ == "__main__":
    command(main)
