"""One training loop for every method: data → batch → update → record → checkpoint.

    python -m pipeline.train --config pipeline/configs/cpu.toml --stage grpo
    python -m pipeline.train --config pipeline/configs/cpu.toml --stage grpo --method.clip-high 0.28

A step draws its batch (`pipeline.source`; what the policy samples may be drawn ahead of it), takes
the method's update on it (`pipeline.trainer`: coefficient → loss → optimizer step), hands the new
weights to the sampler and records what it found. Every `save_every` steps the whole training state
is kept, from which a stopped stage goes on.
"""

from __future__ import annotations

import math
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from data_prep.arguments import KEYS, Arguments
from data_prep.config import override
from data_prep.errors import UserError, command, nearest
from data_prep.formatting import load_formatter
from data_prep.interruption import Interruption
from data_prep.run_folder import Stage
from pipeline.adapters import plain_weights
from pipeline.agreement import Agreement
from pipeline.ahead import Ahead
from pipeline.card import base_facts, write_card
from pipeline.coefficients import write_coefficients
from pipeline.config import RunConfig, TrainConfig, load_run
from pipeline.forecast import announce
from pipeline.generate import profile_of
from pipeline.launch import meet, open_ranks
from pipeline.methods import Method, create_method
from pipeline.model import load_tokenizer, pick_device, save_checkpoint
from pipeline.monitor import Monitor
from pipeline.non_finite import NonFiniteError, keep_batch
from pipeline.plan import (
    check_models,
    check_vocabulary,
    init_of,
    inputs_of,
    refuse_nonsense,
    refuse_several,
    settings_of,
    truncated_sampling,
)
from pipeline.publish import check_token, publish
from pipeline.ranks import Ranks
from pipeline.records import Records
from pipeline.replay import Replay
from pipeline.source import Data, open_data
from pipeline.state import load_state, save_state
from pipeline.trackers import Trackers
from pipeline.trainer import Trainer, build_trainer


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
            ahead = Ahead(
                draw,
                engine,
                config.staleness,
                start,
                data.steps,
                folder,
                ranks.leads,
                partial(ranks.any, group=ranks.sampling),
            )
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
            stops = ranks.any(interruption.asked)
            if config.sample_budget:
                drawn_so_far = ranks.lead(lambda: records.samples if records else 0)
                if drawn_so_far >= config.sample_budget:
                    break
            if step + 1 < data.steps and ((step + 1) % config.save_every == 0 or stops):
                needed = [] if ahead is None else ahead.keep(step + 1)
                oldest = save_state(work, step + 1, parts, config.keep_states, needed, ranks)
                if ahead is not None:
                    ahead.drop(oldest)
                # A signal may have come to some of them meanwhile; they stop together or go on.
                if ranks.any(interruption.asked):
                    interruption.asked = True
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
    if data.rollouts is not None and config.sample_budget:
        # What the budget left untrained goes, and before it the states that name it.
        shutil.rmtree(work / "state", ignore_errors=True)
        data.rollouts.forget(step + 1)
    final = stage.complete(scratch=("state",), steps=step + 1, parameters=parameters)
    if config.push_to_hub:
        where = f"stage {config.name!r}, key 'push_to_hub'"
        tqdm.write(publish(final / "checkpoint", config.push_to_hub, where), file=sys.stderr)
    interruption.asked = ranks.any(interruption.asked)
    interruption.check()
    return final


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
    if data.check is None:
        return trainer.held_out(data.held_out)
    found = data.check(plain_weights(trainer.model), version)
    if data.rollouts is not None and trainer.rollout is not trainer.model:
        # What was looked at is the policy that is trained; an older one goes on sampling.
        data.rollouts.engine.load_weights(trainer.weights(), trainer.version(version))
    return found


def trained_weights(trainer: Trainer, ranks: Ranks) -> Iterator[tuple[str, Tensor]]:
    """Yield the trained model's weights; of a split one on the CPU, to the leader alone."""
    # Gathered, a tied weight is there twice; files hold it once.
    tied = getattr(trainer.model, "all_tied_weights_keys", {}) if ranks.shards else {}
    for name, value in plain_weights(trainer.model):
        if ranks.leads and name not in tied:
            yield name, value.cpu() if ranks.shards else value


def main(arguments: list[str]) -> None:
    """Command line."""
    keys = KEYS.format("the stage", "--optimizer.learning-rate 1e-4")
    parser = Arguments("python -m pipeline.train", __doc__, keys)
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
    method = create_method(config.method)
    refuse_nonsense(run, config, method)
    check_models(run, config, method)
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
