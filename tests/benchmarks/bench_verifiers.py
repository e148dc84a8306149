"""Speed of the verifiers beside math-verify, on the same rows in the same run.

    python tests/benchmarks/bench_verifiers.py

Prints JSON. Rows are the labelled pairs of the local data when they are there,
else the tables of `tests/verifiers`. Both judges run in this process, each row
warm caches aside: every gold is read afresh by math-verify, and once by ours,
which caches it (groups share their gold in training; `distinct` clears the cache
before every row). Ratios are what counts; times belong to the machine.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import logging
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

Row = tuple[str, str, str]


def rows() -> tuple[str, list[Row]]:
    """Return where the rows come from, and rows of gold, text and policy."""
    path = ROOT.parent / "shared" / "verifier_pairs" / "pairs.jsonl"
    if path.is_file():
        with path.open(encoding="utf-8") as lines:
            found = [json.loads(line) for line in lines]
        return "labelled pairs", [
            (r["gold"], r["pred"], "answer" if r["kind"] == "answer" else "boxed") for r in found
        ]
    out: list[Row] = []
    for name in ("pairs_same.txt", "pairs_different.txt"):
        for line in (ROOT / "tests" / "verifiers" / name).read_text(encoding="utf-8").splitlines():
            if " ||| " in line:
                gold, answer = line.split(" ||| ")
                out.append((gold, f"Therefore $\\boxed{{{answer}}}$.", "boxed"))
    return "tables of tests/verifiers", out


def timed(judge: Callable[[Row], object], data: list[Row]) -> list[float]:
    """Return the milliseconds of each row."""
    out = []
    for row in data:
        started = time.perf_counter()
        judge(row)
        out.append((time.perf_counter() - started) * 1000.0)
    return out


def summary(times: list[float]) -> dict[str, float]:
    """Return mean, median, 99th percentile and maximum, milliseconds."""
    ordered = sorted(times)
    return {
        "mean_ms": round(statistics.fmean(times), 5),
        "median_ms": round(statistics.median(times), 5),
        "p99_ms": round(ordered[int(0.99 * len(ordered))], 4),
        "max_ms": round(ordered[-1], 3),
    }


def ours(data: list[Row], *, distinct: bool) -> list[float]:
    """Time our judge; `distinct` forgets every gold before it is judged."""
    from verifiers import judge, quick, reading, verify

    caches = (judge._gold, judge.read_gold, reading._read_cached, quick._read_cached)

    def one(row: Row) -> object:
        return verify(row[0], row[1], policy=row[2])

    for row in data[:: max(1, len(data) // 50)]:
        one(row)
    out: list[float] = []
    for row in data:
        if distinct:
            for cache in caches:
                cache.cache_clear()
        out.extend(timed(one, [row]))
    return out


def peers(data: list[Row]) -> list[float]:
    """Time math-verify by the settings of its README."""
    import math_verify

    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    gold_config = [math_verify.LatexExtractionConfig(), math_verify.ExprExtractionConfig()]
    text_config = [
        math_verify.LatexExtractionConfig(boxed_match_priority=0),
        math_verify.ExprExtractionConfig(),
    ]

    def one(row: Row) -> object:
        try:
            gold = math_verify.parse(row[0] if "$" in row[0] else f"${row[0]}$", gold_config)
            return math_verify.verify(gold, math_verify.parse(row[1], text_config))
        except Exception:  # what the peer raises is its own affair; its time counts
            return None

    timed(one, data[:: max(1, len(data) // 50)])
    return timed(one, data)


def pooled(data: list[Row], repeat: int) -> dict[str, float]:
    """Time the pool: what isolation adds to a verdict, and what a second worker gives.

    Both are taken on rows that cost more than the pipe, and on all rows.
    """
    from verifiers import VerifierPool, verify

    pairs = [(gold, text) for gold, text, policy in data if policy == "boxed"] * repeat
    started = time.perf_counter()
    for gold, text in pairs:
        verify(gold, text)
    alone = time.perf_counter() - started
    walls: dict[int, float] = {}
    parent: dict[int, float] = {}
    for workers in (1, 2):
        with VerifierPool(workers=workers) as pool:
            pool.start()
            pool.verify_many(pairs[: len(pairs) // repeat])
            walls[workers] = parent[workers] = float("inf")
            for _ in range(3):
                started, spent = time.perf_counter(), time.process_time()
                pool.verify_many(pairs)
                walls[workers] = min(walls[workers], time.perf_counter() - started)
                parent[workers] = min(parent[workers], time.process_time() - spent)
    return {
        "rows": len(pairs),
        "in_process_ms_a_verdict": round(alone / len(pairs) * 1000, 5),
        "one_worker_ms_a_verdict": round(walls[1] / len(pairs) * 1000, 5),
        "two_workers_ms_a_verdict": round(walls[2] / len(pairs) * 1000, 5),
        "isolation_adds_ms": round((walls[1] - alone) / len(pairs) * 1000, 5),
        "parent_cpu_ms_a_verdict": round(parent[2] / len(pairs) * 1000, 5),
        "two_workers_over_one": round(walls[1] / walls[2], 3),
    }


def hostile() -> dict[str, object] | None:
    """Return how long the slowest of the adversarial texts takes; None without the local data.

    Wall time, first in this process and then in a pool whose workers have 512 MB and a second.
    """
    from verifiers import VerifierPool, verify

    path = ROOT.parent / "shared" / "verifier_pairs" / "adversarial.jsonl"
    if not path.is_file():
        return None
    with path.open(encoding="utf-8") as lines:
        found = [json.loads(line) for line in lines]
    here = [
        verify(row["gold"], row["pred"], policy="answer" if row["kind"] == "answer" else "boxed")
        for row in found
    ]
    there = []
    for kind, policy in (("answer", "answer"), ("response", "boxed")):
        pairs = [(row["gold"], row["pred"]) for row in found if row["kind"] == kind]
        with VerifierPool("boxed", {"policy": policy}, workers=1, memory_limit_mb=512) as pool:
            there += pool.verify_many(pairs)
    rules = [verdict.rule for verdict in there]
    return {
        "rows": len(found),
        "slowest_ms": round(max(verdict.ms for verdict in here), 1),
        "slowest_ms_in_the_pool": round(max(verdict.ms for verdict in there), 1),
        "timeouts_in_the_pool": rules.count("timeout"),
        "out_of_memory_in_the_pool": rules.count("memory_limit") + rules.count("worker_died"),
    }


def machine() -> dict[str, object]:
    """Return what the figures belong to."""
    command = ["git", "rev-parse", "HEAD"]
    git = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    versions = {}
    for name in ("math-verify", "sympy", "mpmath"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "load": [round(x, 2) for x in os.getloadavg()],
        "versions": versions,
        "commit": git.stdout.strip() or None,
    }


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--limit", type=int, help="take this many rows, spread over all")
    parser.add_argument("--repeat", type=int, default=20, help="times the rows go through the pool")
    options = parser.parse_args()
    source, data = rows()
    if options.limit:
        data = data[:: max(1, len(data) // options.limit)]
    fresh = ours(data, distinct=True)
    cached = ours(data, distinct=False)
    result: dict[str, object] = {
        "machine": machine(),
        "rows": {"from": source, "count": len(data)},
        "boxed_cold_gold": summary(fresh),
        "boxed": summary(cached),
    }
    if importlib.util.find_spec("math_verify") is not None:
        peer = peers(data)
        result["math_verify"] = summary(peer)
        result["mean_times_faster"] = round(statistics.fmean(peer) / statistics.fmean(cached), 1)
        result["mean_times_faster_cold_gold"] = round(
            statistics.fmean(peer) / statistics.fmean(fresh), 1
        )
    result["pool"] = pooled(data, options.repeat)
    result["adversarial"] = hostile()
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
