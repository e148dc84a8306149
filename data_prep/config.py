"""Configuration: frozen models, TOML in, TOML out, overrides on the command line.

A table with a `kind` is a plug-in's: its model is the `Config` of the plug-in's file.
Unknown keys are errors that name the file, the key and the nearest known one.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import tomllib
from contextlib import redirect_stderr
from pathlib import Path
from typing import Annotated, Any, TypeVar, cast

import tomli_w
from pydantic import BaseModel, BeforeValidator, ConfigDict, SerializeAsAny, ValidationError
from pydantic_core import PydanticCustomError

from .errors import UserError, nearest
from .plugins import config_class, load_plugin

# pydantic's shapes of values, as TOML has them.
SHAPES = {
    **dict.fromkeys(("tuple_type", "list_type"), "a list: [ … ]"),
    **dict.fromkeys(("dict_type", "model_type"), "a table: { … }"),
}
# Tables that come several times.
TABLES = ("train", "data.sources", "mixture.sources", "mixture.suites")
SIGNATURE = "# SHA-256 of the lines below: "


class Config(BaseModel):
    """Base of every configuration model: frozen; no unknown keys, no infinite numbers."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False
    )


class PluginConfig(Config):
    """Base of a plug-in's configuration: `kind` names the file."""

    kind: str


C = TypeVar("C", bound=Config)


def plugin_config(package: str) -> Any:
    """Return the annotation of a field that holds a plug-in's configuration.

    The field takes a table with `kind`; the plug-in's own `Config` validates the rest.
    """

    def load(value: Any) -> Any:
        if isinstance(value, PluginConfig):
            return value
        if isinstance(value, str):
            value = {"kind": value}
        if not isinstance(value, dict) or not isinstance(value.get("kind"), str):
            raise ValueError(f"a table with a key `kind` is expected, found {value!r:.80}")
        try:
            module = load_plugin(package, value["kind"], where=f"kind of {package}")
            return validate(
                config_class(module, PluginConfig), value, f"table with kind = {value['kind']!r}"
            )
        except UserError as error:  # pydantic knows which key this is
            raise PydanticCustomError("plugin", "{error}", {"error": error}) from None

    return SerializeAsAny[Annotated[PluginConfig, BeforeValidator(load)]]


def read_toml(path: str | Path) -> dict[str, Any]:
    """Read a TOML file.

    Raises:
        UserError: The file is missing, not TOML, or not as a run wrote it.
    """
    path, text = Path(path), ""
    try:
        text = path.read_text(encoding="utf-8-sig")
        if text.startswith(SIGNATURE):
            _check_signature(text, path)
        return tomllib.loads(text)
    except (FileNotFoundError, IsADirectoryError):
        raise UserError(
            str(path), "no such file", "a TOML configuration", "check the path"
        ) from None
    except (ValueError, RecursionError) as error:  # also no UTF-8, too many digits
        raise _toml_error(path, text, error) from None


def _toml_error(path: Path, text: str, error: Exception) -> UserError:
    """Say what is wrong with a file that is not TOML, with the line and what is often meant."""
    said = str(error)
    place = re.search(r"\(at line (\d+)", said)
    line = text.split("\n")[int(place[1]) - 1].strip() if place else ""
    fix = "mend the line"
    table = line.strip("[]")
    if table in TABLES and re.search(rf"^\[{table}\]", text, re.MULTILINE):
        fix = f"a table that comes several times has two brackets each time: [[{table}]]"
    elif word := re.search(r"=\s*(True|False)\b", line):
        fix = f"write {word[1].lower()}: TOML has true and false in small letters"
    found = f"not TOML: {said}" + (f": {line:.80}" if line else "")
    return UserError(str(path), found, "a TOML file", fix)


def validate(model: type[C], table: dict[str, Any], where: str) -> C:
    """Build a configuration from a table; `where` names the file in errors.

    Raises:
        UserError: A key is unknown, missing, or of the wrong type or range.
    """
    try:
        return model.model_validate(table)
    except ValidationError as error:
        raise _user_error(model, table, where, error) from None
    except UserError as error:
        raise UserError(f"{where}, {error.where}", error.found, error.expected, error.fix) from None


def _user_error(
    model: type[Config], table: dict[str, Any], where: str, error: ValidationError
) -> UserError:
    """Turn pydantic's first complaint into a message with the key and the mend."""
    first = error.errors()[0]
    location = [str(part) for part in first["loc"]]
    key = ".".join(location)
    place = f"{where}, key {key!r}{_entry(table, first['loc'])}" if key else where
    if first["type"] == "plugin":
        inner: UserError = first["ctx"]["error"]  # type: ignore[typeddict-item]
        return UserError(f"{place}, {inner.where}", inner.found, inner.expected, inner.fix)
    if first["type"] == "extra_forbidden":
        known = _known_keys(model, table, first["loc"][:-1])
        hint = nearest(location[-1], known)
        expected = f"one of {', '.join(known)}" if known else ""
        return UserError(place, f"unknown key {hint}".rstrip(), expected, "mend or remove it")
    if first["type"] == "missing":
        return UserError(place, "missing", "a value", "add the key")
    if first["type"] in ("value_error", "assertion_error"):
        # A rule of our own, over one key or several: it says itself what was found.
        rule = first["msg"].partition(", ")[2] or first["msg"]
        return UserError(place, rule, "keys that fit together", "mend the values")
    said = first["msg"].removeprefix("Input should be ").removeprefix("Input should ")
    expected = SHAPES.get(first["type"], said)
    found = f"found {first['input']!r:.80}"
    if first["type"] == "literal_error" and isinstance(first["input"], str):
        choices = re.findall(r"'([^']*)'", expected)
        found = f"{found} {nearest(first['input'], choices)}".rstrip()
    return UserError(place, found, expected, "mend the value")


