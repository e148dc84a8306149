"""Measures the data stage: a mixture in the five sources' formats, TRL beside it, the loader.

    python tests/benchmarks/bench_data.py                               # 20,000 rows, ours only
    python tests/benchmarks/bench_data.py --trl-python <venv>/bin/python  # and TRL's, same rows
    python tests/benchmarks/bench_data.py --rows 899907 --folder <dir>    # full size
    python tests/benchmarks/bench_data.py --rows 899907 --folder <dir> --kill   # and resumed

The rows are made up (`made_mixture.py`). TRL is measured in a process of its own, with an
interpreter that has it (`pip install trl==1.16.*`); it runs `SFTTrainer`'s own preparation (chat
template, assistant masks, best-fit packing) on the same conversations with the same tokenizer.
Prints JSON.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import platform
import random
import resource
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from pathlib import Path

from made_mixture import FULL, PLANTED, SOURCES, SPARE, configuration, generate

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))


class Peak(threading.Thread):
    """Largest proportional memory of this process and its children, sampled."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak_mb, self.done = 0.0, threading.Event()

    def run(self) -> None:
        import psutil

        me = psutil.Process()
        while not self.done.wait(0.5):
            total = 0
            for process in [me, *me.children(recursive=True)]:
                try:
                    total += process.memory_full_info().pss
                except psutil.Error:
                    continue
            self.peak_mb = max(self.peak_mb, total / 2**20)


def measure_build(folder: Path, asked: dict[str, int], workers: int) -> dict:
    from data_prep.config import validate
    from data_prep.mixture import build_mixture
    from data_prep.mixture_config import MixtureConfig

    config = validate(MixtureConfig, configuration(folder / "raw", asked, workers), "bench")
    peak = Peak()
    peak.start()
    started = time.perf_counter()
    stage = build_mixture(config, folder / "run", 0)
    seconds = time.perf_counter() - started
    peak.done.set()
    figures = json.loads((stage / "statistics.json").read_text())
    return {
        "rows": sum(figures["rows"].values()),
        "tokens": sum(figures["tokens"].values()),
        "counts": {name: source["rows"] for name, source in figures["sources"].items()},
        "missing": {name: source["missing"] for name, source in figures["sources"].items()},
        "validation": figures["rows"]["validation"],
        "packing_efficiency": figures["packing"]["train"]["efficiency"],
        "planted": PLANTED,
        "found": figures["findings"]["counts"],
        "seconds": round(seconds, 2),
        "peak_mb": round(peak.peak_mb),
        "timing": json.loads((stage / "timing.json").read_text()),
        "stage": str(stage),
    }


