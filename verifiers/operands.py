"""Reads operands: numbers, names, functions, fractions, roots, sums with bounds."""

from __future__ import annotations

from abc import ABC, abstractmethod
from fractions import Fraction

from .cursor import END, Cursor
from .nodes import Node, ParseError, number
from .tokens import Token
from .words import word_set

BIG = {"sum": "sum", "prod": "prod", "int": "int", "lim": "lim"}
NAMES = {
    "pi": ("const", "pi"), "infty": ("const", "infty"), "imath": ("const", "i"),
    "top": ("sym", "top"),
}  # fmt: skip
CLOSERS = {
    "(": ")", "[": "]", "{": "}", "\\{": "\\}", "|": "|", "||": "||", "lfloor": "rfloor",
    "lceil": "rceil", "langle": "rangle",
}  # fmt: skip
_ACCENTS = word_set(
    "overrightarrow vec hat bar widehat tilde dot ddot overarc overbrace underbrace widetilde"
)
_ATOMS = word_set(
    "angle triangle square Box nabla partial checkmark odot oplus dagger parallel perp"
)
_MAX_INTEGRALS = 8
OPEN_BRACKETS = frozenset({"(", "[", "{", "\\{"})


class Operands(Cursor, ABC):
    """Reads one operand; what stands between operands is for the subclass."""

    @abstractmethod
    def expression(self) -> Node:
        """Read a sum."""

    @abstractmethod
    def product(self) -> Node:
        """Read a product."""

    @abstractmethod
    def power(self) -> Node:
        """Read a factor with its exponent."""

    @abstractmethod
    def starts_factor(self) -> bool:
        """Whether the next token can follow a factor without an operator."""

    @abstractmethod
    def postfix(self, node: Node) -> Node:
        """Read the marks after an operand."""

    @abstractmethod
    def exponent(self) -> Node:
        """Read an exponent."""

    @abstractmethod
    def degree_sign(self) -> bool:
        """Take a degree sign when one comes next."""

    @abstractmethod
    def mixed(self, left: Node) -> Node:
        """Read the fraction part of a mixed number."""

    def primary(self) -> Node:
        """Read one operand; a second time, after going back, without reading it again.

        Going back happens where a bracket turns out to be no factor. Without the
        memory each level of nesting would double the work.
        """
        key = (self.at, self.bars > 0, self.ratios)
        known = self._known.get(key)
        if known is None:
            node = self._operand_itself()
            known = self._known[key] = (node, self.at)
        self.at = known[1]
        return known[0]

    def _operand_itself(self) -> Node:
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
        if (
            "." not in text
            and self.is_op(".")
            and self.peek().glued
            and self.peek(1).text in ("overline", "dot")
        ):
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
        return number(text)

    def _float_tail(self) -> bool:
        ahead = self.peek(1)
        if ahead.kind == "op" and ahead.text in "+-" and ahead.glued:
            ahead = self.peek(2)
            return ahead.kind == "num" and ahead.glued and ahead.text.isdigit()
        return ahead.kind == "num" and ahead.glued and ahead.text.isdigit()

    def _scientific(self, mantissa: str) -> Node:
        self.take()
        sign = self.take().text if self.is_op("+", "-") else "+"
        power: Node = number(self.take().text)
        ten: Node = ("pow", ("num", Fraction(10)), ("neg", power) if sign == "-" else power)
        return ("mul", (number(mantissa), ten))

    def _repeating(self, text: str) -> Node:
        r"""Read 0.1\overline{6}; the dots of 0.\dot{1}4\dot{2} mark first and last digit."""
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
        if name in ("C", "A") and self.is_op("_"):
            counted = self._chosen(name)
            if counted is not None:
                return counted
        if name == "e":
            return ("const", "e")
        if name == "i" and not self.is_op("_"):
            return ("const", "i")
        if self.is_op("_"):
            self.take()
            start = self.at
            if self.is_op("{"):
                self.skip_braces()
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

    def _chosen(self, name: str) -> Node | None:
        r"""Read C_5^2, ways to choose 2 of 5, and A_5^2, to arrange them; else None."""
        before = self.at
        self.take()
        low = self.argument() if self.is_op("{") or self.peek().kind == "num" else None
        if low is not None and low[0] == "num" and self.is_op("^"):
            self.take()
            high = self.exponent()
            if high[0] == "num" and high[1] <= low[1]:
                ways: Node = ("fn", "binom", (low, high))
                return ways if name == "C" else ("mul", (ways, ("fn", "factorial", (high,))))
        self.at = before
        return None

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
            self.skip_braces()
            label = "".join(t.text for t in self.tokens[start : self.at] if t.text not in "{}")
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
            self.skip_braces()
        else:
            self.take()
        return "".join(t.text for t in self.tokens[start : self.at] if t.text not in "{}")

    def argument(self) -> Node:
        """Read the argument of a command: a group, or one digit or name."""
        if self.is_op("{"):
            return self.braced()
        token = self.peek()
        if token.kind == "num" and len(token.text) > 1 and token.text.isdigit():
            # "\frac12" is one half: take one digit, leave the rest.
            self.tokens[self.at] = Token("num", token.text[1:], True)
            return number(token.text[0])
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
            elif self.degree_sign():
                raise ParseError("a degree sign on a function")
            else:
                exponent = self.exponent()
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
        parts = [self.mixed(self.power())]
        while self.starts_factor() and self.peek().kind != "fn" and not self.is_op("(", "[", "|"):
            parts.append(self.power())
        self.depth -= 1
        return (parts[0] if len(parts) == 1 else ("mul", tuple(parts)),)

    def _postfix_power(self, node: Node) -> Node:
        node = self.postfix(node)
        if self.is_op("^"):
            self.take()
            return ("deg", node) if self.degree_sign() else ("pow", node, self.exponent())
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
                high = self.exponent()
        body = self._integrand() if kind == "int" else ("", self.product())
        return ("big", kind, body[0], low, high, body[1])

    def bound(self) -> Node:
        r"""Read a lower bound: k=1, x \to 0, or a value."""
        return self.argument()

    def _integrand(self) -> tuple[str, Node]:
        """Read up to the "dx" that ends an integral."""
        self.integrals += 1
        if self.integrals > _MAX_INTEGRALS:
            raise ParseError(f"more than {_MAX_INTEGRALS} integrals")
        depth = 0
        for index in range(self.at, len(self.tokens) - 1):
            text = self.tokens[index].text
            depth += (text in OPEN_BRACKETS) - (text in (")", "]", "}", "\\}"))
            if depth < 0:
                break
            after = self.tokens[index + 1]
            if depth == 0 and text == "d" and after.kind == "id":
                rest = self.tokens[index + 2 :]
                inner = type(self)(self.tokens[self.at : index])
                inner.depth, inner.integrals = self.depth, self.integrals
                body = ("num", Fraction(1)) if index == self.at else inner.expression()
                if inner.peek() is not END:
                    break
                self.tokens = self.tokens[: index + 2] + rest
                self.at = index + 2
                return after.text, body
        raise ParseError("an integral without its differential")
