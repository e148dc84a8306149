"""Tokens one after the other, with the depth of what is being read."""

from __future__ import annotations

from .nodes import MAX_DEPTH, Node, ParseError
from .tokens import Token

END = Token("end", "", False)


class Cursor:
    """Takes tokens. One instance reads one text."""

    def __init__(self, tokens: list[Token]) -> None:
        """Start at the first token."""
        self.tokens = tokens
        self.at = 0
        self.depth = 0
        self.bars = 0
        # Whether a colon makes a ratio; in a set builder it divides.
        self.ratios = True
        self.integrals = 0
        self._known: dict[tuple[int, bool, bool], tuple[Node, int]] = {}

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

    def skip_braces(self) -> None:
        """Take a TeX group, whatever it holds."""
        depth = 0
        while True:
            text = self.take().text
            depth += {"{": 1, "}": -1}.get(text, 0)
            if depth == 0:
                return