def measure_resume(folder: Path, asked: dict[str, int], workers: int, whole: Path) -> dict:
    """Kill a second build half-way with SIGKILL, let it go on, and compare it byte for byte."""
    import tomli_w

    from data_prep.manifest import VOLATILE

    table = configuration(folder / "raw", asked, workers)
    chunks = sum(-(-int(count * SPARE + 50) // 4096) for count in asked.values())
    run = folder / "killed"
    config = folder / "killed.toml"
    config.write_text(tomli_w.dumps({"seed": 0, "out": str(run), "mixture": table}))
    command = [sys.executable, "-m", "data_prep.mixture", "--config", str(config)]
    started = time.perf_counter()
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    done = 0
    while process.poll() is None and done < chunks // 2:
        time.sleep(0.1)
        done = len(list((run / "mixture.partial" / "chunks").glob("*.json")))
    killed = process.poll() is None
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    first = time.perf_counter() - started
    subprocess.run(
        command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )

    def digests(stage: Path) -> dict[str, str]:
        return {
            str(path.relative_to(stage)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(stage.rglob("*"))
            if path.is_file() and path.name not in VOLATILE
        }

    one, other = digests(whole), digests(run / "mixture")
    return {
        "killed": killed,
        "after_s": round(first, 1),
        "chunks_done": done,
        "chunks": chunks,
        "went_on_s": round(time.perf_counter() - started - first, 1),
        "files": len(one),
        "byte_identical": one == other,
    }


def conversations(folder: Path, rows: int) -> list[list[dict[str, str]]]:
    """The same conversations for both contenders, taken evenly from the sources."""
    from data_prep.chunk import conversation_of
    from data_prep.config import validate
    from data_prep.mixture_config import Ingredient
    from data_prep.reading import Rejected, items

    taken: list[list[dict[str, str]]] = []
    for name, (count, _, _) in SOURCES.items():
        table = {"source": {"kind": name, "train": str(folder / "raw" / f"{name}.jsonl")}}
        source = validate(Ingredient, table, "bench").source
        usable = (item for item in items(source) if not isinstance(item, Rejected))
        for item in itertools.islice(usable, round(rows * count / FULL)):
            taken.append([dict(message) for message in conversation_of(item)[0]])
    random.Random(0).shuffle(taken)
    return taken


def measure_ours(folder: Path, rows: int, tokenizer: str) -> dict:
    """Format, tokenise, mask, drop what is too long, pack and write, as TRL's preparation does."""
    import numpy as np
    import pyarrow as pa

    from data_prep.formatting import load_formatter
    from data_prep.packing import efficiency, training_sequences
    from data_prep.tokenizer import load_tokenizer

    batch = conversations(folder, rows)
    formatter = load_formatter(load_tokenizer(tokenizer), "boxed")
    started, cpu = time.perf_counter(), time.process_time()
    ids, masks = [], []
    for start in range(0, len(batch), 4096):
        for one, mask in formatter.conversations(batch[start : start + 4096]):
            if len(one) <= 4096:
                ids.append(np.array(one, dtype=np.int32))
                masks.append(np.array(mask, dtype=np.int8))
    lengths = np.array([len(one) for one in ids])
    sequences = training_sequences(lengths, 4096, "best_fit", 0)
    packed = [np.concatenate([ids[row] for row in sequence]) for sequence in sequences]
    packed_masks = [np.concatenate([masks[row] for row in sequence]) for sequence in sequences]
    # TRL's `map` writes its result to disk as well.
    table = pa.table({"input_ids": pa.array(packed), "mask": pa.array(packed_masks)})
    with (
        pa.OSFile(str(folder / "packed.arrow"), "wb") as file,
        pa.ipc.new_file(file, table.schema) as writer,
    ):
        writer.write_table(table)
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    return {
        "cpu_s": round(cpu, 3),
        "rows": len(ids),
        "tokens": int(lengths.sum()),
        "seconds": round(seconds, 3),
        "rows_per_s": round(len(ids) / seconds, 1),
        "sequences": len(packed),
        "loss_tokens": int(sum(int(mask.sum()) for mask in packed_masks)),
        "packing_efficiency": round(efficiency(lengths, len(sequences), 4096), 6),
    }


TRL = """
import json, sys, time, tempfile
from datasets import Dataset
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from trl import SFTConfig, SFTTrainer
import trl, datasets
datasets.disable_caching()
rows = [json.loads(line) for line in open(sys.argv[1])]
tokenizer = AutoTokenizer.from_pretrained(sys.argv[2])
model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), hidden_size=16,
    intermediate_size=16, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1))
times = []
inner = SFTTrainer._prepare_dataset
def timed(self, *a, **k):
    started, cpu = time.perf_counter(), time.process_time()
    out = inner(self, *a, **k)
    times.extend([time.perf_counter() - started, time.process_time() - cpu])
    return out
SFTTrainer._prepare_dataset = timed
args = SFTConfig(output_dir=tempfile.mkdtemp(), max_length=4096, packing=True,
    packing_strategy="bfd", assistant_only_loss=True, report_to=[], use_cpu=True, bf16=False,
    dataset_num_proc=int(sys.argv[3]) if int(sys.argv[3]) > 1 else None, eos_token="<|end|>")
trainer = SFTTrainer(model=model, args=args, train_dataset=Dataset.from_list(rows),
    processing_class=tokenizer)
data = trainer.train_dataset
tokens = sum(len(x) for x in data["input_ids"])
loss = sum(label != -100 for row in data["labels"] for label in row)
print("RESULT " + json.dumps({"rows": len(rows), "seconds": round(times[0], 3), "tokens": tokens,
    "cpu_s": round(times[1], 3),
    "rows_per_s": round(len(rows) / times[0], 1), "sequences": len(data), "loss_tokens": loss,
    "trl": trl.__version__, "processes": int(sys.argv[3])}))
"""


def measure_trl(folder: Path, rows: int, tokenizer: str, python: str, workers: int) -> dict:
    path = folder / "conversations.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for messages in conversations(folder, rows):
            file.write(json.dumps({"messages": messages}) + "\n")
    script = folder / "trl_side.py"
    script.write_text(textwrap.dedent(TRL))
    done = subprocess.run(
        [python, str(script), str(path), tokenizer, str(workers)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "TOKENIZERS_PARALLELISM": "true"},
    )
    line = next((x for x in done.stdout.splitlines() if x.startswith("RESULT ")), None)
    if line is None:
        raise SystemExit(f"TRL's side failed:\n{done.stderr[-3000:]}")
    return json.loads(line.removeprefix("RESULT "))


def measure_loader(stage: Path) -> dict:
    """Tokens a second that reach the trainer as sequences, and share of them in the layouts.

    The layout is what a pass over rows sees: documents side by side, padded to the longest.
    """
    from pipeline.batch import flatten, micro_batches
    from pipeline.fixed import Rows

    rows = Rows(stage, "train")
    figures = {}
    for name, batches in (
        ("packed", [range(first, first + 8) for first in range(0, len(rows) - 8, 8)]),
        ("length_grouped", rows.sequences.length_grouped(8 * 4096, seed=0)),
    ):
        started, tokens = time.perf_counter(), 0
        for batch in batches:
            tokens += sum(len(s.prompt) + len(s.completion) for s in rows.take(batch))
            if time.perf_counter() - started > 10:
                break
        rate = tokens / (time.perf_counter() - started)
        real = padded = 0
        for batch in batches[:40]:
            sequences = rows.take(batch)
            real += sum(len(s.prompt) + len(s.completion) for s in sequences)
            for micro in micro_batches(sequences, flatten(sequences), 16384):
                padded += micro.layout.rows().input_ids.numel()
        figures[name] = {"tokens_per_s": round(rate), "layout_filled": round(real / padded, 4)}
    return figures


def measure_training(folder: Path) -> dict:
    """Tokens a second that the embedded model trains at, and that its rows are read at.

    The shipped laptop run's own model, optimizer, batch and rows, through the trainer.
    """
    from data_prep.build import build
    from pipeline.config import load_run
    from pipeline.fixed import Rows
    from pipeline.methods import create_method
    from pipeline.model import load_tokenizer
    from pipeline.trainer import build_trainer

    run = load_run(ROOT / "pipeline" / "configs" / "cpu.toml")
    assert run.data is not None
    stage = build(run.data.model_copy(update={"rows": 8192}), folder / "embedded", run.seed)
    config, rows = run.train[0], Rows(stage, "train")
    method = create_method(config.method)
    trainer = build_trainer(run, config, method, None, load_tokenizer(stage / "tokenizer"))
    read_s = train_s = 0.0
    tokens = 0
    for step in range(200):
        started = time.perf_counter()
        sequences = rows.take(range(step * config.batch, (step + 1) * config.batch))
        read = time.perf_counter()
        trainer.update(sequences, step, 200)
        done = time.perf_counter()
        if step >= 5:  # the first steps warm up
            tokens += sum(len(s.prompt) + len(s.completion) for s in sequences)
            read_s, train_s = read_s + read - started, train_s + done - read
    return {
        "tokens_per_s": round(tokens / train_s),
        "read_tokens_per_s": round(tokens / read_s),
        "times": round(train_s / read_s, 1),
    }


def versions() -> dict:
    from data_prep.versions import versions as found

    return {**found(), "cores": os.cpu_count(), "system": platform.platform()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--compare-rows", type=int, default=4_000, help="rows beside TRL")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--folder", help="keeps generated and built files here")
    parser.add_argument("--kill", action="store_true", help="kill a second build half-way too")
    parser.add_argument("--trl-python", help="interpreter of an environment with TRL")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(options.folder or temporary)
        asked = generate(folder / "raw", options.rows)
        result: dict = {
            "versions": versions(),
            "build": measure_build(folder, asked, options.workers),
        }
        stage = result["build"]["stage"]
        tokenizer = f"{stage}/tokenizer"
        if options.kill:
            result["resume"] = measure_resume(folder, asked, options.workers, Path(stage))
        rows = min(options.compare_rows, options.rows)
        result["ours"] = measure_ours(folder, rows, tokenizer)
        if options.trl_python:
            # TRL in one process and in as many as there are workers; the better one counts.
            result["trl"] = [
                measure_trl(folder, rows, tokenizer, options.trl_python, processes)
                for processes in dict.fromkeys((1, options.workers))
            ]
            best = max(one["rows_per_s"] for one in result["trl"])
            result["ratio"] = round(result["ours"]["rows_per_s"] / best, 2)
            # Of processor time, which other work on the machine does not change (TRL in one
            # process: the time of its children is not counted).
            result["cpu_ratio"] = round(result["trl"][0]["cpu_s"] / result["ours"]["cpu_s"], 2)
        result["loader"] = measure_loader(Path(stage))
        result["training"] = measure_training(folder)
        # The slowest way of reading beside the embedded model, which trains fastest of all.
        slowest = min(mode["tokens_per_s"] for mode in result["loader"].values())
        result["loader_times_training"] = round(slowest / result["training"]["tokens_per_s"], 1)
        result["self_peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
