"""A small file system, which can be filled and locked."""

from __future__ import annotations

import subprocess
from pathlib import Path


class Disk:
    """A small file system of its own, in memory; a plain folder where nothing can be mounted.

    Args:
        place: Where it is mounted.

    Attributes:
        why_not: Why nothing is mounted; empty where it is.
    """

    def __init__(self, place: Path) -> None:
        self.place = place.resolve()
        place.mkdir(parents=True, exist_ok=True)
        done = self._mount("-t", "tmpfs", "-o", "size=64m", "tmpfs", str(self.place))
        self.why_not = done.stderr.strip() if done.returncode else ""

    def change(self, options: str) -> None:
        """Mount it again with other options."""
        done = self._mount("-o", f"remount,{options}", str(self.place))
        if done.returncode:
            raise SystemExit(f"remount {options}: {done.stderr}")

    def _mount(self, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["mount", *words], capture_output=True, text=True, check=False)

    def close(self) -> None:
        """Take it away."""
        if not self.why_not:
            subprocess.run(["umount", str(self.place)], check=True)
