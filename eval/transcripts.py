r"""Transcripts of tool-integrated reasoning: text, programs and what they printed.

A program stands between "```python" and "```", what it printed between "```output" and "```",
as in ToRA, Qwen2.5-Math and DeepSeekMath.
"""

from __future__ import annotations

import re

PROGRAM = re.compile(r"```python[ \t]*\n(.*?)```", re.DOTALL)
OUTPUT = re.compile(r"```output[ \t]*\n(.*?)```", re.DOTALL)
_BOX = re.compile(r"\\(?:boxed|fbox)\b")


def answer_text(transcript: str) -> str:
    r"""Return the part of a transcript that a checker should read.

    A box decides, wherever it stands outside programs and their output. Without one, what the
    last program printed last is the answer: models often go on to say it in words, with other
    numbers in the sentence. Without either, the transcript without its programs.

    Args:
        transcript: Everything after the question.
    """
    outputs = OUTPUT.findall(transcript)
    prose = PROGRAM.sub("", OUTPUT.sub("", transcript))
    if _BOX.search(prose) or not outputs:
        return prose
    lines = [line.strip() for line in outputs[-1].splitlines() if line.strip()]
    # A traceback is no answer; the prose may still hold one.
    if not lines or "Error" in lines[-1] or lines[0].startswith("Traceback"):
        return prose
    return f"\\boxed{{{lines[-1]}}}"
