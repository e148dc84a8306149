"""OpenAI's `text_similarity` grader, with metrics of well-kept libraries."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from ._grader import Grader, GraderError, check_type, fill

_ROUGES = (*(f"rouge_{n}" for n in (1, 2, 3, 4, 5)), "rouge_l")
METRICS = ("fuzzy_match", "bleu", "gleu", "meteor", "cosine", *_ROUGES)


class TextSimilarityGrader(Grader):
    """Score between 0 and 1: how alike the input and the reference are.

    Libraries: `fuzzy_match` rapidfuzz's ratio, `bleu` sacrebleu's sentence BLEU,
    `gleu` and `meteor` nltk, `rouge_n` and `rouge_l` rouge-score (F measure).
    Deviations: `meteor` matches words and stems but not synonyms, whose database
    must be downloaded; `cosine` is taken between word counts, since the hosted
    grader's embedding model is not public.

    Args:
        evaluation_metric: One of `METRICS`.
        input: Template of the text.
        reference: Template of what it is compared with.
        pass_threshold: From where on it passes.
        type: `text_similarity`.
        name: Any name.
    """

    type_name = "text_similarity"
    examples = (
        ("the cat sat on the mat", "the cat sat on the mat", "correct"),
        ("the cat sat on the mat", "zzz", "incorrect"),
    )

    def __init__(
        self,
        evaluation_metric: str = "fuzzy_match",
        input: str = "{{sample.output_text}}",  # noqa: A002 -- the name in the JSON
        reference: str = "{{item.reference}}",
        pass_threshold: float = 0.5,
        type: str | None = None,  # noqa: A002
        name: str = "text_similarity",
    ) -> None:
        """Check the options and load the metric's library.

        Raises:
            ValueError: An unknown metric, a threshold outside 0 to 1, another type.
            ImportError: The metric's library is not installed.
        """
        check_type(type, self.type_name)
        if evaluation_metric not in METRICS:
            raise ValueError(
                f"text_similarity: evaluation_metric is {evaluation_metric!r}, expected one of "
                f"{', '.join(METRICS)}"
            )
        if not 0 <= pass_threshold <= 1:
            raise ValueError(
                f"text_similarity: pass_threshold is {pass_threshold}, expected 0 to 1"
            )
        self.metric, self.input, self.reference = evaluation_metric, input, reference
        self.pass_threshold, self.name = float(pass_threshold), name
        self._measure = _measure(evaluation_metric)

    def grade(self, item: Mapping[str, Any], sample: Mapping[str, Any]) -> tuple[float, str | None]:
        """Measure; two texts without any word are alike when they are equal."""
        text, reference = fill(self.input, item, sample), fill(self.reference, item, sample)
        if not text.strip() or not reference.strip():
            return float(text.strip() == reference.strip()), self.metric
        if len(text) + len(reference) > 200_000:
            raise GraderError(
                f"{len(text)} and {len(reference)} characters, more than 200000 together"
            )
        return min(1.0, max(0.0, self._measure(text, reference))), self.metric


def _measure(metric: str) -> Callable[[str, str], float]:
    """Return the metric as a function of text and reference."""
    if metric == "fuzzy_match":
        fuzz = _library("rapidfuzz.fuzz", "rapidfuzz", metric)
        return lambda text, reference: fuzz.ratio(text, reference) / 100.0
    if metric == "bleu":
        bleu = _library("sacrebleu.metrics", "sacrebleu", metric).BLEU(effective_order=True)
        return lambda text, reference: bleu.sentence_score(text, [reference]).score / 100.0
    if metric == "gleu":
        gleu = _library("nltk.translate.gleu_score", "nltk", metric)
        return lambda text, reference: float(gleu.sentence_gleu([_words(reference)], _words(text)))
    if metric == "meteor":
        meteor = _library("nltk.translate.meteor_score", "nltk", metric)
        return lambda text, reference: float(
            meteor.meteor_score([_words(reference)], _words(text), wordnet=_NoSynonyms())
        )
    if metric == "cosine":
        return _cosine
    scorer = _library("rouge_score.rouge_scorer", "rouge-score", metric)
    kind = "rougeL" if metric == "rouge_l" else metric.replace("rouge_", "rouge")
    rouge = scorer.RougeScorer([kind], use_stemmer=True)
    return lambda text, reference: float(rouge.score(reference, text)[kind].fmeasure)


def _library(module: str, package: str, metric: str) -> Any:
    from importlib import import_module

    try:
        return import_module(module)
    except ImportError as error:
        raise ImportError(
            f"text_similarity: metric {metric!r} needs {package}, which is not installed; "
            f"pip install {package}, or the extra 'text' of this package"
        ) from error


class _NoSynonyms:
    """Stands in for the synonym database: no word has a synonym."""

    def synsets(self, word: str) -> list[Any]:
        """Return no synonyms."""
        return []


def _words(text: str) -> list[str]:
    return re.findall(r"\w+|[^\w\s]", text.lower())


def _cosine(text: str, reference: str) -> float:
    a, b = Counter(_words(text)), Counter(_words(reference))
    dot = sum(count * b[word] for word, count in a.items())
    size = math.sqrt(sum(c * c for c in a.values())) * math.sqrt(sum(c * c for c in b.values()))
    return dot / size if size else 0.0
