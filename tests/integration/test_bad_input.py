# ruff: noqa: E501 - a table reads best with a case a line
"""What users get wrong: each answered with what was found and what to do, and nothing written.

Every case runs an entry point as the shell would, but in this process, and is held to the same:
exit status 2, a message that begins with "error:" and ends with what to do, no traceback, and not
a file more or less than before (a lock, which is empty of meaning once its process is gone, aside).
"""

from __future__ import annotations

import fcntl
import importlib
import importlib.util
import json
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from data_prep.errors import UserError, command

HERE = Path(__file__).parent


def _small_run() -> Any:
    path = HERE.parent / "pipeline" / "small_run.py"
    spec = importlib.util.spec_from_file_location("bad_input_small_run", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SMALL = _small_run()


@pytest.fixture(autouse=True)
def signals() -> Iterator[None]:
    """Entry points take SIGTERM for themselves and say tracebacks their own way."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    hook = sys.excepthook
    yield
    sys.excepthook = hook
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def no_stage_starts(monkeypatch) -> None:
    """A run that should have been refused must not begin."""

    def start(words: list[str]) -> int:
        raise AssertionError(f"a stage was started: {' '.join(words)}")

    monkeypatch.setattr("pipeline.run._call", start)


@pytest.fixture(scope="session")
def made(tmp_path_factory) -> Path:
    """A folder with a small run up to its verdicts and one evaluation."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("made")
    path = SMALL.write_small(folder)
    table = path.read_text(encoding="utf-8").replace("steps = 8", "steps = 2")
    path.write_text(table.replace("validate_every = 4\n", ""), encoding="utf-8")
    for module, *words in (
        ["data_prep.build"],
        ["pipeline.train", "--stage", "sft", "--no-forecast"],
        ["pipeline.generate"],
        ["pipeline.verify"],
        ["eval.run", "--checkpoints", "sft"],
    ):
        importlib.import_module(module).main([*words, "--config", str(path)])
    return folder


@pytest.fixture
def box(made, tmp_path) -> Path:
    """A copy of that folder, free to be damaged."""
    folder = tmp_path / "box"
    shutil.copytree(made, folder)
    path = folder / "small.toml"
    path.write_text(path.read_text(encoding="utf-8").replace(str(made), str(folder)), "utf-8")
    return folder


def tree(folder: Path) -> dict[str, tuple[int, int]]:
    """Return every file below a folder with its size and time of change."""
    return {
        str(path.relative_to(folder)): (path.stat().st_size, path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not (path.name.startswith(".") and path.suffix == ".lock")
    }


def refused(
    folder: Path,
    words: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
    untouched: bool = True,
) -> str:
    """Run a command that has to be refused; return what it said.

    `words` may hold {box}, which stands for the folder. It is left `untouched`, unless what is wrong
    shows only when an evaluation that is under way loads the model; the next one goes on from there.
    """
    module, *rest = [word.replace("{box}", str(folder)) for word in words]
    monkeypatch.setattr(sys, "argv", [module, *rest])
    capsys.readouterr()
    before = tree(folder) if untouched else {}
    if module == "verifiers":
        status = importlib.import_module("verifiers.__main__").main(rest)
    else:
        with pytest.raises(SystemExit) as end:
            command(importlib.import_module(module).main)
        status = end.value.code
    said = capsys.readouterr().err
    assert status == 2, said
    message = said[said.index("error: ") :]
    assert "Traceback" not in said
    if module != "verifiers":
        assert "what to do: " in message, message
    assert not untouched or tree(folder) == before
    return message


def holds(message: str, expected: tuple[str, ...]) -> None:
    for part in expected:
        assert part in message, message


# --- Configurations: (what stands there, what stands there now, what is said) --------------------

FIRST = "[[data.sources]]"
CONFIGURATIONS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "unknown key": ('name = "small"', 'name = "small"\nsede = 3', ("'sede'", "did you mean 'seed'")),
    "unknown key of a stage": ("vocab_size", "vocab_sise", ("data.tokenizer.vocab_sise", "'vocab_size'")),
    "unknown key of a method": ("updates = 2", "clip_hihg = 0.3", ("clip_hihg", "did you mean 'clip_high'")),
    "unknown method": ('kind = "grpo"', 'kind = "grop"', ("unknown kind 'grop'", "'grpo'", "dr_grpo")),
    "a method in capitals": ('kind = "grpo"', 'kind = "GRPO"', ("'train.3.method' (name 'grpo')", "did you mean 'grpo'")),
    "a key of which method": ("updates = 2", "kl_coef = 0.1", ("small.toml, key 'train.3.method' (name 'grpo'), table with kind = 'grpo', key 'kl_coef'",)),
    "a key of which source": ("test = 6", "tset = 6", ("key 'data.sources.0' (kind 'embedded')", "did you mean 'test'")),
    "a text for a list": ('name = "grpo"', 'name = "grpo"\ntrackers = "tensorboard"', ("'train.3.trackers' (name 'grpo')", "found 'tensorboard'", "a list: [ … ]")),
    "a number for a table": ('name = "grpo"', 'name = "grpo"\nlora = 16', ("'train.3.lora' (name 'grpo')", "found 16", "a table: { … }")),
    "True": ('name = "grpo"', 'name = "grpo"\nwatch_reference = True', ("not TOML", "watch_reference = True", "write true")),
    "unknown source": ('kind = "embedded"\ntrain', 'kind = "embeded"\ntrain', ("'embeded'", "did you mean 'embedded'")),
    "unknown engine": ("[sampling]", '[engine]\nkind = "vlm"\n[sampling]', ("'vlm'", "did you mean 'vllm'")),
    "unknown key of an engine": ("[sampling]", '[engine]\nkind = "embedded"\nslotz = 3\n[sampling]', ("slotz", "'slots'")),
    "unknown device": ("[sampling]", '[engine]\nkind = "embedded"\ndevice = "gpu"\n[sampling]', ("device", "found 'gpu'", "cuda")),
    "unknown checker": ('[verify]\nchecker = {{ kind = "{checker}" }}', '[verify]\nchecker = {{ kind = "boxd" }}', ("verify.checker", "did you mean 'boxed'")),
    "unknown option of a checker": ('[verify]\nchecker = {{ kind = "{checker}" }}', '[verify]\nchecker = {{ kind = "boxed", polcy = "x" }}', ("verify.checker", "polcy", "policy")),
    "unknown suite": ("[evaluate]", '[evaluate]\nsuites = ["embeded"]', ("no suite 'embeded'", "did you mean 'embedded'")),
    "a suite's file is missing": ("[evaluate]", '[evaluate]\nsuites = ["gsm8k"]\npaths = {{ gsm8k = "none.jsonl" }}', ("evaluate.suites", "no such file: none.jsonl", "evaluate.paths")),
    "a path of no suite": ("[evaluate]", '[evaluate]\npaths = {{ embeded = "x.jsonl" }}', ("'embeded'", "did you mean 'embedded'")),
    "a suite twice": ("[evaluate]", '[evaluate]\nsuites = ["embedded", "embedded"]', ("'embedded' twice",)),
    "no suite": ("[evaluate]", "[evaluate]\nsuites = []", ("suites", "none")),
    "unknown evaluation profile": ("[evaluate]", '[evaluate]\nprofile = "qwen_maths"', ("'qwen_maths'", "did you mean 'qwen_math'")),
    "unknown key of the sandbox": ("[evaluate]", "[evaluate]\nsandbox = {{ wall = 3 }}", ("sandbox", "'wall'", "did you mean 'wall_s'")),
    "unknown reward model": ("[evaluate]", '[evaluate]\nreward_model = "sftt"', ("evaluate.reward_model", "did you mean 'sft'")),
    "unknown profile": ('profile = "embedded"', 'profile = "embeded"', ("data.profile", "did you mean 'embedded'")),
    "unknown layout": ("vocab_size = 288", 'vocab_size = 288\nlayout = "chatlm"', ("data.tokenizer.layout", "did you mean 'chatml'")),
    "a layout without generation markers": ("vocab_size = 288", 'vocab_size = 288\nlayout = "BARE"', ("bare.toml", "no generation markers", "endgeneration")),
    "no such tokenizer": ("vocab_size = 288", 'path = "./no/tokenizer"', ("data.tokenizer.path", "no folder './no/tokenizer'")),
    "K above n": ("k = [1, 2]", "k = [1, 4]", ("between 1 and n = 2", "[1, 4]")),
    "K of nothing": ("k = [1, 2]", "k = []", ("between 1 and n = 2",)),
    "below the range": ("bootstrap = 100", "bootstrap = 3", ("evaluate.bootstrap", "found 3", "100")),
    "negative": ("limit = 10", "limit = -10", ("generate.limit", "found -10", "greater than or equal to 0")),
    "wrong type": ("limit = 10", 'limit = "ten"', ("generate.limit", "'ten'", "a valid integer")),
    "half a row": ("limit = 10", "limit = 10.5", ("generate.limit", "found 10.5", "integer")),
    "not a number": ("learning_rate = 5e-3", "learning_rate = nan", ("learning_rate", "found nan")),
    "infinite": ("learning_rate = 5e-3", "learning_rate = inf", ("learning_rate", "found inf", "finite")),
    "decay of 1": ("learning_rate = 5e-3", "betas = [0.9, 1.0]", ("betas.1", "found 1.0", "less than 1")),
    "one decay": ("learning_rate = 5e-3", "betas = [0.9]", ("betas.1", "missing")),
    "misspelt choice": ("learning_rate = 5e-3", 'schedule = "cosin"', ("schedule", "did you mean 'cosine'")),
    "negative seed": ("seed = {seed}", "seed = -1", ("'seed'", "found -1")),
    "huge seed": ("seed = {seed}", "seed = 99999999999999999999", ("'seed'", "less than")),
    "no out": ('out = "{out}"', 'out = ""', ("'out'", "at least 1 character")),
    "out is missing": ('out = "{out}"\n', "", ("'out'", "missing")),
    "no model": ("[model]\n", "[modle]\n", ("'model'", "missing")),
    "no data": ("[data]\nprofile", "[date]\nprofile", ("'date'", "unknown key did you mean 'data'")),
    "no source": (FIRST, "[[data.source]]", ("data.sources", "missing")),
    "a source without a kind": ('kind = "embedded"\ntrain', "train", ("kind", "expected")),
    "a table for a list": ('[[train]]\nname = "sft"', '[train]\nname = "sft"', ("not TOML", "[[train]]", "two brackets each time")),
    "a text for a table": ("[data]\nprofile", 'sampling = "hot"\n[data]\nprofile', ("not TOML",)),
    "not TOML": ("[model]", "[model", ("not TOML", "line")),
    "a key twice": ("width = 32", "width = 32\nwidth = 64", ("not TOML", "line")),
    "a number of too many digits": ("width = 32", f"width = {'9' * 5000}", ("not TOML", "digits")),
    "heads that do not divide": ("heads = 2", "heads = 3", ("model", "heads 3", "divides")),
    "odd heads": ("width = 32", "width = 34", ("model", "even number")),
    "two stages of one name": ('name = "dpo"', 'name = "rft"', ("share a name",)),
    "a stage called data": ('name = "dpo"', 'name = "data"', ("a training stage named 'data'",)),
    "a stage outside the run": ('name = "dpo"', 'name = "../dpo"', ("'../dpo'", "name of a folder")),
    "a stage without a name": ('name = "dpo"', 'name = ""', ("train, key 'name'", "name of a folder")),
    "unknown init": ('name = "rft"\ninit = "sft"', 'name = "rft"\ninit = "sftt"', ("init of stage 'rft'", "did you mean 'sft'")),
    "init of a folder that is not there": ('name = "rft"\ninit = "sft"', 'name = "rft"\ninit = "./no/model"', ("stage 'rft', key 'init'", "no folder './no/model'")),
    "two stages wait for each other": (
        'init = "sft"\nbatch = 2\nsteps = 6\nsave_every = 2\nmethod = {{ kind = "rft" }}\n\n[[train]]\nname = "dpo"\ninit = "sft"',
        'init = "dpo"\nbatch = 2\nsteps = 6\nsave_every = 2\nmethod = {{ kind = "rft" }}\n\n[[train]]\nname = "dpo"\ninit = "rft"',
        ("'rft'", "waits for dpo"),
    ),
    "a stage waits for itself": ('name = "rft"\ninit = "sft"', 'name = "rft"\ninit = "rft"', ("'rft'", "waits for rft")),
    "random weights for RFT": ('name = "rft"\ninit = "sft"', 'name = "rft"', ("stage 'rft'", "random weights", 'init = "sft"')),
    "unknown model to sample from": ("[generate]\n", '[generate]\nmodel = "sfft"\n', ("generate.model", "did you mean 'sft'")),
    "RFT without samples": ("[generate]\nlimit = 10\ngroup_size = 3\nshard_size = 4\n", "", ("waits for verify", "[generate]")),
    "GRPO without steps": ("group_size = 4\nsteps = 6", "group_size = 4", ("stage 'grpo'", "'steps'", "a number of steps")),
    "staleness of SFT": ('name = "sft"', 'name = "sft"\nstaleness = 1', ("stage 'sft'", "'staleness'", "does not sample")),
    "groups of SFT": ('name = "sft"', 'name = "sft"\ngroup_size = 4', ("stage 'sft'", "'group_size'", "does not sample")),
    "a part of a reward that is off": ('name = "grpo"', 'name = "grpo"\nreward = {{ squash = "sigmoid" }}', ("reward", "squash is given and model, which it is a part of, is off")),
    "top_p while training": ("[sampling]", "[sampling]\ntop_p = 0.9", ("allow_truncated_sampling", "top_p = 0.9")),
    "a penalty while training": ("[sampling]", "[sampling]\nrepetition_penalty = 1.2", ("repetition_penalty", "1.2")),
    "rewards of nothing": ('name = "grpo"', 'name = "grpo"\nreward = {{ rule = 0.0 }}', ("reward", "every weight is 0")),
    "a model that is not there": ("[model]\n", '[model]\npath = "./no/model"\n', ("model.path", "no folder './no/model'")),
    "a model folder without a model": ("[model]\n", '[model]\npath = "pipeline"\n', ("model.path", "no config.json")),
    "a plug-in that is not there": ('kind = "rft"', 'kind = "mine.py"', ("method", "no file 'mine.py'")),
    "a family that is not there": ("families = {{ expression = 1.0 }}", "families = {{ expresion = 1.0 }}", ("families", "expresion")),
    "a table of a study": ("[model]\n", "[study]\nbudget = 3\n[model]\n", ("'study'", "python -m pipeline.study")),
    "a source's file is missing": (FIRST, '[[data.sources]]\nkind = "gsm8k"\ntrain = "none.jsonl"\n[[data.sources]]', ("'train'", "no such file: none.jsonl", 'or write "hub" to fetch openai/gsm8k/main')),
    "a source of no file": (FIRST, '[[data.sources]]\nkind = "gsm8k"\n[[data.sources]]', ("gsm8k", "at least one of train")),
}  # fmt: skip


@pytest.mark.parametrize("case", CONFIGURATIONS)
def test_configurations(case, tmp_path, monkeypatch, capsys):
    old, new, expected = CONFIGURATIONS[case]
    assert old in SMALL.SMALL, old
    (tmp_path / "bare.toml").write_text(
        'description = ""\nbos = ""\neos = "<e>"\npad = "<p>"\nend = "<e>"\n'
        'control = ["<e>", "<p>"]\ntemplate = "{{ messages }}"\n'
    )
    new = new.replace("BARE", str(tmp_path / "bare.toml"))
    path = SMALL.write_small(tmp_path, text=SMALL.SMALL.replace(old, new, 1))
    said = refused(tmp_path, ["pipeline.run", "--config", str(path)], monkeypatch, capsys)
    holds(said, expected)
    assert not (tmp_path / "run").exists()


FILES: dict[str, tuple[bytes | None, tuple[str, ...]]] = {
    "no file": (None, ("bad.toml", "no such file")),
    "an empty file": (b"", ("'name'", "missing")),
    "not UTF-8": (b'name = "\xff"', ("not TOML", "utf-8")),
    "a picture": (b"\x89PNG\r\n\x1a\n\x00\x00", ("not TOML",)),
}


@pytest.mark.parametrize("case", FILES)
def test_files_of_configurations(case, tmp_path, monkeypatch, capsys):
    content, expected = FILES[case]
    path = tmp_path / "bad.toml"
    if content is not None:
        path.write_bytes(content)
    said = refused(tmp_path, ["pipeline.run", "--config", str(path)], monkeypatch, capsys)
    holds(said, expected)


def test_a_byte_order_mark_is_no_mistake(tmp_path, monkeypatch, capsys):
    path = SMALL.write_small(tmp_path)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    importlib.import_module("pipeline.run").main(["--config", str(path), "--dry-run"])
    assert 'name = "small"' in capsys.readouterr().out


# --- Command lines: (words, what is said) ---------------------------------------------------------

CONFIG = ["--config", "{box}/small.toml"]
CHECKPOINT = ["--model", "{box}/run/sft/checkpoint"]
EVALUATION = "{box}/run/eval-sft"
MIXTURE = ["--config", "data_prep/configs/sft_900k.toml", "--out", "{box}/mixture"]
COMMANDS: dict[str, tuple[list[str], tuple[str, ...]]] = {
    "a stage of a whole run": (["pipeline.run", *CONFIG, "--stage", "grpo"], ("unknown argument '--stage'", "pipeline.train --stage")),
    "an option's name": (["pipeline.run", *CONFIG, "--sede", "3"], ("'--sede'", "did you mean '--seed'")),
    "no configuration": (["pipeline.run"], ("no --config",)),
    "a folder for a configuration": (["pipeline.run", "--config", "{box}"], ("no such file",)),
    "a word for a number": (["pipeline.run", *CONFIG, "--seed", "one"], ("--seed", "'one'")),
    "a negative number": (["pipeline.run", *CONFIG, "--seed", "-3"], ("seed", "-3")),
    "an option without a value": (["pipeline.run", *CONFIG, "--out"], ("--out", "expected one argument")),
    "out is a file": (["pipeline.run", *CONFIG, "--out", "{box}/small.toml"], ("small.toml", "is a file", "--out")),
    "out below a file": (["pipeline.run", *CONFIG, "--out", "{box}/small.toml/run"], ("is a file",)),
    "data: an option": (["data_prep.build", *CONFIG, "--rwos", "4"], ("--rwos", "did you mean '--rows'")),
    "data: a value": (["data_prep.build", *CONFIG, "--rows", "-4"], ("rows", "-4", "greater than or equal to 0")),
    "data: a type": (["data_prep.build", *CONFIG, "--rows", "four"], ("--rows", "'four'")),
    "mixture: a file": (["data_prep.mixture", *MIXTURE, "--sources.0.source.train", "none.parquet"], ("key 'train'", "no such file: none.parquet", 'write "hub" to fetch AI-MO/NuminaMath-CoT')),
    "data: no table": (["data_prep.mixture", *CONFIG], ("'mixture'", "missing")),
    "inspect: no stage": (["data_prep.inspect", "{box}/none"], ("none", "no shards")),
    "inspect: no row": (["data_prep.inspect", "{box}/run/data", "--row", "9999"], ("row 9999", "0 to")),
    "inspect: a split": (["data_prep.inspect", "{box}/run/data", "--split", "trian"], ("'trian'", "did you mean 'train'")),
    "train: a stage": (["pipeline.train", *CONFIG, "--stage", "grop"], ("'grop'", "did you mean 'grpo'")),
    "train: no stage": (["pipeline.train", *CONFIG], ("4 training stages", "--stage")),
    "train: an override": (["pipeline.train", *CONFIG, "--stage", "grpo", "--method.clip-hihg", "1"], ("--method.clip-hihg", "did you mean '--method.clip-high'")),
    "train: an override's value": (["pipeline.train", *CONFIG, "--stage", "grpo", "--steps", "-1"], ("steps", "-1")),
    "train: a key of the run": (["pipeline.train", *CONFIG, "--stage", "grpo", "--out", "x"], ("unknown argument --out, x\n", "seed, out and name are the file's", "--dry-run shows every key")),
    "train: another kind's keys": (["pipeline.train", *CONFIG, "--stage", "grpo", "--method.kind", "rft"], ("kind = 'rft'", "'beta'", "unknown key")),
    "train: an override's type": (["pipeline.train", *CONFIG, "--stage", "grpo", "--method.updates", "two"], ("--method.updates", "'two'")),
    "train: nothing to start from": (["pipeline.train", *CONFIG, "--stage", "grpo", "--init", "rft"], ("rft", "run the stage that makes it first")),
    "train: a misspelt start": (["pipeline.train", *CONFIG, "--stage", "grpo", "--init", "stf"], ("stage 'grpo', key 'init'", "no folder 'stf' did you mean 'sft'?")),
    "train: nothing to compare": (["pipeline.train", *CONFIG, "--stage", "grpo", "--group-size", "1"], ("'group_size'", "compares the samples of a prompt", "at least 2")),
    "generate: a misspelt model": (["pipeline.generate", *CONFIG, "--model", "stf"], ("generate.model", "did you mean 'sft'?", "one of sft, rft")),
    "generate: an override": (["pipeline.generate", *CONFIG, "--grup-size", "3"], ("--grup-size", "did you mean '--group-size'")),
    "generate: a model": (["pipeline.generate", *CONFIG, "--model", "{box}/none"], ("none",)),
    "verify: a stray word": (["pipeline.verify", *CONFIG, "now"], ("now",)),
    "verify: no worker": (["pipeline.verify", *CONFIG, "--workers", "0"], ("workers", "found 0")),
    "steps: a stage": (["pipeline.steps", "--run", "{box}/run", "--stage", "grpo", "--step", "1"], ("'grpo'", "no stage of that name")),
    "adapters: no base": (["pipeline.adapters", "--base", "{box}/none", "--adapter", "{box}/none", "--out", "{box}/new"], ("none",)),
    "adapters: out is there": (["pipeline.adapters", "--base", "{box}", "--adapter", "{box}", "--out", "{box}/run"], ("is there already",)),
    "publish: no checkpoint": (["pipeline.publish", "--run", "{box}/run", "--stage", "grpo", "--repo", "a/b"], ("no complete model folder",)),
    "publish: a name": (["pipeline.publish", "--run", "{box}/run", "--stage", "sft", "--repo", "nobody"], ("'nobody'", "owner/name")),
    "serve: no server": (["pipeline.serve", *CHECKPOINT, "--servers", "0"], ("--servers", "0 is below 1")),
    "serve: a model": (["pipeline.serve", "--model", "nosuch"], ("--model: no folder 'nosuch'", "owner/name")),
    "serve: a setting": (["pipeline.serve", *CHECKPOINT, "--engine.gpu-memry-share", "1"], ("gpu_memry_share", "did you mean 'gpu_memory_share'")),
    "serve: an option": (["pipeline.serve", *CHECKPOINT, "--server", "1"], ("'--server'", "did you mean '--servers'")),
    "study: no table": (["pipeline.study", *CONFIG], ("study",)),
    "doctor: an option": (["pipeline.doctor", "--jason"], ("'--jason'", "did you mean '--json'")),
    "evaluate: no model": (["eval.run", "--suites", "gsm8k"], ("--model", "--config")),
    "evaluate: two forms": (["eval.run", *CHECKPOINT, *CONFIG], ("not allowed with",)),
    "evaluate: a suite": (["eval.run", *CHECKPOINT, "--suites", "nosuch"], ("no suite 'nosuch'", "gsm8k")),
    "evaluate: a suite's file": (["eval.run", *CHECKPOINT, "--suites", "gsm8k={box}/none"], ("none: no such file",)),
    "evaluate: K above n": (["eval.run", *CHECKPOINT, "--suites", "embedded", "--n", "2", "--k", "4"], ("--k", "between 1 and n = 2")),
    "evaluate: greedy by temperature": (["eval.run", *CHECKPOINT, "--suites", "embedded", "--temperature", "0"], ("--temperature", "give --n 0")),
    "data: no number": (["data_prep.build", *CONFIG, "--rows", "4k"], ("--rows", "'4k'", "a value that the key takes")),
    "evaluate: K of words": (["eval.run", *CHECKPOINT, "--suites", "embedded", "--k", "1", "two"], ("--k", "'1 two'", "1 2 4 8")),
    "evaluate: a stage for its checkpoint": (["eval.run", "--model", "{box}/run/sft", "--suites", "embedded"], ("without config.json", "name {box}/run/sft/checkpoint")),
    "evaluate: a run for a checkpoint": (["eval.run", "--model", "{box}/run", "--suites", "embedded"], ("without config.json", "name {box}/run/sft/checkpoint")),
    "inspect: a run for its stage": (["data_prep.inspect", "{box}/run"], ("no shards of split 'train'", "name {box}/run/data")),
    "evaluate: a number": (["eval.run", *CHECKPOINT, "--suites", "embedded", "--limit", "-2"], ("limit", "-2")),
    "evaluate: an option": (["eval.run", *CHECKPOINT, "--suits", "embedded"], ("'--suits'", "did you mean '--suites'")),
    "evaluate: a setting": (["eval.run", *CHECKPOINT, "--suites", "embedded", "--engine.slotz", "3"], ("slotz", "did you mean 'slots'")),
    "evaluate: a profile": (["eval.run", *CHECKPOINT, "--suites", "embedded", "--profile", "boxd"], ("'boxd'", "did you mean 'boxed'")),
    "evaluate: a checker": (["eval.run", *CHECKPOINT, "--suites", "embedded", "--checker.kind", "boxd"], ("did you mean 'boxed'",)),
    "evaluate: a checkpoint": (["eval.run", *CONFIG, "--checkpoints", "sftt"], ("'sftt'", "did you mean 'sft'")),
    "evaluate: a model": (["eval.run", "--model", "{box}/none", "--suites", "embedded"], ("no such folder",)),
    "report: no run": (["eval.report", "--run", "{box}/none"], ("no complete evaluation",)),
    "export: no run": (["eval.export", "--run", "{box}/none"], ("no complete evaluation",)),
    "export: a file": (["eval.export", "--run", "{box}/run", "--output", "{box}/small.toml"], ("small.toml",)),
    "compare: one": (["eval.compare", EVALUATION], ("at least two",)),
    "compare: nothing there": (["eval.compare", EVALUATION, "{box}/none"], ("none",)),
    "compare: a metric": (["eval.compare", EVALUATION, EVALUATION, "--metric", "avg@3"], ("avg@3", "did you mean")),
    "compare: a suite": (["eval.compare", EVALUATION, EVALUATION, "--suites", "embeded"], ("'embeded'", "did you mean 'embedded'")),
    "compare: a folder to write": (["eval.compare", EVALUATION, EVALUATION, "--output", "{box}/none/x.json"], ("--output", "no folder")),
    "regrade: no evaluation": (["eval.regrade", "{box}/none", "--checker", "boxed"], ("not an evaluation",)),
    "regrade: no grader": (["eval.regrade", EVALUATION], ("no second grader",)),
    "regrade: a grader": (["eval.regrade", EVALUATION, "--checker", "boxd"], ("did you mean 'boxed'",)),
    "regrade: an option": (["eval.regrade", EVALUATION, "--checker", "boxed", "--option", "x"], ("KEY=VALUE",)),
    "regrade: no worker": (["eval.regrade", EVALUATION, "--checker", "boxed", "--workers", "0"], ("--workers", "0 is below 1")),
    "score: no file": (["eval.score", "--samples", "{box}/none"], ("no such file",)),
    "recorded: a format": (["eval.recorded", "{box}/small.toml", "--format", "qwn"], ("'qwn'", "did you mean 'qwen'")),
    "recorded: not JSON": (["eval.recorded", "{box}/small.toml", "--format", "qwen"], ("line 2", "not JSON")),
    "verifiers: a checker": (["verifiers", "check", "boxd"], ("boxd",)),
    "verifiers: a policy": (["verifiers", "1", "1", "--policy", "boxd"], ("boxd",)),
    "verifiers: no file": (["verifiers", "audit", "{box}/none"], ("none",)),
    "verifiers: options": (["verifiers", "check", "boxed", "--options", "{"], ("--options",)),
    "verifiers: not JSON": (["verifiers", "audit", "{box}/small.toml"], ("line 2", "not JSON")),
    "verifiers: no column": (["verifiers", "grade", "--input", "{box}/run/data/train.jsonl", "--output", "{box}/out.jsonl"], ("line 1",)),
}  # fmt: skip


@pytest.mark.parametrize("case", COMMANDS)
def test_command_lines(case, box, monkeypatch, capsys):
    words, expected = COMMANDS[case]
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "a token")
    expected = tuple(part.replace("{box}", str(box)) for part in expected)
    holds(refused(box, words, monkeypatch, capsys), expected)


