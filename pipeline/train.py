"""One training loop for every method: batch → coefficient → loss → step → checkpoint.

    python -m pipeline.train --config pipeline/configs/cpu.toml --stage grpo
    python -m pipeline.train --config pipeline/configs/cpu.toml --stage grpo --method.clip-high 0.28

The loop knows a method only by its gradient coefficient (methods.__init__): with normaliser
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
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from data_prep.arguments import Arguments
from data_prep.config import override
from data_prep.errors import UserError, command, nearest
from data_prep.formatting import load_formatter
from data_prep.interruption import Interruption
from data_prep.run_folder import Stage
from pipeline import divergence
from pipeline.adapters import Adapters, plain_weights
from pipeline.agreement import Agreement
from pipeline.ahead import Ahead
from pipeline.batch import Layout, MicroBatch, Sequence, Tokens, flatten
from pipeline.card import base_facts, write_card
from pipeline.coefficients import Watched, write_coefficients
from pipeline.config import RunConfig, TrainConfig, load_run
from pipeline.correction import gap_figures, importance
from pipeline.critic import Critic, critic_of, load_scalar_model, value_head
from pipeline.engines import sample_seed
from pipeline.forecast import announce
from pipeline.generate import checkpoint_of, profile_of
from pipeline.logprobs import Selected
from pipeline.methods import Method, create_method
from pipeline.model import build_model, load_model, load_tokenizer, pick_device, save_checkpoint
from pipeline.monitor import Monitor
from pipeline.non_finite import NonFiniteError, keep_batch
from pipeline.optimizer import build_optimizer, learning_rate, set_learning_rate
from pipeline.plan import (
    check_vocabulary,
    init_of,
    inputs_of,
    refuse_nonsense,
    refuse_several,
    settings_of,
    truncated_sampling,
)
from pipeline.policy import States, check_head, hidden_states, in_one_pass, token_logprobs
from pipeline.publish import check_token, publish
from pipeline.ranks import ALONE, Ranks, meet, open_ranks
from pipeline.records import Records, advantage_figures, over_parts
from pipeline.replay import Replay
from pipeline.source import Data, open_data
from pipeline.split import whole
from pipeline.state import Part, load_state, save_state
from pipeline.trackers import Trackers


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


def train(run: RunConfig, config: TrainConfig) -> Path:
    """Run one training stage; return its folder, which holds `checkpoint/` and `steps.jsonl`.

    Several processes that a launcher started train it together (`pipeline.ranks`).
    """
    method = create_method(config.method)
    refuse_nonsense(run, config, method)
    device = pick_device(run.engine.device)  # type: ignore[attr-defined]
    ranks = open_ranks(config.parallel, device, f"stage {config.name!r}, key 'parallel'")
    with ranks.quiet(), ExitStack() as whole_stage:
        final = _train(run, config, method, ranks, whole_stage)
    ranks.close()
    return final


def _train(
    run: RunConfig, config: TrainConfig, method: Method, ranks: Ranks, whole_stage: ExitStack
) -> Path:
    """Do it; what is put on `whole_stage` is held until the stage is published."""
    if ranks.count > 1:
        refuse_several(run, config, method, ranks.kind)
    out = Path(run.out)
    stage = Stage(
        out, config.name, settings_of(run, config, method), inputs_of(run, config, method)
    )
    if ranks.lead(lambda: stage.is_complete):
        return stage.final
    if config.push_to_hub and ranks.leads:
        check_token(config.push_to_hub, f"stage {config.name!r}, key 'push_to_hub'")
    trackers = Trackers(
        config.trackers if ranks.leads else (),
        config.wandb,
        out,
        run.name,
        config.name,
        settings_of(run, config, method),
        f"stage {config.name!r}",
    )
    init = None if config.init == "model" and not run.model.path else init_of(run, config)
    tokenizer = load_tokenizer(run.tokenizer if init is None else init)
    profile = run.profile if init is None else profile_of(init, run.profile)
    if init is not None and method.source in ("rows", "pairs", "steps"):
        made_with = load_tokenizer(run.tokenizer)
        check_vocabulary(made_with, init, tokenizer)
        if method.source == "rows":
            # The checkpoint speaks the layout and profile of what it was trained on.
            tokenizer, profile = made_with, run.profile
    ends = load_formatter(tokenizer, profile).end_token_ids
    trainer = build_trainer(run, config, method, init, tokenizer, ranks)
    model = trainer.model
    parts = trainer.parts()

    with ExitStack() as cleanup:
        whole_stage.enter_context(stage)
        work = ranks.lead(stage.begin)
        if ranks.leads:
            cleanup.callback(stage.drop_if_empty)
        context = int(model.config.max_position_embeddings)
        data = open_data(
            run, config, method, init, tokenizer, profile, context, work, cleanup, ranks
        )
        replay = Replay.of(run, config, data)
        if replay is not None:
            parts |= replay.parts()
        start = load_state(work, parts, ranks)
        draw, ahead = data.draw, None
        if data.rollouts is not None:
            engine, prompts = data.rollouts.engine, data.rollouts.prompts
            agreement = _agreement(run, config, model, tokenizer)
            note = work / "agreement.json" if ranks.leads else None
            agreement.prove_push(engine, prompts, context, start, note)
            trainer.agreement = None if truncated_sampling(run) else agreement
            folder = work / "state" / "ahead"
            ahead = Ahead(draw, engine, config.staleness, start, data.steps, folder, ranks.leads)
            cleanup.callback(ahead.close)
            ahead.publish(trainer.weights(), trainer.version(start))
            draw = ahead.draw
        records = None
        if ranks.leads:
            monitor = Monitor(config.monitor, config.name)
            records = Records(work, start, data.steps, config.name, monitor, trackers)
            cleanup.callback(records.close)
        span = math.ceil(data.steps / config.iterations)
        step = start - 1
        interruption = whole_stage.enter_context(Interruption("step", ranks.speaks))
        for step in range(start, data.steps):
            began = time.perf_counter()
            figures: dict[str, Any] = {}
            if not step and data.check is not None:
                before = _look_at_held_out(trainer, data, 0)
                figures |= {f"{name}_before": value for name, value in before.items()}
            try:
                if step and step % span == 0:
                    figures |= _next_iteration(trainer, replay, step, span)
                sequences, drawn = draw(step)
                figures |= drawn
                drawn_at = time.perf_counter()
                if sequences:
                    place = step % data.epoch if data.steps > data.epoch > 0 else None
                    figures |= trainer.update(sequences, step, data.steps, place)
            except NonFiniteError as error:
                raise keep_batch(error, stage.run / f"{config.name}.failed") from None
            trainer.refresh(step + 1)
            if ahead is not None:
                keeps = config.coefficients_every and not step % config.coefficients_every
                if sequences and keeps and ranks.leads:
                    write_coefficients(work, step, sequences, trainer.watched)
                figures["skipped"] = float(not sequences)
                if trainer.version(step + 1) == step + 1:
                    ahead.publish(trainer.weights(), step + 1)
            done = time.perf_counter()
            if config.validate_every and (step + 1) % config.validate_every == 0:
                figures |= _look_at_held_out(trainer, data, step + 1)
            count = sum(len(s.completion) for s in sequences)
            timing = {
                "draw_s": drawn_at - began,
                "update_s": done - drawn_at,
                "tokens_per_s": count / (done - began),
            }
            if records is not None:
                records.write(step, figures, timing)
            interruption.asked = ranks.any(interruption.asked)
            if config.sample_budget:
                drawn_so_far = ranks.lead(lambda: records.samples if records else 0)
                if drawn_so_far >= config.sample_budget:
                    break
            if step + 1 < data.steps and (
                (step + 1) % config.save_every == 0 or interruption.asked
            ):
                needed = [] if ahead is None else ahead.keep(step + 1)
                oldest = save_state(work, step + 1, parts, config.keep_states, needed, ranks)
                if ahead is not None:
                    ahead.drop(oldest)
                if interruption.asked:
                    ranks.wait()  # a launcher stops the leader when the others have ended
                interruption.check()

    # A signal of the last step, or from here on, ends the run when the stage is published.
    weights = dict(trained_weights(trainer, ranks))
    if not ranks.leads:
        interruption.asked = ranks.any(interruption.asked)
        interruption.check()
        return stage.final
    reads = ""
    if method.trains == "scores":
        reads = "steps" if method.takes_steps else "end"
    save_checkpoint(work / "checkpoint", model, tokenizer, ends, profile, reads, weights)
    if trainer.adapters is not None:
        base = str(base_facts(init).get("base_model", config.init))
        trainer.adapters.save(work / "checkpoint" / "adapter", base)
    adapter = trainer.adapters is not None
    write_card(work / "checkpoint", run, config, method.trains, init, work, adapter)
    if replay is not None:
        save_checkpoint(work / "reward_model", replay.model, tokenizer, ends, profile, "end")
    parameters = sum(p.numel() for p in model.parameters())
    final = stage.complete(scratch=("state",), steps=step + 1, parameters=parameters)
    if config.push_to_hub:
        where = f"stage {config.name!r}, key 'push_to_hub'"
        tqdm.write(publish(final / "checkpoint", config.push_to_hub, where), file=sys.stderr)
    interruption.asked = ranks.any(interruption.asked)
    interruption.check()
    return final


def trained_weights(trainer: Trainer, ranks: Ranks) -> Iterator[tuple[str, Tensor]]:
    """Yield the trained model's weights; of a split one on the CPU, to the leader alone."""
    # Gathered, a tied weight is there twice; files hold it once.
    tied = getattr(trainer.model, "all_tied_weights_keys", {}) if ranks.shards else {}
    for name, value in plain_weights(trainer.model):
        if ranks.leads and name not in tied:
            yield name, value.cpu() if ranks.shards else value


