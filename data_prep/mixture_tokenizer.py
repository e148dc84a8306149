"""The tokenizer of a mixture: given, or trained on the first rows of every source, and checked."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

from data_prep.chunk import conversation_of
from data_prep.errors import UserError
from data_prep.files import Journal, disk_errors, sync
from data_prep.formatting import Message, make_formatter
from data_prep.mixture_config import Ingredient, MixtureConfig
from data_prep.plugins import load_plugin
from data_prep.preflight import ROWS, preflight
from data_prep.reading import Rejected, convert, read_stretch, stretches
from prompts import Profile


def prepare_tokenizer(config: MixtureConfig, profile: Profile, folder: Path) -> None:
    """Save the tokenizer that every worker loads, unless it is there.

    The first rows of every source pass preflight with it, or it is not saved.

    Args:
        config: The mixture's.
        profile: The mixture's.
        folder: The stage's folder; the tokenizer goes to `tokenizer` in it.

    Raises:
        UserError: No row can be trained on, the tokenizer cannot be loaded, or preflight fails.
    """
    target, journal = folder / "tokenizer", Journal(folder)
    if journal.holds_folder(target):
        return
    each = max(1, config.tokenizer.sample_problems // len(config.sources))
    first = [row for ingredient in config.sources for row in _first(ingredient, each)]
    if not first:
        raise UserError(
            "mixture.sources",
            "no row that can be trained on",
            "at least one",
            'look at the files; a row\'s own error shows under on_bad_row = "fail"',
        )
    texts = (message["content"] for messages in first for message in messages)
    formatter = make_formatter(
        config.tokenizer, profile, chain([profile.system], texts), "mixture.tokenizer"
    )
    checked = first[:: max(1, len(first) // ROWS)]
    preflight(formatter, checked, formatter.conversations(checked))
    temporary = folder / "tokenizer.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    with disk_errors(target):
        formatter.tokenizer.save_pretrained(temporary)
    for path in sorted(temporary.iterdir()):
        sync(path)
        journal.note(path, f"tokenizer/{path.name}")
    temporary.rename(target)


def _first(ingredient: Ingredient, rows: int) -> Iterator[list[Message]]:
    """Yield the conversations of a source's first rows, those that can be used."""
    module = load_plugin("data_prep.sources", ingredient.source.kind)
    for place, raw in read_stretch(next(iter(stretches(ingredient.training(), rows)))):
        item = convert(module, place, raw)
        if not isinstance(item, Rejected):
            yield conversation_of(item)[0]
