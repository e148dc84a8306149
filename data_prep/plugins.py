"""Plug-ins by file name: `kind = "grpo"` is the file `grpo.py`, `kind = "my/own.py"` a path.

A plug-in package holds its contract in `__init__.py`, private helpers as `_name.py`, and
otherwise only plug-ins. Only the chosen file is imported, so heavy extras stay lazy.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any

from .errors import UserError, nearest

# How modules of the user's own files are called.
OWN = "boxed_plugin_"


def plugin_names(package: str) -> list[str]:
    """Return the kinds that a package offers: its public modules, sorted."""
    module = importlib.import_module(package)
    folder = Path(next(iter(module.__path__)))
    return sorted(path.stem for path in folder.glob("*.py") if not path.stem.startswith("_"))


def load_plugin(package: str, kind: str, *, where: str = "kind") -> ModuleType:
    """Import the plug-in `kind` of `package`.

    Args:
        package: Dotted name of the plug-in package, such as "pipeline.methods".
        kind: A plug-in's name, or a path ending in `.py`.
        where: What to call the place that names the kind in an error.

    Raises:
        UserError: The kind is not there; the message lists the choices.
    """
    if kind.endswith(".py"):
        return _load_path(Path(kind), where)
    names = plugin_names(package)
    if kind not in names:
        raise UserError(
            where,
            f"unknown kind {kind!r} {nearest(kind, names)}".rstrip(),
            f"one of {', '.join(names)}, or a path to a file of your own",
            f"mend the name, or give a path such as 'my/{Path(kind).name or 'own'}.py'",
        )
    return importlib.import_module(f"{package}.{kind}")


def config_class(module: ModuleType, base: type) -> Any:
    """Return a plug-in's model of its settings.

    Raises:
        UserError: The file has none.
    """
    found = getattr(module, "Config", None)
    if isinstance(found, type) and issubclass(found, base):
        return found
    raise UserError(
        str(module.__file__),
        "no class Config" if found is None else f"Config is {found!r:.60}",
        f"a class Config that derives from {base.__name__} or a class made of it",
        "add it: the __init__.py of the built-in plug-ins states the contract",
    )


def make(module: ModuleType, *given: Any) -> Any:
    """Return what a plug-in's `create` makes; see `ask`."""
    return ask(module, "create", *given)


def ask(module: ModuleType, name: str, *given: Any) -> Any:
    """Return what a function of a plug-in returns.

    Args:
        module: The plug-in.
        name: The function that its contract names.
        given: What it is called with.

    Raises:
        UserError: There is no such function, it takes something else, or, in a file of the
            user's own, it fails or returns nothing.
    """
    function = getattr(module, name, None)
    where, own = str(module.__file__), module.__name__.startswith(OWN)
    count = f"{len(given)} argument{'s' * (len(given) != 1)}"
    if not callable(function):
        raise UserError(where, f"no function {name}", f"{name} of {count}", "add it")
    try:
        inspect.signature(function).bind(*given)
    except TypeError as error:
        raise UserError(where, f"{name} cannot be called: {error}", count, "mend it") from None
    try:
        found = function(*given)
    except UserError:
        raise
    except Exception as error:
        if not own:
            raise
        raise UserError(
            f"{where}, line {_line_in(error, Path(where))}",
            f"{name} failed: {type(error).__name__}: {error}",
            "a function that returns",
            "mend the file; --debug shows the traceback",
        ) from error
    if found is None:
        raise UserError(where, f"{name} returned nothing", "what its contract says", f"mend {name}")
    return found


def _load_path(path: Path, where: str) -> ModuleType:
    if not path.is_file():
        raise UserError(where, f"no file {str(path)!r}", "a plug-in file", "check the path")
    # The name carries the path, so that two files called `mine.py` stay apart.
    digest = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]
    name = f"{OWN}{path.stem}_{digest}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UserError(where, f"{path} cannot be imported", "a Python file", "check the file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise UserError(
            f"{path}, line {_line_in(error, path)}",
            f"this plug-in cannot be imported: {type(error).__name__}: {error}",
            "a Python file that imports",
            "mend the file",
        ) from error
    return module


def _line_in(error: Exception, path: Path) -> int | str:
    """Return the last line of the file that the error passed through."""
    if isinstance(error, SyntaxError) and error.lineno is not None:
        return error.lineno
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == str(path)]
    return frames[-1].lineno or "?" if frames else "?"
