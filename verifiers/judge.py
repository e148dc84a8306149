"""Text in, verdict out: extraction, the cheap path, then the parser's rules."""

from __future__ import annotations

import time
from functools import lru_cache

from . import quick
from .budget import SECONDS, OutOfTimeError, deadline
from .compare import matches
from .equality import UndecidedError
from .extract import Candidate, Extraction, extract
from .reading import Reading, read
from .symbolic import NEEDS_ISOLATION
from .verdict import Outcome, Verdict

_LIMIT_CHARS = 1_000_000


def verify(gold: str, text: str, *, policy: str = "boxed") -> Verdict:
    r"""Judge a completion against a gold answer.

    In this process, without a process of its own: always bounded by size and
    work limits, but not protected against running out of memory. For streams of
    model output use `verify_many` or a `VerifierPool`.

    Args:
        gold: The right answer, with or without `\boxed{}` or `$`.
        text: A completion, or a bare answer under `policy="answer"`.
        policy: How the answer is found, see `extract.POLICIES` and
            `published.POLICIES`.

    Returns:
        The verdict.

    Raises:
        ValueError: An unknown policy.
        TypeError: `gold` or `text` is not a string.
    """
    verdict = verify_quick(gold, text, policy=policy)
    return verify_slow(gold, text, policy=policy) if verdict is None else verdict


def verify_quick(gold: str, text: str, *, policy: str = "boxed") -> Verdict | None:
    """Decide by extraction and the cheap path alone.

    Args:
        gold: As in `verify`.
        text: As in `verify`.
        policy: As in `verify`.

    Returns:
        The verdict, or None when the parser must decide.
    """
    started = time.perf_counter()
    for name, value in (("gold", gold), ("text", text)):
        if not isinstance(value, str):
            raise TypeError(
                f"verify: {name} is {type(value).__name__}, expected str; "
                "write numbers as text, and leave rows without an answer out"
            )
    known = _gold(gold)
    if len(text) > _LIMIT_CHARS:
        text_tail = f"text has {len(text)} characters, more than {_LIMIT_CHARS}"
        return _verdict(started, Outcome.ERROR, "text_too_long", detail=text_tail)
    if not known[0]:
        return _verdict(started, Outcome.GOLD_UNPARSEABLE, "empty_gold")
    found = extract(text, policy, choice=known[2])
    return _at_once(started, known, found)


def verify_slow(gold: str, text: str, *, policy: str = "boxed") -> Verdict:
    """Decide with every rule; `verify_quick` has returned None.

    Args:
        gold: As in `verify`.
        text: As in `verify`.
        policy: As in `verify`.

    Returns:
        The verdict.
    """
    started = time.perf_counter()
    known = _gold(gold)
    found = extract(text, policy, choice=known[2])
    try:
        wanted = read_gold(gold)
        answer, reading = _first_readable(found.candidates)
    except Exception as error:  # a slip of ours must not end a run; fuzzing looks for it
        detail = f"{type(error).__name__}: {error}"
        return _verdict(started, Outcome.ERROR, "internal", found.candidates[0], detail=detail)
    shown = (answer, wanted.normal, reading.normal)
    if wanted.squeezed and reading.squeezed == wanted.squeezed:
        return _verdict(started, Outcome.CORRECT, "same_text", *shown)
    if not wanted.nodes:
        detail = f"the gold cannot be read: {wanted.problem}"
        return _verdict(started, Outcome.GOLD_UNPARSEABLE, "gold_unread", *shown, detail=detail)
    if not reading.nodes:
        detail = f"the answer cannot be read whole: {reading.problem}"
        return _verdict(started, Outcome.INCORRECT, "answer_unread", *shown, detail=detail)
    try:
        with deadline():
            rule = _compare(wanted, reading)
    except OutOfTimeError:
        detail = f"comparing took more than {SECONDS} s"
        return _verdict(started, Outcome.TIMEOUT, "timeout", *shown, detail=detail)
    except UndecidedError as error:
        return _undecided(started, gold, text, policy, shown, str(error))
    except RecursionError:
        return _undecided(started, gold, text, policy, shown, "too_deep")
    except Exception as error:  # a slip of ours must not end a run; fuzzing looks for it
        detail = f"{type(error).__name__}: {error}"
        return _verdict(started, Outcome.ERROR, "internal", *shown, detail=detail)
    if rule is None:
        return _verdict(started, Outcome.INCORRECT, "different", *shown)
    return _verdict(started, Outcome.CORRECT, rule, *shown)


