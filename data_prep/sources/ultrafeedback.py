"""UltraFeedback: answers of several models, rated.

Hub ids: openbmb/UltraFeedback (`instruction`, `completions` with `annotations` whose Rating is a
text and can be "N/A") and HuggingFaceH4/ultrafeedback_binarized (splits train_prefs, test_prefs;
`prompt`, `chosen`, `rejected`, `score_chosen`, `score_rejected`). Of the first the best and the
worst answer by mean rating make the pair; ties are dropped, counted.
"""

from __future__ import annotations

from statistics import fmean
from typing import Any

from data_prep.errors import UserError
from data_prep.jsonl import Row, column
from data_prep.reading import Drop, Place
from data_prep.schema import Preference
from data_prep.sources._files import FilesConfig

HUB = "HuggingFaceH4/ultrafeedback_binarized"
SPLITS = {"train": "train_prefs", "test": "test_prefs"}


class Config(FilesConfig):
    """Files by split; see `data_prep.sources._files.FilesConfig`."""

    kind: str = "ultrafeedback"


def convert(row: Row, place: Place) -> Preference:
    """Return the pair of one row.

    Raises:
        UserError: A column is missing or of another type.
        Drop: There are not two rated answers, they tie, or do not differ.
    """
    where = str(place)
    if "completions" in row:
        prompt, best, worst, margin = _rated(row, where)
    else:
        prompt, best, worst, margin = _binarized(row, where)
    if margin <= 0:
        raise Drop("tied_scores")
    if best == worst:
        raise Drop("same_answer")
    if not best or not worst:
        raise Drop("empty_answer")
    return Preference(
        id=place.id,
        prompt=tuple(prompt),
        chosen=best,
        rejected=worst,
        source=place.source,
        split=place.split,
        margin=margin,
        where=where,
    )


def _rated(row: Row, where: str) -> tuple[list[tuple[str, str]], str, str, float]:
    rated = []
    for completion in column(row, "completions", list, where):
        ratings = _ratings(column(completion, "annotations", dict, where))
        if ratings:
            rated.append((fmean(ratings), column(completion, "response", str, where).strip()))
    if len(rated) < 2:
        raise Drop("not_two_rated")
    best = max(rated, key=lambda pair: pair[0])
    worst = min(rated, key=lambda pair: pair[0])
    prompt = [("user", column(row, "instruction", str, where).strip())]
    return prompt, best[1], worst[1], best[0] - worst[0]


def _ratings(annotations: dict[str, Any]) -> list[float]:
    ratings = []
    for aspect in annotations.values():
        # One judgement an aspect, or a list of them; "N/A" is no judgement.
        for judgement in aspect if isinstance(aspect, list) else [aspect]:
            rating = judgement.get("Rating") if isinstance(judgement, dict) else None
            if str(rating).replace(".", "", 1).isdigit():
                ratings.append(float(str(rating)))
    return ratings


def _binarized(row: Row, where: str) -> tuple[list[tuple[str, str]], str, str, float]:
    both = []
    for name in ("chosen", "rejected"):
        turns = [
            (column(turn, "role", str, where), column(turn, "content", str, where).strip())
            for turn in column(row, name, list, where)
        ]
        if not turns or turns[-1][0] != "assistant":
            raise UserError(
                where,
                f"column {name!r} does not end with the assistant",
                "a conversation that does",
                "read the _prefs splits, not _gen",
            )
        both.append(turns)
    if both[0][:-1] != both[1][:-1]:
        raise Drop("prompts_differ")
    margin = float(column(row, "score_chosen", (int, float), where)) - float(
        column(row, "score_rejected", (int, float), where)
    )
    return both[0][:-1], both[0][-1][1], both[1][-1][1], margin
