"""OpenAI's `score_model` grader: a model gives a number."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from ._endpoint import Endpoint, check_messages, filled_messages
from ._grader import Grader, check_type

_INSTRUCTION = 'Grade the answer between 0 and 1. Reply with JSON: {"result": number}.'
_INPUT = (
    {"role": "system", "content": _INSTRUCTION},
    {"role": "user", "content": "Reference: {{item.reference}}\n\nAnswer: {{sample.output_text}}"},
)  # fmt: skip


class ScoreModelGrader(Grader):
    """Score: the number in the model's reply.

    The reply must be a JSON object with a number under `result` (or `score`), or a
    number and nothing else; a number outside the range is refused, not clipped.
    Unusable replies are asked for again and end as `error`.

    Args:
        model: The model's name at the endpoint.
        input: Chat messages with templates.
        range: Smallest and largest score.
        pass_threshold: From where on it passes; the middle of the range by default.
        sampling_params: Passed on to the endpoint.
        base_url: The endpoint, any that is OpenAI-compatible.
        api_key_env: Environment variable with the key.
        timeout_s: For one request.
        retries: Further tries.
        backoff_s: Wait before the first retry.
        type: `score_model`.
        name: Any name.
    """

    type_name = "score_model"
    needs_endpoint = True

    def __init__(
        self,
        model: str = "default",
        input: Sequence[Mapping[str, Any]] = _INPUT,  # noqa: A002 -- the name in the JSON
        range: Sequence[float] = (0.0, 1.0),  # noqa: A002
        pass_threshold: float | None = None,
        sampling_params: Mapping[str, Any] | None = None,
        base_url: str = "http://127.0.0.1:8000/v1",
        api_key_env: str = "OPENAI_API_KEY",
        timeout_s: float = 60.0,
        retries: int = 2,
        backoff_s: float = 0.5,
        type: str | None = None,  # noqa: A002
        name: str = "score_model",
    ) -> None:
        """Check the options.

        Raises:
            ValueError: A range that is none, a threshold outside it, wrong messages.
        """
        check_type(type, self.type_name)
        check_messages(input, "score_model")
        if len(range) != 2 or not range[0] < range[1] or not all(map(math.isfinite, range)):
            raise ValueError(f"score_model: range is {list(range)}, expected [low, high]")
        self.low, self.high = float(range[0]), float(range[1])
        middle = (self.low + self.high) / 2
        self.pass_threshold = middle if pass_threshold is None else float(pass_threshold)
        if not self.low <= self.pass_threshold <= self.high:
            raise ValueError(
                f"score_model: pass_threshold is {pass_threshold}, expected within {list(range)}"
            )
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
            "properties": {"result": {"type": "number"}},
            "required": ["result"],
            "additionalProperties": False,
        }
        messages = filled_messages(self.messages, item, sample)
        return self.endpoint.ask(messages, self.sampling, schema, self._read), None

    def _read(self, reply: str) -> float:
        """Read the number of a reply, strictly.

        Raises:
            ValueError: No number, more than a number, or one out of range.
        """
        found = json.loads(reply)
        if isinstance(found, dict):
            keys = [key for key in ("result", "score") if key in found]
            if len(keys) != 1:
                raise ValueError(f"reply has keys {sorted(found)}, expected result")
            found = found[keys[0]]
        if isinstance(found, bool) or not isinstance(found, (int, float)):
            raise ValueError(f"reply {reply!r:.80} is no number")
        if not self.low <= found <= self.high:
            raise ValueError(f"score {found} is outside [{self.low}, {self.high}]")
        return float(found)
