"""The order of stages, and what a user who got something wrong is told."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from data_prep.build import main as build_main
from data_prep.errors import UserError
from pipeline.config import load_run
from pipeline.generate import main as generate_main
from pipeline.run import stages_of
from pipeline.train import main as train_main
from pipeline.verify import main as verify_main

from .small_run import SMALL, small_run, write_small


def names(run) -> list[str]:
    return [name for name, _ in stages_of(run)]


def test_stages_come_in_the_order_of_their_inputs(tmp_path):
    run = small_run(tmp_path)
    expected = ["data", "sft", "generate", "verify", "rft", "dpo", "grpo", "evaluate", "report"]
    assert names(run) == expected
    backwards = run.model_copy(update={"train": run.train[::-1]})
    order = names(backwards)
    assert order.index("sft") < order.index("generate") < order.index("rft")
    assert order[-2:] == ["evaluate", "report"]


def test_a_stage_that_waits_for_nothing_that_comes_is_named(tmp_path):
    run = small_run(tmp_path)
    with pytest.raises(UserError, match=r"'rft'.*waits for verify"):
        stages_of(run.model_copy(update={"generate": None}))


def call(root: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *words],
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=240,
    )


WRONG = {
    "unknown key": ('name = "small"', 'name = "small"\nsede = 3', ["sede", "did you mean 'seed'"]),
    "unknown nested key": (
        "vocab_size = 288",
        "vocab_sise = 288",
        ["data.tokenizer.vocab_sise", "did you mean 'vocab_size'"],
    ),
    "unknown key of a method": (
        'kind = "grpo", updates = 2',
        'kind = "grpo", clip_hihg = 0.3',
        ["'grpo', key 'clip_hihg'", "did you mean 'clip_high'"],
    ),
    "unknown method": (
        'kind = "grpo", updates = 2, beta = 0.05',
        'kind = "grop"',
        ["unknown kind 'grop'", "did you mean 'grpo'", "dpo, dr_grpo, grft, grpo"],
    ),
    "unknown source": (
        'kind = "embedded"\ntrain',
        'kind = "embeded"\ntrain',
        ["unknown kind 'embeded'", "did you mean 'embedded'", "gsm8k"],
    ),
    "out of range": ("bootstrap = 100", "bootstrap = 3", ["evaluate.bootstrap", "100", "found 3"]),
    "wrong type": ("limit = 10", 'limit = "ten"', ["generate.limit", "'ten'"]),
    "k above n": ("k = [1, 2]", "k = [1, 4]", ["between 1 and n = 2", "[1, 4]"]),
    "not TOML": ("[model]", "[model", ["not TOML", "line"]),
    "unknown init": (
        'name = "rft"\ninit = "sft"',
        'name = "rft"\ninit = "sftt"',
        ["init of stage 'rft'", "did you mean 'sft'", "sft, rft, dpo, grpo"],
    ),
    "unknown model to sample from": (
        "[generate]\n",
        '[generate]\nmodel = "sfft"\n',
        ["generate.model", "did you mean 'sft'"],
    ),
    "no inner updates": ("updates = 2", "updates = 0", ["updates", "greater than or equal to 1"]),
    "two stages of one name": ('name = "dpo"', 'name = "rft"', ["share a name"]),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_configuration_is_answered_with_the_key_and_the_mend(tmp_path, case):
    old, new, expected = WRONG[case]
    assert old in SMALL
    path = write_small(tmp_path, text=SMALL.replace(old, new, 1))
    with pytest.raises(UserError) as caught:
        stages_of(load_run(path))
    message = str(caught.value)
    assert "small.toml" in message or "key" in message
    for part in expected:
        assert part in message, message


def test_a_missing_configuration_and_a_missing_stage(root, tmp_path):
    gone = call(root, "pipeline.run", "--config", str(tmp_path / "none.toml"))
    assert gone.returncode == 2
    assert "none.toml: no such file" in gone.stderr
    assert "Traceback" not in gone.stderr
    path = write_small(tmp_path)
    early = call(root, "pipeline.train", "--config", str(path), "--stage", "rft")
    assert early.returncode == 2
    assert "run the stage that makes it first" in early.stderr
    assert not (tmp_path / "run").exists()
    wrong = call(root, "pipeline.train", "--config", str(path), "--stage", "grop")
    assert "one of sft, rft, dpo, grpo" in wrong.stderr


def test_overrides_reach_the_method_and_dry_runs_write_nothing(root, tmp_path):
    path = write_small(tmp_path)
    shown = call(
        root,
        "pipeline.train",
        "--config",
        str(path),
        "--stage",
        "grpo",
        "--method.clip-high",
        "0.28",
        "--batch",
        "5",
        "--dry-run",
    )
    assert shown.returncode == 0, shown.stderr
    assert '"clip_high": 0.28' in shown.stdout
    assert '"batch": 5' in shown.stdout
    whole = call(root, "pipeline.run", "--config", str(path), "--seed", "9", "--dry-run")
    assert whole.returncode == 0, whole.stderr
    assert "seed = 9" in whole.stdout
    assert not (tmp_path / "run").exists()
    bad = call(
        root,
        "pipeline.train",
        "--config",
        str(path),
        "--stage",
        "grpo",
        "--method.clip-low",
        "7",
        "--dry-run",
    )
    assert bad.returncode == 2
    assert "clip_low" in bad.stderr


def test_another_kind_on_the_command_line_has_its_own_defaults(tmp_path, capsys):
    """As if the file named it: what the file says stays, what it does not say is DAPO's."""
    path = write_small(tmp_path)
    words = ["--config", str(path), "--stage", "grpo", "--method.kind", "dapo", "--dry-run"]
    train_main([*words, "--no-forecast"])
    shown = json.loads(capsys.readouterr().out)["method"]
    assert (shown["kind"], shown["updates"], shown["beta"]) == ("dapo", 2, 0.05)
    assert (shown["clip_high"], shown["normaliser"]) == (0.28, "token")
    # Also what GRPO would have by itself, where it is said.
    for value, form in ((0.25, ["--method.clip-high", "0.25"]), (0.2, ["--method.clip_high=0.2"])):
        train_main([*words, *form, "--no-forecast"])
        assert json.loads(capsys.readouterr().out)["method"]["clip_high"] == value


