"""Supervised fine-tuning: (q, o) ~ P_sft, no reward, GC = 1.

Only assistant tokens (content and the end-of-turn token) carry loss; the others condition.
The default normaliser is "token" (002_…); "sequence" gives eq. 1 of 000_….
"""

from __future__ import annotations

from pipeline.methods import MethodConfig
from pipeline.methods._imitation import Imitation
from pipeline.normaliser import Normaliser


class Config(MethodConfig):
    """Settings of SFT.

    Attributes:
        last_turn_only: Whether only the last of several assistant turns carries loss.
    """

    kind: str = "sft"
    normaliser: Normaliser = "token"
    last_turn_only: bool = False


class Sft(Imitation):
    """Imitate the rows of the data stage, in their order."""

    source = "rows"


def create(config: Config) -> Sft:
    """Return the method."""
    return Sft(config)