def build_trainer(
    run: RunConfig,
    config: TrainConfig,
    method: Method,
    init: str | Path | None,
    tokenizer: Any,
    ranks: Ranks = ALONE,
) -> Trainer:
    """Load or build the models of a stage."""
    device = pick_device(run.engine.device)  # type: ignore[attr-defined]
    if ranks.shards:
        device = torch.device("cpu")  # a layer at a time goes to the GPU, split
    dtype, trust = run.model.dtype, run.model.trust_remote_code
    if method.trains == "scores":
        if init is None:
            raise UserError(
                f"stage {config.name!r}, key 'init'",
                "a model with random weights",
                "a trained model to judge with",
                'set init = "sft"',
            )
        judge: Any = load_scalar_model(init, dtype, trust).to(device)  # type: ignore[arg-type]
        adapters = _adapters(run, config, judge, "scores")
        _checkpointing(config, judge)
        return Trainer(run, config, method, judge.train(), adapters=adapters, ranks=ranks)
    model: Any = (
        build_model(run.model, tokenizer, run.seed)
        if init is None
        else load_model(init, dtype, trust)
    ).to(device)  # type: ignore[arg-type]
    adapters = _adapters(run, config, model)
    _checkpointing(config, model)
    reference: Any = None
    if method.reference or config.watch_reference:
        # Without its adapters the model is its own reference.
        reference = model if adapters else load_model(str(init), dtype, trust).requires_grad_(False)
        reference = reference.to(device)  # type: ignore[arg-type]
    critic = None
    if method.critic == "head":
        critic = value_head(model)
    elif method.critic == "separate":
        start = checkpoint_of(run, method.critic_init) if method.critic_init else str(init)
        scalar: Any = load_scalar_model(start, dtype, trust).to(device)  # type: ignore[arg-type]
        _adapters(run, config, scalar, "scores")
        _checkpointing(config, scalar)
        critic = critic_of(scalar.train())
    if ranks.shards and method.critic == "head":
        critic = critic.to(ranks.device)  # type: ignore[union-attr]
    return Trainer(run, config, method, model.train(), reference, critic, adapters, ranks)


