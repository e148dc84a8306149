"""Reads a whole answer into a tree, or not at all.

Expressions are read here: sums, products, powers, functions, fractions. Lists,
relations, sets, matrices and units are read in `structure.py` on top. Every
token is consumed or the text is unparsed; there is no reading of a prefix.
Nothing is evaluated while reading, and depth, tokens and digits are limited.

Nodes are tuples that start with their kind:
`("num", Fraction)`, `("dec", Fraction, places)`, `("sym", name)`,
`("const", "pi" | "e" | "i" | "infty")`, `("add", terms)`, `("mul", factors)`,
`("div", a, b)`, `("pow", a, b)`, `("neg", a)`, `("pm", sign, a)`,
`("fn", name, args)`, `("app", name, args)` (f(x), or a product),
`("pct", a)`, `("deg", a)`, `("based", digits, base)`,
`("big", kind, variable, low, high, body)` (sum, prod, int, lim).
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Any

from .tokens import LexError, Token

Node = tuple[Any, ...]

MAX_DEPTH = 60
MAX_DIGITS = 4000

END = Token("end", "", False)
BIG = {"sum": "sum", "prod": "prod", "int": "int", "lim": "lim"}
NAMES = {"pi": ("const", "pi"), "infty": ("const", "infty"), "imath": ("const", "i"), "top": ("sym", "top")}  # fmt: skip
CLOSERS = {"(": ")", "[": "]", "{": "}", "\\{": "\\}", "|": "|", "||": "||", "lfloor": "rfloor", "lceil": "rceil", "langle": "rangle"}  # fmt: skip
_OPEN_OPS = frozenset({"(", "[", "{", "\\{"})
_PREFIX_CMDS = frozenset(
    "frac sqrt binom pi infty sum prod int lim lfloor lceil langle begin imath angle triangle "
    "overline overrightarrow vec hat bar widehat tilde dot ddot mathbf emptyset Rset Zset Nset "
    "Qset Cset textcircled ldots nabla partial square "
    "overarc overbrace underbrace odot oplus Box checkmark top dagger".split()
)
_ACCENTS = frozenset("overrightarrow vec hat bar widehat tilde dot ddot overarc overbrace underbrace widetilde".split())
_ATOMS = frozenset("angle triangle square Box nabla partial checkmark odot oplus dagger parallel perp".split())


class ParseError(ValueError):
    """The text is not one whole answer of a known form."""


class ExpressionParser:
    """Reads expressions from tokens. One instance reads one text."""

    def __init__(self, tokens: list[Token]) -> None:
        """Start at the first token."""
        self.tokens = tokens
        self.at = 0
        self.depth = 0
        self.bars = 0

    # -- tokens ------------------------------------------------------------------

    def peek(self, ahead: int = 0) -> Token:
        """Return a token without taking it; `END` past the last one."""
        index = self.at + ahead
        return self.tokens[index] if index < len(self.tokens) else END

    def take(self) -> Token:
        """Take the next token."""
        token = self.peek()
        if token is END:
            raise ParseError("the text ends too early")
        self.at += 1
        return token

    def is_op(self, *texts: str) -> bool:
        """Whether the next token is one of these operators."""
        token = self.peek()
        return token.kind == "op" and token.text in texts

    def is_cmd(self, *texts: str) -> bool:
        """Whether the next token is one of these commands."""
        token = self.peek()
        return token.kind == "cmd" and token.text in texts

    def expect(self, text: str) -> None:
        """Take an operator or command of this text.

        Raises:
            ParseError: Something else comes next.
        """
        token = self.peek()
        if token.kind not in ("op", "cmd") or token.text != text:
            raise ParseError(f"expected {text!r}, found {token.text!r}")
        self.at += 1

    def enter(self) -> None:
        """Go one level deeper, within the limit."""
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise ParseError(f"nested more than {MAX_DEPTH} deep")

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
        left = self._mixed(self.power())
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
        return self._mixed(self.power())

    def _divisor(self) -> Node:
        return self._factor()

    def _mixed(self, left: Node) -> Node:
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
            top, bottom = _number(token.text), _number(self.peek(2).text)
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
            return token.text in _OPEN_OPS or (token.text in ("|", "||") and self.bars == 0)
        return token.kind == "cmd" and token.text in _PREFIX_CMDS

    # -- powers ------------------------------------------------------------------

    def power(self) -> Node:
        """Read a factor with its postfix marks and exponent."""
        self.enter()
        base = self._postfix(self.primary())
        if self.is_op("^"):
            self.take()
            if self._degree_sign():
                base = self._postfix(("deg", base))
            else:
                exponent = self._exponent()
                base = self._postfix(("pow", base, exponent))
                if self.is_op("^"):
                    raise ParseError("two exponents in a row")
        self.depth -= 1
        return base

    def _degree_sign(self) -> bool:
        if self.is_cmd("circ"):
            self.take()
            return True
        if self.is_op("{") and self.peek(1).text == "circ" and self.peek(2).text == "}":
            self.at += 3
            return True
        return False

    def _exponent(self) -> Node:
        if self.is_op("{"):
            return self.braced()
        if self.is_op("-", "+"):
            sign = self.take().text
            inner = self._exponent()
            return ("neg", inner) if sign == "-" else inner
        inner = self._postfix(self.primary())
        if self.is_op("^"):
            self.take()
            return ("pow", inner, self._exponent())
        return inner

    def _postfix(self, node: Node) -> Node:
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
            self._skip_braces()
        else:
            self.take()
        parts = [t.text for t in self.tokens[start : self.at] if t.text not in "{}"]
        label = "".join(parts)
        if node[0] == "sym":
            return ("sym", f"{node[1]}_{label}")
        base = {"two": "2", "three": "3", "eight": "8", "ten": "10", "sixteen": "16"}.get(label, label)
        if node[0] not in ("num", "dec") or not base.isdigit() or not 2 <= int(base[:3]) <= 36:
            raise ParseError(f"{label!r} is not a number base")
        digits = str(node[1])
        if node[0] == "dec":
            scaled = str(int(node[1] * 10 ** node[2])).rjust(node[2] + 1, "0")
            digits = f"{scaled[: -node[2]]}.{scaled[-node[2] :]}"
        return ("based", digits, int(base))

    def _skip_braces(self) -> None:
        depth = 0
        while True:
            text = self.take().text
            depth += {"{": 1, "}": -1}.get(text, 0)
            if depth == 0:
                return

    # -- primaries ---------------------------------------------------------------

    def primary(self) -> Node:
        """Read one operand."""
        token = self.take()
        if token.kind == "num":
            return self._numeral(token)
        if token.kind == "id":
            return self._name(token)
        if token.kind == "fn":
            return self._function(token.text)
        if token.kind == "op":
            if token.text == "{":
                self.at -= 1
                return self.braced()
            if token.text in ("|", "||"):
                return self._absolute(token.text)
            if token.text in ("(", "[", "\\{", "]"):
                self.at -= 1
                return self.bracketed()
        if token.kind == "cmd":
            return self._command(token.text)
        raise ParseError(f"expected a value, found {token.text!r}")

    def bracketed(self) -> Node:
        """Read a bracket; `structure.Parser` reads tuples, intervals and sets."""
        opener = self.take().text
        inner = self.expression()
        self.expect(CLOSERS[opener])
        return inner

    def braced(self) -> Node:
        """Read a TeX group, or nothing but its content."""
        self.expect("{")
        bars, self.bars = self.bars, 0
        inner = self.expression()
        self.bars = bars
        if self.is_cmd("choose"):
            self.take()
            inner = ("fn", "binom", (inner, self.expression()))
        self.expect("}")
        return inner

    def _numeral(self, token: Token) -> Node:
        text = token.text
        if self.is_op(".") and self.peek().glued and self.peek(1).text in ("overline", "dot"):
            self.take()
            text += "."
        if self.is_cmd("overline", "dot", "bar") and self.peek().glued and "." in text:
            return self._repeating(text)
        exponent = self.peek()
        if (
            exponent.kind == "id"
            and exponent.text in ("e", "E")
            and exponent.glued
            and self._float_tail()
        ):
            return self._scientific(text)
        return _number(text)

    def _float_tail(self) -> bool:
        ahead = self.peek(1)
        if ahead.kind == "op" and ahead.text in "+-" and ahead.glued:
            ahead = self.peek(2)
            return ahead.kind == "num" and ahead.glued and ahead.text.isdigit()
        return ahead.kind == "num" and ahead.glued and ahead.text.isdigit()

    def _scientific(self, mantissa: str) -> Node:
        self.take()
        sign = self.take().text if self.is_op("+", "-") else "+"
        power: Node = _number(self.take().text)
        ten: Node = ("pow", ("num", Fraction(10)), ("neg", power) if sign == "-" else power)
        return ("mul", (_number(mantissa), ten))

    def _repeating(self, text: str) -> Node:
        """Read 0.1\\overline{6}; the dots of 0.\\dot{1}4\\dot{2} mark first and last digit."""
        command = self.take().text
        digits = self._digits()
        if command == "dot":
            middle = ""
            if self.peek().kind == "num" and self.peek(1).text == "dot":
                middle = self.take().text
            if self.is_cmd("dot"):
                self.take()
                digits += middle + self._digits()
        whole, _, fixed = text.partition(".")
        scale = 10 ** len(fixed)
        value = Fraction(int(whole + fixed or "0"), scale)
        value += Fraction(int(digits), scale * (10 ** len(digits) - 1))
        return ("num", value)

    def _digits(self) -> str:
        braced = self.is_op("{")
        if braced:
            self.take()
        token = self.take()
        if token.kind != "num" or not token.text.isdigit() or len(token.text) > 400:
            raise ParseError("expected digits")
        if braced:
            self.expect("}")
        return token.text

    def _name(self, token: Token) -> Node:
        name = token.text
        while self.is_op("'") and self.peek().glued:
            self.take()
            name += "'"
        if name == "e":
            return ("const", "e")
        if name == "i" and not self.is_op("_"):
            return ("const", "i")
        if self.is_op("_"):
            self.take()
            start = self.at
            if self.is_op("{"):
                self._skip_braces()
            else:
                self.take()
            label = "".join(t.text for t in self.tokens[start : self.at] if t.text not in "{}")
            name = f"{name}_{label}"
            while self.is_op("'") and self.peek().glued:
                self.take()
                name += "'"
        if self.is_op("(") and self.peek().glued:
            return self.application(name)
        return ("sym", name)

    def application(self, name: str) -> Node:
        """Read f(x); `structure.Parser` reads several arguments."""
        before = self.at
        inner = self.bracketed()
        if inner[0] in ("group", "rel", "list"):
            if inner[0] == "group" and inner[1] == "(" and inner[2] == ")":
                return ("app", name, inner[3])
            self.at = before
            return ("sym", name)
        if inner[0] in ("sym", "num") or name in ("f", "g", "h", "F", "G", "H"):
            return ("app", name, (inner,))
        self.at = before
        return ("sym", name)

    def _absolute(self, bar: str) -> Node:
        self.bars += 1
        inner = self.expression()
        self.bars -= 1
        self.expect(bar)
        return ("fn", "norm" if bar == "||" else "abs", (inner,))

    def _command(self, name: str) -> Node:
        if name in NAMES:
            return NAMES[name]
        if name == "frac":
            return self._fraction()
        if name == "binom":
            return ("fn", "binom", (self.argument(), self.argument()))
        if name in BIG:
            return self._big(name)
        if name in ("lfloor", "lceil"):
            inner = self.expression()
            self.expect(CLOSERS[name])
            return ("fn", "floor" if name == "lfloor" else "ceil", (inner,))
        if name == "overline" and self.is_op("{"):
            start = self.at
            self._skip_braces()
            label = "".join(t.text for t in self.tokens[start:self.at] if t.text not in "{}")
            return ("sym", f"overline {label}")
        if name == "textcircled":
            return ("sym", f"circled {self._label()}")
        if name in _ACCENTS:
            return ("sym", f"{name} {self._label()}")
        if name == "ldots":
            return ("sym", "...")
        if name in _ATOMS:
            return ("sym", name)
        raise ParseError(f"unknown command \\{name}")

    def _label(self) -> str:
        start = self.at
        if self.is_op("{"):
            self._skip_braces()
        else:
            self.take()
        return "".join(t.text for t in self.tokens[start : self.at] if t.text not in "{}")

    def argument(self) -> Node:
        """Read the argument of a command: a group, or one digit or name."""
        if self.is_op("{"):
            return self.braced()
        token = self.peek()
        if token.kind == "num" and len(token.text) > 1 and token.text.isdigit():
            # "\\frac12" is one half: take one digit, leave the rest.
            self.tokens = [*self.tokens]
            self.tokens[self.at] = Token("num", token.text[1:], True)
            return _number(token.text[0])
        return self.primary()

    def _fraction(self) -> Node:
        top = self.argument()
        bottom = self.argument()
        return ("div", top, bottom)

    def _function(self, name: str) -> Node:
        if name == "sqrt" or name == "cbrt":
            return self._root(name)
        base: Node | None = None
        exponent: Node | None = None
        while self.is_op("_", "^"):
            if self.take().text == "_":
                base = self.argument() if self.is_op("{") else self.primary()
            elif self._degree_sign():
                raise ParseError("a degree sign on a function")
            else:
                exponent = self._exponent()
        args = self._arguments()
        if name == "lg":
            name, base = "log", base or ("num", Fraction(10))
        if base is not None:
            if name not in ("log", "max", "min"):
                raise ParseError(f"{name} has no index")
            args = (*args, base) if name == "log" else args
        if exponent is None:
            return ("fn", name, args)
        inverse = {"sin": "arcsin", "cos": "arccos", "tan": "arctan", "cot": "arccot"}.get(name)
        if exponent == ("neg", ("num", Fraction(1))) and inverse:
            return ("fn", inverse, args)
        return ("pow", ("fn", name, args), exponent)

    def _arguments(self) -> tuple[Node, ...]:
        if self.is_op("("):
            inner = self.bracketed()
            if inner[0] == "group":
                return inner[3]
            return (inner,)
        if self.is_op("{"):
            inner = self.braced()
            if inner[0] == "set":
                return inner[1]
            return (self._postfix_power(inner),)
        if self.is_op("|") and self.bars == 0:
            return (self.power(),)
        self.enter()
        parts = [self._mixed(self.power())]
        while self.starts_factor() and self.peek().kind != "fn" and not self.is_op("(", "[", "|"):
            parts.append(self.power())
        self.depth -= 1
        return (parts[0] if len(parts) == 1 else ("mul", tuple(parts)),)

    def _postfix_power(self, node: Node) -> Node:
        node = self._postfix(node)
        if self.is_op("^"):
            self.take()
            return ("deg", node) if self._degree_sign() else ("pow", node, self._exponent())
        return node

    def _root(self, name: str) -> Node:
        degree: Node | None = ("num", Fraction(3)) if name == "cbrt" else None
        if self.is_op("["):
            self.take()
            degree = self.expression()
            self.expect("]")
        inner = self.braced() if self.is_op("{") else self.primary()
        if inner[0] == "group":
            raise ParseError("a root of a tuple")
        return ("fn", "root", (inner,) if degree is None else (inner, degree))

    def _big(self, kind: str) -> Node:
        low: Node | None = None
        high: Node | None = None
        while self.is_op("_", "^"):
            if self.take().text == "_":
                low = self.bound()
            else:
                high = self._exponent()
        body = self._integrand() if kind == "int" else ("", self.product())
        return ("big", kind, body[0], low, high, body[1])

    def bound(self) -> Node:
        """Read a lower bound: k=1, x \\to 0, or a value."""
        return self.argument()

    def _integrand(self) -> tuple[str, Node]:
        """Read up to the "dx" that ends an integral."""
        depth = 0
        for index in range(self.at, len(self.tokens) - 1):
            text = self.tokens[index].text
            depth += (text in _OPEN_OPS) - (text in (")", "]", "}", "\\}"))
            if depth < 0:
                break
            after = self.tokens[index + 1]
            if depth == 0 and text == "d" and after.kind == "id":
                rest = self.tokens[index + 2 :]
                inner = type(self)(self.tokens[self.at : index])
                inner.depth = self.depth
                body = ("num", Fraction(1)) if index == self.at else inner.expression()
                if inner.peek() is not END:
                    break
                self.tokens = self.tokens[: index + 2] + rest
                self.at = index + 2
                return after.text, body
        raise ParseError("an integral without its differential")


def _times(left: Node, right: Node) -> Node:
    if left[0] == "mul":
        return ("mul", (*left[1], right))
    return ("mul", (left, right))


def _is_proper(part: Node) -> bool:
    if part[0] != "div" or part[1][0] != "num" or part[2][0] != "num":
        return False
    top, bottom = part[1][1], part[2][1]
    return top.denominator == 1 and bottom.denominator == 1 and 0 < top < bottom


def _number(text: str) -> Node:
    if len(text) > MAX_DIGITS:
        raise LexError(f"a number of {len(text)} digits, more than {MAX_DIGITS}")
    if "." not in text:
        return ("num", Fraction(int(text)))
    whole, _, places = text.partition(".")
    scale = 10 ** len(places)
    return ("dec", Fraction(int(whole or "0") * scale + int(places or "0"), scale), len(places))


_BLANKS = re.compile(r"\s+")