def _first_readable(candidates: tuple[Candidate, ...]) -> tuple[Candidate, Reading]:
    """The first candidate that can be read whole; formulas before mere words."""
    readings = []
    for candidate in candidates:
        reading = read(candidate.text)
        if reading.nodes and (reading.nodes[0][0] != "text" or len(candidates) == 1):
            return candidate, reading
        readings.append(reading)
    return candidates[0], readings[0]


def _compare(wanted: Reading, reading: Reading) -> str | None:
    """Compare every way to read one side with every way to read the other."""
    undecided: UndecidedError | None = None
    for gold in wanted.nodes:
        for answer in reading.nodes:
            try:
                rule = matches(gold, answer)
            except UndecidedError as error:
                undecided = error
                continue
            if rule is not None:
                return rule
            if gold[0] == answer[0] == "clock":
                return None
    if undecided is not None:
        raise undecided
    return None


def _undecided(
    started: float, gold: str, text: str, policy: str, shown: tuple[Candidate, str, str], why: str
) -> Verdict:
    """What no rule could tell: named by its reason, or asked of a worker process."""
    if why == NEEDS_ISOLATION:
        from .isolated import judge

        return judge(gold, text, policy, started)
    detail = "no rule could tell whether the two are equal"
    return _verdict(started, Outcome.ERROR, f"undecided_{why}", *shown, detail=detail)


@lru_cache(maxsize=4096)
def read_gold(gold: str) -> Reading:
    """Read a gold, once: the same golds come again and again."""
    return read(_inside(gold))


def choice_wanted(gold: str) -> bool:
    """Whether a gold is a choice letter, so that letters in prose count as answers."""
    return _gold(gold)[2]


def _inside(gold: str) -> str:
    """The answer of a gold that is a box, or a whole solution that ends in one or in ####."""
    if "box" in gold:
        boxes = extract(gold, "boxed_only").candidates
        if boxes:
            return boxes[0].text
    mark = gold.rfind("####")
    return gold[mark + 4 :] if mark >= 0 else gold


@lru_cache(maxsize=4096)
def _gold(gold: str) -> tuple[str, quick.Quick | None, bool]:
    """The gold without its wrapping, its simple value, whether it is a letter."""
    inner = _inside(gold)
    tidy = quick.tidy(inner)
    value = quick.read(tidy)
    return tidy, value, value is not None and value.kind == "letter"


def _at_once(
    started: float, known: tuple[str, quick.Quick | None, bool], found: Extraction
) -> Verdict | None:
    tidy, value, _ = known
    if not found.candidates:
        return _verdict(started, Outcome.NO_ANSWER, found.reason)
    first = found.candidates[0]
    answer = quick.tidy(first.text)
    if answer == tidy:
        return _verdict(started, Outcome.CORRECT, "identical", first, tidy, answer)
    if value is None:
        return None
    read = quick.read(answer)
    decided = None if read is None else quick.decide(value, read)
    if decided is None or read is None:
        return None
    outcome = Outcome.CORRECT if decided[0] else Outcome.INCORRECT
    return _verdict(started, outcome, decided[1], first, value.normal(), read.normal())


def _verdict(
    started: float,
    outcome: Outcome,
    rule: str,
    found: Candidate | None = None,
    gold: str | None = None,
    answer: str | None = None,
    detail: str | None = None,
) -> Verdict:
    ms = (time.perf_counter() - started) * 1000.0
    if found is None:
        return Verdict(outcome, rule=rule, ms=ms, detail=detail)
    return Verdict(outcome, found.text, (found.start, found.end), gold, answer, rule, ms, detail)
