"""JSON lines in and out: broken rows are named by file and line, writes are atomic."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import IO, Any

from .errors import UserError
from .files import Journal, writing

Row = dict[str, Any]
# What is longer is no row and no note, and would only fill the memory: the longest rows that are
# written here, rollouts of 32,000 tokens with their log-probs, have about 1 MB.
LONGEST_ROW = 64 << 20
LARGEST_DOCUMENT = 256 << 20


def read_rows(path: str | Path) -> Iterator[tuple[int, Row]]:
    """Yield (line number from 1, object) for every non-blank line.

    Raises:
        UserError: The file is missing or empty of rows, a line is too long, not UTF-8, not
            JSON, or not an object.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(str(path), "no such file", "a JSON lines file", "check the path")
    rows = 0
    with path.open("rb") as file:
        for number, raw in enumerate(lines_of(file, path), start=1):
            if not raw.strip():
                continue
            rows += 1
            yield number, parse_row(raw, f"{path}, line {number}")
    if not rows:
        raise UserError(str(path), "no rows", "at least one JSON object", "check the file")


def lines_of(file: IO[bytes], path: str | Path) -> Iterator[bytes]:
    """Yield a file's lines, the line feeds included.

    Raises:
        UserError: A line is longer than `LONGEST_ROW`.
    """
    for number, raw in enumerate(iter(partial(file.readline, LONGEST_ROW + 1), b""), start=1):
        if len(raw) > LONGEST_ROW:
            raise UserError(
                f"{path}, line {number}",
                f"a line of more than {LONGEST_ROW >> 20} MiB",
                "one JSON object a line",
                "check that the file is JSON lines and was not cut or joined",
            )
        yield raw


def parse_row(raw: bytes, where: str) -> Row:
    """Parse one line; `where` names it in errors."""
    try:
        # Some editors put a byte order mark before the first line.
        row = json.loads(raw.removeprefix(codecs.BOM_UTF8).decode("utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(
            where, f"invalid UTF-8 at byte {error.start}", "UTF-8 text", "re-encode the file"
        ) from None
    except json.JSONDecodeError as error:
        raise UserError(
            where,
            f"not JSON: {error.msg} at column {error.colno}",
            "one JSON object a line",
            "mend or remove the line",
        ) from None
    except (RecursionError, ValueError) as error:  # nested too deep; a number of too many digits
        raise UserError(
            where,
            f"JSON that cannot be read: {error}",
            "one JSON object a line",
            "mend or remove the line",
        ) from None
    if not isinstance(row, dict):
        raise UserError(where, f"a JSON {type(row).__name__}", "a JSON object", "mend the line")
    if b"\\ud" in raw or b"\\uD" in raw:
        # Half of a surrogate pair is a str in Python, but no text: nothing could encode it.
        try:
            json.dumps(row, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError as error:
            raise UserError(
                where,
                f"half of a surrogate pair, {error.object[error.start]!r}",
                "text",
                "mend or remove the line",
            ) from None
    return row


def column(row: Row, name: str, kind: type | tuple[type, ...], where: str) -> Any:
    """Return `row[name]`, checked to be there and of the kind.

    Raises:
        UserError: The column is missing or has another type.
    """
    if name not in row:
        raise UserError(
            where,
            f"no column {name!r}; found {', '.join(map(repr, row)) or 'nothing'}",
            f"a column {name!r}",
            "check that the file is of the format that this source reads",
        )
    value = row[name]
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        names = [k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,))]
        raise UserError(
            where,
            f"column {name!r} is {type(value).__name__} ({value!r:.80})",
            " or ".join(names),
            "mend the row",
        )
    return value


def dump_row(row: Any) -> str:
    """Return one compact JSON line, newline included, the same bytes for the same row."""
    return json.dumps(row, ensure_ascii=False, separators=(",", ":"), allow_nan=False) + "\n"


def write_rows(path: str | Path, rows: Iterable[Any], journal: Journal | None = None) -> int:
    """Write rows to a temporary name, sync, rename; return their number.

    Args:
        path: The file.
        rows: JSON values.
        journal: Keeps the hash of what was written.
    """
    count = 0
    place = writing(path) if journal is None else journal.writing(Path(path))
    with place as temporary, temporary.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(dump_row(row))
            count += 1
    return count


def write_json(path: str | Path, value: Any) -> None:
    """Write one JSON document, readable, atomically."""
    with writing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        json.dump(value, file, ensure_ascii=False, indent=2, allow_nan=False)
        file.write("\n")


def script_json(value: Any) -> str:
    """Return JSON that may stand in a script element: no "<" can end the element or open one."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def read_json(path: str | Path, most: int = LARGEST_DOCUMENT) -> Any:
    """Read one JSON document.

    Args:
        path: The file.
        most: Largest file that is read, bytes.

    Raises:
        UserError: The file is missing, too large or not JSON.
    """
    path = Path(path)
    try:
        if (size := path.stat().st_size) > most:
            raise UserError(
                str(path),
                f"{size >> 20} MiB",
                f"a JSON document of at most {most >> 20} MiB",
                "check that it is the file that was meant; rows belong into a .jsonl file",
            )
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise UserError(str(path), "no such file", "a JSON file", "check the path") from None
    except UnicodeDecodeError as error:
        raise UserError(
            str(path), f"invalid UTF-8 at byte {error.start}", "a JSON document", "mend it"
        ) from None
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path}, line {error.lineno}", f"not JSON: {error.msg}", "a JSON document", "mend it"
        ) from None
    except (ValueError, RecursionError) as error:  # no UTF-8, too many digits, nested too deep
        raise UserError(
            str(path), f"JSON that cannot be read: {error}", "a JSON document", "mend it"
        ) from None
