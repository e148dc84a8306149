"""The shipped configurations: all are read, none asks for nonsense, and each method has its two."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_prep.plugins import plugin_names
from pipeline.config import RunConfig, load_run
from pipeline.methods import create_method
from pipeline.plan import refuse_nonsense
from pipeline.study import load_study

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted([*ROOT.glob("pipeline/configs/*.toml"), *ROOT.glob("data_prep/configs/*.toml")])


def read(path: Path) -> RunConfig:
    if path.name == "study.toml":
        return load_study(path, None, ()).run
    return load_run(path)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_stage_of_a_shipped_configuration_makes_sense(path, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    run = read(path)
    assert run.train
    for stage in run.train:
        refuse_nonsense(run, stage, create_method(stage.method))


@pytest.mark.parametrize("name", ["methods_cpu", "methods_gpu"])
def test_every_method_has_a_full_configuration(name):
    run = read(ROOT / "pipeline" / "configs" / f"{name}.toml")
    assert {stage.method.kind for stage in run.train} == set(plugin_names("pipeline.methods"))
    assert {"process", "outcome"} == {
        getattr(stage.method, "supervision", "outcome") for stage in run.train
    }
    assert any(stage.iterations > 1 for stage in run.train)
