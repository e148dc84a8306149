"""Evaluation profiles: everything about a prompt and its grading that a published number fixes.

A profile is a TOML file in `eval/profiles/` (by name) or anywhere (by path): system text, what
stands around the question in each language, exemplars before it, stop strings and the grader.
Two numbers compare like with like only under one profile.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field

from data_prep.config import Config, read_toml, validate
from data_prep.errors import UserError, nearest
from data_prep.jsonl import column, read_rows
from data_prep.plugins import load_plugin, plugin_names
from data_prep.schema import Problem

FOLDER = Path(__file__).parent / "profiles"
Message = dict[str, str]


class EvaluationProfile(Config):
    """One profile.

    Attributes:
        description: For people.
        system: System text; None leaves it to the checkpoint's prompt profile, "" sends none
            (a template may still add its own).
        tool_system: System text with tools; None is that without.
        prompt_profile: Prompt profile of `prompts/`; empty takes the checkpoint's own.
        layout: Layout for tokenizers without a chat template; empty takes the one that fits.
        question: Language → text around `{question}`.
        tool_question: The same where programs are run.
        stop: Strings that end a completion.
        shots: Exemplars before the question.
        exemplars: JSON lines with `question`, `solution` and, where there are several,
            `language`, relative to the profile's file; or the training split of a source, such
            as "gsm8k:train.jsonl", relative to where the command runs.
        checker: `kind` of a checker and its options: extraction and grading as published.
        checkers: The same for a language that is graded in its own way.
    """

    description: str
    system: str | None = None
    tool_system: str | None = None
    prompt_profile: str = ""
    layout: str = ""
    question: dict[str, str]
    tool_question: dict[str, str]
    stop: tuple[str, ...] = ()
    shots: int = Field(0, ge=0)
    exemplars: str = ""
    checker: dict[str, Any]
    checkers: dict[str, dict[str, Any]]

    def messages(
        self, problem: Problem, language: str, shots: list[Message], tools: bool
    ) -> list[Message]:
        """Return the conversation that a completion of a problem follows.

        Args:
            problem: The problem.
            language: Of its question; one without a text of its own takes the English.
            shots: Turns of the exemplars.
            tools: Whether programs are run.
        """
        texts = self.tool_question if tools else self.question
        around = texts.get(language) or texts.get("en") or "{question}"
        system = self.tool_system if tools and self.tool_system is not None else self.system
        opening = [{"role": "system", "content": system}] if system else []
        content = around.replace("{question}", problem.question)
        return [*opening, *shots, {"role": "user", "content": content}]


def load_evaluation_profile(name_or_path: str) -> tuple[EvaluationProfile, Path]:
    """Return a profile and its file.

    Raises:
        UserError: There is no such profile, or a key is wrong.
    """
    if name_or_path.endswith(".toml"):
        path = Path(name_or_path)
    else:
        path = FOLDER / f"{name_or_path}.toml"
        if not path.is_file():
            names = sorted(file.stem for file in FOLDER.glob("*.toml"))
            raise UserError(
                "profile",
                f"no profile {name_or_path!r} {nearest(name_or_path, names)}".rstrip(),
                f"one of {', '.join(names)}, or the path of a .toml file",
                "mend the name",
            )
    profile = validate(EvaluationProfile, read_toml(path), str(path))
    for texts in (profile.question, profile.tool_question):
        for language, text in texts.items():
            if "{question}" not in text:
                raise UserError(
                    f"{path}, language {language!r}",
                    f"{text!r:.60}",
                    "a text with {question} in it",
                    "add {question}",
                )
    return profile, path


def load_shots(
    profile: EvaluationProfile, path: Path, language: str, tools: bool, problems: list[Problem]
) -> list[Message]:
    """Return the exemplars as turns, in the order of their file.

    Args:
        profile: Says how many, and where they are.
        path: The profile's file.
        language: Of the suite.
        tools: Whether programs are run; exemplars of plain reasoning would teach against it.
        problems: Of the suite; none of them may be an exemplar.

    Raises:
        UserError: There are fewer than asked for, or one is a question of the suite.
    """
    if not profile.shots:
        return []
    source, colon, name = profile.exemplars.partition(":")
    if colon and source in plugin_names("data_prep.sources"):
        file, found = Path(name), [] if tools else _training_split(source, name)
    else:
        file = path.parent / profile.exemplars
        found = [
            (
                column(row, "question", str, f"{file}, line {line}"),
                column(row, "solution", str, f"{file}, line {line}"),
            )
            for line, row in read_rows(file)
            if row.get("language", language) == language and bool(row.get("tools")) == tools
        ]
    if len(found) < profile.shots:
        raise UserError(
            str(file),
            f"{len(found)} exemplars in language {language!r}{' with programs' if tools else ''}",
            f"{profile.shots}",
            "add exemplars, or lower `shots` in the profile",
        )
    questions = {problem.question for problem in problems}
    turns: list[Message] = []
    for question, solution in found[: profile.shots]:
        if question in questions:
            raise UserError(
                str(file),
                f"the exemplar {question!r:.60} is a question of the suite",
                "exemplars of a training split",
                "take another exemplar",
            )
        around = profile.question.get(language) or profile.question.get("en") or "{question}"
        turns += [
            {"role": "user", "content": around.replace("{question}", question)},
            {"role": "assistant", "content": solution},
        ]
    return turns


def _training_split(source: str, path: str) -> list[tuple[str, str]]:
    """Return (question, solution) of the problems in a source's training file."""
    module = load_plugin("data_prep.sources", source)
    config = validate(module.Config, {"kind": source, "train": path}, "profile, key 'exemplars'")
    return [
        (problem.question, problem.solutions["reference"])
        for problem in module.read(config, 0)
        if "reference" in problem.solutions
    ]
