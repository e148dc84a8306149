"""What a run folder holds for its report: figures, training curves, data, configuration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from data_prep.config import fingerprint, read_toml
from data_prep.errors import UserError
from data_prep.jsonl import read_json, read_rows, write_json
from data_prep.manifest import (
    FORMAT,
    check_stage,
    input_hash,
    read_manifest,
    read_sealed,
    sealed,
    stage_of,
)
from data_prep.run_folder import folder_name
from data_prep.schema import Problem, read_problems
from eval.contamination import contamination, training_questions
from eval.figures import SCHEMA
from eval.fingerprint import result_fingerprint
from eval.grading import Graded, read_graded
from eval.styles import decompose

Figures = dict[str, Any]
USUAL_ORDER = ("base", "sft", "rft", "dpo", "ppo", "grpo")


@dataclass(slots=True)
class Results:
    """Everything a report shows, except the samples' texts.

    Attributes:
        name: The run's name.
        seed: Its seed; None where the run folder does not say.
        checkpoints: Evaluated checkpoints, in the order of training.
        suites: Evaluated suites; the embedded one first.
        figures: checkpoint → suite → content of `figures.json`.
        decomposition: suite → checkpoint → where its gain over the first checkpoint comes from.
        steps: Training stage → rows of `steps.jsonl`.
        statistics: The data stage's, or empty.
        config: The run's configuration as TOML text, or empty.
        versions: Packages and commit that the evaluations were made with.
        folders: checkpoint → its evaluation's folder.
        contamination: suite → questions that the training data holds; empty without any.
        training: Files that suites were held against; empty where no training data is known.
        fingerprint: Part of the result → its hash, see `eval.fingerprint`.
    """

    name: str
    seed: int | None
    checkpoints: list[str]
    suites: list[str]
    figures: dict[str, dict[str, Figures]]
    decomposition: dict[str, dict[str, Any]] = field(default_factory=dict)
    steps: dict[str, list[Figures]] = field(default_factory=dict)
    statistics: dict[str, Any] = field(default_factory=dict)
    config: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    folders: dict[str, Path] = field(default_factory=dict)
    contamination: dict[str, Any] = field(default_factory=dict)
    training: list[str] = field(default_factory=list)
    fingerprint: dict[str, str] = field(default_factory=dict)

    def pairs(self) -> list[tuple[str, str]]:
        """Return the (checkpoint, suite) that were evaluated, suite by suite."""
        return [(c, s) for s in self.suites for c in self.checkpoints if s in self.figures[c]]


def collect(
    run: Path, config_file: Path | None = None, training: Sequence[Path] | None = None
) -> Results:
    """Read a run folder.

    Args:
        run: With `eval-<checkpoint>` folders.
        config_file: The run's TOML; by default the `config.toml` that the run folder keeps.
        training: Files of training questions; by default `data/train.jsonl` and `mixture` of
            the run, and of the runs that the evaluated checkpoints stand in.

    Raises:
        UserError: Nothing was evaluated there, or a file is broken.
    """
    folders = {
        path.name.removeprefix("eval-"): path
        for path in sorted(run.glob("eval-*"))
        if (path / "manifest.json").is_file()
    }
    if not folders:
        raise UserError(
            str(run),
            "no complete evaluation",
            "folders eval-<checkpoint>",
            "run `python -m eval.run` first",
        )
    if config_file is not None and not config_file.is_file():
        raise UserError(str(config_file), "no such file", "the run's TOML", "mend --config")
    config_file = config_file or run / "config.toml"
    table = read_toml(config_file) if config_file.is_file() else {}
    trained = [
        folder_name(stage.get("name"), f"{config_file}, name of a stage")
        for stage in table.get("train", [])
    ]
    # Without a configuration, methods come in the order in which they are usually run.
    order = {name: position for position, name in enumerate(trained or USUAL_ORDER)}
    for folder in folders.values():
        check_stage(folder)
    for path in sorted(run.glob("eval-*/*/figures.json")):
        whole = path.parent.parent
        if whole.suffix not in (".partial", ".old") and whole not in folders.values():
            raise UserError(
                str(whole / "manifest.json"),
                "missing",
                "the manifest of a complete evaluation",
                "run `python -m eval.run` again: it takes the samples over",
            )
    checkpoints = sorted(folders, key=lambda name: (order.get(name, len(order)), name))
    figures = {
        name: {path.parent.name: _figures(path) for path in folders[name].glob("*/figures.json")}
        for name in checkpoints
    }
    suites = sorted(
        {s for found in figures.values() for s in found}, key=lambda s: (s != "embedded", s)
    )
    seed = table.get("seed", _sampling_seed(folders[checkpoints[0]]))
    results = Results(
        name=str(table.get("name", run.resolve().name)),
        seed=seed,
        checkpoints=checkpoints,
        suites=suites,
        figures=figures,
        config=config_file.read_text(encoding="utf-8") if config_file.is_file() else "",
        versions=_versions(list(folders.values())),
        folders=folders,
        fingerprint=result_fingerprint(run),
    )
    results.decomposition = {suite: _decompositions(results, suite) for suite in suites}
    stages = trained or sorted(path.parent.name for path in run.glob("*/steps.jsonl"))
    results.steps = {
        stage: [row for _, row in read_rows(path)]
        for stage in stages
        if (path := _checked(run / stage / "steps.jsonl")).is_file()
    }
    files = _training_files(run, folders) if training is None else list(training)
    results.training = [str(path) for path in files]
    results.contamination = _contamination(results, run, files)
    statistics = _checked(run / "data" / "statistics.json")
    results.statistics = read_json(statistics) if statistics.is_file() else {}
    return results


def _checked(path: Path) -> Path:
    """Return a stage's file, held against the stage's manifest where it has one.

    Raises:
        UserError: It is missing from a complete stage, or is not what that wrote.
    """
    if (stage := stage_of(path)) is not None:
        check_stage(stage, path)
    return path


def _figures(path: Path) -> Figures:
    """Return the content of a `figures.json`.

    Raises:
        UserError: It is of another version of this program.
    """
    content = read_json(path)
    if content.get("schema") != SCHEMA:
        raise UserError(
            f"{path}, key 'schema'",
            f"{content.get('schema')!r}",
            f"{SCHEMA}",
            "run `python -m eval.run` again: it takes the samples over and counts anew",
        )
    return content


def _sampling_seed(folder: Path) -> int | None:
    """Return the seed that an evaluation's samples were drawn with."""
    plans = read_manifest(folder)["plan"]["config"]["generation"]
    return next((plan["seed"] for plan in plans.values()), None)


