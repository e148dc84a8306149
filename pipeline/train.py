"""One training loop for every method: batch → coefficient → loss → step → checkpoint.

    python -m pipeline.train --config pipeline/configs/cpu.toml --stage grpo
    python -m pipeline.train --config pipeline/configs/cpu.toml --stage grpo --method.clip-high 0.28

The loop knows a method only by its gradient coefficient (methods.__init__): with normaliser
weights 1/Z and the method's GC, both without gradient,

    loss = − Σ_i Σ_t  sg(GC_{i,t} · is_{i,t} / Z_i) · log π_θ(o_{i,t} | q_i, o_{i,<t})

where `is` corrects for a sampler that is not quite the trainer (pipeline.correction; 1 when off).

What is shown as "objective" is the method's own J, computed beside it. Deviation from 000_…:
groups without signal leave the step and its denominators; the paper leaves them in with
coefficient 0, which scales the step by the share of groups that carry signal.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_prep.config import override
from data_prep.errors import UserError, command
from data_prep.formatting import load_formatter
from data_prep.jsonl import write_rows
from data_prep.run_folder import Stage
from pipeline.agreement import Agreement
from pipeline.ahead import Ahead
from pipeline.batch import Layout, Sequence, Tokens, flatten, micro_batches
from pipeline.config import RunConfig, TrainConfig, load_run
from pipeline.correction import gap_figures, importance
from pipeline.fixed import Rows
from pipeline.generate import checkpoint_of, profile_of
from pipeline.methods import Method, create_method
from pipeline.model import build_model, load_model, load_tokenizer, pick_device, save_checkpoint
from pipeline.optimizer import build_optimizer, learning_rate
from pipeline.policy import check_head, token_logprobs
from pipeline.records import Records, over_parts
from pipeline.source import open_source
from pipeline.state import load_state, save_state


class Trainer:
    """Model, optimizer and method of one stage.

    Args:
        run: The whole run's configuration.
        config: This stage's.
        method: What weighs the tokens.
        model: The policy.
        reference: The frozen π_ref, where the method needs one.
    """

    def __init__(
        self, run: RunConfig, config: TrainConfig, method: Method, model: Any, reference: Any
    ) -> None:
        """Build the optimizer."""
        check_head(model)
        self.run, self.config, self.method = run, config, method
        self.model, self.reference = model, reference
        self.device = next(model.parameters()).device
        self.optimizer = build_optimizer(model, config.optimizer)
        # The trainer divides logits by the temperature that the sampler used.
        on_samples = method.source != "rows"
        self.temperature = run.sampling.temperature if on_samples else 1.0
        # Set for methods that sample: stops before a gradient of wrong log-probs is used.
        self.agreement: Agreement | None = None

    def update(self, sequences: list[Sequence], step: int, total: int) -> dict[str, float]:
        """Take the method's optimizer steps on one batch; return the figures."""
        dtype = torch.promote_types(next(self.model.parameters()).dtype, torch.float32)
        tokens = flatten(sequences, dtype)
        tokens.weight = self.method.weights(tokens, self.run.sampling.max_tokens)
        rate = learning_rate(self.config.optimizer, step, total)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        figures: dict[str, float] = {}
        last = self.method.config.updates - 1
        for inner in range(last + 1):
            found, own = self._accumulate(sequences, tokens)
            if inner == 0 and self.agreement is not None:
                self.agreement.judge(found["sampler_gap_mean"], sequences)
            norm = torch.nn.utils.clip_grad_norm_(
                self.model.parameters(), self.config.optimizer.clip_norm or math.inf
            )
            if not torch.isfinite(norm):
                raise FloatingPointError(f"the gradient of step {step} is {float(norm)}")
            self.optimizer.step()
            if inner == 0:
                figures = {**found, "grad_norm": float(norm), "learning_rate": rate}
            if inner == last:
                # Before the first update every ratio is 1 and nothing is clipped.
                figures |= own
        return figures

    def _accumulate(
        self, sequences: list[Sequence], tokens: Tokens
    ) -> tuple[dict[str, float], dict[str, float]]:
        """Add the whole step's gradient, one micro-batch at a time.

        Returns the loop's figures and the method's own. The first pass over a batch fills
        `tokens.old_logp`: π_old is the policy before the first update on it.
        """
        self.optimizer.zero_grad(set_to_none=True)
        first = tokens.old_logp is None
        old = torch.zeros_like(tokens.weight) if first else None
        parts: list[tuple[int, dict[str, float]]] = []
        own: list[tuple[int, dict[str, float]]] = []
        sampled = self.method.source == "policy"
        objective = 0.0
        for micro in micro_batches(sequences, tokens, self.config.micro_tokens):
            layout, view = micro.layout.to(self.device), micro.tokens.to(self.device)
            logp, entropy = self._forward(self.model, layout)
            now = logp.detach()
            if old is not None:
                old[micro.token_index] = now.cpu()
                view.old_logp = now
            if self.reference is not None:
                with torch.no_grad():
                    view.ref_logp = self._forward(self.reference, layout)[0]
            coefficient = self.method.gradient_coefficient(view, now) * view.weight
            if sampled:
                coefficient = coefficient * importance(view, self.config.correction)
            loss = -(coefficient * logp).sum()
            loss.backward()
            objective += float(self.method.objective(view, now))
            found = {"entropy": float(entropy.mean())}
            if first and sampled:
                found |= gap_figures(view, self.config.correction)
            parts.append((len(now), found))
            own.append((len(now), self.method.figures(view, now)))
        if old is not None:
            tokens.old_logp = old
        return {"objective": objective, **over_parts(parts)}, over_parts(own)

    def _forward(self, model: Any, layout: Layout) -> tuple[Tensor, Tensor]:
        autocast = self.config.precision == "bfloat16"
        return token_logprobs(model, layout, self.temperature, autocast)

    @torch.no_grad()
    def held_out_loss(self, rows: Rows) -> float:
        """Return the mean negative log-likelihood a token on held-out rows."""
        sequences = rows.take(0, len(rows))
        tokens = flatten(sequences)
        total = 0.0
        for micro in micro_batches(sequences, tokens, self.config.micro_tokens):
            total -= float(self._forward(self.model, micro.layout.to(self.device))[0].sum())
        return total / len(tokens.weight)


