"""Methods: each one a data source, a reward and a gradient coefficient.

For every method A (000_…, 003_…, 004_…):

    ∇J_A(θ) = E_{(q,o)~D} [ (1/Z) Σ_t GC_A(q, o, t) · ∇ log π_θ(o_t | q, o_<t) ]

Contract of a plug-in file `pipeline/methods/<kind>.py`:

* `Config(MethodConfig)`: its settings.
* `create(config) -> Method`.

A method states the objective J and the coefficient GC = ∂J/∂logp·Z in closed form; the loop uses
only the coefficient, and one conformance test over all files proves the two equal.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from data_prep.config import PluginConfig
from data_prep.plugins import load_plugin
from pipeline.batch import Sequence, Tokens
from pipeline.normaliser import Normaliser, token_weights
from pipeline.reward import reward_of

if TYPE_CHECKING:
    from pipeline.engines import Completion
    from verifiers import Verdict

Source = Literal["rows", "samples", "policy"]


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
        source: "rows" (supervised rows), "samples" (a sample log with verdicts, made once) or
            "policy" (sampled afresh from the current policy each step).
        reference: Whether log π_ref is needed.
        refill: How often a step may draw further prompts in place of groups that are not
            `usable`; 0 draws once.
    """

    source: ClassVar[Source]
    reference: bool = False
    refill: int = 0

    def __init__(self, config: MethodConfig) -> None:
        """Keep the settings."""
        self.config = config

    def select(self, sequences: list[Sequence], seed: int) -> list[list[Sequence]]:
        """Turn a fixed log's scored sequences into units of a batch, in training order.

        A unit is a list of sequences that stay together: one sequence, or a pair. Only methods
        with `source = "samples"` are asked.
        """
        raise TypeError(f"{type(self).__module__} does not train on a fixed log")

    def reward(self, verdict: Verdict, completion: Completion, max_tokens: int) -> float | None:
        """Return the reward of one sample; None takes it out of the step.

        Only methods with `source = "policy"` are asked.

        Args:
            verdict: What the verifier said.
            completion: What it was said about.
            max_tokens: Longest completion that sampling allows.
        """
        return reward_of(verdict)

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

    @abstractmethod
    def objective(self, tokens: Tokens, logp: Tensor) -> Tensor:
        """Return J, a scalar that autograd can differentiate in `logp` [T]."""

    @abstractmethod
    def gradient_coefficient(self, tokens: Tokens, logp: Tensor) -> Tensor:
        """Return GC, [T], so that ∂J/∂logp_t = weight_t · GC_t."""

    def figures(self, tokens: Tokens, logp: Tensor) -> dict[str, float]:
        """Return figures of this method's own for the step's record."""
        return {}


def create_method(config: PluginConfig) -> Method:
    """Create the method that `config.kind` names."""
    return load_plugin("pipeline.methods", config.kind, where="method.kind").create(config)
