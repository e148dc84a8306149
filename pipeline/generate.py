"""Sample a group of completions for every problem, to an append-only log.

    python -m pipeline.generate --config pipeline/configs/cpu.toml [--group-size 8 …]

Shards are written whole, so a killed run repeats at most one.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_prep.arguments import KEYS, Arguments
from data_prep.config import override
from data_prep.errors import UserError, command
from data_prep.files import Journal
from data_prep.formatting import load_formatter
from data_prep.interruption import Interruption
from data_prep.jsonl import read_json, write_rows
from data_prep.progress import progress
from data_prep.run_folder import Stage
from data_prep.schema import Problem, read_problems
from pipeline.cluster import ClusterEngine, engine_of
from pipeline.config import GenerateConfig, RunConfig, load_run
from pipeline.engines import Engine, Group, Prompt, Sampling, require_tokens
from pipeline.samples import Sample, read_samples, samples_of


def checkpoint_of(run: RunConfig, name: str) -> Path:
    """Return the model folder that a stage's name, or a path, stands for."""
    if any(stage.name == name for stage in run.train):
        return Path(run.out) / name / "checkpoint"
    return Path(name)


def profile_of(model: str | Path, default: str) -> str:
    """Return the prompt profile that a checkpoint was trained with, or the default.

    Raises:
        UserError: The note beside it is damaged.
    """
    note = Path(model) / "boxed.json"
    if not note.is_file():
        return default
    table = read_json(note)
    profile = table.get("profile") if isinstance(table, dict) else None
    if not isinstance(profile, str):
        raise UserError(
            str(note), f"found {table!r:.80}", "a key 'profile'", "mend it, or remove the file"
        )
    return profile


def render_prompts(problems: list[Problem], tokenizer: Any, profile: str) -> list[Prompt]:
    """Render every problem's question up to where the assistant begins."""
    formatter = load_formatter(tokenizer, profile)
    return [Prompt(p.id, tuple(formatter.prompt_ids(p.question))) for p in problems]


def generate_shards(
    engine: Engine,
    prompts: list[Prompt],
    sampling: Sampling,
    folder: Path,
    shard_size: int,
    label: str,
) -> Iterator[Sample]:
    """Write `<label>-00000.jsonl` …, skipping shards that are there; then yield all samples.

    A shard that is no longer what was written is drawn again.

    Args:
        engine: Generates.
        prompts: In the order of the log.
        sampling: How; `sampling.n` samples a prompt.
        folder: Where the shards go.
        shard_size: Prompts a shard.
        label: First part of the shards' names, and of the progress bar's.
    """
    folder.mkdir(parents=True, exist_ok=True)
    starts = range(0, len(prompts), shard_size)
    paths = [folder / f"{label}-{index:05d}.jsonl" for index in range(len(starts))]
    journal = Journal(folder)
    with (
        progress(label, "sample", len(prompts) * sampling.n) as bar,
        Interruption("shard") as interruption,
    ):
        parts = {p: prompts[s : s + shard_size] for s, p in zip(starts, paths, strict=True)}
        missing = [path for path in paths if not journal.holds(path)]
        bar.update(sum(len(parts[p]) for p in parts.keys() - set(missing)) * sampling.n)
        for number, groups in drawn(engine, [parts[path] for path in missing], sampling):
            write_rows(
                missing[number],
                (s.to_row() for s in samples_of(groups, sampling.n, engine.policy_version)),
                journal,
            )
            bar.update(len(groups) * sampling.n)
            interruption.check()
    for path in paths:
        yield from read_samples(path)


def drawn(
    engine: Engine, parts: list[list[Prompt]], sampling: Sampling
) -> Iterator[tuple[int, list[Group]]]:
    """Yield (number of the part, its groups): one after the other, or as workers complete them."""
    if isinstance(engine, ClusterEngine):
        return engine.drawn(parts, sampling)
    return ((number, engine.generate(part, sampling)) for number, part in enumerate(parts))


def generate(run: RunConfig, config: GenerateConfig) -> Path:
    """Run the stage; return its folder."""
    from pipeline.model import load_tokenizer

    require_tokens(run.engine, "[generate]")
    out = Path(run.out)
    model = checkpoint_of(run, config.model)
    problems_file = out / "data" / f"{config.problems}.jsonl"
    if not problems_file.is_file():
        raise UserError(
            str(problems_file),
            "no such file",
            "the data stage's problems",
            "run `python -m data_prep.build` with this configuration first",
        )
    inputs: dict[str, str | Path] = {"problems": problems_file}
    if (model.parent / "manifest.json").is_file():
        inputs["model"] = model.parent
    elif model.is_dir():
        inputs["model"] = model
    settings = {
        "generate": config.model_dump(mode="json"),
        "engine": run.engine.deciding(model),
        "sampling": run.sampling.model_dump(mode="json"),
        "model": str(config.model),
        "seed": run.seed,
    }
    stage = Stage(out, "generate", settings, inputs)
    if stage.is_complete:
        return stage.final
    problems = list(read_problems(problems_file))
    problems = problems[: config.limit] if config.limit else problems
    tokenizer = load_tokenizer(model)
    prompts = render_prompts(problems, tokenizer, profile_of(model, run.profile))
    sampling = run.sampling.of_run(n=config.group_size, seed=run.seed)
    engine = engine_of(run.engine, model, run.cluster)
    with stage:
        try:
            work = stage.begin()
            samples = list(
                generate_shards(engine, prompts, sampling, work, config.shard_size, "samples")
            )
        finally:
            engine.close()
        write_rows(
            work / "prompts.jsonl",
            (
                {
                    "problem_id": p.id,
                    "token_ids": list(prompt.token_ids),
                    "gold": p.answer,
                    "level": p.level,
                }
                for p, prompt in zip(problems, prompts, strict=True)
            ),
        )
        tokens = sum(len(s.token_ids) for s in samples)
        return stage.complete(problems=len(problems), samples=len(samples), tokens=tokens)


def main(arguments: list[str]) -> None:
    """Command line."""
    parser = Arguments(
        "python -m pipeline.generate", __doc__, KEYS.format("[generate]", "--group-size 4")
    )
    parser.add_argument("--config", required=True, help="a run's TOML")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved stage and stop")
    known, rest = parser.parse_known_args(arguments)
    run = load_run(known.config)
    config = override(
        run.generate or GenerateConfig(),
        rest,
        program="python -m pipeline.generate",
        description=str(__doc__),
    )
    from pipeline.plan import check_model_name  # which imports this module

    check_model_name(config.model, "generate.model", run)
    if known.dry_run:
        print(config.model_dump_json(indent=2))
        return
    folder = generate(run, config)
    print(f"samples: {folder}", file=sys.stderr)


if __name__ == "__main__":
    command(main)