def _adapters(
    run: RunConfig, config: TrainConfig, model: Any, task: Literal["policy", "scores"] = "policy"
) -> Adapters | None:
    """Put adapters into a model where the stage asks for them."""
    if not config.lora.rank:
        return None
    resets = task == "policy" and config.iterations > 1
    return Adapters(model, config.lora, task, run.seed, resets, f"stage {config.name!r}")


def _checkpointing(config: TrainConfig, model: Any) -> None:
    if config.gradient_checkpointing:
        # Reentrant checkpoints would lose the gradient of adapters on a frozen embedding.
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def _agreement(run: RunConfig, config: TrainConfig, model: Any, tokenizer: Any) -> Agreement:
    return Agreement(
        config.agreement,
        model,
        run.sampling.temperature,
        config.micro_tokens,
        autocast=config.precision == "bfloat16",
        sampler_dtype=run.engine.dtype,  # type: ignore[attr-defined]
        bos_token_id=tokenizer.bos_token_id,
        where=f"stage {config.name!r}",
    )


def _next_iteration(
    trainer: Trainer, replay: Replay | None, step: int, span: int
) -> dict[str, float]:
    """Begin an outer iteration: π_ref ← π_θ, and the reward model learns from the last one.

    Source: 003_… algorithm 1, lines 3 and 12.
    """
    trainer.reset_reference()
    return {} if replay is None else replay.train_on(step // span, span)


def _look_at_held_out(trainer: Trainer, data: Data, version: int) -> dict[str, float]:
    if data.check is not None:
        return data.check(trainer.weights(), version)
    return trainer.held_out(data.held_out)


def main(arguments: list[str]) -> None:
    """Command line."""
    parser = Arguments("python -m pipeline.train", __doc__)
    parser.add_argument("--config", required=True, help="a run's TOML")
    parser.add_argument("--stage", help="which [[train]] table; needed where there are several")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved stage and stop")
    parser.add_argument(
        "--no-forecast", action="store_true", help="start whatever memory, time and disk it takes"
    )
    known, rest = parser.parse_known_args(arguments)
    leads = meet()
    run = load_run(known.config)
    names = [stage.name for stage in run.train]
    if known.stage is None and len(names) != 1:
        raise UserError(
            str(known.config),
            f"{len(names)} training stages: {', '.join(names)}",
            "one, or --stage",
            "add --stage NAME",
        )
    name = known.stage or names[0]
    if name not in names:
        raise UserError(
            str(known.config),
            f"no training stage {name!r} {nearest(name, names)}".rstrip(),
            f"one of {', '.join(names)}",
            "mend --stage",
        )
    config = override(
        run.train[names.index(name)],
        rest,
        program="python -m pipeline.train",
        description=str(__doc__),
    )
    changed = tuple(config if stage.name == name else stage for stage in run.train)
    run = run.model_copy(update={"train": changed})
    refuse_nonsense(run, config, create_method(config.method))
    if known.dry_run and leads:
        print(config.model_dump_json(indent=2))
    if leads and not known.no_forecast:
        announce(run, [name])
    if known.dry_run:
        return
    folder = train(run, config)
    if leads:
        print(f"checkpoint: {folder / 'checkpoint'}", file=sys.stderr)


if __name__ == "__main__":
    command(main)
