"""What a step leaves behind: a row of figures, a line on the screen, warnings where due.

`steps.jsonl` is repeatable bit for bit; what is not (rates) stands in `timing.jsonl`. A figure of
`steps.jsonl` is a number, null where it is not finite, or a list: `advantage_histogram` counts the
step's tokens by advantage, between `HISTOGRAM_EDGES` and in one bin more at either end.
"""

from __future__ import annotations

import math
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_prep.errors import UserError
from data_prep.files import disk_errors, writing
from data_prep.jsonl import dump_row, parse_row, read_rows
from data_prep.progress import progress
from pipeline.batch import Sequence
from pipeline.monitor import Monitor
from pipeline.trackers import Trackers

# Of advantages, in the units of the method: standard deviations for GRPO, rewards for others.
HISTOGRAM_EDGES = (-3.0, -2.0, -1.5, -1.0, -0.5, -0.1, 0.1, 0.5, 1.0, 1.5, 2.0, 3.0)
# Names of the shares of groups by their own accuracy, and the largest accuracy of each.
SOLVED = (("none", 0.0), ("few", 0.25), ("some", 0.75), ("most", 1.0 - 1e-9), ("all", 1.0))

Figures = Mapping[str, Any]


class Records:
    """Appends figures to `steps.jsonl` (repeatable) and rates to `timing.jsonl` (not).

    What the monitor has to say is appended to `warnings.jsonl`.

    Args:
        folder: The stage's working folder.
        start: First step of this process; later rows of an interrupted one are dropped.
        total: Steps in all.
        label: Name on the progress bar.
        monitor: Looks at every row.
        trackers: Show every row, with its rates.

    Attributes:
        samples: Drawn so far, in all steps.
    """

    def __init__(
        self,
        folder: Path,
        start: int,
        total: int,
        label: str,
        monitor: Monitor | None = None,
        trackers: Trackers | None = None,
    ) -> None:
        """Cut the files back to `start`, show the monitor what is left, and open the bar."""
        self.paths = {name: folder / f"{name}.jsonl" for name in ("steps", "timing", "warnings")}
        self.monitor, self.trackers = monitor, trackers
        self.samples = 0
        for name, path in self.paths.items():
            with writing(path) as temporary, temporary.open("wb") as file:
                file.writelines(self._kept(name, start))
        if trackers is not None:
            trackers.begin(self._shown() if trackers.kinds else ())
        self.bar = progress(label, "step", total, start)

    def _kept(self, name: str, start: int) -> Iterator[bytes]:
        """Yield the lines of steps before `start`, one at a time: there may be a great many."""
        path = self.paths[name]
        if not path.is_file():
            return
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                # A line cut off by a kill is beyond the last saved state, so it may go.
                if not line.endswith(b"\n"):
                    return
                where = f"{path}, line {number}"
                try:
                    row = parse_row(line[:-1], where)
                    if not isinstance(row.get("step"), int):
                        raise UserError(
                            where,
                            "damaged: it names no step",
                            "a step's row",
                            "remove the stage's .partial folder to start the stage again",
                        )
                except UserError:
                    # Rates decide nothing; of the others the state has seen to every row.
                    if name != "timing":
                        raise
                    print(f"{where}: damaged; left out", file=sys.stderr)
                    continue
                if row["step"] >= start:
                    continue
                if name == "steps":
                    self.samples += int(row.get("samples", 0))
                    if self.monitor is not None:
                        self.monitor.observe(row)
                yield line

    def _shown(self) -> list[dict[str, Any]]:
        """Return the rows on record with their rates."""
        found: dict[int, dict[str, Any]] = {}
        for name in ("steps", "timing"):
            path = self.paths[name]
            for _, row in read_rows(path) if path.stat().st_size else ():
                found.setdefault(row["step"], {}).update(row)
        return list(found.values())

    def write(self, step: int, figures: Figures, timing: Figures) -> None:
        """Append a step's figures; what is not finite is written as null."""
        row = {"step": step, **{key: _short(value) for key, value in figures.items()}}
        rates = {"step": step, **{key: _short(value) for key, value in timing.items()}}
        self._append("steps", row)
        self.samples += int(figures.get("samples", 0))
        self._append("timing", rates)
        if self.trackers is not None:
            self.trackers.write({**row, **rates})
        if self.monitor is not None:
            for warned in self.monitor.observe(row):
                self._append("warnings", warned.to_row())
                self.monitor.say(warned)
        shown = ("reward_mean", "objective", "accuracy", "entropy", "validation_loss")
        self.bar.set_postfix({key: f"{figures[key]:z.3f}" for key in shown if key in figures})
        self.bar.update(1)

    def _append(self, name: str, row: dict[str, Any]) -> None:
        path = self.paths[name]
        with disk_errors(path), path.open("a", encoding="utf-8") as file:
            file.write(dump_row(row))

    def close(self) -> None:
        """Close the bar and the trackers."""
        self.bar.close()
        if self.trackers is not None:
            self.trackers.close()