def train(run: RunConfig, config: TrainConfig) -> Path:
    """Run one training stage; return its folder, which holds `checkpoint/` and `steps.jsonl`."""
    method = create_method(config.method)
    _refuse_nonsense(run, config, method)
    out = Path(run.out)
    stage = Stage(out, config.name, _settings(run, config, method), _inputs(run, config, method))
    if stage.is_complete:
        return stage.final
    work = stage.begin()
    init = None if config.init == "model" and not run.model.path else _init(run, config)
    tokenizer = load_tokenizer(out / "data" / "tokenizer" if init is None else init)
    profile = run.data.profile if init is None else profile_of(init, run.data.profile)
    ends = load_formatter(tokenizer, profile).end_token_ids
    device = pick_device(run.engine.device)  # type: ignore[attr-defined]
    model: Any = (
        build_model(run.model, tokenizer, run.seed)
        if init is None
        else load_model(init, run.model.dtype)
    ).to(device)  # type: ignore[arg-type]
    reference: Any = None
    if method.reference:
        reference = load_model(str(init), run.model.dtype).to(device).requires_grad_(False)  # type: ignore[arg-type]
    trainer = Trainer(run, config, method, model.train(), reference)
    start = load_state(work / "state", model, trainer.optimizer)

    with ExitStack() as cleanup:
        context = int(model.config.max_position_embeddings)
        draw, total, engine, prompts = open_source(
            run, config, method, init, tokenizer, profile, context, work, cleanup
        )
        held_out = None
        if config.validate_every and method.source == "rows":
            held_out = Rows(out / "data", "validation")
            if not len(held_out):
                raise UserError(
                    f"stage {config.name!r}, key 'validate_every'",
                    "the data stage has no validation rows",
                    "held-out rows, or validate_every = 0",
                    "give a source validation problems, or set validate_every = 0",
                )
        ahead: Ahead | None = None
        if engine is not None:
            agreement = _agreement(run, config, model, tokenizer)
            agreement.prove_push(engine, prompts, context, start, work / "agreement.json")
            trainer.agreement = None if _truncated(run) else agreement
            folder = work / "state" / "ahead"
            ahead = Ahead(draw, engine, config.staleness, start, total, folder)
            cleanup.callback(ahead.close)
            ahead.publish(model.state_dict().items(), start)
            draw = ahead.draw
        records = Records(work, start, total, config.name)
        cleanup.callback(records.close)
        for step in range(start, total):
            began = time.perf_counter()
            sequences, figures = draw(step)
            drawn = time.perf_counter()
            if sequences:
                try:
                    figures |= trainer.update(sequences, step, total)
                except FloatingPointError as error:
                    raise _non_finite(
                        error, sequences, stage.run / f"{config.name}.failed"
                    ) from None
            if ahead is not None:
                ahead.publish(model.state_dict().items(), step + 1)
            done = time.perf_counter()
            if held_out is not None and (step + 1) % config.validate_every == 0:
                figures["validation_loss"] = trainer.held_out_loss(held_out)
            count = sum(len(s.completion) for s in sequences)
            timing = {
                "draw_s": drawn - began,
                "update_s": done - drawn,
                "tokens_per_s": count / (done - began),
            }
            records.write(step, figures, timing)
            if (step + 1) % config.save_every == 0 and step + 1 < total:
                if ahead is not None:
                    ahead.keep(step + 1)
                save_state(work / "state", step + 1, model, trainer.optimizer)
                if ahead is not None:
                    ahead.drop(step + 1 - config.save_every)

    save_checkpoint(work / "checkpoint", model, tokenizer, ends, profile)
    parameters = sum(p.numel() for p in model.parameters())
    return stage.complete(scratch=("state",), steps=total, parameters=parameters)


def _init(run: RunConfig, config: TrainConfig) -> str | Path:
    return run.model.path if config.init == "model" else checkpoint_of(run, config.init)


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


