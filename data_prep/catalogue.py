"""Every error that a user can act on: what was found, what is expected, what to do.

    python -m data_prep.catalogue            # all of them
    python -m data_prep.catalogue checkpoint # those with the word

Nothing is kept twice: the list is read from the places that raise the errors, so it is never out of
date. Parts that are filled in when an error is raised stand in braces, and alternatives between
bars. What `verifiers` raises is not here: it is a package of its own, without `UserError`.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from data_prep.arguments import Arguments
from data_prep.errors import UserError, command

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("prompts", "data_prep", "pipeline", "eval")
RAISED = ("UserError", "BadGold", "PromptError")
PARTS = ("where", "found", "expected", "fix")


class Entry(NamedTuple):
    """One error.

    Attributes:
        place: File and line that raise it.
        where: What it names as the place of the trouble.
        found: What was there.
        expected: What should be there.
        fix: What to do.
    """

    place: str
    where: str
    found: str
    expected: str
    fix: str

    def text(self) -> str:
        """Return the entry as it is printed, its origin last."""
        return (
            f"{self.where}: {self.found}\n  expected: {self.expected}\n"
            f"  what to do: {self.fix}\n  ({self.place})"
        )


def catalogue() -> Iterator[Entry]:
    """Yield every error of the packages, file by file."""
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            for node in ast.walk(tree):
                if isinstance(node, ast.Call) and _name(node.func) in RAISED:
                    yield _entry(node, f"{path.relative_to(ROOT)}:{node.lineno}")


def _name(function: ast.expr) -> str:
    return function.id if isinstance(function, ast.Name) else ""


def _entry(call: ast.Call, place: str) -> Entry:
    parts = dict.fromkeys(PARTS, "")
    parts |= {name: _text(value) for name, value in zip(PARTS, call.args, strict=False)}
    parts |= {k.arg: _text(k.value) for k in call.keywords if k.arg in PARTS}
    return Entry(place, **parts)


def _text(value: ast.expr) -> str:
    """Return an argument as a reader meets it."""
    if isinstance(value, ast.Constant):
        return str(value.value)
    if isinstance(value, ast.JoinedStr):
        return "".join(map(_text, value.values))
    if isinstance(value, ast.FormattedValue):
        return _text(value.value)
    if isinstance(value, ast.IfExp):
        return f"|{_text(value.body)}|{_text(value.orelse)}|"
    if isinstance(value, ast.BinOp) and isinstance(value.op, ast.Add):
        return _text(value.left) + _text(value.right)
    if isinstance(value, ast.Call):
        if _name(value.func) in ("str", "repr"):
            return _text(value.args[0])
        if isinstance(value.func, ast.Attribute) and value.func.attr in ("rstrip", "join"):
            return _text(value.args[0] if value.args else value.func.value)
    return f"{{{ast.unparse(value)}}}"


def main(arguments: list[str]) -> None:
    """Command line."""
    parser = Arguments("python -m data_prep.catalogue", __doc__)
    parser.add_argument("word", nargs="?", default="", help="only errors that hold it")
    known = parser.parse_args(arguments)
    found = [entry for entry in catalogue() if known.word.lower() in entry.text().lower()]
    if not found:
        raise UserError(
            "word", f"no error holds {known.word!r}", "a part of a message", "give another word"
        )
    print("\n\n".join(entry.text() for entry in found))


if __name__ == "__main__":
    command(main)
