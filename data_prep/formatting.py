"""Conversations to token ids and loss masks.

The tokenizer's own chat template is rendered for every row; what stands between its generation
markers carries loss. Contents are then encoded with control tokens switched off: a text that
spells a role marker or an end token stays plain text. For that the template is rendered with
such spellings hidden, cut at the control tokens (all of them the template's own), and the
pieces in between are encoded one by one. The generation prompt is a cut too, so that a training
row starts with exactly the tokens that generation is prompted with. (Control tokens are a
tokenizer's special tokens; added tokens that are not special, such as Qwen's `<tool_call>`, stay
the text that they are.)
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import TemplateError
from tokenizers import Tokenizer

from data_prep.chat_template import chat_template
from data_prep.errors import UserError, from_prompts
from data_prep.template_budget import TemplateLimitError
from data_prep.tokenizer import (
    TokenizerConfig,
    control_tokens,
    equip,
    load_tokenizer,
    train_tokenizer,
)
from data_prep.words import word_encoder
from prompts import Profile, PromptError, load_layout, load_profile

Message = Mapping[str, str]
Row = tuple[list[int], list[int]]
# Texts up to this length are looked up before they are encoded: system texts, role headers,
# questions that come with many solutions.
_CACHED_LENGTH = 400
# Shorter ones are not worth a place in a batch either.
_BATCHED_LENGTH = 40


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


class Formatter:
    """Renders conversations with a tokenizer's template; see `load_formatter`.

    Args:
        tokenizer: A fast tokenizer with a chat template that has generation markers.
        profile: System text and stop strings.
        layout: Name of the layout, "own" for the tokenizer's own template.
    """

    # Typed Any: transformers' own annotations give unions for every token id.
    def __init__(self, tokenizer: Any, profile: Profile, layout: str) -> None:
        """Prepare a copy of the tokenizer that reads control tokens as plain text."""
        self.tokenizer, self.profile, self.layout = tokenizer, profile, layout
        self._plain = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self._plain.encode_special_tokens = True
        self._plain.no_padding()
        self._plain.no_truncation()
        self._control = {text: number for number, text in control_tokens(tokenizer).items()}
        # Longest first, so that a token that starts like another is found whole.
        names = sorted(self._control, key=lambda name: (-len(name), name))
        self._pattern = re.compile("|".join(map(re.escape, names)) or r"(?!)")
        # What templates may refer to: bos_token, eos_token, …
        self._variables: dict[str, Any] = {
            key: value
            for key, value in tokenizer.special_tokens_map.items()
            if isinstance(value, str)
        }
        self._by_word = word_encoder(self._plain)
        self._cached = lru_cache(maxsize=1024)(self._encode_one)

    @property
    def end_token_ids(self) -> list[int]:
        """Every token that ends a completion: the end of a turn, and eos."""
        row = self.conversation(
            [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        )
        generated = [token for token, mask in zip(*row, strict=True) if mask]
        control = set(self._control.values())
        ends = [token for token in generated if token in control]
        eos = self.tokenizer.eos_token_id
        return sorted({*ends, *([] if eos is None else [eos])})

    def spells_control(self, messages: Sequence[Message]) -> bool:
        """Return whether a content spells a control token as plain text."""
        return any(self._pattern.search(message["content"]) for message in messages)

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
        return self.conversation(
            [{"role": "user", "content": question}, {"role": "assistant", "content": solution}]
        )

    def conversation(self, messages: Sequence[Message]) -> Row:
        """Return (input ids, mask) of a conversation; every assistant turn has mask 1."""
        return self._join(self.pieces(messages))

    def conversations(self, batch: Sequence[Sequence[Message]]) -> list[Row]:
        """Return (input ids, mask) of many conversations, encoded in one go on all cores."""
        rendered = [self.pieces(messages) for messages in batch]
        by_word = self._by_word
        known: dict[str, list[int]] = {}
        rest: dict[str, None] = {}
        for text, token, _ in chain.from_iterable(rendered):
            if token is not None or len(text) <= _BATCHED_LENGTH or text in known:
                continue
            ids = None if by_word is None else by_word.encode(text)
            if ids is None:
                rest[text] = None
            else:
                known[text] = ids
        encodings = self._plain.encode_batch_fast(list(rest), add_special_tokens=False)
        known.update((text, found.ids) for text, found in zip(rest, encodings, strict=True))
        return [self._join(pieces, known) for pieces in rendered]

    def pieces(
        self, messages: Sequence[Message], *, generation_prompt: bool = False
    ) -> list[Piece]:
        """Return a conversation as control tokens and the texts between them.

        Raises:
            UserError: The template refuses the conversation.
        """
        hidden: list[str] = []
        spells = self.spells_control(messages)
        bracket = _unused_character(messages) if spells else ""

        def hide(match: re.Match[str]) -> str:
            hidden.append(match.group())
            return f"{bracket}{len(hidden) - 1}{bracket}"

        safe = [
            {**m, "content": self._pattern.sub(hide, m["content"]) if spells else m["content"]}
            for m in messages
        ]
        pieces = list(self._cut(*self.rendered(safe, generation_prompt=generation_prompt)))
        if not hidden:
            return pieces
        token = re.compile(f"{bracket}([0-9]+){bracket}")
        return [
            piece._replace(text=token.sub(lambda match: hidden[int(match.group(1))], piece.text))
            for piece in pieces
        ]

    def rendered(
        self, messages: Sequence[Message], *, generation_prompt: bool = False
    ) -> tuple[str, list[tuple[int, int]]]:
        """Return a conversation's whole text, and which characters of it the assistant says.

        Raises:
            UserError: The template refuses the conversation, or takes more than one may.
        """
        try:
            return chat_template(self.tokenizer.chat_template).render(
                messages,
                tools=None,
                documents=None,
                add_generation_prompt=generation_prompt,
                **self._variables,
            )
        except TemplateLimitError as error:
            name = str(getattr(self.tokenizer, "name_or_path", ""))
            raise UserError(
                f"chat template of {name or 'the tokenizer'}, layout {self.layout!r}",
                f"{error} ({len(messages)} messages)",
                "a template that writes down a conversation",
                "do not trust this tokenizer; or choose a layout (key 'layout' of the tokenizer)",
            ) from None
        except Exception as error:  # the template is a program: it may fail in any way
            words = str(error) if isinstance(error, TemplateError) else repr(error)
            raise UserError(
                "conversation",
                f"the chat template refuses it: {words}",
                "system, user and assistant turns",
                "mend the row, or choose another layout",
            ) from None

    def _cut(self, text: str, spans: Sequence[tuple[int, int]]) -> list[Piece]:
        """Cut a rendered conversation at control tokens and at the borders of `spans`."""
        borders = sorted({0, len(text), *(border for span in spans for border in span)})
        generated = iter(sorted(spans))
        span = next(generated, None)
        pieces = []
        for start, stop in pairwise(borders):
            while span is not None and span[1] <= start:
                span = next(generated, None)
            inside = span is not None and span[0] <= start
            position = start
            for match in self._pattern.finditer(text, start, stop):
                if match.start() > position:
                    pieces.append(Piece(text[position : match.start()], None, inside))
                pieces.append(Piece(match.group(), self._control[match.group()], inside))
                position = match.end()
            if stop > position:
                pieces.append(Piece(text[position:stop], None, inside))
        return pieces

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a text in which nothing is a control token."""
        return self._encode_one(text)

    def encode_with_starts(self, text: str) -> tuple[list[int], list[int]]:
        """Return the tokens of a text, and at which character of it each one starts."""
        found = self._plain.encode(text, add_special_tokens=False)
        return found.ids, [start for start, _ in found.offsets]

    def _encode_one(self, text: str) -> list[int]:
        ids = None if self._by_word is None else self._by_word.encode(text)
        if ids is not None:
            return ids
        return self._plain.encode(text, add_special_tokens=False).ids

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
                tokens = self._cached(text) if short else self._encode_one(text)
            ids += tokens
            mask += [int(generated)] * len(tokens)
        return ids, mask


