"""Cuts LaTeX and plain mathematics into tokens; every character is accounted for."""

from __future__ import annotations

import re
from typing import NamedTuple

from .measures import UNITS
from .words import CONNECTIVES, FUNCTIONS, GREEK, PLAIN_CONSTANTS, UNIT_WORDS, word_set

MAX_TOKENS = 12000
MAX_CHARS = 60000


class Token(NamedTuple):
    """One token.

    Attributes:
        kind: `num`, `id` (a variable), `cmd` (a command, without backslash),
            `fn` (a named function), `word` (text), `sep` (a connective) or `op`.
        text: Its text, normalised.
        glued: Whether it follows the token before without a blank.
    """

    kind: str
    text: str
    glued: bool = True


class LexError(ValueError):
    """The text holds something that is not mathematics, or too much of it."""


_TOKEN = re.compile(
    r"(?P<space>(?:\s|~|\\[,;:! \n]|"
    r"\\(?:thinspace|medspace|thickspace|hfill|hspace\*?\{[^{}]*\})(?![A-Za-z]))+)"
    r"|(?P<num>\d+(?:\.\d+)?|\.\d+)"
    r"|\\(?P<cmd>[A-Za-z]+\*?)"
    r"|(?P<rowsep>\\\\(?:\[[^\]]*\])?)"
    r"|\\(?P<esc>.)"
    r"|(?P<letters>[A-Za-z]+)"
    r"|(?P<cjk>[^\x00-\x7f]+)"
    r"|(?P<op><=|>=|!=|<>|==|=>|->|\*\*|\.\.\.|:=|[-+*/^_=<>(){}\[\]|,;:!%&'.?\"$`#@])",
    re.DOTALL,
)
_SKIP = word_set(
    "left right big Big bigg Bigg bigl bigr Bigl Bigr biggl biggr Biggl Biggr bigm displaystyle "
    "textstyle limits nolimits mathstrut strut hline left. middle scriptstyle nonumber notag "
    "tiny small normalsize large Large LARGE huge Huge "
    "quad qquad mathopen mathclose mathord"
)
_TEXTUAL = word_set(
    "text textrm textnormal mbox hbox textit textsf texttt mathrm mathbf textbf mathit mathsf "
    "operatorname operatorname* boldsymbol bm mathbb mathcal mathscr mathfrak textup emph "
    "underline overset mathtt rm bf it fbox boxed ensuremath textcolor pmb symbf"
)
# These wrap text; the other textual commands wrap mathematics in another face.
_PROSE = word_set("text textrm textnormal mbox hbox textit textsf texttt textbf textup emph")
_ALIASES = {
    "leq": "le", "geq": "ge", "leqslant": "le", "geqslant": "ge", "neq": "ne", "lt": "<",
    "gt": ">", "dfrac": "frac", "tfrac": "frac", "cfrac": "frac", "dbinom": "binom",
    "tbinom": "binom", "lbrace": "{", "rbrace": "}", "lbrack": "[", "rbrack": "]",
    "lvert": "|", "rvert": "|", "vert": "|", "mid": "|", "cdotp": "cdot", "ast": "cdot",
    "bullet": "cdot", "varnothing": "emptyset", "O": "emptyset", "infin": "infty",
    "degree": "circ", "textdegree": "circ",
    "bigcup": "cup", "bigcap": "cap", "backslash": "setminus", "rightarrow": "to",
    "Rightarrow": "implies", "Longrightarrow": "implies", "longrightarrow": "to",
    "doteq": "=", "thickapprox": "approx", "simeq": "approx", "sim": "approx",
    "varepsilon": "epsilon", "varphi": "phi", "vartheta": "theta", "varrho": "rho",

    "overrightarrow": "vec", "widehat": "hat", "widetilde": "tilde", "lparen": "(", "rparen": ")",
    "colon": ":", "prime": "'", "slash": "/", "And": "and",
    "textbackslash": "setminus", "percent": "%", "euro": "EUR", "pounds": "GBP", "yen": "CNY",
    "dots": "ldots", "cdots": "ldots", "dotsc": "ldots", "dotsb": "ldots", "reals": "R",
    "Reals": "R", "lor": "or", "vee": "or", "land": "and",
    "wedge": "and", "lnot": "not", "textdollar": "USD", "textpercent": "%",
    "sen": "sin", "tg": "tan", "ctg": "cot", "cosec": "csc", "arctg": "arctan",
    "arcctg": "arccot", "lg": "lg", "implies": "implies", "iff": "iff", "Z": "Z", "Vert": "||",
}  # fmt: skip
_GLUED = re.compile(r"(q?quad|cdot|times)([A-Za-z]{1,2})$")
_MONEY = {"$": "USD", "€": "EUR", "£": "GBP", "¥": "CNY", "₹": "INR", "₽": "RUB", "₩": "KRW"}


