"""Curves in TensorBoard and Weights & Biases, through accelerate's trackers.

`steps.jsonl` and `timing.jsonl` stay the record; a tracker shows a copy of them, outside the
stage's folder, since no two runs of a tracker write the same bytes:

    tensorboard --logdir runs/cpu/tracking/tensorboard
    wandb sync runs/cpu/tracking/wandb/grpo/wandb/offline-run-*        # wandb = "offline"

When a stage begins, or goes on after a kill, what lies there is dropped and written anew from the
rows that are kept, so that no point is doubled and none is missing. A W&B run that is online goes
on under its own id instead; the service takes no step twice.
"""

from __future__ import annotations

import importlib
import json
import shutil
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from data_prep.errors import UserError
from data_prep.jsonl import read_json, write_json

Kind = Literal["tensorboard", "wandb"]
Row = Mapping[str, Any]
HISTOGRAM = "advantage_histogram"


class Trackers:
    """Shows the rows of a stage.

    Args:
        kinds: Which trackers; none does nothing.
        wandb: Whether W&B uploads ("online") or keeps its files here ("offline").
        out: The run folder.
        run: Name of the run; W&B's project.
        stage: Name of the stage.
        settings: The stage's configuration, shown beside the curves.
        where: Names the stage in errors.

    Raises:
        UserError: A package is missing.
    """

    def __init__(
        self,
        kinds: Iterable[Kind],
        wandb: Literal["offline", "online"],
        out: Path,
        run: str,
        stage: str,
        settings: Mapping[str, Any],
        where: str = "trackers",
    ) -> None:
        """Find the packages; nothing is written yet."""
        self.kinds: tuple[Kind, ...] = tuple(dict.fromkeys(kinds))
        self.mode, self.out, self.run, self.stage = wandb, out / "tracking", run, stage
        self.settings, self.where = settings, where
        self._trackers: list[Any] = []
        for kind in self.kinds:
            _import(kind, where)

    def begin(self, kept: Iterable[Row]) -> None:
        """Start, and show the rows that an interrupted process left.

        Args:
            kept: In order of their steps.

        Raises:
            UserError: W&B cannot begin.
        """
        rows = list(kept)
        for kind in self.kinds:
            folder = self.out / kind
            if kind == "tensorboard":
                self._trackers.append(self._tensorboard(folder))
            else:
                self._trackers.append(self._wandb(folder / self.stage, bool(rows)))
            if kind == "tensorboard" or self.mode == "offline":
                for row in rows:
                    _show(self._trackers[-1], row)

    def write(self, row: Row) -> None:
        """Show a step's row: its numbers as curves, its advantages as a histogram.

        Args:
            row: With "step"; null and what else is no number is left out.
        """
        for tracker in self._trackers:
            _show(tracker, row)

    def close(self) -> None:
        """Write what is left and end."""
        while self._trackers:
            self._trackers.pop().finish()

    def _tensorboard(self, folder: Path) -> Any:
        from accelerate.tracking import TensorBoardTracker

        shutil.rmtree(folder / self.stage, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        tracker = TensorBoardTracker(self.stage, str(folder))
        tracker.start()
        text = json.dumps(self.settings, indent=2, ensure_ascii=False)
        tracker.tracker.add_text("configuration", f"```json\n{text}\n```")
        return tracker

    def _wandb(self, folder: Path, goes_on: bool) -> Any:
        from accelerate.tracking import WandBTracker

        wandb = _import("wandb", self.where)
        note = folder / "run.json"
        online = self.mode == "online"
        name = read_json(note)["id"] if online and goes_on and note.is_file() else uuid.uuid4().hex
        if not online:
            shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(note, {"id": name})
        tracker = WandBTracker(
            self.run,
            name=self.stage,
            id=name,
            dir=str(folder),
            mode=self.mode,
            resume="allow" if online else None,
            settings=wandb.Settings(silent=True, console="off"),
        )
        try:
            tracker.start()
        except wandb.Error as error:
            raise UserError(
                f"{self.where}, key 'wandb'",
                f"Weights & Biases cannot begin: {error}",
                "a login and a connection",
                'run `wandb login`, or set wandb = "offline"',
            ) from None
        tracker.store_init_configuration(dict(self.settings))
        return tracker


def _show(tracker: Any, row: Row) -> None:
    from pipeline.records import HISTOGRAM_EDGES

    step = int(row["step"])
    shown: dict[str, Any] = {
        key: value
        for key, value in row.items()
        if key != "step" and isinstance(value, int | float) and not isinstance(value, bool)
    }
    counts = [int(count) for count in row.get(HISTOGRAM) or ()]
    # The outer bins have no end; a histogram must have one.
    edges = [2 * HISTOGRAM_EDGES[0], *HISTOGRAM_EDGES, 2 * HISTOGRAM_EDGES[-1]]
    if counts and tracker.name == "wandb":
        shown[HISTOGRAM] = importlib.import_module("wandb").Histogram(np_histogram=(counts, edges))
    tracker.log(shown, step=step)
    if counts and tracker.name == "tensorboard":
        count = sum(counts)
        mean, spread = row["advantage_mean"], row["advantage_std"]
        tracker.tracker.add_histogram_raw(
            HISTOGRAM,
            min=edges[0],
            max=edges[-1],
            num=count,
            sum=count * mean,
            sum_squares=count * (spread**2 + mean**2),
            bucket_limits=edges[1:],
            bucket_counts=counts,
            global_step=step,
        )


def _import(kind: Kind, where: str) -> Any:
    try:
        return importlib.import_module(kind)
    except ImportError as error:
        raise UserError(
            f"{where}, key 'trackers'",
            f"{kind} cannot be imported: {error}",
            f"the package {kind}",
            "pip install -e '.[trackers]', or remove it; steps.jsonl is written in any case",
        ) from None
