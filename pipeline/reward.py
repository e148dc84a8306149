"""Verdicts and models to rewards: the only place where one becomes the other.

    r = rule·r′ + model·R_φ + format·f + length·ℓ

r′ is the verdict as 1 or 0, corrected for a verifier that is known to err; R_φ a reward model's
score; f the share of the required form that is kept; ℓ the length term within the group. A
verdict that could not be reached (unparseable gold, timeout, error) masks its sample: it is never
scored 0, which would teach the policy the verifier's weaknesses.

With `process`, every step has a reward of its own beside the whole's: the share of its equations
that hold ("steps"), or a process reward model's probability that it is right ("model"). The last
token carries the whole's.

Source: methods.md sections 6 and 7 (process supervision, noise-aware reward).
"""

from __future__ import annotations

import math
from collections import defaultdict
from typing import TYPE_CHECKING, Literal, Protocol

from pydantic import Field, model_validator

from data_prep.config import Config
from pipeline.non_finite import NonFiniteError
from verifiers import Outcome, Verdict
from verifiers.checkers import load_checker
from verifiers.checkers.steps import split_steps, step_reward

if TYPE_CHECKING:
    from collections.abc import Callable

    from pipeline.batch import Sequence

# Terms of a reward, and the keys that do nothing without them.
SHAPED = {
    "rule": ("false_accept", "false_reject"),
    "model": ("squash",),
    "process": ("process_weight", "process_split"),
    "format": ("require",),
    "retrain": ("retrain_batch", "retrain_rate", "replay"),
}


class Scorer(Protocol):
    """A reward model, as `pipeline.scorer` loads it."""

    def score(self, prompts: list[list[int]], completions: list[list[int]]) -> list[float]:
        """Return R_φ of each completion, read after its last token."""
        ...

    def score_steps(
        self, prompts: list[list[int]], completions: list[list[int]], ends: list[list[int]]
    ) -> list[list[float]]:
        """Return the probability that each step is right, read after the token that ends it."""
        ...


class RewardConfig(Config):
    """What the reward of a rollout is made of.

    Attributes:
        rule: Weight of the verdict.
        false_accept: Share of wrong answers that the verifier takes for correct, p_fp.
        false_reject: Share of correct answers that it takes for wrong, p_fn.
        model: Weight of the reward model's score.
        model_init: The reward model: name of a training stage, or a folder.
        squash: Whether R_φ is taken as it is ("none") or as σ(R_φ).
        process: Rewards of steps: none, of the equations in them, or of a process reward model.
        process_init: The process reward model: name of a training stage, or a folder.
        process_weight: Weight of the steps' rewards beside the whole's.
        process_split: Whether steps are lines or paragraphs; a formula is never cut.
        format: Weight of the form that is kept.
        require: Options of the `format` checker.
        length: Weight of the length term: ½ − (|o| − min)/(max − min) over the group for a
            correct completion, and at most 0 for another.
        retrain: Updates of the reward model at the start of each further iteration, on pairs of
            the rollouts since; 0 leaves it as it is.
        retrain_batch: Pairs an update.
        retrain_rate: Learning rate of these updates.
        replay: Share of earlier pairs among them.
    """

    rule: float = 1.0
    false_accept: float = Field(default=0.0, ge=0.0, lt=1.0)
    false_reject: float = Field(default=0.0, ge=0.0, lt=1.0)
    model: float = 0.0
    model_init: str = ""
    squash: Literal["none", "sigmoid"] = "none"
    process: Literal["none", "steps", "model"] = "none"
    process_init: str = ""
    process_weight: float = Field(default=1.0, gt=0.0)
    process_split: Literal["line", "paragraph"] = "line"
    format: float = 0.0
    require: dict[str, bool] = {}
    length: float = Field(default=0.0, ge=0.0)
    retrain: int = Field(default=0, ge=0)
    retrain_batch: int = Field(default=16, ge=1)
    retrain_rate: float = Field(default=1e-4, gt=0.0)
    # 003_… algorithm 1, line 12; DeepSeekMath used 10 %.
    replay: float = Field(default=0.1, ge=0.0, lt=1.0)

    @model_validator(mode="after")
    def _whole(self) -> RewardConfig:
        if self.false_accept + self.false_reject >= 1.0:
            raise ValueError(
                "false_accept + false_reject must be below 1: beyond it a verdict says nothing"
            )
        if not (self.rule or self.model or self.format or self.length):
            raise ValueError("every weight is 0; give rule, model, format or length one")
        pairs = (
            ("model", bool(self.model), "model_init", bool(self.model_init)),
            ("process", self.process == "model", "process_init", bool(self.process_init)),
        )
        for key, used, init, given in pairs:
            if used and not given:
                raise ValueError(f"{key} needs {init}: a training stage's name or a model folder")
            if given and not used:
                raise ValueError(f"{init} is given and {key} does not use it")
        if self.retrain and not self.model:
            raise ValueError("retrain needs a reward model (model and model_init)")
        if self.length and not self.rule:
            raise ValueError("length looks at correct completions, so it needs rule")
        load_checker("format", self.require)
        for key, shaping in SHAPED.items():
            given = [k for k in shaping if getattr(self, k) != type(self).model_fields[k].default]
            if given and getattr(self, key) in (0, "none"):
                raise ValueError(f"{given[0]} is given and {key}, which it is a part of, is off")
        return self


