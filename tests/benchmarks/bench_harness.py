"""Wall time and accuracy beside lm-evaluation-harness: one checkpoint, the same prompts and limits.

    python tests/benchmarks/bench_harness.py --install     # once: the harness, in runs/lm-eval
    python tests/benchmarks/bench_harness.py [--model FOLDER] [--limit 200] [--rounds 2]

Both read a model folder and the first GSM8K test questions, complete the same prompt tokens
greedily up to the same limit, grade, and write their results: two commands, each timed from start
to exit, in turns. The harness runs with every batch size of `--batch-sizes`: its default is 1, and
a large one helps it where samples end at about the same length. Its grading is that of its own
gsm8k task (last number, exact match). Prints JSON: times, ratios, accuracies, and every question
on which the two differ, with both texts.

Without a model, the small checkpoint of `real_files.toml` is trained first.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench_files import DATA, FILES, ROOT, checkpoint

from data_prep.jsonl import read_json, read_rows, write_rows
from data_prep.versions import versions
from pipeline.model import load_tokenizer

VENV = ROOT / "runs" / "lm-eval"
# The harness's gsm8k task, its flexible extraction: the last number of the text.
TASK = r"""
task: boxed_gsm8k
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: generate_until
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{{{{gold}}}}"
target_delimiter: ""
generation_kwargs:
  until: [{stop}]
  do_sample: false
  temperature: 0.0
  max_gen_toks: {max_tokens}
filter_list:
  - name: flexible-extract
    filter:
      - function: regex
        group_select: -1
        regex_pattern: '(-?[$0-9.,]{{2,}})|(-?[0-9]+)'
      - function: take_first
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
    ignore_case: true
    ignore_punctuation: false
    regexes_to_ignore: [',', '\$', '(?s).*#### ', '\.$']
"""


def install() -> None:
    """Put the harness into an environment of its own that sees this one's torch."""
    subprocess.run([sys.executable, "-m", "venv", str(VENV)], check=True)
    (packages,) = (VENV / "lib").glob("python3*/site-packages")
    here = next(p for p in sys.path if p.endswith("site-packages"))
    (packages / "boxed.pth").write_text(f"{here}\n", encoding="utf-8")
    subprocess.run(
        [str(VENV / "bin/python"), "-m", "pip", "install", "-q", "lm_eval>=0.4.9,<0.5"], check=True
    )


def harness_python(given: Path | None) -> str:
    """Return a Python that can import lm_eval, or end with what to do."""
    for python in (given, VENV / "bin/python", Path(sys.executable)):
        if (
            python is not None
            and python.exists()
            and not subprocess.run(
                [str(python), "-c", "import lm_eval"], capture_output=True, check=False
            ).returncode
        ):
            return str(python)
    print("skipped: no lm-evaluation-harness here; run this with --install, or give --python")
    raise SystemExit(0)


def timed(command: list[str], log: Path) -> tuple[float, float]:
    """Return the wall and CPU seconds of a command, from start to exit."""
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    with log.open("a", encoding="utf-8") as file:
        status = subprocess.run(
            command, cwd=ROOT, stdout=file, stderr=file, check=False, env=os.environ | offline
        ).returncode
    if status:
        raise SystemExit(
            f"{' '.join(command)}\nended with status {status}:\n"
            f"{log.read_text(encoding='utf-8')[-2000:]}"
        )
    wall = time.monotonic() - began
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def ours(model: Path, file: Path, known: argparse.Namespace, out: Path) -> list[str]:
    """Return our command."""
    return [
        sys.executable,
        "-m",
        "eval.run",
        "--model",
        str(model),
        "--name",
        "model",
        "--suites",
        f"gsm8k={file}",
        "--n",
        "0",
        "--limit",
        str(known.limit),
        "--max-tokens",
        str(known.max_tokens),
        "--out",
        str(out),
    ]


def theirs(python: str, model: Path, batch: str, tasks: Path, out: Path) -> list[str]:
    """Return the harness's command."""
    return [
        python,
        "-m",
        "lm_eval",
        "--model",
        "hf",
        "--model_args",
        f"pretrained={model},dtype=float32",
        "--tasks",
        "boxed_gsm8k",
        "--include_path",
        str(tasks),
        "--batch_size",
        batch,
        "--device",
        "cpu",
        "--output_path",
        str(out),
        "--log_samples",
    ]


def our_answers(out: Path) -> dict[str, dict[str, Any]]:
    """Return question → text, extracted answer and verdict of our run."""
    folder = out / "eval-model" / "gsm8k"
    texts = {
        row["problem_id"]: row["text"]
        for path in folder.glob("greedy-*.jsonl")
        for _, row in read_rows(path)
    }
    return {
        row["problem_id"]: {
            "text": texts[row["problem_id"]],
            "answer": row["extracted"],
            "correct": row["outcome"] == "correct",
            "why": row["rule"],
        }
        for _, row in read_rows(folder / "greedy_verdicts.jsonl")
    }


def their_answers(out: Path) -> dict[str, dict[str, Any]]:
    """Return the same of the harness's run."""
    (path,) = out.rglob("samples_*.jsonl")
    return {
        row["doc"]["id"]: {
            "text": row["resps"][0][0],
            "answer": row["filtered_resps"][0],
            "correct": bool(row["exact_match"]),
            "why": "last number",
        }
        for _, row in read_rows(path)
    }


