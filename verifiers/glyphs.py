"""Rewrites Unicode mathematics as the LaTeX that the lexer reads."""

from __future__ import annotations

import re
import unicodedata

from .words import split

_SUPERSCRIPTS = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁼⁽⁾ⁿⁱˣ", "0123456789+-=()nix", strict=True))
_SUBSCRIPTS = dict(zip("₀₁₂₃₄₅₆₇₈₉₊₋₌₍₎ₐₑₒₓₖₗₘₙₚₛₜᵢⱼ", "0123456789+-=()aeoxklmnpstij", strict=True))
_FRACTIONS = {
    "½": (1, 2), "⅓": (1, 3), "⅔": (2, 3), "¼": (1, 4), "¾": (3, 4), "⅕": (1, 5),
    "⅖": (2, 5), "⅗": (3, 5), "⅘": (4, 5), "⅙": (1, 6), "⅚": (5, 6), "⅐": (1, 7),
    "⅛": (1, 8), "⅜": (3, 8), "⅝": (5, 8), "⅞": (7, 8), "⅑": (1, 9), "⅒": (1, 10),
}  # fmt: skip
_GREEK = dict(
    zip(
        "αβγδεϵζηθϑικλμνξπρσςτυφϕχψωΓΔΘΛΞΠΣΥΦΨΩµ",
        split(
            "alpha beta gamma delta epsilon epsilon zeta eta theta theta iota kappa lambda mu nu "
            "xi pi rho sigma sigma tau upsilon phi phi chi psi omega Gamma Delta Theta Lambda Xi "
            "Pi Sigma Upsilon Phi Psi Omega mu"
        ),
        strict=True,
    )
)
_COMMANDS = {
    "∞": "infty", "×": "times", "⋅": "cdot", "·": "cdot", "∙": "cdot", "•": "cdot",
    "÷": "div", "≤": "le", "≥": "ge", "⩽": "le", "⩾": "ge", "≦": "le", "≧": "ge",
    "≠": "ne", "≈": "approx", "≃": "approx", "≅": "cong", "≡": "equiv", "±": "pm",
    "∓": "mp", "∪": "cup", "∩": "cap", "∈": "in", "∉": "notin", "⊂": "subset",
    "⊆": "subseteq", "∅": "emptyset", "⌀": "emptyset", "ℝ": "R", "ℤ": "Z", "ℕ": "N",
    "ℚ": "Q", "ℂ": "C", "→": "to", "⇒": "implies", "⟹": "implies", "↦": "mapsto",
    "∠": "angle", "△": "triangle", "∑": "sum", "∏": "prod", "∫": "int", "∧": "land",
    "∨": "lor", "¬": "lnot", "∀": "forall", "∃": "exists", "⊥": "perp", "∥": "parallel",
    "…": "ldots", "⋯": "cdots", "⌊": "lfloor", "⌋": "rfloor", "⌈": "lceil", "⌉": "rceil",
    "∖": "setminus", "∼": "sim", "∝": "propto", "⟨": "langle", "⟩": "rangle", "ℓ": "ell",
    "∂": "partial", "∇": "nabla",
}  # fmt: skip
_PLAIN = {
    "−": "-", "–": "-", "—": "-", "﹣": "-", "－": "-", "‐": "-", "‑": "-", "‒": "-",
    "⁄": "/", "∕": "/", "∶": ":", "∣": "|", "′": "'", "’": "'", "‘": "'", "″": "''",
    "“": '"', "”": '"', "，": ",", "、": ",", "；": ";", "：": ":", "。": ".", "％": "%",
    "【": "[", "】": "]", "〔": "(", "〕": ")", "《": "", "》": "",
    "°": "^\\circ ", "º": "^\\circ ", "˚": "^\\circ ", "℃": "^\\circ C", "℉": "^\\circ F",
    "∗": "*", "✕": "\\times ", "✖": "\\times ", "￥": "¥", "＄": "\\$", "⟶": "\\to ",
    "\u00a0": " ", "\u2009": " ", "\u202f": " ", "\u200a": " ", "\u2003": " ", "\u2002": " ",
    "\u3000": " ", "\u2061": "", "\u2062": "", "\u2063": "", "\u200b": "", "\u200c": "",
    "\u200d": "", "\ufeff": "", "\u2060": "", "\u00ad": "", "\ufe0f": "", "✅": "", "✓": "",
    "□": "", "■": "", "∎": "", "㎝": "cm", "㎏": "kg", "㎞": "km", "㎡": "m^2", "㎥": "m^3",
}  # fmt: skip
_TABLE = {ord(char): f"\\{name} " for char, name in (_COMMANDS | _GREEK).items()}
_TABLE |= {ord(char): text for char, text in _PLAIN.items()}
_RUNS = re.compile(
    f"([{''.join(map(re.escape, _SUPERSCRIPTS))}]+)|([{''.join(_SUBSCRIPTS)}]+)"
    f"|([{''.join(_FRACTIONS)}])|(\\d?)(√|∛|∜)"
)
_STACKED = re.compile("([⁰¹²³⁴⁵⁶⁷⁸⁹]+)[⁄/]([₀₁₂₃₄₅₆₇₈₉]+)")
_ROOTS = {"√": "\\sqrt ", "∛": "\\sqrt[3] ", "∜": "\\sqrt[4] "}
_CIRCLED = re.compile("[①-⑳]")


def to_latex(text: str) -> str:
    r"""Rewrite Unicode mathematics in a text as LaTeX.

    Superscripts become `^{...}`, vulgar fractions `\frac{..}{..}`, Greek
    letters and signs commands, fullwidth forms and digits of any script ASCII;
    characters without width vanish.

    Args:
        text: Any text.

    Returns:
        The rewritten text; ASCII text comes back as it is.
    """
    if text.isascii():
        return text
    text = _STACKED.sub(_stacked, text)
    text = _RUNS.sub(_run, text)
    text = _CIRCLED.sub(lambda m: f"\\textcircled{{{ord(m.group()) - 0x245F}}}", text)
    text = text.translate(_TABLE)
    if text.isascii():
        return text
    return "".join(map(_plain, text))


def _stacked(match: re.Match[str]) -> str:
    top = "".join(_SUPERSCRIPTS[c] for c in match.group(1))
    bottom = "".join(_SUBSCRIPTS[c] for c in match.group(2))
    return f"\\frac{{{top}}}{{{bottom}}}"


def _run(match: re.Match[str]) -> str:
    above, below, fraction, lead, root = match.groups()
    if above:
        return "^{" + "".join(_SUPERSCRIPTS[c] for c in above) + "}"
    if below:
        return "_{" + "".join(_SUBSCRIPTS[c] for c in below) + "}"
    if fraction:
        return "\\frac{{{}}}{{{}}}".format(*_FRACTIONS[fraction])
    return f"{lead}{_ROOTS[root]}"


def _plain(char: str) -> str:
    if char.isascii():
        return char
    digit = unicodedata.decimal(char, None)
    if digit is not None:
        return str(digit)
    if "\u4e00" <= char <= "\u9fff":
        return char
    folded = unicodedata.normalize("NFKC", char)
    # A mathematical letter such as an italic x, or a fullwidth form.
    if folded != char and len(folded) <= 4:
        return folded.translate(_TABLE)
    return char
