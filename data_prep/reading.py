"""Raw rows of files and hub data sets, and what becomes of a row that cannot be used.

A source that reads files has `convert(row, place) -> Item`, a pure function of one row. It
raises `UserError` for a malformed row, `BadGold` where the gold answer is missing, and `Drop`
for a row that is as published but of no use here. What each of these means for the build is
decided by its policies, in one place, never by the source.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

from data_prep.errors import UserError
from data_prep.jsonl import Row, lines_of, parse_row, read_json
from data_prep.plugins import load_plugin
from data_prep.schema import Item, Split

if TYPE_CHECKING:
    from data_prep.sources._files import FilesConfig

LINES = (".jsonl", ".ndjson")
# Bytes of a JSON array, which is read whole; published sets have up to 400 MB.
LARGEST_ARRAY = 2 << 30
TABLES = {".parquet": "parquet", ".arrow": "arrow", ".csv": "csv"}


def no_such_file(where: str, split: str, path: Path, module: ModuleType) -> UserError:
    """Return the error of a source's file that is not there.

    Args:
        where: The place that names it.
        split: Its key there.
        path: As it is named.
        module: The source's plug-in, which may know the data set on the hub.
    """
    hub = getattr(module, "HUB", "") if split in getattr(module, "SPLITS", ()) else ""
    return UserError(
        f"{where}, key {split!r}",
        f"no such file: {path}",
        "a file of JSON lines, JSON, Parquet, Arrow or CSV",
        "check the path" + (f', or write "hub" to fetch {hub}' if hub else ""),
    )


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
        number: Number of the row (line of a JSON lines file) from 0; part of its id.
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
        if not raw:
            raise UserError(place.path, "no rows", "at least one row", "check the file")
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
    for stretch in stretches(config, rows=0):
        for place, raw in read_stretch(stretch):
            yield convert(module, place, raw)


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


class Stretch(NamedTuple):
    """Consecutive rows of one file or data set: what one worker reads at a time.

    Attributes:
        kind: The source's kind.
        split: The split that the configuration reads them for.
        path: File, or "hub:<id>:<split>".
        first: Number of the first row (line of a JSON lines file) from 0.
        rows: How many rows (lines).
        offset: Byte where a JSON lines file's first row starts.
        before: Rows in the pieces of the data set that come before this file.
    """

    kind: str
    split: Split
    path: str
    first: int
    rows: int
    offset: int = 0
    before: int = 0


def stretches(config: FilesConfig, rows: int) -> Iterator[Stretch]:
    """Yield the stretches of a source's files, in their order.

    Args:
        config: The source's configuration.
        rows: Rows a stretch; 0 makes one of each file.

    Raises:
        UserError: A file is missing or of a kind that cannot be read.
    """
    for split, given in config.paths().items():
        before = 0
        pieces = _hub_paths(config.kind, split) if given == "hub" else [given]
        for path in pieces:
            if not path.startswith("hub:") and not Path(path).is_file():
                raise UserError(path, "no such file", "a data file", "check the path")
            whole = Stretch(config.kind, split, path, 0, -1, before=before)
            if not rows:
                yield whole
            elif path.endswith(LINES):
                yield from _line_stretches(whole, rows)
            else:
                total = len(_table(path))
                for first in range(0, max(total, 1), rows):
                    yield whole._replace(first=first, rows=min(rows, total - first))
            if len(pieces) > 1:
                before += len(_table(path))


def read_stretch(stretch: Stretch) -> Iterator[tuple[Place, bytes | Row]]:
    """Yield the raw rows of a stretch: bytes of a JSON line, or a row of a table.

    A file without a single row yields one that `convert` rejects as a bad row.

    Raises:
        UserError: The file cannot be read at all.
    """
    found = False
    source = Path(stretch.kind).stem
    for number, raw in _raw(stretch):
        found = True
        yield Place(source, stretch.split, stretch.path, number + 1, stretch.before + number), raw
    if not found and stretch.first == 0:
        yield Place(source, stretch.split, stretch.path, 0, stretch.before), b""


def _raw(stretch: Stretch) -> Iterator[tuple[int, bytes | Row]]:
    stop = stretch.rows if stretch.rows >= 0 else None
    if not stretch.path.endswith(LINES):
        table = _table(stretch.path)
        last = len(table) if stop is None else stretch.first + stop
        for number in range(stretch.first, last):
            yield number, table[number]
        return
    with Path(stretch.path).open("rb") as file:
        file.seek(stretch.offset)
        lines = islice(lines_of(file, stretch.path), stop)
        for number, raw in enumerate(lines, start=stretch.first):
            if raw.strip():
                yield number, raw


def _line_stretches(whole: Stretch, rows: int) -> Iterator[Stretch]:
    first, offset, position, count = 0, 0, 0, 0
    with Path(whole.path).open("rb") as file:
        for raw in lines_of(file, whole.path):
            position += len(raw)
            count += 1
            if count == rows:
                yield whole._replace(first=first, rows=count, offset=offset)
                first, offset, count = first + count, position, 0
    if count or not first:
        yield whole._replace(first=first, rows=count, offset=offset)


def _hub_paths(kind: str, split: Split) -> list[str]:
    """Return "hub:<id>[/<configuration>]:<split>" of each piece of a source's own data set."""
    module = load_plugin("data_prep.sources", kind)
    hub, splits = getattr(module, "HUB", ""), getattr(module, "SPLITS", {})
    if split not in splits:
        raise UserError(
            f"data.sources, kind {kind!r}, key {split!r}",
            "'hub' has no such split",
            f"one of {', '.join(splits)}" if splits else "a source with a data set on the hub",
            "name one: hub:<id>[/<configuration>]:<split>, or a local file",
        )
    pieces = getattr(module, "CONFIGURATIONS", ())
    names = [f"{hub}/{piece}" for piece in pieces] or [hub]
    return [f"hub:{name}:{splits[split]}" for name in names]


