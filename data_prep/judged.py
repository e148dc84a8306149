r"""The stage for judged data: preference pairs and labelled steps, tokenised for reward models.

    python -m data_prep.judged --config data_prep/configs/judged.toml

The folder `<out>/judged` then holds, for each split that has any, `preferences_<split>.parquet`
(for Bradley-Terry reward models and DPO) and `steps_<split>.parquet` (for process reward models),
`tokenizer/`, and `statistics.json`. Nothing is written before every row was read and tokenised.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from data_prep.command_line import run_stage
from data_prep.config import Config, plugin_config
from data_prep.errors import UserError, command
from data_prep.formatting import Formatter, load_formatter, profile_named
from data_prep.jsonl import write_json
from data_prep.reading import Rejected, items
from data_prep.run_folder import Stage
from data_prep.schema import LabelledSteps, Preference
from data_prep.sources._files import FilesConfig
from data_prep.tokenizer import load_tokenizer, tokenizer_files

# What stands between two steps in the text that a model reads.
STEP_BREAK = "\n\n"
TOKENS = pa.list_(pa.int32())
SCHEMAS = {
    "preferences": pa.schema([
        ("id", pa.string()), ("source", pa.string()), ("prompt_ids", TOKENS),
        ("chosen_ids", TOKENS), ("rejected_ids", TOKENS), ("margin", pa.float32()),
    ], metadata={"schema_version": "1"}),
    "steps": pa.schema([
        ("id", pa.string()), ("source", pa.string()), ("prompt_tokens", pa.int32()),
        ("input_ids", TOKENS), ("step_ends", TOKENS), ("labels", pa.list_(pa.int8())),
        ("answer", pa.string()),
    ], metadata={"schema_version": "1"}),
}


class JudgedConfig(Config):
    """The stage for judged data.

    Attributes:
        profile: Name or path of a profile in `prompts/`.
        tokenizer: Folder or hub id: the one of the model that is to judge.
        sources: Sources of preference pairs or labelled steps.
        max_length: Longest prompt with answer; longer rows are left out, counted.
        on_bad_row: "fail" ends at a malformed row; "skip" leaves it out, counted.
    """

    profile: str = "boxed"
    tokenizer: str
    sources: tuple[plugin_config("data_prep.sources"), ...] = Field(min_length=1)  # type: ignore[valid-type]
    max_length: int = Field(default=4096, ge=8)
    on_bad_row: Literal["fail", "skip"] = "fail"


def build_judged(config: JudgedConfig, run: Path, seed: int) -> Path:
    """Build the stage, or skip it when it is complete; return its folder.

    Args:
        config: What to build.
        run: The run folder.
        seed: Takes part in the plan only: rows stay in the order of their files.

    Raises:
        UserError: Anything in configuration or input that a user can mend; nothing was written.
    """
    profile = profile_named(config.profile, "judged.profile")
    inputs = {"profile": profile.path, **tokenizer_files(config.tokenizer)}
    for number, source in enumerate(config.sources):
        inputs.update({f"source/{number}/{k}": path for k, path in source.files().items()})
    stage = Stage(run, "judged", {"judged": config.model_dump(mode="json"), "seed": seed}, inputs)
    if stage.is_complete:
        print(f"judged: complete, kept as it is ({stage.final})", file=sys.stderr)
        return stage.final
    formatter = load_formatter(load_tokenizer(config.tokenizer), profile)
    tables: dict[str, list[dict[str, Any]]] = {}
    left_out: dict[str, Counter[str]] = {}
    for source in config.sources:
        reasons = left_out.setdefault(Path(source.kind).stem, Counter())
        for item in _judged(source, config.on_bad_row, reasons):
            name = "preferences" if isinstance(item, Preference) else "steps"
            row = (
                preference_row(formatter, item) if isinstance(item, Preference)
                else steps_row(formatter, item)
            )
            if longest(row) > config.max_length:
                reasons["too_long"] += 1
            else:
                tables.setdefault(f"{name}_{item.split}", []).append(row)
    if not tables:
        raise UserError("judged.sources", "no row is left", "at least one",
                        f"look at what was left out: {left_out}")
    folder = stage.begin()
    for name, rows in tables.items():
        table = pa.Table.from_pylist(rows, schema=SCHEMAS[name.split("_")[0]])
        pq.write_table(table, folder / f"{name}.parquet", compression="zstd")
    formatter.tokenizer.save_pretrained(folder / "tokenizer")
    counts = {name: len(rows) for name, rows in tables.items()}
    write_json(folder / "statistics.json", {
        "rows": counts, "left_out": {k: dict(sorted(v.items())) for k, v in left_out.items()},
    })
    return stage.complete(rows=counts)


def preference_row(formatter: Formatter, pair: Preference) -> dict[str, Any]:
    """Return the tokens of a pair: the prompt, and each answer with its end tokens."""
    prompt = [{"role": role, "content": text} for role, text in pair.prompt]
    prompt_ids = formatter.prompt(prompt)
    answers = []
    for text in (pair.chosen, pair.rejected):
        ids, _ = formatter.conversation([*prompt, {"role": "assistant", "content": text}])
        if ids[: len(prompt_ids)] != prompt_ids:
            raise UserError(pair.where, "the answer does not start where the prompt ends",
                            "a template whose generation prompt is the assistant's header",
                            "choose another layout")
        answers.append(ids[len(prompt_ids) :])
    return {
        "id": pair.id, "source": pair.source, "prompt_ids": prompt_ids, "chosen_ids": answers[0],
        "rejected_ids": answers[1], "margin": pair.margin,
    }


def steps_row(formatter: Formatter, solution: LabelledSteps) -> dict[str, Any]:
    """Return the tokens of a solution, with the place of each step's last token and its label.

    Steps are encoded one by one, so that each ends on a token of its own. A step that was not
    judged has the label -100, which losses leave out; else 1, 0 or -1 as in the schema.
    """
    ids = formatter.prompt_ids(solution.question)
    prompt_tokens, ends = len(ids), []
    for step in solution.steps:
        ids = ids + formatter.encode(step + STEP_BREAK)
        ends.append(len(ids) - 1)
    return {
        "id": solution.id, "source": solution.source, "prompt_tokens": prompt_tokens,
        "input_ids": ids, "step_ends": ends,
        "labels": [-100 if label is None else label for label in solution.labels],
        "answer": solution.answer,
    }


def longest(row: Mapping[str, Any]) -> int:
    """Return the tokens of a row's longest sequence."""
    if "input_ids" in row:
        return len(row["input_ids"])
    return len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"]))


def _judged(
    source: Any, on_bad_row: str, reasons: Counter[str]
) -> Iterator[Preference | LabelledSteps]:
    found: Iterable[Any] = items(source) if isinstance(source, FilesConfig) else ()
    for item in found:
        if isinstance(item, Rejected):
            if item.error is not None and on_bad_row == "fail":
                raise item.error
            reasons[item.reason] += 1
        elif isinstance(item, Preference | LabelledSteps):
            yield item
        else:
            raise UserError(f"judged.sources, kind {source.kind!r}",
                            f"it gives {type(item).__name__} rows",
                            "preference pairs or labelled steps", "use it in [data] or [mixture]")


def main(arguments: list[str]) -> None:
    """Run the stage from the command line."""
    run_stage(
        JudgedConfig, "judged", "python -m data_prep.judged", __doc__ or "", arguments,
        lambda found: build_judged(found.config, found.run, found.seed),
    )


if __name__ == "__main__":
    command(main)
