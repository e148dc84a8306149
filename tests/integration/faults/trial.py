"""A run that nothing disturbed, and attempts at another one."""

from __future__ import annotations

import json
import random
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from faults.attempt import Attempt
from faults.disk import Disk
from faults.recorded_run import contents, copy, differences, write_config


class Trial:
    """A run that was not disturbed, and what others are compared with.

    Args:
        folder: Everything goes here; the run itself to a small disk in it, where there is one.
        seed: Of the run, and of every choice.
        part: (i, n): which of n shares of the kinds of damage are looked at.
    """

    def __init__(self, folder: Path, seed: int, part: tuple[int, int] = (0, 1)) -> None:
        self.folder, self.seed, self.part = folder.resolve(), seed, part
        self.folder.mkdir(parents=True, exist_ok=True)
        self.disk = Disk(self.folder / "disk")
        self.out, self.whole = self.disk.place / "run", self.folder / "whole"
        self.config = write_config(self.folder, self.out, seed)
        began = time.monotonic()
        attempt = Attempt(self.config, self.folder / "whole.log")
        status = attempt.finish()
        if status:
            raise SystemExit(f"the undisturbed run ended with {status}:\n{attempt.said[-4000:]}")
        self.seconds = time.monotonic() - began
        self.expected = contents(self.out)
        self.sizes = [p.stat().st_size for p in self.out.rglob("*") if p.is_file()]
        self.stages: dict[str, dict[str, float]] = {}
        for this, after in zip(attempt.stages, attempt.stages[1:], strict=False):
            self.stages[this["stage"]] = {
                "events": after["seen"] - this["seen"],
                "seconds": after["time"] - this["time"],
            }
        copy(self.out, self.whole)
        self.clear()
        self.tell(undisturbed_s=round(self.seconds, 1), files=len(self.expected))

    def tell(self, **found: Any) -> None:
        """Say what has just happened, for those who watch."""
        line = json.dumps({"at": time.strftime("%H:%M:%S", time.gmtime()), **found})
        print(line, file=sys.stderr, flush=True)

    def rng(self) -> random.Random:
        """Return random numbers, the same for each fault whatever came before."""
        return random.Random(self.seed)

    def clear(self) -> None:
        """Empty the run folder."""
        for path in self.out.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def attempt(self, number: int, **options: Any) -> Attempt:
        """Start the next attempt."""
        return Attempt(self.config, self.folder / f"attempt-{number:03d}.log", **options)

    def complete(self) -> None:
        """Let the run go on to its end."""
        last = self.attempt(999)
        if status := last.finish():
            raise SystemExit(f"the last run ended with {status}\n{last.said[-4000:]}")

    def result(self, **found: Any) -> dict[str, Any]:
        """Compare what is left with what was expected, and clear up."""
        wrong = differences(self.expected, contents(self.out))
        self.tell(compared=len(self.expected), differences=wrong)
        self.clear()
        return {"files": len(self.expected), "differences": wrong, **found}
