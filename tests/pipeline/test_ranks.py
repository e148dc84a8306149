"""Several processes train what one process trains, and go on from each other's states."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from data_prep.build import build
from data_prep.errors import UserError
from data_prep.jsonl import read_rows
from pipeline.batch import Sequence
from pipeline.config import load_run
from pipeline.generate import generate
from pipeline.launch import SIZES, open_ranks
from pipeline.ranks import ALONE, balanced
from pipeline.train import train
from pipeline.verify import verify

from .small_run import SMALL, write_small

ROOT = Path(__file__).resolve().parents[2]
MORE = """
[[train]]
name = "ppo"
init = "sft"
batch = 3
group_size = 4
steps = 10
save_every = 2
method = {{ kind = "ppo", beta = 0.02 }}

[[train]]
name = "ppo_separate"
init = "sft"
batch = 3
group_size = 4
steps = 10
save_every = 2
method = {{ kind = "ppo", beta = 0.02, kl = "k3", critic = "separate" }}

[[train]]
name = "judge"
init = "sft"
batch = 2
steps = 10
save_every = 4
method = {{ kind = "reward_model", data = "samples", epochs = 4 }}

[[train]]
name = "judged"
init = "sft"
batch = 3
group_size = 4
steps = 10
save_every = 2
iterations = 2
reward = {{ rule = 0.5, model = 1.0, model_init = "judge", retrain = 2, retrain_batch = 3 }}
method = {{ kind = "grpo", beta = 0.05 }}

[[train]]
name = "segments"
init = "sft"
batch = 3
group_size = 2
steps = 10
save_every = 2
method = {{ kind = "segment_rft", refresh = 2 }}

[[train]]
name = "ahead"
init = "sft"
batch = 3
group_size = 4
steps = 10
save_every = 2
staleness = 1
correction = {{ kind = "token" }}
method = {{ kind = "grpo" }}

[[train]]
name = "lora"
init = "sft"
batch = 3
group_size = 4
steps = 10
save_every = 2
lora = {{ rank = 4 }}
method = {{ kind = "grpo", beta = 0.05 }}
"""


def write_run(folder: Path) -> Path:
    """Return the configuration of a run in float64, ten steps a stage."""
    text = SMALL.replace("context = 96\n", 'context = 96\ndtype = "float64"\n')
    text = text.replace("steps = 8\n", "steps = 10\n").replace("steps = 6\n", "steps = 10\n")
    return write_small(folder, text=text + MORE)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with data, SFT, samples and verdicts, each made by one process."""
    folder = tmp_path_factory.mktemp("ranks") / "one"
    run = load_run(write_run(folder))
    assert run.data is not None
    build(run.data, Path(run.out), run.seed)
    train(run, run.train[0])
    assert run.generate is not None
    generate(run, run.generate)
    verify(run, run.verify)
    return folder


def copy_of(prepared: Path, folder: Path, *without: str) -> Path:
    """Return the configuration of a copy of the prepared run."""
    shutil.copytree(prepared / "run", folder / "run")
    for name in without:
        shutil.rmtree(folder / "run" / name)
    return write_run(folder)


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def job(config: Path, stage: str, parallel: str, stop: int = 0, interrupt: int = 0) -> dict:
    return {
        "config": str(config),
        "stage": stage,
        "parallel": parallel,
        "port": free_port(),
        "stop": stop,
        "interrupt": interrupt,
    }


