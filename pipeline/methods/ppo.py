"""Proximal policy optimisation with a critic.

    r_t = reward at its token − β (log π_old − log π_ref)          (k1 in the reward)
    A_t = Σ_l (γλ)^l δ_{t+l},   δ_t = r_t + γ V(s_{t+1}) − V(s_t),   Y_t = A_t + V_old(s_t)
    J   = Σ_t w_t min(ρ_t A_t, clip(ρ_t, 1−ε_low, 1+ε_high) A_t)
    GC  = ρ A where the unclipped branch is active, else 0; at ρ = 1 it is A
    L_V = Σ_t w_t ½ max((V − Y)², (V_clip − Y)²),   V_clip = V_old + clip(V − V_old, ±c_v)

Total: −J + c1 L_V − c2 H. D: q ~ P, o ~ π_θ afresh each step. Reward: the verdict, a reward model's
score, rewards of steps, or a blend (`pipeline.reward`). All scored samples stay in the step: the
baseline is V, not the group. With kl = "k2" or "k3" the KL is a loss term instead, as in GRPO.
`dual_clip` = c > 1 bounds the objective from below by c·A where A < 0 (Ye et al. 2020,
arXiv:1912.09729); DeepSeekMath has none, so it is off.

Source: 000_… eq. 11, 13, 14; 001_… (value loss, entropy: its + c2·L_ENT has L_ENT the negative
entropy); 003_… (reward with KL). Advantages are whitened over the tokens of the step, an option;
targets Y are made before that. c1, γ, λ and c_v are the common 0.5, 1, 0.95 and 0.2 (Schulman et
al. 2017, arXiv:1707.06347, with γ = 1 since a solution's worth does not fade with its length).
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from pipeline.advantage import generalised_advantages, token_rewards, whitened
from pipeline.batch import Sequence, Tokens
from pipeline.divergence import Estimator, estimate
from pipeline.methods._surrogate import Surrogate, SurrogateConfig


class Config(SurrogateConfig):
    """Settings of PPO.

    Attributes:
        beta: Weight of the KL.
        kl: "k1" in the reward of each token, "k2" or "k3" as a loss term.
        gamma: γ.
        lam: λ of GAE.
        truncation: What follows a completion that was cut off: V of its last state
            ("bootstrap"), or nothing ("terminal").
        whiten: Whether advantages have mean 0 and spread 1 over the step's tokens.
        critic: A "head" on the policy's states, or a "separate" model.
        critic_init: What a separate critic starts from: a training stage's name (a reward model,
            for one) or a folder; empty takes what the policy starts from.
        critic_rate: The critic's share of the learning rate.
        value_weight: c1.
        value_clip: c_v; 0 clips nothing.
        entropy: c2.
        dual_clip: c; 0 is off.
    """

    kind: str = "ppo"
    beta: float = Field(default=0.0, ge=0.0)
    kl: Estimator = "k1"
    updates: int = Field(default=2, ge=1)
    gamma: float = Field(default=1.0, gt=0.0, le=1.0)
    lam: float = Field(default=0.95, ge=0.0, le=1.0)
    truncation: Literal["bootstrap", "terminal"] = "bootstrap"
    whiten: bool = True
    critic: Literal["head", "separate"] = "head"
    critic_init: str = ""
    critic_rate: float = Field(default=1.0, gt=0.0)
    value_weight: float = Field(default=0.5, gt=0.0)
    value_clip: float = Field(default=0.2, ge=0.0)
    entropy: float = Field(default=0.0, ge=0.0)
    dual_clip: float = Field(default=0.0, ge=0.0)

    @model_validator(mode="after")
    def _sense(self) -> Config:
        if self.critic_init and self.critic == "head":
            raise ValueError("critic_init is for a separate critic; a head starts from zeros")
        if 0.0 < self.dual_clip <= 1.0:
            raise ValueError("dual_clip must be above 1 (or 0 for none)")
        return self


class Ppo(Surrogate):
    """Weigh each token by how much better it turned out than the critic expected."""

    takes_steps = True
    config: Config  # type: ignore[assignment]

    def __init__(self, config: Config) -> None:
        """Ask for a critic."""
        super().__init__(config)
        self.critic, self.critic_init = config.critic, config.critic_init
        self.critic_rate, self.value_weight = config.critic_rate, config.value_weight
        self.entropy_weight = config.entropy

    def compare(self, rewards: list[float]) -> list[float]:
        """Return the rewards: PPO compares with the critic, not within the group."""
        return rewards

    def advantages(self, sequences: list[Sequence]) -> list[Sequence]:
        """Return the scored sequences; `prepare` finds the advantages."""
        return [s for s in sequences if s.reward is not None]

    def prepare(self, tokens: Tokens) -> None:
        """Set A by GAE and the critic's targets Y."""
        config = self.config
        rewards = token_rewards(tokens)
        if config.beta and config.kl == "k1":
            gap = estimate("k1", self.old_logp(tokens), self._ref_logp(tokens))
            rewards = rewards - config.beta * gap
        bootstrap = config.truncation == "bootstrap"
        found = generalised_advantages(tokens, rewards, config.gamma, config.lam, bootstrap)
        tokens.target = found + self._old_value(tokens)
        tokens.advantage = whitened(found) if config.whiten else found

    def advantage(self, tokens: Tokens) -> Tensor:
        """Return A, [T]: `prepare` has put the k1 reward into it."""
        return tokens.advantage

    def surrogate(self, ratio: Tensor, advantage: Tensor, logp: Tensor) -> Tensor:
        """Return the clipped surrogate, bounded below by c·A where A < 0 and c is set."""
        found = super().surrogate(ratio, advantage, logp)
        if self.config.dual_clip:
            bounded = torch.maximum(found, self.config.dual_clip * advantage)
            found = torch.where(advantage < 0, bounded, found)
        return found

    def clipped(self, ratio: Tensor, advantage: Tensor) -> Tensor:
        """Return where a clip binds, [T] bool."""
        found = super().clipped(ratio, advantage)
        if self.config.dual_clip:
            found = found | ((advantage < 0) & (ratio > self.config.dual_clip))
        return found

    def value_loss(self, tokens: Tokens, value: Tensor) -> Tensor:
        """Return Σ w·½·max((V − Y)², (V_clip − Y)²)."""
        target = _known(tokens.target)
        loss = (value - target).square()
        if self.config.value_clip > 0:
            loss = torch.maximum(loss, (self._clipped_value(tokens, value) - target).square())
        return (tokens.weight * 0.5 * loss).sum()

    def value_coefficient(self, tokens: Tokens, value: Tensor) -> Tensor:
        """Return V − Y, or 0 where the clipped branch is the larger and lies at its bound."""
        target = _known(tokens.target)
        slope = value - target
        if self.config.value_clip > 0:
            clipped = self._clipped_value(tokens, value)
            bound = (clipped - target).square() > slope.square()
            slope = torch.where(bound & (clipped != value), 0.0, slope)
        return slope

    def figures(self, tokens: Tokens, logp: Tensor) -> dict[str, float]:
        """Return the surrogate's figures, and how well V foresaw the targets."""
        found = super().figures(tokens, logp)
        target, old = _known(tokens.target), self._old_value(tokens)
        found["value_error"] = float((target - old).square().mean())
        found["value_target"] = float(target.mean())
        return found

    def _clipped_value(self, tokens: Tokens, value: Tensor) -> Tensor:
        old, bound = self._old_value(tokens), self.config.value_clip
        return old + (value - old).clamp(-bound, bound)

    def _old_value(self, tokens: Tokens) -> Tensor:
        return _known(tokens.old_value)


def _known(values: Tensor | None) -> Tensor:
    if values is None:
        raise ValueError("PPO needs the values of its critic and the targets made of them")
    return values


def create(config: Config) -> Ppo:
    """Return the method."""
    return Ppo(config)
