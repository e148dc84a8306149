"""Batches ahead of training: which weights draw what, exact resume, and what it says of itself."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path

import pytest
import torch

from data_prep.build import build
from data_prep.config import validate
from data_prep.errors import UserError
from data_prep.jsonl import read_rows
from data_prep.manifest import read_manifest
from pipeline.ahead import Ahead
from pipeline.batch import Sequence
from pipeline.config import TrainConfig
from pipeline.train import train
from pipeline.trainer import Trainer

from .small_run import small_run


class Engine:
    """Remembers which weights it holds."""

    policy_version = 0

    def __init__(self):
        self.value = -1.0

    def load_weights(self, weights, version):
        ((_, tensor),) = weights
        self.policy_version, self.value = version, float(tensor)


class Run:
    """A training loop without training: the weights are the number of steps taken."""

    def __init__(self, folder: Path, staleness: int, total: int, start: int = 0):
        self.engine, self.weights = Engine(), torch.tensor(float(start))
        self.drawn: list[tuple[int, float, int]] = []
        self.start, self.total = start, total
        self.ahead = Ahead(self._draw, self.engine, staleness, start, total, folder)  # type: ignore[arg-type]
        self.publish(start)

    def publish(self, version):
        self.ahead.publish([("w", self.weights)], version)

    def _draw(self, step):
        version = self.engine.policy_version
        self.drawn.append((step, self.engine.value, version))
        lag = step - version
        sequence = Sequence([1], [2, 3], [True, True], 0, 0.5, True, 0.25, [-0.1, -1 / 3], text="é")
        sequence.staleness = lag
        return [sequence], {"reward_mean": 1 / 3, "lag": lag}

    def step(self, step):
        batch = self.ahead.draw(step)
        self.weights += 1.0  # in place, as an optimizer does
        self.publish(step + 1)
        return batch

    def lags(self):
        return [self.step(step)[0][0].staleness for step in range(self.start, self.total)]


@pytest.mark.parametrize("staleness", [0, 1, 2, 5])
def test_a_batch_is_drawn_by_the_weights_that_the_bound_names(tmp_path, staleness):
    run = Run(tmp_path, staleness, 8)
    assert run.lags() == [min(step, staleness) for step in range(8)]
    run.ahead.close()
    # The values are those of that version: a copy was handed over, not the live parameters.
    assert run.drawn == [
        (step, float(max(0, step - staleness)), max(0, step - staleness)) for step in range(8)
    ]


def test_the_thread_draws_on_the_gpu_and_the_stream_of_who_trains(tmp_path, monkeypatch):
    """A thread begins on the first GPU, where a second process's engine is not."""
    stream, used = object(), []
    monkeypatch.setattr("torch.cuda.is_initialized", lambda: True)
    monkeypatch.setattr("torch.cuda.current_stream", lambda: stream)
    monkeypatch.setattr(
        "torch.cuda.set_stream", lambda s: used.append((threading.current_thread().name, s))
    )
    run = Run(tmp_path, 1, 3)
    run.lags()
    run.ahead.close()
    assert used == [("rollouts", stream)]


class OnGpu:
    """A value on a GPU, and what is asked of it."""

    def __init__(self, asked):
        self.asked = asked

    def detach(self):
        return self

    def to(self, *words, **options):
        self.asked.append((words, options))
        return torch.tensor(0.0)


@pytest.mark.parametrize("takes", [True, False])
def test_weights_wait_in_main_memory_with_who_needs_them(tmp_path, takes):
    """On a GPU each copy would be a second model; who has no engine gathers and keeps nothing."""
    asked, gathered = [], []

    class Ranked(Engine):
        takes_weights = takes

        def load_weights(self, weights, version):
            self.got = dict(weights)

    def weights():
        yield "w", OnGpu(asked)
        gathered.append("w")

    engine = Ranked()
    ahead = Ahead(lambda step: ([], {}), engine, 1, 0, 2, tmp_path)  # type: ignore[arg-type]
    ahead.publish(weights(), 0)
    ahead.draw(0)
    ahead.close()
    assert gathered == ["w"]
    assert asked == ([(("cpu",), {"copy": True})] if takes else [])
    assert list(engine.got) == (["w"] if takes else [])


