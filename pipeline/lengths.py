"""How much data a run has, and how long its texts are: counted where it is built, else estimated.

Before the data stage has run, the first rows of every local source are read, and characters are
taken for tokens at a fixed rate; the rows of a file follow from its size. What comes from the hub
is not looked at, and assumed to be like a set of school problems.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from data_prep.formatting import profile_named
from data_prep.jsonl import read_json
from data_prep.plugins import ask, load_plugin
from data_prep.reading import LINES, items
from data_prep.schema import Chat, LabelledSteps, Preference, Problem
from data_prep.sources._files import FilesConfig
from pipeline.config import RunConfig

SAMPLED = 200
# Characters a token: our own vocabulary of a few hundred, with a token a digit, and a hub model's.
OWN, GIVEN = 1.8, 3.2
# Tokens that a layout puts around a turn.
AROUND = 3
# What is assumed of rows that cannot be looked at: GSM8K's, about.
PROMPT, COMPLETION, ROWS = 90, 170, 10_000


@dataclass(frozen=True, slots=True)
class Lengths:
    """Tokens and rows of a run's training data.

    Attributes:
        prompt: Mean tokens of a prompt.
        completion: Mean tokens of a solution or answer.
        rows: Supervised rows of an epoch; packed sequences where they are packed.
        row: Mean tokens of such a row.
        problems: Problems to sample for.
        judged: Preference pairs, or solutions with labelled steps.
        held_out: Supervised rows that validation looks at.
        counted: Whether these are the data stage's own counts.
    """

    prompt: float = PROMPT
    completion: float = COMPLETION
    rows: int = ROWS
    row: float = PROMPT + COMPLETION
    problems: int = ROWS
    judged: int = ROWS
    held_out: int = 0
    counted: bool = False


def lengths_of(run: RunConfig) -> Lengths:
    """Return the lengths of a run's data."""
    folder = run.rows
    found = _counted(run) if (folder / "statistics.json").is_file() else None
    return found or _estimated(run)


def _counted(run: RunConfig) -> Lengths | None:
    statistics = read_json(run.rows / "statistics.json")
    try:
        if run.mixture is not None:
            tokens, rows = statistics["tokens"]["train"], statistics["rows"]["train"]
            answers = statistics["assistant_tokens"]["train"]
            sequences = statistics["packing"]["train"]["sequences"]
            return Lengths(
                prompt=(tokens - answers) / max(1, rows),
                completion=answers / max(1, rows),
                rows=sequences,
                row=tokens / max(1, sequences),
                problems=rows,
                held_out=statistics["packing"]["validation"]["sequences"],
                counted=True,
            )
        train = statistics["sft_train"]
        judged = sum(
            statistics[name]["train"]["rows"]
            for name in ("preference", "steps")
            if name in statistics
        )
        problems = sum(
            s["train"]["problems"] for s in statistics["problems"].values() if "train" in s
        )
        if not train["rows"]:
            return replace(_estimated(run), problems=problems, judged=judged)
        return Lengths(
            prompt=train["tokens"]["prompt"] / train["rows"],
            completion=train["tokens"]["assistant"] / train["rows"],
            rows=train["rows"],
            row=train["tokens"]["all"] / train["rows"],
            problems=problems,
            judged=judged,
            held_out=statistics["sft_validation"]["rows"],
            counted=True,
        )
    except (KeyError, TypeError, ZeroDivisionError):  # statistics of another version
        return None


