r"""The command line.

python -m verifiers "1/2" "so it is \boxed{0.5}"
python -m verifiers grade --input rows.jsonl --output verdicts.jsonl --workers 2
python -m verifiers audit data.jsonl
python -m verifiers check my_checker.py
"""

from __future__ import annotations

import argparse
import difflib
import json
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from .plain import plain
from .verdict import Outcome

_COMMANDS = ("explain", "grade", "audit", "check")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: Arguments; those of the process by default.

    Returns:
        The exit status: 0; 1 when an answer is not correct, an audit finds
        something or a check fails; 2 for wrong arguments or input.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments and arguments[0] not in (*_COMMANDS, "-h", "--help"):
        if difflib.get_close_matches(arguments[0], _COMMANDS, cutoff=0.75):
            commands = ", ".join(_COMMANDS)
            said = f"note: {arguments[0]!r} is taken for a gold answer; commands are {commands}"
            print(plain(said), file=sys.stderr)
        arguments.insert(0, "explain")
    options = _parser().parse_args(arguments)
    try:
        return options.run(options)
    except (ValueError, ImportError, OSError) as error:
        print(f"error: {plain(error)}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"python -m {__package__}", description="Judge mathematical answers.",
        epilog='The short form: python -m verifiers "gold" "text"',
    )  # fmt: skip
    commands = parser.add_subparsers(required=True, metavar="command")
    explain = commands.add_parser("explain", help="explain a verdict step by step")
    explain.add_argument("gold")
    explain.add_argument("text", help="a completion; - reads it from standard input")
    explain.add_argument("--policy", default="boxed", help="how the answer is found")
    explain.add_argument("--json", action="store_true", help="print the verdict as JSON instead")
    explain.set_defaults(run=_explain)
    grade = commands.add_parser("grade", help="grade a file of rows {id, gold, pred, kind}")
    grade.add_argument("--input", type=Path, required=True, help="JSON lines")
    grade.add_argument("--output", type=Path, required=True, help="JSON lines, in input order")
    grade.add_argument("--workers", type=int, default=2, help="processes (default 2)")
    grade.add_argument("--policy", default="boxed", help="how the answer of a response is found")
    grade.add_argument("--time-limit", type=float, default=0.9, help="seconds a row")
    grade.add_argument("--memory-limit", type=int, default=480, help="MiB a process")
    grade.set_defaults(run=_grade)
    audit = commands.add_parser("audit", help="report golds that fail against themselves")
    audit.add_argument("data", type=Path, help="JSON lines")
    audit.add_argument("--field", help="key of the gold")
    audit.set_defaults(run=_audit)
    check = commands.add_parser("check", help="run the conformance tests on a checker")
    check.add_argument("kind", help="a .py file, or the name of a checker")
    check.add_argument("--options", default="{}", help="options of the checker, as JSON")
    check.set_defaults(run=_check)
    return parser


def _explain(options: argparse.Namespace) -> int:
    from .explain import explain
    from .extract import check_policy
    from .judge import verify

    policy = check_policy(options.policy)
    text = sys.stdin.read() if options.text == "-" else options.text
    verdict = verify(options.gold, text, policy=policy)
    if options.json:
        print(json.dumps(verdict.to_dict()))
    else:
        for line in explain(options.gold, text, policy):
            print(plain(line))
    return 0 if verdict.is_correct else 1


def _grade(options: argparse.Namespace) -> int:
    from .grade import grade

    started = time.perf_counter()
    counts = grade(
        options.input, options.output, workers=options.workers, policy=options.policy,
        time_limit_s=options.time_limit, memory_limit_mb=options.memory_limit,
    )  # fmt: skip
    spent = time.perf_counter() - started
    shown = ", ".join(f"{counts[o.value]} {o.value}" for o in Outcome if counts[o.value])
    print(f"{sum(counts.values())} rows in {spent:.1f} s: {shown or 'none'}", file=sys.stderr)
    return 0


def _audit(options: argparse.Namespace) -> int:
    from .audit import audit

    counts: Counter[str] = Counter()
    for finding in audit(options.data, options.field):
        counts["rows"] += 1
        if finding is not None:
            counts[finding.problem] += 1
            print(plain(json.dumps(finding._asdict(), ensure_ascii=False)))
    found = counts.total() - counts["rows"]
    parts = ", ".join(f"{n} {name}" for name, n in sorted(counts.items()) if name != "rows")
    print(
        f"{counts['rows']} golds, {found} findings{': ' + parts if parts else ''}", file=sys.stderr
    )
    return 1 if found else 0


def _check(options: argparse.Namespace) -> int:
    from .checkers import load_checker
    from .conformance import run

    try:
        given = json.loads(options.options)
    except ValueError as error:
        raise ValueError(f"--options is no JSON: {error}; expected a JSON object") from None
    if not isinstance(given, dict):
        raise ValueError(f"--options is {options.options!r}, expected a JSON object")
    load_checker(options.kind, given)  # one that is not there has nothing to pass or fail
    results = run(options.kind, given)
    for name, problem in results:
        state = "ok    " if problem is None else "FAILED"
        print(plain(f"{state} {name}{f': {problem}' if problem else ''}"))
    failed = sum(problem is not None for _, problem in results)
    print(f"{len(results) - failed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