# --- Rows of data: (kind of source or suite, content of the file, what is said) -------------------

GSM8K = '{"question": "What is 1+1?", "answer": "1+1=2\\n#### 2"}\n'
ROWS: dict[str, tuple[str, bytes, tuple[str, ...]]] = {
    "no row": ("gsm8k.jsonl", b"", ("no rows",)),
    "blank lines": ("gsm8k.jsonl", b"\n\n \n", ("no rows",)),
    "not JSON": ("gsm8k.jsonl", GSM8K.encode() + b'{"question": ', ("line 2", "not JSON")),
    "a list": ("gsm8k.jsonl", b"[1, 2]\n", ("line 1", "JSON list")),
    "not UTF-8": ("gsm8k.jsonl", GSM8K.encode() + b'{"question": "\xff"}\n', ("line 2", "invalid UTF-8")),
    "UTF-16": ("gsm8k.jsonl", GSM8K.encode("utf-16"), ("line 1", "UTF-8")),
    "half a character": ("gsm8k.jsonl", b'{"question": "\\ud800", "answer": "#### 2"}\n', ("line 1", "surrogate")),
    "nested too deep": ("gsm8k.jsonl", b"[" * 200_000 + b"\n", ("line 1", "cannot be read")),
    "no column": ("gsm8k.jsonl", b'{"problem": "1+1?", "answer": "#### 2"}\n', ("line 1", "no column 'question'", "'problem'")),
    "a number for a text": ("gsm8k.jsonl", b'{"question": 3, "answer": "#### 2"}\n', ("line 1", "'question' is int")),
    "null for a text": ("gsm8k.jsonl", b'{"question": null, "answer": "#### 2"}\n', ("line 1", "'question' is NoneType")),
    "no gold": ("gsm8k.jsonl", b'{"question": "1+1?", "answer": "two"}\n', ("line 1",)),
    "a gold that its solution misses": ("math.jsonl", b'{"problem": "1+1?", "solution": "no box", "level": "Level 1", "type": "Algebra"}\n', ("line 1",)),
    "an unknown ending": ("gsm8k.txt", GSM8K.encode(), (".txt", ".jsonl")),
    "a JSON object for a list": ("gsm8k.json", b'{"a": 1}', ("JSON dict", "JSON array")),
    "broken JSON": ("gsm8k.json", b"[", ("not JSON",)),
    "broken Parquet": ("gsm8k.parquet", b"PAR1 not really", ("gsm8k.parquet", "cannot open")),
    "a rating that is no number": ("ultrafeedback.jsonl", b'{"prompt": "q", "chosen": 3, "rejected": []}\n', ("line 1",)),
    "a label that is none": ("prm800k.jsonl", b'{"question": {"problem": 3}, "label": {}}\n', ("line 1",)),
    "steps without labels": ("math_shepherd.jsonl", b'{"input": "q", "label": 3, "task": "GSM8K"}\n', ("line 1",)),
    "a conversation of nobody": ("ultrachat.jsonl", b'{"prompt": "p", "messages": 3}\n', ("line 1",)),
}  # fmt: skip


