"""Grade recorded runs from their raw text, and hold the verdicts against the recorded ones.

    python -m eval.recorded --format tora FILE
    python -m eval.recorded --format gsm8k_solutions FILE --output disagreements.jsonl
    python -m eval.recorded --format qwen FILE --rows graded.jsonl

`tora` is ToRA's output (`gt`, `code`: transcripts, `pred`), `qwen` Qwen2.5-Math's (`gt`, `code`:
several samples, `pred`, `score`), `gsm8k_solutions` the model solutions that came with GSM8K.
`--rows` writes rows for `eval.score`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.arguments import Arguments, above_zero, at_least, writable_file
from data_prep.errors import UserError, command
from data_prep.jsonl import Row, column, read_rows, write_rows
from eval.grading import classes_of
from eval.transcripts import answer_text
from pipeline.verify import open_pool
from verifiers import Verdict, VerifierPool
from verifiers.plain import plain

GSM8K_RUNS = ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")


@dataclass(frozen=True, slots=True)
class Recorded:
    """One recorded sample.

    Attributes:
        run: Which of the file's runs.
        problem_id: The row's number or name.
        sample_index: 0 … n-1 within the run and problem.
        gold: The gold answer.
        text: What the checker reads.
        correct: The recorded verdict, None where the file has none.
        answer: The recorded extracted answer, None where the file has none.
    """

    run: str
    problem_id: str
    sample_index: int
    gold: str
    text: str
    correct: bool | None
    answer: str | None


def read_recorded(path: Path, layout: str) -> Iterator[Recorded]:
    """Yield the samples of a recorded file.

    Raises:
        UserError: A row is not of the layout.
    """
    read = {"tora": _math_eval, "qwen": _math_eval, "gsm8k_solutions": _gsm8k_solutions}[layout]
    for number, row in read_rows(path):
        yield from read(row, f"{path}, line {number}")


def _math_eval(row: Row, where: str) -> Iterator[Recorded]:
    texts = column(row, "code", list, where)
    golds = column(row, "gt", str, where)
    answers = column(row, "pred", list, where)
    scores = row.get("score", [None] * len(texts))
    if not len(texts) == len(answers) == len(scores):
        raise UserError(
            where,
            f"{len(texts)} texts, {len(answers)} answers, {len(scores)} scores",
            "one of each a sample",
            "mend or remove the row",
        )
    for index, (text, answer, score) in enumerate(zip(texts, answers, scores, strict=True)):
        yield Recorded(
            "recorded",
            str(row.get("idx", where)),
            index,
            golds,
            answer_text(text),
            score,
            answer or None,
        )


def _gsm8k_solutions(row: Row, where: str) -> Iterator[Recorded]:
    truth = column(row, "ground_truth", str, where)
    question = column(row, "question", str, where)
    gold = truth.rpartition("A:")[2].strip().replace(",", "")
    for run in GSM8K_RUNS:
        found: dict[str, Any] = column(row, run, dict, where)
        yield Recorded(
            run,
            question,
            0,
            gold,
            column(found, "solution", str, where),
            column(found, "is_correct", bool, where),
            None,
        )


def grade_recorded(samples: list[Recorded], pool: VerifierPool) -> list[Verdict]:
    """Return a verdict for every recorded sample, from its raw text."""
    return pool.verify_many([(sample.gold, sample.text) for sample in samples])


def disagreements(samples: list[Recorded], verdicts: list[Verdict]) -> list[dict[str, Any]]:
    """Return the samples whose verdict is not the recorded one, with our reason."""
    return [
        {
            "run": s.run,
            "problem_id": s.problem_id,
            "sample_index": s.sample_index,
            "gold": s.gold,
            "recorded": s.correct,
            "recorded_answer": s.answer,
            "outcome": v.outcome.value,
            "extracted": v.extracted,
            "rule": v.rule,
            "detail": v.detail,
            "end_of_text": s.text[-200:],
        }
        for s, v in zip(samples, verdicts, strict=True)
        if s.correct is not None and s.correct != v.is_correct
    ]


def score_rows(samples: list[Recorded], verdicts: list[Verdict]) -> Iterator[dict[str, Any]]:
    """Yield rows for `eval.score`, with symbolic classes."""
    groups: dict[tuple[str, str], list[int]] = {}
    for index, sample in enumerate(samples):
        groups.setdefault((sample.run, sample.problem_id), []).append(index)
    for (run, problem), members in groups.items():
        classes = classes_of([verdicts[index].extracted for index in members])
        for index, answer_class in zip(members, classes, strict=True):
            verdict = verdicts[index]
            yield {
                "problem_id": problem if run == "recorded" else f"{run}: {problem}",
                "sample_index": samples[index].sample_index,
                "answer": verdict.extracted,
                "correct": verdict.is_correct,
                "class": answer_class,
            }


def main(arguments: list[str]) -> None:
    """Command line."""
    parser = Arguments("python -m eval.recorded", __doc__)
    parser.add_argument("file", type=Path, help="recorded run")
    parser.add_argument("--format", required=True, choices=("tora", "qwen", "gsm8k_solutions"))
    parser.add_argument("--policy", default="boxed", help="how answers are found in the text")
    parser.add_argument("--workers", type=at_least(1), default=2, help="judging processes")
    parser.add_argument("--time-limit-s", type=above_zero, default=2.0, help="of one verdict")
    parser.add_argument("--output", type=writable_file, help="write the disagreements, JSON lines")
    parser.add_argument("--rows", type=writable_file, help="write rows for eval.score")
    known = parser.parse_args(arguments)
    samples = list(read_recorded(known.file, known.format))
    checker = {"kind": "boxed", "policy": known.policy}
    with open_pool(checker, known.workers, known.time_limit_s) as pool:
        verdicts = grade_recorded(samples, pool)
    for run in dict.fromkeys(sample.run for sample in samples):
        rows = [(s, v) for s, v in zip(samples, verdicts, strict=True) if s.run == run]
        right = sum(v.is_correct for _, v in rows)
        line = f"{run}: {right} of {len(rows)} correct, {100 * right / len(rows):.2f} %"
        flags = [(s.correct, v.is_correct) for s, v in rows if s.correct is not None]
        if flags:
            same = sum(recorded == ours for recorded, ours in flags)
            line += f"; agrees with the recorded verdict on {100 * same / len(flags):.2f} %"
        print(line)
    found = disagreements(samples, verdicts)
    for row in found[:20]:
        words = (
            f"  {row['run']}, {row['problem_id'][:50]!r} sample {row['sample_index']}: recorded "
            f"{row['recorded']}, found {row['outcome']} ({row['rule']}): gold {row['gold']!r}, "
            f"extracted {row['extracted']!r}"
        )
        print(plain(words))
    if known.output is not None:
        write_rows(known.output, found)
    if known.rows is not None:
        write_rows(known.rows, score_rows(samples, verdicts))


if __name__ == "__main__":
    command(main)
