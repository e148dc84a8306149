"""What the stages of this package share on the command line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

from pydantic import create_model

from data_prep.arguments import KEYS, Arguments
from data_prep.config import Config, dump_toml, override, read_toml, validate
from data_prep.errors import UserError

C = TypeVar("C", bound=Config)


class Invocation(NamedTuple, Generic[C]):
    """What a command line asks for.

    Attributes:
        config: The stage's table, overrides applied.
        run: The run folder.
        seed: The run's seed.
        table: The whole file.
        is_dry: Whether only to print what would be built.
    """

    config: C
    run: Path
    seed: int
    table: dict[str, Any]
    is_dry: bool


def invocation(
    model: type[C], section: str, program: str, description: str, arguments: list[str]
) -> Invocation[C]:
    """Read a stage's table of a run's configuration, with overrides; other tables are ignored.

    Args:
        model: The table's model.
        section: The table's name.
        program: How the script is called.
        description: For `--help`.
        arguments: The command line.

    Raises:
        UserError: The file is missing or broken, or a key or value is not allowed.
    """
    parser = Arguments(
        program, description, KEYS.format(f"[{section}]", "--tokenizer.vocab-size 512")
    )
    parser.add_argument("--config", required=True, help="a run's configuration (TOML)")
    parser.add_argument("--seed", type=int, help="in place of the configuration's")
    parser.add_argument("--out", help="run folder in place of the configuration's")
    parser.add_argument("--dry-run", action="store_true", help="print what would be built")
    options, rest = parser.parse_known_args(arguments)
    table = read_toml(options.config)
    for key in ("out", section):
        if key not in table and not (key == "out" and options.out):
            raise UserError(
                f"{options.config}, key {key!r}",
                "missing",
                f"`out` and a table [{section}]",
                "start from one of the shipped configurations",
            )
    # Validated under its own key, so that messages name `data.…` as the file spells it.
    whole = validate(_holder(model, section), {section: table[section]}, options.config)
    config = getattr(whole, section)
    config = override(config, rest, program=program, description=f"[{section}]")
    seed = options.seed if options.seed is not None else table.get("seed", 0)
    if not isinstance(seed, int) or seed < 0:
        raise UserError(f"{options.config}, key 'seed'", f"{seed!r}", "a number from 0", "mend it")
    run = Path(options.out or table["out"])
    return Invocation(config, run, seed, table, options.dry_run)


def run_stage(
    model: type[C],
    section: str,
    program: str,
    description: str,
    arguments: list[str],
    build: Callable[[Invocation[C]], Path],
    adjust: Callable[[Invocation[C]], C],
) -> None:
    """Run a stage from the command line: print the folder that it built, or its plan.

    Args:
        model: The model of the stage's table.
        section: The table's name, and the stage's.
        program: How the script is called.
        description: For `--help`.
        arguments: The command line.
        build: Builds the stage and returns its folder.
        adjust: Returns the configuration with what other tables of the file say about it.

    Raises:
        UserError: Anything that a user can mend.
    """
    found = invocation(model, section, program, description, arguments)
    found = found._replace(config=adjust(found))
    if not found.is_dry:
        print(build(found))
        return
    print(f"# stage folder: {found.run / section}\nseed = {found.seed}\n")
    print(dump_toml(_holder(model, section)(**{section: found.config})), end="")


def _holder(model: type[Config], section: str) -> type[Config]:
    """Return a model whose only key is the section."""
    fields: Any = {section: (model, ...)}
    return create_model("Run", __base__=Config, **fields)