def _short(value: Any) -> Any:
    """Return a number to seven digits, None for one that is not finite; lists item by item."""
    if isinstance(value, list | tuple):
        return [_short(inner) for inner in value]
    return float(f"{value:.7g}") if math.isfinite(value) else None


def advantage_figures(advantage: Tensor) -> dict[str, Any]:
    """Return mean, spread and histogram of a step's advantages, one a token.

    Args:
        advantage: [T].
    """
    values = advantage.detach().double().cpu()
    edges = torch.tensor(HISTOGRAM_EDGES, dtype=torch.float64)
    counts = torch.bincount(torch.bucketize(values, edges), minlength=len(edges) + 1)
    return {
        "advantage_mean": float(values.mean()),
        "advantage_std": float(values.std(unbiased=False)),
        "advantage_histogram": counts.tolist(),
    }


def rollout_figures(sequences: list[Sequence], kept: list[Sequence]) -> dict[str, float]:
    """Return what a step's rollouts looked like.

    A sample is judged where it has a verdict, and scored where the method made a reward of it.

    Args:
        sequences: All samples of the step, those that a refill left out included.
        kept: Those that carry signal.

    Returns:
        samples, reward_mean, reward_std, accuracy, its split by level, share of groups without
        signal (equal rewards, of which the method keeps no sample), lengths of correct and
        incorrect completions, truncation share, unscored share, distinct completions and distinct
        answers a group. `groups_solved_…` are shares of groups by their own accuracy a: none (0),
        few (up to ¼), some (up to ¾), most (below 1), all (1).
    """
    scored = [s for s in sequences if s.reward is not None]
    if not scored:
        return {"samples": len(sequences), "unscored_share": 1.0, "signal_share": 0.0}
    judged = [s for s in sequences if s.correct is not None]
    rewards = [s.reward for s in scored if s.reward is not None]
    mean = sum(rewards) / len(rewards)
    figures: dict[str, float] = {
        "samples": len(sequences),
        "reward_mean": mean,
        "reward_std": math.sqrt(sum((r - mean) ** 2 for r in rewards) / len(rewards)),
        "signal_share": len(kept) / len(sequences),
        "unscored_share": 1.0 - len(scored) / len(sequences),
        "truncated_share": sum(s.finish_reason == "length" for s in sequences) / len(sequences),
        "completion_length": sum(len(s.completion) for s in sequences) / len(sequences),
    }
    if judged:
        figures["accuracy"] = sum(bool(s.correct) for s in judged) / len(judged)
    by_group: dict[int, list[Sequence]] = defaultdict(list)
    by_level: dict[str, list[Sequence]] = defaultdict(list)
    for sequence in scored:
        by_group[sequence.group].append(sequence)
    for sequence in judged:
        by_level[sequence.level].append(sequence)
    # Equal rewards may teach: their steps may differ, or the baseline be another than the group's.
    taught = {s.group for s in kept}
    silent = sum(
        number not in taught and len({s.reward for s in group}) == 1
        for number, group in by_group.items()
    )
    figures["zero_signal_share"] = silent / len(by_group)
    figures["distinct_completions"] = sum(
        len({s.text for s in group}) for group in by_group.values()
    ) / len(by_group)
    figures["distinct_answers"] = sum(
        len({s.answer for s in group if s.answer}) for group in by_group.values()
    ) / len(by_group)
    figures |= _solved(judged)
    for name, wanted in (("correct", True), ("incorrect", False)):
        lengths = [len(s.completion) for s in judged if s.correct is wanted]
        if lengths:
            figures[f"length_{name}"] = sum(lengths) / len(lengths)
    for level, members in sorted(by_level.items()):
        if level:
            figures[f"accuracy_level_{level}"] = sum(bool(s.correct) for s in members) / len(
                members
            )
    return figures


def _solved(judged: list[Sequence]) -> dict[str, float]:
    """Return the shares of groups by their own accuracy; nothing without verdicts."""
    groups: dict[int, list[bool]] = defaultdict(list)
    for sequence in judged:
        groups[sequence.group].append(bool(sequence.correct))
    counts = dict.fromkeys((name for name, _ in SOLVED), 0)
    for group in groups.values():
        accuracy = sum(group) / len(group)
        counts[next(name for name, upper in SOLVED if accuracy <= upper)] += 1
    return {f"groups_solved_{k}": n / len(groups) for k, n in counts.items() if groups}


def over_parts(parts: list[tuple[int, dict[str, Any]]]) -> dict[str, float]:
    """Return figures of a whole from those of its parts.

    Names that end in `_min` and `_max` are the extremes; all others are means, weighted by the
    parts' token counts.
    """
    values: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for count, figures in parts:
        for key, value in figures.items():
            values[key].append((count, float(value)))
    found: dict[str, float] = {}
    for key, pairs in values.items():
        if key.endswith("_min"):
            found[key] = min(value for _, value in pairs)
        elif key.endswith("_max"):
            found[key] = max(value for _, value in pairs)
        else:
            found[key] = sum(n * value for n, value in pairs) / sum(n for n, _ in pairs)
    return found
