"""Profiles and layouts: TOML files read into frozen records."""

from __future__ import annotations

import difflib
import tomllib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
# Stands in a layout's template where the profile's system text goes, as a Jinja string.
SYSTEM_SLOT = "@@SYSTEM@@"


class PromptError(ValueError):
    """A profile or layout that cannot be used.

    Args:
        where: File, with the key where there is one.
        found: What was there.
        expected: What should be there.
        fix: What to do about it.
    """

    def __init__(self, where: str, found: str, expected: str, fix: str) -> None:
        """Join the four parts into one message."""
        self.where, self.found, self.expected, self.fix = where, found, expected, fix
        super().__init__(f"{where}: {found}\n  expected: {expected}\n  what to do: {fix}")


@dataclass(frozen=True, slots=True)
class Layout:
    """The order of control tokens around the texts of a conversation.

    Attributes:
        name: Its file's name.
        description: For people.
        bos: Token that opens a conversation; empty where the layout has none.
        eos: Token that ends a document.
        pad: Token that fills batches.
        end: Token that ends a turn, and so a completion.
        control: Every control token, in the order of their ids in a tokenizer of our own.
        template: Jinja chat template with generation markers; `@@SYSTEM@@` stands for the
            profile's system text.
    """

    name: str
    description: str
    bos: str
    eos: str
    pad: str
    end: str
    control: tuple[str, ...]
    template: str

    def render_template(self, system: str) -> str:
        """Return the Jinja template with a system text in its slot."""
        return self.template.replace(SYSTEM_SLOT, _jinja_string(system))


@dataclass(frozen=True, slots=True)
class Profile:
    """Who the model is and what it is told before every question.

    Attributes:
        name: Its file's name.
        description: For people.
        layout: Name or path of the layout for a tokenizer of our own.
        system: System text of conversations that bring none of their own.
        stop: Strings that end a completion besides the end tokens.
        path: The file.
    """

    name: str
    description: str
    layout: str
    system: str
    stop: tuple[str, ...]
    path: Path


def load_profile(name_or_path: str) -> Profile:
    """Read a profile by name (`boxed`, `embedded`) or by the path of a `.toml` file.

    Raises:
        PromptError: There is no such profile, or a key is missing, unknown or of another type.
    """
    path = _find("profiles", name_or_path)
    table = _read(path, Profile, computed={"name", "path"})
    return Profile(name=path.stem, path=path, **table)


def load_layout(name_or_path: str) -> Layout:
    """Read a layout by name (`markers`, `chatml`, …) or by the path of a `.toml` file.

    Raises:
        PromptError: There is no such layout, or a key is missing, unknown or of another type,
            or the template has no generation markers.
    """
    path = _find("layouts", name_or_path)
    layout = Layout(name=path.stem, **_read(path, Layout, computed={"name"}))
    if "endgeneration" not in layout.template:
        raise PromptError(
            f"{path}, key 'template'",
            "no generation markers",
            "{% generation %} … {% endgeneration %} around what the assistant says",
            "add them; the loss mask comes from them",
        )
    return layout


def layout_names() -> list[str]:
    """Return the names of the layouts that are shipped, sorted."""
    return sorted(path.stem for path in (FOLDER / "layouts").glob("*.toml"))


def _find(folder: str, name_or_path: str) -> Path:
    if name_or_path.endswith(".toml"):
        path = Path(name_or_path)
        if not path.is_file():
            raise PromptError(str(path), "no such file", f"one of the {folder}", "check the path")
        return path
    path = FOLDER / folder / f"{name_or_path}.toml"
    if not path.is_file():
        names = sorted(p.stem for p in (FOLDER / folder).glob("*.toml"))
        close = difflib.get_close_matches(name_or_path, names, n=1, cutoff=0.5)
        hint = f", did you mean {close[0]!r}?" if close else ""
        raise PromptError(
            f"{folder.removesuffix('s')} {name_or_path!r}",
            f"not there{hint}",
            f"one of {', '.join(names)}, or the path of a .toml file",
            "mend the name",
        )
    return path


def _read(path: Path, record: type[Layout] | type[Profile], computed: set[str]) -> dict[str, Any]:
    """Read a TOML file whose keys are the fields of a record."""
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # also no UTF-8, nested too deep
        raise PromptError(str(path), f"not TOML: {error}", "a TOML file", "mend the line") from None
    kinds = {field.name: str(field.type) for field in fields(record) if field.name not in computed}
    for key in table:
        if key not in kinds:
            close = difflib.get_close_matches(key, list(kinds), n=1, cutoff=0.5)
            hint = f" did you mean {close[0]!r}?" if close else ""
            raise PromptError(
                f"{path}, key {key!r}",
                f"unknown key{hint}",
                f"one of {', '.join(kinds)}",
                "mend or remove it",
            )
    values: dict[str, Any] = {}
    for key, kind in kinds.items():
        if key not in table:
            raise PromptError(f"{path}, key {key!r}", "missing", "a value", "add the key")
        value = table[key]
        if kind == "str" and isinstance(value, str):
            values[key] = value
        elif kind != "str" and isinstance(value, list) and all(isinstance(v, str) for v in value):
            values[key] = tuple(value)
        else:
            expected = "a string" if kind == "str" else "a list of strings"
            raise PromptError(
                f"{path}, key {key!r}", f"found {value!r:.80}", expected, "mend the value"
            )
    return values


def _jinja_string(text: str) -> str:
    """Return a text as a Jinja string literal."""
    # Jinja reads literals with Python's "unicode-escape" rules.
    escaped = text.encode("unicode_escape").decode("ascii").replace("'", "\\'")
    return f"'{escaped}'"
