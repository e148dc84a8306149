"""What the graders in the JSON form of OpenAI's reinforcement fine-tuning share.

A grader's options are that JSON object as it is, `type` and `name` included. Its
texts are templates: `{{item.x}}` reads the row, `{{sample.output_text}}` the
model's text, `{{sample.output_json.x}}` that text read as JSON.

Source: platform.openai.com/docs/guides/graders. Deviations are in each file.
"""

from __future__ import annotations

import contextlib
import json
import re
import time
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

from ..verdict import elapsed_ms
from . import Checker, Outcome, Verdict, load_checker

TYPES = ("string_check", "text_similarity", "score_model", "label_model", "multi")
_FIELD = re.compile(r"\{\{\s*([^{}]+?)\s*\}\}")
_PATH = re.compile(r"(item|sample)((?:\.[A-Za-z_]\w*|\[\d+\]|\.\d+)*)")


class TemplateError(ValueError):
    """A template asks for what is not there."""


class GraderError(RuntimeError):
    """A grader could not grade: no endpoint, no number in its reply."""


class Grader(Checker):
    """A checker that gives a score.

    `check` reads the gold as the row (`item`) when it is a JSON object, and
    otherwise as a row whose `reference`, `reference_answer`, `answer` and `gold`
    are all the gold. The verdict is correct from `pass_threshold` on.
    """

    type_name = ""
    pass_threshold = 1.0

    def check(self, gold: str, text: str) -> Verdict:
        """Grade a text; a grader that cannot is `error`, never wrong."""
        started = time.perf_counter()
        try:
            score, detail = self.grade(item_of(gold), sample_of(text))
        except TemplateError as error:
            return Verdict(
                Outcome.ERROR, rule="template", ms=elapsed_ms(started), detail=str(error)
            )
        except (GraderError, ArithmeticError, OSError, LookupError) as error:
            detail = f"{type(error).__name__}: {error}"
            return Verdict(
                Outcome.ERROR, rule=self.type_name, ms=elapsed_ms(started), detail=detail
            )
        outcome = Outcome.CORRECT if score >= self.pass_threshold else Outcome.INCORRECT
        return Verdict(
            outcome,
            text,
            (0, len(text)),
            rule=self.type_name,
            ms=elapsed_ms(started),
            detail=detail,
            score=score,
        )

    @abstractmethod
    def grade(self, item: Mapping[str, Any], sample: Mapping[str, Any]) -> tuple[float, str | None]:
        """Grade a sample.

        Args:
            item: The row.
            sample: `output_text` and, when that text is JSON, `output_json`.

        Returns:
            The score, and a detail for the verdict.

        Raises:
            TemplateError: A template asks for what is not there.
            GraderError: It could not be graded.
        """


def item_of(gold: str) -> dict[str, Any]:
    """Return the row that a gold stands for."""
    if gold.lstrip().startswith("{"):
        try:
            found = json.loads(gold)
        except (ValueError, RecursionError):
            found = None
        if isinstance(found, dict):
            return found
    return dict.fromkeys(("reference", "reference_answer", "answer", "gold"), gold)


def sample_of(text: str) -> dict[str, Any]:
    """Return the sample of a text."""
    sample: dict[str, Any] = {"output_text": text}
    with contextlib.suppress(ValueError, RecursionError):
        sample["output_json"] = json.loads(text)
    return sample


def fill(template: str, item: Mapping[str, Any], sample: Mapping[str, Any]) -> str:
    """Fill in a template.

    A field's own text is never read as a template again.

    Args:
        template: Text with `{{item.x}}` and `{{sample.x}}`.
        item: The row.
        sample: The sample.

    Returns:
        The text.

    Raises:
        TemplateError: A field that is not there; the message lists what is.
    """

    def value(match: re.Match[str]) -> str:
        found = _look_up(match.group(1), {"item": item, "sample": sample})
        return found if isinstance(found, str) else json.dumps(found, ensure_ascii=False)

    return _FIELD.sub(value, template)


def _look_up(path: str, names: Mapping[str, Mapping[str, Any]]) -> Any:
    match = _PATH.fullmatch(path)
    if match is None:
        raise TemplateError(f"template field {path!r} is not of the form item.x or sample.x")
    value: Any = names[match.group(1)]
    for key in re.findall(r"\w+", match.group(2)):
        if isinstance(value, Mapping) and key in value:
            value = value[key]
        elif isinstance(value, list) and key.isdigit() and int(key) < len(value):
            value = value[int(key)]
        else:
            there = sorted(value) if isinstance(value, Mapping) else type(value).__name__
            raise TemplateError(f"template field {path!r}: no {key!r}; found {there}")
    return value


def check_type(found: str | None, expected: str) -> None:
    """Refuse the JSON of another grader.

    Raises:
        ValueError: `found` is not `expected`.
    """
    if found is not None and found != expected:
        raise ValueError(f"grader 'type' is {found!r}, expected {expected!r}")


def build(options: Mapping[str, Any], where: str) -> Grader:
    """Build a grader from its JSON object.

    Args:
        options: The object with its `type`.
        where: What to call it in an error.

    Returns:
        The grader.

    Raises:
        ValueError: No type, an unknown one, or wrong options.
    """
    kind = options.get("type")
    if kind not in TYPES:
        raise ValueError(f"{where}: type is {kind!r}, expected one of {', '.join(TYPES)}")
    built = load_checker(str(kind), options)
    if not isinstance(built, Grader):
        raise ValueError(f"{where}: {kind!r} is no grader")
    return built
