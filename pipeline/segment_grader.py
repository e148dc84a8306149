"""Graders of segments, the critics of 001_…: what they say of a whole and of each thought.

    rule     G: the reward of the whole (by default the verdict). S_k: the share of the thought's
             equations that hold. P_k: the share of correct ones among continuations that the
             policy samples from behind the thought.
    model    G, S_k and P_k by a chat model at any OpenAI-compatible endpoint, answered in JSON.
    fixed    Given in a file, a row a problem.

By rule, a thought without an equation that can be checked takes the mean of the others, so that
its z-score is 0, and 1 where no thought has any: nothing in it is wrong. Behind a solution's last
thought, where no answer follows, nothing is left to sample: P_M is its own verdict.

What cannot be graded (no verdict, no usable reply after all tries) masks the sample; it is never
scored 0.

Source: methods.md section 8.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence as Items
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from pydantic import Field, model_validator

from data_prep.config import Config
from data_prep.errors import UserError
from data_prep.jsonl import read_rows
from pipeline.segment_reward import Grades
from verifiers.checkers._endpoint import Endpoint, check_messages, filled_messages
from verifiers.checkers._grader import GraderError, TemplateError
from verifiers.checkers.steps import step_reward

if TYPE_CHECKING:
    from data_prep.schema import Problem
    from pipeline.batch import Sequence

INSTRUCTION = (
    "You grade a solution of a mathematics problem that is cut into numbered thoughts. Give "
    "numbers between 0 and 1: `overall`, how good the whole solution is; for each thought in "
    "order `thought`, how sound it is, and `progress`, how likely a correct answer is once it is "
    'written. Reply with JSON: {"overall": number, "thoughts": [{"thought": number, '
    '"progress": number}, …]} and one entry a thought.'
)
MESSAGES = (
    {"role": "system", "content": INSTRUCTION},
    {
        "role": "user",
        "content": "Problem: {{item.question}}\n\nReference answer: {{item.reference}}\n\n"
        "{{sample.count}} thoughts:\n\n{{sample.thoughts}}\n\nWhole solution:\n\n"
        "{{sample.output_text}}",
    },
)
_USED_BY = {
    "continuations": "rule",
    "path": "fixed",
    **dict.fromkeys(
        ("model", "base_url", "api_key_env", "input", "sampling_params", "timeout_s", "retries",
         "backoff_s", "workers"),
        "model",
    ),
}  # fmt: skip


class GraderConfig(Config):
    """Which grader.

    Attributes:
        kind: "rule", "model" or "fixed".
        continuations: Sampled from behind each thought (rule).
        path: JSONL with `problem_id`, `overall`, `thoughts` and `progress`; a solution with more
            thoughts than are given takes the last values for them (fixed).
        model: The model's name at the endpoint (model).
        base_url: The endpoint, any that is OpenAI-compatible.
        api_key_env: Environment variable with the key.
        input: Chat messages with templates: `item.question`, `item.reference`,
            `sample.output_text`, `sample.thoughts`, `sample.count`.
        sampling_params: Passed on to the endpoint.
        timeout_s: For one request.
        retries: Further tries.
        backoff_s: Wait before the first retry.
        workers: Requests side by side.
    """

    kind: Literal["rule", "model", "fixed"] = "rule"
    continuations: int = Field(default=4, ge=1)
    path: str = ""
    model: str = "default"
    base_url: str = "http://127.0.0.1:8000/v1"
    api_key_env: str = "OPENAI_API_KEY"
    input: tuple[dict[str, Any], ...] = MESSAGES
    sampling_params: dict[str, Any] = {}
    timeout_s: float = Field(default=60.0, gt=0.0)
    retries: int = Field(default=2, ge=0)
    backoff_s: float = Field(default=0.5, ge=0.0)
    workers: int = Field(default=8, ge=1)

    @model_validator(mode="after")
    def _sense(self) -> GraderConfig:
        for key in sorted(self.model_fields_set & set(_USED_BY)):
            plain = type(self).model_fields[key].default
            if _USED_BY[key] != self.kind and getattr(self, key) != plain:
                raise ValueError(f"{key} is for the grader {_USED_BY[key]!r}, not {self.kind!r}")
        if (self.kind == "fixed") != bool(self.path):
            raise ValueError("the grader 'fixed' needs path, a JSONL of grades")
        check_messages(self.input, "grader")
        if self.kind == "model":
            Endpoint(self.base_url, self.model)
            _filled(self, "", "", "", [])  # a template that names what is not there
        return self


class Grader(Protocol):
    """Grades solutions that are cut into segments."""

    def grade(self, problems: list[Problem], sequences: list[Sequence]) -> list[Grades | None]:
        """Return the grades of each; None where there are none.

        Args:
            problems: One a sequence.
            sequences: With `pieces`, `answered`, `reward` and, for the rule, `success`.
        """
        ...


def create_grader(config: GraderConfig) -> Grader:
    """Return the grader that a configuration asks for."""
    if config.kind == "rule":
        return RuleGrader()
    return ModelGrader(config) if config.kind == "model" else FixedGrader(config.path)


def thoughts_of(sequence: Sequence) -> list[str]:
    """Return the texts of a solution's thoughts, without the final answer."""
    return sequence.pieces[:-1] if sequence.answered else list(sequence.pieces)


