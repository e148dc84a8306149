"""The sample log: what was sampled, once, and the verdicts beside it.

`prompts.jsonl` holds a row a problem, `samples.jsonl` a row a sample in order of
(problem, sample index), `verdicts.jsonl` a row a sample, keyed the same, so that regrading
never touches generation.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_prep.errors import UserError
from data_prep.jsonl import read_rows
from pipeline.engines import FinishReason, Group


@dataclass(frozen=True, slots=True)
class Sample:
    """One row of `samples.jsonl`.

    Attributes:
        problem_id: The problem's id.
        sample_index: 0 … G-1 within the problem's group.
        token_ids: Sampled tokens, end token included; empty where `finish_reason` is "error".
        logprobs: Sampler log-probs, one a token.
        text: Decoded completion.
        finish_reason: "stop", "length" or "error".
        policy_version: Number of weight updates that the engine had taken.
        seed: What the sample was drawn with.
        error: Why there is no completion, or None.
        token_count: As the endpoint counted, where an engine gives text alone, else None.
    """

    problem_id: str
    sample_index: int
    token_ids: list[int]
    logprobs: list[float]
    text: str
    finish_reason: FinishReason
    policy_version: int
    seed: int
    error: str | None = None
    token_count: int | None = None

    @property
    def length(self) -> int:
        """Tokens of the completion."""
        return len(self.token_ids) if self.token_count is None else self.token_count

    def to_row(self) -> dict[str, Any]:
        """Return a JSON-ready row; `token_count` stands in it where there is one."""
        row = asdict(self)
        if self.token_count is None:
            del row["token_count"]
        return row


def samples_of(groups: list[Group], n: int, policy_version: int) -> Iterator[Sample]:
    """Yield the rows of groups; a prompt that failed gives `n` rows that say why."""
    for group in groups:
        if group.error is not None:
            for index in range(n):
                yield Sample(
                    group.prompt.id, index, [], [], "", "error", policy_version, 0, group.error
                )
        for index, completion in enumerate(group.completions):
            yield Sample(
                group.prompt.id,
                index,
                completion.token_ids,
                completion.logprobs,
                completion.text,
                completion.finish_reason,
                policy_version,
                completion.seed,
                token_count=completion.token_count,
            )


def read_samples(path: str | Path) -> Iterator[Sample]:
    """Read a sample log.

    Raises:
        UserError: A row is not one of this log's.
    """
    for number, row in read_rows(path):
        try:
            yield Sample(**row)
        except TypeError as error:
            raise UserError(
                f"{path}, line {number}", str(error), "a row of pipeline.generate", "generate again"
            ) from None
