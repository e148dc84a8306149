r"""Generated word problems and symbolic problems, each with a worked and a bare solution.

Nothing is downloaded: a seed decides every problem. Six families share a small arithmetic
(numbers to about 100), so that a model of a million parameters can learn it in minutes:

| family     | example                                             | worked solution         |
|------------|-----------------------------------------------------|-------------------------|
| story      | Mia has 12 pens. She gets 5 more. She loses 3. …    | 12+5=17 17-3=14         |
| expression | Compute 12+5-3.                                     | 12+5=17 17-3=14         |
| equation   | Solve 3x+4=19. If 3x+4=19, what is x?               | 19-4=15 15/3=5          |
| fraction   | What is 2/3 of 12 pens? Add 1/7 and 3/7.            | 12/3=4 4*2=8            |
| decimal    | Compute 1.2+0.7-0.4.                                | 1.2+0.7=1.9 1.9-0.4=1.5 |
| percent    | A lamp costs 40 coins. Its price drops by 25%. …    | 40/4=10 40-10=30        |

A level is the number of steps that the work takes. The two solution styles differ in how
reliable they are for a small model: "worked" writes each step before the box, "bare" only the
box. Supervised training shows both; a reward on the final answer alone makes reinforcement
discover that writing the steps pays.

Splits are disjoint by construction: a hash of the worked solution (what is computed, not names,
things or family) decides a problem's side, so that no rewording of a test problem is trained on,
as a story or as an expression.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction

from pydantic import Field, field_validator

from data_prep.errors import UserError
from data_prep.schema import Problem, Split
from data_prep.sources import SourceConfig

NAMES = (
    ("Mia", "She"),
    ("Tom", "He"),
    ("Ana", "She"),
    ("Leo", "He"),
    ("Zoe", "She"),
    ("Ben", "He"),
)
THINGS = ("pens", "books", "coins", "cards", "shells", "stamps", "apples", "marbles")
WARES = ("lamp", "chair", "bag", "clock", "coat", "game")
# Of 100 hash buckets: the first 10 are test, the next 5 validation, the others train.
BUCKETS: dict[Split, range] = {
    "test": range(10),
    "validation": range(10, 15),
    "train": range(15, 100),
}
TRIES = 2000


class Config(SourceConfig):
    """Settings of the embedded source.

    Attributes:
        train: Problems in the train split.
        validation: Problems in the validation split.
        test: Problems in the test split.
        families: Family to weight; a family that is left out is not drawn.
        levels: Weights of levels 1, 2 and 3.
    """

    kind: str = "embedded"
    train: int = Field(default=24000, ge=1)
    validation: int = Field(default=256, ge=0)
    test: int = Field(default=768, ge=0)
    families: dict[str, float] = {
        "story": 3,
        "expression": 2,
        "equation": 2,
        "fraction": 1,
        "decimal": 1,
        "percent": 1,
    }
    levels: tuple[float, float, float] = (1, 2, 2)

    @field_validator("families")
    @classmethod
    def _known(cls, families: dict[str, float]) -> dict[str, float]:
        unknown = sorted(set(families) - set(FAMILIES))
        if unknown or not families or min(families.values()) <= 0:
            raise ValueError(
                f"positive weights for families among {', '.join(FAMILIES)} are expected"
                + (f", found {', '.join(unknown)}" if unknown else "")
            )
        return families


@dataclass(frozen=True, slots=True)
class Draft:
    """A problem before it has an id."""

    question: str
    steps: tuple[str, ...]
    answer: str

    @property
    def bare(self) -> str:
        """The box alone."""
        return f"\\boxed{{{self.answer}}}"

    @property
    def worked(self) -> str:
        """The worked solution, which says what is computed, without its dress."""
        return "\n".join((*self.steps, self.bare))


def read(config: Config, seed: int) -> Iterator[Problem]:
    """Yield train, validation and test problems, the same for the same seed.

    Raises:
        UserError: More problems are asked for than the chosen families and levels can give.
    """
    counts: dict[Split, int] = {
        "train": config.train,
        "validation": config.validation,
        "test": config.test,
    }
    for split, count in counts.items():
        yield from _split(config, seed, split, count)


def _split(config: Config, seed: int, split: Split, count: int) -> Iterator[Problem]:
    rng = random.Random(f"{seed}/{split}")  # noqa: S311 - problems, not secrets
    names, weights = list(config.families), list(config.families.values())
    family, level = "", 0
    seen: set[str] = set()
    for index in range(count):
        for attempt in range(TRIES):
            if attempt % 40 == 0:  # a family whose problems are all taken gives way to another
                family = rng.choices(names, weights)[0]
                level = rng.choices((1, 2, 3), config.levels)[0]
            draft = FAMILIES[family](rng, level)
            if _bucket(draft.worked) not in BUCKETS[split]:
                continue
            # Held-out problems differ in what they compute; train ones at least in wording.
            identity = draft.question if split == "train" else draft.worked
            if identity not in seen:
                break
        else:
            raise UserError(
                f"embedded source, split {split!r}",
                f"only {index} distinct problems exist",
                f"{count} as asked for",
                f"lower `{split}`, or allow more families or levels",
            )
        seen.add(identity)
        yield Problem(
            id=f"embedded-{split}-{index:06d}",
            question=draft.question,
            answer=draft.answer,
            source="embedded",
            split=split,
            solutions={"worked": draft.worked, "bare": draft.bare},
            level=str(level),
            subject=family,
        )


def _bucket(worked: str) -> int:
    return int.from_bytes(hashlib.blake2b(worked.encode(), digest_size=4).digest(), "big") % 100


def _chain(
    rng: random.Random, length: int, signs: str = "+-*"
) -> tuple[int, list[tuple[str, int]], list[int]]:
    """Draw a start, operations and the running values; all stay between 0 and 47."""
    value = rng.randint(2, 20)
    start, operations, values = value, [], []
    for _ in range(length):
        choices = ["+", "-", "-" if value > 20 else "+"]
        choices += ["*"] * 2 if value <= 20 and "*" in signs else []
        sign = rng.choice(choices) if value > 1 else "+"
        if sign == "+":
            operand = rng.randint(2, 9)
            value += operand
        elif sign == "-":
            operand = rng.randint(1, min(9, value))
            value -= operand
        else:
            operand = rng.choice((2, 3)) if value <= 14 else 2
            value *= operand
        operations.append((sign, operand))
        values.append(value)
    return start, operations, values


def _chain_steps(start: int, operations: list[tuple[str, int]], values: list[int]) -> list[str]:
    before = [start, *values]
    return [
        f"{before[i]}{sign}{operand}={values[i]}" for i, (sign, operand) in enumerate(operations)
    ]


def story(rng: random.Random, level: int) -> Draft:
    """A person has things, gets and loses some, or doubles or triples them."""
    start, operations, values = _chain(rng, level)
    (name, pronoun), things = rng.choice(NAMES), rng.choice(THINGS)
    parts = [f"{name} has {start} {things}."]
    for sign, operand in operations:
        if sign == "+":
            parts.append(f"{pronoun} {rng.choice(('gets', 'finds', 'buys'))} {operand} more.")
        elif sign == "-":
            parts.append(f"{pronoun} {rng.choice(('loses', 'sells', 'gives away'))} {operand}.")
        else:
            times = "doubles" if operand == 2 else "triples"
            parts.append(f"{pronoun} {times} what is there.")
    parts.append(f"How many {things} now?")
    steps = _chain_steps(start, operations, values)
    return Draft(" ".join(parts), tuple(steps), str(values[-1]))


def expression(rng: random.Random, level: int) -> Draft:
    """A chain of operations, bracketed where a product follows a sum."""
    start, operations, values = _chain(rng, level)
    text = str(start)
    for index, (sign, operand) in enumerate(operations):
        if sign == "*":
            text = f"({text})" if any(s != "*" for s, _ in operations[:index]) else text
            text = f"{text}*{operand}"
        else:
            text = f"{text}{sign}{operand}"
    steps = _chain_steps(start, operations, values)
    return Draft(f"Compute {text}.", tuple(steps), str(values[-1]))


def equation(rng: random.Random, level: int) -> Draft:
    """One unknown: x + b = c, then ax + b = c, then a(x + d) + b = c."""
    x, b = rng.randint(1, 15), rng.randint(2, 9)
    a, d = rng.choice((2, 3)), rng.randint(1, 5)
    name = rng.choice("xynk")
    plus = rng.random() < 0.5
    sign, undo = ("+", "-") if plus else ("-", "+")
    if level == 1:
        x += 0 if plus else b
        left, product = name, x
    elif level == 2:
        x += 0 if plus else b
        left, product = f"{a}{name}", a * x
    else:
        x += 0 if plus else b
        left, product = f"{a}({name}+{d})", a * (x + d)
    c = product + b if plus else product - b
    steps = [f"{c}{undo}{b}={product}"]
    if level > 1:
        steps.append(f"{product}/{a}={product // a}")
    if level == 3:
        steps.append(f"{x + d}-{d}={x}")
    ask = rng.choice((f"Solve {left}{sign}{b}={c}.", f"If {left}{sign}{b}={c}, what is {name}?"))
    return Draft(ask, tuple(steps), str(x))


def fraction(rng: random.Random, level: int) -> Draft:
    """A sum of like fractions; a fraction of a number; one more step on that."""
    if level == 1:
        bottom = rng.randint(5, 25)
        one, two = rng.randint(1, bottom - 2), 0
        two = rng.randint(1, bottom - one - 1)
        total = Fraction(one + two, bottom)
        plain = f"\\frac{{{one + two}}}{{{bottom}}}"
        answer = f"\\frac{{{total.numerator}}}{{{total.denominator}}}"
        steps = [f"{one}+{two}={one + two}"]
        if answer != plain:
            steps.append(f"{plain}={answer}")
        return Draft(f"Add {one}/{bottom} and {two}/{bottom}.", tuple(steps), answer)
    bottom = rng.randint(2, 5)
    top, part = rng.randint(1, bottom - 1), rng.randint(2, 12)
    steps = [f"{part * bottom}/{bottom}={part}"]
    value = part
    if top > 1:
        steps.append(f"{part}*{top}={part * top}")
        value = part * top
    of = f"{top}/{bottom} of {part * bottom} {rng.choice(THINGS)}"
    if level == 2:
        return Draft(f"What is {of}?", tuple(steps), str(value))
    more = rng.randint(2, 9)
    steps.append(f"{value}+{more}={value + more}")
    return Draft(f"What is {of}, and {more} more?", tuple(steps), str(value + more))


def decimal(rng: random.Random, level: int) -> Draft:
    """Sums and differences of tenths."""

    def tenths(value: int) -> str:
        return f"{value // 10}.{value % 10}"

    start, operations, values = _chain(rng, level, signs="+-")
    text = tenths(start) + "".join(f"{sign}{tenths(operand)}" for sign, operand in operations)
    before = [start, *values]
    steps = [
        f"{tenths(before[i])}{sign}{tenths(operand)}={tenths(values[i])}"
        for i, (sign, operand) in enumerate(operations)
    ]
    return Draft(f"Compute {text}.", tuple(steps), tenths(values[-1]))


def percent(rng: random.Random, level: int) -> Draft:
    """A percentage of a number; a price that drops or rises by it; one more step on that."""
    rate, divisor = rng.choice(((50, 2), (25, 4), (20, 5), (10, 10)))
    part = rng.randint(1, 40 // divisor + 4)
    whole = part * divisor
    steps = [f"{whole}/{divisor}={part}"]
    if level == 1:
        ask = f"What is {rate}% of {whole} {rng.choice(THINGS)}?"
        return Draft(ask, tuple(steps), str(part))
    rises = rng.random() < 0.5
    value = whole + part if rises else whole - part
    steps.append(f"{whole}{'+' if rises else '-'}{part}={value}")
    parts = [
        f"A {rng.choice(WARES)} costs {whole} coins.",
        f"Its price {'rises' if rises else 'drops'} by {rate}%.",
    ]
    if level == 2:
        parts.append("What is the price now?")
    else:
        fee = rng.randint(2, 9)
        parts.append(f"Shipping adds {fee}. What is the total?")
        steps.append(f"{value}+{fee}={value + fee}")
        value += fee
    return Draft(" ".join(parts), tuple(steps), str(value))


FAMILIES: dict[str, Callable[[random.Random, int], Draft]] = {
    "story": story,
    "expression": expression,
    "equation": equation,
    "fraction": fraction,
    "decimal": decimal,
    "percent": percent,
}
