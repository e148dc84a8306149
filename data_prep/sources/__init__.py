"""Sources: raw rows in, problems out.

Contract of a plug-in file `data_prep/sources/<kind>.py`:

* `Config(SourceConfig)`: its settings; `files()` names the local files that it reads.
* `read(config, seed) -> Iterator[Item]`: problems, chats, preference pairs or labelled steps, in
  a fixed order, each with a split; a row that cannot be read raises `UserError` naming file and
  line.
* `convert(row, place) -> Item`, in sources that read files (their `Config` is a `FilesConfig`):
  one raw row to one item, a pure function, so that files can be read in parallel and a bad row
  never shifts another; see `data_prep.reading`.
"""

from __future__ import annotations

from pathlib import Path

from data_prep.config import PluginConfig


class SourceConfig(PluginConfig):
    """What every source understands."""

    def files(self) -> dict[str, Path]:
        """Return the local files that the source reads, by a name of its own for each."""
        return {}
