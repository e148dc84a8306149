"""The contract of a checker, and how one is found by name or by path.

A checker is one file. `kind = "boxed"` is the file `boxed.py` beside this one;
`kind = "my/own_checker.py"` is a file of yours. The file defines one subclass of
`Checker` named `Checker...`-anything, or several and a module constant
`CHECKER` that names the one meant. Nothing else is imported, so the libraries
that a checker needs stay unloaded until it is asked for.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import inspect
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

from ..verdict import Outcome, Verdict

__all__ = ["Checker", "Outcome", "Verdict", "kinds", "load_checker"]


class Checker(ABC):
    """Judges one answer.

    A checker is built once from plain options (`Checker(**options)`) and then
    called many times, in any process and from any thread: `check` keeps no state
    that changes a later verdict. It never raises for a text, however strange;
    what it cannot judge it returns as `error`, `timeout` or `gold_unparseable`.

    Attributes:
        examples: `(gold, text, outcome)` rows that the conformance tests replay;
            at least one for each outcome that the checker means to return.
        bounded: Whether `check` itself keeps within a second; a checker around a
            library that may take forever is used in a pool only.
        needs_endpoint: Whether it asks a server, so that examples prove nothing.
    """

    examples: ClassVar[tuple[tuple[str, str, str], ...]] = ()
    bounded: ClassVar[bool] = True
    needs_endpoint: ClassVar[bool] = False

    @abstractmethod
    def check(self, gold: str, text: str) -> Verdict:
        """Judge `text` against `gold`.

        Args:
            gold: The right answer, as it stands in the data.
            text: A completion or a bare answer.

        Returns:
            The verdict, with a `score` where the checker grades.
        """

    def quick(self, gold: str, text: str) -> Verdict | None:
        """Decide at once, in bounded time, or return None to have `check` decide.

        A pool calls this first, without preparing to kill the worker. The
        default never decides.
        """
        return None


def kinds() -> list[str]:
    """Return the names of the checkers that come with the package, sorted."""
    here = Path(__file__).parent
    return sorted(p.stem for p in here.glob("*.py") if not p.stem.startswith("_"))


def load_checker(kind: str, options: Mapping[str, Any] | None = None) -> Checker:
    """Build a checker by name or by the path of a user's file.

    Args:
        kind: A file name in this folder without `.py`, or a path that ends in
            `.py`.
        options: Keyword arguments of the checker's constructor.

    Returns:
        The checker.

    Raises:
        ValueError: No such kind, no such file, no checker in the file, or an
            option that the checker does not take.
    """
    module = _load_file(Path(kind)) if kind.endswith(".py") else _load_named(kind)
    found = _checker_class(module, kind)
    options = dict(options or {})
    try:
        inspect.signature(found).bind(**options)
    except TypeError as error:
        takes = [name for name in inspect.signature(found).parameters if name != "self"]
        raise ValueError(
            f"checker {kind!r}: {error}; found options {sorted(options)}, it takes {takes}"
        ) from error
    return found(**options)


def _load_named(kind: str) -> ModuleType:
    choices = kinds()
    if kind not in choices:
        near = difflib.get_close_matches(kind, choices, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(
            f"no checker {kind!r}{hint} Choices: {', '.join(choices)}, "
            "or the path of a .py file of your own"
        )
    return importlib.import_module(f".{kind}", __name__)


def _load_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise ValueError(
            f"no checker file {str(path)!r} (looked in {Path.cwd()}); give the path of a "
            f".py file that defines a Checker, or one of {', '.join(kinds())}"
        )
    # Two files of one name must not replace each other, hence the hash of the path.
    tag = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:12]
    name = f"{__name__}._user_{path.stem}_{tag}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"checker file {str(path)!r} cannot be imported as Python")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise ValueError(
            f"checker file {str(path)!r} failed on import: {type(error).__name__}: {error}"
        ) from error
    return module


def _checker_class(module: ModuleType, kind: str) -> type[Checker]:
    marked = getattr(module, "CHECKER", None)
    if isinstance(marked, type) and issubclass(marked, Checker):
        return marked
    found = [
        item
        for item in vars(module).values()
        if isinstance(item, type)
        and issubclass(item, Checker)
        and item is not Checker
        and item.__module__ == module.__name__
        and not inspect.isabstract(item)
    ]
    if len(found) != 1:
        names = [item.__name__ for item in found]
        raise ValueError(
            f"checker {kind!r}: found {len(found)} Checker classes {names}, expected exactly one; "
            "define one subclass of Checker with a check method, or name it with CHECKER = ..."
        )
    return found[0]
