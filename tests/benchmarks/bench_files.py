"""A checkpoint on the real files of four suites, killed and resumed, through each engine.

    python tests/benchmarks/bench_files.py [--model FOLDER] [--engines embedded vllm]

Every engine evaluates GSM8K's test set, MATH-500, MGSM-zh and CMATH, greedy and n samples, twice:
once from end to end, and once killed (SIGKILL) at each `--kills` share of its shards and started
again with the same command. Prints JSON: figures, times, and how many samples and figures differ
between the two. Without a model, the small checkpoint of `real_files.toml` is trained first.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from data_prep.jsonl import read_json
from data_prep.versions import versions
from eval.sample_log import log_shards
from pipeline.samples import read_samples

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT.parent / "shared" / "data"
FILES = {
    "gsm8k": "gsm8k/test.jsonl",
    "math500": "math500/test.jsonl",
    "mgsm_zh": "mgsm_zh/mgsm_zh.jsonl",
    "cmath": "cmath/test_deepseek.jsonl",
}


def checkpoint() -> Path:
    """Return the small checkpoint's folder, trained where it is not there."""
    folder = ROOT / "runs" / "real-files" / "sft" / "checkpoint"
    if not folder.is_dir():
        config = Path(__file__).with_name("real_files.toml")
        subprocess.run(
            [sys.executable, "-m", "pipeline.run", "--config", str(config)], cwd=ROOT, check=True
        )
    return folder


def words(known: argparse.Namespace, model: Path, engine: str, out: Path) -> list[str]:
    """Return the command of an evaluation."""
    return [
        sys.executable,
        "-m",
        "eval.run",
        "--model",
        str(model),
        "--name",
        "model",
        "--suites",
        *(f"{name}={known.data / path}" for name, path in FILES.items()),
        "--n",
        str(known.n),
        "--max-tokens",
        str(known.max_tokens),
        "--limit",
        str(known.limit),
        "--shard-size",
        str(known.shard_size),
        "--engine.kind",
        engine,
        "--out",
        str(out),
    ]


def shards(out: Path) -> int:
    """Return how many shards have been drawn."""
    return len(list((out / "samples" / "model").glob("*/*-*.jsonl")))


def children(process: int) -> set[int]:
    """Return the processes that a process has started, and theirs."""
    found, stack = set(), [process]
    while stack:
        for task in Path(f"/proc/{stack.pop()}/task").glob("*/children"):
            new = {int(word) for word in task.read_text().split()} - found
            found |= new
            stack += new
    return found


def run(command: list[str], out: Path, log: Path, until: int = 0) -> tuple[float, int]:
    """Run a command, to its end or until so many shards are drawn; then SIGKILL.

    Returns:
        Its seconds, and how many of its child processes outlived it by ten seconds.
    """
    began = time.monotonic()
    with log.open("a", encoding="utf-8") as file:
        process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=file)
        while until and process.poll() is None and shards(out) < until:
            time.sleep(0.02)
        family = children(process.pid) if until else set()
        if until and process.poll() is None:
            process.send_signal(signal.SIGKILL)
        status = process.wait()
    seconds = time.monotonic() - began
    if status not in ((0, -signal.SIGKILL) if until else (0,)):
        raise SystemExit(f"{' '.join(command)}\nended with status {status}; see {log}")
    deadline = time.monotonic() + 10
    while (left := {p for p in family if Path(f"/proc/{p}").exists()}) and (
        time.monotonic() < deadline
    ):
        time.sleep(0.1)
    return seconds, len(left)


def differences(a: Path, b: Path) -> dict[str, Any]:
    """Return how many samples differ in tokens, and which figures, a suite."""
    found: dict[str, Any] = {}
    for suite in FILES:
        total = differing = 0
        for label in ("greedy", "samples"):
            one, two = (
                [
                    s
                    for path in log_shards(root / "eval-model" / suite, label)
                    for s in read_samples(path)
                ]
                for root in (a, b)
            )
            assert [(s.problem_id, s.sample_index, s.seed) for s in one] == [
                (s.problem_id, s.sample_index, s.seed) for s in two
            ]
            total += len(one)
            differing += sum(x.token_ids != y.token_ids for x, y in zip(one, two, strict=True))
        x, y = (read_json(root / "eval-model" / suite / "figures.json") for root in (a, b))
        figures = {
            m: [x["figures"][m]["value"], y["figures"][m]["value"]]
            for m in x["figures"]
            if x["figures"][m] != y["figures"][m]
        }
        found[suite] = {
            "samples": total,
            "differing_samples": differing,
            "identical_figures": x == y,
            "differing_figures": figures,
        }
    return found


