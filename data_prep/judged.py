r"""Judged rows, tokenised: preference pairs and labelled steps for reward models and DPO.

The data stage (`data_prep.build`) writes them beside its problems, one Parquet file a kind and
split; `data_prep.loader.Pairs` and `data_prep.loader.Steps` read them. The columns stand in
`data_prep.schema`, at `Preference` and `LabelledSteps`.
"""

from __future__ import annotations

import random
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.errors import UserError
from data_prep.files import writing
from data_prep.formatting import Formatter, Message
from data_prep.normalise import normalise
from data_prep.preflight import ROWS, preflight
from data_prep.rows import messages_of
from data_prep.schema import JUDGED_VERSION, LabelledSteps, Preference

# What stands between two steps in the text that a model reads, as it does between the
# paragraphs of a solution that a model writes.
STEP_BREAK = "\n\n"
TOKENS = pa.list_(pa.int32())
SCHEMAS = {
    "preference": pa.schema(
        [
            ("id", pa.string()),
            ("source", pa.string()),
            ("prompt", TOKENS),
            ("chosen", TOKENS),
            ("rejected", TOKENS),
            ("margin", pa.float32()),
        ],
        metadata={"schema_version": JUDGED_VERSION},
    ),
    "steps": pa.schema(
        [
            ("id", pa.string()),
            ("source", pa.string()),
            ("prompt", TOKENS),
            ("completion", TOKENS),
            ("step_ends", TOKENS),
            ("labels", pa.list_(pa.int8())),
            ("answer", pa.string()),
        ],
        metadata={"schema_version": JUDGED_VERSION},
    ),
}
Judged = Preference | LabelledSteps
Tables = dict[str, dict[str, list[dict[str, Any]]]]


def tokenise_judged(
    formatter: Formatter, items: Sequence[Judged], max_length: int, on_too_long: str
) -> tuple[Tables, dict[str, dict[str, int]]]:
    """Return the rows of every kind and split, and by source how many were left out and why.

    Args:
        formatter: Of the tokenizer whose model is to judge.
        items: Pairs and labelled solutions, in their order.
        max_length: Longest prompt with answer, in tokens.
        on_too_long: "drop" leaves longer rows out, counted; "fail" ends.

    Raises:
        UserError: A first row fails preflight, the template puts something between the prompt
            and an answer, or a row is too long under "fail".
    """
    first = [_conversation(item) for item in items[:ROWS]]
    preflight(formatter, first, formatter.conversations(first))
    tables: Tables = {}
    left_out: dict[str, Counter[str]] = {}
    for item in items:
        if isinstance(item, Preference):
            name, row = "preference", preference_row(formatter, item)
        else:
            name, row = "steps", steps_row(formatter, item)
        if _length(row) > max_length:
            if on_too_long == "fail":
                raise UserError(
                    item.where,
                    f"a row of {_length(row)} tokens",
                    f"at most max_length = {max_length}",
                    'raise data.max_length, or set data.on_too_long = "drop"',
                )
            reason = "too_long"
        elif name == "steps" and not len(row["labels"]):
            reason = "no_label"
        else:
            splits = tables.setdefault(name, {"train": [], "validation": []})
            splits.setdefault(item.split, []).append(row)
            continue
        left_out.setdefault(item.source, Counter())[reason] += 1
    return tables, {name: dict(sorted(counts.items())) for name, counts in left_out.items()}


def _conversation(item: Judged) -> list[Message]:
    """Return the conversation that ends in the better answer, or in the whole solution."""
    if isinstance(item, Preference):
        prompt = [{"role": role, "content": text} for role, text in item.prompt]
        return [*prompt, {"role": "assistant", "content": item.chosen}]
    return messages_of(item.question, STEP_BREAK.join(item.steps))


def preference_row(formatter: Formatter, pair: Preference) -> dict[str, Any]:
    """Return the tokens of a pair: the prompt, and each answer with its end tokens."""
    prompt = [{"role": role, "content": text} for role, text in pair.prompt]
    prompt_ids = formatter.prompt(prompt)
    chosen, rejected = (
        _completion(formatter, prompt, prompt_ids, text, pair.where)
        for text in (pair.chosen, pair.rejected)
    )
    return {
        "id": pair.id,
        "source": pair.source,
        "prompt": _array(prompt_ids),
        "chosen": _array(chosen),
        "rejected": _array(rejected),
        "margin": pair.margin,
    }