@pytest.mark.parametrize("case", ROWS)
def test_rows_of_sources(case, tmp_path, monkeypatch, capsys):
    name, content, expected = ROWS[case]
    path = tmp_path / name
    path.write_bytes(content)
    table = SMALL.SMALL.replace(
        '[[data.sources]]\nkind = "embedded"\ntrain = 60\nvalidation = 8\ntest = 6\n'
        "families = {{ expression = 1.0 }}",
        f'[[data.sources]]\nkind = "{path.stem}"\ntrain = "{path}"',
    )
    assert table != SMALL.SMALL
    config = SMALL.write_small(tmp_path, text=table)
    said = refused(tmp_path, ["data_prep.build", "--config", str(config)], monkeypatch, capsys)
    holds(said, (name, *expected))
    assert not (tmp_path / "run" / "data").exists()


SUITES: dict[str, tuple[str, bytes, tuple[str, ...]]] = {
    "no row": ("own", b"", ("no rows",)),
    "no answer": ("own", b'{"question": "1+1?"}\n', ("line 1", "no column 'answer'")),
    "an empty answer": ("own", b'{"question": "1+1?", "answer": " "}\n', ("line 1", "'answer'")),
    "an empty question": ("own", b'{"question": " ", "answer": "2"}\n', ("line 1", "an empty question")),
    "an answer of a list": ("own", b'{"question": "1+1?", "answer": [2]}\n', ("line 1", "'answer'")),
    "an answer that is no number": ("own", b'{"question": "1+1?", "answer": NaN}\n', ("line 1", "'answer'")),
    "an infinite answer": ("own", b'{"question": "1+1?", "answer": 1e999}\n', ("line 1", "'answer'")),
    "one id twice": ("own", b'{"id": 1, "question": "a", "answer": "2"}\n{"id": 1, "question": "b", "answer": "2"}\n', ("line 2", "'1'", "unique")),
    "a level of a list": ("math", b'{"problem": "p", "solution": 3, "level": [], "type": "x"}\n', ("line 1",)),
    "GSM8K without a mark": ("gsm8k", b'{"question": "1+1?", "answer": "two"}\n', ("line 1", "####")),
    "MGSM of three columns": ("mgsm_en", b'{"question": "1+1?"}\n', ("line 1",)),
    "CMATH of another file": ("cmath", b'{"question": "1+1?"}\n', ("line 1",)),
    "SVAMP of another file": ("svamp", b'{"question": "1+1?"}\n', ("line 1",)),
    "AIME of another file": ("aime", b'{"question": "1+1?"}\n', ("line 1",)),
}  # fmt: skip