def test_generation_goes_on_while_a_step_is_trained(tmp_path):
    """With staleness 1 the batch of step 1 is drawn before step 0 ends, and step 2's is not."""
    run = Run(tmp_path, 1, 4)
    run.ahead.draw(0)
    run.ahead._batches[1].result(timeout=10)
    assert [step for step, *_ in run.drawn] == [0, 1]
    assert not run.ahead._batches[2].done()
    run.ahead.close()


@pytest.mark.parametrize("staleness", [1, 2, 3])
@pytest.mark.parametrize("cut", [1, 4])
def test_a_run_taken_up_again_reads_the_batches_whose_weights_are_gone(tmp_path, staleness, cut):
    whole = Run(tmp_path / "whole", staleness, 7)
    expected = [whole.step(step) for step in range(7)]
    whole.ahead.close()
    first = Run(tmp_path / "cut", staleness, 7)
    found = [first.step(step) for step in range(cut)]
    first.ahead.keep(cut)  # a state of `cut` steps is saved here
    first.ahead.drop(cut)
    first.ahead.close()
    second = Run(tmp_path / "cut", staleness, 7, start=cut)
    found += [second.step(step) for step in range(cut, 7)]
    second.ahead.close()
    assert found == expected
    assert [step for step, *_ in second.drawn] == list(range(cut + staleness, 7))


def test_an_error_while_drawing_reaches_the_loop(tmp_path):
    run = Run(tmp_path, 1, 4)
    run.ahead._draw = lambda step: 1 / 0
    with pytest.raises(ZeroDivisionError):
        for step in range(4):
            run.step(step)
    run.ahead.close()


def test_closing_does_not_wait_for_more_than_the_batch_in_hand(tmp_path):
    gate, entered = threading.Event(), threading.Event()
    engine = Engine()

    def draw(step):
        entered.set()
        gate.wait(10)
        return [], {}

    ahead = Ahead(draw, engine, 3, 0, 9, tmp_path)  # type: ignore[arg-type]
    ahead.publish([("w", torch.zeros(()))], 0)
    entered.wait(10)
    closing = threading.Thread(target=ahead.close)
    closing.start()
    while not ahead._stopped:
        pass
    gate.set()
    closing.join(10)
    assert not closing.is_alive()
    first, second = list(ahead._batches.values())[:2]
    assert first.result() == ([], {})
    assert "a process has stopped" in str(second.exception())


# With the real loop, engine and verifiers.


def test_processes_that_draw_together_stop_at_the_same_batch(tmp_path):
    """One that is told to stop while another has begun the next batch leaves none waiting."""
    meet = threading.Barrier(2, timeout=10.0)
    flags, told = [False, False], threading.Event()

    def gather(place, flag):
        flags[place] = flag
        meet.wait()
        found = any(flags)
        meet.wait()
        return found

    def drawing(place):
        def draw(step):
            gather(place, False)  # as sampling gathers everybody's share
            if step == 1 and place == 0:
                told.wait(10.0)
            drawn[place].append(step)
            return [], {}

        return draw

    drawn: list[list[int]] = [[], []]
    together = [
        Ahead(
            drawing(place),
            Engine(),  # type: ignore[arg-type]
            3,
            0,
            9,
            tmp_path / str(place),
            any_of_us=lambda flag, place=place: gather(place, flag),
        )
        for place in range(2)
    ]
    for ahead in together:
        ahead.publish([("w", torch.tensor(0.0))], 0)
    together[1].draw(1)  # the second process is on its way to batch 2
    closing = threading.Thread(target=together[0].close)
    closing.start()
    while not together[0]._stopped:
        pass
    told.set()
    with pytest.raises(RuntimeError, match="a process has stopped"):
        together[1].draw(2)
    closing.join(10.0)
    together[1].close()
    assert drawn == [[0, 1], [0, 1]]
    assert not meet.broken


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ahead")
    run = small_run(folder)
    build(run.data, Path(run.out), run.seed)
    train(run, run.train[0])
    return folder


