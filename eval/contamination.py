"""Each suite against the run's training data: questions that training has seen.

A question is exact when the normalised texts are the same, and near when the same is asked with
a few plain words more or less (see `data_prep.decontaminate`, which the data stage uses to keep
such rows out; this is the check on the outcome).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from data_prep.decontaminate import Index, Question
from data_prep.errors import UserError
from data_prep.formatting import load_formatter
from data_prep.jsonl import read_json, read_rows
from data_prep.loader import Sequences
from data_prep.normalise import normalise
from data_prep.schema import Problem
from data_prep.tokenizer import load_tokenizer

EXAMPLES = 5
# Where published training files keep the question, the first that is there counts.
COLUMNS = ("question", "problem", "query", "instruction", "prompt")


def training_questions(path: Path) -> Iterator[tuple[str, str]]:
    """Yield (id, question) of training data: problems, published rows, or a mixture's documents.

    Args:
        path: JSON lines with one of `COLUMNS` as text, or `messages` with a user turn; or the
            folder of a mixture stage.

    Raises:
        UserError: A row has neither.
    """
    if path.is_dir():
        yield from _mixture_questions(path)
        return
    for number, row in read_rows(path):
        identity = str(row.get("id", f"{path.name}, line {number}"))
        turns = row.get("messages", row.get("prompt"))
        question = next((row[c] for c in COLUMNS if isinstance(row.get(c), str)), None)
        if question is None and isinstance(turns, list):
            question = next(
                (
                    t.get("content")
                    for t in turns
                    if isinstance(t, dict) and t.get("role") == "user"
                ),
                None,
            )
        if not isinstance(question, str):
            raise UserError(
                f"{path}, line {number}",
                f"columns {', '.join(map(repr, row))}",
                f"a question as text in one of {', '.join(COLUMNS)}, or a user turn in messages",
                "rename the column, or give another --training file",
            )
        yield identity, question


def _mixture_questions(stage: Path) -> Iterator[tuple[str, str]]:
    """Yield what the first user turn of every document asks, read back from its tokens."""
    profile = read_json(stage / "manifest.json")["plan"]["config"]["mixture"]["profile"]
    tokenizer: Any = load_tokenizer(str(stage / "tokenizer"))
    formatter = load_formatter(tokenizer, profile)
    # What the template puts around a question, told by one that is a single rare character.
    before, _, after = tokenizer.decode(formatter.prompt_ids("☃")).partition("☃")
    sequences = Sequences(stage, "train")
    for number in range(len(sequences)):
        origins = sequences.origins(number)
        for document, (source, row) in zip(sequences[number], origins, strict=True):
            trained = int(document.mask.argmax())
            text = tokenizer.decode(document.input_ids[:trained].tolist())
            yield f"{source}, row {row}", text.removeprefix(before).removesuffix(after)


def contamination(
    suites: Mapping[str, Sequence[Problem]], training: Iterable[tuple[str, str]]
) -> dict[str, dict[str, Any]]:
    """Return, for every suite, how many of its questions training has seen.

    Args:
        suites: Suite name to its problems.
        training: (id, question) of what training drew from.

    Returns:
        Suite → `questions`, `exact`, `near` (numbers of the suite's questions) and `examples`
        (the suite's question, the training question, both ids, and which kind it is).
    """
    # An index a suite: one question may stand in several (MATH-500 is a part of MATH).
    indexes = {
        name: Index(Question(name, problem.id, problem.question) for problem in problems)
        for name, problems in suites.items()
    }
    found: dict[str, dict[str, dict[str, Any]]] = {name: {} for name in suites}
    for identity, question in training:
        normal = normalise(question)
        for name, index in indexes.items():
            leak = index.find(question, normal)
            if leak is None:
                continue
            kind = "exact" if leak.is_exact else "near"
            known = found[name].get(leak.question.where)
            # One row is enough to count a question; an exact one says more than a near one.
            if known is None or (known["kind"] == "near" and kind == "exact"):
                found[name][leak.question.where] = {
                    "kind": kind,
                    "id": leak.question.where,
                    "question": leak.question.text,
                    "training_id": identity,
                    "training_question": question,
                }
    return {
        name: {
            "questions": len(suites[name]),
            "exact": sum(row["kind"] == "exact" for row in rows.values()),
            "near": sum(row["kind"] == "near" for row in rows.values()),
            "examples": sorted(rows.values(), key=lambda row: (row["kind"], row["id"]))[:EXAMPLES],
        }
        for name, rows in found.items()
    }
