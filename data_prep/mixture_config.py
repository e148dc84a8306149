"""The configuration of a mixture: which sources, how many rows of each, and what is left out."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, Literal

from pydantic import Field, model_validator

from data_prep.config import Config, plugin_config
from data_prep.tokenizer import HasTokenizer


class Ingredient(Config):
    """One source and its part of the mixture.

    Attributes:
        source: The source's own configuration; its train split is what is mixed.
        count: Rows of it; 0 takes all that is left, or what `weight` says.
        weight: Its share of `rows`, relative to the other weights; 0 for none.
        pool: Rows considered, spread evenly over its files; 0 considers all. For sources many
            times larger than what is asked of them.
    """

    source: plugin_config("data_prep.sources")  # type: ignore[valid-type]
    count: int = Field(default=0, ge=0)
    weight: float = Field(default=0.0, ge=0.0)
    pool: int = Field(default=0, ge=0)

    def training(self) -> Any:
        """Return the source's configuration with its train split only."""
        return self.source.model_copy(update={"validation": "", "test": ""})


class Suite(Config):
    """Questions of an evaluation suite, which must not be trained on.

    Attributes:
        name: Shown in findings.
        source: A source of problems; every split that it names is read.
    """

    name: str
    source: plugin_config("data_prep.sources")  # type: ignore[valid-type]


class MixtureConfig(HasTokenizer):
    """A mixture of sources for supervised training.

    Attributes:
        profile: Name or path of a profile in `prompts/`.
        tokenizer: Ours, trained on the first rows of every source, or a given one.
        sources: What is mixed, in order of precedence among duplicates.
        rows: Rows in all, where sources have weights.
        scale: What counts, pools, `rows` and `validation_rows` are multiplied with, at least 1
            of each: a trial of the same mixture.
        validation_rows: Rows held out, whole groups of rewrites at a time.
        max_length: Longest row in tokens, and the length of a packed sequence.
        on_too_long: "drop" leaves longer rows out; "shorten" takes whole turns off the end of
            conversations and drops problems, whose end is the answer. Both are counted.
        on_bad_row: "fail" ends at a malformed row; "skip" leaves it out, counted.
        on_bad_gold: The same for a row without a gold.
        near_duplicates: Least similarity at which a row repeats another; 0 looks for none.
        suites: Evaluation questions that must not be among the rows.
        on_flagged: What becomes of a row whose question is an evaluation question but for
            markup and a few plain words; exact ones are always removed.
        packing: "best_fit" fills sequences of `max_length`; "none" keeps a row a sequence, for
            batches grouped by length.
        chunk_rows: Raw rows that one worker converts at a time.
        shard_sequences: Sequences in one output shard.
        workers: Processes.
    """

    profile: str = "boxed"
    sources: tuple[Ingredient, ...] = Field(min_length=1)
    rows: int = Field(default=0, ge=0)
    scale: float = Field(default=1.0, gt=0.0, le=1.0)
    validation_rows: int = Field(default=0, ge=0)
    max_length: int = Field(default=4096, ge=8)
    on_too_long: Literal["drop", "shorten"] = "drop"
    on_bad_row: Literal["fail", "skip"] = "fail"
    on_bad_gold: Literal["fail", "skip"] = "fail"
    near_duplicates: float = Field(default=0.85, ge=0.0, le=1.0)
    suites: tuple[Suite, ...] = ()
    on_flagged: Literal["remove", "keep"] = "remove"
    packing: Literal["best_fit", "none"] = "best_fit"
    chunk_rows: int = Field(default=4096, ge=1)
    shard_sequences: int = Field(default=1024, ge=1)
    workers: int = Field(default=2, ge=1)

    @model_validator(mode="after")
    def _consistent(self) -> MixtureConfig:
        kinds = [ingredient.source.kind for ingredient in self.sources]
        if len(set(kinds)) != len(kinds):
            raise ValueError(f"each source once; found {', '.join(kinds)}")
        if any(i.count and i.weight for i in self.sources):
            raise ValueError("a source has a count or a weight, not both")
        if any(i.weight for i in self.sources) != bool(self.rows):
            raise ValueError("`rows` goes with weights: give both or neither")
        return self

    def asked(self) -> list[int]:
        """Return the rows asked of each source; 0 for all that is left."""
        total = sum(ingredient.weight for ingredient in self.sources)
        counts = [self.scaled(ingredient.count) for ingredient in self.sources]
        if not total:
            return counts
        free = self.scaled(self.rows) - sum(counts)
        ends, reached = [0], 0.0
        for ingredient in self.sources:
            reached += ingredient.weight
            ends.append(round(free * reached / total))
        shares = [stop - start for start, stop in pairwise(ends)]
        return [count or share for count, share in zip(counts, shares, strict=True)]

    def scaled(self, rows: int) -> int:
        """Return a number of rows at the mixture's scale; 0 stays 0."""
        return max(1, round(rows * self.scale)) if rows else 0