@pytest.mark.parametrize("case", SUITES)
def test_rows_of_suites(case, box, monkeypatch, capsys):
    kind, content, expected = SUITES[case]
    (box / "rows.jsonl").write_bytes(content)
    suite = "{box}/rows.jsonl" if kind == "own" else f"{kind}={{box}}/rows.jsonl"
    words = ["eval.run", *CHECKPOINT, "--out", "{box}/new", "--suites", suite]
    said = refused(box, words, monkeypatch, capsys)
    holds(said, ("rows.jsonl", *expected))


SCORES: dict[str, tuple[bytes, list[str], tuple[str, ...]]] = {
    "no row": (b"", [], ("no rows",)),
    "no column": (b'{"problem_id": 1, "sample_index": 0, "answer": "2"}\n', [], ("line 1", "'correct'")),
    "a text for a verdict": (b'{"problem_id": 1, "sample_index": 0, "answer": "2", "correct": "yes"}\n', [], ("line 1", "'yes'")),
    "a negative index": (b'{"problem_id": 1, "sample_index": -1, "answer": "2", "correct": true}\n', [], ("line 1", "-1")),
    "a sample twice": (b'{"problem_id": 1, "sample_index": 0, "answer": "2", "correct": true}\n' * 2, [], ("line 2",)),
    "K above n": (b'{"problem_id": 1, "sample_index": 0, "answer": "2", "correct": true}\n', ["--k", "2"], ("K = 2", "1 \u2264 K \u2264 1")),
    "K of words": (b'{"problem_id": 1, "sample_index": 0, "answer": "2", "correct": true}\n', ["--k", "a,b"], ("--k", "'a,b'")),
    "no resample": (b'{"problem_id": 1, "sample_index": 0, "answer": "2", "correct": true}\n', ["--bootstrap", "0"], ("--bootstrap", "below")),
    "a score that is no number": (b'{"problem_id": 1, "sample_index": 0, "answer": "2", "correct": true, "score": NaN}\n', [], ("line 1", "score")),
    "unlike numbers of samples": (
        b'{"problem_id": 1, "sample_index": 0, "answer": "2", "correct": true}\n'
        b'{"problem_id": 1, "sample_index": 1, "answer": "2", "correct": true}\n'
        b'{"problem_id": 2, "sample_index": 0, "answer": "2", "correct": true}\n', [], ("samples",)),
    "nowhere to write": (b'{"problem_id": 1, "sample_index": 0, "answer": "2", "correct": true}\n', ["--output", "{box}/no/x.json"], ("--output", "no folder")),
}  # fmt: skip


