"""A step on one page: its groups, their samples, and what each token was weighed with.

    python -m pipeline.steps --run runs/cpu --stage grpo --step 12 [--out FILE]

Works while the stage is still running, for every step that it has logged. The page is one HTML
file without anything to fetch. Tokens are coloured by their coefficient (`pipeline.coefficients`);
where a stage kept none for the step, samples, verdicts and rewards are shown without colours.
"""

from __future__ import annotations

import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup

from data_prep.arguments import Arguments
from data_prep.content_policy import content_policy
from data_prep.errors import UserError, command
from data_prep.files import writing
from data_prep.jsonl import read_rows, script_json
from data_prep.manifest import check_stage, stage_of
from pipeline.coefficients import path_of, read_coefficients
from pipeline.records import HISTOGRAM_EDGES
from pipeline.segments import token_ends

PAGE = Path(__file__).parent / "page"
# Figures at the head of the page, where the step has them.
SHOWN = (
    "reward_mean",
    "accuracy",
    "zero_signal_share",
    "entropy",
    "completion_length",
    "truncated_share",
    "clip_share_low",
    "clip_share_high",
    "kl_k3",
    "update_kl_k3",
    "sampler_gap_mean",
    "grad_norm",
    "objective",
)


def write_step(run: Path, stage: str, step: int, out: Path | None = None) -> Path:
    """Write a step's page; return its path.

    Args:
        run: The run folder.
        stage: Name of a training stage whose method samples.
        step: From 0.
        out: The page; empty for `<run>/pages/<stage>-step-<n>.html`.

    Raises:
        UserError: There is no such stage, or it has not logged this step.
    """
    folder = _stage_folder(run, stage)
    log = folder / "rollouts" / f"step-{step:05d}.jsonl"
    if not log.is_file():
        known = sorted(int(p.stem.split("-")[1]) for p in log.parent.glob("step-*.jsonl"))
        raise UserError(
            str(log),
            "no such step",
            f"one of {known[0]} … {known[-1]}" if known else "a stage whose method samples",
            "mend --step" if known else "mend --stage",
        )
    for path in (log, folder / "steps.jsonl", path_of(folder, step)):
        if (complete := stage_of(path)) is not None:
            check_stage(complete, path)
    figures = next((r for _, r in read_rows(folder / "steps.jsonl") if r["step"] == step), {})
    groups = groups_of(run, folder, step)
    environment = Environment(loader=FileSystemLoader(PAGE), autoescape=True, trim_blocks=True)
    script = (PAGE / "step.js").read_text("utf-8")
    text = environment.get_template("step.html.jinja").render(
        run=run.name,
        stage=stage,
        step=step,
        figures=[(name, figures[name]) for name in SHOWN if figures.get(name) is not None],
        bars=_bars(figures.get("advantage_histogram")),
        skipped=bool(figures.get("skipped")),
        kept=any(s["coefficient"] for g in groups for s in g["samples"]),
        css=Markup((PAGE / "step.css").read_text("utf-8")),  # noqa: S704 - own file
        script=Markup(script),  # noqa: S704 - own file
        policy=content_policy(script),
        data=Markup(script_json(groups)),  # noqa: S704 - escaped there
    )
    page = out or run / "pages" / f"{stage}-step-{step:05d}.html"
    page.parent.mkdir(parents=True, exist_ok=True)
    with writing(page) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return page


