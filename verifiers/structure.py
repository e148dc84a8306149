"""Reads what is built from expressions: lists, relations, sets, matrices, units.

Further nodes: `("list", items, marks)`, `("rel", (e0, op1, e1, ...))`,
`("group", open, close, items)`, `("set", items)`, `("builder", item, condition)`,
`("setop", name, a, b)`, `("std", "R")`, `("matrix", rows)`, `("cases", rows)`,
`("qty", expression, unit words)`, `("ratio", parts)`, `("cond", body, condition)`.
"""

from __future__ import annotations

from collections.abc import Callable

from .cursor import END
from .measures import UNITS
from .nodes import Node, ParseError
from .parser import ExpressionParser
from .tokens import Token, tokenize
from .units import compound
from .words import STATEMENT_WORDS, word_set

RELATIONS = word_set("= < > le ge ne approx in notin equiv cong subseteq subset to")
_ENVIRONMENTS = word_set(
    "matrix pmatrix bmatrix Bmatrix vmatrix Vmatrix smallmatrix array cases "
    "aligned align align* gathered split equation equation* gather gather*"
)
_MAX_ITEMS = 3000
_CONDITION_WORDS = frozenset({"where", "for", "if", "with", "when", "其中"})
_SETS = {"Rset": "R", "Zset": "Z", "Nset": "N", "Qset": "Q", "Cset": "C"}


def parse(text: str) -> Node:
    """Read a whole text.

    Args:
        text: LaTeX or plain mathematics, after `glyphs.to_latex`.

    Returns:
        Its tree.

    Raises:
        ParseError: It is not one whole answer.
        LexError: It holds what is no mathematics, or is too large.
    """
    parser = Parser(tokenize(text))
    if not parser.tokens:
        raise ParseError("nothing but blanks")
    node = parser.items(lambda: parser.peek() is END)
    if parser.peek() is not END:
        raise ParseError(f"cannot read on from {parser.peek().text!r}")
    return node


