"""A whole embedded run that is killed, or whose disk is full, again and again.

    python tests/integration/fault_run.py --out DIR --seed 1 kill=50 fill=20 damage=0

Everything is imported once; each attempt is a forked child that runs `pipeline.run` with its
stages in its own process. First one runs that nothing disturbs. Then, for each NAME=TIMES:

    kill     SIGKILL in every stage in turn: before the n-th call that changes the run folder (an
             audit hook counts them, from outside), torn, with half of what the n-th call had to
             write in the file, or at a moment
    stop     SIGTERM or SIGINT in the midst of each stage: it has to end whole, with status 130
    fill     a disk that is full, and grows (a tmpfs; root)
    refuse   a folder that must not be written to (a tmpfs that is mounted read-only; root)
    limit    a limit on the size of a file, which rises
    memory   allocations that fail
    damage   a file of a complete or an interrupted run is cut off, changed or removed; 0 for every
             kind of file and of damage
    workers  TIMES worker processes, and no fault at all

What ends a run for want of room or of memory has to end it with status 2 and a message that names
a file and says what to do. After each of these the run goes on to its end, and is compared, byte
for byte, with the one that nothing disturbed. Every fault is told on standard error as it happens;
JSON on the last line of the output says what was found. `--part 0/2` and `--part 1/2` share the
kinds of damage between two processes.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from faults.damage import damage
from faults.shortage import fill, limit, memory, refuse
from faults.signals import kill, stop
from faults.trial import Trial

ROOT = Path(__file__).resolve().parents[2]


def workers(trial: Trial, times: int) -> dict[str, Any]:
    """Run with more workers in all stages that have some; nothing may depend on it."""
    whole = json.loads((trial.whole / "report" / "report.json").read_text("utf-8"))
    text = trial.config.read_text(encoding="utf-8")
    # The mixture's have a test of their own: they are started anew, which takes its time.
    mixture, data, rest = text.partition("[data]")
    changed = rest.replace("\nworkers = 1", f"\nworkers = {times}")
    trial.config.write_text(mixture + data + changed, encoding="utf-8")
    trial.complete()
    trial.config.write_text(text, encoding="utf-8")
    report = json.loads((trial.out / "report" / "report.json").read_text("utf-8"))
    found = trial.result(fingerprints=[whole["fingerprint"], report["fingerprint"]])
    # Cards and the page show the configuration.
    shows = ("README.md", "config.toml", "report.html", "manifest.json")
    wrong = [name for name in found["differences"] if not name.endswith(shows)]
    return {**found, "differences": wrong}


FAULTS = {
    "kill": kill,
    "stop": stop,
    "fill": fill,
    "refuse": refuse,
    "limit": limit,
    "memory": memory,
    "damage": damage,
    "workers": workers,
}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="an empty folder")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--part", default="0/1", help="I/N: the I-th of N shares of the damage")
    parser.add_argument("faults", nargs="+", help=f"NAME=TIMES: {', '.join(FAULTS)}")
    known = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    os.environ["OMP_NUM_THREADS"] = "1"  # before torch: a forked child must find no threads
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ["GIT_DIR"] = os.devnull  # model cards name the commit, which may change meanwhile
    # Before the first fork; nothing here computes, so no thread is lost in the children.
    for module in (
        *("data_prep.mixture", "data_prep.build", "eval.run", "eval.report"),
        *("pipeline.run", "pipeline.train", "pipeline.generate", "pipeline.verify"),
        "transformers.models.qwen2.modeling_qwen2",
    ):
        importlib.import_module(module)
    import transformers

    for name in ("AutoModelForCausalLM", "AutoModelForSequenceClassification", "AutoTokenizer"):
        getattr(transformers, name)
    first, _, step = known.part.partition("/")
    trial = Trial(known.out, known.seed, (int(first), int(step)))
    found: dict[str, Any] = {"undisturbed_s": round(trial.seconds, 1)}
    try:
        for words in known.faults:
            name, _, times = words.partition("=")
            if trial.disk.why_not and name in ("fill", "refuse"):
                found[name] = {"skipped": trial.disk.why_not}
                continue
            began = time.monotonic()
            found[name] = FAULTS[name](trial, int(times))
            found[name]["seconds"] = round(time.monotonic() - began, 1)
            print(f"{name}: {found[name]['seconds']} s", file=sys.stderr, flush=True)
    finally:
        trial.disk.close()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
