"""Methods: each one a data source, a reward and a gradient coefficient.

For every method A (000_…, 003_…, 004_…):

    ∇J_A(θ) = E_{(q,o)~D} [ (1/Z) Σ_t GC_A(q, o, t) · ∇ log π_θ(o_t | q, o_<t) ]

Contract of a plug-in file `pipeline/methods/<kind>.py`:

* `Config(MethodConfig)`: its settings.
* `create(config) -> Method`.

A method states the objective J and the coefficient GC = ∂J/∂logp·Z in closed form; the loop uses
only the coefficient, and one conformance test over all files proves the two equal. Reward models
train by the same loop: the scores R_φ stand where log π_θ stands. A critic has its own pair,
`value_loss` and `value_coefficient` = ∂L/∂V·Z.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from data_prep.config import PluginConfig
from data_prep.errors import UserError
from data_prep.plugins import load_plugin, make
from pipeline.batch import Sequence, Tokens
from pipeline.normaliser import Normaliser, token_weights
from pipeline.segments import By

if TYPE_CHECKING:
    from data_prep.schema import Problem

Source = Literal["rows", "samples", "policy", "pairs", "steps"]
CriticKind = Literal["none", "head", "separate"]


class MethodConfig(PluginConfig):
    """What every method has.

    Attributes:
        normaliser: The denominator Z.
        updates: Optimizer steps on one batch (μ).
    """

    normaliser: Normaliser = "sequence"
    updates: int = Field(default=1, ge=1)


class Method(ABC):
    """One row of the table: where the data comes from and what weighs it.

    Attributes:
        source: "rows" (supervised rows), "samples" (a sample log with verdicts, made once),
            "policy" (sampled afresh from the current policy each step), "pairs" (preferences)
            or "steps" (labelled steps).
        trains: A "policy", or a model of "scores" with one scalar a state; then `logp` below is
            the score of the state after each token.
        reference: Whether log π_ref is needed.
        takes_steps: Whether rewards of steps are looked at.
        takes_outcomes: Whether a reward of the whole alone is enough.
        takes_rewards: Whether the size of a reward is looked at, not the verdict alone.
        needs_verdicts: Whether verdicts are looked at beside the reward.
        cut: What ends a segment, for methods that look at segments; None leaves solutions whole.
        thoughts: Most segments before the final answer, later ones are joined; 0 for no limit.
        continuations: How many samples are drawn from behind each segment of each solution, to
            know how often they end well; they are not trained on.
        refill: How often a step may draw further prompts in place of groups that are not
            `usable`; 0 draws once.
        critic: Whether there is a V: none, a head on the policy's states, or a model of its own.
        critic_init: What a critic of its own starts from: a stage's name or a model folder;
            empty takes what the policy starts from.
        critic_rate: The critic's share of the learning rate.
        value_weight: c1, the weight of the value loss.
        entropy_weight: c2, the weight of the entropy bonus, averaged as the objective is.
        kl_weight: Weight of the KL(π_θ‖π_ref) over the whole vocabulary, averaged the same way.
        observes_kl: Whether KL(π_old‖π_ref) over the whole vocabulary is looked at (with a critic).
        refresh: Steps after which the policy that samples becomes the one that is trained; beyond
            1 (with a critic) `old_logp` and `old_value` are those of the policy that samples.
        files: Files that a method reads beside the stage's data, by their key.
    """

    source: Source
    trains: ClassVar[Literal["policy", "scores"]] = "policy"
    reference: bool = False
    takes_steps: bool = False
    takes_outcomes: bool = True
    takes_rewards: bool = True
    needs_verdicts: bool = False
    cut: By | None = None
    thoughts: int = 0
    continuations: int = 0
    refill: int = 0
    critic: CriticKind = "none"
    critic_init: str = ""
    critic_rate: float = 1.0
    value_weight: float = 1.0
    entropy_weight: float = 0.0
    kl_weight: float = 0.0
    observes_kl: bool = False
    refresh: int = 1
    files: Mapping[str, str] = MappingProxyType({})

    def __init__(self, config: MethodConfig) -> None:
        """Keep the settings."""
        self.config = config

    def select(self, sequences: list[Sequence], seed: int) -> list[list[Sequence]]:
        """Turn a fixed log's scored sequences into units of a batch, in training order.

        A unit is a list of sequences that stay together: one sequence, or a pair. Only methods
        with `source = "samples"` are asked.
        """
        raise TypeError(f"{type(self).__module__} does not train on a fixed log")

    def marked(self, unit: list[Sequence]) -> list[Sequence]:
        """Return what this method trains on of a unit of made data, loss-carrying tokens marked."""
        return unit

    def shape(self, reward: float, sequence: Sequence, max_tokens: int) -> float | None:
        """Return what this method makes of a sample's reward; None takes it out of the step.

        Only methods with `source = "policy"` are asked.

        Args:
            reward: Made by `pipeline.reward` of verdicts and models.
            sequence: What it was made for.
            max_tokens: Longest completion that sampling allows.
        """
        return reward

    def score(self, problems: list[Problem], sequences: list[Sequence]) -> list[dict[str, Any]]:
        """Make rewards of segments, for methods that have such.

        They are set as `steps`; a `reward` of None takes a sample out of the step.

        Args:
            problems: One a sequence.
            sequences: Whole solutions, judged, cut and with what continuations showed.

        Returns:
            What the log keeps of each.
        """
        return [{} for _ in sequences]

    def prefixes(self, group: list[Sequence], rng: random.Random) -> list[tuple[int, int]]:
        """Return the beginnings of solutions from which a prompt is sampled again.

        Each is the base of a further group, of as many samples as the prompt's own. Only methods
        with `source = "policy"` are asked.

        Args:
            group: All samples of the prompt itself, cut into segments where the method asks so.
            rng: The same for the same step and prompt.

        Returns:
            (sample's place in the group, how many of its tokens).
        """
        return []

    def samples(self, group_size: int) -> int:
        """Return how many samples a step draws of one prompt, at most."""
        return group_size

    def usable(self, group: list[Sequence]) -> bool:
        """Return whether a group, its scored sequences, may fill a place in the batch."""
        return True

    def advantages(self, sequences: list[Sequence]) -> list[Sequence]:
        """Set advantages from rewards; return the sequences that carry signal.

        Only methods with `source = "policy"` are asked.
        """
        raise TypeError(f"{type(self).__module__} does not train on rollouts")

    def weights(self, tokens: Tokens, max_tokens: int) -> Tensor:
        """Return 1/Z for every token of the step, [T]."""
        return token_weights(tokens, self.config.normaliser, max_tokens)

    def prepare(self, tokens: Tokens) -> None:
        """Set what needs a look at the whole step first: advantages and targets of a critic.

        Only methods with a critic are asked, once a batch, when `old_logp`, `ref_logp`,
        `old_value` and `end_value` are known.
        """
        raise TypeError(f"{type(self).__module__} has no critic")

    @abstractmethod
    def objective(self, tokens: Tokens, logp: Tensor) -> Tensor:
        """Return J, a scalar that autograd can differentiate in `logp` [T]."""

    @abstractmethod
    def gradient_coefficient(self, tokens: Tokens, logp: Tensor) -> Tensor:
        """Return GC, [T], so that ∂J/∂logp_t = weight_t · GC_t."""

    def value_loss(self, tokens: Tokens, value: Tensor) -> Tensor:
        """Return L, a scalar that autograd can differentiate in `value` [T]."""
        raise TypeError(f"{type(self).__module__} has no values")

    def value_coefficient(self, tokens: Tokens, value: Tensor) -> Tensor:
        """Return ∂L/∂V·Z, [T], so that ∂L/∂V_t = weight_t · coefficient_t."""
        raise TypeError(f"{type(self).__module__} has no values")

    def figures(self, tokens: Tokens, logp: Tensor) -> dict[str, float]:
        """Return figures of this method's own for the step's record."""
        return {}


def create_method(config: PluginConfig) -> Method:
    """Create the method that `config.kind` names.

    Raises:
        UserError: A file of the user's own does not keep to the contract.
    """
    module = load_plugin("pipeline.methods", config.kind, where="method.kind")
    method = make(module, config)
    if not isinstance(method, Method):
        raise UserError(
            str(module.__file__),
            f"create returned {type(method).__name__}",
            "a pipeline.methods.Method",
            "mend create",
        )
    return method
