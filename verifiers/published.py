r"""The extraction of published graders, so that their numbers can be compared.

Only which stretch of the text is the answer follows the published code; whether
it equals the gold is decided by this suite. Their quirks are kept on purpose:
they take the first of several marks, read past an unterminated box, or fall back
to the last number.

| policy | source |
|---|---|
| `gsm8k_strict` | openai/grade-school-math, and lm-evaluation-harness `strict-match` |
| `gsm8k_flexible` | lm-evaluation-harness `gsm8k.yaml`, filter `flexible-extract` |
| `minerva` | Lewkowycz et al. 2022, appendix D; lm-evaluation-harness `minerva_math` |
| `qwen25_math` | QwenLM/Qwen2.5-Math `evaluation/parser.py`, `extract_answer` |
| `deepseek_math` | deepseek-ai/DeepSeek-Math `answer_extraction.py`, `extract_answer` |
| `deepseek_math_zh` | the same file, the rule for CMATH |
"""

from __future__ import annotations

import re

from .extract import Candidate, Extraction, last_match

_GSM8K = re.compile(r"#### (-?[0-9.,]+)")
_FLEXIBLE = re.compile(r"-?[$0-9.,]{2,}|-?[0-9]+")
_MINERVA = re.compile(r"Final Answer: The final answer is(.*?). I hope it is correct.")
_MINERVA_END = "I hope it is correct."
_NUMBER = re.compile(r"-?[\d,]*\.?\d[\d,]*(?:\.\d+)?")
_ZH_NUMBER = re.compile(r"-?\d+\.?\d*")

Span = tuple[int, int]


def extract(text: str, policy: str) -> Extraction:
    """Find the answer of a text as a published grader does.

    Args:
        text: A completion.
        policy: One of `POLICIES`.

    Returns:
        At most one candidate.

    Raises:
        ValueError: An unknown policy.
    """
    rule = _RULES.get(policy)
    if rule is None:
        from .extract import check_policy

        check_policy(policy)
        raise ValueError(f"policy {policy!r} has no published rule")
    span = rule(text)
    if span is None or not text[span[0] : span[1]].strip():
        return Extraction((), f"no_{policy}_answer")
    return Extraction((Candidate(text[span[0] : span[1]], *span, policy),))


def _gsm8k_strict(text: str) -> Span | None:
    """The number after the first `####`."""
    match = _GSM8K.search(text)
    return match.span(1) if match else None


def _gsm8k_flexible(text: str) -> Span | None:
    """The last thing that looks like a number."""
    last = last_match(_FLEXIBLE, text)
    return last.span() if last else None


def _minerva(text: str) -> Span | None:
    """Between "The final answer is" and ". I hope it is correct", the first time."""
    match = _MINERVA.search(text + _MINERVA_END)
    if match is None:
        return None
    start, end = match.start(1), min(match.end(1), len(text))
    # What stands after the last "=" is the answer, inside the first formula.
    formula = re.compile(r"\$(.*?)\$").search(text, start, end)
    if formula is not None:
        start, end = formula.span(1)
    equals = text.rfind("=", start, end)
    return (equals + 1 if equals >= 0 else start), end


def _between_dollars(text: str) -> Span | None:
    """The Minerva form that both Qwen and DeepSeek look for first."""
    start = text.find("final answer is $")
    if start < 0 or "$. I hope" not in text:
        return None
    start += len("final answer is $")
    end = text.find("$. I hope", start)
    return start, len(text) if end < 0 else end


def _after_last(text: str, mark: str) -> Span:
    return text.rfind(mark) + len(mark), len(text)


def _last_number(text: str) -> Span | None:
    last = last_match(_NUMBER, text)
    return last.span() if last else None


def _qwen(text: str) -> Span | None:
    span = _between_dollars(text)
    if span is None and "boxed" in text:
        span = _open_box(text)
    elif span is None and "he answer is" in text:
        span = _after_last(text, "he answer is")
    elif span is None and "final answer is" in text:
        span = _after_last(text, "final answer is")
    elif span is None and "答案是" in text:
        start = text.find("答案是") + 3
        again = text.find("答案是", start)
        end = len(text) if again < 0 else again
        while start < end and text[start].isspace():
            start += 1
        blank = text.find("\n\n", start, end)
        span = start, end if blank < 0 else blank
    elif span is None:
        span = _last_number(text)
    return None if span is None else _shaved(text, span, marks=(":", "./"))


def _open_box(text: str) -> Span:
    """The last box, complete or not; without a brace up to the next dollar sign."""
    start = text.rfind("boxed") + len("boxed")
    if text[start : start + 1] != "{":
        dollar = text.find("$", start)
        return start, len(text) if dollar < 0 else dollar
    close = _closing(text, start + 1)
    return start + 1, len(text) if close is None else close


def _closing(text: str, start: int) -> int | None:
    depth = 1
    for match in re.compile("[{}]").finditer(text, start):
        depth += 1 if match.group() == "{" else -1
        if depth == 0:
            return match.start()
    return None


def _deepseek(text: str) -> Span | None:
    span = _between_dollars(text)
    if span is None and "boxed" in text:
        span = _last_closed_box(text)
    elif span is None and "he answer is" in text:
        span = _after_last(text, "he answer is")
    elif span is None:
        span = _program_output(text) or _last_number(text)
    if span is None:
        return None
    start, end = _stripped(text, span)
    line = text.find("\n", start, end)
    return _shaved(text, (start, end if line < 0 else line), marks=(":" * 8, "./"))


def _last_closed_box(text: str) -> Span | None:
    """The last box that is complete; a percent sign right after it belongs to it."""
    starts = [m.end() for m in re.finditer(r"boxed\{", text)]
    for index in range(len(starts) - 1, -1, -1):
        # A box is read up to where the next one opens, as the published split does.
        limit = starts[index + 1] - len("boxed{") if index + 1 < len(starts) else len(text)
        close = _closing(text[:limit], starts[index])
        if close is not None:
            return starts[index], close
    return None


def _program_output(text: str) -> Span | None:
    mark = text.rfind("```output")
    if mark < 0:
        return None
    start = mark + len("```output")
    end = text.find("```", start)
    span = _stripped(text, (start, len(text) if end < 0 else end))
    return span if span[0] < span[1] else None


def _deepseek_zh(text: str) -> Span | None:
    """The last number of the line after the first 答案是; else as `deepseek_math`."""
    mark = text.find("答案是")
    if mark < 0:
        return _deepseek(text)
    start, end = _stripped(text, (mark + 3, len(text)))
    line = text.find("\n", start, end)
    last = last_match(_ZH_NUMBER, text, start, end if line < 0 else line)
    return last.span() if last else None


def _stripped(text: str, span: Span) -> Span:
    start, end = span
    while start < end and text[start].isspace():
        start += 1
    while end > start and text[end - 1].isspace():
        end -= 1
    return start, end


def _shaved(text: str, span: Span, marks: tuple[str, str]) -> Span:
    """Take off the leading colons and the trailing full stop and slash."""
    start, end = _stripped(text, span)
    for mark in marks[0]:
        if text[start : start + 1] == mark and start < end:
            start += 1
    for mark in marks[1]:
        if end > start and text[end - 1] == mark:
            end -= 1
    return _stripped(text, (start, end))


_RULES = {
    "gsm8k_strict": _gsm8k_strict,
    "gsm8k_flexible": _gsm8k_flexible,
    "minerva": _minerva,
    "qwen25_math": _qwen,
    "deepseek_math": _deepseek,
    "deepseek_math_zh": _deepseek_zh,
}
POLICIES: tuple[str, ...] = tuple(_RULES)
