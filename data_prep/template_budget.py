"""What one rendering of a chat template may cost, and what its operations pay.

A value is paid for as it is read, and a text before it is written; see `chat_template`, which has
a template's operations do so.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterable, Mapping, MappingView, Sequence
from contextvars import ContextVar
from typing import Any

from jinja2 import TemplateError

# Operations of a rendering: for anything, for each message, and for each pair of them, since
# templates look back and ahead. Those of known models take a few dozen a message.
OPERATIONS, PER_MESSAGE, PER_PAIR = 1_000_000, 10_000, 100
# Longest text, beside a multiple of what the conversation itself has.
LONGEST_TEXT, COPIES = 1 << 22, 8
LARGEST_BITS = 4096  # of a whole number
WIDEST = 9999  # padding of a format's place
SECONDS = 20.0  # of processor time
# A number or a text of theirs decides how much they write.
WIDENING = frozenset(("center", "indent", "ljust", "rjust", "round", "zfill"))
# What looks for every character, or at every place, through all of an argument.
SEARCHING = frozenset(
    ("lstrip", "rfind", "rindex", "rpartition", "rsplit", "rstrip", "strip", "trim")
)
# Tests that compute `value % number`, which formats a text.
REMAINDERS = frozenset(("divisibleby", "even", "odd"))
# A width or precision of five digits, or one that an argument gives. Looked for in linear time:
# the text may be long, and made to be looked at for ever.
_WIDE = re.compile(
    r"(?<![0-9])[0-9]{5,}+(?:\.[0-9]*+)?[hlL]?[a-zA-Z%]"
    r"|%[-#0 +]*+(?:[0-9]*+\.)?\*"
    r"|\{[^{}:]*+:(?:[^{}]*?[0-9]{5}|[^{}]*+\{)"
)
LARGE_NUMBER = f"it makes a number of more than {LARGEST_BITS} bits"


class TemplateLimitError(TemplateError):
    """A rendering takes more than a conversation may."""


class Budget:
    """What is left of one rendering.

    Args:
        messages: How many the conversation has.
        characters: Of all their contents.

    Attributes:
        left: Operations.
        longest: Characters of the longest text.
        written: Characters that were written so far.
        spans: (start, stop) of what stood between generation markers, in characters.
    """

    __slots__ = ("_spent", "_until", "left", "longest", "spans", "written")

    def __init__(self, messages: int, characters: int) -> None:
        """Fill it."""
        # Each message may be compared with all others; 64 characters are an operation.
        texts = characters + messages * characters // 16
        self.left = OPERATIONS + PER_MESSAGE * messages + PER_PAIR * messages**2 + texts
        self.longest = LONGEST_TEXT + COPIES * characters
        self.written = 0
        self.spans: list[tuple[int, int]] = []
        self._spent, self._until = 0, time.thread_time() + SECONDS

    def spend(self, operations: int) -> None:
        """Pay.

        Raises:
            TemplateLimitError: Nothing is left.
        """
        self.left -= operations
        if self.left < 0:
            raise TemplateLimitError("it takes more operations than a conversation may")
        self._spent += 1
        if not self._spent & 63 and time.thread_time() > self._until:
            raise TemplateLimitError(f"it takes more than {SECONDS:g} s of processor time")

    def write(self, characters: int, length: int = 0) -> None:
        """Pay for a text before it is made, or for a part of one that is `length` long."""
        if max(characters, length) > self.longest:
            raise TemplateLimitError(f"it makes a text of more than {self.longest} characters")
        self.spend(characters >> 6)

    def read(self, value: Any) -> int:
        """Pay for looking at all of a value, as printing or comparing it does; return the price.

        Values within are counted as often as they occur, and until nothing is left.
        """
        if type(value) is str:
            price = 1 + (len(value) >> 6)
            self.spend(price)
            return price
        price, waiting = 0, [value]
        while waiting:
            one = waiting.pop()
            price += 1
            if isinstance(one, str | bytes):
                price += len(one) >> 6
            elif isinstance(one, list | tuple | set | frozenset | MappingView):
                waiting.extend(one)  # type: ignore[arg-type]
            elif isinstance(one, dict):
                waiting.extend(one)
                waiting.extend(one.values())
            elif isinstance(one, range):
                price += len(one)
            elif isinstance(one, int):
                bits = one.bit_length()
                if bits > LARGEST_BITS:
                    raise TemplateLimitError(LARGE_NUMBER)
                price += bits >> 7
            if price + len(waiting) > self.left:
                self.spend(price + len(waiting))
        self.spend(price)
        return price


# Of the rendering that goes on.
current_budget: ContextVar[Budget] = ContextVar("budget")


def pay_for_product(budget: Budget, value: Any, times: Any) -> None:
    """Pay for `value * times`, where that repeats a text or a list."""
    if isinstance(times, int) and isinstance(value, str | bytes):
        budget.write(len(value) * max(0, times))
    elif isinstance(times, int) and isinstance(value, list | tuple):
        budget.spend(budget.read(value) * max(0, times))


def pay_for_format(budget: Budget, text: str, values: Iterable[Any]) -> None:
    """Pay for formatting values, each of which may stand at every place.

    Raises:
        TemplateLimitError: It pads to any width.
    """
    if _WIDE.search(text):
        raise TemplateLimitError("it formats with a width of five digits, or of an argument")
    places = text.count("%") + text.count("{")
    lengths = (len(v) if isinstance(v, str) else budget.read(v) << 6 for v in values)
    longest = max(lengths, default=0)
    budget.write(len(text) + places * (WIDEST + longest))


def pay_for_keys(budget: Budget, values: Any) -> Any:
    """Pay for a table of values that may have been chosen to collide in it; texts cannot be."""
    if isinstance(values, dict):
        return values
    values = list(values)
    odd = sum(not isinstance(value, str) for value in values)
    budget.spend(odd * odd >> 6)
    return values


def pay_for_join(budget: Budget, separator: Any, parts: Iterable[Any]) -> list[Any]:
    """Pay for joining parts; return them as a list, since they may be there only once."""
    parts = list(parts)
    budget.read(parts)
    budget.write(len(str(separator)) * len(parts))
    return parts


def pay_for_writing(
    budget: Budget, name: str, value: Any, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> None:
    """Pay for what a filter or a method writes, where that is more than it reads.

    Args:
        budget: Has paid for reading.
        name: The filter's or the method's.
        value: What stands before `|` or the dot.
        args: What is given to it.
        kwargs: The same, by name.
    """
    given = [*args, *kwargs.values()]
    if name in WIDENING:
        widths = [len(v) if isinstance(v, str) else abs(int(v)) for v in given if _is_width(v)]
        lines = value.count("\n") + 1 if isinstance(value, str) else budget.read(value)
        budget.write(lines * max(widths, default=0))
        budget.spend(max(widths, default=0))
    elif name == "replace":
        named = {**dict(zip(("old", "new"), args, strict=False)), **kwargs}
        text, old, new = str(value), str(named.get("old", "")), str(named.get("new", ""))
        budget.write(len(text) + text.count(old) * len(new))
    elif name in SEARCHING:
        budget.spend(len(str(value)) * max((len(str(v)) for v in given), default=0) >> 10)
    elif name == "format" or (name in REMAINDERS and isinstance(value, str)):
        pay_for_format(budget, str(value), given)
    elif name == "sum" and any(isinstance(v, list | tuple) for v in given):
        raise TemplateLimitError("it sums lists")


def _is_width(value: Any) -> bool:
    return isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value))
