"""Segment-level reinforcement fine-tuning: each thought, and the final answer, is one action.

Segments k = 1 … M + 1 of a solution (M thoughts, then the answer), s_k the state before segment k:

    Y_k = R_k + γ V_rollout(s_{k+1}),  V = 0 after the last;   A_k = Y_k − V_θ(s_k)
    ρ_k = exp Σ_j [log π_θ(t_{k,j}) − log π_rollout(t_{k,j})]    over the segment's tokens
    L_k = max(−A_k ρ_k, −A_k clip(ρ_k, 1 ± ε)) + c_vf L_V,k + β Σ_j KL(π_rollout‖π_ref)
    J   = −Σ_k w_k L_k,   w = 1/N a trajectory (normaliser "trajectory")
    GC  = ρ_k A_k on every token of a segment whose unclipped branch is active, else 0
    L_V = ½ max((V_θ − Y)², (V_clip − Y)²),  V_clip = V_rollout + clip(V_θ − V_rollout, ±c_v), at
          segment starts; ½ (V_θ − Y)² where c_v ≤ 0

A_k takes the critic's current V_θ, so it moves with the updates on a batch; in the policy term it
has no gradient. As written, the KL over whole distributions depends on π_rollout and π_ref alone:
it is part of J and of the figures ("kl_rollout", per token), and has no gradient. kl = "policy"
puts π_θ in π_rollout's place, with its gradient.

π_rollout samples, and says log π_rollout and V_rollout. It becomes π_θ every `refresh` steps; with
1, before each batch.

D: q ~ P, o ~ π_rollout. Reward: R_k of `pipeline.segment_reward`, from a grader
(`pipeline.segment_grader`): "rule", "model" or "fixed". By rule, `continuations` samples from
behind each thought measure its progress; a prompt then takes up to G · (1 + thoughts ·
continuations) samples, `samples` in the figures counts them (equal beginnings share theirs).

With one segment, V = 0 and no clip this is REINFORCE by the ratio of whole sequences: a test.

Source: 001_… (Chain-of-Thought RFT Objective, and the algorithm, whose π_ref of the first steps is
π_rollout); methods.md section 8. Readings: "optionally whiten {R_k}" is over the segments of a
solution as written ("trajectory"; it takes away what solutions differ in as a whole), or over the
step's segments ("batch"). One ε serves both sides of the clip in 001_…; it can be two here. V is a
head on the policy's states or a model of its own, which 001_… leaves open.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from pipeline.batch import Sequence, Tokens
from pipeline.methods._surrogate import Surrogate, SurrogateConfig
from pipeline.normaliser import Normaliser
from pipeline.segment_grader import GraderConfig, create_grader
from pipeline.segment_reward import SegmentRewardConfig, segment_rewards, standardised
from pipeline.segments import By

if TYPE_CHECKING:
    from data_prep.schema import Problem


class Config(SurrogateConfig):
    """Settings of segment-level RFT.

    Attributes:
        beta: β.
        kl: Whose divergence from π_ref: π_rollout's, as written, or the policy's.
        gamma: γ.
        cut: What ends a thought.
        thoughts: Most thoughts of a solution; what follows belongs to the last of them.
        grader: What gives G, S_k and P_k.
        reward: What is made of them.
        whiten: Rewards of segments to mean 0 and spread 1: not at all, over each solution, or
            over the step.
        refresh: Steps from one π_rollout ← π_θ to the next.
        critic: A "head" on the policy's states, or a "separate" model.
        critic_init: What a separate critic starts from; empty takes what the policy starts from.
        critic_rate: The critic's share of the learning rate.
        value_weight: c_vf.
        value_clip: c_v; 0 or less clips nothing.
    """

    kind: str = "segment_rft"
    normaliser: Normaliser = "trajectory"
    beta: float = Field(default=0.05, ge=0.0)
    kl: Literal["rollout", "policy"] = "rollout"  # type: ignore[assignment]
    gamma: float = Field(default=1.0, gt=0.0, le=1.0)
    cut: By = "line"
    thoughts: int = Field(default=8, ge=1)
    grader: GraderConfig = GraderConfig()
    reward: SegmentRewardConfig = SegmentRewardConfig()
    whiten: Literal["off", "trajectory", "batch"] = "off"
    refresh: int = Field(default=1, ge=1)
    critic: Literal["head", "separate"] = "head"
    critic_init: str = ""
    critic_rate: float = Field(default=1.0, gt=0.0)
    value_weight: float = Field(default=0.5, gt=0.0)
    value_clip: float = 0.2

    @model_validator(mode="after")
    def _sense(self) -> Config:
        if self.critic_init and self.critic == "head":
            raise ValueError("critic_init is for a separate critic; a head starts from zeros")
        if self.kl == "policy" and not self.beta:
            raise ValueError("kl = 'policy' with beta = 0 is no term; give beta or leave kl out")
        return self


class SegmentRft(Surrogate):
    """Weigh each segment by how much better it turned out than the critic expects now."""

    config: Config  # type: ignore[assignment]

    def __init__(self, config: Config) -> None:
        """Ask for segments, a grader and a critic."""
        super().__init__(config)
        self.cut, self.thoughts = config.cut, config.thoughts
        self.grader = create_grader(config.grader)
        by_rule = config.grader.kind == "rule"
        self.needs_verdicts = by_rule
        self.continuations = config.grader.continuations if by_rule else 0
        self.files = {"method.grader.path": config.grader.path} if config.grader.path else {}
        self.refresh = config.refresh
        self.critic, self.critic_init = config.critic, config.critic_init
        self.critic_rate, self.value_weight = config.critic_rate, config.value_weight
        self.kl_weight = config.beta if config.kl == "policy" else 0.0
        self.observes_kl = self.reference and config.kl == "rollout"

    def samples(self, group_size: int) -> int:
        """Return G, each with the continuations from behind its thoughts."""
        return group_size * (1 + self.config.thoughts * self.continuations)

    def score(self, problems: list[Problem], sequences: list[Sequence]) -> list[dict[str, Any]]:
        """Set R_k at the last token of each segment; return the grades and R."""
        log: list[dict[str, Any]] = []
        grades = self.grader.grade(problems, sequences)
        for sequence, found in zip(sequences, grades, strict=True):
            if found is None:
                sequence.reward = None
                log.append({})
                continue
            rewards = segment_rewards(found, sequence.answered, self.config.reward)
            ends = [*(n - 1 for n in sequence.cut_points), len(sequence.completion) - 1]
            sequence.reward = found.overall
            sequence.steps = list(zip(ends, rewards, strict=True))
            log.append({"grades": found._asdict(), "pieces": sequence.pieces})
        return log

    def compare(self, rewards: list[float]) -> list[float]:
        """Return the rewards: the baseline is V, not the group."""
        return rewards

    def advantages(self, sequences: list[Sequence]) -> list[Sequence]:
        """Whiten R where asked for; return the scored sequences. `prepare` finds Y."""
        kept = [s for s in sequences if s.reward is not None]
        if self.config.whiten == "off":
            return kept
        whole = self.config.whiten == "batch"
        epsilon = self.config.reward.epsilon_std
        values = [[value for _, value in s.steps] for s in kept]
        if whole:
            found = iter(standardised([v for own in values for v in own], epsilon))
            values = [[next(found) for _ in own] for own in values]
        else:
            values = [standardised(own, epsilon) for own in values]
        return [
            replace(s, steps=[(end, v) for (end, _), v in zip(s.steps, own, strict=True)])
            for s, own in zip(kept, values, strict=True)
        ]

    def prepare(self, tokens: Tokens) -> None:
        """Set Y_k on every token of segment k."""
        self.old_logp(tokens)
        value = _known(tokens.old_value)
        rewards = tokens.over_segment(tokens.step_reward.nan_to_num(0.0))
        # V_rollout(s_{k+1}) stands at the first token of the next segment.
        following = torch.where(tokens.is_last, 0.0, torch.roll(value, -1))
        ends = torch.roll(tokens.starts_segment, -1)
        after = tokens.over_segment(torch.where(ends, following, 0.0))
        tokens.target = rewards + self.config.gamma * after
        tokens.advantage = tokens.target - tokens.over_segment(
            torch.where(tokens.starts_segment, value, 0.0)
        )

    def advantage(self, tokens: Tokens) -> Tensor:
        """Return A_k = Y_k − V_θ(s_k) of each token's segment, [T]."""
        gap = _known(tokens.target) - _known(tokens.value)
        return tokens.over_segment(torch.where(tokens.starts_segment, gap, 0.0))

    def ratio(self, tokens: Tokens, logp: Tensor) -> Tensor:
        """Return ρ_k of each token's segment, [T]."""
        return torch.exp(tokens.over_segment(logp - self.old_logp(tokens)))

    def objective(self, tokens: Tokens, logp: Tensor) -> Tensor:
        """Return one clipped term a segment, minus β·KL(π_rollout‖π_ref)."""
        terms = self.surrogate(self.ratio(tokens, logp), self.advantage(tokens), logp)
        terms = torch.where(tokens.starts_segment, terms, 0.0)
        if tokens.old_kl is not None:
            terms = terms - self.config.beta * tokens.old_kl
        return (tokens.weight * terms).sum()

    def gradient_coefficient(self, tokens: Tokens, logp: Tensor) -> Tensor:
        """Return ρ_k A_k on the tokens of active segments."""
        return self.surrogate_coefficient(self.ratio(tokens, logp), self.advantage(tokens))

    def value_loss(self, tokens: Tokens, value: Tensor) -> Tensor:
        """Return Σ_k w·½·max((V − Y)², (V_clip − Y)²)."""
        target = _known(tokens.target)
        loss = (value - target).square()
        if self.config.value_clip > 0:
            loss = torch.maximum(loss, (self._clipped_value(tokens, value) - target).square())
        return (tokens.weight * 0.5 * torch.where(tokens.starts_segment, loss, 0.0)).sum()

    def value_coefficient(self, tokens: Tokens, value: Tensor) -> Tensor:
        """Return V − Y at segment starts, or 0 where the clipped branch is the larger."""
        target = _known(tokens.target)
        slope = value - target
        if self.config.value_clip > 0:
            clipped = self._clipped_value(tokens, value)
            bound = (clipped - target).square() > slope.square()
            slope = torch.where(bound & (clipped != value), 0.0, slope)
        return torch.where(tokens.starts_segment, slope, 0.0)

    def figures(self, tokens: Tokens, logp: Tensor) -> dict[str, float]:
        """Return the surrogate's figures, the divergence as written, and how well V foresaw Y."""
        found = super().figures(tokens, logp)
        starts = tokens.starts_segment
        target, old = _known(tokens.target)[starts], _known(tokens.old_value)[starts]
        found["value_error"] = float((target - old).square().mean())
        found["value_target"] = float(target.mean())
        if tokens.old_kl is not None:
            found["kl_rollout"] = float(tokens.old_kl.mean())
        return found

    def _clipped_value(self, tokens: Tokens, value: Tensor) -> Tensor:
        old, bound = _known(tokens.old_value), self.config.value_clip
        return old + (value - old).clamp(-bound, bound)


def _known(values: Tensor | None) -> Tensor:
    if values is None:
        raise ValueError("segment-level RFT needs the values of its critic and its targets")
    return values


def create(config: Config) -> SegmentRft:
    """Return the method."""
    return SegmentRft(config)