def _estimated(run: RunConfig) -> Lengths:
    per_token = GIVEN if run.model.path else OWN
    profile = profile_named(run.profile, "profile")
    sources: list[Any] = []
    if run.data is not None:
        sources += run.data.sources
    if run.mixture is not None:
        sources += [ingredient.source for ingredient in run.mixture.sources]
    prompts: list[int] = []
    answers: list[int] = []
    rows = problems = judged = 0
    for source in sources:
        asked: list[int] = []
        written: list[int] = []
        styles = 0
        kinds: list[type] = []
        for item in _first(source, run.seed):
            question, texts = _texts(item)
            asked.append(len(question))
            # Of several styles the longest: what is trained towards writes its steps.
            written.append(max(map(len, texts), default=0))
            styles += len(texts)
            kinds.append(type(item))
        prompts += asked
        answers += written
        count = _rows_of(source, kinds)
        if kinds and kinds[0] in (Preference, LabelledSteps):
            judged += count
        else:
            problems += count
            rows += round(count * styles / len(kinds)) if kinds else count
    prompt, completion = float(PROMPT), float(COMPLETION)
    if prompts:
        system = len(profile.system)
        prompt = (sum(prompts) / len(prompts) + system) / per_token + 2 * AROUND
        completion = sum(answers) / len(answers) / per_token + 1
    found = Lengths(prompt, completion, rows, prompt + completion, problems, judged)
    if run.data is not None and run.mixture is None:
        return replace(found, rows=run.data.rows or rows, held_out=run.data.sft_validation_rows)
    assert run.mixture is not None  # noqa: S101 - a run has one of the two
    mixture = run.mixture
    asked_rows = sum(mixture.asked())
    rows = asked_rows or rows
    if mixture.packing == "best_fit":
        packed = max(1, round(rows * found.row / mixture.max_length))
        held = round(mixture.scaled(mixture.validation_rows) * found.row / mixture.max_length)
        return replace(found, rows=packed, row=float(mixture.max_length), held_out=held)
    return replace(found, rows=rows, held_out=mixture.scaled(mixture.validation_rows))


def _first(source: Any, seed: int) -> Iterator[Problem | Chat | Preference | LabelledSteps]:
    """Yield a source's first items, where they can be had at once."""
    if isinstance(source, FilesConfig):
        split = "train" if source.train else next(iter(source.paths()))
        path = source.paths()[split]
        if not path.endswith(LINES) or not Path(path).is_file():
            return
        only = source.model_copy(update={"train": path, "validation": "", "test": ""})
        found: Any = islice(items(only), SAMPLED)
    else:
        few = {
            key: min(getattr(source, key), SAMPLED)
            for key in ("train", "validation", "test")
            if isinstance(getattr(source, key, None), int)
        }
        module = load_plugin("data_prep.sources", source.kind)
        found = islice(ask(module, "read", source.model_copy(update=few), seed), SAMPLED)
    for item in found:
        if isinstance(item, Problem | Chat | Preference | LabelledSteps):
            yield item


def _texts(item: Problem | Chat | Preference | LabelledSteps) -> tuple[str, list[str]]:
    """Return what is asked, and every text that answers it."""
    if isinstance(item, Problem):
        return item.question, list(item.solutions.values())
    if isinstance(item, Preference):
        return "".join(text for _, text in item.prompt), [item.chosen, item.rejected]
    if isinstance(item, LabelledSteps):
        return item.question, ["\n\n".join(item.steps)]
    asked = "".join(text for role, text in item.messages if role != "assistant")
    return asked, ["".join(text for role, text in item.messages if role == "assistant")]


def _rows_of(source: Any, kinds: list[type]) -> int:
    """Return how many items a source has for training."""
    train = getattr(source, "train", "")
    if isinstance(train, int):
        return train
    path = Path(str(train))
    if not path.is_file():
        return ROWS if train else 0
    if not path.name.endswith(LINES):
        return ROWS
    with path.open("rb") as file:
        sizes = [len(line) for line in islice(file, SAMPLED)]
    return round(path.stat().st_size * len(sizes) / max(1, sum(sizes)))


def vocabulary_of(run: RunConfig) -> int:
    """Return the size of the vocabulary that a model of the run's own is built with."""
    stage = run.mixture or run.data
    assert stage is not None  # noqa: S101 - a run has one of the two
    path = Path(stage.tokenizer.path) / "tokenizer.json"
    built = run.tokenizer / "tokenizer.json"
    for file in (built, path):
        if file.is_file():
            table = json.loads(file.read_text(encoding="utf-8"))
            ids = {*table["model"]["vocab"].values(), *(t["id"] for t in table["added_tokens"])}
            return max(ids) + 1
    return stage.tokenizer.vocab_size
