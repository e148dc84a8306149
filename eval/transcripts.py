r"""Transcripts of tool-integrated reasoning: text, programs and what they printed.

A program stands between "```python" and "```", what it printed between "```output" and "```",
as in ToRA, Qwen2.5-Math and DeepSeekMath.
"""

from __future__ import annotations

import re

PROGRAM = re.compile(r"```python[ \t]*\n(.*?)```", re.DOTALL)
OUTPUT = re.compile(r"```output[ \t]*\n(.*?)```", re.DOTALL)
_FRACTION = re.compile(r"\bFraction\((-?\d+), (\d+)\)")
_MATRIX = re.compile(r"\b(?:Immutable(?:Dense)?)?Matrix\(\[(\[[^()]*\])\]\)")
# As many digits as only the shortest text of a float has that is no short decimal.
_FLOAT = re.compile(r"(?<![\w.])\d+\.\d{13,}(?:e[-+]\d+)?(?![\w.])")
_J = re.compile(r"(?<![A-Za-z_])(\d+(?:\.\d+)?)j\b")
_CONSTANT = re.compile(r"(?<![A-Za-z_0-9.])[IE](?![A-Za-z_0-9])")
# A sentence: there an I is no number.
_WORD = re.compile(r"[A-Za-z]{3,} +[A-Za-z]{2,}|\bI +[a-z]")
_DICT = re.compile(r"\[?\{(.+:.+)\}\]?")
_PAIR = re.compile(r"'?([A-Za-z]\w*)'?: ([^:]+?)(?=, '?[A-Za-z]\w*'?: |$)")
_LONGEST = 500
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
    return f"\\boxed{{{spelled(lines[-1])}}}"


def spelled(line: str) -> str:
    r"""Return a line that Python printed as mathematics spells it.

    What `print` shows of numbers, fractions, complex numbers, dictionaries and sympy's values:
    `Fraction(1, 2)`, `(1+2j)`, `2*I`, `E**2`, `{x: 3}`, `Matrix([[1], [2]])`, `set()`. A float with
    all its digits loses those that are the noise of its last bit (0.30000000000000004).
    """
    if len(line) > _LONGEST:
        return line  # what follows takes more than linear time
    if line in ("[]", "()", "set()", "{}", "EmptySet"):
        return r"\emptyset"
    line = _FRACTION.sub(r"(\1)/(\2)", line)
    line = _MATRIX.sub(_matrix, line)
    line = _FLOAT.sub(lambda match: f"{float(match.group()):.12g}", line)
    if len(line) > 1 and not _WORD.search(line):  # a letter alone is a choice
        line = _J.sub(r"\1i", line)
        line = _CONSTANT.sub(lambda match: match.group().lower(), line)
    found = _DICT.fullmatch(line)
    if found is not None:
        pairs = _PAIR.findall(found.group(1))
        return ", ".join(f"{name} = {value.strip()}" for name, value in pairs)
    return line


def _matrix(match: re.Match[str]) -> str:
    rows = re.findall(r"\[([^\[\]]*)\]", match.group(1))
    body = r" \\ ".join(row.replace(",", " & ") for row in rows)
    return rf"\begin{{pmatrix}} {body} \end{{pmatrix}}"
