"""Raw rows of files and hub data sets, and what becomes of a row that cannot be used.

A source that reads files has `convert(row, place) -> Item`, a pure function of one row. It
raises `UserError` for a malformed row, `BadGold` where the gold answer is missing, and `Drop`
for a row that is as published but of no use here. What each of these means for the build is
decided by its policies, in one place, never by the source.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

from data_prep.errors import UserError
from data_prep.jsonl import Row, parse_row
from data_prep.plugins import load_plugin
from data_prep.schema import Item, Split

if TYPE_CHECKING:
    from data_prep.sources._files import FilesConfig

LINES = (".jsonl", ".ndjson")
TABLES = {".parquet": "parquet", ".arrow": "arrow", ".csv": "csv"}


class Drop(Exception):
    """A row of no use here, with the named reason that it is counted under."""


class BadGold(UserError):
    """A row without a gold answer that could be found."""


class Place(NamedTuple):
    """Where a row comes from.

    Attributes:
        source: Name of the source's file.
        split: The split that the configuration reads the row for.
        path: File, or hub id with configuration and split.
        line: Line in a JSON lines file, else row; from 1.
        number: Number of the row among the rows of its split, from 0; blank lines do not count.
    """

    source: str
    split: Split
    path: str
    line: int
    number: int

    def __str__(self) -> str:
        """Return "file, line n", as error messages name it."""
        unit = "line" if self.path.endswith(LINES) else "row"
        return f"{self.path}, {unit} {self.line}"

    @property
    def id(self) -> str:
        """An id that is unique in a run and the same from build to build."""
        return f"{self.source}-{self.split}-{self.number:06d}"


@dataclass(frozen=True, slots=True)
class Rejected:
    """A row that did not become an item.

    Attributes:
        place: Where it stands.
        reason: "bad_row", "bad_gold", or the named reason of a `Drop`.
        error: What to tell the user; None for a `Drop`.
    """

    place: Place
    reason: str
    error: UserError | None = None


def convert(module: ModuleType, place: Place, raw: bytes | Row) -> Item | Rejected:
    """Return the item of one raw row, or why there is none."""
    try:
        row = parse_row(raw, str(place)) if isinstance(raw, bytes) else raw
        return module.convert(row, place)
    except Drop as drop:
        return Rejected(place, str(drop))
    except BadGold as error:
        return Rejected(place, "bad_gold", error)
    except UserError as error:
        return Rejected(place, "bad_row", error)


def items(config: FilesConfig) -> Iterator[Item | Rejected]:
    """Yield an item or a rejection for every row of a source's files, in their order."""
    module = load_plugin("data_prep.sources", config.kind)
    for split, path in config.paths().items():
        found = False
        for place, raw in raw_rows(Path(config.kind).stem, split, path):
            found = True
            yield convert(module, place, raw)
        if not found:
            place = Place(Path(config.kind).stem, split, str(path), 0, 0)
            yield Rejected(place, "bad_row", _empty(path))


def strictly(found: Iterable[Item | Rejected]) -> Iterator[Item]:
    """Yield the items; raise at the first malformed row, pass over those of no use.

    Raises:
        UserError: A row is malformed or has no gold.
    """
    for item in found:
        if not isinstance(item, Rejected):
            yield item
        elif item.error is not None:
            raise item.error


def raw_rows(source: str, split: Split, path: Path) -> Iterator[tuple[Place, bytes | Row]]:
    """Yield the raw rows of a local file: bytes of a JSON line, or a row of a table.

    Raises:
        UserError: The file is missing or of a kind that cannot be read.
    """
    if not path.is_file():
        raise UserError(str(path), "no such file", "a data file", "check the path")
    if path.suffix in LINES:
        yield from _lines(source, split, path)
        return
    for index, row in enumerate(_table(path)):
        yield Place(source, split, str(path), index + 1, index), row


def _lines(source: str, split: Split, path: Path) -> Iterator[tuple[Place, bytes]]:
    index = 0
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            if raw.strip():
                yield Place(source, split, str(path), number, index), raw
                index += 1


def _table(path: Path) -> Iterable[Any]:
    if path.suffix == ".json":
        try:
            rows = json.loads(path.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise UserError(str(path), f"not JSON: {error}", "a JSON array of rows",
                            "mend the file; JSON lines belong into a .jsonl file") from None
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise UserError(str(path), f"a JSON {type(rows).__name__}",
                            "a JSON array of objects", "check the file")
        return rows
    if path.suffix not in TABLES:
        raise UserError(
            str(path), f"a file that ends in {path.suffix!r}",
            f"one of {', '.join([*LINES, '.json', *TABLES])}", "convert or rename the file",
        )
    from datasets import Dataset

    reader = {"parquet": Dataset.from_parquet, "arrow": Dataset.from_file,
              "csv": Dataset.from_csv}[TABLES[path.suffix]]
    return reader(str(path))  # type: ignore[operator]


def _empty(path: Path) -> UserError:
    return UserError(str(path), "no rows", "at least one row", "check the file")