def ratios(
    times: dict[str, list[float]], summary: Callable[[list[float]], float]
) -> dict[str, float]:
    """Return the harness's time over ours, for each of its batch sizes."""
    own = summary(times["boxed"])
    return {name: round(summary(v) / own, 2) for name, v in times.items() if name != "boxed"}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--install", action="store_true", help="install the harness and stop")
    parser.add_argument("--python", type=Path, help="a Python with lm_eval")
    parser.add_argument("--model", type=Path, help="model folder (default: a small one, trained)")
    parser.add_argument("--data", type=Path, default=DATA, help="folder of the published files")
    parser.add_argument("--limit", type=int, default=200)
    parser.add_argument("--max-tokens", type=int, default=256, help="the harness's own default")
    parser.add_argument("--batch-sizes", nargs="+", default=["1", "16", "64"])
    parser.add_argument("--rounds", type=int, default=2)
    known = parser.parse_args()
    if known.install:
        install()
        return
    python = harness_python(known.python)
    file = known.data / FILES["gsm8k"]
    if not file.is_file():
        print(f"skipped: no file {file}; give its folder with --data")
        return
    model = (known.model or checkpoint()).resolve()
    times: dict[str, list[tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        # One run to have the prompts, which the harness then completes as they are.
        times["boxed"] = [timed(ours(model, file, known, root / "ours-0"), root / "log")]
        folder = root / "ours-0" / "eval-model" / "gsm8k"
        tokenizer = load_tokenizer(model)
        golds = {row["id"]: row["answer"] for _, row in read_rows(folder / "problems.jsonl")}
        rows, same_tokens = [], 0
        for _, row in read_rows(folder / "prompts.jsonl"):
            text = tokenizer.decode(row["token_ids"])
            same_tokens += tokenizer.encode(text, add_special_tokens=False) == row["token_ids"]
            rows.append({"id": row["problem_id"], "prompt": text, "gold": golds[row["problem_id"]]})
        tasks = root / "tasks"
        tasks.mkdir()
        write_rows(tasks / "gsm8k.jsonl", rows)
        (tasks / "boxed_gsm8k.yaml").write_text(
            TASK.format(
                file=tasks / "gsm8k.jsonl",
                stop=json.dumps(tokenizer.eos_token),
                max_tokens=known.max_tokens,
            ),
            encoding="utf-8",
        )
        for number in range(known.rounds):
            if number:
                out = root / f"ours-{number}"
                times["boxed"].append(timed(ours(model, file, known, out), root / "log"))
            for batch in known.batch_sizes:
                out = root / f"theirs-{batch}-{number}"
                times.setdefault(f"harness, batch {batch}", []).append(
                    timed(theirs(python, model, batch, tasks, out), root / "log")
                )
        mine = our_answers(root / "ours-0")
        peer = their_answers(root / f"theirs-{known.batch_sizes[0]}-0")
        figures = read_json(folder / "figures.json")["figures"]["greedy"]
    walls = {name: [wall for wall, _ in values] for name, values in times.items()}
    cpus = {name: [cpu for _, cpu in values] for name, values in times.items()}
    version = subprocess.run(
        [python, "-c", "import lm_eval, transformers; print(lm_eval.__version__)"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    assert mine.keys() == peer.keys()
    differing = [
        {
            "id": key,
            "gold": golds[key],
            "same_text": mine[key]["text"] == peer[key]["text"],
            "boxed": mine[key],
            "harness": peer[key],
        }
        for key in mine
        if mine[key]["correct"] != peer[key]["correct"]
    ]
    print(
        json.dumps(
            {
                "benchmark": "harness",
                "model": str(known.model or "real_files.toml"),
                "questions": len(mine),
                "max_tokens": known.max_tokens,
                "rounds": known.rounds,
                "seconds": {n: [round(v, 2) for v in values] for n, values in walls.items()},
                "cpu_seconds": {n: [round(v, 2) for v in values] for n, values in cpus.items()},
                # On a machine that others use too, the fastest of several rounds and the CPU
                # time say more than a median.
                "ratio_of_medians": ratios(walls, statistics.median),
                "ratio_of_fastest": ratios(walls, min),
                "ratio_of_cpu": ratios(cpus, statistics.median),
                "same_prompt_tokens": same_tokens,
                "same_texts": sum(mine[k]["text"] == peer[k]["text"] for k in mine),
                "same_texts_up_to_outer_space": sum(
                    mine[k]["text"].strip() == peer[k]["text"].strip() for k in mine
                ),
                "accuracy": {
                    "boxed": sum(v["correct"] for v in mine.values()) / len(mine),
                    "boxed_interval": [figures["low"], figures["high"]],
                    "harness": sum(v["correct"] for v in peer.values()) / len(peer),
                },
                "differing": differing,
                "lm_eval": version,
                "cores": os.cpu_count(),
                "versions": versions(),
            },
            indent=2,
            ensure_ascii=False,
        )
    )


if __name__ == "__main__":
    main()
