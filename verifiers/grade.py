"""`python -m verifiers grade`: rows in, verdicts out, in the order of the rows."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from .extract import check_policy
from .jsonl import RowError, rows, text_of
from .pool import Row, VerifierPool

KINDS = ("answer", "response")
_TAGGED = str(Path(__file__).parent / "checkers" / "_tagged.py")


def grade(
    source: Path,
    target: Path,
    *,
    workers: int = 2,
    policy: str = "boxed",
    time_limit_s: float = 0.9,
    memory_limit_mb: int = 480,
) -> Counter[str]:
    """Grade a file.

    Input rows are `{id, gold, pred, kind}`; `kind` is `response` (the answer is
    found by `policy`, the default) or `answer` (a bare answer). Output rows are
    `{id, outcome, extracted, rule, ms}`. The output is written beside its place and
    renamed when it is complete.

    Args:
        source: File of input rows.
        target: File of output rows.
        workers: Number of processes.
        policy: How the answer of a response is found.
        time_limit_s: Wall time for one row, seconds.
        memory_limit_mb: Memory of one process, MiB.

    Returns:
        How often each outcome came.

    Raises:
        RowError: An input row is not as above.
        ValueError: An unknown policy or a limit that is not positive.
    """
    ids: list[object] = []

    def pairs() -> Iterator[Row]:
        for number, row in rows(source):
            kind = row.get("kind", "response")
            if kind not in KINDS:
                raise RowError(
                    f"{source}, line {number}, key 'kind': found {kind!r}, expected answer or "
                    "response"
                )
            ids.append(row.get("id", number))
            yield (
                text_of(row, "gold", source, number),
                kind[0] + text_of(row, "pred", source, number),
            )

    options = {"policy": check_policy(policy)}
    counts: Counter[str] = Counter()
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        with (
            VerifierPool(
                _TAGGED, options, workers=workers, time_limit_s=time_limit_s,
                memory_limit_mb=memory_limit_mb, warm=True,
            ) as pool,
            part.open("w", encoding="utf-8") as out,
        ):  # fmt: skip
            for index, verdict in enumerate(pool.iter_many(pairs(), chunk_size=16)):
                counts[verdict.outcome.value] += 1
                row = {
                    "id": ids[index],
                    "outcome": verdict.outcome.value,
                    "extracted": verdict.extracted,
                    "rule": verdict.rule,
                    "ms": round(verdict.ms, 4),
                }
                out.write(json.dumps(row) + "\n")
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)
    return counts
