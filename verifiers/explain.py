"""`python -m verifiers "gold" "text"`: a verdict, step by step."""

from __future__ import annotations

from collections.abc import Iterator

from .extract import extract
from .judge import choice_wanted, read_gold, verify
from .reading import read

_SHOWN = 300


def explain(gold: str, text: str, policy: str = "boxed") -> Iterator[str]:
    """Tell how a verdict comes about.

    Args:
        gold: The gold.
        text: The completion or answer.
        policy: How the answer is found.

    Yields:
        Lines for a person.
    """
    yield f"gold         {_short(gold)}"
    wanted = read_gold(gold)
    yield from _reading("gold", wanted.nodes, wanted.normal, wanted.problem)
    found = extract(text, policy, choice=choice_wanted(gold))
    yield f"policy       {policy}"
    if not found.candidates:
        yield f"extraction   none: {found.reason}"
    for index, candidate in enumerate(found.candidates, start=1):
        yield (
            f"candidate {index}  {_short(candidate.text)}  by {candidate.source}, "
            f"characters {candidate.start} to {candidate.end}"
        )
        reading = read(candidate.text)
        yield from _reading("  reads", reading.nodes, reading.normal, reading.problem)
        if reading.nodes:
            break
    verdict = verify(gold, text, policy=policy)
    yield f"rule         {verdict.rule}"
    if verdict.detail:
        yield f"detail       {verdict.detail}"
    yield f"verdict      {verdict.outcome.value} in {verdict.ms:.3f} ms"


def _reading(name: str, nodes: tuple, normal: str, problem: str) -> Iterator[str]:
    yield f"{name:<12} normal form: {_short(normal)}"
    if not nodes:
        yield f"{'':<12} cannot be read: {problem}"
    for node in nodes:
        yield f"{'':<12} as {_KINDS.get(node[0], 'expression')}"


_KINDS = {
    "num": "a rational number", "dec": "a decimal", "list": "a list", "set": "a set",
    "group": "a tuple or interval", "rel": "a relation", "matrix": "a matrix", "qty": "a quantity",
    "ratio": "a ratio", "clock": "a time of day", "date": "a date", "word": "a word",
    "text": "words", "choice": "a choice", "setop": "a set of numbers", "std": "a number set",
    "builder": "a set builder", "pct": "a percentage", "deg": "an angle", "sym": "a symbol",
    "based": "a number in a base",
}  # fmt: skip


def _short(text: str) -> str:
    shown = text if len(text) <= _SHOWN else f"{text[:_SHOWN]}... ({len(text)} characters)"
    return repr(shown)
