"""The stages on a tiny run: what they write, that they skip, and that they go on exactly."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.torch import load_file

from data_prep.build import build
from data_prep.errors import UserError
from data_prep.jsonl import read_rows, write_rows
from pipeline import generate as generate_module
from pipeline import train as train_module
from pipeline.config import RunConfig
from pipeline.fixed import read_log
from pipeline.generate import generate
from pipeline.model import load_tokenizer
from pipeline.samples import read_samples
from pipeline.state import load_state
from pipeline.train import train
from pipeline.verify import verify

from .small_run import small_run, write_small


def stage(run: RunConfig, name: str):
    return next(s for s in run.train if s.name == name)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """Data, SFT, samples and verdicts."""
    folder = tmp_path_factory.mktemp("base")
    run = small_run(folder)
    out = Path(run.out)
    build(run.data, out, run.seed)
    train(run, stage(run, "sft"))
    assert run.generate is not None
    generate(run, run.generate)
    verify(run, run.verify)
    return folder


@pytest.fixture
def run(base, tmp_path) -> RunConfig:
    """A copy of the base run that a test may change."""
    shutil.copytree(base / "run", tmp_path / "run")
    return small_run(tmp_path)


def weights(folder: Path) -> bytes:
    return (folder / "checkpoint" / "model.safetensors").read_bytes()


class Killed(Exception):
    pass


def interrupt_at(monkeypatch, step: int) -> None:
    """Let the process die right before a step's record is written."""
    original = train_module.Records.write

    def write(self, at, *rest):
        if at == step:
            raise Killed
        original(self, at, *rest)

    monkeypatch.setattr(train_module.Records, "write", write)


@pytest.mark.parametrize("name", ["sft", "rft", "dpo", "grpo"])
def test_an_interrupted_training_ends_bit_for_bit_the_same(run, monkeypatch, tmp_path, name):
    if name == "sft":
        shutil.rmtree(Path(run.out) / "sft")
    config = stage(run, name)
    whole = tmp_path / "whole"
    shutil.copytree(run.out, whole)
    expected = train(run.model_copy(update={"out": str(whole)}), config)
    with monkeypatch.context() as patch:
        interrupt_at(patch, config.steps - 1)
        with pytest.raises(Killed):
            train(run, config)
    partial = Path(run.out) / f"{name}.partial"
    assert not (Path(run.out) / name).exists()
    assert list((partial / "state").glob("step-*"))
    found = train(run, config)
    assert weights(found) == weights(expected)
    assert (found / "steps.jsonl").read_bytes() == (expected / "steps.jsonl").read_bytes()
    steps = [row["step"] for _, row in read_rows(found / "steps.jsonl")]
    assert steps == list(range(config.steps))
    assert weights(found) != weights(Path(run.out) / "sft") or name == "sft"


