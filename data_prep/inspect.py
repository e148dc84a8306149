r"""Shows rows of a data or mixture stage in the terminal, as tokens with their mask.

    python -m data_prep.inspect runs/cpu/data --row 3
    python -m data_prep.inspect runs/sft/mixture --split validation --row 0 --plain

Tokens that carry loss are green, control tokens red; with `--plain` (or where the output is not a
terminal) each token is a line: index, mask, id, text.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_prep.arguments import Arguments
from data_prep.errors import UserError, command
from data_prep.loader import Sequences
from data_prep.tokenizer import control_tokens, load_tokenizer
from verifiers.plain import plain

GREEN, RED, DIM, OFF = "\x1b[42;30m", "\x1b[31;1m", "\x1b[2m", "\x1b[0m"


def read_row(stage: Path, split: str, row: int) -> tuple[str, list[int], list[int]]:
    """Return (title, input ids, mask) of a training sequence; the title names its documents.

    Raises:
        UserError: The folder is not such a stage, or has no such row.
    """
    sequences = Sequences(stage, split)
    if not 0 <= row < len(sequences):
        raise UserError(
            str(stage), f"row {row}", f"0 to {len(sequences) - 1}", "name another --row"
        )
    documents = sequences[row]
    names = ", ".join(f"{source} {number}" for source, number in sequences.origins(row))
    ids = [token for document in documents for token in document.input_ids.tolist()]
    mask = [bit for document in documents for bit in document.mask.tolist()]
    return f"sequence {row} of {len(sequences)}: {names}", ids, mask


def coloured(texts: Sequence[str], mask: Sequence[int], control: Sequence[bool]) -> str:
    """Return the tokens joined, with loss and control tokens coloured."""
    parts = []
    for text, bit, is_control in zip(texts, mask, control, strict=True):
        colour = (GREEN if bit else DIM) + (RED if is_control else "")
        parts.append(f"{colour}{plain(text)}{OFF}")
    return "".join(parts)


def lines(ids: Sequence[int], mask: Sequence[int], texts: Sequence[str]) -> str:
    """Return a line a token: index, mask, id, text."""
    return "\n".join(
        f"{index:6} {bit} {token:7} {text!r}"
        for index, (token, bit, text) in enumerate(zip(ids, mask, texts, strict=True))
    )


def main(arguments: list[str]) -> None:
    """Show a row."""
    parser = Arguments("python -m data_prep.inspect", __doc__)
    parser.add_argument("stage", help="folder of a data or mixture stage")
    splits = ("train", "validation")
    parser.add_argument("--split", default="train", choices=splits, help="default: train")
    parser.add_argument("--row", type=int, default=0, help="which sequence, from 0")
    parser.add_argument("--plain", action="store_true", help="a line a token")
    options = parser.parse_args(arguments)
    stage = Path(options.stage)
    title, ids, mask = read_row(stage, options.split, options.row)
    tokenizer: Any = load_tokenizer(str(stage / "tokenizer"))
    texts = [tokenizer.decode([token]) for token in ids]
    print(f"{plain(title)}: {len(ids)} tokens, {sum(mask)} carry loss")
    if options.plain or not sys.stdout.isatty():
        print(lines(ids, mask, texts))
    else:
        control = control_tokens(tokenizer)
        print(coloured(texts, mask, [token in control for token in ids]))


if __name__ == "__main__":
    command(main)
