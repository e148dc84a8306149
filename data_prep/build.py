r"""The data stage: sources in; problems, a tokenizer and tokenised rows out.

    python -m data_prep.build --config pipeline/configs/cpu.toml
    python -m data_prep.build --config pipeline/configs/cpu.toml --rows 4000 --dry-run

Of the run's configuration this script reads `seed`, `out`, `[data]` and `[model].path`, and
whether there is a `[mixture]`. Any key of `[data]` can be overridden on the command line
(`--tokenizer.vocab-size 512`).

The folder `<out>/data` then holds `train.jsonl`, `validation.jsonl`, `test.jsonl` (problems),
`tokenizer/`, `train-*.arrow` and `validation-*.arrow` (tokenised rows, a row a sequence, in
training order: the trainer does not shuffle), and `statistics.json`. Sources of preference pairs
and of labelled steps give `preference_<split>.parquet` and `steps_<split>.parquet`
(`data_prep.judged`). Nothing is written before every row was read, checked and tokenised.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from data_prep import figures
from data_prep.command_line import run_stage
from data_prep.config import plugin_config
from data_prep.errors import UserError, command
from data_prep.files import disk_errors
from data_prep.formatting import Formatter, check_tokenizer, make_formatter, profile_named
from data_prep.jsonl import write_json, write_rows
from data_prep.judged import (
    Judged,
    hold_out,
    judged_figures,
    texts_of,
    tokenise_judged,
    without_held_out_prompts,
    write_judged,
)
from data_prep.ordering import Draw, Phase, training_order
from data_prep.plugins import load_plugin
from data_prep.problems import PRIORITY, check_golds, drop_duplicates, read_sources
from data_prep.reading import no_such_file
from data_prep.rows import TokenisedPairs, tokenise, write_sequences
from data_prep.run_folder import Stage
from data_prep.schema import Problem
from data_prep.tokenizer import HasTokenizer, model_path, tokenizer_files, with_tokenizer
from prompts import Profile


class DataConfig(HasTokenizer):
    """The data stage.

    Attributes:
        profile: Name or path of a profile in `prompts/`: system text and layout.
        sources: Where problems, preference pairs and labelled steps come from, in order.
        tokenizer: Ours, trained on these problems, or a given one.
        rows: Supervised training rows; 0 takes every (problem, solution style) once.
        phases: Blends of solution styles over the course of training; none takes all alike.
        sft_validation_rows: Held-out supervised rows, from the validation problems.
        judged_validation_rows: Preference pairs, and solutions with labelled steps, that are moved
            from the train rows to the validation rows, whole prompts at a time.
        max_length: Longest row in tokens.
        on_too_long: "drop" leaves longer rows out, counted; "fail" ends the build.
        on_bad_row: "fail" ends at a malformed row; "skip" leaves it out, counted.
        on_bad_gold: "fail" ends at a gold that its own solution does not reach; "skip" leaves
            such problems, and rows without a gold, out, counted.
        workers: Processes that judge golds.
        seed: Of generated problems and the order of rows, where runs with other seeds are to
            share their data; none takes the run's.
    """

    profile: str = "boxed"
    sources: tuple[plugin_config("data_prep.sources"), ...] = Field(min_length=1)  # type: ignore[valid-type]
    rows: int = Field(0, ge=0)
    phases: tuple[Phase, ...] = ()
    sft_validation_rows: int = Field(256, ge=0)
    judged_validation_rows: int = Field(0, ge=0)
    max_length: int = Field(4096, ge=8)
    on_too_long: Literal["drop", "fail"] = "drop"
    on_bad_row: Literal["fail", "skip"] = "fail"
    on_bad_gold: Literal["fail", "skip"] = "fail"
    workers: int = Field(2, ge=1)
    seed: int | None = Field(None, ge=0)


@dataclass(frozen=True)
class SftRows:
    """Tokenised rows of one split, ready to be written.

    Attributes:
        problems: The split's problems.
        pairs: Their tokenised solutions.
        draws: One a row, in training order.
        too_long: Pairs that were left out.
    """

    problems: list[Problem]
    pairs: TokenisedPairs
    draws: list[Draw]
    too_long: int

    def order(self) -> list[int]:
        """Return the index of each row's pair."""
        index = {key: number for number, key in enumerate(self.pairs.keys)}
        return [index[draw.problem, draw.style] for draw in self.draws]


