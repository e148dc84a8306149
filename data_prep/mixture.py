r"""The mixture stage: sources in their published formats to packed, masked training sequences.

    python -m data_prep.mixture --config data_prep/configs/sft_900k.toml
    python -m data_prep.mixture --config data_prep/configs/sft_900k.toml --workers 16 --dry-run

Rows are converted, checked and tokenised chunk by chunk in worker processes (`chunk`); the rows
of the mixture are chosen from their keys (`selection`); the chosen ones are packed (`packing`)
and written shard by shard (`shards`). A killed build goes on with the chunk or shard it was at.
The folder `<out>/mixture` then holds `train-*.arrow` and `validation-*.arrow` (read them with
`data_prep.loader`), `tokenizer/`, `statistics.json` and `report.html`.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.candidates import load_candidates, token_offsets
from data_prep.chunk import Task
from data_prep.cluster import ClusterConfig, connect
from data_prep.command_line import run_stage
from data_prep.config import validate
from data_prep.converting import convert_chunks
from data_prep.errors import UserError, command
from data_prep.formatting import check_tokenizer, profile_named
from data_prep.jsonl import write_json
from data_prep.mixture_config import MixtureConfig
from data_prep.mixture_figures import mixture_figures
from data_prep.mixture_tokenizer import prepare_tokenizer
from data_prep.packing import efficiency, training_sequences
from data_prep.page import write_page
from data_prep.plugins import load_plugin
from data_prep.reading import no_such_file, stretches
from data_prep.run_folder import Stage
from data_prep.selection import select
from data_prep.shards import Document, TokenFiles, write_shards
from data_prep.sources._files import FilesConfig
from data_prep.tokenizer import load_tokenizer, model_path, tokenizer_files, with_tokenizer
from prompts import Profile
from verifiers.plain import plain


def build_mixture(
    config: MixtureConfig, run: Path, seed: int, cluster: ClusterConfig | None = None
) -> Path:
    """Build the mixture stage of a run, go on with it, or skip it when it is complete.

    Args:
        config: What to build.
        run: The run folder.
        seed: Decides pools, sampling, what is held out, and the order of sequences.
        cluster: Ray workers that convert the rows and write the shards; None for processes of
            this machine.

    Returns:
        The stage's folder, `<run>/mixture`.

    Raises:
        UserError: Anything in configuration or input that a user can mend.
    """
    profile = profile_named(config.profile, "mixture.profile")
    # The number of workers changes how long it takes, not what comes out.
    plan = {"mixture": config.model_dump(mode="json", exclude={"workers"}), "seed": seed}
    stage = Stage(run, "mixture", plan, _inputs(config, profile))
    if stage.is_complete:
        print(f"mixture: complete, kept as it is ({stage.final})", file=sys.stderr)
        return stage.final
    with ExitStack() as held:
        held.enter_context(stage)
        if cluster is not None:  # from the first chunk to the last shard
            held.callback(connect(cluster))
        return _build(config, profile, seed, cluster, stage)


def _build(
    config: MixtureConfig, profile: Profile, seed: int, cluster: ClusterConfig | None, stage: Stage
) -> Path:
    started = time.monotonic()
    is_new = not stage.work.is_dir()
    folder = stage.begin()
    try:
        tasks = _tasks(config, folder / "chunks")
        prepare_tokenizer(config, profile, folder)
        convert_chunks(config, seed, folder, tasks, cluster)
    except UserError:
        if is_new:  # bad input leaves nothing half-written
            shutil.rmtree(folder)
        raise
    converted = time.monotonic()
    candidates, reports = load_candidates(tasks)
    names = [Path(ingredient.source.kind).stem for ingredient in config.sources]
    selection = select(
        candidates,
        names,
        config.asked(),
        config.scaled(config.validation_rows),
        config.near_duplicates,
        seed,
    )
    selected = time.monotonic()
    offsets = token_offsets(candidates, len(tasks))
    tokens = TokenFiles(folder / "chunks")

    def documents(rows: np.ndarray) -> list[Document]:
        return [
            Document(*found)
            for found in zip(
                (tasks[chunk].name for chunk in candidates.chunk[rows].tolist()),
                offsets[rows].tolist(),
                candidates.length[rows].tolist(),
                candidates.source[rows].tolist(),
                candidates.number[rows].tolist(),
                strict=True,
            )
        ]

    packing = {}
    for split, rows in (("train", selection.train), ("validation", selection.validation)):
        lengths = candidates.length[rows]
        sequences = training_sequences(lengths, config.max_length, config.packing, seed)
        filled = efficiency(lengths, len(sequences), config.max_length)
        packing[split] = {"sequences": len(sequences), "efficiency": round(filled, 6)}
        write_shards(
            folder,
            split,
            documents(rows),
            sequences,
            tokens,
            names,
            config.shard_sequences,
            config.workers,
            cluster,
        )
    tokenizer: Any = load_tokenizer(str(folder / "tokenizer"))

    def text_of(row: int) -> str:
        ids, _ = tokens.read(documents(np.array([row]))[0])
        text = tokenizer.decode(ids.tolist(), skip_special_tokens=True)
        return text.partition(profile.system)[2].strip() or text

    figures = mixture_figures(
        config, names, candidates, selection, reports, packing, _pools(config, tasks), text_of
    )
    tokens.close()
    write_json(folder / "statistics.json", figures)
    write_page(folder, figures, tokenizer)
    timing = _timing(figures, started, converted, selected)
    write_json(folder / "timing.json", timing)
    final = stage.complete(("chunks",), rows=figures["rows"], tokens=figures["tokens"])
    _tell(figures, timing, final)
    return final


def check_inputs(config: MixtureConfig) -> None:
    """Refuse a configuration whose profile, layout, sources or files are not there.

    Raises:
        UserError: The first that is not.
    """
    profile = profile_named(config.profile, "mixture.profile")
    check_tokenizer(config.tokenizer, profile, "mixture.tokenizer")
    _inputs(config, profile)


def _inputs(config: MixtureConfig, profile: Profile) -> dict[str, Path]:
    inputs = {"profile": profile.path, **tokenizer_files(config.tokenizer.path)}
    sources = [(f"source/{i.source.kind}", i.source) for i in config.sources]
    sources += [(f"suite/{suite.name}", suite.source) for suite in config.suites]
    for label, source in sources:
        if not isinstance(source, FilesConfig):
            raise UserError(
                f"mixture, {label}",
                "a source that reads no files",
                "a source of files or of a hub data set",
                "use it in [data]",
            )
        for name, path in source.files().items():
            if not path.is_file():
                module = load_plugin("data_prep.sources", source.kind)
                raise no_such_file(f"mixture, {label}", name, path, module)
            inputs[f"{label}/{name}"] = path
    return inputs


def _tasks(config: MixtureConfig, folder: Path) -> list[Task]:
    """Return every chunk of every source's train split, in order."""
    folder.mkdir(exist_ok=True)
    tasks: list[Task] = []
    for ingredient in config.sources:
        source = ingredient.training()
        if not source.train:
            raise UserError(
                f"mixture.sources, kind {source.kind!r}, key 'train'",
                "missing",
                "what to train on",
                'name a file, or "hub"',
            )
        found = list(stretches(source, config.chunk_rows))
        total = sum(stretch.rows for stretch in found)
        limit = _limit(config.scaled(ingredient.pool), total)
        stem = Path(source.kind).stem
        tasks += [
            Task(f"{stem}-{index:05d}", stretch, limit, folder)
            for index, stretch in enumerate(found)
        ]
    return tasks


