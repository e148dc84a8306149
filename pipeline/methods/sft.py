"""Supervised fine-tuning: (q, o) ~ P_sft, no reward, GC = 1.

Only assistant tokens (content and the end-of-turn token) carry loss; the others condition.
The default normaliser is "token" (002_…); "sequence" gives eq. 1 of 000_….
"""

from __future__ import annotations

from typing import Literal

from pipeline.batch import Sequence
from pipeline.methods import MethodConfig
from pipeline.methods._imitation import Imitation
from pipeline.normaliser import Normaliser


class Config(MethodConfig):
    """Settings of SFT.

    Attributes:
        data: "rows" of the data or mixture stage, or the preferred answers ("chosen") of its
            preference pairs.
        last_turn_only: Whether only the last of several assistant turns carries loss.
    """

    kind: str = "sft"
    normaliser: Normaliser = "token"
    data: Literal["rows", "chosen"] = "rows"
    last_turn_only: bool = False


class Sft(Imitation):
    """Imitate the rows of the data stage, in their order."""

    def __init__(self, config: Config) -> None:
        """Take the source that the config names."""
        super().__init__(config)
        self.source = "rows" if config.data == "rows" else "pairs"

    def marked(self, unit: list[Sequence]) -> list[Sequence]:
        """Leave the other side of a preference pair out."""
        if self.source == "rows":
            return unit
        return [sequence for sequence in unit if sequence.sign > 0]


def create(config: Config) -> Sft:
    """Return the method."""
    return Sft(config)
