"""The command line of every entry point: argparse whose complaints are `UserError`s.

What is wrong is said as everywhere else (what was found, what was expected, what to do), with the
nearest known option, and the full list stays where it belongs, in `--help`.
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from data_prep.errors import UserError, nearest

COMMAND_LINE = "command line"
# What follows the options of a stage.
KEYS = "Any key of {} can be overridden, such as {}; --dry-run shows all of them."


class Arguments(argparse.ArgumentParser):
    """A parser of one entry point.

    Options are spelled in full, since a stage's other words are overrides of its table.

    Args:
        program: How it is called, such as "python -m pipeline.run".
        description: For `--help`, laid out as it stands; usually the module's docstring.
        epilog: What follows the list of options.
    """

    # What else a user may mean by an option that is none.
    also = ""

    def __init__(self, program: str, description: str | None, epilog: str | None = None) -> None:
        """Begin with the options that all have: `--help` and `--debug`."""
        super().__init__(
            program,
            description=description,
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        # `data_prep.errors.command` takes it out before this parser looks.
        self.add_argument("--debug", action="store_true", help="show errors with their traceback")

    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> argparse.Namespace:
        """Parse; refuse what is not known.

        Raises:
            UserError: An option is unknown or missing, or its value is wrong.
        """
        known, rest = self.parse_known_args(args, namespace)
        if rest:
            raise unknown_argument(rest[0], self.options(), self.also)
        return known

    def options(self) -> list[str]:
        """Return every option, as it is typed."""
        return [name for action in self._actions for name in action.option_strings]

    def error(self, message: str) -> NoReturn:
        """Say what argparse complains about.

        Raises:
            UserError: Always.
        """
        fix = f"mend the command; {self.prog} --help lists everything"
        missing = "the following arguments are required: "
        if message.startswith(missing):
            names = message.removeprefix(missing)
            raise UserError(COMMAND_LINE, f"no {names}", f"a value for {names}", fix)
        match = re.fullmatch(r"argument ([^:]+): (.*)", message, re.DOTALL)
        if match is None:
            raise UserError(COMMAND_LINE, message, "a command as --help shows it", fix)
        option, found = match.groups()
        action = next(
            (a for a in self._actions if option.split("/")[0] in (*a.option_strings, a.dest)), None
        )
        expected = "" if action is None or not action.help else action.help
        if action is not None and action.choices:
            expected = f"one of {', '.join(map(str, action.choices))}"
            wrong = re.search(r"invalid choice: '([^']*)'", found)
            if wrong:
                hint = nearest(wrong[1], map(str, action.choices))
                found = f"unknown value {wrong[1]!r} {hint}".rstrip()
        raise UserError(
            f"{COMMAND_LINE}, {option}", found, expected or "a command as --help shows it", fix
        )


def unknown_argument(word: str, known: Sequence[str], also: str = "") -> UserError:
    """Return the error for a word that is no option.

    Args:
        word: As it was typed.
        known: Every option that there is.
        also: What else may stand there.
    """
    name = word.partition("=")[0]
    hint = nearest(name, known) if name.startswith("-") else ""
    shown = [option for option in known if option.startswith("--")]
    return UserError(
        COMMAND_LINE,
        f"unknown argument {word!r} {hint}".rstrip(),
        f"one of {', '.join(shown)}{f'; {also}' if also else ''}",
        "mend or remove it",
    )


def at_least(least: int) -> Callable[[str], int]:
    """Return the type of an option that takes a whole number from `least` on."""

    def number(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number") from None
        if value < least:
            raise argparse.ArgumentTypeError(f"{value} is below {least}")
        return value

    return number


def whole_numbers(words: Sequence[str], option: str) -> list[int]:
    """Return the numbers of an option that takes several: "1 2 4" and "1,2,4" are the same.

    Args:
        words: As they were typed.
        option: Its name, for the error.

    Raises:
        UserError: One is no whole number.
    """
    found = " ".join(words)
    try:
        return [int(part) for word in words for part in word.split(",")]
    except ValueError:
        raise UserError(
            f"{COMMAND_LINE}, {option}", repr(found), "numbers such as 1 2 4 8", "mend it"
        ) from None


def above_zero(text: str) -> float:
    """Return the number of an option that takes one above 0."""
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number") from None
    if not 0.0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a finite number above 0")
    return value


def writable_file(text: str) -> Path:
    """Return the path of a file to write, refused now where writing would fail at the end."""
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is a folder; name a file")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"no folder {str(path.parent)!r}; make it first")
    return path
