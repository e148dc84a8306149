"""A Ray cluster on this machine makes the same bytes, also when a worker is killed."""

from __future__ import annotations

import importlib.util
import itertools
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

import eval.evaluate
import pipeline.cluster
from data_prep.build import build
from data_prep.cluster import Cluster, ClusterConfig, require_room, start_with_room
from data_prep.errors import UserError
from data_prep.interruption import Interruption
from data_prep.manifest import VOLATILE
from pipeline.config import load_run
from pipeline.engines.embedded import Config as EmbeddedConfig
from pipeline.generate import generate
from pipeline.verify import verify

from .small_run import SMALL, write_small

TWO = "\n[cluster]\nworkers = 2\n"
with_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="ray is not installed (pip install -e '.[ray]')"
)


@pytest.fixture(autouse=True)
def _ray_leaves_sockets_open(recwarn):
    """What Ray itself leaves open is no warning of ours."""


def write_run(folder: Path, checkpoint: Path, count: int, cluster: str) -> Path:
    """A run that samples `count` problems from a model folder, and evaluates as many."""
    text = SMALL.replace("train = 60\n", f"train = {count}\n").replace(
        "test = 6\n", f"test = {count}\n"
    )
    text = text.replace("limit = 10\n", f'limit = 0\nmodel = "{checkpoint}"\n')
    text = text.replace(
        "group_size = 3\nshard_size = 4", f"group_size = 1\nshard_size = {count // 20}"
    )
    text = text.replace("n = 2\nk = [1, 2]", "n = 1\nk = [1]")
    text = text.replace("shard_size = 4\nbootstrap", f"shard_size = {count // 10}\nbootstrap")
    return write_small(folder, text=text + cluster)


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in VOLATILE
    }


def kill_a_worker(when: Path, killed: list[int]) -> None:
    """Kill one of Ray's workers of ours as soon as a file is there."""
    for _ in range(6000):
        if when.is_file():
            break
        time.sleep(0.01)
    for process in psutil.Process().children(recursive=True):
        if "_Worker" in " ".join(process.cmdline()):
            os.kill(process.pid, signal.SIGKILL)
            killed.append(process.pid)
            return


def evaluation(run, checkpoint: Path, out: Path) -> Path:
    from eval.evaluate import Job, evaluate
    from eval.run import _suites

    suites = _suites(run.evaluate, Path(run.out) / "data" / "test.jsonl")
    return evaluate(
        Job("tiny", checkpoint, "", run.evaluate, run.engine, run.seed, suites, out, run.cluster)
    )


def sampled(run) -> list[dict[str, bytes]]:
    """Build, generate and verify; return the files."""
    build(run.data, Path(run.out), run.seed)
    return [files_of(generate(run, run.generate)), files_of(verify(run, run.verify))]


def check(checkpoint: Path, tmp_path: Path, count: int, evaluates: bool) -> None:
    found = []
    killed: list[int] = []
    for name, cluster in (("one", ""), ("ray", TWO)):
        run = load_run(write_run(tmp_path / name, checkpoint, count, cluster))
        if cluster:
            first = Path(run.out) / "generate.partial" / "samples-00000.jsonl"
            thread = threading.Thread(target=kill_a_worker, args=(first, killed))
            thread.start()
        files = sampled(run)
        if evaluates:
            files.append(files_of(evaluation(run, checkpoint, Path(run.out))))
        found.append(files)
    thread.join()
    assert killed
    for ours, theirs in zip(*found, strict=True):
        assert ours.keys() == theirs.keys()
        assert [name for name in ours if ours[name] != theirs[name]] == []
    assert sum(len(v.splitlines()) for k, v in found[1][0].items() if "samples" in k) == count


@with_ray
@pytest.mark.slow
def test_two_thousand_prompts_are_the_same_bytes_with_a_worker_killed(checkpoint, tmp_path):
    """Generation, verification and evaluation."""
    check(checkpoint, tmp_path, 2000, evaluates=True)


def square_or_refuse(task: int) -> int:
    if task < 0:
        raise UserError("piece", f"{task} is negative", "a number from 0", "mend it")
    return task * task


def squares():
    return square_or_refuse


def dies_once(mark: Path):
    def run(task: int) -> int:
        if task == 3 and not mark.is_file():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return task * task

    return run