def build(config: DataConfig, run: Path, seed: int) -> Path:
    """Build the data stage of a run, or skip it when it is complete.

    Args:
        config: What to build; see `tokenizer_of_run` for a run with a given model.
        run: The run folder.
        seed: Decides generated problems and the order of rows.

    Returns:
        The stage's folder, `<run>/data`.

    Raises:
        UserError: Anything in configuration or input that a user can mend; nothing was written.
    """
    profile = profile_named(config.profile, "data.profile")
    # The number of workers changes how long it takes, not what comes out.
    seed = seed if config.seed is None else config.seed
    plan = {"data": config.model_dump(mode="json", exclude={"workers", "seed"}), "seed": seed}
    stage = Stage(run, "data", plan, _inputs(config, profile))
    if stage.is_complete:
        print(f"data: complete, kept as it is ({stage.final})", file=sys.stderr)
        return stage.final
    started = time.monotonic()
    read, found, rejected = read_sources(
        config.sources, seed, config.on_bad_row, config.on_bad_gold
    )
    judged, leaked = without_held_out_prompts(hold_out(found, config.judged_validation_rows, seed))
    unique, duplicates = drop_duplicates(read)
    problems, golds = check_golds(unique, config.on_bad_gold, config.workers)
    splits = {split: [p for p in problems if p.split == split] for split in PRIORITY}
    solved = {split: [p for p in splits[split] if p.solutions] for split in ("train", "validation")}
    if not solved["train"] and not any(item.split == "train" for item in judged):
        raise UserError(
            "data.sources",
            "no problem of the train split has a solution",
            "at least one",
            "give a source a train file, or more problems",
        )
    formatter = make_formatter(
        config.tokenizer,
        profile,
        _texts(config, profile, solved["train"], judged),
        "data.tokenizer",
    )
    train = _sft_rows(
        formatter,
        config,
        solved["train"],
        config.rows,
        config.phases,
        seed,
        may_be_empty=not solved["train"],
    )
    held_out = _sft_rows(
        formatter,
        config,
        solved["validation"],
        config.sft_validation_rows,
        config.phases[-1:],
        seed,
        may_be_empty=True,
    )
    tables, unused = tokenise_judged(formatter, judged, config.max_length, config.on_too_long)
    statistics: dict[str, Any] = {
        "seed": seed,
        "profile": profile.name,
        "layout": formatter.layout,
        "vocabulary": len(formatter.tokenizer),
        "problems": figures.problem_figures(problems),
        "golds": golds,
        "dropped": {
            "rows": rejected,
            "duplicates": duplicates,
            "bad_golds": len(unique) - len(problems),
            "too_long": {"train": train.too_long, "validation": held_out.too_long},
            "judged": unused,
            "judged, prompt held out": leaked,
        },
        "sft_train": figures.row_figures(train.problems, train.pairs, train.draws, train.order()),
        "sft_validation": figures.row_figures(
            held_out.problems, held_out.pairs, held_out.draws, held_out.order()
        ),
        **judged_figures(tables),
    }
    with stage:
        folder = stage.begin()
        for split in PRIORITY:
            write_rows(folder / f"{split}.jsonl", (p.to_row() for p in splits[split]))
        with disk_errors(folder / "tokenizer"):
            formatter.tokenizer.save_pretrained(folder / "tokenizer")
        for split, rows in (("train", train), ("validation", held_out)):
            write_sequences(folder, split, rows.problems, rows.pairs, rows.order())
        write_judged(folder, tables)
        write_json(folder / "statistics.json", statistics)
        final = stage.complete(
            problems={split: len(splits[split]) for split in PRIORITY},
            sft_train=len(train.draws),
            sft_validation=len(held_out.draws),
            judged={
                name: {split: len(rows) for split, rows in splits.items()}
                for name, splits in tables.items()
            },
        )
    _tell(statistics, final, time.monotonic() - started)
    return final


def check_inputs(config: DataConfig) -> None:
    """Refuse a configuration whose profile, layout, sources or files are not there.

    Raises:
        UserError: The first that is not.
    """
    profile = profile_named(config.profile, "data.profile")
    check_tokenizer(config.tokenizer, profile, "data.tokenizer")
    _inputs(config, profile)