def together(count: int, jobs: list[dict], folder: Path) -> None:
    """Run jobs in `count` processes."""
    path = folder / f"jobs-{count}.json"
    path.write_text(json.dumps(jobs), encoding="utf-8")
    shared = {
        **os.environ,
        "WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }
    driver = [sys.executable, str(ROOT / "tests/pipeline/ranks_driver.py"), str(path)]
    processes = []
    for rank in range(count):
        with (folder / f"rank-{rank}.log").open("w", encoding="utf-8") as log:
            processes.append(
                subprocess.Popen(
                    driver,
                    env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                    cwd=ROOT,
                    stdout=log,
                    stderr=log,
                )
            )
    try:
        codes = [process.wait(timeout=240) for process in processes]
    finally:
        for process in processes:
            process.kill()
    logs = [(folder / f"rank-{rank}.log").read_text() for rank in range(count)]
    assert codes == [0] * count, "\n".join(logs)[-6000:]
    assert "step/s" not in "".join(logs[1:])  # the others are silent


def weights_of(config: Path, stage: str, part: str = "checkpoint") -> dict[str, torch.Tensor]:
    return load_file(config.parent / "run" / stage / part / "model.safetensors")


# Reward models score in float32, and the rounding shows which samples were scored together.
SCORED = {"judged": 1e-7}


def assert_equal(one: Path, other: Path, stage: str) -> None:
    """Compare two runs' stages: parameters to 1e-10, figures to what they are written with."""
    atol = SCORED.get(stage, 1e-10)
    for part in ("checkpoint", "reward_model"):
        if not (one.parent / "run" / stage / part).is_dir():
            continue
        ours, theirs = weights_of(one, stage, part), weights_of(other, stage, part)
        assert set(ours) == set(theirs)
        for name, value in ours.items():
            assert value.dtype == (torch.float64 if part == "checkpoint" else torch.float32)
            torch.testing.assert_close(theirs[name], value, rtol=0.0, atol=atol)
    files = [path.parent / "run" / stage / "steps.jsonl" for path in (one, other)]
    rows = [[row for _, row in read_rows(file)] for file in files]
    assert len(rows[0]) == len(rows[1]) == 10
    for ours, theirs in zip(*rows, strict=True):
        assert set(ours) == set(theirs)
        for key, value in ours.items():
            # Sampler's float32 against the trainer's float64: differences of the last digits.
            slack = {"rel": 1e-5, "abs": 1e-6 if key.startswith("sampler_gap") else 1e-7}
            assert theirs[key] == pytest.approx(value, **slack), (key, ours["step"])


def alone(config: Path, stage: str) -> None:
    run = load_run(config)
    train(run, next(s for s in run.train if s.name == stage))


def test_two_processes_train_what_one_does(prepared, tmp_path):
    """SFT and GRPO under both kinds; then GRPO stopped in two processes goes on in one.

    It is killed, or one of them gets Ctrl-C while a state is saved: they stop together.
    """
    one = copy_of(prepared, tmp_path / "one")
    alone(one, "grpo")
    jobs, copies = [], {}
    for parallel in ("ddp", "fsdp2"):
        copies[parallel] = copy_of(prepared, tmp_path / parallel)
        shutil.rmtree(tmp_path / parallel / "run" / "sft")
        jobs += [job(copies[parallel], stage, parallel) for stage in ("sft", "grpo")]
    stopped = copy_of(prepared, tmp_path / "stopped")
    jobs.append(job(stopped, "grpo", "fsdp2", stop=4))
    interrupted = copy_of(prepared, tmp_path / "interrupted")
    jobs.append(job(interrupted, "grpo", "ddp", interrupt=4))
    together(2, jobs, tmp_path)
    for copied in copies.values():
        for stage in ("sft", "grpo"):
            assert_equal(one, copied, stage)
    for early in (stopped, interrupted):
        assert (early.parent / "run" / "grpo.partial" / "state" / "step-000004").is_dir()
        alone(early, "grpo")
        assert_equal(one, early, "grpo")


STAGES = ("sft", "rft", "dpo", "grpo", "ppo", "ppo_separate", "judge", "segments", "ahead")


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
@pytest.mark.parametrize("count", [2, 3])
def test_every_kind_of_stage(prepared, tmp_path, parallel, count):
    """Also with three processes, whose shares are never even."""
    one = copy_of(prepared, tmp_path / "one", "sft")
    other = copy_of(prepared, tmp_path / "other", "sft")
    stages = [*STAGES, "judged", *(["lora"] if parallel == "ddp" else [])]
    together(1, [job(one, stage, "ddp") for stage in stages], tmp_path)
    together(count, [job(other, stage, parallel) for stage in stages], tmp_path)
    for stage in stages:
        assert_equal(one, other, stage)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sft", "dpo", "grpo", "ppo", "ahead"])
def test_a_state_goes_on_with_other_numbers_of_processes(prepared, tmp_path, stage):
    """2 → 1, 2 → 4, and 4 split → 2 whole, all as if one had never stopped."""
    without = ["sft"] if stage == "sft" else []
    one = copy_of(prepared, tmp_path / "one", *without)
    alone(one, stage)
    for first, kind, then, other_kind in (
        (2, "ddp", 1, "ddp"),
        (2, "fsdp2", 4, "fsdp2"),
        (4, "fsdp2", 2, "ddp"),
        (2, "ddp", 4, "ddp"),
    ):
        copied = copy_of(prepared, tmp_path / f"{first}-{kind}-{then}", *without)
        together(first, [job(copied, stage, kind, stop=6 if stage == "sft" else 4)], tmp_path)
        together(then, [job(copied, stage, other_kind)], tmp_path)
        assert_equal(one, copied, stage)


def launch(words: list[str], config: Path, *more: str, **keys) -> subprocess.Popen:
    stage = ["-m", "pipeline.train", "--config", str(config), *more]
    return subprocess.Popen(
        [sys.executable, "-m", *words, *stage],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        **keys,
    )


TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        TORCHRUN,
        ["accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1"],
    ],
)
def test_launchers(prepared, tmp_path, words):
    one = copy_of(prepared, tmp_path / "one")
    other = copy_of(prepared, tmp_path / "other", "sft")
    if "accelerate" in words[0]:
        words = [*words, "--main_process_port", str(free_port()), "--mixed_precision", "no"]
        words = [*words, "--dynamo_backend", "no", "--num_cpu_threads_per_process", "1"]
    process = launch(words, other, "--stage", "sft")
    _, said = process.communicate(timeout=200)
    assert process.returncode == 0, said
    assert said.count("checkpoint: ") == 1
    assert_equal(one, other, "sft")