def steps_row(formatter: Formatter, solution: LabelledSteps) -> dict[str, Any]:
    """Return the tokens of a solution, with the place of each judged step's last token.

    The solution is encoded as a whole, as a policy that writes it would have it. A step's last
    token is the one that holds its last character, which may hold (part of) the break after it.
    Steps that are neutral or were not judged have no label and no end; they are context.
    """
    turn = _conversation(solution)
    prompt, text = turn[:-1], turn[-1]["content"]
    prompt_ids = formatter.prompt(prompt)
    completion = _completion(formatter, prompt, prompt_ids, text, solution.where)
    # The last piece that the assistant says; a layout may put a space before the content.
    said = [piece.text for piece in formatter.pieces(turn) if piece.is_generated]
    said = next((piece for piece in reversed(said) if text in piece), "")
    ids, starts = formatter.encode_with_starts(said)
    if not said or completion[: len(ids)] != ids:
        raise _misfit(solution.where)
    ends, labels, position = [], [], said.rindex(text)
    for step, label in zip(solution.steps, solution.labels, strict=True):
        position += len(step)
        if label:
            ends.append(bisect_right(starts, position - 1) - 1)
            labels.append(int(label > 0))
        position += len(STEP_BREAK)
    return {
        "id": solution.id,
        "source": solution.source,
        "prompt": _array(prompt_ids),
        "completion": _array(completion),
        "step_ends": _array(ends),
        "labels": np.array(labels, dtype=np.int8),
        "answer": solution.answer,
    }


def _completion(
    formatter: Formatter, prompt: Sequence[Message], prompt_ids: list[int], text: str, where: str
) -> list[int]:
    ids, _ = formatter.conversation([*prompt, {"role": "assistant", "content": text}])
    if ids[: len(prompt_ids)] != prompt_ids:
        raise _misfit(where)
    return ids[len(prompt_ids) :]


def _misfit(where: str) -> UserError:
    return UserError(
        where,
        "the answer does not start where the prompt ends",
        "a template whose generation prompt is the assistant's header",
        "choose another layout: data.tokenizer.layout",
    )


def _array(values: Sequence[int]) -> np.ndarray:
    return np.array(values, dtype=np.int32)


def _length(row: Mapping[str, Any]) -> int:
    """Return the tokens of a row's longest sequence."""
    answers = [len(row[name]) for name in ("chosen", "rejected", "completion") if name in row]
    return len(row["prompt"]) + max(answers)


def hold_out(items: Sequence[Judged], rows: int, seed: int) -> list[Judged]:
    """Move train rows to the validation split, whole prompts at a time, in a seeded order.

    Prompts with more rows than are still wanted are passed over.

    Args:
        items: Pairs and labelled solutions; those of other splits stay as they are.
        rows: Rows of each of the two kinds to move.
        seed: Decides which prompts.
    """
    moved: set[int] = set()
    for kind in (Preference, LabelledSteps):
        prompts: dict[str, list[int]] = {}
        for index, item in enumerate(items):
            if isinstance(item, kind) and item.split == "train":
                prompts.setdefault(normalise(_prompt_text(item)), []).append(index)
        groups = [prompts[key] for key in sorted(prompts)]
        random.Random(f"{seed}/held out").shuffle(groups)  # noqa: S311 - an order, not a secret
        wanted = rows
        for group in groups:
            if len(group) <= wanted:
                moved.update(group)
                wanted -= len(group)
    return [
        replace(item, split="validation") if index in moved else item
        for index, item in enumerate(items)
    ]


def without_held_out_prompts(items: Sequence[Judged]) -> tuple[list[Judged], dict[str, int]]:
    """Leave out train rows whose prompt is one of validation or test, of the same kind.

    Returns:
        The rows that stay, and by source how many do not.
    """
    held_out = {
        (type(item), normalise(_prompt_text(item))) for item in items if item.split != "train"
    }
    kept: list[Judged] = []
    left_out: Counter[str] = Counter()
    for item in items:
        if item.split == "train" and (type(item), normalise(_prompt_text(item))) in held_out:
            left_out[item.source] += 1
        else:
            kept.append(item)
    return kept, dict(sorted(left_out.items()))


def _prompt_text(item: Judged) -> str:
    if isinstance(item, Preference):
        return "\n".join(f"{role}: {text}" for role, text in item.prompt)
    return item.question


def texts_of(items: Sequence[Judged]) -> Iterator[str]:
    """Yield what a tokenizer is trained on."""
    for item in items:
        if isinstance(item, Preference):
            yield from (text for _, text in item.prompt)
            yield from (item.chosen, item.rejected)
        else:
            yield from (item.question, *item.steps)


def judged_figures(tables: Tables) -> dict[str, Any]:
    """Return rows and tokens of every kind and split, rows by source, and labels of steps."""
    figures: dict[str, Any] = {}
    for name, splits in tables.items():
        for split, rows in splits.items():
            lengths = [_length(row) for row in rows]
            found: dict[str, Any] = {
                "rows": len(rows),
                "by_source": dict(sorted(Counter(row["source"] for row in rows).items())),
                "longest": max(lengths, default=0),
            }
            if name == "steps":
                good = sum(int(row["labels"].sum()) for row in rows)
                found["labels"] = {
                    "good": good,
                    "bad": sum(len(row["labels"]) for row in rows) - good,
                }
            figures.setdefault(name, {})[split] = found
    return figures


def write_judged(folder: Path, tables: Tables) -> None:
    """Write `<kind>_<split>.parquet` of every kind that has rows, and flush it to the disk."""
    for name, splits in tables.items():
        for split, rows in splits.items():
            path = folder / f"{name}_{split}.parquet"
            table = pa.Table.from_pylist(rows, schema=SCHEMAS[name])
            with writing(path) as temporary:
                pq.write_table(table, temporary, compression="zstd")