def _inputs(config: DataConfig, profile: Profile) -> dict[str, Path]:
    """Return every file that decides the result, checked to be there."""
    inputs = {"profile": profile.path, **tokenizer_files(config.tokenizer.path)}
    for number, source in enumerate(config.sources):
        module = load_plugin("data_prep.sources", source.kind)
        # A changed generator makes other problems, as a changed file does.
        inputs[f"source/{number}/{Path(source.kind).stem}.py"] = Path(str(module.__file__))
        for name, path in source.files().items():
            if not path.is_file():
                where = f"data.sources, entry {number + 1} (kind {source.kind!r})"
                raise no_such_file(where, name, path, module)
            inputs[f"source/{number}/{name}"] = path
    return inputs


def _texts(
    config: DataConfig, profile: Profile, problems: Sequence[Problem], judged: Sequence[Judged]
) -> Iterator[str]:
    """Yield what a tokenizer of our own is trained on: whole train rows, taken evenly."""
    most = config.tokenizer.sample_problems
    for problem in problems[:: -(-len(problems) // most) or 1]:
        yield from (profile.system, problem.question, *problem.solutions.values())
    train = [item for item in judged if item.split == "train"]
    yield from texts_of(train[:: -(-len(train) // most) or 1])


def _sft_rows(
    formatter: Formatter,
    config: DataConfig,
    problems: list[Problem],
    rows: int,
    phases: Sequence[Phase],
    seed: int,
    *,
    may_be_empty: bool = False,
) -> SftRows:
    """Tokenise the problems' solutions, leave out what is too long, and order the rows."""
    if may_be_empty and (rows == 0 or not problems):
        return SftRows(problems, TokenisedPairs([], [], []), [], 0)
    pairs = tokenise(formatter, problems)
    lengths = pairs.lengths()
    fitting: dict[int, dict[str, str]] = {}
    for (index, style), length in zip(pairs.keys, lengths, strict=True):
        if length <= config.max_length:
            fitting.setdefault(index, {})[style] = problems[index].solutions[style]
        elif config.on_too_long == "fail":
            problem = problems[index]
            raise UserError(
                problem.where or f"problem {problem.id!r}",
                f"a row of {length} tokens",
                f"at most max_length = {config.max_length}",
                'raise data.max_length, or set data.on_too_long = "drop"',
            )
    kept = sorted(fitting)
    if not kept and not may_be_empty:
        raise UserError(
            "data.max_length",
            f"no row has at most {config.max_length} tokens",
            f"{int(lengths.min())} or more",
            "raise data.max_length",
        )
    candidates = [_with_solutions(problems[index], fitting[index]) for index in kept]
    draws = [
        draw._replace(problem=kept[draw.problem])
        for draw in training_order(candidates, rows, phases, seed)
    ]
    return SftRows(problems, pairs, draws, int((lengths > config.max_length).sum()))


def _with_solutions(problem: Problem, solutions: dict[str, str]) -> Problem:
    row = {**problem.to_row(), "solutions": solutions}
    return Problem(**row)


def _tell(statistics: dict[str, Any], folder: Path, seconds: float) -> None:
    rows = statistics["sft_train"]
    judged = "".join(
        f"{statistics[name]['train']['rows']} {what}, "
        for name, what in (("preference", "preference pairs"), ("steps", "labelled solutions"))
        if name in statistics
    )
    print(
        f"data: {rows['rows']} rows, {rows['tokens']['all']} tokens "
        f"({rows['tokens']['assistant']} carry loss), {judged}vocabulary "
        f"{statistics['vocabulary']}, in {seconds:.1f} s: {folder}",
        file=sys.stderr,
    )


def main(arguments: list[str]) -> None:
    """Run the stage from the command line."""
    run_stage(
        DataConfig,
        "data",
        "python -m data_prep.build",
        __doc__ or "",
        arguments,
        lambda found: build(found.config, found.run, found.seed),
        lambda found: with_tokenizer(found.config, tokenizer_of_run(found.table, found.run)),
    )


def tokenizer_of_run(table: Mapping[str, Any], run: Path) -> str:
    """Return the tokenizer that the other tables of a run's configuration imply; empty for none.

    It is the given model's; a run that mixes its supervised rows has the mixture's.
    """
    given = model_path(table)
    return given if given or "mixture" not in table else str(run / "mixture" / "tokenizer")


if __name__ == "__main__":
    command(main)
