"""Grade a log a second time, and list where the two graders disagree.

    python -m eval.regrade runs/cpu/eval-grpo --checker math_verify
    python -m eval.regrade runs/cpu/eval-grpo --checker boxed --option policy=answer
    python -m eval.regrade runs/cpu/eval-grpo --profile qwen_math
    python -m eval.regrade runs/cpu/eval-grpo --reward-model runs/cpu/reward/checkpoint

Nothing is sampled. `--profile` grades as that profile does: its checker for the suite's language,
on texts cut at its stop strings (its prompt needs samples of its own: `eval.run --profile`, then
`eval.compare`). `--reward-model` adds best-of-K and the weighted vote. What is found goes into a
folder `second` inside each suite's, which the report's browser picks up; what the evaluation
itself says stays as it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from data_prep.arguments import Arguments, above_zero, at_least
from data_prep.errors import UserError, command
from data_prep.jsonl import read_json, read_rows, write_json, write_rows
from data_prep.manifest import check_stage, read_manifest
from data_prep.schema import read_problems
from eval.figures import intervals, suite_values
from eval.grading import Graded, grade, read_graded, write_graded
from eval.profile import load_evaluation_profile
from eval.reward_model import RewardModel, read_scores
from eval.sample_log import log_shards
from pipeline.engines import Prompt
from pipeline.samples import Sample, read_samples
from pipeline.verify import open_pool
from verifiers import VerifierPool
from verifiers.plain import plain

FILES = {"samples": "verdicts.jsonl", "greedy": "greedy_verdicts.jsonl"}


def read_log(folder: Path, label: str) -> Iterator[Sample]:
    """Yield a suite's samples, shard by shard."""
    for path in log_shards(folder, label):
        yield from read_samples(path)


def cut_at(text: str, stops: Sequence[str]) -> str:
    """Return a text up to the end of the stop string that comes first in it."""
    ends = [place + len(stop) for stop in stops if (place := text.find(stop)) >= 0]
    return text[: min(ends)] if ends else text


def regrade(
    folder: Path,
    pool: VerifierPool,
    checker: dict[str, Any],
    *,
    stops: Sequence[str] = (),
    reward: RewardModel | None = None,
) -> dict[str, Any]:
    """Grade one suite's log again; return both graders' figures and the disagreements.

    Args:
        folder: A suite's folder in an evaluation.
        pool: The second grader.
        checker: What it is, for the record.
        stops: Strings at which texts end before they are graded.
        reward: Scores the samples, where there is one.
    """
    problems = list(read_problems(folder / "problems.jsonl"))
    first = read_json(folder / "figures.json")
    tools = bool(read_json(folder / "generation.json").get("tool_rounds"))
    ids = [problem.id for problem in problems]
    second = folder / "second"
    second.mkdir(exist_ok=True)
    rows: dict[str, list[list[Graded]]] = {}
    differing: list[dict[str, Any]] = []
    for label, name in FILES.items():
        n = first["n"] if label == "samples" else 1
        log = (replace(s, text=cut_at(s.text, stops)) for s in read_log(folder, label))
        graded = grade(problems, log, pool, f"regrade {label}", tools)
        write_graded(second / name, graded)
        rows[label] = read_graded(second / name, ids, n)
        for before, after in zip(read_graded(folder / name, ids, n), rows[label], strict=True):
            for a, b in zip(before, after, strict=True):
                if a.is_correct != b.is_correct:
                    differing.append(
                        {
                            "problem_id": a.problem_id,
                            "label": label,
                            "sample_index": a.sample_index,
                            "first": a.outcome,
                            "first_rule": a.rule,
                            "first_answer": a.extracted,
                            "second": b.outcome,
                            "second_rule": b.rule,
                            "second_answer": b.extracted,
                        }
                    )
    scores = None
    if reward is not None:
        prompts = [
            Prompt(row["problem_id"], tuple(row["token_ids"]))
            for _, row in read_rows(folder / "prompts.jsonl")
        ]
        write_rows(second / "scores.jsonl", reward.rows(prompts, read_log(folder, "samples")))
        scores = read_scores(second / "scores.jsonl", {i: range(first["n"]) for i in ids})
    greedy = [group[0] for group in rows["greedy"]]
    values = suite_values(rows["samples"], greedy, first["k"], scores)
    found = intervals(values, resamples=2000, seed=0)
    write_rows(second / "disagreements.jsonl", differing)
    result = {
        "checker": checker,
        "figures": {m: i.to_dict() for m, i in found.items()},
        "samples": sum(map(len, rows["samples"])) + len(problems),
        "disagreements": len(differing),
    }
    write_json(second / "figures.json", result)
    return result | {"rows": differing, "first": first["figures"]}


