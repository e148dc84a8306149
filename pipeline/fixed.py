"""Data that is made before training: supervised rows, and a sample log with its verdicts."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from pathlib import Path

import numpy as np

from data_prep.errors import UserError
from data_prep.jsonl import read_rows
from data_prep.loader import Pairs, Sequences, Steps
from pipeline.batch import Sequence
from pipeline.reward import reward_of
from pipeline.samples import read_samples
from verifiers import Verdict


class Rows:
    """Supervised rows of a data or mixture stage, memory-mapped, in training order.

    A sequence of a mixture is several packed documents. Each document is a `Sequence` of its own,
    so that positions start anew in it and attention never leaves it, whatever it was packed with;
    how documents lie side by side in a forward pass is `pipeline.batch`'s matter.

    Args:
        stage: The stage's folder.
        split: "train" or "validation".
    """

    def __init__(self, stage: Path, split: str) -> None:
        """Map the shards."""
        self.sequences = Sequences(stage, split)

    def __len__(self) -> int:
        """Return the number of training sequences."""
        return len(self.sequences)

    def take(self, indices: Iterable[int], *, last_turn_only: bool = False) -> list[Sequence]:
        """Return the documents of some training sequences.

        What precedes a document's first token with loss is its prompt.

        Args:
            indices: Which training sequences.
            last_turn_only: Whether only the last of several assistant turns carries loss.
        """
        documents = chain.from_iterable(self.sequences[i] for i in indices)
        return [
            _document(ids, _last_turn(mask) if last_turn_only else mask, number)
            for number, (ids, mask) in enumerate(documents)
        ]


def _last_turn(mask: np.ndarray) -> np.ndarray:
    """Return a mask of which only the last run of ones is left."""
    ends = np.flatnonzero(mask)
    before = np.flatnonzero(mask[: ends[-1]] == 0)
    kept = mask.copy()
    kept[: before[-1] + 1 if len(before) else 0] = 0
    return kept


def _document(ids: np.ndarray, mask: np.ndarray, number: int) -> Sequence:
    first = max(1, int(mask.argmax()))
    return Sequence(
        ids[:first].tolist(), ids[first:].tolist(), mask[first:].astype(bool).tolist(), number
    )


def read_log(samples: Path, verdicts: Path) -> list[Sequence]:
    """Return a generate stage's samples with the verdicts of a verify stage.

    Samples without a completion (their prompt was too long) are left out.

    Raises:
        UserError: A sample has no verdict.
    """
    prompts: dict[str, dict] = {
        row["problem_id"]: row for _, row in read_rows(samples / "prompts.jsonl")
    }
    groups = {problem: index for index, problem in enumerate(prompts)}
    judged: dict[tuple[str, int], Verdict] = {}
    for path in sorted(verdicts.glob("verdicts-*.jsonl")):
        for _, row in read_rows(path):
            key = (row.pop("problem_id"), row.pop("sample_index"))
            judged[key] = Verdict.from_dict({"ms": 0.0, **row})
    sequences: list[Sequence] = []
    for path in sorted(samples.glob("samples-*.jsonl")):
        for sample in read_samples(path):
            verdict = judged.get((sample.problem_id, sample.sample_index))
            if verdict is None:
                raise UserError(
                    f"{path}, sample {sample.sample_index} of {sample.problem_id}",
                    "no verdict",
                    "a verdict for every sample",
                    "run `python -m pipeline.verify`",
                )
            if not sample.token_ids:
                continue
            reward = reward_of(verdict)
            sequences.append(
                Sequence(
                    prompt=prompts[sample.problem_id]["token_ids"],
                    completion=sample.token_ids,
                    mask=[True] * len(sample.token_ids),
                    group=groups[sample.problem_id],
                    reward=reward,
                    correct=None if reward is None else verdict.is_correct,
                    logprobs=sample.logprobs,
                    finish_reason=sample.finish_reason,
                    level=prompts[sample.problem_id].get("level", ""),
                    text=sample.text,
                )
            )
    return sequences


def pair_of(rows: Pairs, index: int) -> list[Sequence]:
    """Return a preference pair, the preferred answer first."""
    row = rows[index]
    return [
        Sequence(row.prompt, answer, [True] * len(answer), index, sign=sign)
        for answer, sign in ((row.chosen, 1), (row.rejected, -1))
    ]


def solution_of(rows: Steps, index: int) -> list[Sequence]:
    """Return a solution whose labelled steps carry loss."""
    row = rows[index]
    steps = [(end, float(label)) for end, label in zip(row.step_ends, row.labels, strict=True)]
    mask = [False] * len(row.completion)
    for end, _ in steps:
        mask[end] = True
    return [Sequence(row.prompt, row.completion, mask, index, steps=steps)]
