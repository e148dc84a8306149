"""The vocabulary: functions, connectives, units, named answers."""

from __future__ import annotations

from .measures import UNITS


def split(text: str) -> list[str]:
    """Return the words of a text; keeps long vocabularies readable."""
    return text.split()


def word_set(text: str) -> frozenset[str]:
    """Return the distinct words of a text."""
    return frozenset(text.split())


FUNCTIONS = {
    name: name
    for name in [
        "sin",
        "cos",
        "tan",
        "cot",
        "sec",
        "csc",
        "arcsin",
        "arccos",
        "arctan",
        "arccot",
        "arcsec",
        "arccsc",
        "sinh",
        "cosh",
        "tanh",
        "coth",
        "sech",
        "csch",
        "ln",
        "log",
        "lg",
        "exp",
        "sqrt",
        "abs",
        "floor",
        "ceil",
        "gcd",
        "lcm",
        "max",
        "min",
        "det",
        "deg",
        "arg",
        "Re",
        "Im",
        "sgn",
        "arsinh",
        "arcosh",
        "artanh",
        "cbrt",
        "mod",
        "bmod",
    ]
}
FUNCTIONS |= {
    "asin": "arcsin", "acos": "arccos", "atan": "arctan", "sign": "sgn", "ceiling": "ceil",
    "arcsinh": "arsinh", "arccosh": "arcosh", "arctanh": "artanh", "asinh": "arsinh",
    "acosh": "arcosh", "atanh": "artanh", "Ln": "ln", "Log": "log", "hcf": "gcd",
}  # fmt: skip

GREEK = word_set(
    "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi rho sigma tau "
    "upsilon phi chi psi omega Gamma Delta Theta Lambda Xi Sigma Upsilon Phi Psi Omega ell "
    "hbar"
)

PLAIN_CONSTANTS = {
    "pi": "pi", "infinity": "infty", "infty": "infty", "inf": "infty", "oo": "infty",
    "emptyset": "emptyset", "union": "cup",
}  # fmt: skip

CONNECTIVES = frozenset({"and", "or"})

# Words that make a statement out of a value: a value followed by one of them is
# no longer that value ("7 is wrong", "7 if x > 0").
STATEMENT_WORDS = word_set(
    "is are was were be not no never none isn't aren't wrong incorrect false true but except "
    "unless maybe perhaps possibly probably if when where while because since instead rather "
    "neither nor either both than more less fewer least most greater smaller larger at up to "
    "only cannot can't could would should might may guess unsure unknown between from through "
    "minus plus times divided equals equal remainder different another other"
)
FILLER_WORDS = word_set("the a an of in for each total all exactly about approximately")

MAGNITUDES = {
    "hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9,
    "trillion": 10**12, "dozen": 12, "万": 10**4, "亿": 10**8, "百万": 10**6, "千万": 10**7,
    "万亿": 10**12, "millions": 10**6, "billions": 10**9, "thousands": 10**3, "mn": 10**6,
    "bn": 10**9,
}  # fmt: skip

# Plain runs of letters that are units, not products of variables.
UNIT_WORDS = frozenset(
    {name.lower() for name in UNITS if len(name) > 1 and name.isascii()}
    | {name.lower() + "s" for name in UNITS if len(name) > 1 and name.isascii()}
    | set(MAGNITUDES)
    | FILLER_WORDS
    | STATEMENT_WORDS
    | {
        "am",
        "pm",
        "per",
        "sq",
        "it",
        "so",
        "we",
        "by",
        "on",
        "yes",
        "dne",
        "men",
        "day",
        "bus",
        "car",
        "cat",
        "dog",
        "egg",
        "pen",
        "box",
        "way",
        "pie",
        "old",
        "new",
        "one",
        "two",
        "six",
        "ten",
        "five",
        "four",
        "nine",
        "zero",
        "odd",
        "even",
    }
) - {"s", "a", "an"}

NAMED_ANSWERS = {
    "true": "true", "yes": "yes", "false": "false", "no": "no", "correct": "true", "right": "true",
    "是": "yes", "否": "no", "对": "true", "错": "false", "正确": "true", "错误": "false",
    "no solution": "∅", "no solutions": "∅", "no real solution": "∅", "no real solutions": "∅",
    "none": "∅", "empty set": "∅", "the empty set": "∅", "empty": "∅", "无解": "∅", "空集": "∅",
    "no real roots": "∅", "no real root": "∅", "there are no solutions": "∅",
    "no integer solutions": "∅", "no integer solution": "∅",
    "there is no solution": "∅", "does not exist": "dne", "dne": "dne", "undefined": "dne",
    "not defined": "dne", "不存在": "dne",
    "infinity": "∞", "infinite": "∞", "infinitely many": "infinitely many",
    "infinitely many solutions": "infinitely many",
    "all real numbers": "ℝ", "all reals": "ℝ", "the real numbers": "ℝ", "real numbers": "ℝ",
    "all real x": "ℝ",
    "negative infinity": "-∞", "无穷": "∞", "cannot be determined": "cbd",
    "not enough information": "cbd", "impossible": "impossible",
}  # fmt: skip

_ONES = split(
    
    "zero one two three four five six seven eight nine ten eleven twelve "
    "thirteen fourteen fifteen sixteen seventeen eighteen nineteen",
)  # fmt: skip
_TENS = split("twenty thirty forty fifty sixty seventy eighty ninety")
NUMBER_WORDS = {name: value for value, name in enumerate(_ONES)}
NUMBER_WORDS |= {name: 10 * value for value, name in enumerate(_TENS, start=2)}

MONTHS = {
    name: number
    for number, names in enumerate(
        [
            "january jan",
            "february feb",
            "march mar",
            "april apr",
            "may",
            "june jun",
            "july jul",
            "august aug",
            "september sep sept",
            "october oct",
            "november nov",
            "december dec",
        ],
        start=1,
    )
    for name in names.split()
}
WEEKDAYS = {
    name: names.split()[0]
    for names in (
        [
            "monday mon",
            "tuesday tue tues",
            "wednesday wed",
            "thursday thu thurs",
            "friday fri",
            "saturday sat",
            "sunday sun",
        ]
    )
    for name in names.split()
}