def test_a_damaged_state_gives_way_to_the_one_before(run, monkeypatch):
    config = stage(run, "rft")
    with monkeypatch.context() as patch:
        interrupt_at(patch, 5)
        with pytest.raises(Killed):
            train(run, config)
    states = sorted((Path(run.out) / "rft.partial" / "state").glob("step-*"))
    assert [s.name for s in states] == ["step-000002", "step-000004"]
    file = states[-1] / "state.safetensors"
    damaged = bytearray(file.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    file.write_bytes(damaged)
    train(run, config)
    steps = [row["step"] for _, row in read_rows(Path(run.out) / "rft" / "steps.jsonl")]
    assert steps == list(range(6))


def test_when_every_state_is_damaged_it_says_so(run, monkeypatch):
    config = stage(run, "rft")
    with monkeypatch.context() as patch:
        interrupt_at(patch, 5)
        with pytest.raises(Killed):
            train(run, config)
    for file in (Path(run.out) / "rft.partial" / "state").glob("step-*/state.safetensors"):
        file.write_bytes(b"nothing")
    with pytest.raises(UserError, match="damaged"):
        train(run, config)


def test_no_state_is_step_zero(tmp_path, checkpoint):
    from pipeline.config import OptimizerConfig
    from pipeline.model import load_model
    from pipeline.optimizer import build_optimizer

    model = load_model(checkpoint)
    assert load_state(tmp_path, model, build_optimizer(model, OptimizerConfig())) == 0


def test_complete_stages_are_skipped_and_changed_ones_made_again(run, monkeypatch):
    config = stage(run, "rft")
    first = train(run, config)
    inode = (first / "manifest.json").stat().st_ino
    assert (train(run, config) / "manifest.json").stat().st_ino == inode
    changed = config.model_copy(update={"batch": 3})
    assert (train(run, changed) / "manifest.json").stat().st_ino != inode


def test_generation_repeats_nothing_that_was_completed(run, monkeypatch):
    out = Path(run.out)
    expected = {p.name: p.read_bytes() for p in (out / "generate").glob("*.jsonl")}
    shutil.rmtree(out / "generate")
    calls: list[int] = []
    create = generate_module.create_engine

    def counting(config, model):
        engine = create(config, model)
        original = engine.generate

        def generate_and_count(prompts, sampling):
            calls.append(len(prompts))
            if len(calls) == 3:
                raise Killed
            return original(prompts, sampling)

        engine.generate = generate_and_count
        return engine

    monkeypatch.setattr(generate_module, "create_engine", counting)
    assert run.generate is not None
    with pytest.raises(Killed):
        generate(run, run.generate)
    assert calls == [4, 4, 2]
    generate(run, run.generate)
    assert calls == [4, 4, 2, 2]
    assert {p.name: p.read_bytes() for p in (out / "generate").glob("*.jsonl")} == expected


def test_the_sample_log_holds_what_it_promises(run):
    out = Path(run.out)
    samples = [s for p in sorted((out / "generate").glob("samples-*")) for s in read_samples(p)]
    assert [(s.problem_id, s.sample_index) for s in samples[:4]] == [
        ("embedded-train-000000", 0),
        ("embedded-train-000000", 1),
        ("embedded-train-000000", 2),
        ("embedded-train-000001", 0),
    ]
    assert len(samples) == 30
    assert len({s.seed for s in samples}) == 30
    for sample in samples:
        assert len(sample.token_ids) == len(sample.logprobs) > 0
        assert all(value <= 0 for value in sample.logprobs)


def test_a_sample_without_a_verdict_is_an_error(run):
    out = Path(run.out)
    path = sorted((out / "verify").glob("verdicts-*.jsonl"))[0]
    rows = [row for _, row in read_rows(path)]
    write_rows(path, rows[1:])
    with pytest.raises(UserError, match="no verdict"):
        read_log(out / "generate", out / "verify")


def test_checkpoints_are_complete_model_folders(run):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = Path(run.out) / "sft" / "checkpoint"
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.chat_template
    ends = model.generation_config.eos_token_id
    assert set(tokenizer.convert_ids_to_tokens(ends)) == {"<|end|>", "<|eos|>"}
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert all("lm_head" not in key for key in file.keys())  # noqa: SIM118 - not a dict


def test_grpo_logs_its_rollouts_and_figures(run):
    folder = train(run, stage(run, "grpo"))
    rows = [row for _, row in read_rows(folder / "rollouts" / "step-00003.jsonl")]
    assert len(rows) == 12
    assert {row["policy_version"] for row in rows} == {3}
    figures = [row for _, row in read_rows(folder / "steps.jsonl")]
    assert all(0 <= row["reward_mean"] <= 1 for row in figures)
    assert all(row["zero_signal_share"] <= 1 for row in figures)


def test_a_gradient_that_is_not_finite_stops_with_the_batch_kept(run, monkeypatch):
    config = stage(run, "rft")
    from pipeline.methods.rft import Rft

    monkeypatch.setattr(Rft, "_scale", property(lambda self: float("nan")))
    with pytest.raises(UserError, match="batch"):
        train(run, config)
    assert list((Path(run.out) / "rft.failed").glob("batch.jsonl"))


def test_nothing_to_train_on_is_said(run):
    out = Path(run.out)
    for path in (out / "verify").glob("verdicts-*.jsonl"):
        write_rows(path, ({**row, "outcome": "incorrect"} for _, row in read_rows(path)))
    for name in ("rft", "dpo"):
        with pytest.raises(UserError, match="no sample of 30 can be used"):
            train(run, stage(run, name))
        assert not (out / name).exists()


def test_a_given_checkpoint_takes_the_place_of_the_built_model_by_one_line(tmp_path, checkpoint):
    """`[model].path` is the one line: tokenizer, template, weights and shape come with it."""
    from data_prep.build import main as build_main
    from pipeline.config import load_run

    path = write_small(tmp_path)
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace("[model]\n", f'[model]\npath = "{checkpoint}"\n'), "utf-8")
    build_main(["--config", str(path)])
    run = load_run(path)
    folder = train(run, stage(run, "sft").model_copy(update={"steps": 2}))
    theirs, ours = load_tokenizer(checkpoint), load_tokenizer(folder / "checkpoint")
    assert ours.get_vocab() == theirs.get_vocab()
    assert ours.chat_template == theirs.chat_template
    given = load_file(checkpoint / "model.safetensors")
    trained = load_file(folder / "checkpoint" / "model.safetensors")
    assert {k: v.shape for k, v in given.items()} == {k: v.shape for k, v in trained.items()}
    # Two steps of AdamW move each weight by at most about twice the learning rate.
    distance = max(float((given[k] - trained[k]).abs().max()) for k in given)
    assert 0 < distance < 0.02