def _entry(table: Any, path: tuple[int | str, ...]) -> str:
    """Return what the innermost entry of a list on the path calls itself, such as a stage."""
    found = ""
    for part in path:
        if not isinstance(table, dict | list | tuple) or part not in _keys(table):
            break
        is_entry, table = not isinstance(table, dict), cast(Any, table)[part]
        for key in ("kind", "name") if is_entry and isinstance(table, dict) else ():
            if isinstance(table.get(key), str) and len(table[key]) < 40:
                found = f" ({key} {table[key]!r})"
    return found


def _known_keys(model: type[Config], table: Any, path: tuple[int | str, ...]) -> list[str]:
    """Return the keys that the model at `path` knows."""
    current: Any = model
    for part in path:
        inside = isinstance(table, dict | list) and part in _keys(table)
        table = cast(Any, table)[part] if inside else None
        if isinstance(part, str) and hasattr(current, "model_fields"):
            field = current.model_fields.get(part)
            current = field.annotation if field else None
        current = _model_inside(current)
    return sorted(getattr(current, "model_fields", {}))


def _keys(container: dict[str, Any] | list[Any] | tuple[Any, ...]) -> Any:
    return container.keys() if isinstance(container, dict) else range(len(container))


def _model_inside(annotation: Any) -> Any:
    """Return the first Config class inside an annotation such as `tuple[X, ...]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for inner in getattr(annotation, "__args__", ()):
        found = _model_inside(inner)
        if found is not None:
            return found
    return None


def override(config: C, arguments: list[str], *, program: str, description: str) -> C:
    """Apply command-line overrides such as `--method.clip-high 0.28` to a configuration."""
    if not arguments:
        return config
    import tyro

    said = io.StringIO()
    try:
        with redirect_stderr(said):
            changed = tyro.cli(
                type(config), default=config, args=arguments, prog=program, description=description
            )
    except SystemExit as end:
        if not end.code:  # --help
            raise
        raise _override_error(said.getvalue(), program) from None
    values = changed.model_dump()
    for key in type(config).model_fields:
        before, after = getattr(config, key), getattr(changed, key)
        if isinstance(before, PluginConfig) and after.kind != before.kind:
            # Another plug-in: it has its own defaults, and of the one before only what was said.
            typed = {word.partition("=")[0].lstrip("-").replace("-", "_") for word in arguments}
            typed = {name for name in values[key] if f"{key}.{name}" in typed}
            said, old = before.model_fields_set | typed, before.model_dump()
            values[key] = {
                name: value
                for name, value in values[key].items()
                if name in said or value != old[name]
            }
    # Validated again: tyro builds nested plug-in models without their range checks running
    # on values that stand in different tables.
    return validate(type(config), values, "command line")


def _override_error(said: str, program: str) -> UserError:
    """Turn tyro's framed complaint into one of ours."""
    # The title stands in the frame, or where the output has no characters for one, above a rule.
    framed = said.startswith("╭")
    lines = [line.strip("│ ") for line in said.splitlines() if line[:1] not in ("╭", "╰")]
    text = "\n".join(line for line in lines if line)
    parts = [part.split("\n") for part in re.split(r"\n[─-]{3,}\n", text)][not framed :]
    found = re.sub(r"Error parsing \w+: \d+ validation errors? for \w+ ", "", " ".join(parts[0]))
    found = re.sub(r" \[type=\w+, input_value=(.*?), input_type.*", r", found \1", found)
    options = [line.split()[0] for part in parts for line in part if line.startswith("--")]
    expected = "a value that the key takes"
    if "Unrecognized" in found:
        words = found.rpartition(": ")[2]
        is_of_run = words.partition(",")[0] in ("--seed", "--out", "--name")
        hint = f" did you mean {options[0]!r}?" if options and not is_of_run else ""
        found = f"unknown argument {words}{hint}"
        expected = "keys of this stage's table, such as --key VALUE or --table.key VALUE; " + (
            "seed, out and name are the file's" if is_of_run else "other tables are the file's"
        )
    return UserError(
        "command line",
        found,
        expected,
        f"mend the command; {program} with --dry-run shows every key",
    )


def dump_toml(config: Config) -> str:
    """Return a configuration as TOML that reads back to the same configuration."""
    return tomli_w.dumps(config.model_dump(mode="json", exclude_none=True))


def signed_toml(config: Config) -> str:
    """Return what a run folder keeps: TOML behind a comment with its own hash."""
    text = dump_toml(config)
    return f"{SIGNATURE}{_digest(text)}\n{text}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _check_signature(text: str, path: Path) -> None:
    first, _, rest = text.partition("\n")
    if first.removeprefix(SIGNATURE) != _digest(rest):
        raise UserError(
            str(path),
            "not what the run wrote: it was changed or damaged since",
            "lines of the hash in its first line",
            "run `python -m pipeline.run` with your own configuration, which writes it anew; "
            "or remove its first line, if the change is meant",
        )


def fingerprint(value: Any) -> str:
    """Return a short hash of a configuration or of any JSON value."""
    if isinstance(value, BaseModel):
        value = value.model_dump(mode="json")
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
