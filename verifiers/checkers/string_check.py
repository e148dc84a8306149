"""OpenAI's `string_check` grader: eq, ne, like, ilike."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ._grader import Grader, check_type, fill

OPERATIONS = ("eq", "ne", "like", "ilike")


class StringCheckGrader(Grader):
    """Score 1 when the operation holds between input and reference, else 0.

    `eq` and `ne` compare exactly; `like` asks whether the input contains the
    reference, `ilike` the same without regard to case.

    Args:
        operation: One of `OPERATIONS`.
        input: Template of the text.
        reference: Template of what it is compared with.
        type: `string_check`.
        name: Any name.
    """

    type_name = "string_check"
    examples = (
        ("cat", "cat", "correct"),
        ("cat", "Cat", "incorrect"),
    )

    def __init__(
        self,
        operation: str = "eq",
        input: str = "{{sample.output_text}}",  # noqa: A002 -- the name in the JSON
        reference: str = "{{item.reference}}",
        type: str | None = None,  # noqa: A002
        name: str = "string_check",
    ) -> None:
        """Check the options.

        Raises:
            ValueError: An unknown operation or another type.
        """
        check_type(type, self.type_name)
        if operation not in OPERATIONS:
            raise ValueError(
                f"string_check: operation is {operation!r}, expected one of {', '.join(OPERATIONS)}"
            )
        self.operation, self.input, self.reference, self.name = operation, input, reference, name

    def grade(self, item: Mapping[str, Any], sample: Mapping[str, Any]) -> tuple[float, str | None]:
        """Compare."""
        text, reference = fill(self.input, item, sample), fill(self.reference, item, sample)
        holds = {
            "eq": lambda: text == reference,
            "ne": lambda: text != reference,
            "like": lambda: reference in text,
            "ilike": lambda: reference.casefold() in text.casefold(),
        }[self.operation]()
        return float(holds), None
