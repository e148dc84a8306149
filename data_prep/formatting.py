"""Conversations to token ids and loss masks.

The tokenizer's own chat template is rendered for every row; what stands between its generation
markers carries loss. Contents are then encoded with control tokens switched off: a text that
spells a role marker or an end token stays plain text. For that the template is rendered with
such spellings hidden, cut at the control tokens (all of them the template's own), and the
pieces in between are encoded one by one. The generation prompt is a cut too, so that a training
row starts with exactly the tokens that generation is prompted with.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

from jinja2 import TemplateError
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from data_prep.errors import UserError
from data_prep.tokenizer import equip
from prompts import Profile, PromptError, load_profile

Message = Mapping[str, str]
Row = tuple[list[int], list[int]]
# Short texts that recur (system texts, role headers) are encoded once.
_CACHED_LENGTH = 400


class Piece(NamedTuple):
    """A stretch of a rendered conversation.

    Attributes:
        text: What it says.
        token: Its id when it is a control token, else None.
        is_generated: Whether the assistant says it.
    """

    text: str
    token: int | None
    is_generated: bool


@dataclass(frozen=True)
class Formatter:
    """Renders conversations with a tokenizer's template; see `load_formatter`.

    Attributes:
        tokenizer: With a chat template that has generation markers.
        profile: System text and stop strings.
        layout: Name of the layout, "own" for the tokenizer's own template.
    """

    tokenizer: PreTrainedTokenizerFast
    profile: Profile
    layout: str

    def __post_init__(self) -> None:
        """Prepare a copy of the tokenizer that reads control tokens as plain text."""
        plain = Tokenizer.from_str(self.tokenizer.backend_tokenizer.to_str())
        plain.encode_special_tokens = True
        plain.no_padding()
        plain.no_truncation()
        control = {
            token.content: number
            for number, token in self.tokenizer.added_tokens_decoder.items() if token.special
        }
        # Longest first, so that a token that starts like another is found whole.
        names = sorted(control, key=lambda name: (-len(name), name))
        pattern = re.compile("|".join(map(re.escape, names)) or r"(?!)")
        variables = {
            key: value for key, value in self.tokenizer.special_tokens_map.items()
            if isinstance(value, str)
        }
        object.__setattr__(self, "_plain", plain)
        object.__setattr__(self, "_control", control)
        object.__setattr__(self, "_pattern", pattern)
        object.__setattr__(self, "_variables", variables)
        object.__setattr__(self, "_cached", lru_cache(maxsize=1024)(self._encode_one))

    @property
    def end_token_ids(self) -> list[int]:
        """Every token that ends a completion: the end of a turn, and eos."""
        row = self.conversation([{"role": "user", "content": "a"},
                                 {"role": "assistant", "content": "b"}])
        generated = [token for token, mask in zip(*row, strict=True) if mask]
        control = set(self._control.values())  # type: ignore[attr-defined]
        ends = [token for token in generated if token in control]
        eos = self.tokenizer.eos_token_id
        return sorted({*ends, *([] if eos is None else [eos])})

    def prompt_ids(self, question: str) -> list[int]:
        """Return the tokens that a completion of a question follows."""
        return self.prompt([{"role": "user", "content": question}])

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Return the tokens of a conversation, up to where the assistant speaks next."""
        return self._join(self.pieces(messages, generation_prompt=True))[0]

    def training_row(self, question: str, solution: str) -> Row:
        """Return (input ids, mask) of a question and its solution.

        Mask 1 stands on what the assistant says, its end-of-turn token (and final eos) included.
        """
        return self.conversation([{"role": "user", "content": question},
                                  {"role": "assistant", "content": solution}])

    def conversation(self, messages: Sequence[Message]) -> Row:
        """Return (input ids, mask) of a conversation; every assistant turn has mask 1."""
        return self._join(self.pieces(messages))

    def conversations(self, batch: Sequence[Sequence[Message]]) -> list[Row]:
        """Return (input ids, mask) of many conversations, encoded in one go on all cores."""
        rendered = [self.pieces(messages) for messages in batch]
        long = [
            piece.text for pieces in rendered for piece in pieces
            if piece.token is None and len(piece.text) > _CACHED_LENGTH // 10
        ]
        unique = list(dict.fromkeys(long))
        encodings = self._plain.encode_batch_fast(unique, add_special_tokens=False)  # type: ignore[attr-defined]
        known = {text: encoding.ids for text, encoding in zip(unique, encodings, strict=True)}
        return [self._join(pieces, known) for pieces in rendered]

    def pieces(
        self, messages: Sequence[Message], *, generation_prompt: bool = False
    ) -> list[Piece]:
        """Return a conversation as control tokens and the texts between them.

        Raises:
            UserError: The template refuses the conversation.
        """
        pattern = self._pattern  # type: ignore[attr-defined]
        hidden: list[str] = []
        bracket = _unused_character(messages)

        def hide(match: re.Match[str]) -> str:
            hidden.append(match.group())
            return f"{bracket}{len(hidden) - 1}{bracket}"

        safe = [{**m, "content": pattern.sub(hide, m["content"])} for m in messages]
        try:
            rendered, spans = render_jinja_template(
                [safe], chat_template=self.tokenizer.chat_template,
                return_assistant_tokens_mask=True, add_generation_prompt=generation_prompt,
                **self._variables,  # type: ignore[attr-defined]
            )
        except TemplateError as error:
            raise UserError("conversation", str(error), "system, user and assistant turns",
                            "mend the row, or choose another layout") from None
        pieces = list(self._cut(rendered[0], spans[0]))
        if not hidden:
            return pieces
        token = re.compile(f"{bracket}([0-9]+){bracket}")
        return [
            piece._replace(text=token.sub(lambda match: hidden[int(match.group(1))], piece.text))
            for piece in pieces
        ]

    def _cut(self, text: str, spans: Sequence[tuple[int, int]]) -> list[Piece]:
        """Cut a rendered conversation at control tokens and at the borders of `spans`."""
        control = self._control  # type: ignore[attr-defined]
        borders = sorted({0, len(text), *(border for span in spans for border in span)})
        generated = iter(sorted(spans))
        span = next(generated, None)
        pieces = []
        for start, stop in zip(borders, borders[1:], strict=False):
            while span is not None and span[1] <= start:
                span = next(generated, None)
            inside = span is not None and span[0] <= start
            position = start
            for match in self._pattern.finditer(text, start, stop):  # type: ignore[attr-defined]
                if match.start() > position:
                    pieces.append(Piece(text[position : match.start()], None, inside))
                pieces.append(Piece(match.group(), control[match.group()], inside))
                position = match.end()
            if stop > position:
                pieces.append(Piece(text[position:stop], None, inside))
        return pieces

    def _encode_one(self, text: str) -> list[int]:
        return self._plain.encode(text, add_special_tokens=False).ids  # type: ignore[attr-defined]

    def _join(self, pieces: Sequence[Piece], known: Mapping[str, list[int]] | None = None) -> Row:
        ids: list[int] = []
        mask: list[int] = []
        for text, token, generated in pieces:
            if token is not None:
                ids.append(token)
                mask.append(int(generated))
                continue
            tokens = known.get(text) if known else None
            if tokens is None:
                short = len(text) <= _CACHED_LENGTH
                tokens = self._cached(text) if short else self._encode_one(text)  # type: ignore[attr-defined]
            ids += tokens
            mask += [int(generated)] * len(tokens)
        return ids, mask


def _unused_character(messages: Sequence[Message]) -> str:
    """Return a private-use character that no content has."""
    text = "".join(message["content"] for message in messages)
    return next(char for char in map(chr, range(0xE000, 0xF8FF)) if char not in text)


def load_formatter(tokenizer: Any, profile: str | Profile, layout: str = "") -> Formatter:
    """Return the formatter of a tokenizer.

    Args:
        tokenizer: A loaded fast tokenizer; without a template that has generation markers it is
            given one (`data_prep.tokenizer.equip`).
        profile: A profile, its name, or the path of its file.
        layout: Name or path of a layout; empty chooses one that fits.

    Raises:
        UserError: There is no such profile or layout, or it does not fit the tokenizer.
    """
    if isinstance(profile, str):
        try:
            profile = load_profile(profile)
        except PromptError as error:
            raise UserError("profile", str(error)) from None
    return Formatter(tokenizer, profile, equip(tokenizer, profile, layout))
