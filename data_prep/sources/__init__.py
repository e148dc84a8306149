"""Sources: raw rows in, problems out.

Contract of a plug-in file `data_prep/sources/<kind>.py`:

* `Config(SourceConfig)`: its settings; `files()` names the local files that it reads.
* `read(config, seed) -> Iterator[Problem]`: the problems, in a fixed order, each with a split;
  a row that cannot be read raises `UserError` naming file and line.
"""

from __future__ import annotations

from pathlib import Path

from data_prep.config import PluginConfig


class SourceConfig(PluginConfig):
    """What every source understands."""

    def files(self) -> dict[str, Path]:
        """Return the local files that the source reads, by a name of its own for each."""
        return {}