def main(arguments: list[str]) -> None:
    """Command line."""
    parser = Arguments("python -m eval.regrade", __doc__)
    parser.add_argument("evaluation", type=Path, help="an evaluation's folder, RUN/eval-NAME")
    parser.add_argument("--checker", default="", help="kind of the second checker")
    parser.add_argument("--option", action="append", default=[], help="KEY=VALUE of the checker")
    parser.add_argument("--profile", default="", help="grade as this evaluation profile does")
    parser.add_argument("--reward-model", default="", help="folder or plug-in file that scores")
    parser.add_argument("--workers", type=at_least(1), default=2, help="judging processes")
    parser.add_argument("--time-limit-s", type=above_zero, default=5.0, help="of one verdict")
    known = parser.parse_args(arguments)
    if known.checker and known.profile:
        raise UserError("--profile", "beside --checker", "one of them", "leave one out")
    if not all("=" in option for option in known.option):
        raise UserError("--option", repr(known.option), "KEY=VALUE", "mend it")
    if not (known.checker or known.profile or known.reward_model):
        raise UserError(
            "command line", "no second grader", "--checker, --profile or --reward-model", "name one"
        )
    folders = sorted(path.parent for path in known.evaluation.glob("*/figures.json"))
    if not folders:
        raise UserError(
            str(known.evaluation), "not an evaluation's folder", "RUN/eval-NAME", "check the path"
        )
    check_stage(known.evaluation)
    options = dict(option.split("=", 1) for option in known.option)
    profile = load_evaluation_profile(known.profile)[0] if known.profile else None
    reward = None
    if known.reward_model:
        policy = Path(read_manifest(known.evaluation)["counts"]["model"])
        reward = RewardModel(known.reward_model, policy)
    for folder in folders:
        was = read_json(folder / "grading.json")
        if profile is not None:
            checker = profile.checkers.get(was["language"], profile.checker)
        else:
            checker = {"kind": known.checker} | options if known.checker else was["checker"]
            if not known.checker and str(checker["kind"]).endswith(".py"):
                raise UserError(
                    str(folder / "grading.json"),
                    f"a checker in a file of its own, {checker['kind']}",
                    "the file named by you: what a folder says is not run",
                    f"look at it, and add --checker {checker['kind']}",
                )
        with open_pool(checker, known.workers, known.time_limit_s) as pool:
            stops = profile.stop if profile is not None else ()
            show(folder.name, regrade(folder, pool, checker, stops=stops, reward=reward))


def show(suite: str, found: dict[str, Any]) -> None:
    """Print what a second grading of a suite found."""
    avg = next(m for m in found["first"] if m.startswith("avg@"))
    print(
        f"{plain(suite)}: {avg} {100 * found['first'][avg]['value']:.2f} → "
        f"{100 * found['figures'][avg]['value']:.2f}; the graders disagree on "
        f"{found['disagreements']} of {found['samples']} samples"
    )
    for metric, figure in found["figures"].items():
        if metric.startswith(("best@", "weighted@")):
            print(
                f"  {metric} {100 * figure['value']:.2f} "
                f"[{100 * figure['low']:.2f}, {100 * figure['high']:.2f}]"
            )
    for row in found["rows"][:10]:
        words = (
            f"  {row['problem_id']} {row['label']} {row['sample_index']}: "
            f"{row['first']} ({row['first_rule']}, {row['first_answer']!r}) → "
            f"{row['second']} ({row['second_rule']}, {row['second_answer']!r})"
        )
        print(plain(words))


if __name__ == "__main__":
    command(main)
