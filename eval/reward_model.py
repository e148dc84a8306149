"""Scores of a reward model, a file of their own beside the verdicts, keyed by sample.

A reward model is a folder that a `reward_model` training stage wrote (a Bradley–Terry model: the
scalar at the last completion token), or a plug-in file `mine.py` with a function

    load_scorer() -> Scorer

Scores rank the samples of one question (`best@k`) and weigh their votes (`weighted@n`); only
their differences within a question count.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, cast

from data_prep.errors import UserError
from data_prep.files import file_hash
from data_prep.jsonl import column, read_rows
from data_prep.manifest import input_hash
from data_prep.plugins import load_plugin
from data_prep.progress import progress
from eval.models import is_scalar_model
from pipeline.engines import Prompt
from pipeline.model import load_tokenizer
from pipeline.samples import Sample

# Samples handed over at once; a scorer batches within them as its memory allows.
CHUNK = 256


class Scorer(Protocol):
    """What scores completions."""

    def score(self, prompts: list[tuple[int, ...]], completions: list[list[int]]) -> list[float]:
        """Return one score a completion, higher is better.

        Args:
            prompts: Prompt tokens, one a completion.
            completions: Sampled tokens, end token included.
        """
        ...


class RewardModel:
    """A reward model that is loaded when the first sample needs a score.

    Args:
        name: Its folder, or a plug-in file ending in `.py`.
        policy: Model folder of the checkpoint whose samples are scored.

    Raises:
        UserError: There is no such folder or file, it is no reward model, or its tokenizer is
            another one than the checkpoint's: the samples' tokens would mean something else to it.
    """

    def __init__(self, name: str, policy: Path) -> None:
        """Check that it fits; nothing is loaded yet."""
        self.name = name
        self._scorer: Scorer | None = None
        path = Path(name)
        if name.endswith(".py"):
            if not path.is_file():
                raise UserError("reward_model", f"no file {name!r}", "a plug-in file", "check it")
            self.identity = file_hash(path)
            return
        if not path.is_dir():
            raise UserError(
                "reward_model",
                f"no folder {name!r}",
                "a reward model's folder, or a plug-in file ending in .py",
                "check the path, or run the training stage that makes it",
            )
        if not is_scalar_model(path):
            raise UserError(
                f"reward_model {name}",
                "a language model, which has no score",
                "a sequence classifier with one label, as a reward_model stage writes it",
                "name the reward model's own folder, or a plug-in file",
            )
        if _vocabulary(path) != _vocabulary(policy):
            raise UserError(
                f"reward_model {name}",
                f"its tokenizer is not that of {policy}",
                "one tokenizer for both, since token ids are what is scored",
                "train it from this checkpoint's tokenizer, or write a plug-in that re-encodes",
            )
        self.identity = input_hash(path)

    def _load(self) -> Scorer:
        if self.name.endswith(".py"):
            module = load_plugin("eval.suites", self.name, where="reward_model")
            if not callable(getattr(module, "load_scorer", None)):
                raise UserError(
                    self.name,
                    "no function load_scorer()",
                    "load_scorer() -> Scorer",
                    "add it; see eval/reward_model.py",
                )
            return cast(Scorer, module.load_scorer())
        from pipeline.scorer import load_scorer

        return cast(Scorer, load_scorer(self.name))

    def rows(
        self, prompts: Sequence[Prompt], samples: Iterable[Sample]
    ) -> Iterator[dict[str, Any]]:
        """Yield a row of `scores.jsonl` a sample, in the order of the log.

        A sample that could not be drawn has score null.

        Raises:
            UserError: The scorer returns another number of scores, or one that is not finite.
        """
        before = {prompt.id: prompt.token_ids for prompt in prompts}
        waiting: list[Sample] = []
        with progress("score", "sample") as bar:
            for sample in samples:
                waiting.append(sample)
                if len(waiting) == CHUNK:
                    yield from self._score(waiting, before)
                    bar.update(len(waiting))
                    waiting = []
            yield from self._score(waiting, before)
            bar.update(len(waiting))

    def _score(
        self, samples: list[Sample], before: dict[str, tuple[int, ...]]
    ) -> Iterator[dict[str, Any]]:
        drawn = [sample for sample in samples if sample.error is None]
        scores: list[float] = []
        if drawn:
            self._scorer = self._scorer or self._load()
            scores = list(
                self._scorer.score(
                    [before[s.problem_id] for s in drawn], [list(s.token_ids) for s in drawn]
                )
            )
        if len(scores) != len(drawn):
            raise UserError(
                f"reward_model {self.name}",
                f"{len(scores)} scores for {len(drawn)} samples",
                "one a sample",
                "mend its score()",
            )
        found = iter(scores)
        for sample in samples:
            value = None if sample.error is not None else float(next(found))
            if value is not None and not math.isfinite(value):
                raise UserError(
                    f"reward_model {self.name}",
                    f"score {value} for sample {sample.sample_index} of {sample.problem_id!r}",
                    "finite numbers",
                    "mend the reward model",
                )
            yield {
                "problem_id": sample.problem_id,
                "sample_index": sample.sample_index,
                "score": value,
            }


def _vocabulary(folder: Path) -> dict[str, int]:
    return load_tokenizer(folder).get_vocab()


def read_scores(path: Path, wanted: Mapping[str, Sequence[int]]) -> list[list[float]]:
    """Read the scores of a log, in the order of `wanted`.

    Samples without a score (they were not drawn) get one below every other of their question.

    Args:
        path: Rows `{problem_id, sample_index, score}`, in any order.
        wanted: Question to the indices of its samples.

    Raises:
        UserError: A row is broken, or a sample's score is missing or there twice.
    """
    found: dict[str, dict[int, float | None]] = {}
    for number, row in read_rows(path):
        where = f"{path}, line {number}"
        problem = str(column(row, "problem_id", (str, int), where))
        index = column(row, "sample_index", int, where)
        value = None
        if row.get("score", "") is not None:
            value = float(column(row, "score", (int, float), where))
            if not math.isfinite(value):
                raise UserError(where, f"score is {value}", "a finite number", "mend it")
        samples = found.setdefault(problem, {})
        if index in samples:
            raise UserError(
                where,
                f"sample {index} of {problem!r} comes twice",
                "one score a sample",
                "remove one of them",
            )
        samples[index] = value
    scores = []
    for problem, indices in wanted.items():
        samples = found.get(problem, {})
        if set(samples) != set(indices):
            raise UserError(
                str(path),
                f"problem {problem!r} has scores of samples {sorted(samples)[:12]}",
                f"of samples {list(indices)[:12]}, each once",
                "score these samples again",
            )
        known = [value for value in samples.values() if value is not None]
        # Far enough below to weigh nothing, near enough to stay a finite number.
        lowest = min(known, default=0.0) - 1e3
        values = [samples[index] for index in indices]
        scores.append([lowest if value is None else value for value in values])
    return scores