class Parser(ExpressionParser):
    """Reads whole answers from tokens."""

    def items(self, done: Callable[[], bool]) -> Node:
        """Read a list up to where `done` says; a single item comes back bare."""
        self.enter()
        self._blank_separators()
        found = [self.item()]
        marks: set[str] = set()
        while not done():
            mark = self._separator()
            if mark is None:
                if self._at_condition():
                    found[-1] = ("cond", found[-1], self._condition())
                    continue
                break
            if done() and mark == "quad":
                break
            marks.add(mark)
            if len(found) >= _MAX_ITEMS:
                raise ParseError(f"more than {_MAX_ITEMS} items")
            found.append(self.item())
        self.depth -= 1
        return found[0] if len(found) == 1 else ("list", tuple(found), frozenset(marks))

    def _blank_separators(self) -> None:
        while self.peek().kind == "sep" and self.peek().text == "quad":
            self.at += 1

    def _separator(self) -> str | None:
        """Take a run of separators; the strongest of them names it."""
        found: list[str] = []
        while True:
            token = self.peek()
            if token.kind == "sep" or (token.kind == "op" and token.text in (",", ";", "\\\\")):
                # "1,,2" is a slip, not a list.
                if token.text in found and token.text in (",", ";"):
                    raise ParseError("two separators in a row")
                found.append(token.text)
                self.at += 1
            else:
                break
        if not found:
            return None
        return next((m for m in ("or", ";", "and", ",") if m in found), found[0])

    def _at_condition(self) -> bool:
        token = self.peek()
        if token.kind == "word":
            return token.text.lower() in _CONDITION_WORDS
        return token.kind == "op" and token.text == "("

    def _condition(self) -> Node:
        if self.peek().kind == "word":
            self.at += 1
            return self.item()
        node = self.bracketed()
        if node[0] not in ("rel", "list"):
            raise ParseError("a bracket that is neither factor nor condition")
        return node

    # -- relations ---------------------------------------------------------------

    def item(self) -> Node:
        """Read one item of a list: a value, a relation, a set."""
        self.enter()
        if self.is_cmd("approx"):
            self.take()  # "≈ 8.24" alone is the value 8.24
        parts: list[object] = [self.side()]
        while True:
            token = self.peek()
            if token.text == "not" and self.peek(1).text in ("=", "in"):
                self.at += 1
                token = Token("op", {"=": "ne", "in": "notin"}[self.peek().text])
            if token.kind not in ("op", "cmd") or token.text not in RELATIONS:
                break
            self.at += 1
            parts.append(token.text)
            side = self.side()
            if (
                token.text in ("in", "notin")
                and side[0] == "sym"
                and side[1] in ("R", "Z", "N", "Q", "C")
            ):
                side = ("std", side[1])
            parts.append(side)
        if self.is_cmd("pmod", "implies", "iff"):
            if self.peek().text != "pmod":
                raise ParseError("an implication is no answer")
            self.take()
            parts[-1] = ("fn", "pmod", (parts[-1], self.braced()))
        self.depth -= 1
        return parts[0] if len(parts) == 1 else ("rel", tuple(parts))  # type: ignore[return-value]

    def side(self) -> Node:
        """Read one side of a relation: a sum, a union of sets, a ratio, a quantity."""
        if self.is_op("="):
            raise ParseError("a relation without its left side")
        left = self._operand()
        while self.is_cmd("cup", "cap", "setminus") or (
            self.is_op("-") and left[0] in ("std", "set")
        ):
            name = {"-": "setminus"}.get(self.peek().text, self.peek().text)
            self.at += 1
            left = ("setop", name, left, self._operand())
        if self.is_op(":") and self.ratios and left[0] not in ("group", "set", "list"):
            parts = [left]
            while self.is_op(":"):
                self.at += 1
                parts.append(self._operand())
            return ("ratio", tuple(parts))
        return left

    def _operand(self) -> Node:
        money = ""
        if self.peek().kind == "money":
            money = self.take().text
        elif self.is_op("-") and self.peek(1).kind == "money":
            self.at += 2
            money = self.tokens[self.at - 1].text
            return self._unit(("neg", self.expression()), money)
        found = self._unit(self.expression(), money)
        while found[0] == "qty" and self.peek().kind == "num":
            # "5 ft 6 in" is one length.
            joined = compound(found, self._unit(self.product(), ""))
            if joined is None:
                raise ParseError("two quantities side by side")
            found = joined
        return found

    def _unit(self, node: Node, money: str) -> Node:
        """Read the unit after a value: words with exponents, `/` and `per`."""
        words: list[str] = [money] if money else []
        inner = node[1] if node[0] == "neg" else node
        if inner[0] == "deg" and self.peek().kind == "id" and self.peek().text in ("C", "F"):
            degrees = ("neg", inner[1]) if node[0] == "neg" else inner[1]
            return ("qty", degrees, self.take().text)
        while True:
            token = self.peek()
            if token.kind == "word":
                if token.text.lower() in _CONDITION_WORDS:
                    break
                words.append(self.take().text)
            elif token.kind == "money" or (
                token.kind == "id" and words and self._unit_letter(words)
            ):
                words.append(self.take().text)
            elif self.is_op("^") and words:
                self.take()
                words.append(f"^{self._power()}")
            elif (self.is_op("/") and self.peek(1).kind == "word") or (
                words
                and (self.is_op("/") or self.is_cmd("cdot"))
                and self.peek(1).kind in ("word", "id")
            ):
                words.append("per" if self.take().text == "/" else "·")
                words.append(self.take().text)
            elif self.is_op(".") and words:
                self.take()
            elif self.is_op("'") and not words:
                self.take()
                words.append("arcmin")
                if self.is_op("'"):
                    self.take()
                    words[-1] = "arcsec"
            else:
                break
        if not words:
            return node
        if len(words) > 8 or any(w.lower() in STATEMENT_WORDS for w in words):
            raise ParseError(f"words that are no unit: {' '.join(words)[:60]}")
        return ("qty", node, " ".join(words))

    def _unit_letter(self, words: list[str]) -> bool:
        return self.peek().text in UNITS and words[-1] in ("per", "·", "USD")

    def _power(self) -> int:
        node = self.exponent()
        sign = 1
        if node[0] == "neg":
            sign, node = -1, node[1]
        if node[0] != "num" or node[1].denominator != 1 or node[1] > 9:
            raise ParseError("a unit with an odd exponent")
        return sign * int(node[1])

    # -- brackets ----------------------------------------------------------------

    def bracketed(self) -> Node:
        """Read what stands in brackets."""
        opener = self.take().text
        closers = (")", "]", "[") if opener in "(][" else ("\\}",)
        if opener == "\\{":
            if self.is_op("\\}"):
                self.take()
                return ("set", ())
            return self._set(closers)
        bars, self.bars = self.bars, 0
        inner = self.items(lambda: self.is_op(*closers))
        self.bars = bars
        closer = self.take().text
        if closer not in closers:
            raise ParseError(f"a bracket {opener!r} that is never closed")
        several = inner[0] == "list"
        matched = (opener, closer) in (("(", ")"), ("[", "]"))
        if matched and not several:
            if inner[0] == "qty":
                return ("group", opener, closer, (inner,))
            return inner
        if opener == "]" or closer == "[":
            opener, closer = ("(" if opener == "]" else opener), (")" if closer == "[" else closer)
        if not several:
            raise ParseError(f"a bracket {opener!r} closed by {closer!r}")
        if inner[2] - {",", ";", "quad"}:
            if matched and opener == "(":
                return inner
            raise ParseError("words inside a bracket")
        return ("group", opener, closer, inner[1])

    def _set(self, closers: tuple[str, ...]) -> Node:
        bars, self.bars = self.bars, 1  # a bar inside a set builder divides
        self.ratios = False
        inner = self.items(lambda: self.is_op(*closers, "|", ":"))
        self.ratios = True
        if self.is_op("|", ":"):
            self.take()
            self.bars = 0
            condition = self.items(lambda: self.is_op(*closers))
            inner = ("builder", inner, condition)
        elif inner[0] == "ratio" and len(inner[1]) == 2:
            raise ParseError("a set builder whose condition is no relation")
        else:
            inner = ("set", inner[1] if inner[0] == "list" else (inner,))
        self.bars = bars
        self.expect("\\}")
        return inner

    def braced(self) -> Node:
        """Read a TeX group; one that holds a plain list is a set: {1,2,3}."""
        before = self.at
        self.expect("{")
        bars, self.bars = self.bars, 0
        inner = self.items(lambda: self.is_op("}") or self.is_cmd("choose"))
        self.bars = bars
        if self.is_cmd("choose"):
            self.take()
            inner = ("fn", "binom", (inner, self.expression()))
        self.expect("}")
        if inner[0] == "list" and before >= 0:
            return ("set", inner[1])
        return inner

    def _absolute(self, bar: str) -> Node:
        self.bars += 1
        inner = self.expression()
        self.bars -= 1
        self.expect(bar)
        if inner[0] == "matrix":
            return ("fn", "det", (inner,))
        return ("fn", "norm" if bar == "||" else "abs", (inner,))

    def _command(self, name: str) -> Node:
        if name in _SETS:
            return self._standard(_SETS[name])
        if name == "emptyset":
            return ("set", ())
        if name == "begin":
            return self._environment()
        if name == "langle":
            inner = self.items(lambda: self.is_cmd("rangle"))
            self.expect("rangle")
            return ("group", "(", ")", inner[1] if inner[0] == "list" else (inner,))
        return super()._command(name)

    def _standard(self, name: str) -> Node:
        """Read a number set with its marks, such as the plus of R^+."""
        while self.is_op("^", "_"):
            self.take()
            start = self.at
            if self.is_op("{"):
                self.skip_braces()
            else:
                self.take()
            name += "".join(t.text for t in self.tokens[start : self.at] if t.text not in "{}")
        return ("std", name)

    def _environment(self) -> Node:
        self.expect("{")
        parts = []
        while not self.is_op("}"):
            parts.append(self.take().text)
        name = "".join(parts)
        self.expect("}")
        if name not in _ENVIRONMENTS:
            raise ParseError(f"unknown environment {name!r}")
        if name == "array" and self.is_op("{"):
            self.skip_braces()
        self.enter()
        rows: list[tuple[Node, ...]] = []
        row: list[Node] = []
        bars, self.bars = self.bars, 0
        while not self.is_cmd("end"):
            if self.is_op("\\\\"):
                self.take()
                if row:
                    rows.append(tuple(row))
                row = []
            elif self.is_op("&"):
                self.take()
            else:
                row.append(self._cell())
        self.bars = bars
        if row:
            rows.append(tuple(row))
        self.take()
        self.expect("{")
        while not self.is_op("}"):
            self.take()
        self.expect("}")
        self.depth -= 1
        return _built(name, rows)

    def _cell(self) -> Node:
        while self.is_op(","):
            self.take()
        return self.items(lambda: self.is_op("&", "\\\\") or self.is_cmd("end"))


def _built(name: str, rows: list[tuple[Node, ...]]) -> Node:
    if not rows:
        raise ParseError("an empty environment")
    if name in (
        "cases",
        "aligned",
        "align",
        "align*",
        "gathered",
        "split",
        "equation",
        "equation*",
        "gather",
        "gather*",
    ):
        if len(rows) == 1 and len(rows[0]) == 1:
            return rows[0][0]
        return ("cases", tuple(rows))
    if len({len(row) for row in rows}) != 1:
        raise ParseError("a matrix with rows of different length")
    matrix = ("matrix", tuple(rows))
    return ("fn", "det", (matrix,)) if name in ("vmatrix",) else matrix