@pytest.fixture
def run(base, tmp_path):
    shutil.copytree(base / "run", tmp_path / "run")
    return small_run(tmp_path)


def stage(run, **changes):
    grpo = next(s for s in run.train if s.name == "grpo").model_dump()
    changes = {"staleness": 1, "correction": {"kind": "token"}, **changes}
    return validate(TrainConfig, {**grpo, **changes}, "grpo")


class Killed(Exception):
    pass


@pytest.mark.parametrize("staleness", [1, 3])
@pytest.mark.parametrize("at", [1, 2, 3, 5])
def test_a_killed_stage_ends_with_the_same_bits(run, base, tmp_path, monkeypatch, staleness, at):
    config = stage(run, staleness=staleness)
    folder = train(run, config)
    whole = {p.name: p.read_bytes() for p in folder.iterdir() if p.suffix == ".jsonl"}
    weights = (folder / "checkpoint" / "model.safetensors").read_bytes()
    logs = {p.name: p.read_bytes() for p in (folder / "rollouts").iterdir()}
    shutil.rmtree(folder)

    update = Trainer.update

    def failing(self, sequences, step, total, place=None):
        if step == at:
            raise Killed
        return update(self, sequences, step, total, place)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "update", failing)
        with pytest.raises(Killed):
            train(run, config)
    folder = train(run, config)
    assert (folder / "checkpoint" / "model.safetensors").read_bytes() == weights
    assert (folder / "steps.jsonl").read_bytes() == whole["steps.jsonl"]
    assert {p.name: p.read_bytes() for p in (folder / "rollouts").iterdir()} == logs
    assert not (folder / "state").exists()


def test_staleness_is_logged_for_each_sample_and_step(run):
    folder = train(run, stage(run, staleness=2))
    for number, row in read_rows(folder / "steps.jsonl"):
        step = number - 1
        lag = min(step, 2)
        if row["signal_share"]:
            assert row["staleness_mean"] == row["staleness_max"] == lag
        for _, sample in read_rows(folder / "rollouts" / f"step-{step:05d}.jsonl"):
            assert sample["policy_version"] == step - lag
            assert sample["staleness"] == lag


def test_what_a_spent_budget_leaves_over_is_not_among_the_results(run):
    """Two steps of twelve samples are taken, and the batches of two more lie ready."""
    config = stage(run, staleness=2, sample_budget=13, save_every=1)
    folder = train(run, config)
    taken = [row for _, row in read_rows(folder / "steps.jsonl")]
    assert [(row["step"], row["samples"]) for row in taken] == [(0, 12), (1, 12)]
    logs = [f"step-{step:05d}.jsonl" for step in range(2)]
    assert sorted(p.name for p in (folder / "rollouts").iterdir()) == logs
    outputs = read_manifest(folder)["outputs"]
    assert sorted(name for name in outputs if name.startswith("rollouts/")) == [
        f"rollouts/{name}" for name in logs
    ]


def test_the_correction_weighs_by_what_the_policy_has_moved(run):
    """Stale samples: log π_old − log π_sampler is no longer rounding, and the weights show it."""
    fresh, stale = (
        [row for _, row in read_rows(train(run, stage(run, staleness=s)) / "steps.jsonl")]
        for s in (0, 2)
    )
    assert max(row["sampler_gap_mean"] for row in fresh if "sampler_gap_mean" in row) < 1e-4
    assert max(row["sampler_gap_mean"] for row in stale if "sampler_gap_mean" in row) > 1e-3
    # The first batch is the same either way.
    assert fresh[0]["grad_norm"] == stale[0]["grad_norm"]


def test_nonsense_is_refused(run):
    with pytest.raises(UserError, match="without a correction"):
        train(run, stage(run, correction={"kind": "off"}))
    rft = next(s for s in run.train if s.name == "rft").model_dump()
    with pytest.raises(UserError, match="does not sample"):
        train(run, validate(TrainConfig, {**rft, "staleness": 1}, "rft"))
