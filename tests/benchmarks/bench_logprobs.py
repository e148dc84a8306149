"""Memory and time of the log-prob path beside the dense one, forward and backward.

    python tests/benchmarks/bench_logprobs.py [--vocabulary 151936] [--tokens 4096] [--hidden 896]

The dense path makes logits [T, V], their log-softmax, and gathers: what `cross_entropy` and most
trainers do. Both paths run in processes of their own on the same tensors, float32, and report the
peak of resident memory above what it was with the inputs in place, and the time of one pass: wall,
and of the processor, which says more where other work shares the machine. The values and both
gradients are then compared. Prints JSON.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

PATHS = ("chunked", "dense")


class Peak:
    """Watches this process's resident memory, which Linux itself keeps the peak of."""

    def __enter__(self) -> Peak:
        """Reset the kernel's peak, where it lets us, and note what is in use."""
        Path("/proc/self/clear_refs").write_text("5")
        self.before = self._of("VmRSS")
        return self

    def __exit__(self, *_: object) -> None:
        """Read the peak."""
        self.bytes = self._of("VmHWM") - self.before

    def _of(self, key: str) -> int:
        for line in Path("/proc/self/status").read_text("ascii").splitlines():
            if line.startswith(f"{key}:"):
                return int(line.split()[1]) * 1024
        raise RuntimeError(f"/proc/self/status has no {key}")


def run_one(path: str, known: argparse.Namespace, folder: Path) -> None:
    """Measure one path; leave its values and gradients in a file."""
    import torch
    from safetensors.torch import save_file

    from pipeline.logprobs import selected_logprobs

    torch.set_num_threads(known.threads)
    generator = torch.Generator().manual_seed(0)
    shape = known.tokens, known.hidden
    hidden = torch.randn(shape, generator=generator).requires_grad_()
    weight = torch.randn(known.vocabulary, known.hidden, generator=generator)
    weight = weight.mul_(known.hidden**-0.5).requires_grad_()
    targets = torch.randint(0, known.vocabulary, (known.tokens,), generator=generator)
    upstream = torch.randn(known.tokens, generator=generator)
    warm = torch.randn(64, 64, requires_grad=True)
    torch.log_softmax(warm @ warm.T, -1).sum().backward()
    with Peak() as peak:
        began, used = time.perf_counter(), time.process_time()
        if path == "dense":
            logp = torch.log_softmax(hidden @ weight.T, dim=-1)
            logp = logp.gather(-1, targets[:, None]).squeeze(-1)
        else:
            logp = selected_logprobs(hidden, weight, targets).logp
        (logp * upstream).sum().backward()
        seconds, cpu_s = time.perf_counter() - began, time.process_time() - used
    assert hidden.grad is not None and weight.grad is not None
    save_file(
        {"logp": logp.detach(), "by_hidden": hidden.grad, "by_weight": weight.grad},
        folder / f"{path}.safetensors",
    )
    times = {"seconds": round(seconds, 3), "cpu_s": round(cpu_s, 3)}
    print(json.dumps({"peak_bytes": peak.bytes, **times}))


def compare(folder: Path) -> dict[str, float]:
    """Return the largest differences of values and gradients."""
    import torch
    from safetensors import safe_open

    files = [safe_open(folder / f"{path}.safetensors", "pt") for path in PATHS]
    found = {}
    for name in ("logp", "by_hidden", "by_weight"):
        one, two = (file.get_tensor(name) for file in files)
        found[f"largest_difference_{name}"] = float((one - two).abs().max())
        found[f"largest_{name}"] = float(torch.maximum(one.abs().max(), two.abs().max()))
        del one, two
    return {key: float(f"{value:.4g}") for key, value in found.items()}


def measure(known: argparse.Namespace) -> dict[str, Any]:
    """Run both paths in processes of their own; return what was found."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        for path in PATHS:
            words = [sys.executable, __file__, "--one", path, "--folder", name]
            for key in ("vocabulary", "tokens", "hidden", "threads"):
                words += [f"--{key}", str(getattr(known, key))]
            done = subprocess.run(words, capture_output=True, text=True, check=False)
            if done.returncode:
                raise SystemExit(f"{path} failed: {done.stderr[-2000:]}")
            found[path] = json.loads(done.stdout.splitlines()[-1])
        found |= compare(Path(name))
    chunked, dense = found["chunked"], found["dense"]
    found["memory_ratio"] = round(chunked["peak_bytes"] / dense["peak_bytes"], 4)
    found["time_ratio"] = round(chunked["seconds"] / dense["seconds"], 3)
    found["cpu_ratio"] = round(chunked["cpu_s"] / dense["cpu_s"], 3)
    return found


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--tokens", type=int, default=4_096)
    parser.add_argument("--hidden", type=int, default=896)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--one", choices=PATHS, help="measure this path alone")
    parser.add_argument("--folder", type=Path, help="with --one: where the values go")
    return parser.parse_args(arguments)


def main() -> None:
    """Command line."""
    known = parse()
    if known.one:
        run_one(known.one, known, known.folder)
        return
    from data_prep.versions import versions

    shape = {k: getattr(known, k) for k in ("vocabulary", "tokens", "hidden", "threads")}
    machine = {"machine": platform.machine(), "versions": versions()}
    print(json.dumps({**machine, "shape": shape, **measure(known)}, indent=2))


if __name__ == "__main__":
    main()
