"""OpenAI's `label_model` grader: a model gives a label."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ._endpoint import Endpoint, check_messages, filled_messages
from ._grader import Grader, check_type

_INSTRUCTION = (
    "Say whether the answer agrees with the reference. "
    'Reply with JSON: {"label": "correct"} or {"label": "incorrect"}.'
)
_INPUT = (
    {"role": "system", "content": _INSTRUCTION},
    {"role": "user", "content": "Reference: {{item.reference}}\n\nAnswer: {{sample.output_text}}"},
)  # fmt: skip


class LabelModelGrader(Grader):
    """Score 1 when the model's label is a passing one, else 0.

    The reply must be a JSON object whose `label` is one of the labels, or one of the
    labels and nothing else. Anything else is asked for again and ends as `error`.

    Args:
        model: The model's name at the endpoint.
        input: Chat messages with templates.
        labels: All labels.
        passing_labels: Those that pass.
        sampling_params: Passed on to the endpoint.
        base_url: The endpoint, any that is OpenAI-compatible.
        api_key_env: Environment variable with the key.
        timeout_s: For one request.
        retries: Further tries.
        backoff_s: Wait before the first retry.
        type: `label_model`.
        name: Any name.
    """

    type_name = "label_model"
    needs_endpoint = True

    def __init__(
        self,
        model: str = "default",
        input: Sequence[Mapping[str, Any]] = _INPUT,  # noqa: A002 -- the name in the JSON
        labels: Sequence[str] = ("correct", "incorrect"),
        passing_labels: Sequence[str] = ("correct",),
        sampling_params: Mapping[str, Any] | None = None,
        base_url: str = "http://127.0.0.1:8000/v1",
        api_key_env: str = "OPENAI_API_KEY",
        timeout_s: float = 60.0,
        retries: int = 2,
        backoff_s: float = 0.5,
        type: str | None = None,  # noqa: A002
        name: str = "label_model",
    ) -> None:
        """Check the options.

        Raises:
            ValueError: Labels that do not fit together, or wrong messages.
        """
        check_type(type, self.type_name)
        check_messages(input, "label_model")
        if len(set(labels)) != len(labels) or len(labels) < 2:
            raise ValueError(f"label_model: labels is {list(labels)}, expected two or more")
        if not passing_labels or not set(passing_labels) <= set(labels):
            raise ValueError(
                f"label_model: passing_labels is {list(passing_labels)}, expected some of "
                f"{list(labels)}"
            )
        self.labels, self.passing = list(labels), set(passing_labels)
        self.messages, self.name = list(input), name
        self.sampling = dict(sampling_params or {})
        self.endpoint = Endpoint(
            base_url, model, api_key_env=api_key_env, timeout_s=timeout_s, retries=retries,
            backoff_s=backoff_s,
        )  # fmt: skip

    def grade(self, item: Mapping[str, Any], sample: Mapping[str, Any]) -> tuple[float, str | None]:
        """Ask the model."""
        schema = {
            "type": "object",
            "properties": {"label": {"type": "string", "enum": self.labels}},
            "required": ["label"],
            "additionalProperties": False,
        }
        messages = filled_messages(self.messages, item, sample)
        label = self.endpoint.ask(messages, self.sampling, schema, self._read)
        return float(label in self.passing), f"label {label!r}"

    def _read(self, reply: str) -> str:
        """Read the label of a reply, strictly.

        Raises:
            ValueError: Not one of the labels.
        """
        label: Any = reply.strip()
        if label not in self.labels:
            found = json.loads(reply)
            label = found.get("label") if isinstance(found, dict) else found
        if label not in self.labels:
            raise ValueError(f"reply {reply!r:.80} is none of {self.labels}")
        return str(label)
