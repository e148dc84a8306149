"""What a training stage depends on, and what is refused before anything is loaded."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

from data_prep.errors import UserError, nearest
from pipeline.config import RunConfig, TrainConfig
from pipeline.engines import require_among, require_tokens
from pipeline.generate import checkpoint_of
from pipeline.methods import Method

# Keys of a stage that decide nothing about its result.
WATCHING = {
    "save_every",
    "keep_states",
    "agreement",
    "monitor",
    "push_to_hub",
    "trackers",
    "wandb",
    "parallel",
}


def init_of(run: RunConfig, config: TrainConfig) -> str | Path:
    """Return what a stage starts from: the run's model, or a checkpoint."""
    return run.model.path if config.init == "model" else checkpoint_of(run, config.init)


def refuse_nonsense(run: RunConfig, config: TrainConfig, method: Method) -> None:
    """Refuse what cannot work, would be ignored, or would bias the gradient without a word.

    Raises:
        UserError: Before anything is loaded.
    """
    where = f"stage {config.name!r}, key"
    if method.source != "rows" and run.data is None:
        raise UserError(
            f"stage {config.name!r}",
            "a run without [data], which has supervised rows only",
            f"problems, pairs or steps for {config.method.kind!r}",
            "add a [data] table",
        )
    if method.source != "rows" and config.batch_tokens:
        raise UserError(
            f"{where} 'batch_tokens'",
            f"{config.batch_tokens} for {config.method.kind!r}",
            "nothing: only supervised rows are grouped by length",
            "set `batch`",
        )
    begins = method.source == "rows" or (method.source == "pairs" and not method.reference)
    scores = method.trains == "scores"
    if (scores or not begins) and config.init == "model" and not run.model.path:
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
    _refuse_training(where, config, method)
    if method.source != "policy":
        plain = TrainConfig(name=config.name, method=config.method)
        for key in (
            "correction",
            "staleness",
            "reward",
            "iterations",
            "sample_budget",
            "group_size",
            "prompts",
            "allow_truncated_sampling",
            "watch_reference",
        ):
            if (found := getattr(config, key)) != getattr(plain, key):
                raise UserError(
                    f"{where} {key!r}",
                    f"{_short(found)} for {config.method.kind!r}, which does not sample",
                    "nothing: no sample is drawn that it could be for",
                    "remove the key, or train a method that samples",
                )
        return
    require_tokens(run.engine, f"stage {config.name!r}")
    _refuse_rewards(where, config, method)
    compare = getattr(method, "compare", None) if config.group_size == 1 else None
    if compare and not method.takes_steps and not any(compare([0.0]) + compare([1.0])):
        raise UserError(
            f"{where} 'group_size'",
            f"1 for {config.method.kind!r}, which compares the samples of a prompt: every "
            "advantage would be 0",
            "at least 2",
            "raise group_size, or take a method with another baseline, such as 'ppo'",
        )
    if config.iterations > 1 and not (method.reference or config.reward.retrain):
        raise UserError(
            f"{where} 'iterations'",
            f"{config.iterations} with neither a reference nor a reward model that is trained on",
            "something that changes from one iteration to the next",
            "set method.beta or reward.retrain, or remove the key",
        )
    if config.iterations > 1 and config.iterations > config.steps:
        raise UserError(
            f"{where} 'iterations'",
            f"{config.iterations} in {config.steps} steps",
            "at least a step each",
            "lower iterations, or raise steps",
        )
    if config.iterations > 1:
        span = math.ceil(config.steps / config.iterations)
        fit = math.ceil(config.steps / span)
        if fit < config.iterations:
            raise UserError(
                f"{where} 'iterations'",
                f"{config.iterations} in {config.steps} steps: of {span} steps each, {fit} fit",
                "iterations of equal length, of which the last alone may be shorter",
                f"set iterations = {fit}, or steps = {span * config.iterations}",
            )
    sampling = run.sampling
    if sampling.repetition_penalty != 1.0:
        raise UserError(
            f"stage {config.name!r}: [sampling], key 'repetition_penalty'",
            f"{sampling.repetition_penalty} while training",
            "1: the trainer does not know the penalised distribution, so every ratio is wrong",
            "remove the key; evaluation may set one of its own",
        )
    if config.staleness and method.refresh > 1:
        raise UserError(
            f"{where} 'staleness'",
            f"{config.staleness} with method.refresh = {method.refresh}, which already samples "
            "with older weights",
            "one of the two",
            "set method.refresh = 1, or staleness = 0",
        )
    if config.staleness and config.correction.kind == "off":
        raise UserError(
            f"{where} 'staleness'",
            f"{config.staleness} without a correction: the samples are of an older policy, and "
            "nothing weighs them by how probable they are now",
            "correction.kind of 'token' or 'sequence'",
            'add correction = { kind = "token" }, or set staleness = 0',
        )
    for key in ("validate_every", "reward.retrain"):
        asked = config.reward.retrain if key == "reward.retrain" else config.validate_every
        if config.staleness and asked:
            raise UserError(
                f"{where} {key!r}",
                f"{asked} with staleness = {config.staleness}",
                "staleness = 0: what it needs is at work on the next batch",
                "remove one of the two",
            )
    if truncated_sampling(run) and not config.allow_truncated_sampling:
        raise UserError(
            f"{where} 'allow_truncated_sampling'",
            f"top_p = {sampling.top_p}, top_k = {sampling.top_k}, min_p = {sampling.min_p} "
            "while training",
            "samples of the whole distribution: truncation biases every ratio",
            "set top_p = 1, top_k = 0 and min_p = 0 under [sampling], or "
            "allow_truncated_sampling = true",
        )


