"""Data that is made before training: supervised rows, and a sample log with its verdicts."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_prep.errors import UserError
from data_prep.jsonl import read_rows
from pipeline.batch import Sequence
from pipeline.reward import reward_of
from pipeline.samples import read_samples
from verifiers import Verdict


class Rows:
    """Supervised rows of the data stage, memory-mapped, in the order they were written in.

    Args:
        path: A Parquet file with `input_ids` and `mask`.
    """

    def __init__(self, path: Path) -> None:
        """Map the file."""
        if not path.is_file():
            raise UserError(
                str(path),
                "no such file",
                "the data stage's rows",
                "run `python -m data_prep.build` with this configuration first",
            )
        try:
            table = pq.read_table(path, columns=["input_ids", "mask"], memory_map=True)
        except pa.ArrowException as error:
            raise UserError(
                str(path),
                f"cannot be read: {error}",
                "the data stage's rows",
                "remove the data folder and build again",
            ) from None
        self._ids, self._mask = table["input_ids"], table["mask"]

    @property
    def longest(self) -> int:
        """Tokens of the longest row, 0 where there are none."""
        return int(
            pc.call_function("max", [pc.call_function("list_value_length", [self._ids])]).as_py()
            or 0
        )

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self._ids)

    def take(self, start: int, stop: int) -> list[Sequence]:
        """Return rows start … stop-1 as sequences: what precedes the first loss is the prompt."""
        sequences = []
        ids = self._ids.slice(start, stop - start).to_pylist()
        masks = self._mask.slice(start, stop - start).to_pylist()
        for offset, (row, mask) in enumerate(zip(ids, masks, strict=True)):
            first = max(1, mask.index(1))
            sequences.append(
                Sequence(row[:first], row[first:], [bool(m) for m in mask[first:]], start + offset)
            )
        return sequences


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