def tokenize(text: str) -> list[Token]:
    """Cut a text (already passed through `glyphs.to_latex`) into tokens.

    Args:
        text: LaTeX or plain mathematics.

    Returns:
        The tokens. Spacing and sizing commands vanish.

    Raises:
        LexError: A character that no rule covers, or a text beyond the limits.
    """
    if len(text) > MAX_CHARS:
        raise LexError(f"{len(text)} characters, more than {MAX_CHARS}")
    out: list[Token] = []
    _lex(text, 0, len(text), out, prose=False, depth=0)
    return out


def _lex(text: str, at: int, end: int, out: list[Token], *, prose: bool, depth: int) -> None:
    if depth > 12:
        raise LexError("text commands nested more than 12 deep")
    glued = False
    while at < end:
        match = _TOKEN.match(text, at, end)
        if match is None:
            raise LexError(f"cannot read {text[at : at + 12]!r}")
        kind, value = match.lastgroup or "", match.group(match.lastgroup or 0)
        at = match.end()
        if kind == "space":
            glued = False
            continue
        if len(out) > MAX_TOKENS:
            raise LexError(f"more than {MAX_TOKENS} tokens")
        if kind == "num":
            out.append(Token("num", value, glued))
        elif kind == "letters":
            _letters(value, out, glued, prose)
        elif kind == "cmd":
            at = _command(value, text, at, end, out, glued, depth)
        elif kind == "rowsep":
            out.append(Token("op", "\\\\", glued))
        elif kind == "esc":
            _escape(value, out, glued)
        elif kind == "cjk":
            _foreign(value, out, glued)
        else:
            out.append(Token("op", _OPS.get(value, value), glued))
        glued = True


_OPS = {
    "<=": "le", ">=": "ge", "!=": "ne", "<>": "ne", "==": "=", ":=": "=", "**": "^", "->": "to",
    "=>": "implies", "...": "ldots",
}  # fmt: skip


def _escape(value: str, out: list[Token], glued: bool) -> None:
    if value in "{}":
        out.append(Token("op", "\\" + value, glued))
    elif value == "|":
        out.append(Token("op", "||", glued))
    elif value == "$":
        out.append(Token("money", "USD", glued))
    elif value in "%&#_()[]":
        # Stray math delimiters such as "\(" carry no meaning here.
        if value in "%&#":
            out.append(Token("op", value, glued))
    elif value in "-/'\"`.=^":
        return
    else:
        raise LexError(f"cannot read the escape \\{value}")


def _foreign(value: str, out: list[Token], glued: bool) -> None:
    for char in value:
        if char in _MONEY:
            out.append(Token("money", _MONEY[char], glued))
            glued = True
            value = value.replace(char, "", 1)
        else:
            break
    if value and value[-1] in _MONEY and len(value) > 1:
        raise LexError(f"cannot read {value[:12]!r}")
    if value in ("和", "与", "或", "或者", "以及", "且"):
        out.append(Token("sep", "or" if "或" in value else "and", glued))
    elif value:
        out.append(Token("word", value, glued))


def _command(
    name: str, text: str, at: int, end: int, out: list[Token], glued: bool, depth: int
) -> int:
    if name in ("R", "Z", "N", "Q", "C") and not (at < end and text[at].isalpha()):
        out.append(Token("cmd", name + "set", glued))
        return at
    # "\\quadx" is "\\quad x" written without its blank.
    glued_name = _GLUED.match(name)
    if glued_name is not None:
        at -= len(glued_name.group(2))
        name = glued_name.group(1)
    name = _ALIASES.get(name, name)
    if name in _SKIP:
        # "\left." is an invisible delimiter.
        if name in ("left", "right") and at < end and text[at] == ".":
            return at + 1
        if name in ("quad", "qquad"):
            out.append(Token("sep", "quad", glued))
        return at
    if name in ("phantom", "hphantom", "vphantom"):
        return _closing(text, at, end) + 1 if text[at : at + 1] == "{" else at
    if name in ("color", "textcolor", "colorbox") and text[at : at + 1] == "{":
        return _closing(text, at, end) + 1  # the colour; what it colours follows
    if name in _TEXTUAL:
        return _wrapped(name, text, at, end, out, glued, depth)
    if name in ("and", "or", "not"):
        out.append(Token("sep" if name != "not" else "word", name, glued))
    elif name in ("[", "]", "(", ")", "|", "<", ">", "=", "%", "'", ":", "/", "||"):
        out.append(Token("op", name, glued))
    elif name in ("{", "}"):
        out.append(Token("op", "\\" + name, glued))
    elif name in ("USD", "EUR", "GBP", "CNY"):
        out.append(Token("money", name, glued))
    elif name in FUNCTIONS:
        out.append(Token("fn", FUNCTIONS[name], glued))
    elif name in GREEK:
        out.append(Token("id", name, glued))
    else:
        out.append(Token("cmd", name, glued))
    return at


