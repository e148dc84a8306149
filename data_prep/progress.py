"""Progress: a bar on a terminal, whole lines in a log.

A bar rewrites its line ten times a second, by carriage returns. In a file each of them stays: a
stage of two minutes left hundreds of kilobytes there. So where the standard error is no terminal
(a file, a pipe, `nohup`, CI) the same figures come as one line every half minute, and a last one
at the end, also after less. (pip and huggingface_hub show nothing there.)
"""

from __future__ import annotations

import sys
import time
from typing import Any

from tqdm import tqdm

# Seconds between two lines of a log.
EVERY_S = 30.0


def progress(
    label: str, unit: str, total: int | None = None, done: int = 0, *, hidden: bool = False
) -> tqdm[Any]:
    """Return a counter that shows how far the work is; close it, or use it in a `with`.

    Args:
        label: What is done.
        unit: What is counted.
        total: How many there are; None where that is not known before.
        done: How many were done before.
        hidden: Whether nothing is shown.
    """
    kind = tqdm if sys.stderr.isatty() else _Lines
    return kind(total=total, initial=done, desc=label, unit=unit, disable=hidden, file=sys.stderr)


class _Lines(tqdm):
    """The figures of a bar as lines that stay."""

    # No thread that looks after bars which are not redrawn.
    monitor_interval = 0

    def __init__(self, **settings: Any) -> None:
        self._due = time.monotonic() + EVERY_S
        # Without columns there is no bar; each update asks, and `display` decides.
        super().__init__(**settings, ncols=0, mininterval=0, miniters=1, leave=False)

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Print a line if one is due; `msg` would clear a bar, and there is none."""
        del pos
        if msg is None and time.monotonic() >= self._due:
            self._due = time.monotonic() + EVERY_S
            self._print()

    def clear(self, nolock: bool = False) -> None:
        """Leave the lines: nothing stands in the way of what others print."""

    def close(self) -> None:
        """Print the last line, with the rate of the whole, once."""
        if not self.disable:
            self._ema_dt = lambda: None
            self._print()
        super().close()

    def _print(self) -> None:
        self.fp.write(f"{self}\n")
        self.fp.flush()
