"""Problems of all sources: read, checked against their own golds, duplicates removed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Literal

from data_prep.config import PluginConfig
from data_prep.errors import UserError
from data_prep.normalise import normalise
from data_prep.plugins import ask, load_plugin
from data_prep.reading import Rejected, items
from data_prep.schema import LabelledSteps, Preference, Problem, Split, require_texts
from data_prep.sources._files import FilesConfig
from verifiers import Outcome, Verdict, verify_many

# Which copy of a question stays: held-out data must not change because train data grew.
PRIORITY: tuple[Split, ...] = ("test", "validation", "train")


Policy = Literal["fail", "skip"]


def read_sources(
    sources: Sequence[PluginConfig], seed: int, on_bad_row: Policy, on_bad_gold: Policy
) -> tuple[list[Problem], list[Preference | LabelledSteps], dict[str, dict[str, int]]]:
    """Read every source, in the order of the configuration.

    Args:
        sources: Their configurations.
        seed: Decides generated problems.
        on_bad_row: "fail" ends at a malformed row; "skip" leaves it out, counted.
        on_bad_gold: The same for a row without a gold.

    Returns:
        The problems, the preference pairs and labelled solutions, and by source how many rows
        were left out for which reason.

    Raises:
        UserError: A row is broken and its policy is "fail", a source holds conversations, or two
            problems share an id.
    """
    policies = {"bad_row": on_bad_row, "bad_gold": on_bad_gold}
    problems: list[Problem] = []
    judged: list[Preference | LabelledSteps] = []
    rejected: dict[str, Counter[str]] = {}
    for config in sources:
        module = load_plugin("data_prep.sources", config.kind, where="data.sources.kind")
        files = isinstance(config, FilesConfig)
        for item in items(config) if files else ask(module, "read", config, seed):
            if isinstance(item, Problem):
                problems.append(require_texts(item, str(module.__file__)))
            elif isinstance(item, Preference | LabelledSteps):
                judged.append(item)
            elif not isinstance(item, Rejected):
                raise UserError(
                    f"data.sources, kind {config.kind!r}",
                    f"it gives {type(item).__name__} rows",
                    "problems, preference pairs or labelled steps",
                    "use it in a mixture; see data_prep.mixture",
                )
            elif item.error is not None and policies[item.reason] == "fail":
                raise item.error
            else:
                rejected.setdefault(item.place.source, Counter())[item.reason] += 1
    seen: dict[str, Problem | Preference | LabelledSteps] = {}
    for problem in (*problems, *judged):
        other = seen.setdefault(problem.id, problem)
        if other is not problem:
            raise UserError(
                problem.where or f"source {problem.source!r}",
                f"id {problem.id!r} is taken by {other.where or other.source}",
                "ids that are unique in a run",
                "name each file and source once in data.sources",
            )
    return problems, judged, {name: dict(sorted(c.items())) for name, c in rejected.items()}


def drop_duplicates(problems: Iterable[Problem]) -> tuple[list[Problem], dict[str, int]]:
    """Keep one problem for each normalised question: test before validation before train.

    Within a split the first stays. The result keeps the order of the input.

    Returns:
        The problems, and how many were dropped by "<split dropped from>, also in <split kept>".
    """
    problems = list(problems)
    keys = [normalise(problem.question) for problem in problems]
    kept: dict[str, int] = {}
    for split in PRIORITY:
        for index, problem in enumerate(problems):
            if problem.split == split:
                kept.setdefault(keys[index], index)
    dropped = Counter(
        f"{problem.split}, also in {problems[kept[keys[index]]].split}"
        for index, problem in enumerate(problems)
        if kept[keys[index]] != index
    )
    return [problems[index] for index in sorted(kept.values())], dict(sorted(dropped.items()))


def check_golds(
    problems: Sequence[Problem], on_bad_gold: Policy, workers: int
) -> tuple[list[Problem], dict[str, dict[str, int]]]:
    r"""Judge every solution (or the boxed gold, where there is none) against its own gold.

    Args:
        problems: What to judge.
        on_bad_gold: "fail" ends at the first solution that is not judged correct; "skip"
            leaves its problem out and counts it.
        workers: Judging processes.

    Returns:
        The problems that passed, and outcomes by source (a problem counts once, by the first
        of its solutions that fails).

    Raises:
        UserError: A gold fails under "fail", naming file and line, gold and reason.
    """
    texts = [
        (problem, text)
        for problem in problems
        for text in (list(problem.solutions.values()) or [f"\\boxed{{{problem.answer}}}"])
    ]
    verdicts = verify_many(
        [(problem.answer, text) for problem, text in texts],
        workers=workers,
        # Far above what any verdict takes: a busy machine must not turn a good gold into a bad one.
        time_limit_s=5.0,
    )
    outcome: dict[str, Outcome] = {}
    for (problem, text), verdict in zip(texts, verdicts, strict=True):
        if verdict.is_correct:
            outcome.setdefault(problem.id, verdict.outcome)
            continue
        if on_bad_gold == "fail":
            raise _bad_gold(problem, text, verdict)
        if outcome.get(problem.id, Outcome.CORRECT) is Outcome.CORRECT:
            outcome[problem.id] = verdict.outcome
    counts: dict[str, Counter[str]] = {}
    for problem in problems:
        counts.setdefault(problem.source, Counter())[outcome[problem.id].value] += 1
    passed = [problem for problem in problems if outcome[problem.id] is Outcome.CORRECT]
    return passed, {source: dict(sorted(count.items())) for source, count in counts.items()}


def _bad_gold(problem: Problem, text: str, verdict: Verdict) -> UserError:
    answer = problem.answer if len(problem.answer) <= 80 else f"{problem.answer[:80]}…"
    reason = f" ({verdict.detail})" if verdict.detail else ""
    found = (
        f"gold {answer!r} cannot be parsed{reason}"
        if verdict.outcome is Outcome.GOLD_UNPARSEABLE
        else f"gold {answer!r}, but its own solution, ending {text[-60:]!r}, is judged "
        f"{verdict.outcome.value}{reason}"
    )
    return UserError(
        problem.where or f"source {problem.source!r}, problem {problem.id!r}",
        found,
        "a gold that its own solution is judged correct against",
        'mend or remove the row, or set data.on_bad_gold = "skip" to leave such rows out, counted',
    )
