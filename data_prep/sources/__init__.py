"""Sources: raw rows in, problems out.

Contract of a plug-in file `data_prep/sources/<kind>.py`:

* `Config(SourceConfig)`: its settings; `files()` names the local files that it reads.
* either `read(config, seed) -> Iterator[Item]`: problems, chats, preference pairs or labelled
  steps, in a fixed order, each with a split;
* or, in a source that reads files (its `Config` is a `FilesConfig`), `convert(row, place) ->
  Item`: one raw row to one item, a pure function, so that files can be read in parallel and a bad
  row never shifts another; see `data_prep.reading`. `HUB` and `SPLITS` say which data set and
  splits "hub" stands for, `CONFIGURATIONS` which pieces it comes in, if it does.
"""

from __future__ import annotations

from pathlib import Path

from data_prep.config import PluginConfig


class SourceConfig(PluginConfig):
    """What every source understands."""

    def files(self) -> dict[str, Path]:
        """Return the local files that the source reads, by a name of its own for each."""
        return {}
