"""Reads a whole expression into a tree, or not at all.

Sums, products and powers are read here, operands in `operands.py`; lists,
relations, sets, matrices and units in `structure.py` on top. Every token is
consumed or the text is unparsed; there is no reading of a prefix. Nothing is
evaluated while reading, and depth, tokens and digits are limited.
"""

from __future__ import annotations

from .nodes import Node, ParseError, number
from .operands import OPEN_BRACKETS, Operands
from .words import word_set

_PREFIX_CMDS = word_set(
    "frac sqrt binom pi infty sum prod int lim lfloor lceil langle begin imath angle triangle "
    "overline overrightarrow vec hat bar widehat tilde dot ddot mathbf emptyset Rset Zset Nset "
    "Qset Cset textcircled ldots nabla partial square "
    "overarc overbrace underbrace odot oplus Box checkmark top dagger"
)


class ExpressionParser(Operands):
    """Reads expressions from tokens."""

    # -- sums and products -------------------------------------------------------

    def expression(self) -> Node:
        """Read a sum."""
        self.enter()
        terms = [self._signed()]
        while True:
            if self.is_op("+", "-"):
                sign = self.take().text
                # "2 + -3" is read; "2 + + 3" too; both occur.
                term = self._signed()
                terms.append(("neg", term) if sign == "-" else term)
            elif self.is_cmd("pm", "mp"):
                sign = 1 if self.take().text == "pm" else -1
                terms.append(("pm", sign, self.product()))
            else:
                break
        self.depth -= 1
        return terms[0] if len(terms) == 1 else ("add", tuple(terms))

    def _signed(self) -> Node:
        if self.is_op("-"):
            self.take()
            self.enter()
            inner = self._signed()
            self.depth -= 1
            return ("neg", inner)
        if self.is_op("+"):
            self.take()
            if self.is_op("+", "-"):
                raise ParseError("two signs in a row")
            return self.product()
        if self.is_cmd("pm", "mp"):
            sign = 1 if self.take().text == "pm" else -1
            return ("pm", sign, self.product())
        return self.product()

    def product(self) -> Node:
        """Read a product; juxtaposition multiplies, `/` divides from left to right."""
        left = self.mixed(self.power())
        while True:
            if self.is_op("*") or self.is_cmd("times", "cdot"):
                self.take()
                left = _times(left, self._factor())
            elif self.is_op("/") and self.peek(1).kind == "word":
                return left  # "25000 / year": a unit, not a divisor
            elif self.is_op("/") or self.is_cmd("div"):
                self.take()
                left = ("div", left, self._divisor())
            elif self.peek().kind == "fn" and self.peek().text in ("mod", "bmod"):
                self.take()
                left = ("fn", "mod", (left, self._factor()))
            elif left[0] == "deg" and self.peek().kind == "id" and self.peek().text in "CF":
                return left  # degrees Celsius or Fahrenheit
            elif self.starts_factor():
                before = self.at
                right = self.power()
                if right[0] in ("rel", "list", "cond"):
                    self.at = before
                    return left
                left = _times(left, right)
            else:
                return left

    def _factor(self) -> Node:
        if self.is_op("-", "+"):
            sign = self.take().text
            inner = self.power()
            return ("neg", inner) if sign == "-" else inner
        return self.mixed(self.power())

    def _divisor(self) -> Node:
        return self._factor()

    def mixed(self, left: Node) -> Node:
        """Read what follows a whole number as its fraction part: 3 1/2."""
        token = self.peek()
        if left[0] != "num" or left[1].denominator != 1:
            return left
        if token.kind == "cmd" and token.text == "frac":
            before = self.at
            part = self.primary()
            if _is_proper(part) and not self.is_op("^"):
                return ("add", (left, part))
            self.at = before
        elif (
            token.kind == "num"
            and not token.glued
            and self.peek(1).text == "/"
            and self.peek(2).kind == "num"
        ):
            top, bottom = number(token.text), number(self.peek(2).text)
            part = ("div", top, bottom)
            if _is_proper(part):
                self.at += 3
                return ("add", (left, part))
        return left

    def starts_factor(self) -> bool:
        """Whether the next token can follow a factor without an operator."""
        token = self.peek()
        if token.kind == "id" or token.kind == "fn":
            return True
        if token.kind == "num":
            # "x2" is read as a product; "2 3" is not mathematics.
            previous = self.tokens[self.at - 1]
            return previous.kind != "num" and not (previous.text == "}" and token.glued is False)
        if token.kind == "op":
            return token.text in OPEN_BRACKETS or (token.text in ("|", "||") and self.bars == 0)
        return token.kind == "cmd" and token.text in _PREFIX_CMDS

    # -- powers ------------------------------------------------------------------

    def power(self) -> Node:
        """Read a factor with its postfix marks and exponent."""
        self.enter()
        base = self.postfix(self.primary())
        if self.is_op("^"):
            self.take()
            if self.degree_sign():
                base = self.postfix(("deg", base))
            else:
                exponent = self.exponent()
                base = self.postfix(("pow", base, exponent))
                if self.is_op("^"):
                    raise ParseError("two exponents in a row")
        self.depth -= 1
        return base

    def degree_sign(self) -> bool:
        """Take a degree sign when one comes next."""
        if self.is_cmd("circ"):
            self.take()
            return True
        if self.is_op("{") and self.peek(1).text == "circ" and self.peek(2).text == "}":
            self.at += 3
            return True
        return False

    def exponent(self) -> Node:
        """Read an exponent: a group, a signed operand, a power."""
        if self.is_op("{"):
            return self.braced()
        if self.is_op("-", "+"):
            sign = self.take().text
            inner = self.exponent()
            return ("neg", inner) if sign == "-" else inner
        inner = self.postfix(self.primary())
        if self.is_op("^"):
            self.take()
            return ("pow", inner, self.exponent())
        return inner

    def postfix(self, node: Node) -> Node:
        """Read factorials, percent signs, bases and degree signs after an operand."""
        while True:
            if self.is_op("!"):
                self.take()
                node = ("fn", "factorial2" if self.is_op("!") else "factorial", (node,))
                if node[1] == "factorial2":
                    self.take()
            elif self.is_op("%"):
                self.take()
                node = ("pct", node)
            elif self.is_op("_") and node[0] in ("num", "dec", "group", "sym", "based"):
                node = self._subscript(node)
            elif self.is_cmd("circ") and node[0] == "num":
                self.take()
                node = ("deg", node)
            else:
                return node

    def _subscript(self, node: Node) -> Node:
        """Read the base of a number, or the index of a name."""
        self.take()
        start = self.at
        if self.is_op("{"):
            self.skip_braces()
        else:
            self.take()
        parts = [t.text for t in self.tokens[start : self.at] if t.text not in "{}"]
        label = "".join(parts)
        if node[0] == "sym":
            return ("sym", f"{node[1]}_{label}")
        base = {"two": "2", "three": "3", "eight": "8", "ten": "10", "sixteen": "16"}.get(
            label, label
        )
        if node[0] not in ("num", "dec") or not base.isdigit() or not 2 <= int(base[:3]) <= 36:
            raise ParseError(f"{label!r} is not a number base")
        digits = str(node[1])
        if node[0] == "dec":
            scaled = str(int(node[1] * 10 ** node[2])).rjust(node[2] + 1, "0")
            digits = f"{scaled[: -node[2]]}.{scaled[-node[2] :]}"
        return ("based", digits, int(base))


def _times(left: Node, right: Node) -> Node:
    if left[0] == "mul":
        return ("mul", (*left[1], right))
    return ("mul", (left, right))


def _is_proper(part: Node) -> bool:
    if part[0] != "div" or part[1][0] != "num" or part[2][0] != "num":
        return False
    top, bottom = part[1][1], part[2][1]
    return top.denominator == 1 and bottom.denominator == 1 and 0 < top < bottom
