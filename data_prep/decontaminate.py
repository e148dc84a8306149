r"""Leaks: training questions that an evaluation suite asks too.

A question whose normalised text is an evaluation question's is one for certain. Shared n-grams
alone do not show a leak: competition problems share stock phrases and come in families, so that
13-grams of words flag 589 of MATH's 5,000 test problems against its own train split, where ten
are real. What tells the real ones from the rest is not how much they share but in what they
differ: twins of a family differ in a number, a sign, a variable, a "not"; copies differ in
markup (`\overline{PQ}`, `$$`), in how they ask ("find", "what is the value of"), or by a plain
word more or less. So an n-gram of content only nominates, and a nominated pair is flagged when
its content is the same, in the same order, but for few plain words.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher

from data_prep.normalise import normalise

NGRAM = 8
# Plain words that one of two copies may have more, as a share of the content.
SLACK = 0.05
_TOKEN = re.compile(r"[一-鿿]|\d+(?:\.\d+)?|\\?[^\W\d_]+|[^\w\s]")
_PLAIN = re.compile(r"[a-z]{3,}")
# How a diagram is scaled is not part of what it shows.
_SCALE = re.compile(r"\b(?:unitsize|size)\([^)]*\);")
_BRACKETS = frozenset("$.,;:!?'\"(){}[]|&~`\\")


def _words(text: str, prefix: str = "") -> frozenset[str]:
    return frozenset(f"{prefix}{word}" for word in text.split())


_MARKUP = _words(
    "overline underline mathbf mathrm mathit mathbb mathcal cal text textbf textit mbox boxed "
    "limits nolimits bigl bigr big begin end bf it rm operatorname hspace vspace ldots dots "
    "cdots allowbreak displaystyle",
    prefix="\\",
)
_ASKING = _words(
    "a an the and or if then that which is are be was were of in on at to for by with from as it "
    "its this these those we you your i so such there has have had having let suppose given where "
    "what find compute determine evaluate calculate value express answer give respectively please "
    "how much equal number cal"
)
# Words that change what is asked, however few they are.
_CRITICAL = _words(
    "not no non none neither without except least most minimum maximum greater greatest less "
    "lesser more fewer smaller smallest larger largest odd even positive negative distinct "
    "different same each every all any only both first second third fourth last next previous "
    "consecutive sum product difference quotient area perimeter volume length radius diameter "
    "height width mean median mode average total half twice double triple one two three four five "
    "six seven eight nine ten eleven twelve hundred thousand sin cos tan increasing decreasing "
    "rational irrational real integer integers prime primes before after with up down left right"
)


@dataclass(frozen=True, slots=True)
class Question:
    """One evaluation question.

    Attributes:
        suite: Name of its suite.
        where: File and line.
        text: As asked.
    """

    suite: str
    where: str
    text: str


@dataclass(frozen=True, slots=True)
class Leak:
    """A training question that an evaluation suite asks too.

    Attributes:
        question: The evaluation question.
        is_exact: Whether the normalised texts are the same.
    """

    question: Question
    is_exact: bool


def content(text: str) -> list[str]:
    """Return what a question asks: words, numbers and signs, without markup and asking words."""
    words = _TOKEN.findall(_SCALE.sub("", normalise(text)))
    return [
        word
        for word in words
        if word not in _BRACKETS and word not in _MARKUP and word not in _ASKING
    ]


class Index:
    """Finds evaluation questions in training questions.

    Args:
        questions: The evaluation questions.
        n: Length of the n-grams that nominate; a shorter question nominates as a whole.
        slack: Plain words that one of two copies may have more, as a share of the content.
    """

    def __init__(self, questions: Iterable[Question], n: int = NGRAM, slack: float = SLACK) -> None:
        """Index the questions by normalised text and by n-gram of content."""
        self.n, self.slack = n, slack
        self.questions = list(questions)
        self._exact: dict[str, int] = {}
        self._grams: dict[str, list[int]] = {}
        self._content: list[list[str]] = []
        for number, question in enumerate(self.questions):
            self._exact.setdefault(normalise(question.text), number)
            words = content(question.text)
            self._content.append(words)
            for gram in dict.fromkeys(self._ngrams(words)):
                self._grams.setdefault(gram, []).append(number)

    def _ngrams(self, words: Sequence[str]) -> list[str]:
        last = max(1, len(words) - self.n + 1)
        return [" ".join(words[start : start + self.n]) for start in range(last)]

    def find(self, text: str, normal: str | None = None) -> Leak | None:
        """Return the first evaluation question that a training question leaks, exact ones first.

        Args:
            text: The training question.
            normal: Its normalised text, where that is at hand.
        """
        exact = self._exact.get(normalise(text) if normal is None else normal)
        if exact is not None:
            return Leak(self.questions[exact], True)
        words = content(text)
        nominated: set[int] = set()
        for gram in self._ngrams(words):
            if gram in self._grams:
                nominated.update(self._grams[gram])
        for number in sorted(nominated):
            if is_copy(words, self._content[number], self.slack):
                return Leak(self.questions[number], False)
        return None


def is_copy(one: Sequence[str], two: Sequence[str], slack: float = SLACK) -> bool:
    """Return whether two contents ask the same: equal in order, but for few plain words."""
    allowed = max(1, int(slack * min(len(one), len(two))))
    if not one or abs(len(one) - len(two)) > allowed:
        return False
    if list(one) == list(two):
        return True
    few, many = Counter(one), Counter(two)
    extra = [*(few - many).elements(), *(many - few).elements()]
    if len(extra) > allowed or not all(map(_is_light, extra)):
        return False
    changes = SequenceMatcher(None, one, two, autojunk=False).get_opcodes()
    moved = sum(max(i2 - i1, j2 - j1) for tag, i1, i2, j1, j2 in changes if tag != "equal")
    return moved == len(extra) and all(change[0] != "replace" for change in changes)


def _is_light(word: str) -> bool:
    return _PLAIN.fullmatch(word) is not None and word not in _CRITICAL
