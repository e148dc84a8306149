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

import multiprocessing
import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from data_prep import near
from data_prep.chunk import Converter, Task
from data_prep.command_line import invocation, print_plan
from data_prep.decontaminate import Index, Question
from data_prep.errors import UserError, command
from data_prep.formatting import load_formatter
from data_prep.jsonl import read_json, write_json
from data_prep.mixture_config import Ingredient, MixtureConfig
from data_prep.mixture_figures import mixture_figures
from data_prep.packing import efficiency, training_sequences
from data_prep.page import write_page
from data_prep.plugins import load_plugin
from data_prep.preflight import ROWS, preflight
from data_prep.reading import Rejected, convert, items, read_stretch, stretches
from data_prep.rows import messages_of
from data_prep.run_folder import Stage
from data_prep.schema import Chat, Problem
from data_prep.selection import Candidates, select
from data_prep.shards import Document, TokenFiles, write_shard
from data_prep.sources._files import FilesConfig
from data_prep.tokenizer import load_tokenizer, tokenizer_files, train_tokenizer
from prompts import Profile, PromptError, load_layout, load_profile

# Set in every worker process by `_start_worker`.
_worker: dict[str, Any] = {}


def build_mixture(config: MixtureConfig, run: Path, seed: int) -> Path:
    """Build the mixture stage of a run, go on with it, or skip it when it is complete.

    Args:
        config: What to build.
        run: The run folder.
        seed: Decides pools, sampling, what is held out, and the order of sequences.

    Returns:
        The stage's folder, `<run>/mixture`.

    Raises:
        UserError: Anything in configuration or input that a user can mend.
    """
    try:
        profile = load_profile(config.profile)
    except PromptError as error:
        raise UserError("mixture.profile", str(error)) from None
    # The number of workers changes how long it takes, not what comes out.
    plan = {"mixture": config.model_dump(mode="json", exclude={"workers"}), "seed": seed}
    stage = Stage(run, "mixture", plan, _inputs(config, profile))
    if stage.is_complete:
        print(f"mixture: complete, kept as it is ({stage.final})", file=sys.stderr)
        return stage.final
    started = time.monotonic()
    is_new = not stage.work.is_dir()
    folder = stage.begin()
    try:
        tasks = _tasks(config, folder / "chunks")
        _prepare_tokenizer(config, profile, folder)
        _convert(config, seed, folder, tasks)
    except UserError:
        if is_new:  # bad input leaves nothing half-written
            shutil.rmtree(folder)
        raise
    converted = time.monotonic()
    candidates, reports = _load(tasks)
    names = [Path(ingredient.source.kind).stem for ingredient in config.sources]
    selection = select(
        candidates, names, config.asked(), config.validation_rows, config.near_duplicates, seed
    )
    selected = time.monotonic()
    offsets = _offsets(candidates, len(tasks))
    packing = {}
    for split, rows in (("train", selection.train), ("validation", selection.validation)):
        sequences = training_sequences(
            candidates.length[rows], config.max_length, config.packing, seed
        )
        packing[split] = {
            "sequences": len(sequences),
            "efficiency": round(
                efficiency(candidates.length[rows], len(sequences), config.max_length), 6
            ),
        }
        _write_shards(config, folder, split, candidates, offsets, tasks, rows, sequences)
    figures = mixture_figures(
        config, names, candidates, selection, reports, packing, _pools(config, tasks)
    )
    write_json(folder / "statistics.json", figures)
    write_page(folder, figures, names, load_tokenizer(str(folder / "tokenizer")))
    timing = _timing(figures, started, converted, selected)
    write_json(folder / "timing.json", timing)
    shutil.rmtree(folder / "chunks")
    final = stage.complete(rows=figures["rows"], tokens=figures["tokens"])
    _tell(figures, timing, final)
    return final


def _inputs(config: MixtureConfig, profile: Profile) -> dict[str, Path]:
    inputs = {"profile": profile.path, **tokenizer_files(config.tokenizer.path)}
    sources = [(f"source/{i.source.kind}", i.source) for i in config.sources]
    sources += [(f"suite/{suite.name}", suite.source) for suite in config.suites]
    for label, source in sources:
        if not isinstance(source, FilesConfig):
            raise UserError(f"mixture, {label}", "a source that reads no files",
                            "a source of files or of a hub data set", "use it in [data]")
        for name, path in source.files().items():
            if not path.is_file():
                raise UserError(f"mixture, {label}, key {name!r}", f"no such file: {path}",
                                "a data file", "check the path")
            inputs[f"{label}/{name}"] = path
    return inputs


def _tasks(config: MixtureConfig, folder: Path) -> list[Task]:
    """Return every chunk of every source's train split, in order."""
    folder.mkdir(exist_ok=True)
    tasks: list[Task] = []
    for ingredient in config.sources:
        source = ingredient.source.model_copy(update={"validation": "", "test": ""})
        if not source.train:
            raise UserError(f"mixture.sources, kind {source.kind!r}, key 'train'", "missing",
                            "what to train on", "name a file, or \"hub\"")
        found = list(stretches(source, config.chunk_rows))
        total = sum(stretch.rows for stretch in found)
        limit = _limit(ingredient, total)
        stem = Path(source.kind).stem
        tasks += [
            Task(f"{stem}-{index:05d}", stretch, limit, folder)
            for index, stretch in enumerate(found)
        ]
    return tasks


