"""Errors that a user can act on, and the one place that prints them.

Everything a user can get wrong (a missing file, a broken row, an unknown key) raises
`UserError`; entry points run under `command`, which prints it without a traceback.
"""

from __future__ import annotations

import difflib
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import NoReturn

from prompts import PromptError
from verifiers.plain import plain


class UserError(Exception):
    """Something the user can mend.

    Args:
        where: File, with line or key where there is one ("train.jsonl, line 7").
        found: What was there.
        expected: What should be there.
        fix: What to do about it.
    """

    def __init__(self, where: str, found: str, expected: str = "", fix: str = "") -> None:
        """Join the four parts into one message."""
        self.where, self.found, self.expected, self.fix = where, found, expected, fix
        parts = [f"{where}: {found}"]
        if expected:
            parts.append(f"expected: {expected}")
        if fix:
            parts.append(f"what to do: {fix}")
        super().__init__("\n  ".join(parts))

    def __reduce__(self) -> tuple[type[UserError], tuple[str, str, str, str]]:
        """Pickle by the four parts, so that an error comes back whole from a worker process."""
        return type(self), (self.where, self.found, self.expected, self.fix)


def from_prompts(key: str, error: PromptError) -> UserError:
    """Return the error of a profile or layout that a configuration's key names."""
    return UserError(f"{key}, {error.where}", error.found, error.expected, error.fix)


def nearest(word: str, choices: Iterable[str]) -> str:
    """Return "did you mean …?" for the closest choice, or an empty string."""
    close = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else ""


def command(main: Callable[[list[str]], None]) -> NoReturn:
    """Run an entry point: user errors become a message and exit status 2.

    `--debug` anywhere on the command line shows the full traceback instead.
    """
    signal.signal(signal.SIGTERM, _interrupt)
    sys.excepthook = _show_traceback
    arguments = sys.argv[1:]
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    try:
        main(arguments)
    except UserError as error:
        if debug:
            raise
        print(f"error: {plain(error)}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        if debug:
            raise
        print(
            "\ninterrupted: what was complete is kept; the same command goes on from there",
            file=sys.stderr,
        )
        raise SystemExit(130) from None
    except BrokenPipeError:
        # The reader of our output went away (`… | head`); not an error of ours.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(0) from None
    except OSError as error:
        # A full disk, a missing permission, a file where a folder should be.
        if debug:
            raise
        where = error.filename or "the operating system"
        found = f"error: {where}: {error.strerror or error}"
        print(
            f"{plain(found)}\n  what to do: mend it; what was complete is kept, and the same "
            "command goes on from there",
            file=sys.stderr,
        )
        raise SystemExit(2) from None
    raise SystemExit(0)


def _interrupt(number: int, frame: object) -> NoReturn:
    """End on SIGTERM as on Ctrl-C: clean up, and say how to go on."""
    raise KeyboardInterrupt


def _show_traceback(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """Print a traceback whose message, which may quote data, cannot steer the terminal."""
    print(plain("".join(traceback.format_exception(kind, error, trace))), end="", file=sys.stderr)