def _limit(pool: int, total: int) -> int:
    """Return the rank below which a row is in the pool."""
    return (pool << 64) // total if 0 < pool < total else 1 << 64


def _pools(config: MixtureConfig, tasks: Sequence[Task]) -> list[int]:
    """Return the raw rows of each source."""
    totals: Counter[str] = Counter()
    for task in tasks:
        totals[task.stretch.kind] += task.stretch.rows
    return [totals[ingredient.source.kind] for ingredient in config.sources]


def _timing(
    figures: dict[str, Any], started: float, converted: float, selected: float
) -> dict[str, float]:
    ended = time.monotonic()
    seconds = ended - started
    rows, tokens = sum(figures["rows"].values()), sum(figures["tokens"].values())
    return {
        "convert_s": round(converted - started, 3),
        "select_s": round(selected - converted, 3),
        "write_s": round(ended - selected, 3),
        "all_s": round(seconds, 3),
        "rows_per_s": round(rows / seconds, 1),
        "tokens_per_s": round(tokens / seconds, 1),
    }


def _tell(figures: dict[str, Any], timing: dict[str, float], folder: Path) -> None:
    """Print counts by source, what is missing and why, and the speed."""
    lines = [f"{'source':20} {'rows':>9} {'asked':>9} {'implied':>8} {'weight':>8} {'tokens':>12}"]
    for name, source in figures["sources"].items():
        lines.append(
            f"{name:20} {source['rows']:9} {source['asked'] or source['rows']:9} "
            f"{source['implied_weight']:8.4f} {source['weight']:8.4f} {source['tokens']:12}"
        )
        if source["missing"]:
            reasons = ", ".join(f"{n} {reason}" for reason, n in source["left_out"].items())
            lines.append(
                f"  {source['missing']} of {source['asked']} are missing: {source['raw']} raw "
                f"rows, {reasons or 'nothing left out'}"
            )
    lines.append(
        f"mixture: {figures['rows']['train']} train and {figures['rows']['validation']} validation "
        f"rows, {sum(figures['tokens'].values())} tokens, packing "
        f"{figures['packing']['train']['efficiency']:.4f}, {timing['rows_per_s']:.0f} rows/s, "
        f"{timing['tokens_per_s']:.0f} tokens/s, {timing['all_s']:.1f} s: {folder}"
    )
    print(plain("\n".join(lines)), file=sys.stderr)


def cluster_of(table: dict[str, Any]) -> ClusterConfig | None:
    """Return the [cluster] table of a run's file, None where it has none."""
    found = table.get("cluster")
    return None if found is None else validate(ClusterConfig, found, "[cluster]")


def main(arguments: list[str]) -> None:
    """Run the stage from the command line."""
    run_stage(
        MixtureConfig,
        "mixture",
        "python -m data_prep.mixture",
        __doc__ or "",
        arguments,
        lambda found: build_mixture(found.config, found.run, found.seed, cluster_of(found.table)),
        lambda found: with_tokenizer(found.config, model_path(found.table)),
    )


if __name__ == "__main__":
    command(main)
