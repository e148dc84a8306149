"""Form, not content: a box that is there and complete, think tags well-formed."""

from __future__ import annotations

import re
import time

from ..boxes import last_boxes
from . import Checker, Outcome, Verdict

_THINK = re.compile(r"</?think(?:ing)?\s*>", re.IGNORECASE)
_ANSWER = re.compile(r"</?answer\s*>", re.IGNORECASE)


class FormatChecker(Checker):
    r"""Right when the text keeps every required form; the score is the share kept.

    Args:
        box: Require a complete, non-empty box after any thinking.
        think: Require exactly one pair of think tags, at the start, with thought
            inside and text after; without it, tags may be absent but not malformed.
        answer_tag: Require exactly one non-empty pair of answer tags.
        opened: The prompt has already opened the think tag.
    """

    examples = (
        ("7", r"<think>2+5</think> It is \boxed{7}.", "correct"),
        ("7", r"<think>2+5 \boxed{7}", "incorrect"),
        ("7", "It is 7.", "incorrect"),
    )

    def __init__(
        self,
        *,
        box: bool = True,
        think: bool = False,
        answer_tag: bool = False,
        opened: bool = False,
    ) -> None:
        """Remember what is required."""
        self.box, self.think, self.answer_tag, self.opened = box, think, answer_tag, opened

    def check(self, gold: str, text: str) -> Verdict:
        """Judge the form; the gold plays no part."""
        started = time.perf_counter()
        after, thought = self._after_thinking(text)
        kept = {"think": thought}
        if self.box:
            boxes = last_boxes(text, after) if after is not None else []
            kept["box"] = bool(boxes) and bool((boxes[-1].content or "").strip())
        if self.answer_tag:
            kept["answer_tag"] = _pair(_ANSWER, text, after or 0)
        missed = [name for name, good in kept.items() if not good]
        score = 1.0 - len(missed) / len(kept)
        return Verdict(
            Outcome.INCORRECT if missed else Outcome.CORRECT,
            rule="format",
            ms=(time.perf_counter() - started) * 1000.0,
            detail=f"malformed: {', '.join(missed)}" if missed else None,
            score=score,
        )

    def _after_thinking(self, text: str) -> tuple[int | None, bool]:
        """Where the answer starts, and whether the tags are as required."""
        tags = list(_THINK.finditer(text))
        kinds = ["close" if m.group().startswith("</") else "open" for m in tags]
        if self.opened:
            kinds.insert(0, "open")
        if not kinds:
            return 0, not self.think
        if kinds != ["open", "close"]:
            return (tags[-1].end() if kinds[-1] == "close" else None), False
        begin = 0 if self.opened else tags[0].end()
        inside = text[begin : tags[-1].start()].strip()
        leading = self.opened or not text[: tags[0].start()].strip()
        after = tags[-1].end()
        return after, bool(inside) and leading and bool(text[after:].strip())


def _pair(pattern: re.Pattern[str], text: str, begin: int) -> bool:
    tags = list(pattern.finditer(text, begin))
    if len(tags) != 2 or tags[0].group().startswith("</") or not tags[1].group().startswith("</"):
        return False
    return bool(text[tags[0].end() : tags[1].start()].strip())
