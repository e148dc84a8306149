"""What each stage of a run will take: memory, tokens, time and disk, before anything is started.

How it is estimated stands in `pipeline.estimate`, and for training stages in
`pipeline.estimate_training`. A stage that cannot fit into memory or on the disk is refused, with
the key that would help most.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from data_prep.errors import UserError
from pipeline.config import RunConfig
from pipeline.estimate import Book, Forecast, device_of
from pipeline.estimate_training import forecast_training
from pipeline.launch import Launch, launched
from pipeline.lengths import Lengths, lengths_of
from pipeline.machine import GIB, MIB, Machine, product_rate, this_machine


def forecast(
    run: RunConfig, names: Iterable[str] | None = None, launch: Launch | None = None
) -> list[Forecast]:
    """Return the forecast of a run's stages, in the order of their inputs.

    Args:
        run: The run.
        names: Only these stages.
        launch: The processes that train together; empty for those that a launcher started.
    """
    from pipeline.run import stages_of

    wanted = [name for name, _ in stages_of(run) if names is None or name in set(names)]
    book = Book(run, lengths_of(run), launch or launched())
    return [_stage(book, name) for name in wanted if name != "report"]


def _stage(book: Book, name: str) -> Forecast:
    if name in ("data", "mixture"):
        return book.data(name)
    if name == "generate":
        return book.generate()
    if name == "verify":
        return book.verify()
    if name == "evaluate":
        return book.evaluate()
    return forecast_training(book, book.stages[name])


def rate_of(run: RunConfig) -> float:
    """Return this machine's rate of matrix products of the run's model, operations a second."""
    book = Book(run, Lengths(), Launch())
    shape = book.shape("model")
    width, inner = (1024, 4096) if shape is None else (shape.width, shape.feed_forward)
    precisions = {stage.precision for stage in run.train} or {"float32"}
    return product_rate(width, inner, device_of(run), min(precisions))


def table(found: Sequence[Forecast], rate: float, lengths: Lengths) -> str:
    """Return the forecast as text.

    Args:
        found: Stage by stage.
        rate: Of matrix products, operations a second.
        lengths: What it was made from.
    """
    head = ("stage", "memory", "tokens", "time", "disk", "most of the memory")
    lines: list[tuple[str, ...]] = [head]
    for stage in found:
        if stage.unknown:
            lines.append((stage.stage, "?", "?", "?", "?", stage.unknown))
            continue
        largest = sorted(stage.memory.items(), key=lambda part: -part[1])[:3]
        parts = ", ".join(f"{name} {size_text(size)}" for name, size in largest)
        lines.append(
            (
                stage.stage,
                (f"{stage.processes} × " if stage.processes > 1 else "") + size_text(stage.peak),
                count_text(stage.tokens),
                time_text(stage.seconds(rate)),
                size_text(stage.disk),
                parts,
            )
        )
    known = [stage for stage in found if not stage.unknown]
    total = (
        "all",
        size_text(max((s.on_machine for s in known), default=0)),
        count_text(sum(s.tokens for s in known)),
        time_text(sum(s.seconds(rate) for s in known)),
        size_text(sum(s.disk for s in known) + max((s.scratch for s in known), default=0)),
        "(largest memory; disk with training states)",
    )
    rows = [*lines, total] if len(known) > 1 else lines
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    text = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    source = "counted by the data stage" if lengths.counted else "estimated from the first rows"
    text.append(
        f"lengths {source}: prompts {lengths.prompt:.0f} tokens, answers {lengths.completion:.0f}; "
        f"matrix products {rate / 1e9:.0f} Gflop/s here"
    )
    return "\n".join(text)


def refuse_what_cannot_fit(
    run: RunConfig, found: Sequence[Forecast], machine: Machine | None = None
) -> list[str]:
    """Refuse a run that memory or disk cannot hold; return warnings about what is tight.

    Args:
        run: The run.
        found: Its forecast.
        machine: What there is; by default this one.

    Raises:
        UserError: A stage needs more than the machine has, with the key that would help most.
    """
    machine = machine or this_machine(run.out)
    on_gpu = machine.gpu > 0 and device_of(run) != "cpu"
    warnings: list[str] = []
    for stage in found:
        needs_gpu = on_gpu and stage.stage not in ("data", "mixture", "verify")
        need = stage.on_machine
        total = machine.gpu if needs_gpu else machine.memory
        free = machine.gpu_free if needs_gpu else machine.available
        what = "GPU memory" if needs_gpu else "memory"
        among = f" in {stage.processes} processes" if stage.processes > 1 else ""
        if need > total:
            part, size, fix = _largest(stage, stage.memory)
            raise UserError(
                f"stage {stage.stage!r}",
                f"it would take about {size_text(need)} of {what}{among}, "
                f"{size_text(size * stage.processes)} of it for {part}",
                f"at most {size_text(total)}, which this machine has",
                f"{fix}; or go on in spite of it with --no-forecast",
            )
        if need > free:
            warnings.append(
                f"stage {stage.stage!r} would take about {size_text(need)} of {what}{among}, and "
                f"{size_text(free)} is free now"
            )
    there = _size_of(Path(run.out))
    need = sum(s.disk for s in found) + max((s.scratch for s in found), default=0) - there
    if need > machine.disk:
        stage = max(found, key=lambda s: s.disk + s.scratch)
        parts = {**stage.kept, "training states": stage.scratch}
        keys = {**stage.keys, "training states": "set lora.rank, or take a smaller model"}
        part, size, fix = _largest(replace(stage, keys=keys), parts)
        raise UserError(
            f"out = {run.out!r}",
            f"it would take about {size_text(need)} of disk, {size_text(size)} of it for {part} "
            f"of stage {stage.stage!r}",
            f"at most {size_text(machine.disk)}, which is free there",
            f"give out another disk, or {fix}; or go on with --no-forecast",
        )
    return warnings


def _largest(stage: Forecast, parts: dict[str, int]) -> tuple[str, int, str]:
    """Return the largest part that a key can make smaller, its size, and how."""
    some = {name: size for name, size in parts.items() if name in stage.keys} or parts
    name = max(some, key=lambda part: some[part])
    return name, some[name], stage.keys.get(name, "take a smaller model")


def _size_of(folder: Path) -> int:
    if not folder.is_dir():
        return 0
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def announce(
    run: RunConfig, names: Iterable[str] | None = None, launch: Launch | None = None
) -> None:
    """Print what the stages will take, and refuse what cannot fit.

    Args:
        run: The run.
        names: Only these stages.
        launch: As `forecast` takes it.

    Raises:
        UserError: A stage needs more than this machine has.
    """
    found = forecast(run, names, launch)
    print(table(found, rate_of(run), lengths_of(run)), file=sys.stderr)
    for warning in refuse_what_cannot_fit(run, found):
        print(f"warning: {warning}", file=sys.stderr)


def size_text(size: float) -> str:
    """Return bytes as "1.2 GiB"."""
    for unit, scale in (("GiB", GIB), ("MiB", MIB)):
        if size >= scale:
            digits = 1 if size < 10 * scale else 0
            return f"{size / scale:,.{digits}f} {unit}"
    return f"{size / 1024:.0f} KiB"


def count_text(count: float) -> str:
    """Return a count as "2.2 M"."""
    for unit, scale in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count:.0f}" if count else "–"


def time_text(seconds: float) -> str:
    """Return seconds as "3 min"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 172800 else f"{seconds / 86400:.1f} days"