def test_help_says_how_keys_are_overridden(capsys):
    for main, words in (
        (train_main, "Any key of the stage can be overridden, such as --optimizer.learning-rate"),
        (generate_main, "Any key of [generate] can be overridden, such as --group-size 4"),
        (verify_main, "Any key of [verify] can be overridden, such as --workers 4"),
        (build_main, "Any key of [data] can be overridden, such as --tokenizer.vocab-size 512"),
    ):
        with pytest.raises(SystemExit):
            main(["--help"])
        said = " ".join(capsys.readouterr().out.split())
        assert words in said
        assert "--dry-run shows all of them" in said


@pytest.mark.parametrize("module", ["pipeline.train", "eval.score", "data_prep.build"])
def test_a_python_without_the_libraries_is_told_where_they_are(root, module):
    # Without site-packages: the Python of someone who has not activated the environment.
    bare = [sys.executable, "-S", "-m", module, "--help"]
    found = subprocess.run(bare, cwd=root, capture_output=True, text=True, check=False)
    last = found.stderr.splitlines()[-1]
    assert "has not the libraries" in last
    assert "make setup" in last and "source .venv/bin/activate" in last


def test_debug_shows_the_traceback(root, tmp_path):
    shown = call(root, "pipeline.run", "--config", str(tmp_path / "none.toml"), "--debug")
    assert "Traceback" in shown.stderr


def test_a_wrong_checker_is_found_before_anything_runs(root, tmp_path):
    text = SMALL.replace('checker = {{ kind = "{checker}" }}', 'checker = {{ kind = "boxd" }}', 1)
    path = write_small(tmp_path, text=text)
    shown = call(root, "pipeline.run", "--config", str(path), "--dry-run")
    assert shown.returncode == 2
    assert "verify.checker" in shown.stderr
    assert "boxed" in shown.stderr


def test_a_run_folder_that_cannot_be_written_is_a_message(root, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("not a folder", encoding="utf-8")
    path = write_small(tmp_path)
    shown = call(root, "pipeline.run", "--config", str(path), "--out", str(blocked / "run"))
    assert shown.returncode == 2
    assert "Traceback" not in shown.stderr
    assert "file" in shown.stderr