def refuse_several(
    run: RunConfig, config: TrainConfig, method: Method, kind: Literal["ddp", "fsdp2"]
) -> None:
    """Refuse what several processes cannot do together.

    Raises:
        UserError: Before anything is loaded.
    """
    if method.source == "policy" or (method.source == "samples" and config.validate_every):
        require_among(run.engine, f"stage {config.name!r}, key 'engine.kind'")
    if kind == "fsdp2" and config.lora.rank:
        raise UserError(
            f"stage {config.name!r}, key 'parallel'",
            f"'fsdp2' with lora.rank = {config.lora.rank}",
            "'ddp' for adapters, whose gradients and optimizer are small",
            'set parallel = "ddp", or train the whole model (lora.rank = 0)',
        )


def _refuse_training(where: str, config: TrainConfig, method: Method) -> None:
    """Refuse ways of training that the method cannot use."""
    if config.lora.dropout and method.source == "policy":
        raise UserError(
            f"{where} 'lora.dropout'",
            f"{config.lora.dropout} with a method that samples",
            "0: with dropout the trainer's log-probs are not those of the policy that sampled",
            "remove the key",
        )
    if not config.lora.rank and config.lora != type(config.lora)():
        raise UserError(
            f"{where} 'lora.rank'",
            "0, which is no adapter, beside other keys of lora",
            "a rank",
            "set lora.rank, or remove the others",
        )
    if config.watch_reference and method.trains == "scores":
        raise UserError(
            f"{where} 'watch_reference'",
            f"true for {config.method.kind!r}, which trains no policy",
            "a policy to hold against its reference",
            "remove the key",
        )


def truncated_sampling(run: RunConfig) -> bool:
    """Return whether sampling leaves out part of the distribution."""
    sampling = run.sampling
    return sampling.top_p < 1.0 or sampling.top_k > 0 or sampling.min_p > 0.0


def _refuse_rewards(where: str, config: TrainConfig, method: Method) -> None:
    reward = config.reward
    if config.prompts == "preferences" and method.needs_verdicts | bool(reward.rule):
        raise UserError(
            f"{where} 'prompts'",
            "prompts of preference pairs, which have no gold answer, for a reward by the verdict",
            "a reward model's score alone",
            "set reward = { rule = 0, model = 1, model_init = … } and a method without verdicts",
        )
    if (reward.process != "none") != method.takes_steps:
        asked = "rewards of steps" if reward.process != "none" else "no rewards of steps"
        hint = (
            "set method.supervision = 'process' (grpo), or train ppo, or remove reward.process"
            if reward.process != "none"
            else "set reward.process, or method.supervision = 'outcome'"
        )
        if not (method.takes_steps and method.takes_outcomes):
            raise UserError(
                f"{where} 'reward.process'",
                f"{asked} for {config.method.kind!r} as it is configured",
                "what the method looks at",
                hint,
            )
    if not method.takes_rewards and reward != type(reward)():
        raise UserError(
            f"{where} 'reward'",
            f"{_short(reward)} for {config.method.kind!r}, which asks only what is correct",
            "nothing: how large a reward is weighs no sample",
            "remove the key, or train a method that weighs rewards",
        )
    if reward.retrain and config.iterations == 1:
        raise UserError(
            f"{where} 'reward.retrain'",
            "1 iteration",
            "several: the reward model is trained on between them",
            "set iterations",
        )


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 80 else text[:77] + "…"


