"""The update of every method: batch → coefficient → loss → optimizer step.

A method is known here only by its gradient coefficient (methods.__init__): with normaliser
weights 1/Z and the method's GC, both without gradient,

    loss = − Σ_i Σ_t  sg(GC_{i,t} · is_{i,t} / Z_i) · log π_θ(o_{i,t} | q_i, o_{i,<t})

where `is` corrects for a sampler that is not quite the trainer (pipeline.correction; 1 when off).
For a reward model R_φ stands where log π_θ stands. A critic adds c1 · sg(∂L_V/∂V) · V, an entropy
bonus − c2 · H / Z, a KL over the whole vocabulary + β · KL / Z.

What is shown as "objective" is the method's own J, computed beside it. Deviation from 000_…:
groups without signal leave the step and its denominators; the paper leaves them in with
coefficient 0, which scales the step by the share of groups that carry signal.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pipeline import divergence
from pipeline.adapters import Adapters, plain_weights
from pipeline.agreement import Agreement
from pipeline.batch import Layout, MicroBatch, Sequence, Tokens, flatten
from pipeline.coefficients import Watched
from pipeline.config import RunConfig, TrainConfig
from pipeline.correction import gap_figures, importance
from pipeline.critic import Critic, critic_of
from pipeline.engines import sample_seed
from pipeline.logprobs import Selected
from pipeline.methods import Method
from pipeline.non_finite import NonFiniteError
from pipeline.optimizer import build_optimizer, learning_rate, set_learning_rate
from pipeline.policy import States, check_head, hidden_states, in_one_pass, token_logprobs
from pipeline.ranks import ALONE, Ranks
from pipeline.records import advantage_figures, over_parts
from pipeline.split import whole
from pipeline.stage_models import load_models
from pipeline.state import Part


class Output(NamedTuple):
    """One forward pass, [T] each.

    Attributes:
        variable: What the coefficient weighs: log π_θ, or the score of a reward model.
        entropy: Of the policy; zeros for a reward model.
        kl: KL(π_θ‖π_ref) over the vocabulary; zeros where nobody asks.
        ref_logp: log π_ref, without gradient; None where there is no reference.
        value: V of the state before each token; None where there is no critic.
        end_value: V of the state after each token.
    """

    variable: Tensor
    entropy: Tensor
    kl: Tensor
    ref_logp: Tensor | None = None
    value: Tensor | None = None
    end_value: Tensor | None = None


class Trainer:
    """Model, optimizer and method of one stage.

    Args:
        run: The whole run's configuration.
        config: This stage's.
        method: What weighs the tokens.
        model: The policy, or the reward model.
        reference: The frozen π_ref, where the method needs one.
        critic: V, where the method has one.
        adapters: Those in the model, where they are trained in its place; without them it is the
            reference.
        ranks: The processes that train it together.
    """

    def __init__(
        self,
        run: RunConfig,
        config: TrainConfig,
        method: Method,
        model: Any,
        reference: Any = None,
        critic: Critic | None = None,
        adapters: Adapters | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        """Build the optimizer."""
        self.adapters, self.ranks = adapters, ranks
        self.scores = critic_of(model) if method.trains == "scores" else None
        if self.scores is None:
            check_head(model)
        self.run, self.config, self.method = run, config, method
        self.model, self.reference, self.critic = model, reference, critic
        # π_rollout and its V, where they are kept while π_θ goes on.
        kept = copy.deepcopy((model, critic)) if method.refresh > 1 else (model, critic)
        self.rollout, self.rollout_critic = kept
        self._shard()
        self.trained: dict[str, nn.Module] = {"model": model}
        if critic is not None:
            self.trained["critic"] = critic
        self.device = next(model.parameters()).device
        shares = {"model": 1.0, "critic": method.critic_rate}
        self.optimizer = build_optimizer(
            *((module, shares[name]) for name, module in self.trained.items()),
            config=config.optimizer,
        )
        # The trainer divides logits by the temperature that the sampler used.
        on_samples = method.source in ("samples", "policy")
        self.temperature = run.sampling.temperature if on_samples else 1.0
        # log π_ref of batches that come again, [T] each, by their place in an epoch.
        self.references: dict[int, Tensor] = {}
        # What the tokens of the last batch were weighed with, [T] each (`pipeline.coefficients`).
        self.watched: Watched = {}
        # Set for methods that sample: stops before a gradient of wrong log-probs is used.
        self.agreement: Agreement | None = None

    def _shard(self) -> None:
        """Split what is a model of its own over the ranks, where this stage does that."""
        if self.scores is not None:
            self.ranks.shard(self.scores, self.model)
            return
        own = {id(m): m for m in (self.model, self.reference, self.rollout) if m is not None}
        for model in own.values():
            self.ranks.shard(model)
        for critic in {id(c): c for c in (self.critic, self.rollout_critic)}.values():
            if critic is not None and critic.backbone is not None:
                self.ranks.shard(critic, critic.backbone)

    def parts(self) -> dict[str, Part]:
        """Return what a saved state holds."""
        parts = {name: Part(module, self.optimizer) for name, module in self.trained.items()}
        if self.reference is not None and self.config.iterations > 1:
            kept: Any = self.adapters.frozen if self.adapters else self.reference
            parts["reference"] = Part(kept)
        if self.method.refresh > 1:
            parts["rollout"] = Part(self.rollout)
            if self.rollout_critic is not None:
                parts["rollout_critic"] = Part(self.rollout_critic)
        return parts

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the weights that sample by their plain names, adapters merged in."""
        return plain_weights(self.rollout)

    def version(self, step: int) -> int:
        """Return how many steps the weights that sample have behind them, after `step`."""
        return step - step % self.method.refresh

    def refresh(self, step: int) -> None:
        """Let π_rollout become π_θ where it is due after `step` steps."""
        if self.method.refresh > 1 and self.version(step) == step:
            self.rollout.load_state_dict(self.model.state_dict())
            if self.critic is not None and self.rollout_critic is not None:
                self.rollout_critic.load_state_dict(self.critic.state_dict())

    def reset_reference(self) -> None:
        """Make π_ref what π_θ is now, where there is one."""
        self.references.clear()
        if self.adapters is not None and self.reference is not None:
            self.adapters.reset_reference()
        elif self.reference is not None:
            self.reference.load_state_dict(self.model.state_dict())

    def update(
        self, sequences: list[Sequence], step: int, total: int, place: int | None = None
    ) -> dict[str, Any]:
        """Take the method's optimizer steps on one batch; return the figures.

        Args:
            sequences: The batch.
            step: Number of the step, from 0.
            total: Steps in all.
            place: Which batch of an epoch this is, where it comes again with the same reference:
                that says the same of it then and is asked once.

        Raises:
            NonFiniteError: The objective or a gradient is not finite; no step was taken on it.
        """
        if self.config.lora.dropout:
            torch.manual_seed(
                sample_seed(self.run.seed, step, f"dropout/{self.config.name}", self.ranks.index)
            )
        tokens = self.flat(sequences)
        if place is not None and tokens.ref_logp is None:
            tokens.ref_logp = self.references.get(place)
        rate = learning_rate(self.config.optimizer, step, total)
        set_learning_rate(self.optimizer, rate)
        figures: dict[str, Any] = {}
        last = self.method.config.updates - 1
        for inner in range(last + 1):
            found, own, coefficients = self._accumulate(sequences, tokens)
            if inner == 0 and self.agreement is not None:
                self.agreement.judge(found["sampler_gap_mean"], sequences)
            if not math.isfinite(found["objective"]):
                words = f"the objective of step {step} is {found['objective']}"
                raise NonFiniteError(words, sequences)
            norms = {name: self._clip(module) for name, module in self.trained.items()}
            for name, norm in norms.items():
                if not math.isfinite(norm):
                    words = f"the gradient of step {step} is {norm} ({name})"
                    raise NonFiniteError(words, sequences)
            self.optimizer.step()
            if inner == 0:
                figures = {**found, "grad_norm": norms.pop("model"), "learning_rate": rate}
                figures |= {f"grad_norm_{name}": norm for name, norm in norms.items()}
                if self.method.source == "policy":
                    figures |= advantage_figures(tokens.advantage)
                self.watched = {"advantage": tokens.advantage, "coefficient": coefficients}
            if inner == last:
                if last:
                    self.watched["last_coefficient"] = coefficients
                # Before the first update every ratio is 1 and nothing is clipped.
                figures |= own
        if place is not None and tokens.ref_logp is not None:
            self.references[place] = tokens.ref_logp
        return figures

    def flat(self, sequences: list[Sequence]) -> Tokens:
        """Return a step's flat view, weighed; with a critic, also looked at as a whole."""
        dtype = torch.promote_types(next(self.model.parameters()).dtype, torch.float32)
        tokens = flatten(sequences, dtype)
        tokens.weight = self.method.weights(tokens, self.run.sampling.max_tokens)
        if self.critic is not None:
            self._observe(sequences, tokens)
            self.method.prepare(tokens)
        return tokens

    def _clip(self, module: nn.Module) -> float:
        limit = self.config.optimizer.clip_norm or math.inf
        norm = torch.nn.utils.clip_grad_norm_(module.parameters(), limit, foreach=True)
        return float(whole(norm))

    @torch.no_grad()
    def _observe(self, sequences: list[Sequence], tokens: Tokens) -> None:
        """Fill what the sampling policy, the reference and the critic say before the updates."""
        filled = _Filled(tokens)
        asks = self.method.observes_kl
        for micro in self._passes(sequences, tokens, whole=asks, rollout=True):
            out = self._forward(micro.layout.to(self.device), whole=asks, rollout=True)
            for name, values in (
                ("old_kl", out.kl if asks else None),
                ("old_logp", out.variable),
                ("ref_logp", out.ref_logp),
                ("old_value", out.value),
                ("end_value", out.end_value),
            ):
                if values is not None:
                    filled.put(name, micro.token_index, values)
        filled.finish(self.ranks)

    def _accumulate(
        self, sequences: list[Sequence], tokens: Tokens
    ) -> tuple[dict[str, float], dict[str, float], Tensor]:
        """Add the whole step's gradient, one micro-batch at a time.

        Returns the loop's figures, the method's own, and the coefficients, [T]. The first pass
        over a batch fills `tokens.old_logp` and `ref_logp`: π_old is the policy before the first
        update on it, and π_ref says the same at each of them.
        """
        self.optimizer.zero_grad(set_to_none=True)
        method = self.method
        sampled = method.source == "policy"
        parts: list[tuple[int, dict[str, float]]] = []
        objective = 0.0
        first, known = tokens.old_logp is None, tokens.ref_logp is not None
        filled = _Filled(tokens)
        step = _Filled(tokens)
        for micro in self._passes(sequences, tokens, need_reference=not known):
            layout, view = micro.layout.to(self.device), micro.tokens.to(self.device)
            out = self._forward(layout, need_reference=not known)
            now = out.variable.detach()
            if first:
                view.old_logp = now
                filled.put("old_logp", micro.token_index, now)
            if out.ref_logp is not None and not known:
                view.ref_logp = out.ref_logp
                filled.put("ref_logp", micro.token_index, out.ref_logp)
            if out.value is not None:
                view.value = out.value.detach()
                step.put("value", micro.token_index, view.value)
            coefficient = method.gradient_coefficient(view, now) * view.weight
            if sampled:
                coefficient = coefficient * importance(view, self.config.correction)
            step.put("coefficient", micro.token_index, coefficient)
            step.put("variable", micro.token_index, now)
            loss = -(coefficient * out.variable).sum()
            bonus = 0.0
            if method.entropy_weight:
                term = method.entropy_weight * (view.weight * out.entropy).sum()
                loss, bonus = loss - term, bonus + float(term.detach())
            if method.kl_weight:
                term = method.kl_weight * (view.weight * out.kl).sum()
                loss, bonus = loss + term, bonus - float(term.detach())
            found = {"entropy": float(out.entropy.detach().mean())} if self.scores is None else {}
            if out.value is not None:
                value = out.value.detach()
                slope = method.value_weight * view.weight * method.value_coefficient(view, value)
                loss = loss + (slope * out.value).sum()
                found["value_mean"] = float(value.mean())
            loss.backward()
            objective += float(method.objective(view, now)) + bonus
            if sampled:
                found |= gap_figures(view, self.config.correction)
            parts.append((len(now), found))
        filled.finish(self.ranks)
        self.ranks.sum_gradients(self.trained.values())
        objective = sum(self.ranks.gather(objective))
        found = over_parts(self.ranks.joined(parts))
        every = step.joined(self.ranks)
        # Of the step as a whole: means over pairs or segments do not follow from those of passes.
        whole_step = replace(tokens, value=every.get("value"))
        own = divergence.figures(tokens, every["variable"]) if sampled else {}
        own |= method.figures(whole_step, every["variable"])
        return {"objective": objective, **found}, own, every["coefficient"]

    def _passes(
        self, sequences: list[Sequence], tokens: Tokens, **asked: bool
    ) -> Iterator[MicroBatch]:
        """Yield this rank's share of a step; run what only keeps pace with the others.

        Args:
            sequences: The step's.
            tokens: Their flat view.
            **asked: What the caller asks `_forward` for, as an idle pass has to.
        """
        for micro in self.ranks.micro_batches(sequences, tokens, self.config.micro_tokens):
            if not micro.idle:
                yield micro
                continue
            out = self._forward(micro.layout.to(self.device), **asked)
            if torch.is_grad_enabled():
                total = out.variable.sum() + (0.0 if out.value is None else out.value.sum())
                (0.0 * total).backward()

    def _forward(
        self,
        layout: Layout,
        need_reference: bool = True,
        whole: bool = False,
        rollout: bool = False,
    ) -> Output:
        """Run the policy, and reference and critic where there are any; or the reward model.

        Args:
            layout: What to run.
            need_reference: Whether log π_ref is asked for.
            whole: Whether the KL over the whole vocabulary is, though it has no weight.
            rollout: Whether the policy that samples is run, not the one that is trained.
        """
        autocast = self.config.precision == "bfloat16"
        if self.scores is not None:
            _, after = self.scores(layout, autocast=autocast)
            zeros = torch.zeros_like(after.detach())
            return Output(after, zeros, zeros)
        model, critic = self.model, self.critic
        if rollout:
            model, critic = self.rollout, self.rollout_critic
        ref_logp, other = None, None
        whole = whole or bool(self.method.kl_weight)
        if self.reference is not None and (need_reference or whole):
            switched = self.adapters.reference() if self.adapters else nullcontext()
            with torch.no_grad(), switched:
                found, ref_states = self._run(self.reference, layout, autocast)
                ref_logp = found.logp
            other = (self.reference, ref_states) if whole else None
        found, states = self._run(model, layout, autocast, other)
        value = end_value = None
        if critic is not None:
            value, end_value = critic(layout, states, autocast)
        return Output(*found, ref_logp, value, end_value)

    def _run(
        self,
        model: Any,
        layout: Layout,
        autocast: bool,
        reference: tuple[Any, States] | None = None,
    ) -> tuple[Selected, States]:
        """Return a policy's log-probs, entropy and KL at each token, and its states."""

        def compute() -> tuple[Selected, States]:
            states = hidden_states(model.base_model, layout, autocast)
            targets = layout.targets
            return token_logprobs(
                model, states, targets, self.temperature, autocast, reference
            ), states

        return in_one_pass(model, compute)

    @torch.no_grad()
    def held_out(self, sequences: list[Sequence]) -> dict[str, float]:
        """Return figures on held-out data: the mean loss, and the method's own.

        For rows the loss is the mean negative log-likelihood a token; for others −J.
        """
        dtype = torch.promote_types(next(self.model.parameters()).dtype, torch.float32)
        tokens = flatten(sequences, dtype)
        tokens.weight = self.method.weights(tokens, self.run.sampling.max_tokens)
        loss = 0.0
        filled = _Filled(tokens)
        step = _Filled(tokens)
        self.model.eval()  # without the adapters' dropout
        for micro in self._passes(sequences, tokens):
            view = micro.tokens.to(self.device)
            out = self._forward(micro.layout.to(self.device))
            view.ref_logp = out.ref_logp
            if self.method.source == "rows":
                loss -= float(out.variable.sum()) / len(tokens.weight)
                continue
            loss -= float(self.method.objective(view, out.variable))
            step.put("variable", micro.token_index, out.variable)
            if out.ref_logp is not None:
                filled.put("ref_logp", micro.token_index, out.ref_logp)
        self.model.train()
        figures = {"loss": sum(self.ranks.gather(loss))}
        if self.method.source != "rows":
            filled.finish(self.ranks)
            figures |= self.method.figures(tokens, step.joined(self.ranks)["variable"])
        return {f"validation_{name}": value for name, value in figures.items()}