@pytest.mark.parametrize("case", SCORES)
def test_rows_to_score(case, tmp_path, monkeypatch, capsys):
    content, words, expected = SCORES[case]
    (tmp_path / "rows.jsonl").write_bytes(content)
    command_line = ["eval.score", "--samples", "{box}/rows.jsonl", *words]
    holds(refused(tmp_path, command_line, monkeypatch, capsys), expected)


# --- Checkpoints and tokenizers: (what is done to the folder, what is said) -----------------------


def rewrite(name: str, change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """Return what changes a JSON file of a folder."""

    def apply(folder: Path) -> None:
        table = json.loads((folder / name).read_text(encoding="utf-8"))
        change(table)
        (folder / name).write_text(json.dumps(table), encoding="utf-8")

    return apply


def content(name: str, data: bytes | None) -> Callable[[Path], None]:
    """Return what gives a file of a folder another content; None removes it."""

    def apply(folder: Path) -> None:
        if data is None:
            (folder / name).unlink()
        else:
            (folder / name).write_bytes(data)

    return apply


def weights(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    """Return what changes the weights of a folder."""

    def apply(folder: Path) -> None:
        tensors = {k: v.clone() for k, v in load_file(folder / "model.safetensors").items()}
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return apply


def pickled(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")


def cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


NORM, FIRST_UP = "model.norm.weight", "model.layers.0.mlp.up_proj.weight"
MODELS: dict[str, tuple[Callable[[Path], None], tuple[str, ...]]] = {
    "no config.json": (content("config.json", None), ("config.json",)),
    "a broken config.json": (content("config.json", b"{"), ("config.json", "not JSON")),
    "a list for a config.json": (content("config.json", b"[]"), ("config.json", "list")),
    "a config.json that is no text": (content("config.json", b"\xff\xfe\x00"), ("config.json", "UTF-8")),
    "an unknown architecture": (rewrite("config.json", lambda t: t.update(model_type="qwen99")), ("qwen99",)),
    "no layers": (rewrite("config.json", lambda t: t.update(num_hidden_layers=0)), ("config.json", "no model can be made of it")),
    "a width of words": (rewrite("config.json", lambda t: t.update(hidden_size="wide")), ("hidden_size",)),
    "code of its own": (
        rewrite("config.json", lambda t: t.update(model_type="mine", auto_map={"AutoConfig": "mine.C", "AutoModelForCausalLM": "mine.M"})),
        ("cannot be loaded", "trust_remote_code"),
    ),
    "no weights": (content("model.safetensors", None), ("without weights",)),
    "pickled weights": (pickled, ("pickled", "safetensors")),
    "weights cut short": (cut, ("cut short or damaged",)),
    "empty weights": (content("model.safetensors", b""), ("cut short or damaged",)),
    "a header that is no JSON": (content("model.safetensors", (8).to_bytes(8, "little") + b"not JSON"), ("cut short or damaged",)),
    "a header of 2^60 bytes": (content("model.safetensors", (2**60).to_bytes(8, "little") + b"{}"), ("cut short or damaged",)),
    "a tensor is missing": (weights(lambda t: t.pop(FIRST_UP)), ("missing", FIRST_UP)),
    "a tensor too many": (weights(lambda t: t.update({"model.layers.9.mlp.up_proj.weight": torch.ones(2)})), ("layers.9",)),
    "a tensor of another shape": (weights(lambda t: t.update({FIRST_UP: torch.ones(3, 3)})), (FIRST_UP, "3")),
    "weights of another model": (rewrite("config.json", lambda t: t.update(hidden_size=64)), ("embed_tokens", "[280, 64], as config.json says")),
    "weights that are no numbers": (weights(lambda t: t.update({NORM: torch.full_like(t[NORM], float("nan"))})), (NORM, "not finite")),
    "a reward model": (rewrite("config.json", lambda t: t.update(architectures=["Qwen2ForSequenceClassification"])), ("reward model",)),
    "no tokenizer": (content("tokenizer.json", None), ("tokenizer",)),
    "a broken tokenizer": (content("tokenizer.json", b"{"), ("tokenizer",)),
    "an empty tokenizer": (content("tokenizer.json", b""), ("tokenizer",)),
    "a tokenizer of another kind": (content("tokenizer.json", b'{"model": 3}'), ("tokenizer",)),
    "a broken template": (content("chat_template.jinja", b"{% generation %}{% endgeneration %}{% for x in %}"), ("template",)),
    "a template that fails": (content("chat_template.jinja", b"{{ raise_exception('no') }}{% generation %}{% endgeneration %}"), ("template",)),
    "a broken boxed.json": (content("boxed.json", b"{"), ("boxed.json", "not JSON")),
    "a profile that is not there": (content("boxed.json", b'{"profile": "nosuch"}'), ("nosuch",)),
    "a boxed.json of no profile": (content("boxed.json", b"{}"), ("boxed.json", "profile")),
    "more tokens than embeddings": (
        weights(lambda t: t.update({"model.embed_tokens.weight": t["model.embed_tokens.weight"][:100]})),
        ("embed_tokens",),
    ),
    "a vocabulary beyond the model": (
        lambda folder: (
            rewrite("config.json", lambda t: t.update(vocab_size=100))(folder),
            weights(lambda t: t.update({"model.embed_tokens.weight": t["model.embed_tokens.weight"][:100].clone()}))(folder),
        ),
        ("vocabulary", "100"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("way", ["evaluate", "generate", "train"])
@pytest.mark.parametrize("case", MODELS)
def test_checkpoints(case, way, box, monkeypatch, capsys):
    damage, expected = MODELS[case]
    model = box / "model"
    shutil.copytree(box / "run" / "sft" / "checkpoint", model)
    damage(model)
    (box / "own.jsonl").write_text('{"question": "1+1?", "answer": "2"}\n')
    if way == "evaluate":
        words = [
            "eval.run",
            "--model",
            str(model),
            "--suites",
            "{box}/own.jsonl",
            "--out",
            "{box}/new",
        ]
    elif way == "generate":
        words = ["pipeline.generate", *CONFIG, "--model", str(model)]
    else:
        words = ["pipeline.train", *CONFIG, "--stage", "rft", "--init", str(model), "--no-forecast"]
    late = way == "evaluate" and case == "weights that are no numbers"
    said = refused(box, words, monkeypatch, capsys, untouched=not late)
    # The words are those of the evaluation; the others may see the same from another side.
    holds(said, expected if way == "evaluate" else ())


# --- Plug-ins: (where one is named, its file, what is said) ---------------------------------------

CHECKER = "from verifiers.checkers import Checker, Outcome, Verdict\n"
METHOD = "from pipeline.methods import Method, MethodConfig\nclass Config(MethodConfig):\n    kind: str = 'mine.py'\n"
SOURCE = (
    "from data_prep.schema import Problem\nfrom data_prep.sources import SourceConfig\n"
    "class Config(SourceConfig):\n    kind: str = 'mine.py'\n    train: int = 1\n"
    "    validation: int = 0\n    test: int = 0\n    families: dict = {}\n"
)
PLUGINS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "a method of no Python": ("method", "def (:", ("mine.py, line 1", "cannot be imported", "SyntaxError")),
    "a method that raises": ("method", "x = 1\ny = 1 / 0\n", ("mine.py, line 2", "ZeroDivisionError")),
    "a method without a library": ("method", "import no_such_library\n", ("mine.py, line 1", "no_such_library")),
    "an empty method": ("method", "", ("mine.py", "no class Config")),
    "a method whose Config is none": ("method", "Config = 3\n", ("mine.py", "Config is 3")),
    "a method without create": ("method", METHOD, ("mine.py", "no function create")),
    "a method whose create raises": ("method", METHOD + "def create(config):\n    raise RuntimeError('no')\n", ("mine.py, line 5", "RuntimeError: no")),
    "a method whose create takes nothing": ("method", METHOD + "def create():\n    return 3\n", ("mine.py", "create cannot be called")),
    "a method that is none": ("method", METHOD + "def create(config):\n    return 3\n", ("mine.py", "create returned int")),
    "a key that the method asks for": ("method", METHOD + "    height: int\n", ("'height'", "missing")),
    "a source without read": ("source", SOURCE, ("mine.py", "no function read", "read of 2 arguments")),
    "a source whose read takes one thing": ("source", SOURCE + "def read(config):\n    return []\n", ("mine.py", "read cannot be called")),
    "a source that returns nothing": ("source", SOURCE + "def read(config, seed):\n    pass\n", ("mine.py", "read returned nothing")),
    "a source whose read raises": ("source", SOURCE + "def read(config, seed):\n    return undefined\n", ("mine.py, line 10", "read failed: NameError")),
    "an engine without a Config": ("engine", "", ("mine.py", "no class Config")),
    "a source without a Config": ("source", "", ("mine.py", "no class Config")),
    "a checker of no Python": ("checker", "def (:", ("verify.checker", "SyntaxError")),
    "a checker that raises": ("checker", "raise OSError('no disk')", ("verify.checker", "no disk")),
    "an empty checker": ("checker", "", ("verify.checker", "found 0 Checker classes")),
    "two checkers": ("checker", CHECKER + "class A(Checker):\n    def check(self, gold, text): ...\nclass B(A):\n    pass\n", ("found 2 Checker classes",)),
    "a checker without check": ("checker", CHECKER + "class A(Checker):\n    pass\n", ("found 0 Checker classes",)),
    "a checker whose making raises": (
        "checker",
        CHECKER + "class A(Checker):\n    def __init__(self):\n        raise KeyError('no key')\n    def check(self, gold, text): ...\n",
        ("verify.checker", "no key"),
    ),
}  # fmt: skip
NAMED = {
    "method": ('kind = "rft"', 'kind = "MINE"'),
    "engine": ("[sampling]", '[engine]\nkind = "MINE"\n[sampling]'),
    "source": ('kind = "embedded"\ntrain', 'kind = "MINE"\ntrain'),
    "checker": (
        '[verify]\nchecker = {{ kind = "{checker}" }}',
        '[verify]\nchecker = {{ kind = "MINE" }}',
    ),
}


@pytest.mark.parametrize("case", PLUGINS)
def test_plugins(case, tmp_path, monkeypatch, capsys):
    place, source, expected = PLUGINS[case]
    mine = tmp_path / "mine.py"
    mine.write_text(source)
    old, new = NAMED[place]
    assert old in SMALL.SMALL
    text = SMALL.SMALL.replace(old, new.replace("MINE", str(mine)), 1)
    path = SMALL.write_small(tmp_path, text=text)
    # Python leaves a compiled copy beside a file that it imports.
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    said = refused(tmp_path, ["pipeline.run", "--config", str(path)], monkeypatch, capsys)
    holds(said, expected)


# --- What a run folder holds: (file, what is done to it, command, what is said) -------------------


def line(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """Return what changes the first row of a file."""

    def apply(path: Path) -> None:
        rows = [json.loads(row) for row in path.read_text(encoding="utf-8").splitlines()]
        change(rows[0])
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    return apply


VERIFY = ["pipeline.verify", *CONFIG, "--time-limit-s", "4"]
GENERATE = ["pipeline.generate", *CONFIG, "--limit", "4"]
RFT = ["pipeline.train", *CONFIG, "--stage", "rft", "--no-forecast"]
INSPECT = ["data_prep.inspect", "{box}/run/data"]
REPORT = ["eval.report", "--run", "{box}/run"]
FOLDERS: dict[str, tuple[str, Callable[[Path], Any], list[str], tuple[str, ...]]] = {
    "a sample is not JSON": ("generate/samples-00000.jsonl", lambda p: p.write_text("{"), VERIFY, ("samples-00000.jsonl",)),
    "a sample lacks its text": ("generate/samples-00000.jsonl", line(lambda r: r.pop("text")), VERIFY, ("samples-00000.jsonl",)),
    "a sample of another problem": ("generate/samples-00000.jsonl", line(lambda r: r.update(problem_id="x")), VERIFY, ("samples-00000.jsonl",)),
    "the samples are gone": ("generate/samples-00000.jsonl", lambda p: p.unlink(), VERIFY, ("samples-00000.jsonl",)),
    "a verdict is gone": ("verify/verdicts-00000.jsonl", lambda p: p.unlink(), RFT, ("verdicts-00000.jsonl",)),
    "a verdict of no kind": ("verify/verdicts-00000.jsonl", line(lambda r: r.update(outcome="maybe")), RFT, ("verdicts-00000.jsonl",)),
    "a problem lacks its answer": ("data/train.jsonl", line(lambda r: r.pop("answer")), GENERATE, ("train.jsonl",)),
    "a manifest is not JSON": ("sft/manifest.json", lambda p: p.write_text("{"), GENERATE, ("manifest.json",)),
    "figures are not JSON": ("eval-sft/embedded/figures.json", lambda p: p.write_text("{"), REPORT, ("figures.json",)),
    "figures are of another version": ("eval-sft/embedded/figures.json", lambda p: p.write_text('{"schema": 0}'), REPORT, ("figures.json",)),
    "a row of training is cut": ("data/train-00000-of-00001.arrow", lambda p: p.write_bytes(p.read_bytes()[:200]), INSPECT, ("train-00000",)),
    "the tokenizer of a stage is gone": ("data/tokenizer/tokenizer.json", lambda p: p.unlink(), INSPECT, ("tokenizer",)),
}  # fmt: skip


@pytest.mark.parametrize("case", FOLDERS)
def test_run_folders(case, box, monkeypatch, capsys):
    name, damage, words, expected = FOLDERS[case]
    damage(box / "run" / name)
    said = refused(box, words, monkeypatch, capsys)
    holds(said, expected)


def test_a_stage_that_runs_elsewhere_is_left_alone(box, monkeypatch, capsys):
    with (box / "run" / ".generate.lock").open("a+") as lock:
        lock.truncate(0)
        lock.write("4711")
        lock.flush()
        fcntl.flock(lock, fcntl.LOCK_EX)
        said = refused(box, GENERATE, monkeypatch, capsys)
    holds(said, ("running in process 4711", "wait for it"))


def test_what_a_library_cannot_fetch_is_no_error_of_the_disk(monkeypatch, capsys):
    def main(arguments):
        raise OSError("We couldn't connect to the hub to load nosuch/model.")

    monkeypatch.setattr(sys, "argv", ["x"])
    with pytest.raises(SystemExit) as end:
        command(main)
    said = capsys.readouterr().err
    assert end.value.code == 2
    assert said.startswith("error: We couldn't connect to the hub to load nosuch/model.\n")
    assert "operating system" not in said and "for the hub the connection" in said


def test_debug_shows_the_traceback(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["pipeline.run", "--config", str(tmp_path / "no"), "--debug"])
    with pytest.raises(UserError, match="no such file"):
        command(importlib.import_module("pipeline.run").main)


def test_there_are_many_cases():
    tables = (CONFIGURATIONS, FILES, COMMANDS, ROWS, SUITES, SCORES, MODELS, PLUGINS, FOLDERS)
    assert sum(map(len, tables)) >= 200