def _limit(ingredient: Ingredient, total: int) -> int:
    """Return the rank below which a row is in the pool."""
    if not ingredient.pool or ingredient.pool >= total:
        return 1 << 64
    return (ingredient.pool << 64) // total


def _pools(config: MixtureConfig, tasks: Sequence[Task]) -> list[int]:
    """Return the raw rows of each source."""
    totals: Counter[str] = Counter()
    for task in tasks:
        totals[task.stretch.kind] += task.stretch.rows
    return [totals[ingredient.source.kind] for ingredient in config.sources]


def _prepare_tokenizer(config: MixtureConfig, profile: Profile, folder: Path) -> None:
    """Save the tokenizer that every worker loads, checked on the first rows of every source."""
    target = folder / "tokenizer"
    if target.is_dir():
        return
    settings = config.tokenizer
    first = [
        conversation for ingredient in config.sources
        for conversation in _first(ingredient, settings.sample_problems // len(config.sources))
    ]
    if not first:
        raise UserError("mixture.sources", "no row that can be trained on",
                        "at least one", "look at the files; see on_bad_row")
    if settings.path:
        formatter = load_formatter(load_tokenizer(settings.path), profile, settings.layout)
    else:
        try:
            layout = load_layout(settings.layout or profile.layout)
        except PromptError as error:
            raise UserError("mixture.tokenizer.layout", str(error)) from None
        texts = [profile.system, *(m["content"] for messages in first for m in messages)]
        tokenizer = train_tokenizer(texts, settings.vocab_size, layout, profile.system)
        formatter = load_formatter(tokenizer, profile)
    step = max(1, len(first) // ROWS)
    checked = first[::step]
    preflight(formatter, checked, formatter.conversations(checked))
    temporary = folder / "tokenizer.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    formatter.tokenizer.save_pretrained(temporary)
    temporary.rename(target)


def _first(ingredient: Ingredient, rows: int) -> Iterator[list[dict[str, str]]]:
    """Yield the conversations of a source's first usable rows."""
    module = load_plugin("data_prep.sources", ingredient.source.kind)
    source = ingredient.source.model_copy(update={"validation": "", "test": ""})
    stretch = next(iter(stretches(source, max(rows, 1))))
    for place, raw in read_stretch(stretch):
        item = convert(module, place, raw)
        if isinstance(item, Problem) and item.solutions:
            pair = messages_of(item.question, next(iter(item.solutions.values())))
            yield [dict(message) for message in pair]
        elif isinstance(item, Chat):
            yield [{"role": role, "content": text} for role, text in item.messages]


def questions(config: MixtureConfig) -> list[Question]:
    """Return the questions of every evaluation suite.

    Raises:
        UserError: A suite's row is malformed.
    """
    found = []
    for suite in config.suites:
        for item in items(suite.source):
            if isinstance(item, Rejected):
                # A row without a usable gold is a question all the same, but its text is gone;
                # only malformed ones end the build.
                if item.reason == "bad_row" and item.error is not None:
                    raise item.error
            elif isinstance(item, Problem):
                found.append(Question(suite.name, item.where, item.question))
    return found


def _convert(config: MixtureConfig, seed: int, folder: Path, tasks: Sequence[Task]) -> None:
    """Convert every chunk that is not there yet."""
    left = [task for task in tasks if not (task.folder / f"{task.name}.json").is_file()]
    asked = (config, seed, str(folder / "tokenizer"))
    _in_workers(config.workers, _convert_one, left, _start_converter, asked, "convert", "chunk")


def _start_converter(config: MixtureConfig, seed: int, tokenizer: str) -> None:
    # One process a core is enough; threads of the tokenizer would only get in the way.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    formatter = load_formatter(load_tokenizer(tokenizer), config.profile)
    index = Index(questions(config)) if config.suites else None
    _worker["converter"] = Converter(config, seed, formatter, index)


def _convert_one(task: Task) -> None:
    _worker["converter"].run(task)


def _start_writer(folder: Path) -> None:
    _worker["files"] = TokenFiles(folder)


def _write_one(job: tuple[Path, list[list[Document]]]) -> None:
    path, sequences = job
    write_shard(path, sequences, _worker["files"])


def _in_workers(
    workers: int, work: Callable[[Any], None], jobs: Iterable[Any], start: Callable[..., None],
    arguments: tuple[Any, ...], label: str, unit: str, total: int | None = None,
) -> None:
    """Run jobs in worker processes (in this one for a single worker), with a progress bar."""
    total = len(jobs) if isinstance(jobs, Sequence) else total
    bar = tqdm(total=total, desc=label, unit=unit, file=sys.stderr, disable=not total)
    with bar:
        if workers == 1 or total == 1:
            start(*arguments)
            for job in jobs:
                work(job)
                bar.update()
            return
        # Spawned, not forked: the tokenizer's threads do not survive a fork.
        context = multiprocessing.get_context("spawn")
        with context.Pool(workers, start, arguments) as pool:
            for _ in pool.imap_unordered(work, jobs):
                bar.update()
            pool.close()
            pool.join()


def _load(tasks: Sequence[Task]) -> tuple[Candidates, list[dict[str, Any]]]:
    """Read what the selection looks at of every chunk."""
    kinds = list(dict.fromkeys(task.stretch.kind for task in tasks))
    columns: dict[str, list[np.ndarray]] = {name: [] for name in Candidates.__annotations__}
    reports = []
    for index, task in enumerate(tasks):
        report = read_json(task.folder / f"{task.name}.json")
        reports.append({"source": Path(task.stretch.kind).stem, **report})
        with pa.memory_map(str(task.folder / f"{task.name}.arrow")) as file:
            table = pa.ipc.open_file(file).read_all()
            for name in ("number", "rank", "text_key", "question_key", "group_key",
                         "numbers_key", "length", "assistant"):
                columns[name].append(table[name].to_numpy())
            flat = table["signature"].combine_chunks().flatten().to_numpy()
            columns["signature"].append(flat.reshape(-1, near.PERMUTATIONS).copy())
        rows = table.num_rows
        columns["source"].append(np.full(rows, kinds.index(task.stretch.kind), dtype=np.int32))
        columns["chunk"].append(np.full(rows, index, dtype=np.int32))
        columns["row"].append(np.arange(rows, dtype=np.int32))
    return Candidates(**{name: np.concatenate(parts) for name, parts in columns.items()}), reports


def _offsets(candidates: Candidates, chunks: int) -> np.ndarray:
    """Return where each row's tokens start in its chunk's files, int64."""
    # Rows are loaded chunk by chunk in order, so a running sum restarts at each chunk.
    ends = np.cumsum(candidates.length.astype(np.int64))
    starts = ends - candidates.length
    sizes = np.bincount(candidates.chunk, minlength=chunks)
    first = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    base = np.zeros(chunks, dtype=np.int64)
    base[sizes > 0] = starts[first[sizes > 0]]
    return starts - base[candidates.chunk]


def _write_shards(
    config: MixtureConfig, folder: Path, split: str, candidates: Candidates,
    offsets: np.ndarray, tasks: Sequence[Task], rows: np.ndarray, sequences: list[list[int]],
) -> None:
    """Write the shards of a split that are not there yet."""
    size = config.shard_sequences
    count = -(-len(sequences) // size)
    paths = [folder / f"{split}-{index:05d}-of-{count:05d}.arrow" for index in range(count)]
    missing = [index for index, path in enumerate(paths) if not path.is_file()]

    def document(position: int) -> Document:
        row = int(rows[position])
        return Document(
            tasks[int(candidates.chunk[row])].name, int(offsets[row]),
            int(candidates.length[row]), int(candidates.source[row]), int(candidates.number[row]),
        )

    jobs = (
        (paths[index], [
            [document(position) for position in sequence]
            for sequence in sequences[index * size : (index + 1) * size]
        ])
        for index in missing
    )
    _in_workers(config.workers, _write_one, jobs, _start_writer, (folder / "chunks",),
                f"write {split}", "shard", total=len(missing))


def _timing(
    figures: dict[str, Any], started: float, converted: float, selected: float
) -> dict[str, float]:
    ended = time.monotonic()
    seconds = ended - started
    rows, tokens = sum(figures["rows"].values()), sum(figures["tokens"].values())
    return {
        "convert_s": round(converted - started, 3), "select_s": round(selected - converted, 3),
        "write_s": round(ended - selected, 3), "all_s": round(seconds, 3),
        "rows_per_s": round(rows / seconds, 1), "tokens_per_s": round(tokens / seconds, 1),
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
                f"  {source['missing']} of {source['asked']} are missing: {source['raw']} raw rows, "
                f"{reasons or 'nothing left out'}"
            )
    lines.append(
        f"mixture: {figures['rows']['train']} train and {figures['rows']['validation']} validation "
        f"rows, {sum(figures['tokens'].values())} tokens, packing "
        f"{figures['packing']['train']['efficiency']:.4f}, {timing['rows_per_s']:.0f} rows/s, "
        f"{timing['tokens_per_s']:.0f} tokens/s, {timing['all_s']:.1f} s: {folder}"
    )
    print("\n".join(lines), file=sys.stderr)


def main(arguments: list[str]) -> None:
    """Run the stage from the command line."""
    found = invocation(
        MixtureConfig, "mixture", "python -m data_prep.mixture", __doc__ or "", arguments
    )
    if found.is_dry:
        print_plan(found, "mixture", found.config)
        return
    print(build_mixture(found.config, found.run, found.seed))


if __name__ == "__main__":
    command(main)