def _unused_character(messages: Sequence[Message]) -> str:
    """Return a private-use character that no content has."""
    text = "".join(message["content"] for message in messages)
    return next(char for char in map(chr, range(0xE000, 0xF8FF)) if char not in text)


def profile_named(name: str, key: str) -> Profile:
    """Return a profile by name or path.

    Args:
        name: What the configuration says.
        key: The configuration's key, for errors.

    Raises:
        UserError: There is no such profile, or it is broken.
    """
    try:
        return load_profile(name)
    except PromptError as error:
        raise from_prompts(key, error) from None


def check_tokenizer(settings: TokenizerConfig, profile: Profile, key: str) -> None:
    """Refuse a layout that is not there, and a given tokenizer's path that cannot be one.

    Raises:
        UserError: It is so; nothing was loaded.
    """
    try:
        load_layout(settings.layout or profile.layout)
    except PromptError as error:
        raise from_prompts(f"{key}.layout", error) from None
    path = settings.path
    is_hub_id = path.count("/") == 1 and not path.startswith((".", "/", "~"))
    if path and not Path(path).is_dir() and not is_hub_id:
        raise UserError(
            f"{key}.path",
            f"no folder {path!r}",
            "a folder with tokenizer.json, or a hub id such as owner/name",
            "check the path",
        )


def make_formatter(
    settings: TokenizerConfig, profile: Profile, texts: Iterable[str], key: str
) -> Formatter:
    """Return the formatter of a given tokenizer, or of one of our own trained on texts.

    Args:
        settings: The tokenizer's configuration.
        profile: System text and layout.
        texts: What ours is trained on; not read for a given one.
        key: The configuration's key of `settings`, for errors.

    Raises:
        UserError: The tokenizer cannot be loaded, or there is no such layout.
    """
    if settings.path:
        return load_formatter(load_tokenizer(settings.path), profile, settings.layout)
    try:
        layout = load_layout(settings.layout or profile.layout)
    except PromptError as error:
        raise from_prompts(f"{key}.layout", error) from None
    tokenizer = train_tokenizer(texts, settings.vocab_size, layout, profile.system)
    return Formatter(tokenizer, profile, layout.name)


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
        profile = profile_named(profile, "profile")
    return Formatter(tokenizer, profile, equip(tokenizer, profile, layout))