class _Filled:
    """Values of a step's tokens, [T] each, that passes fill.

    They are handed over when all have: a pass in between must not see half of them.
    """

    def __init__(self, tokens: Tokens) -> None:
        self.tokens = tokens
        self.values: dict[str, Tensor] = {}

    def put(self, name: str, index: Tensor, values: Tensor) -> None:
        """Keep a micro-batch's values."""
        if name not in self.values:
            self.values[name] = torch.zeros_like(self.tokens.weight)
        self.values[name][index] = values.to("cpu", self.tokens.weight.dtype)

    def joined(self, ranks: Ranks) -> dict[str, Tensor]:
        """Return all of them, those of all ranks."""
        return ranks.summed(self.values, self.tokens.weight)

    def finish(self, ranks: Ranks) -> None:
        """Hand all over to the step's flat view, as its fields."""
        for name, values in self.joined(ranks).items():
            setattr(self.tokens, name, values)


def build_trainer(
    run: RunConfig,
    config: TrainConfig,
    method: Method,
    init: str | Path | None,
    tokenizer: Any,
    ranks: Ranks = ALONE,
) -> Trainer:
    """Load or build the models of a stage, and what trains them."""
    models = load_models(run, config, method, init, tokenizer, ranks)
    return Trainer(run, config, method, *models, ranks)
