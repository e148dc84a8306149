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

from .errors import UserError, nearest
from .plugins import config_class, load_plugin

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
        module = load_plugin(package, value["kind"], where=f"kind of {package}")
        return validate(
            config_class(module, PluginConfig), value, f"table with kind = {value['kind']!r}"
        )

    return SerializeAsAny[Annotated[PluginConfig, BeforeValidator(load)]]


def read_toml(path: str | Path) -> dict[str, Any]:
    """Read a TOML file.

    Raises:
        UserError: The file is missing, not TOML, or not as a run wrote it.
    """
    path = Path(path)
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
        raise UserError(str(path), f"not TOML: {error}", "a TOML file", "mend the line") from None


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
    if first["type"] == "extra_forbidden":
        known = _known_keys(model, table, first["loc"][:-1])
        hint = nearest(location[-1], known)
        expected = f"one of {', '.join(known)}" if known else ""
        return UserError(
            f"{where}, key {key!r}", f"unknown key {hint}".rstrip(), expected, "mend or remove it"
        )
    if first["type"] == "missing":
        return UserError(f"{where}, key {key!r}", "missing", "a value", "add the key")
    if first["type"] in ("value_error", "assertion_error"):
        # A rule of our own, over one key or several: it says itself what was found.
        place = f"{where}, key {key!r}" if key else where
        rule = first["msg"].partition(", ")[2] or first["msg"]
        return UserError(place, rule, "keys that fit together", "mend the values")
    expected = first["msg"].removeprefix("Input should be ").removeprefix("Input should ")
    found = f"found {first['input']!r:.80}"
    if first["type"] == "literal_error" and isinstance(first["input"], str):
        choices = re.findall(r"'([^']*)'", expected)
        found = f"{found} {nearest(first['input'], choices)}".rstrip()
    return UserError(f"{where}, key {key!r}", found, expected, "mend the value")


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


def _keys(container: dict[str, Any] | list[Any]) -> Any:
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
    # Validated again: tyro builds nested plug-in models without their range checks running
    # on values that stand in different tables.
    return validate(type(config), changed.model_dump(), "command line")


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
    if "Unrecognized" in found:
        hint = f" did you mean {options[0]!r}?" if options else ""
        found = f"unknown argument {found.rpartition(': ')[2]}{hint}"
    return UserError(
        "command line",
        found,
        "keys of this stage's table, such as --key VALUE or --table.key VALUE",
        f"mend the command; {program} --help lists them",
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