def percents(out: Path) -> dict[str, dict[str, str]]:
    """Return the figures of an evaluation, in per cent with intervals."""
    table = {}
    for suite in FILES:
        content = read_json(out / "eval-model" / suite / "figures.json")
        n, top = content["n"], max(content["k"])
        names = (
            "greedy",
            f"avg@{n}",
            f"pass@{top}",
            f"maj@{top}",
            "truncated",
            "no_answer",
            "not_run",
            "unjudged",
            "timeouts",
        )
        table[suite] = {"questions": str(content["questions"])} | {
            name: "{value:.2f} [{low:.2f}, {high:.2f}]".format(
                **{k: 100 * v for k, v in content["figures"][name].items()}
            )
            for name in names
        }
    return table


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="model folder (default: a small one, trained)")
    parser.add_argument("--engines", nargs="+", help="default: embedded, and vllm where it is")
    parser.add_argument("--data", type=Path, default=DATA, help="folder of the published files")
    parser.add_argument("--limit", type=int, default=0, help="first questions (0: whole files)")
    parser.add_argument("--n", type=int, default=8)
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--shard-size", type=int, default=128)
    parser.add_argument(
        "--kills",
        type=float,
        nargs="+",
        default=[0.3, 0.7],
        help="shares of the shards at which the run is killed",
    )
    parser.add_argument("--out", type=Path, help="keep the evaluations here (default: scratch)")
    known = parser.parse_args()
    missing = [str(known.data / p) for p in FILES.values() if not (known.data / p).is_file()]
    if missing:
        print(f"skipped: no such files: {', '.join(missing)}; give their folder with --data")
        return
    if known.engines is None:
        known.engines = ["embedded"] + ["vllm"] * (importlib.util.find_spec("vllm") is not None)
    model = (known.model or checkpoint()).resolve()
    known.out = known.out or Path(tempfile.mkdtemp(prefix="bench-files-"))
    known.out.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {}
    for engine in known.engines:
        whole, cut = known.out / f"{engine}-whole", known.out / f"{engine}-cut"
        log = known.out / f"{engine}.log"
        if whole.exists() or cut.exists():
            raise SystemExit(f"{whole} or {cut} is there already; remove it, or give another --out")
        seconds, _ = run(words(known, model, engine, whole), whole, log)
        total = shards(whole)
        again, resumed, orphans = words(known, model, engine, cut), [], 0
        for share in known.kills:
            spent, left = run(again, cut, log, until=max(1, round(share * total)))
            resumed.append({"killed_after_shards": shards(cut), "seconds": round(spent, 1)})
            orphans += left
        spent, _ = run(again, cut, log)
        resumed.append({"shards": shards(cut), "seconds": round(spent, 1)})
        tokens = sum(
            len(s.token_ids)
            for path in (whole / "samples" / "model").glob("*/*-*.jsonl")
            for s in read_samples(path)
        )
        results[engine] = {
            "figures": percents(whole),
            "whole_s": round(seconds, 1),
            "sampled_tokens": tokens,
            "tokens_per_s_end_to_end": round(tokens / seconds),
            "shards": total,
            "cut": resumed,
            "processes_left_by_kills": orphans,
            "whole_against_cut": differences(whole, cut),
        }
    print(
        json.dumps(
            {
                "benchmark": "files",
                "model": str(known.model or "real_files.toml"),
                "n": known.n,
                "max_tokens": known.max_tokens,
                "limit": known.limit,
                "engines": results,
                "cores": os.cpu_count(),
                "versions": versions(),
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    main()