def groups_of(run: Path, folder: Path, step: int) -> list[dict[str, Any]]:
    """Return a step's groups, in the order in which they were drawn.

    Args:
        run: The run folder.
        folder: The stage's.
        step: Which.

    Returns:
        For each its problem, prefix and samples; a sample has its tokens as text, and lists of
        the same length with the sampler's log-probs and, where they were kept, coefficients.
    """
    rows = [row for _, row in read_rows(folder / "rollouts" / f"step-{step:05d}.jsonl")]
    problems = _problems(run, {row["problem_id"] for row in rows})
    tokenizer: Any = _tokenizer(run, folder)

    def decode(ids: list[int]) -> str:
        return tokenizer.decode(ids, skip_special_tokens=False)

    kept = read_coefficients(folder, step)
    groups: dict[Any, dict[str, Any]] = {}
    for row in rows:
        problem = problems.get(row["problem_id"], {})
        group = groups.setdefault(
            row.get("group", row["problem_id"]),
            {
                "problem": row["problem_id"],
                "question": problem.get("question", ""),
                "gold": problem.get("answer", ""),
                "level": problem.get("level", ""),
                "prefix": decode(row["prefix"]["token_ids"]) if "prefix" in row else "",
                "error": row.get("error", ""),
                "samples": [],
            },
        )
        if "error" in row:
            continue
        own = kept.get((row.get("group", -1), row["sample_index"]), {})
        ids = row["token_ids"]
        text = decode(ids)
        # What a cut-off character leaves at the end belongs to the last token.
        ends = [*token_ends(decode, ids)[:-1], len(text)]
        group["samples"].append(
            {
                "index": row["sample_index"],
                "outcome": row["outcome"],
                "answer": row.get("answer"),
                "reward": row["reward"],
                "finish": row["finish_reason"],
                "steps": row.get("steps", []),
                "tokens": [text[a:b] for a, b in zip([0, *ends[:-1]], ends, strict=True)],
                "logp": [float(f"{value:.4g}") for value in row["logprobs"]],
                "advantage": _padded(own.get("advantage"), len(ids)),
                "coefficient": _padded(own.get("coefficient"), len(ids)),
                "last": _padded(own.get("last_coefficient"), len(ids)),
            }
        )
    return list(groups.values())


def _padded(values: Any, count: int) -> Any:
    """Return a list with nothing for the tokens behind the part that was trained on."""
    return [*values, *[None] * (count - len(values))] if isinstance(values, list) else values


def _stage_folder(run: Path, stage: str) -> Path:
    for folder in (run / stage, run / f"{stage}.partial"):
        if (folder / "rollouts").is_dir():
            return folder
    known = sorted(p.parent.name.removesuffix(".partial") for p in run.glob("*/rollouts"))
    raise UserError(
        f"--run {run}, --stage {stage!r}",
        "no stage of that name with rollouts",
        f"one of {', '.join(known)}" if known else "a run with a stage whose method samples",
        "mend --run or --stage",
    )


def _problems(run: Path, wanted: set[str]) -> dict[str, dict[str, Any]]:
    path = run / "data" / "train.jsonl"
    if not path.is_file():
        return {}
    return {row["id"]: row for _, row in read_rows(path) if row["id"] in wanted}


def _tokenizer(run: Path, folder: Path) -> Any:
    """Return the stage's tokenizer; before its end, that of the run's data or model."""
    from data_prep.config import read_toml
    from pipeline.model import load_tokenizer

    for place in (folder / "checkpoint", run / "data" / "tokenizer"):
        if place.is_dir():
            return load_tokenizer(place)
    config = run / "config.toml"
    given = read_toml(config)["model"].get("path", "") if config.is_file() else ""
    if not given:
        raise UserError(
            str(run), "no tokenizer", "a run with a data stage or a finished stage", "check --run"
        )
    return load_tokenizer(given)


def _bars(counts: list[float] | None) -> list[dict[str, Any]]:
    """Return the histogram of advantages: label, tokens and height of each bar."""
    if not counts or not sum(counts):
        return []
    edges = [f"{edge:g}".replace("-", "−") for edge in HISTOGRAM_EDGES]
    labels = [f"≤ {edges[0]}", *map(" to ".join, pairwise(edges))]
    labels.append(f"> {edges[-1]}")
    top = max(counts)
    return [
        {"label": label, "count": int(count), "height": 100.0 * count / top}
        for label, count in zip(labels, counts, strict=True)
    ]


def main(arguments: list[str]) -> None:
    """Command line."""
    parser = Arguments("python -m pipeline.steps", __doc__)
    parser.add_argument("--run", required=True, type=Path, help="run folder")
    parser.add_argument("--stage", required=True, help="name of a training stage")
    parser.add_argument("--step", required=True, type=int, help="which step, from 0")
    parser.add_argument("--out", type=Path, help="the page; default <run>/pages/…")
    known = parser.parse_args(arguments)
    print(write_step(known.run, known.stage, known.step, known.out), file=sys.stdout)


if __name__ == "__main__":
    command(main)