def _wrapped(
    name: str, text: str, at: int, end: int, out: list[Token], glued: bool, depth: int
) -> int:
    """Lex the argument of a command that only sets a face."""
    while at < end and text[at] in " \t\n":
        at += 1
    if name in ("rm", "bf", "it"):
        return at
    if at >= end or text[at] != "{":
        return at
    close = _closing(text, at, end)
    inner = text[at + 1 : close]
    if name == "mathbb" and inner.strip() in ("R", "Z", "N", "Q", "C"):
        out.append(Token("cmd", inner.strip() + "set", glued))
    elif name in ("operatorname", "operatorname*") and inner.strip() in FUNCTIONS:
        out.append(Token("fn", FUNCTIONS[inner.strip()], glued))
    elif name in _PROSE or (
        name not in ("boxed", "fbox", "underline", "ensuremath", "bm", "boldsymbol")
        and _unitlike(inner)
    ):
        _lex(text, at + 1, close, out, prose=True, depth=depth + 1)
    else:
        _lex(text, at + 1, close, out, prose=False, depth=depth + 1)
    return close + 1


def _unitlike(inner: str) -> bool:
    words = re.findall(r"[A-Za-z]+", inner)
    return bool(words) and all(len(w) > 1 or "~" in inner for w in words)


def _closing(text: str, at: int, end: int) -> int:
    depth = 0
    for match in re.compile(r"\\.|[{}]", re.DOTALL).finditer(text, at, end):
        if match.group() == "{":
            depth += 1
        elif match.group() == "}":
            depth -= 1
            if depth == 0:
                return match.start()
    raise LexError("a brace is never closed")


def _letters(value: str, out: list[Token], glued: bool, prose: bool) -> None:
    lower = value.lower()
    if lower in CONNECTIVES:
        out.append(Token("sep", lower, glued))
    elif lower == "min" and prose and out and out[-1].kind == "num":
        out.append(Token("word", value, glued))
    elif value in FUNCTIONS or (lower in FUNCTIONS and len(value) > 2):
        out.append(Token("fn", FUNCTIONS[value if value in FUNCTIONS else lower], glued))
    elif lower in PLAIN_CONSTANTS and (value == lower or len(value) > 2):
        out.append(Token("cmd", PLAIN_CONSTANTS[lower], glued))
    elif value in GREEK and not prose:
        out.append(Token("id", value, glued))
    elif len(value) == 1:
        # In "5\\text{ m}" the letter is a unit, in "\\text{E}" a name.
        unit = (
            prose
            and value in UNITS
            and out
            and (out[-1].kind == "num" or out[-1].text in (")", "}", "pi"))
        )
        out.append(Token("word" if unit else "id", value, glued))
    elif prose or (lower in UNIT_WORDS and not _initials(value)) or len(value) > 3:
        _long(value, out, glued, prose)
    else:
        for index, letter in enumerate(value):
            out.append(Token("id", letter, glued if index == 0 else True))


def _initials(value: str) -> bool:
    """Capitals such as NO and AM name points unless they are a unit."""
    return value.isupper() and value not in UNITS


def _long(value: str, out: list[Token], glued: bool, prose: bool) -> None:
    # "sinx" and "cosA" are functions glued to a variable.
    for name in ("arcsin", "arccos", "arctan", "sqrt", "sin", "cos", "tan", "cot", "ln", "log"):
        if not prose and value.startswith(name) and 1 <= len(value) - len(name) <= 2:
            out.append(Token("fn", FUNCTIONS[name], glued))
            out.extend(Token("id", letter) for letter in value[len(name) :])
            return
    out.append(Token("word", value, glued))
