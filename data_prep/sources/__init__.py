"""Sources: raw rows in, problems out.

Contract of a plug-in file `data_prep/sources/<kind>.py`:

* `Config(SourceConfig)`: its settings.
* `read(config, seed) -> Iterator[Problem]`: the problems, in a fixed order, each with a split;
  a row that cannot be read raises `UserError` naming file and line.
"""

from __future__ import annotations

from data_prep.config import PluginConfig


class SourceConfig(PluginConfig):
    """What every source understands."""