def check_vocabulary(tokenizer: Any, init: str | Path, own: Any) -> None:
    """Refuse to train a model on rows of another vocabulary: its tokens would mean other words.

    Args:
        tokenizer: What the rows were made with.
        init: The model.
        own: Its tokenizer.

    Raises:
        UserError: The two differ.
    """
    rows, model = tokenizer.get_vocab(), own.get_vocab()
    # Loading may add tokens that no row has, such as a family's own padding.
    differ = sorted(token for token, number in rows.items() if model.get(token) != number)
    if differ:
        raise UserError(
            f"model {str(init)!r}",
            f"its vocabulary is not the rows' ({len(model)} and {len(rows)} tokens; for one, "
            f"{differ[0]!r} is {model.get(differ[0])} and {rows[differ[0]]})",
            "rows that were made with the model's tokenizer",
            "leave out tokenizer.path in [data] and [mixture]: it is then the model's",
        )


def settings_of(run: RunConfig, config: TrainConfig, method: Method) -> dict[str, Any]:
    """Return what decides this stage's result, beside its inputs."""
    settings: dict[str, Any] = {
        "train": config.model_dump(mode="json", exclude=WATCHING),
        "seed": run.seed,
        "dtype": run.model.dtype,
    }
    if config.init == "model":
        settings["model"] = run.model.model_dump(mode="json")
    if method.source in ("samples", "policy"):
        settings["sampling"] = run.sampling.model_dump(mode="json")
    elif config.method.normaliser == "constant":
        settings["max_tokens"] = run.sampling.max_tokens
    solves = method.source == "samples" and config.validate_every > 0
    if method.source == "policy" or solves:
        settings["engine"] = run.engine.deciding(init_of(run, config))
        settings["verify"] = run.verify.model_dump(mode="json", exclude={"workers"})
    return settings


def models_of(config: TrainConfig, method: Method) -> dict[str, str]:
    """Return the models that a stage loads beside the one it starts from, by their key."""
    found = {
        "reward.model_init": config.reward.model_init,
        "reward.process_init": config.reward.process_init,
        "method.critic_init": method.critic_init,
    }
    return {key: name for key, name in found.items() if name}


def check_models(run: RunConfig, config: TrainConfig, method: Method) -> None:
    """Refuse a stage that names a model which is no stage, no folder and no hub id.

    Raises:
        UserError: It does.
    """
    for key, name in {"init": config.init, **models_of(config, method)}.items():
        if name != "model":
            check_model_name(name, f"stage {config.name!r}, key {key!r}", run)


def check_model_name(name: str, where: str, run: RunConfig | None = None) -> None:
    """Refuse what is neither a model folder nor could be a hub id.

    Args:
        name: As it stands in the configuration.
        where: The key.
        run: Its training stages may be named too.

    Raises:
        UserError: It is neither.
    """
    stages = [] if run is None else [stage.name for stage in run.train]
    path = Path(name)
    if name in stages:
        return
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(
                where,
                f"the folder {name!r} has no config.json",
                "a model folder, as save_pretrained writes it",
                "name the folder that holds config.json (of a stage: <run>/<stage>/checkpoint)",
            )
        return
    if path.is_file() or name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise UserError(
            where,
            f"no folder {name!r} {nearest(name, stages)}".rstrip(),
            "a model folder, or a hub id such as owner/name"
            + (f", or one of {', '.join(stages)}" if stages else ""),
            "mend the path, or make the model first",
        )


def inputs_of(run: RunConfig, config: TrainConfig, method: Method) -> dict[str, str | Path]:
    """Return the folders that a stage reads."""
    out = Path(run.out)
    inputs: dict[str, str | Path] = {} if run.data is None else {"data": out / "data"}
    if method.source == "rows":
        inputs[run.rows.name] = run.rows
    for key, name in {"init": config.init, **models_of(config, method)}.items():
        if any(stage.name == name for stage in run.train):
            inputs[key] = out / name
        else:
            given = Path(init_of(run, config) if key == "init" else name)
            if given.is_dir() and str(given) != ".":
                inputs[key] = given
    inputs |= method.files
    if method.source == "samples":
        inputs |= {"generate": out / "generate", "verify": out / "verify"}
    return inputs