class RewardMaker:
    """Sets the rewards of rollouts.

    Args:
        config: What they are made of.
        decode: Token ids to text, for rewards of steps.
        scorer: The reward model, where the config weighs one.
        process_scorer: The process reward model, likewise.
    """

    def __init__(
        self,
        config: RewardConfig,
        decode: Callable[[list[int]], str],
        scorer: Scorer | None = None,
        process_scorer: Scorer | None = None,
    ) -> None:
        """Load the format checker."""
        self.config, self.decode = config, decode
        self.scorer, self.process_scorer = scorer, process_scorer
        self.form = load_checker("format", config.require)

    @property
    def needs_verdicts(self) -> bool:
        """Whether a gold answer is looked at."""
        return self.config.rule != 0.0

    def fill(self, sequences: list[Sequence], verdicts: list[Verdict | None]) -> None:
        """Set `reward`, and `steps` with process rewards; a masked sample keeps None.

        Args:
            sequences: Rollouts, whole groups.
            verdicts: One each; None where there is no gold answer.

        Raises:
            NonFiniteError: A model's score is not finite; it stands as the reward then.
        """
        config = self.config
        base = [self._rule(verdict) for verdict in verdicts]
        lengths = _length_terms(sequences, verdicts) if config.length else [0.0] * len(sequences)
        scores = self._model_scores(sequences) if config.model else [0.0] * len(sequences)
        for sequence, rule, length, score in zip(sequences, base, lengths, scores, strict=True):
            if rule is None:
                sequence.reward = None
                continue
            form = self.form.check("", sequence.text).score if config.format else 0.0
            sequence.reward = (
                config.rule * rule
                + config.model * score
                + config.format * (form or 0.0)
                + config.length * length
            )
        if config.process != "none":
            self.fill_steps([s for s in sequences if s.reward is not None])

    def _rule(self, verdict: Verdict | None) -> float | None:
        """Return r′, 0 where verdicts have no weight, None where the sample is masked."""
        if not self.needs_verdicts:
            return 0.0
        base = None if verdict is None else reward_of(verdict)
        return (
            None
            if base is None
            else corrected(base, self.config.false_accept, self.config.false_reject)
        )

    def _model_scores(self, sequences: list[Sequence]) -> list[float]:
        if self.scorer is None:
            raise ValueError("a weight for the model's score, and no model")
        scores = self.scorer.score([s.prompt for s in sequences], [s.completion for s in sequences])
        if not all(map(math.isfinite, scores)):
            for sequence, score in zip(sequences, scores, strict=True):
                sequence.reward = score
            raise NonFiniteError("a score of the reward model is not finite", sequences)
        if self.config.squash == "sigmoid":
            return [1.0 / (1.0 + math.exp(-score)) for score in scores]
        return scores

    def fill_steps(self, sequences: list[Sequence]) -> None:
        """Set (token that ends it, reward) for each judged step, and the whole's at the end.

        Args:
            sequences: With text and reward.
        """
        texts, ends = [], []
        for sequence in sequences:
            pieces = split_steps(sequence.text, self.config.process_split)
            texts.append(pieces)
            ends.append(step_tokens(self.decode, sequence, pieces))
        if self.process_scorer is not None:
            found: list[list[float | None]] = [
                list(row)
                for row in self.process_scorer.score_steps(
                    [s.prompt for s in sequences], [s.completion for s in sequences], ends
                )
            ]
        else:
            found = [[step_reward(piece) for piece in pieces] for pieces in texts]
        for sequence, places, values in zip(sequences, ends, found, strict=True):
            last = len(sequence.completion) - 1
            by_token: dict[int, float] = defaultdict(float)
            for place, value in zip(places, values, strict=True):
                if value is None:
                    continue
                if not math.isfinite(value):
                    sequence.steps = [(place, value)]
                    raise NonFiniteError(
                        "a score of the process reward model is not finite", sequences
                    )
                by_token[place] += self.config.process_weight * value
            by_token[last] += sequence.reward or 0.0
            sequence.steps = sorted(by_token.items())


