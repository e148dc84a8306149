"""Errors that a user can act on, and the one place that prints them.

Everything a user can get wrong (a missing file, a broken row, an unknown key) raises
`UserError`; entry points run under `command`, which prints it without a traceback.
"""

from __future__ import annotations

import difflib
import errno
import os
import shlex
import shutil
import signal
import sys
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import NoReturn

from prompts import PromptError
from verifiers.plain import plain

# What a user can do about errors of the disk.
_DISK = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "make space there, or give another --out"),
    **dict.fromkeys(
        (errno.EACCES, errno.EPERM, errno.EROFS),
        "let this user write there, or give another --out",
    ),
    errno.EFBIG: "raise the limit on the size of a file (`ulimit -f`)",
    errno.EMFILE: "raise the number of open files (`ulimit -n`)",
    errno.ENOTDIR: "a file stands where a folder should be: move it, or give another --out",
}


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
    """Return "did you mean …?" for the closest choice, whatever its case, or an empty string."""
    spelt = {choice.lower(): choice for choice in choices}
    close = difflib.get_close_matches(word.lower(), spelt, n=1, cutoff=0.5)
    return f"did you mean {spelt[close[0]]!r}?" if close else ""


def speaks() -> bool:
    """Return whether this process tells why it ends.

    Processes that work together replace it: the first that fails speaks for all.
    """
    return True


def command(main: Callable[[list[str]], None]) -> NoReturn:
    """Run an entry point: user errors become a message and exit status 2.

    So do a full disk, a missing permission and too little memory. Ctrl-C and SIGTERM end with
    status 130, after the step or shard that was being made (`data_prep.interruption`), and with the
    command that goes on. `--debug` anywhere on the command line shows the full traceback instead.
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
        if speaks():
            print(f"error: {plain(error)}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        if debug:
            raise
        for number in (signal.SIGINT, signal.SIGTERM):  # a launcher sends both, one after the other
            signal.signal(number, signal.SIG_IGN)
        if speaks():
            print(f"\ninterrupted: {go_on()}", file=sys.stderr)
        raise SystemExit(130) from None
    except BrokenPipeError:
        # The reader of our output went away (`… | head`); not an error of ours.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(0) from None
    except Exception as error:
        message = "" if debug else _memory_message(error) or _disk_message(error)
        if not message:
            if debug or speaks():
                raise
            raise SystemExit(1) from None  # lost another process, which has said why
        if speaks():
            print(f"{plain(f'error: {message}')}\n  {go_on()}", file=sys.stderr)
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


def go_on() -> str:
    """Return how the interrupted work goes on: the command that was given."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    name = spec.name.removesuffix(".__main__") if spec is not None else ""
    program = ["python", "-m", name] if name else ["python", sys.argv[0]]
    return f"what was complete is kept; go on with: {shlex.join([*program, *sys.argv[1:]])}"


def _memory_message(error: Exception) -> str:
    """Return what to say of an error of too little memory; empty for any other."""
    text = str(error).strip().partition("\n")[0]
    # torch has a type of its own on a GPU, and a plain RuntimeError on a CPU.
    is_memory = (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, RuntimeError) and "can't allocate memory" in text)
        or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
    )
    if not is_memory:
        return ""
    return (
        f"out of memory: {text or 'no more could be had'}\n  what to do: lower micro_tokens of the "
        "stage, slots or memory_gib of [engine] or the number of workers; gradient_checkpointing "
        "and lora need less; or take a machine with more"
    )


def _disk_message(error: Exception) -> str:
    """Return what to say of a full disk, a missing permission and the like; empty for others."""
    if not isinstance(error, OSError):
        return ""
    found = error.strerror or str(error)
    if error.errno is None and not error.filename:  # as transformers says what it cannot fetch
        fix = "check the name or file, and for the hub the connection"
        return f"{found.strip()}\n  what to do: {fix}"
    where = str(error.filename or "the operating system")
    if error.errno == errno.ENOSPC and error.filename:
        folder = next((p for p in Path(where).absolute().parents if p.is_dir()), Path("/"))
        found += f" ({shutil.disk_usage(folder).free / 2**20:.1f} MiB are free)"
    return f"{where}: {found}\n  what to do: {_DISK.get(error.errno or 0, 'mend it')}"
