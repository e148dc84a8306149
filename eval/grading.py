r"""Grading: the sample log in, a row a sample with its verdict, class and style out.

Regrading with another checker reads the same log; nothing is sampled again. Figures need
only these rows (see `eval.figures`), never the samples' texts.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data_prep.errors import UserError
from data_prep.files import Journal
from data_prep.jsonl import read_rows, write_rows
from data_prep.progress import progress
from data_prep.schema import Problem
from eval.transcripts import answer_text
from pipeline.samples import Sample
from verifiers import Outcome, Verdict, VerifierPool, group_answers

# Samples judged at once: enough to keep the pool busy, few enough to hold in memory.
CHUNK = 4096
_BARE = re.compile(r"\s*\\boxed\b")


@dataclass(frozen=True, slots=True)
class Graded:
    """One row of `verdicts.jsonl`.

    Attributes:
        problem_id: The problem's id.
        sample_index: 0 … n-1.
        outcome: What the verifier said; "no_answer" for a sample that could not be drawn.
        extracted: The answer as it stands in the text, or None.
        answer_class: Number of the sample's equivalence class among the answers to its
            problem, None without an answer.
        rule: Rule of the verifier that decided; "not_run" for a sample that was not drawn.
        detail: What a person needs beyond the rule, or None.
        tokens: Length of the completion, end token included.
        finish_reason: "stop", "length" or "error".
        style: "bare" when nothing but white space precedes the box, else "worked".
    """

    problem_id: str
    sample_index: int
    outcome: str
    extracted: str | None
    answer_class: int | None
    rule: str
    detail: str | None
    tokens: int
    finish_reason: str
    style: str

    @property
    def is_correct(self) -> bool:
        """Whether the verdict is "correct"; a verdict that could not be reached is not."""
        return self.outcome == Outcome.CORRECT.value

    def to_row(self) -> dict[str, Any]:
        """Return a JSON-ready row."""
        return {name: getattr(self, name) for name in self.__slots__}


def style_of(text: str) -> str:
    r"""Return "bare" when nothing but white space precedes `\boxed`, else "worked"."""
    return "bare" if _BARE.match(text) else "worked"


def classes_of(answers: Sequence[str | None]) -> list[int | None]:
    """Return the equivalence class of each answer, equal spellings judged once."""
    unique = list(dict.fromkeys(answers))
    groups = dict(zip(unique, group_answers(unique), strict=True))
    return [groups[answer] for answer in answers]


def grade(
    problems: Sequence[Problem],
    samples: Iterable[Sample],
    pool: VerifierPool,
    label: str,
    tools: bool = False,
) -> Iterator[Graded]:
    """Yield a row a sample, in the order of the log.

    A sample that could not be drawn (a prompt too long for the model) has no answer and stays
    in the denominator.

    Args:
        problems: Problems in the order of the log.
        samples: The log.
        pool: Judges texts.
        label: What the progress bar says.
        tools: Whether the texts are transcripts with programs (see `eval.transcripts`).

    Raises:
        UserError: The log holds a problem that is not among the problems.
    """
    golds = {problem.id: problem.answer for problem in problems}
    waiting: list[list[Sample]] = []
    held = 0
    bar: tqdm | None = None
    for problem_id, group in groupby(samples, key=lambda sample: sample.problem_id):
        if problem_id not in golds:
            raise UserError(
                f"problem {problem_id!r}",
                "in the samples, not in the suite",
                "samples of this suite's problems",
                "generate again",
            )
        # Not before the first sample: drawing them may have a bar of its own.
        if bar is None:
            bar = progress(label, "sample")
        waiting.append(list(group))
        held += len(waiting[-1])
        if held >= CHUNK:
            yield from _judge(waiting, golds, pool, tools)
            bar.update(held)
            waiting, held = [], 0
    yield from _judge(waiting, golds, pool, tools)
    if bar is not None:
        bar.update(held)
        bar.close()


def _judge(
    groups: list[list[Sample]], golds: dict[str, str], pool: VerifierPool, tools: bool
) -> Iterator[Graded]:
    """Judge whole groups; equal texts to one gold are judged once."""
    pairs = list(
        dict.fromkeys(
            (golds[sample.problem_id], sample.text)
            for group in groups
            for sample in group
            if sample.error is None
        )
    )
    read = [(gold, answer_text(text) if tools else text) for gold, text in pairs]
    verdicts = dict(zip(pairs, pool.verify_many(read), strict=True)) if pairs else {}
    for group in groups:
        judged = [
            verdicts[golds[sample.problem_id], sample.text]
            if sample.error is None
            else Verdict(Outcome.NO_ANSWER, rule="not_run", detail=sample.error)
            for sample in group
        ]
        classes = classes_of([verdict.extracted for verdict in judged])
        for sample, verdict, answer_class in zip(group, judged, classes, strict=True):
            yield Graded(
                sample.problem_id,
                sample.sample_index,
                verdict.outcome.value,
                verdict.extracted,
                answer_class,
                verdict.rule,
                verdict.detail,
                sample.length,
                sample.finish_reason,
                style_of(sample.text),
            )


def write_graded(path: Path, rows: Iterable[Graded], journal: Journal | None = None) -> int:
    """Write `verdicts.jsonl` atomically; return the number of rows."""
    return write_rows(path, (row.to_row() for row in rows), journal)


def read_graded(path: Path, problem_ids: Sequence[str], n: int) -> list[list[Graded]]:
    """Read graded rows: n a problem, in the order of `problem_ids`.

    Raises:
        UserError: A row is not one of this file's, or a sample is missing or there twice.
    """
    rows: dict[str, list[Graded]] = {}
    for number, row in read_rows(path):
        try:
            graded = Graded(**row)
        except TypeError as error:
            raise UserError(
                f"{path}, line {number}", str(error), "a row of eval.run", "evaluate again"
            ) from None
        rows.setdefault(graded.problem_id, []).append(graded)
    for problem_id in problem_ids:
        found = [row.sample_index for row in rows.get(problem_id, [])]
        if found != list(range(n)):
            raise UserError(
                str(path),
                f"problem {problem_id!r} has samples {found[:12]}",
                f"samples 0 to {n - 1}, each once",
                "evaluate again",
            )
    return [rows[problem_id] for problem_id in problem_ids]