def step_tokens(
    decode: Callable[[list[int]], str], sequence: Sequence, pieces: list[str]
) -> list[int]:
    """Return the index of the token in which each piece of a completion's text ends."""
    from pipeline.segments import piece_ends, token_ends

    return piece_ends(sequence.text, pieces, token_ends(decode, sequence.completion))


def reward_of(verdict: Verdict) -> float | None:
    """Return 1 for a correct answer, 0 for a wrong or missing one, None where nobody knows."""
    if not verdict.is_scorable:
        return None
    return 1.0 if verdict.outcome is Outcome.CORRECT else 0.0


def corrected(reward: float, false_accept: float, false_reject: float) -> float:
    """Return (r − p_fp) / (1 − p_fp − p_fn), whose expectation is the true reward.

    Source: methods.md section 7 (003_… future work).
    """
    return (reward - false_accept) / (1.0 - false_accept - false_reject)


def _length_terms(sequences: list[Sequence], verdicts: list[Verdict | None]) -> list[float]:
    """Return ½ − (|o| − min)/(max − min) within each group, at most 0 for incorrect ones.

    Source: Kimi k1.5, section 2.3.3 (length penalty). 0 where all lengths are equal.
    """
    lengths: dict[int, list[int]] = defaultdict(list)
    for sequence in sequences:
        lengths[sequence.group].append(len(sequence.completion))
    terms = []
    for sequence, verdict in zip(sequences, verdicts, strict=True):
        shortest, longest = min(lengths[sequence.group]), max(lengths[sequence.group])
        term = 0.0
        if longest > shortest:
            term = 0.5 - (len(sequence.completion) - shortest) / (longest - shortest)
        right = verdict is not None and verdict.is_correct
        terms.append(term if right else min(0.0, term))
    return terms


def overlong_penalty(length: int, max_tokens: int, cache: int) -> float:
    """Return 0 up to L_max − L_cache tokens, then linear down to −1 at L_max, −1 beyond.

    A penalty that sets in softly, since a hard one would punish sound reasoning for its length.

    Args:
        length: Tokens of the completion.
        max_tokens: L_max.
        cache: L_cache; 0 is no penalty.

    Source: methods.md section 7 (DAPO's soft overlong punishment).
    """
    if cache <= 0:
        return 0.0
    return -min(1.0, max(0, length - (max_tokens - cache)) / cache)
