"""All metrics from graded answers alone, whatever made them.

    python -m eval.score --samples samples.jsonl --k 1 2 4 8 --output metrics.json

A row is `{problem_id, sample_index, answer, correct, class?}`. `answer` null is no answer, which
never votes. `class` is the equivalence class of the answer; without it, answers spelled alike are
one class, or with `--symbolic` those that the verifier finds equal, and the merges are listed.
An optional `score` (of a reward model, higher is better) adds `best@k` and `weighted@n`; it may
also stand in a file of its own, rows `{problem_id, sample_index, score}`, given as `--scores`.

The output holds each metric's value by name (`avg@n`, `pass@k`, `maj@k`, `maj@k_strict`,
`maj@k_oracle`, `maj@k_first`), and under `intervals` its 95 % interval over problems.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.arguments import Arguments, at_least, whole_numbers, writable_file
from data_prep.errors import UserError, command
from data_prep.jsonl import Row, read_rows, write_json
from eval.figures import Votes, intervals, reward_metrics, vote_metrics
from eval.metrics import MOST_SAMPLES
from eval.reward_model import read_scores


@dataclass(slots=True)
class Answers:
    """One problem's rows in order of the sample index.

    Attributes:
        indices: Sample indices, ascending; shape [n].
        correct: Verdicts, shape [n].
        texts: Answers as recorded, None for no answer; shape [n].
        classes: Classes as recorded, or the texts where the row gives none, None for no
            answer; shape [n].
        scores: Reward model scores, or None where the file has none; shape [n].
    """

    indices: list[int]
    correct: list[bool]
    texts: list[str | None]
    classes: list[Hashable]
    scores: list[float | None]


def read_answers(path: Path) -> dict[str, Answers]:
    """Read graded answers by problem, in order of first appearance.

    Raises:
        UserError: The file is missing or empty, a row lacks a column or holds a wrong type, a
            sample comes twice, or problems have different numbers of samples.
    """
    found: dict[str, dict[int, tuple[bool, str | None, Hashable, float | None]]] = {}
    for number, row in read_rows(path):
        where = f"{path}, line {number}"
        problem, index, *values = _row(row, where)
        samples = found.setdefault(problem, {})
        if index in samples:
            raise UserError(
                where,
                f"sample {index} of problem {problem!r} comes twice",
                "one row a sample",
                "remove one of them",
            )
        samples[index] = tuple(values)  # type: ignore[assignment]
    sizes = {problem: len(samples) for problem, samples in found.items()}
    first = next(iter(sizes))
    for problem, size in sizes.items():
        if size != sizes[first]:
            raise UserError(
                str(path),
                f"problem {problem!r} has {size} samples, {first!r} has {sizes[first]}",
                "the same number of samples for every problem",
                "complete the log; a missing sample would move the denominator",
            )
    answers = {}
    for problem, samples in found.items():
        columns = zip(*(samples[index] for index in sorted(samples)), strict=True)
        answers[problem] = Answers(sorted(samples), *map(list, columns))  # type: ignore[arg-type]
    return answers


def _row(row: Row, where: str) -> tuple[str, int, bool, str | None, Hashable, float | None]:
    for name in ("problem_id", "sample_index", "answer", "correct"):
        if name not in row:
            raise UserError(
                where,
                f"no column {name!r}; found {', '.join(map(repr, row))}",
                "problem_id, sample_index, answer, correct, and class where it is known",
                "add the column (answer may be null: no answer)",
            )
    problem, index, correct = row["problem_id"], row["sample_index"], row["correct"]
    if isinstance(problem, bool) or not isinstance(problem, str | int):
        raise UserError(where, f"problem_id is {problem!r:.60}", "a text or an integer", "mend it")
    if isinstance(index, bool) or not isinstance(index, int) or index < 0:
        raise UserError(where, f"sample_index is {index!r:.60}", "an integer from 0", "mend it")
    if correct not in (True, False, 0, 1) or isinstance(correct, float):
        raise UserError(where, f"correct is {correct!r:.60}", "true or false", "mend it")
    answer = None if row["answer"] is None else str(row["answer"])
    # A recorded class is kept apart from a text that happens to be spelled like it.
    given = row.get("class")
    name: Hashable = answer if answer is None or given is None else ("class", str(given))
    score = row.get("score")
    number = isinstance(score, int | float) and not isinstance(score, bool)
    if score is not None and not (number and math.isfinite(score)):
        raise UserError(where, f"score is {score!r:.60}", "a finite number", "mend it")
    return str(problem), index, bool(correct), answer, name, score


def score(
    answers: dict[str, Answers],
    ks: list[int],
    *,
    resamples: int = 2000,
    seed: int = 0,
    symbolic: bool = False,
) -> dict[str, Any]:
    """Return the content of the output file.

    Args:
        answers: Problem to its samples, all with the same number n.
        ks: The K of Pass@K and Maj@K, each at most n.
        resamples: Resampled sets of problems.
        seed: Seed of the resampling.
        symbolic: Group answers by mathematical equality, and list the merges.
    """
    groups = list(answers.values())
    n = len(groups[0].correct)
    merges: list[dict[str, Any]] = []
    votes = [Votes(group.correct, group.classes) for group in groups]
    values = vote_metrics(votes, ks)
    if symbolic:
        spelled = {f"{name}_string": row for name, row in values.items() if name.startswith("maj@")}
        votes = [
            Votes(group.correct, _symbolic(problem, group, merges))
            for problem, group in answers.items()
        ]
        values = vote_metrics(votes, ks) | spelled
    values["no_answer"] = np.array([sum(t is None for t in g.texts) / n for g in groups])
    scores = [group.scores for group in groups]
    if all(value is not None for row in scores for value in row):
        values |= reward_metrics(votes, scores, ks)  # type: ignore[arg-type]
    found = intervals(values, resamples=resamples, seed=seed)
    result: dict[str, Any] = {name: interval.value for name, interval in found.items()}
    result["problems"], result["n"], result["k"] = len(groups), n, ks
    result["intervals"] = {name: interval.to_dict() for name, interval in found.items()}
    if symbolic:
        result["merges"] = merges
    return result


def _symbolic(problem: str, group: Answers, merges: list[dict[str, Any]]) -> list[int | None]:
    """Return symbolic classes, and note which spellings they merge."""
    from eval.grading import classes_of

    classes = classes_of(group.texts)
    members: dict[int, dict[str, None]] = {}
    for name, text in zip(classes, group.texts, strict=True):
        if name is not None and text is not None:
            members.setdefault(name, {})[text] = None
    merges += [
        {"problem_id": problem, "answers": list(texts)}
        for texts in members.values()
        if len(texts) > 1
    ]
    return classes


def _scored_throughout(answers: dict[str, Answers], path: Path) -> None:
    """Refuse a file in which some samples have a score and others none."""
    missing = [problem for problem, group in answers.items() if None in group.scores]
    if missing and any(s is not None for group in answers.values() for s in group.scores):
        raise UserError(
            str(path),
            f"samples of {len(missing)} problems, such as {missing[0]!r}, have no score",
            "a score for every sample, or for none",
            "score the rest, or leave the column out",
        )


def parse_ks(words: Sequence[str], n: int) -> list[int]:
    """Return the K of "1 2 4 8", checked against n samples; the powers of 2 up to n without any.

    Raises:
        UserError: A K is no number, below 1, or above n.
    """
    ks = whole_numbers(words, "--k") if words else [2**i for i in range(n.bit_length())]
    for k in ks:
        if not 1 <= k <= n:
            raise UserError(
                "--k",
                f"K = {k} with {n} samples a problem",
                f"1 ≤ K ≤ {n}",
                "draw more samples, or leave this K out",
            )
    return sorted(set(ks))


def main(arguments: list[str]) -> None:
    """Command line."""
    parser = Arguments("python -m eval.score", __doc__)
    parser.add_argument("--samples", required=True, type=Path, help="graded answers, JSON lines")
    parser.add_argument(
        "--k", nargs="+", default=[], help="such as 1 2 4 8 (default: powers of 2 up to n)"
    )
    parser.add_argument("--output", type=writable_file, help="where the JSON goes")
    parser.add_argument("--scores", type=Path, help="a reward model's scores, JSON lines")
    parser.add_argument("--symbolic", action="store_true", help="vote by mathematical equality")
    parser.add_argument("--bootstrap", type=at_least(100), default=2000, help="resamples")
    parser.add_argument("--seed", type=at_least(0), default=0, help="of the resampling")
    known = parser.parse_args(arguments)
    answers = read_answers(known.samples)
    n = len(next(iter(answers.values())).correct)
    if n > MOST_SAMPLES:
        raise UserError(
            str(known.samples),
            f"{n} samples a problem",
            f"at most {MOST_SAMPLES}",
            "score a part of them",
        )
    if known.scores is not None:
        wanted = {problem: group.indices for problem, group in answers.items()}
        for group, row in zip(answers.values(), read_scores(known.scores, wanted), strict=True):
            group.scores = list(row)
    _scored_throughout(answers, known.samples)
    ks = parse_ks(known.k, n)
    result = score(answers, ks, resamples=known.bootstrap, seed=known.seed, symbolic=known.symbolic)
    for name, interval in result["intervals"].items():
        print(f"{name:16} {interval['value']:.6f}  [{interval['low']:.4f}, {interval['high']:.4f}]")
    print(f"{result['problems']} problems × {n} samples; 95 % intervals over problems")
    if known.output is not None:
        write_json(known.output, result)


if __name__ == "__main__":
    command(main)