@pytest.mark.slow
def test_one_message_where_all_meet_bad_input(prepared, tmp_path):
    config = copy_of(prepared, tmp_path / "bad", "generate")
    process = launch(TORCHRUN, config, "--stage", "rft")
    _, said = process.communicate(timeout=200)
    assert process.returncode
    assert said.count("error: ") == 1
    assert said.count("no such file or stage folder") == 1
    assert "interrupted" not in said


@pytest.mark.slow
def test_one_message_where_one_process_meets_a_number_that_is_not_finite(prepared, tmp_path):
    config = copy_of(prepared, tmp_path / "bad")
    text = config.read_text().replace(
        'method = { kind = "dpo" }',
        'method = { kind = "dpo" }\n'
        "optimizer = { learning_rate = 1e200, warmup_steps = 0, clip_norm = 0 }",
        1,
    )
    config.write_text(text)
    process = launch(TORCHRUN, config, "--stage", "dpo")
    _, said = process.communicate(timeout=200)
    assert process.returncode
    assert said.count("error: ") == 1
    assert "the batch is kept in" in said
    assert "interrupted" not in said


@pytest.mark.slow
def test_one_message_on_an_interrupt_and_the_run_goes_on(prepared, tmp_path):
    one = copy_of(prepared, tmp_path / "one")
    alone(one, "grpo")
    config = copy_of(prepared, tmp_path / "other")
    process = launch(TORCHRUN, config, "--stage", "grpo", start_new_session=True)
    state = tmp_path / "other" / "run" / "grpo.partial" / "state" / "step-000002"
    for _ in range(3000):
        if state.is_dir():
            break
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does on Ctrl-C
    _, said = process.communicate(timeout=200)
    assert process.returncode
    assert said.count("interrupted: what was complete is kept") == 1, said
    alone(config, "grpo")
    assert_equal(one, config, "grpo")


def test_shares_are_whole_documents_of_nearly_equal_length():
    sequences = [
        Sequence([1] * 5, [2] * (3 + 7 * i % 11), [True] * (3 + 7 * i % 11), i // 4)
        for i in range(40)
    ]
    for count in (1, 2, 3, 7):
        shares = balanced(sequences, count)
        assert sorted(i for share in shares for i in share) == list(range(40))
        for group in range(10):  # a group stays together
            assert sum(any(sequences[i].group == group for i in s) for s in shares) == 1
        loads = [
            sum(len(sequences[i].completion) for i in share)
            + 5 * len({sequences[i].group for i in share})
            for share in shares
        ]
        longest = 5 + 4 * 13
        assert max(loads) - min(loads) <= longest
    assert balanced(sequences[:4], 3)[1:] == [[], []]


def test_one_process_is_nobody_to_split_a_model_with():
    device = torch.device("cpu")
    assert open_ranks("auto", device) is ALONE
    with pytest.raises(UserError, match="accelerate launch"):
        open_ranks("fsdp2", device)


@pytest.mark.parametrize(
    ("environment", "refused"),
    [
        ({"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "1"}, "4 processes that mpirun"),
        ({"PMI_SIZE": "2", "PMI_RANK": "0"}, "2 processes that mpiexec"),
        ({"SLURM_STEP_NUM_TASKS": "8", "SLURM_NTASKS": "8", "SLURM_PROCID": "3"}, "8 .* srun"),
        ({"SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, ""),
        # A batch script, and a shell in an allocation, of eight tasks: one process.
        ({"SLURM_NTASKS": "8", "SLURM_PROCID": "0"}, ""),
        ({"SLURM_NTASKS": "8"}, ""),
        # One process of mpirun's in a step of srun's, which starts one on each machine.
        ({"OMPI_COMM_WORLD_SIZE": "1", "SLURM_STEP_NUM_TASKS": "2"}, ""),
        ({"OMPI_COMM_WORLD_SIZE": "4", "WORLD_SIZE": "1"}, ""),
        ({"PMI_SIZE": ""}, ""),
    ],
)
def test_one_of_several_without_a_rank_does_not_train_alone(monkeypatch, environment, refused):
    for name in ("WORLD_SIZE", *SIZES):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if not refused:
        assert open_ranks("auto", torch.device("cpu")) is ALONE
        return
    with pytest.raises(UserError, match=refused) as error:
        open_ranks("auto", torch.device("cpu"))
    assert "torchrun" in error.value.fix


def test_several_processes_do_not_share_a_gpu_that_the_configuration_names(monkeypatch):
    monkeypatch.setattr("pipeline.launch.meet", lambda: True)
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    with pytest.raises(UserError, match=r"'cuda:0' with 2 processes") as error:
        open_ranks("ddp", torch.device("cuda:0"))
    assert "engine.device" in str(error.value)


def test_a_stage_that_one_of_several_begins_ends_before_it_writes(tmp_path, root):
    config = write_small(tmp_path)
    found = subprocess.run(
        [sys.executable, "-m", "pipeline.train", "--config", str(config), "--stage", "sft"],
        cwd=root,
        env={**os.environ, "OMPI_COMM_WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert found.returncode == 2
    assert "OMPI_COMM_WORLD_SIZE" in found.stderr
    assert "Traceback" not in found.stderr
    assert not (tmp_path / "run").exists()
