"""Suites: what a checkpoint is measured on.

Contract of a plug-in file `eval/suites/<kind>.py`:

* `Config(SuiteConfig)`: its settings; `path` names a local file of the published format.
* `load(config) -> list[Problem]`: the problems in the order of the file, ids unique, each with
  its gold, and subject and level where the format has them; a row that cannot be read raises
  `UserError` naming file and line.
* `LANGUAGE`, "zh" where the questions are Chinese; English where it is not stated.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from data_prep.config import PluginConfig, validate
from data_prep.errors import UserError, nearest
from data_prep.plugins import ask, config_class, load_plugin
from data_prep.run_folder import folder_name
from data_prep.schema import Problem, require_texts

# Suites that are asked for together.
GROUPS = {
    "core": ("gsm8k", "math500", "mgsm_zh", "cmath"),
    "deepseek_math": ("gsm8k", "math", "mgsm_zh", "cmath"),
    "grade_school": ("gsm8k", "gsm_hard", "svamp", "mgsm_en", "mgsm_zh", "cmath", "cmath_dev"),
    "competition": ("math", "math500", "olympiadbench", "aime", "amc", "minerva"),
    "chinese": ("mgsm_zh", "cmath", "cmath_dev"),
    "mgsm": ("mgsm_en", "mgsm_zh"),
}


class SuiteConfig(PluginConfig):
    """What every suite understands.

    Attributes:
        path: Local JSON lines file; empty takes the hub's copy where the suite has one.
        hub: Hub id, or the folder of a downloaded copy, in place of the suite's own.
        revision: Branch, tag or commit of the hub's copy.
    """

    path: str = ""
    hub: str = ""
    revision: str = ""


@dataclass(frozen=True, slots=True)
class Suite:
    """A suite that was asked for.

    Attributes:
        name: What figures call it.
        config: Its plug-in's configuration.
    """

    name: str
    config: SuiteConfig

    @property
    def language(self) -> str:
        """Language of its questions."""
        module = load_plugin("eval.suites", self.config.kind, where="suite")
        return getattr(module, "LANGUAGE", "en")

    def load(self, limit: int = 0) -> list[Problem]:
        """Return its problems, the first `limit` of them where `limit` is above 0.

        Raises:
            UserError: The file is missing, empty or broken, or two problems share an id.
        """
        module = load_plugin("eval.suites", self.config.kind, where="suite")
        problems: list[Problem] = list(ask(module, "load", self.config))
        seen: dict[str, str] = {}
        for problem in problems:
            require_texts(problem, str(module.__file__))
            if problem.id in seen:
                raise UserError(
                    problem.where or self.name,
                    f"the id {problem.id!r} is that of {seen[problem.id] or 'an earlier problem'}",
                    "ids that are unique in a suite",
                    "mend the ids",
                )
            seen[problem.id] = problem.where
            if not problem.question or not problem.answer:
                empty = "answer" if problem.question else "question"
                raise UserError(
                    problem.where or problem.id,
                    f"an empty {empty}",
                    f"a text in {empty}",
                    "mend or remove the row",
                )
        if not problems:
            raise UserError(self.name, "no problems", "at least one", "check the file")
        return problems[:limit] if limit else problems


def choose_suites(names: Iterable[str], paths: Mapping[str, str]) -> list[Suite]:
    """Return the suites that names stand for.

    A name is a kind (`gsm8k`), a kind with a local file (`gsm8k=test.jsonl`), a group of kinds
    (`core`; see `GROUPS`), a file of one's own (`mine.jsonl` with `question` and `answer`, suite
    `mine`; or `mine=rows.jsonl`), or a plug-in file (`mine.py`). A kind with a file beside a
    group that holds it says where the group's one is read from.

    Args:
        names: As above.
        paths: Suite name to local file, for names without one.

    Raises:
        UserError: A name is neither a kind nor a file, or comes twice.
    """
    names = list(names)
    grouped = dict.fromkeys(kind for name in names for kind in GROUPS.get(name, ()))
    paths = dict(paths) | {
        kind: path
        for kind, equals, path in (name.partition("=") for name in names)
        if equals and kind in grouped
    }
    specs: list[str] = []
    for name in names:
        if name in GROUPS:
            specs += [kind for kind in GROUPS[name] if kind not in specs]
        elif name.partition("=")[0] not in grouped:
            specs.append(name)
    suites: list[Suite] = []
    for spec in specs:
        name, _, path = spec.partition("=")
        suite = _suite(name, path or paths.get(name, ""))
        folder_name(suite.name, f"suite {spec!r}")
        if any(other.name == suite.name for other in suites):
            raise UserError("suites", f"{suite.name!r} twice", "each suite once", "remove one")
        suites.append(suite)
    if not suites:
        raise UserError("suites", "none", "at least one suite", "name one, such as gsm8k")
    return suites


def _suite(name: str, path: str) -> Suite:
    from data_prep.plugins import plugin_names

    if name.endswith((".jsonl", ".json")):
        return Suite(Path(name).stem, _config("own", name, name))
    if name in plugin_names("eval.suites") or name.endswith(".py"):
        return Suite(Path(name).stem, _config(name, path, name))
    if path:
        return Suite(name, _config("own", path, name))
    kinds = plugin_names("eval.suites")
    raise UserError(
        "suite",
        f"no suite {name!r} {nearest(name, [*kinds, *GROUPS])}".rstrip(),
        f"one of {', '.join(kinds)}; a group ({', '.join(GROUPS)}); or a file of your own",
        "mend the name, or give a file: mine.jsonl, or NAME=FILE",
    )


def _config(kind: str, path: str, where: str) -> SuiteConfig:
    module = load_plugin("eval.suites", kind, where="suite")
    table = {"kind": kind, "path": path} if path else {"kind": kind}
    return validate(config_class(module, SuiteConfig), table, f"suite {where}")