@lru_cache(maxsize=4)
def _table(path: str) -> Any:
    """Open what is not JSON lines: something with a length whose items are rows."""
    if path.startswith("hub:"):
        return _from_hub(path)
    file = Path(path)
    if file.suffix == ".json":
        try:
            rows = read_json(file, LARGEST_ARRAY)
        except UserError as error:
            raise UserError(
                error.where,
                error.found,
                "a JSON array of rows",
                "mend the file; JSON lines belong into a .jsonl file",
            ) from None
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise UserError(
                path, f"a JSON {type(rows).__name__}", "a JSON array of objects", "check the file"
            )
        return rows
    if file.suffix not in TABLES:
        raise UserError(
            path,
            f"a file that ends in {file.suffix!r}",
            f"one of {', '.join([*LINES, '.json', *TABLES])}",
            "convert or rename the file",
        )
    return _load(path, TABLES[file.suffix], None, "train", data_files=path)


def _from_hub(path: str) -> Any:
    """Open "hub:<id>[/<configuration>]:<split>"; the id may be a local folder."""
    _, _, rest = path.partition(":")
    identity, _, split = rest.rpartition(":")
    if not identity or not split:
        raise UserError(path, "no data set and split", "hub:<id>:<split>", "mend the path")
    name = None
    if not Path(identity).is_dir() and identity.count("/") == 2:
        identity, _, name = identity.rpartition("/")
    return _load(path, identity, name, split)


def _load(path: str, identity: str, name: str | None, split: str, **more: Any) -> Any:
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError

    try:
        return load_dataset(identity, name, split=split, **more)
    except (OSError, ValueError, DatasetGenerationError) as error:
        # The cause tells more than datasets' own "an error occurred".
        reason = str(error.__cause__ or error).strip().splitlines()[0]
        raise UserError(
            path,
            f"datasets cannot open it: {reason}",
            "a data set with this split",
            "check id, configuration and split; without a network give this source a local file "
            '(train = "rows.parquet") or a downloaded folder (train = "hub:./folder:train")',
        ) from None