class RuleGrader:
    """Equations, continuations and the verdict."""

    def grade(self, problems: list[Problem], sequences: list[Sequence]) -> list[Grades | None]:
        """Return the grades of each; None where a verdict is missing."""
        return [self._grade(sequence) for sequence in sequences]

    def _grade(self, sequence: Sequence) -> Grades | None:
        success = list(sequence.success)
        if not sequence.answered:
            success.append(None if sequence.correct is None else float(sequence.correct))
        progress = [share for share in success if share is not None]
        if sequence.reward is None or len(progress) < len(success):
            return None
        found = [step_reward(piece) for piece in thoughts_of(sequence)]
        known = [share for share in found if share is not None]
        rest = sum(known) / len(known) if known else 1.0
        thoughts = [rest if share is None else share for share in found]
        return Grades(sequence.reward, thoughts, progress)


class FixedGrader:
    """Grades from a file.

    Args:
        path: See `GraderConfig.path`.
    """

    def __init__(self, path: str) -> None:
        """Read the file.

        Raises:
            UserError: The file is missing, or a row is no grade.
        """
        self.path = path
        self.rows: dict[str, Grades] = {}
        if not Path(path).is_file():
            raise UserError(
                "method.grader, key 'path'", f"no such file: {path}", "a JSONL of grades", "mend it"
            )
        for number, row in read_rows(Path(path)):
            try:
                grades = Grades(
                    float(row["overall"]),
                    [float(value) for value in row["thoughts"]],
                    [float(value) for value in row["progress"]],
                )
                numbers = [grades.overall, *grades.thoughts, *grades.progress]
                if not all(map(math.isfinite, numbers)):
                    raise ValueError("a number that is not finite")
                if len(grades.thoughts) != len(grades.progress) or not grades.thoughts:
                    raise ValueError("as many `progress` as `thoughts`, at least one, are needed")
                self.rows[row["problem_id"]] = grades
            except (KeyError, TypeError, ValueError) as error:
                raise UserError(
                    f"{path}, line {number}",
                    str(error),
                    "problem_id, overall, and lists thoughts and progress of numbers",
                    "mend the line",
                ) from None

    def grade(self, problems: list[Problem], sequences: list[Sequence]) -> list[Grades | None]:
        """Return the grades of each.

        Raises:
            UserError: A problem has none.
        """
        found: list[Grades | None] = []
        for problem, sequence in zip(problems, sequences, strict=True):
            if problem.id not in self.rows:
                raise UserError(
                    self.path, f"no row of problem {problem.id!r}", "one a problem", "add it"
                )
            given = self.rows[problem.id]
            count = len(thoughts_of(sequence))
            found.append(
                Grades(
                    given.overall,
                    _longer(given.thoughts, count),
                    _longer(given.progress, count),
                )
            )
        return found


class ModelGrader:
    """Asks a chat model.

    Args:
        config: Where, and what.
    """

    def __init__(self, config: GraderConfig) -> None:
        """Keep the endpoint."""
        self.config = config
        self.endpoint = Endpoint(
            config.base_url,
            config.model,
            api_key_env=config.api_key_env,
            timeout_s=config.timeout_s,
            retries=config.retries,
            backoff_s=config.backoff_s,
        )

    def grade(self, problems: list[Problem], sequences: list[Sequence]) -> list[Grades | None]:
        """Return the grades of each; None where no usable reply came."""
        with ThreadPoolExecutor(self.config.workers) as pool:
            return list(pool.map(self._grade, problems, sequences))

    def _grade(self, problem: Problem, sequence: Sequence) -> Grades | None:
        thoughts = thoughts_of(sequence)
        score = {"type": "number"}
        entry = _object({"thought": score, "progress": score})
        schema = _object(
            {
                "overall": score,
                "thoughts": {
                    "type": "array",
                    "items": entry,
                    "minItems": len(thoughts),
                    "maxItems": len(thoughts),
                },
            }
        )
        messages = _filled(self.config, problem.question, problem.answer, sequence.text, thoughts)
        try:
            return self.endpoint.ask(
                messages,
                self.config.sampling_params,
                schema,
                lambda reply: read_grades(reply, len(thoughts)),
            )
        except GraderError:
            return None


def read_grades(reply: str, count: int) -> Grades:
    """Read a model's reply, strictly.

    Args:
        reply: JSON text.
        count: Thoughts that were asked about.

    Raises:
        ValueError: Not the object that was asked for, not `count` entries, or a number that is
            none or outside [0, 1]; nothing is clipped or filled in.
    """
    found = json.loads(reply)
    if not isinstance(found, dict) or set(found) != {"overall", "thoughts"}:
        raise ValueError(f"reply {reply!r:.80}, expected an object with overall and thoughts")
    entries = found["thoughts"]
    if not isinstance(entries, list) or len(entries) != count:
        raise ValueError(f"reply {reply!r:.80}, expected a list of {count} thoughts")
    for entry in entries:
        if not isinstance(entry, dict) or set(entry) != {"thought", "progress"}:
            raise ValueError(f"entry {entry!r:.80}, expected thought and progress")
    return Grades(
        _score(found["overall"]),
        [_score(entry["thought"]) for entry in entries],
        [_score(entry["progress"]) for entry in entries],
    )


def _score(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{value!r:.80} is no number")
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"score {value} is outside [0, 1]")
    return float(value)


def _object(properties: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def _filled(
    config: GraderConfig, question: str, reference: str, text: str, thoughts: Items[str]
) -> list[dict[str, Any]]:
    numbered = "\n\n".join(f"[{n}] {t.strip()}" for n, t in enumerate(thoughts, start=1))
    sample = {"output_text": text, "thoughts": numbered, "count": len(thoughts)}
    try:
        return filled_messages(config.input, {"question": question, "reference": reference}, sample)
    except TemplateError as error:
        raise ValueError(str(error)) from None


def _longer(values: list[float], count: int) -> list[float]:
    return [values[min(k, len(values) - 1)] for k in range(count)]
