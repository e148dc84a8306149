"""TensorBoard and W&B for real, without a network: every point once, also after a kill."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

from data_prep.build import build
from data_prep.config import validate
from data_prep.errors import UserError
from data_prep.jsonl import read_rows
from pipeline import train as train_module
from pipeline.config import TrainConfig
from pipeline.trackers import HISTOGRAM, Trackers
from pipeline.train import train

from .small_run import small_run

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


BLOCK = 32768


class Killed(Exception):
    pass


def stage(run, **changes) -> TrainConfig:
    grpo = next(s for s in run.train if s.name == "grpo")
    return validate(TrainConfig, {**grpo.model_dump(), **changes}, "grpo")


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    run = small_run(folder)
    build(run.data, Path(run.out), run.seed)
    train(run, next(s for s in run.train if s.name == "sft"))
    return folder


@pytest.fixture
def run(base, tmp_path):
    shutil.copytree(base / "run", tmp_path / "run")
    return small_run(tmp_path)


def expected(folder: Path) -> dict[str, dict[int, float]]:
    """Return the curves that the record holds."""
    found: dict[str, dict[int, float]] = {}
    for name in ("steps", "timing"):
        for _, row in read_rows(folder / f"{name}.jsonl"):
            for key, value in row.items():
                if key != "step" and isinstance(value, int | float):
                    found.setdefault(key, {})[row["step"]] = value
    return found


def of_tensorboard(out: Path) -> tuple[dict[str, list[tuple[int, float]]], list]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (file,) = (out / "tracking" / "tensorboard" / "grpo").iterdir()
    events = EventAccumulator(str(file), size_guidance={"scalars": 0, "histograms": 0})
    events.Reload()
    tags = events.Tags()["scalars"]
    curves = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in tags}
    return curves, events.Histograms(HISTOGRAM)


def of_wandb(out: Path) -> list[dict]:
    """Return the history rows in the file that `wandb sync` would upload."""
    from wandb.proto import wandb_internal_pb2

    (file,) = (out / "tracking" / "wandb" / "grpo").rglob("*.wandb")
    rows = []
    for data in logged(file.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            rows.append({i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in items})
    return rows


def logged(raw: bytes):
    """Yield the records of a file in LevelDB's log format, after W&B's header of 7 bytes."""
    place, parts = 7, b""
    while place + 7 <= len(raw):
        if BLOCK - place % BLOCK < 7:  # the rest of a block that no record's head fits into
            place += BLOCK - place % BLOCK
            continue
        length, kind = int.from_bytes(raw[place + 4 : place + 6], "little"), raw[place + 6]
        parts += raw[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            yield parts
            parts = b""


@pytest.mark.parametrize(
    ("kind", "killed"), [("tensorboard", False), ("tensorboard", True), ("wandb", True)]
)
def test_every_point_is_shown_once(run, monkeypatch, kind, killed):
    config = stage(run, trackers=[kind])
    if killed:
        original = train_module.Records.write

        def write(self, at, *rest):
            original(self, at, *rest)
            if at == 4:  # beyond the state of step 4: taken again
                raise Killed

        with monkeypatch.context() as patch:
            patch.setattr(train_module.Records, "write", write)
            with pytest.raises(Killed):
                train(run, config)
    folder = train(run, config)
    wanted = expected(folder)
    histograms = [r for _, r in read_rows(folder / "steps.jsonl") if HISTOGRAM in r]
    if kind == "tensorboard":
        curves, shown = of_tensorboard(Path(run.out))
        assert set(curves) == set(wanted)
        for key, points in curves.items():
            assert [step for step, _ in points] == sorted(wanted[key])
            assert dict(points) == pytest.approx(wanted[key], rel=1e-5)
        assert [h.step for h in shown] == [row["step"] for row in histograms]
        for one, row in zip(shown, histograms, strict=True):
            assert one.histogram_value.num == sum(row[HISTOGRAM])
        return
    rows = of_wandb(Path(run.out))
    assert [row["_step"] for row in rows] == list(range(config.steps))
    for row in rows:
        for key, points in wanted.items():
            assert row.get(key) == pytest.approx(points.get(row["_step"]))
    assert sum(HISTOGRAM in row or f"{HISTOGRAM}/bins" in row for row in rows) == len(histograms)


def test_a_tracker_changes_nothing_else(run):
    plain = train(run, stage(run, name="plain"))
    tracked = train(run, stage(run, name="tracked", trackers=["tensorboard"]))
    for name in ("steps.jsonl", "checkpoint/model.safetensors"):
        assert (plain / name).read_bytes() == (tracked / name).read_bytes()
    inode = (plain / "manifest.json").stat().st_ino
    again = train(run, stage(run, name="plain", trackers=["tensorboard"]))
    assert (again / "manifest.json").stat().st_ino == inode


@pytest.mark.parametrize("kind", ["tensorboard", "wandb"])
def test_a_missing_package_is_said_before_anything_is_made(run, monkeypatch, kind):
    monkeypatch.setitem(sys.modules, kind, None)
    with pytest.raises(UserError, match=r"pip install -e '\.\[trackers\]'"):
        train(run, stage(run, trackers=[kind]))
    assert not (Path(run.out) / "grpo.partial").exists()


def test_no_tracker_does_nothing(tmp_path):
    trackers = Trackers((), "offline", tmp_path, "run", "stage", {})
    trackers.begin([{"step": 0, "a": 1.0}])
    trackers.write({"step": 1, "a": 1.0})
    trackers.close()
    assert list(tmp_path.iterdir()) == []
