"""What the sources may not contain, since model output, data and checkpoints are untrusted."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("pipeline", "verifiers", "data_prep", "eval", "prompts")
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
NAMES = [str(path.relative_to(ROOT)) for path in SOURCES]

# Modules whose reading runs code, or that read with code.
UNSAFE_MODULES = {
    "pickle",
    "cPickle",
    "dill",
    "cloudpickle",
    "joblib",
    "shelve",
    "marshal",
    "jsonpickle",
}
# Calls that run code of what they read, by the end of their dotted name.
UNSAFE_CALLS = (
    "torch.load",
    "torch.save",
    "np.load",
    "numpy.load",
    "read_pickle",
    "yaml.load",
    "yaml.unsafe_load",
    "sympify",
    "parse_expr",
    "parse_latex",
    "os.system",
    "os.popen",
    "extractall",
    "jinja2.Template",
)  # fmt: skip
# The one file that runs programs: inside the sandbox.
RUNS_PROGRAMS = "eval/sandbox_worker.py"
MODEL_CLASSES = ("AutoModelForCausalLM", "AutoModelForSequenceClassification")


def dotted(node: ast.expr) -> str:
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join(reversed([*parts, node.id if isinstance(node, ast.Name) else "?"]))


def problems(source: str, name: str) -> list[str]:
    """Return what a source file does that it may not."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = (
                [a.name for a in node.names]
                if isinstance(node, ast.Import)
                else [node.module or ""]
            )
            found += [m for m in modules if m.partition(".")[0] in UNSAFE_MODULES]
        if not isinstance(node, ast.Call):
            continue
        called = dotted(node.func)
        keys = {key.arg: ast.unparse(key.value) for key in node.keywords}
        if called in ("eval", "exec", "compile", "__import__") and name != RUNS_PROGRAMS:
            found.append(called)
        if any(called == bad or called.endswith(f".{bad}") for bad in UNSAFE_CALLS):
            found.append(called)
        if keys.get("shell", "False") != "False" or keys.get("allow_pickle", "False") != "False":
            found.append(f"{called} with shell or allow_pickle")
        if called.endswith("Environment") and keys.get("autoescape") != "True":
            found.append(f"{called} without autoescape")
        if called.endswith(".from_pretrained") and not called.startswith("peft."):
            if "trust_remote_code" not in keys:
                found.append(f"{called} that leaves trust_remote_code to transformers")
            if called.startswith(MODEL_CLASSES) and keys.get("use_safetensors") != "True":
                found.append(f"{called} that may read pickled weights")
    return found


@pytest.mark.parametrize("name", NAMES)
def test_nothing_read_can_run(name):
    assert problems((ROOT / name).read_text("utf-8"), name) == []


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from joblib import load",
        "torch.load(path)",
        "numpy.load(path)",
        "eval(text)",
        "sympy.sympify(text)",
        "subprocess.run(words, shell=True)",
        "np.fromfile(path, allow_pickle=True)",
        "jinja2.Environment()",
        "AutoTokenizer.from_pretrained(path)",
        "AutoModelForCausalLM.from_pretrained(path, trust_remote_code=False)",
    ],
)
def test_the_search_finds_what_it_looks_for(line):
    assert problems(line, "x.py")


def test_pages_are_built_without_raw_markup():
    """Templates mark nothing as safe, and scripts write text, never markup."""
    pages = [p for package in PACKAGES for p in (ROOT / package).rglob("*.jinja")]
    scripts = [p for package in PACKAGES for p in (ROOT / package).rglob("*.js")]
    assert len(pages) == 3 and len(scripts) == 2
    for page in pages:
        text = page.read_text("utf-8")
        assert not re.search(r"\|\s*safe|autoescape|(?:src|href|action)\s*=\s*[\"']?\{\{", text)
        assert "Content-Security-Policy" in text
        assert not re.search(r"\son\w+=", text), "handlers in attributes, which the policy forbids"
    for script in scripts:
        text = script.read_text("utf-8")
        unsafe = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function"
        assert not re.search(unsafe, text), script


def test_every_exception_to_a_security_rule_has_its_reason():
    """`# noqa: S…` says why; so does what pyproject ignores for whole folders."""
    for path in [*SOURCES, *(ROOT / "tests").rglob("*.py"), *(ROOT / ".ci").glob("*.py")]:
        for number, line in enumerate(path.read_text("utf-8").splitlines(), start=1):
            match = re.search(r"# noqa: ([A-Z0-9, ]+)(.*)", line)
            if match and re.search(r"\bS\d{3}", match.group(1)):
                reason = match.group(2).strip(" -")
                assert len(reason) >= 5, f"{path}, line {number}: no reason"
    ignored = (ROOT / "pyproject.toml").read_text("utf-8").partition("per-file-ignores]")[2]
    rows = ignored.partition("[tool.pyright]")[0].strip().splitlines()
    codes = {code for row in rows for code in re.findall(r'"(S\d+)"', row)}
    comments = " ".join(row for row in rows if row.startswith("#"))
    assert codes and all(code in comments for code in codes)