def _truncated(run: RunConfig) -> bool:
    sampling = run.sampling
    return sampling.top_p < 1.0 or sampling.top_k > 0 or sampling.min_p > 0.0


def _refuse_nonsense(run: RunConfig, config: TrainConfig, method: Method) -> None:
    """Refuse what cannot work, would be ignored, or would bias the gradient without a word.

    Raises:
        UserError: Before anything is loaded.
    """
    where = f"stage {config.name!r}, key"
    if method.source != "rows" and config.init == "model" and not run.model.path:
        raise UserError(
            f"{where} 'init'", "a model with random weights", "a trained model", 'set init = "sft"'
        )
    if method.source == "policy" and not config.steps:
        raise UserError(
            f"{where} 'steps'",
            "0 with a method that samples",
            "a number of steps",
            "set `steps`",
        )
    if method.source != "policy" and config.correction.kind != "off":
        raise UserError(
            f"{where} 'correction'",
            f"{config.correction.kind!r} for {config.method.kind!r}, which does not sample",
            "'off'",
            "remove the key, or train a method that samples",
        )
    sampling = run.sampling
    if method.source == "policy" and sampling.repetition_penalty != 1.0:
        raise UserError(
            f"stage {config.name!r}: [sampling], key 'repetition_penalty'",
            f"{sampling.repetition_penalty} while training",
            "1: the trainer does not know the penalised distribution, so every ratio is wrong",
            "remove the key; evaluation may set one of its own",
        )
    if config.staleness and method.source != "policy":
        raise UserError(
            f"{where} 'staleness'",
            f"{config.staleness} for {config.method.kind!r}, which does not sample",
            "0",
            "remove the key, or train a method that samples",
        )
    if config.staleness and config.correction.kind == "off":
        raise UserError(
            f"{where} 'staleness'",
            f"{config.staleness} without a correction: the samples are of an older policy, and "
            "nothing weighs them by how probable they are now",
            "correction.kind of 'token' or 'sequence'",
            'add correction = { kind = "token" }, or set staleness = 0',
        )
    if method.source == "policy" and _truncated(run) and not config.allow_truncated_sampling:
        raise UserError(
            f"{where} 'allow_truncated_sampling'",
            f"top_p = {sampling.top_p}, top_k = {sampling.top_k}, min_p = {sampling.min_p} "
            "while training",
            "samples of the whole distribution: truncation biases every ratio",
            "set top_p = 1, top_k = 0 and min_p = 0 under [sampling], or "
            "allow_truncated_sampling = true",
        )


def _settings(run: RunConfig, config: TrainConfig, method: Method) -> dict[str, Any]:
    """Return what decides this stage's result, beside its inputs."""
    settings: dict[str, Any] = {
        "train": config.model_dump(mode="json", exclude={"save_every", "agreement"}),
        "seed": run.seed,
        "dtype": run.model.dtype,
    }
    if config.init == "model":
        settings["model"] = run.model.model_dump(mode="json")
    if method.source != "rows":
        settings["sampling"] = run.sampling.model_dump(mode="json")
    if method.source == "policy":
        settings["engine"] = run.engine.model_dump(mode="json")
        settings["verify"] = run.verify.model_dump(mode="json", exclude={"workers"})
    return settings


def _inputs(run: RunConfig, config: TrainConfig, method: Method) -> dict[str, str | Path]:
    out = Path(run.out)
    inputs: dict[str, str | Path] = {"data": out / "data"}
    if any(stage.name == config.init for stage in run.train):
        inputs["init"] = out / config.init
    elif (given := Path(_init(run, config))).is_dir() and str(given) != ".":
        inputs["init"] = given
    if method.source == "samples":
        inputs |= {"generate": out / "generate", "verify": out / "verify"}
    return inputs


def _non_finite(error: FloatingPointError, sequences: list[Sequence], folder: Path) -> UserError:
    """Keep the batch that broke the step, and say where it is."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "batch.jsonl"
    write_rows(
        path,
        (
            {
                "prompt": s.prompt,
                "completion": s.completion,
                "reward": s.reward,
                "advantage": s.advantage,
                "text": s.text,
            }
            for s in sequences
        ),
    )
    return UserError(
        str(error),
        f"the batch is kept in {path}",
        "finite numbers",
        "look at the batch, or lower the learning rate; the command goes on from the last state",
    )


def main(arguments: list[str]) -> None:
    """Command line."""
    parser = argparse.ArgumentParser("python -m pipeline.train", description=__doc__)
    parser.add_argument("--config", required=True, help="a run's TOML")
    parser.add_argument("--stage", help="which [[train]] table; needed where there are several")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved stage and stop")
    known, rest = parser.parse_known_args(arguments)
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
            f"no training stage {name!r}",
            f"one of {', '.join(names)}",
            "mend --stage",
        )
    config = override(
        run.train[names.index(name)],
        rest,
        program="python -m pipeline.train",
        description=str(__doc__),
    )
    if known.dry_run:
        print(config.model_dump_json(indent=2))
        return
    print(f"checkpoint: {train(run, config) / 'checkpoint'}", file=sys.stderr)


if __name__ == "__main__":
    command(main)
