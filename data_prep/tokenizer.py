"""The tokenizer: trained on the run's own texts, or a given one with a template that masks.

A trained one is byte-level BPE (any text round-trips) with every digit a token of its own, so
that arithmetic does not depend on how numbers happen to be cut.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import Field
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from data_prep import jsonl
from data_prep.config import Config
from data_prep.errors import UserError, from_prompts
from prompts import Layout, Profile, PromptError, layout_names, load_layout

# Byte-level BPE starts from all 256 bytes, so that nothing is ever unknown.
BYTES = 256
# What is never merged across: Qwen2.5's pattern. Digits stand alone, and line breaks stay apart
# from the word after them, so that a text is cut alike with and without what stands before it.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class TokenizerConfig(Config):
    """Which tokenizer a run uses.

    Attributes:
        path: A local folder or a hub id; empty trains our own.
        vocab_size: Size of our own vocabulary, control tokens and 256 bytes included.
        sample_problems: Most problems whose texts ours is trained on, taken evenly.
        layout: Layout of the conversation; empty takes the profile's, or for a given tokenizer
            the first that fits (its own template where that has generation markers).
    """

    path: str = ""
    vocab_size: int = Field(default=512, ge=BYTES + 16)
    sample_problems: int = Field(default=20000, ge=1)
    layout: str = ""


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, layout: Layout, system: str
) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer; the same texts give the same tokenizer.

    Args:
        texts: What it will be used on: questions, solutions, the system text.
        vocab_size: Size of the vocabulary, control tokens and bytes included. It may come out
            smaller, when the texts have no more pairs to merge.
        layout: Names the control tokens and gives the chat template.
        system: System text of the template.

    Returns:
        The tokenizer with its chat template; bos, eos and pad are set.
    """
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(  # type: ignore[assignment]
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[
            AddedToken(token, special=True, normalized=False) for token in layout.control
        ],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=layout.bos or None,
        eos_token=layout.eos,
        pad_token=layout.pad,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = layout.render_template(system)
    return tokenizer


def load_tokenizer(path: str) -> PreTrainedTokenizerFast:
    """Load a tokenizer from a local folder or a hub id.

    Raises:
        UserError: It is not there, or is not a fast tokenizer.
    """
    try:
        tokenizer: Any = _class_of(path).from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UserError(
            f"tokenizer {path!r}",
            str(error).strip().splitlines()[0],
            "a folder with tokenizer.json, or a hub id that can be reached",
            "check the path; without a network, download the model first and give its folder",
        ) from None
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(
            f"tokenizer {path!r}",
            f"{type(tokenizer).__name__} has no fast form",
            "a tokenizer with a tokenizer.json",
            "convert it with transformers first",
        )
    return tokenizer


def _class_of(path: str) -> Any:
    """Return the class that loads a tokenizer, without torch where that can be told."""
    config = Path(path) / "tokenizer_config.json"
    if config.is_file():
        name = jsonl.read_json(config).get("tokenizer_class")
        if name in ("PreTrainedTokenizerFast", "TokenizersBackend"):
            return PreTrainedTokenizerFast
    # Here and not above: it imports torch, which costs every worker process seconds.
    from transformers import AutoTokenizer

    return AutoTokenizer


def equip(tokenizer: PreTrainedTokenizerFast, profile: Profile, layout: str = "") -> str:
    """Give a loaded tokenizer a template that marks what the assistant says.

    A template of its own is kept when it has generation markers and no layout is asked for.

    Args:
        tokenizer: Changed in place: chat template, and pad where it had none.
        profile: Gives the system text, and the layout where that fits the vocabulary.
        layout: Name or path of a layout; empty chooses.

    Returns:
        The name of the layout, or "own" for the tokenizer's own template.

    Raises:
        UserError: The layout's control tokens are not in the vocabulary.
    """
    if tokenizer.pad_token is None:
        # Padding is always masked by length, so sharing a token with eos costs nothing.
        tokenizer.pad_token = tokenizer.eos_token
    template = tokenizer.chat_template
    if not layout and isinstance(template, str) and "endgeneration" in template:
        return "own"
    try:
        chosen = load_layout(layout) if layout else _fitting(tokenizer, profile)
    except PromptError as error:
        raise from_prompts("tokenizer.layout", error) from None
    missing = _missing(tokenizer, chosen)
    if missing:
        fitting = [name for name in layout_names() if not _missing(tokenizer, load_layout(name))]
        raise UserError(
            "tokenizer.layout",
            f"{chosen.name!r} needs {', '.join(missing)}, not in the vocabulary",
            f"a layout that fits: {', '.join(fitting)}",
            "name another layout, or leave it empty",
        )
    tokenizer.chat_template = chosen.render_template(profile.system)
    if chosen.end:
        # Generation has to stop where the layout ends a turn.
        tokenizer.eos_token = chosen.eos
    if tokenizer.eos_token is None:
        raise UserError(
            "tokenizer",
            "it has no end-of-sequence token",
            "an eos token",
            "set eos_token in its tokenizer_config.json",
        )
    return chosen.name


def _fitting(tokenizer: PreTrainedTokenizerFast, profile: Profile) -> Layout:
    names = [profile.layout, "qwen25", "llama3", "plain"]
    return next(layout for layout in map(load_layout, names) if not _missing(tokenizer, layout))


def control_tokens(tokenizer: Any) -> dict[int, str]:
    """Return every control token: those that are special, role markers included, by id."""
    return {
        number: token.content
        for number, token in tokenizer.added_tokens_decoder.items()
        if token.special
    }


def _missing(tokenizer: PreTrainedTokenizerFast, layout: Layout) -> list[str]:
    known = tokenizer.get_added_vocab()
    return [token for token in layout.control if token not in known]


class HasTokenizer(Config):
    """A stage's configuration that names a tokenizer."""

    tokenizer: TokenizerConfig = TokenizerConfig()


S = TypeVar("S", bound=HasTokenizer)


def with_tokenizer(config: S, path: str) -> S:
    """Return a stage's configuration with a tokenizer, unless it names one or none is given."""
    if not path or config.tokenizer.path:
        return config
    tokenizer = config.tokenizer.model_copy(update={"path": path})
    return config.model_copy(update={"tokenizer": tokenizer})


def model_path(table: Mapping[str, Any]) -> str:
    """Return the folder or hub id of the model that a run's configuration starts from, or ""."""
    model = table.get("model")
    return str(model.get("path") or "") if isinstance(model, dict) else ""


def tokenizer_files(path: str) -> dict[str, Path]:
    """Return the files that decide a local tokenizer, by name; none for a hub id."""
    folder = Path(path)
    names = (
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "chat_template.jinja",
    )
    if not path or not folder.is_dir():
        return {}
    return {f"tokenizer/{name}": folder / name for name in names if (folder / name).is_file()}
