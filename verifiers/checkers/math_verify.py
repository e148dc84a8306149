"""Adapter of the math-verify library, for comparison with numbers made by it."""

from __future__ import annotations

import time
from typing import Any

from ..verdict import elapsed_ms
from . import Checker, Outcome, Verdict


class MathVerifyChecker(Checker):
    r"""Judges by math-verify's `parse` and `verify`, without its signal timeouts.

    math-verify bounds its time by SIGALRM, which fails off the main thread, so the
    adapter switches that off. It then has no limit of its own: use it in a
    `VerifierPool`, whose worker is killed instead.

    Args:
        float_rounding: Decimals to which numbers are compared.
        strict: Whether names of variables count.
    """

    bounded = False
    examples = (
        ("1/2", r"so it is $\boxed{\frac{1}{2}}$", "correct"),
        ("1/2", r"so it is $\boxed{\frac{1}{3}}$", "incorrect"),
        ("1/2", "no idea", "no_answer"),
        ("", r"$\boxed{1}$", "gold_unparseable"),
    )

    def __init__(self, float_rounding: int = 6, *, strict: bool = True) -> None:
        """Load the library.

        Raises:
            ImportError: It is not installed.
        """
        try:
            import math_verify
        except ImportError as error:
            raise ImportError(
                "checker 'math_verify' needs math-verify: pip install 'math-verify[antlr4_13_2]'"
            ) from error
        self._library: Any = math_verify
        self.float_rounding, self.strict = float_rounding, strict

    def check(self, gold: str, text: str) -> Verdict:
        """Judge by the library; what it raises is `error`."""
        started = time.perf_counter()
        library = self._library
        try:
            latex = library.LatexExtractionConfig()
            plain = library.ExprExtractionConfig()
            wrapped = gold if "$" in gold or "\\boxed" in gold else f"${gold}$"
            wanted = library.parse(wrapped, [latex, plain], parsing_timeout=None)
            if not gold.strip() or not wanted:
                return Verdict(Outcome.GOLD_UNPARSEABLE, rule="math_verify", ms=elapsed_ms(started))
            given = library.parse(text, [latex, plain], parsing_timeout=None)
            if not given:
                return Verdict(Outcome.NO_ANSWER, rule="math_verify", ms=elapsed_ms(started))
            right = library.verify(
                wanted, given, float_rounding=self.float_rounding, strict=self.strict,
                timeout_seconds=None,
            )  # fmt: skip
        except Exception as error:
            detail = f"{type(error).__name__}: {error}"
            return Verdict(Outcome.ERROR, rule="math_verify", ms=elapsed_ms(started), detail=detail)
        answer = given[-1] if isinstance(given[-1], str) else str(given[0])
        return Verdict(
            Outcome.CORRECT if right else Outcome.INCORRECT, answer, None, str(wanted[0]),
            str(given[0]), "math_verify", elapsed_ms(started),
        )  # fmt: skip