def _versions(folders: list[Path]) -> dict[str, str]:
    """Return what the evaluations were made with, "a, b" where they differ."""
    found: dict[str, dict[str, None]] = {}
    for folder in folders:
        for package, version in read_manifest(folder)["versions"].items():
            # One stage may have several, such as kinds of processor.
            found.setdefault(package, {}).update(dict.fromkeys(version.split(", ")))
    return {package: ", ".join(versions) for package, versions in found.items()}


def _training_files(run: Path, folders: Mapping[str, Path]) -> list[Path]:
    """Return the training data of the runs that results come from: problems and mixtures."""
    runs = [run]
    for folder in folders.values():
        model = read_manifest(folder).get("counts", {}).get("model")
        if model:  # RUN/STAGE/checkpoint
            runs.append(Path(model).parent.parent)
    found: dict[Path, Path] = {}
    for folder in runs:
        if (problems := folder / "data" / "train.jsonl").is_file():
            found[problems.resolve()] = problems
        if (folder / "mixture" / "manifest.json").is_file():
            found[(folder / "mixture").resolve()] = folder / "mixture"
    return list(found.values())


def _contamination(results: Results, run: Path, files: Sequence[Path]) -> dict[str, Any]:
    """Return each suite against training questions, remembered beside the report."""
    if not files:
        return {}
    suites = {
        suite: list(read_problems(results.folders[checkpoint] / suite / "problems.jsonl"))
        for checkpoint, suite in reversed(results.pairs())
    }
    key = fingerprint(
        [
            [input_hash(path) for path in files],
            {name: [p.question for p in rows] for name, rows in suites.items()},
        ]
    )
    memory = run / "report" / "contamination.json"
    if memory.is_file() and (known := _remembered(memory)).get("key") == key:
        return {suite: known["suites"][suite] for suite in results.suites}
    found = contamination(suites, chain.from_iterable(map(training_questions, files)))
    memory.parent.mkdir(exist_ok=True)
    write_json(memory, sealed({"format": FORMAT, "key": key, "suites": found}))
    return {suite: found[suite] for suite in results.suites}


def _remembered(memory: Path) -> dict[str, Any]:
    """Return what an earlier report found, nothing where that is damaged."""
    try:
        return read_sealed(memory, "")
    except UserError:
        return {}


def load_suite(
    results: Results, checkpoint: str, suite: str
) -> tuple[list[Problem], list[list[Graded]], list[Graded]]:
    """Return (problems, sampled rows a question, greedy row a question) of an evaluation."""
    folder = results.folders[checkpoint] / suite
    problems = list(read_problems(folder / "problems.jsonl"))
    ids = [problem.id for problem in problems]
    sampled = read_graded(folder / "verdicts.jsonl", ids, results.figures[checkpoint][suite]["n"])
    greedy = read_graded(folder / "greedy_verdicts.jsonl", ids, 1)
    return problems, sampled, [group[0] for group in greedy]


def _decompositions(results: Results, suite: str) -> dict[str, Any]:
    """Return, for every checkpoint after the first, where its gain comes from."""
    evaluated = [c for c in results.checkpoints if suite in results.figures[c]]
    if len(evaluated) < 2:
        return {}
    problems, before, _ = load_suite(results, evaluated[0], suite)
    found = {}
    for checkpoint in evaluated[1:]:
        others, after, _ = load_suite(results, checkpoint, suite)
        if [p.id for p in others] != [p.id for p in problems]:
            continue  # other questions: no paired difference
        parts = decompose(before, after, seed=results.seed or 0)
        found[checkpoint] = {
            "against": evaluated[0],
            "difference": parts.difference.to_dict(),
            "choice": parts.choice.to_dict(),
            "skill": parts.skill.to_dict(),
        }
    return found