def test_nonsense_is_refused_before_anything_is_loaded(run):
    sft, grpo = stage(run, "sft"), stage(run, "grpo")
    truncated = run.model_copy(update={"sampling": run.sampling.model_copy(update={"top_p": 0.9})})
    with pytest.raises(UserError, match="biases the policy ratio"):
        train(truncated, grpo)
    with pytest.raises(UserError, match="random weights"):
        train(run, grpo.model_copy(update={"init": "model"}))
    with pytest.raises(UserError, match="number of steps"):
        train(run, grpo.model_copy(update={"steps": 0}))
    cramped = run.model_copy(update={"model": run.model.model_copy(update={"context": 16})})
    with pytest.raises(UserError, match="context holds 16"):
        train(cramped, sft)


def test_truncated_sampling_can_be_allowed(run):
    sampling = run.sampling.model_copy(update={"top_p": 0.9, "allow_truncated_sampling": True})
    folder = train(run.model_copy(update={"sampling": sampling}), stage(run, "grpo"))
    assert (folder / "checkpoint").is_dir()


def test_an_edited_checker_makes_the_verdicts_again(run):
    first = verify(run, run.verify)
    before = (first / "verdicts-00000.jsonl").read_bytes()
    checker = Path(run.verify.checker["kind"])
    checker.write_text(checker.read_text("utf-8").replace("% 2 else", "% 3 else"), "utf-8")
    assert (verify(run, run.verify) / "verdicts-00000.jsonl").read_bytes() != before


def test_a_stage_that_is_running_elsewhere_is_left_alone(run, tmp_path):
    import subprocess
    import sys

    lock = Path(run.out) / ".rft.lock"
    hold = (
        "import fcntl, os, sys\n"
        f"file = open({str(lock)!r}, 'w')\n"
        "fcntl.flock(file, fcntl.LOCK_EX)\n"
        "file.write(str(os.getpid())); file.flush()\n"
        "print('held', flush=True); sys.stdin.read()\n"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(UserError, match=f"running in process {holder.pid}"):
        train(run, stage(run, "rft"))
    holder.communicate("")
    train(run, stage(run, "rft"))


def test_a_stage_killed_between_manifest_and_rename_is_complete(run, monkeypatch):
    from data_prep.run_folder import Stage

    with monkeypatch.context() as patch:
        patch.setattr(Stage, "_rename", lambda self, scratch: (_ for _ in ()).throw(Killed()))
        with pytest.raises(Killed):
            train(run, stage(run, "rft"))
    partial = Path(run.out) / "rft.partial"
    made = weights(partial)
    assert (partial / "state").is_dir()
    folder = train(run, stage(run, "rft"))
    assert weights(folder) == made
    assert not (folder / "state").exists()
    assert not partial.exists()