@with_ray
def test_pieces_come_back_whole_and_bad_input_is_itself(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    with Cluster(ClusterConfig(workers=2), squares) as cluster:
        # Ray's own would end at once what a stage finishes first.
        assert signal.getsignal(signal.SIGTERM) is before
        with (
            Cluster(ClusterConfig(workers=3), squares) as large,
            pytest.raises(UserError, match="3 workers with 1 CPU each, on 2 in all"),
        ):
            dict(large.map([1]))
        assert dict(cluster.map(range(20))) == {i: i * i for i in range(20)}
        with pytest.raises(UserError, match="-1 is negative"):
            dict(cluster.map([1, -1]))
        mark = tmp_path / "died"
        with Cluster(ClusterConfig(workers=2), partial(dies_once, mark), False) as other:
            assert dict(other.map(range(8))) == {i: i * i for i in range(8)}
        assert mark.is_file()


class Growing:
    """What `require_room` asks of Ray, of a cluster that has more each time it is asked."""

    def __init__(self) -> None:
        self.asked = 0

    def cluster_resources(self) -> dict[str, float]:
        self.asked += 1
        return {"CPU": 8.0, "GPU": self.asked - 1.0} if self.asked > 1 else {"CPU": 8.0}


def clock(monkeypatch: pytest.MonkeyPatch, times: Iterator[float], sleep=lambda seconds: None):
    """Give `data_prep.cluster` a clock of its own: the threads of others keep theirs."""
    own = SimpleNamespace(monotonic=lambda: next(times), sleep=sleep)
    monkeypatch.setattr("data_prep.cluster.time", own)


def test_a_cluster_that_grows_is_waited_for_as_long_as_it_says(monkeypatch, capsys):
    clock(monkeypatch, itertools.repeat(0.0))
    config = ClusterConfig(workers=2, gpus=1.0, address="auto", wait_s=60.0)
    ray = Growing()
    require_room(ray, config, 1.0)
    assert ray.asked == 3  # none, one, two GPUs
    said = capsys.readouterr().err
    assert said == "waiting up to 60 s for machines: 2 workers with 1 GPU each, on 0 in all\n"
    at_once = config.model_copy(update={"wait_s": 0.0})
    with pytest.raises(UserError, match=r"on 0 in all\n.*\n.*starts machines by itself set wait_s"):
        require_room(Growing(), at_once, 1.0)
    clock(monkeypatch, itertools.count(0.0, 59.0))
    with pytest.raises(UserError, match="on 1 in all, after 60 s"):
        require_room(Growing(), config, 1.0)
    require_room(Growing(), at_once, 0.0)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_wait_though_a_stage_holds_it_back(monkeypatch, capfd, number):
    waited = []

    def sleep(seconds: float) -> None:
        waited.append(seconds)
        if len(waited) == 3:
            os.kill(os.getpid(), number)

    clock(monkeypatch, itertools.count(0.0), sleep)
    config = ClusterConfig(workers=100, address="auto", wait_s=60.0)
    ray = SimpleNamespace(cluster_resources=lambda: {"CPU": 2.0})
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt), Interruption("shard") as interruption:
        require_room(ray, config, 0.0)
    assert interruption.asked and len(waited) == 3
    assert "stopping when this shard is complete" in capfd.readouterr().err
    # What another one was told before is past.
    assert signal.getsignal(number) is before
    with pytest.raises(UserError, match="after 60 s"), Interruption("shard"):
        require_room(ray, config, 0.0)


@pytest.mark.parametrize("address", ["", 'address = "local"\n'])
def test_a_ray_of_this_machine_alone_is_not_waited_for(tmp_path, address):
    text = SMALL + f"\n[cluster]\n{address}wait_s = 60.0\n"
    path = write_small(tmp_path, text=text)
    with pytest.raises(UserError, match=r"wait_s is 60 and address '.*no other joins it") as error:
        load_run(path)
    assert str(path) in str(error.value)
    assert "key 'cluster'" in str(error.value)
    path = write_small(tmp_path, text=SMALL + '\n[cluster]\naddress = "auto"\nwait_s = 60.0\n')
    assert load_run(path).cluster == ClusterConfig(address="auto", wait_s=60.0)


def test_workers_are_started_before_the_wait_and_not_before_a_refusal(monkeypatch):
    """Waiting workers are what a cluster grows for; one killed as it starts may keep a core."""
    clock(monkeypatch, itertools.repeat(0.0))
    ray, started = Growing(), []
    config = ClusterConfig(workers=2, gpus=1.0, address="auto")
    with pytest.raises(UserError, match="on 0 in all"):
        start_with_room(ray, config, 1.0, lambda: started.append(ray.asked))
    assert started == []
    ray = Growing()
    grows = config.model_copy(update={"wait_s": 60.0})
    start_with_room(ray, grows, 1.0, lambda: started.append(ray.asked))
    assert started == [0] and ray.asked == 3


def test_a_missing_ray_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"pip install -e '\.\[ray\]'"):
        Cluster(ClusterConfig(), squares)


@pytest.mark.parametrize("most", [1 << 30, 1000])
def test_workers_compute_with_what_the_plan_says(checkpoint, monkeypatch, most):
    """Left open, each worker would take what its own machine has."""
    monkeypatch.setattr("pipeline.engines._decoder.PACK_BYTES", most)
    made = []
    for module in (pipeline.cluster, eval.evaluate):
        monkeypatch.setattr(module, "ClusterEngine", lambda _, make: made.append(make))
    config, cluster = EmbeddedConfig(), ClusterConfig(workers=2)
    pipeline.cluster.engine_of(config, checkpoint, cluster)
    job = eval.evaluate.Job(
        "x", checkpoint, "", SimpleNamespace(tool_rounds=0), config, 0, (), checkpoint, cluster
    )
    eval.evaluate._LazyEngine(job).spread()
    expected = config.deciding(checkpoint).get("compiled", False)
    assert [made[0].args[0].compiled, made[1].args[0].engine.compiled] == [expected, expected]
    assert most > 1000 or not expected
