"""The stages on a tiny run: what they write, that they skip, and that they go on exactly."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from data_prep.build import build
from data_prep.config import validate
from data_prep.errors import UserError
from data_prep.formatting import load_formatter
from data_prep.jsonl import read_rows, write_rows
from data_prep.judged import tokenise_judged, write_judged
from data_prep.manifest import read_manifest
from data_prep.plugins import plugin_names
from data_prep.schema import LabelledSteps, Preference
from pipeline import generate as generate_module
from pipeline import rollout as rollout_module
from pipeline import train as train_module
from pipeline.config import OptimizerConfig, RunConfig, SamplingConfig, TrainConfig
from pipeline.engines._library import Unbuilt, library_for
from pipeline.engines.embedded import EmbeddedEngine
from pipeline.fixed import read_log
from pipeline.generate import generate
from pipeline.methods import create_method
from pipeline.model import load_model, load_tokenizer
from pipeline.optimizer import build_optimizer
from pipeline.plan import settings_of
from pipeline.samples import read_samples
from pipeline.state import Part, load_state, save_state
from pipeline.train import train
from pipeline.verify import verify

from .small_run import small_run, write_small

# Methods that sample, as changes to the grpo stage of the small run.
ONLINE = {
    "online_rft": {"updates": 2},
    "dr_grpo": {"updates": 2},
    "rloo": {"beta": 0.05, "kl": "k1"},
    "reinforce": {},
    "gspo": {"updates": 2, "clip_low": 0.01, "clip_high": 0.01},
    "cispo": {"updates": 2, "beta": 0.05, "kl": "k2"},
    "dapo": {"updates": 2, "refill": 3},
    "ppo": {"beta": 0.05, "entropy": 0.01},
    "grft": {"updates": 2, "prefixes": 3, "cut": "sentence"},
    "segment_rft": {"updates": 2, "cut": "sentence", "gamma": 0.9},
}
# Further stages, by name: what they change of another stage of the small run.
FURTHER = {
    "critic": ("grpo", {"method": {"kind": "ppo", "critic": "separate", "critic_init": "judge"}}),
    "process": (
        "grpo",
        {
            "method": {"kind": "grpo", "supervision": "process", "updates": 2},
            "reward": {"process": "steps", "format": 0.1, "length": 0.05},
        },
    ),
    "process_model": (
        "grpo",
        {
            "method": {"kind": "ppo", "kl": "k3", "beta": 0.02},
            "reward": {"process": "model", "process_init": "step_judge", "false_accept": 0.1},
        },
    ),
    "iterative": (
        "grpo",
        {
            "steps": 7,
            "iterations": 3,
            "save_every": 1,
            "validate_every": 3,
            "reward": {"rule": 0.5, "model": 1.0, "model_init": "judge", "retrain": 2},
        },
    ),
    "lora": (
        "grpo",
        {"iterations": 3, "lora": {"rank": 4}, "method": {"kind": "grpo", "updates": 2}},
    ),
    "lora_critic": (
        "grpo",
        {
            "lora": {"rank": 2, "targets": ["q_proj", "v_proj"]},
            "gradient_checkpointing": True,
            "watch_reference": True,
            "method": {"kind": "ppo", "critic": "separate"},
        },
    ),
    "lora_dropout": ("rft", {"lora": {"rank": 4, "dropout": 0.2}}),
    "lora_judge": (
        "dpo",
        {"method": {"kind": "reward_model", "data": "samples"}, "lora": {"rank": 4}},
    ),
    "segments": (
        "grpo",
        {
            "method": {
                "kind": "segment_rft",
                "cut": "sentence",
                "refresh": 3,
                "kl": "policy",
                "beta": 0.1,
                "critic": "separate",
                "grader": {"kind": "rule", "continuations": 2},
                "reward": {"zscore": True, "alpha1": 0.0, "alpha2": 2.0},
                "whiten": "batch",
            },
            "steps": 8,
            "save_every": 1,
        },
    ),
    "segments_lora": (
        "grpo",
        {
            "method": {"kind": "segment_rft", "cut": "line", "refresh": 2, "thoughts": 1},
            "lora": {"rank": 2},
            "save_every": 1,
        },
    ),
    "judge": ("dpo", {"method": {"kind": "reward_model", "data": "samples"}}),
    "pair_judge": ("dpo", {"method": {"kind": "reward_model"}, "validate_every": 2}),
    "step_judge": ("dpo", {"method": {"kind": "process_reward_model"}, "validate_every": 2}),
    "line_judge": (
        "dpo",
        {"method": {"kind": "process_reward_model", "data": "samples", "epochs": 2}},
    ),
    "chosen": ("dpo", {"method": {"kind": "sft", "data": "chosen"}, "validate_every": 2}),
    "human_dpo": ("dpo", {"method": {"kind": "dpo", "data": "pairs"}, "validate_every": 2}),
    "rlhf": (
        "grpo",
        {
            "method": {"kind": "ppo", "beta": 0.05, "critic": "separate"},
            "prompts": "preferences",
            "reward": {"rule": 0.0, "model": 1.0, "model_init": "judge"},
        },
    ),
}


def stage(run: RunConfig, name: str, **changes):
    """Return a training stage of the small run, or one made of its grpo stage."""
    found = next((s for s in run.train if s.name == name), None)
    if name in FURTHER:
        of, own = FURTHER[name]
        base = stage(run, of)
        return validate(TrainConfig, {**base.model_dump(), "name": name, **own, **changes}, name)
    if found is None:
        grpo = next(s for s in run.train if s.name == "grpo")
        changes = {"name": name, "method": {"kind": name, **ONLINE[name]}, **changes}
        return validate(TrainConfig, {**grpo.model_dump(), **changes}, name)
    return validate(TrainConfig, {**found.model_dump(), **changes}, name)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """Data, SFT, samples and verdicts."""
    folder = tmp_path_factory.mktemp("base")
    run = small_run(folder)
    out = Path(run.out)
    build(run.data, out, run.seed)
    judged_data(out)
    train(run, stage(run, "sft"))
    assert run.generate is not None
    generate(run, run.generate)
    verify(run, run.verify)
    for name in ("judge", "step_judge"):
        train(with_stages(run), stage(run, name))
    return folder


def judged_data(out: Path) -> None:
    """Put preference pairs and labelled steps beside the problems of the data stage."""
    formatter = load_formatter(load_tokenizer(out / "data" / "tokenizer"), "embedded")
    items: list[Preference | LabelledSteps] = []
    for i in range(12):
        split = "train" if i < 8 else "validation"
        words = f"{i}+{i}={2 * i}", f"{i}+{i}={i}"
        items.append(Preference(f"p{i}", (("user", f"Compute {i}+{i}."),), *words, "hand", split))
        items.append(LabelledSteps(f"s{i}", f"Compute {i}+{i}.", words, (1, -1), "hand", split))
    tables, _ = tokenise_judged(formatter, items, 96, "fail")
    write_judged(out / "data", tables)


def with_stages(run: RunConfig) -> RunConfig:
    """Return the run with the further stages in it, so that one may name another."""
    return run.model_copy(update={"train": (*run.train, *(stage(run, name) for name in FURTHER))})


@pytest.fixture
def run(base, tmp_path) -> RunConfig:
    """A copy of the base run that a test may change."""
    shutil.copytree(base / "run", tmp_path / "run")
    return with_stages(small_run(tmp_path))


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


@pytest.mark.parametrize("name", ["sft", "rft", "dpo", "grpo", *ONLINE, *FURTHER])
def test_2n_steps_are_n_a_resume_and_n_bit_for_bit(run, monkeypatch, tmp_path, name):
    """The state of half the steps is gone on from; what came after it died with the process."""
    shutil.rmtree(Path(run.out) / name, ignore_errors=True)
    config = stage(run, name)
    config = config.model_copy(update={"save_every": (config.steps + 1) // 2})
    whole = tmp_path / "whole"
    shutil.copytree(run.out, whole)
    expected = train(run.model_copy(update={"out": str(whole)}), config)
    with monkeypatch.context() as patch:
        interrupt_at(patch, config.steps - 1)
        with pytest.raises(Killed):
            train(run, config)
    partial = Path(run.out) / f"{name}.partial"
    assert not (Path(run.out) / name).exists()
    saved = [path.name for path in (partial / "state").glob("step-*")]
    assert saved == [f"step-{config.save_every:06}"]
    found = train(run, config)
    assert weights(found) == weights(expected)
    assert (found / "steps.jsonl").read_bytes() == (expected / "steps.jsonl").read_bytes()
    steps = [row["step"] for _, row in read_rows(found / "steps.jsonl")]
    assert steps == list(range(config.steps))
    assert weights(found) != weights(Path(run.out) / "sft") or name == "sft"


def test_every_method_is_resumed_somewhere():
    kinds = {own["method"]["kind"] for _, own in FURTHER.values() if "method" in own}
    assert set(plugin_names("pipeline.methods")) == {"sft", "rft", *ONLINE} | kinds


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


def cut(path):
    path.write_bytes(path.read_bytes()[:-10])


def tear(path):
    """Leave half a line, as a kill does that comes while the next state is saved."""
    path.write_bytes(path.read_bytes() + b'{"name": "rollouts/st')


def garble(number):
    """Let a line be none that can be read."""

    def change(path):
        lines = path.read_bytes().splitlines(keepends=True)
        lines[number] = b"\xff" + lines[number][1:]
        path.write_bytes(b"".join(lines))

    return change


def flip(place):
    def change(path):
        data = bytearray(path.read_bytes())
        data[int(place * len(data))] ^= 1
        path.write_bytes(data)

    return change


@pytest.mark.parametrize(
    ("file", "damage", "goes_on_from"),
    [
        ("state/files.jsonl", tear, 4),
        ("state/files.jsonl", cut, 2),
        ("state/files.jsonl", flip(0.9), 2),
        ("state/files.jsonl", flip(0.1), None),
        ("state/files.jsonl", Path.unlink, None),
        ("steps.jsonl", garble(4), 4),
        ("steps.jsonl", garble(3), 2),
        ("rollouts/step-00003.jsonl", flip(0.5), 2),
        ("rollouts/step-00003.jsonl", Path.unlink, 2),
        ("rollouts/step-00001.jsonl", flip(0.5), None),
    ],
)
def test_a_state_stands_on_the_logs_of_its_steps(
    run, monkeypatch, capsys, file, damage, goes_on_from
):
    config = stage(run, "grpo")
    expected = train(run, config.model_copy(update={"name": "whole"}))
    with monkeypatch.context() as patch:
        interrupt_at(patch, 5)
        with pytest.raises(Killed):
            train(run, config)
    work = Path(run.out) / "grpo.partial"
    rows = [row for _, row in read_rows(work / "state" / "files.jsonl")]
    logs = [row["name"] for row in rows if row["name"].startswith("rollouts/")]
    assert logs == [f"rollouts/step-{step:05d}.jsonl" for step in range(4)]
    for name in ("step-000002", "step-000004"):
        note = json.loads((work / "state" / name / "state.json").read_text("utf-8"))
        assert not any(file.startswith("rollouts/") for file in note["files"])
    damage(work / file)
    if goes_on_from is None:
        with pytest.raises(UserError, match="no saved training state"):
            train(run, config)
        return
    capsys.readouterr()
    found = train(run, config)
    said = capsys.readouterr().err
    assert (f"going on from step {goes_on_from}" in said) == (goes_on_from < 4)
    assert (f"{Path(file).name} is" in said) == (goes_on_from < 4)
    assert weights(found) == weights(expected)
    for path in expected.rglob("step-*.jsonl"):
        assert (found / path.relative_to(expected)).read_bytes() == path.read_bytes()


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
    assert load_state(tmp_path, {"model": Part(load_model(checkpoint))}) == 0


def optimised(device: str):
    model = torch.nn.Linear(3, 2).to(device)
    return model, build_optimizer((model, 1.0), config=OptimizerConfig())


def take_step(model, optimizer) -> None:
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.device)
    optimizer.step()


def test_moments_and_counters_come_back_beside_their_parameters(tmp_path):
    """On the device of the parameter, as AdamW's fused step wants all; "meta" is one like any."""
    model, optimizer = optimised("cpu")
    take_step(model, optimizer)
    save_state(tmp_path, 1, {"model": Part(model, optimizer)})
    other, empty = optimised("meta")
    assert load_state(tmp_path, {"model": Part(other, empty)}) == 1
    assert len(empty.state) == len(list(other.parameters()))
    for parameter, moments in empty.state.items():
        assert set(moments) == {"step", "exp_avg", "exp_avg_sq"}
        assert {value.device for value in moments.values()} == {parameter.device}


@pytest.mark.gpu
def test_an_optimizer_goes_on_on_a_gpu(tmp_path):
    model, optimizer = optimised("cuda")
    take_step(model, optimizer)
    save_state(tmp_path, 1, {"model": Part(model, optimizer)})
    other, resumed = optimised("cuda")
    load_state(tmp_path, {"model": Part(other, resumed)})
    take_step(model, optimizer)
    take_step(other, resumed)
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)


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
    create = generate_module.engine_of

    def counting(config, model, cluster):
        engine = create(config, model, cluster)
        original = engine.generate

        def generate_and_count(prompts, sampling):
            calls.append(len(prompts))
            if len(calls) == 3:
                raise Killed
            return original(prompts, sampling)

        engine.generate = generate_and_count
        return engine

    monkeypatch.setattr(generate_module, "engine_of", counting)
    assert run.generate is not None
    with pytest.raises(Killed):
        generate(run, run.generate)
    assert calls == [4, 4, 2]
    generate(run, run.generate)
    assert calls == [4, 4, 2, 2]
    assert {p.name: p.read_bytes() for p in (out / "generate").glob("*.jsonl")} == expected


def test_plans_say_what_samples_their_models(run, monkeypatch):
    """Compiled code where it runs; torch where the weights are more than that takes."""
    try:
        library_for(torch.device("cpu"), torch.float32)
    except Unbuilt as reason:
        pytest.skip(f"nothing is compiled here: {reason}")
    assert run.generate is not None

    def plans() -> list[dict]:
        grpo = stage(run, "grpo")
        settings = settings_of(run, grpo, create_method(grpo.method))
        return [read_manifest(generate(run, run.generate))["plan"]["config"], settings]

    assert [plan["engine"]["compiled"] for plan in plans()] == [True, True]
    monkeypatch.setattr("pipeline.engines._decoder.PACK_BYTES", 1000)
    assert ["compiled" in plan["engine"] for plan in plans()] == [False, False]


def test_plans_hold_the_constant_that_sequences_are_divided_by(run):
    longer = run.model_copy(update={"sampling": run.sampling.model_copy(update={"max_tokens": 21})})
    for normaliser, differ in (("constant", True), ("token", False)):
        sft = stage(run, "sft", method={"kind": "sft", "normaliser": normaliser})
        plans = [settings_of(each, sft, create_method(sft.method)) for each in (run, longer)]
        assert (plans[0] != plans[1]) is differ


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


def test_figures_of_ratios_are_those_of_the_last_update(run):
    """Before the first update every ratio is 1; two updates later some are not."""
    folder = train(run, stage(run, "grpo", optimizer={"learning_rate": 5e-3, "warmup_steps": 0}))
    figures = [row for _, row in read_rows(folder / "steps.jsonl")]
    taken = [row for row in figures if "ratio_min" in row]
    assert taken
    assert any(row["ratio_min"] < 0.999 and row["ratio_max"] > 1.001 for row in taken)
    assert all(row["kl_k3"] >= -1e-6 and row["kl_k2"] >= 0 for row in taken)


def test_dapo_fills_its_batch_with_prompts_of_mixed_accuracy(run):
    folder = train(run, stage(run, "dapo"))
    rounds, full = [], []
    for _, figures in read_rows(folder / "steps.jsonl"):
        log = folder / "rollouts" / f"step-{figures['step']:05d}.jsonl"
        rows = [row for _, row in read_rows(log)]
        groups: dict[str, list[str]] = {}
        for row in rows:
            groups.setdefault(row["problem_id"], []).append(row["outcome"])
        assert all(len(outcomes) == 4 for outcomes in groups.values())
        mixed = sum(len(set(outcomes)) > 1 for outcomes in groups.values())
        assert figures["refill_rounds"] == max(row["refill"] for row in rows)
        # A mixed group loses its signal where the overlong penalty evens its rewards out.
        full.append(min(mixed, 3) / len(groups) - figures["signal_share"])
        assert full[-1] >= -1e-6
        assert mixed >= 3 or figures["refill_rounds"] == 3
        rounds.append(figures["refill_rounds"])
    # Both ways of a step are walked: enough at once, and refilled.
    assert 0 in rounds
    assert max(rounds) > 0
    assert min(full) == pytest.approx(0.0, abs=1e-6)


def test_grft_from_the_empty_prefix_is_grpo_bit_for_bit(run):
    grpo = train(run, stage(run, "grpo"))
    method = {"kind": "grft", "prefixes": 1, "mode": "tail", "updates": 2, "beta": 0.05}
    grft = train(run, stage(run, "grft", method=method))
    assert weights(grft) == weights(grpo) != weights(Path(run.out) / "sft")
    assert (grft / "steps.jsonl").read_bytes() == (grpo / "steps.jsonl").read_bytes()


def test_grft_goes_on_from_prefixes_of_its_own_samples(run):
    config = stage(run, "grft")
    folder = train(run, config)
    found = 0
    for _, figures in read_rows(folder / "steps.jsonl"):
        log = folder / "rollouts" / f"step-{figures['step']:05d}.jsonl"
        rows = [row for _, row in read_rows(log)]
        assert figures["samples"] == len(rows) <= 3 * 3 * 4
        assert len({row["seed"] for row in rows}) == len(rows)
        whole = {
            (r["problem_id"], r["sample_index"]): r["token_ids"] for r in rows if "prefix" not in r
        }
        assert len(whole) == 12
        for row in rows:
            if (prefix := row.get("prefix")) is None:
                continue
            found += 1
            base = whole[row["problem_id"], prefix["sample_index"]]
            length = len(prefix["token_ids"])
            assert base[:length] == prefix["token_ids"]
            assert 0 < length < len(base)
            assert length + len(row["token_ids"]) <= 20
    assert found > 0


def test_the_policy_that_samples_is_refreshed_when_it_is_due(run):
    """Its log-probs and values are those of older weights; the sampler agrees with them."""
    config = stage(run, "segments", optimizer={"learning_rate": 5e-3, "warmup_steps": 0})
    folder = train(run, config)
    assert config.steps == 8
    moved = []
    for _, figures in read_rows(folder / "steps.jsonl"):
        step = figures["step"]
        rows = [row for _, row in read_rows(folder / "rollouts" / f"step-{step:05d}.jsonl")]
        assert {row["policy_version"] for row in rows} == {step - step % 3}
        assert {row["staleness"] for row in rows} == {step % 3}
        assert len(rows) == figures["samples"]
        graded = [row for row in rows if row.get("grades")]
        assert graded
        for row in graded:
            # A reward a segment, the last at the solution's end; progress in halves of two samples.
            assert len(row["steps"]) == len(row["pieces"])
            assert row["steps"][-1][0] == len(row["token_ids"]) - 1
            assert "".join(row["pieces"]) == row["text"]
            assert set(row["grades"]["progress"]) <= {0.0, 0.5, 1.0}
        assert figures["sampler_gap_mean"] < 1e-3
        # Whole segments add up, so a ratio that has not moved is 1 to float32's rounding.
        moved.append(max(figures["ratio_max"] - 1, 1 - figures["ratio_min"]))
    fresh, later = [moved[s] for s in (0, 3, 6)], [moved[s] for s in (1, 2, 4, 5, 7)]
    assert max(fresh) < 1e-3 < min(later)


def test_held_out_problems_are_solved_by_the_policy_that_is_trained(run, monkeypatch):
    """While an older one samples; and that goes on as if nobody had looked."""
    changes = {
        "optimizer": {"learning_rate": 5e-3, "warmup_steps": 0},
        "validate_limit": 2,
        "agreement": {"on_gap": "off"},
    }
    plain = train(run, stage(run, "segments", steps=3, **changes))
    logs = {path.name: path.read_bytes() for path in (plain / "rollouts").iterdir()}
    taken: list[tuple[int, bytes]] = []
    load = EmbeddedEngine.load_weights

    def watch(self, weights, version):
        kept = {name: value.detach().clone() for name, value in weights}
        taken.append((version, kept["model.norm.weight"].numpy().tobytes()))
        load(self, kept.items(), version)

    monkeypatch.setattr(EmbeddedEngine, "load_weights", watch)
    folder = train(run, stage(run, "segments", steps=3, validate_every=1, **changes))
    assert {path.name: path.read_bytes() for path in (folder / "rollouts").iterdir()} == logs
    # As it starts, a look before step 0, then one behind each step; and back after each of them.
    assert [version for version, _ in taken] == [0, 0, 0, 1, 0, 2, 0, 3, 3]
    looked = [weights for version, weights in taken if version]
    assert len(set(looked)) == 3
    final = load_file(folder / "checkpoint" / "model.safetensors")["model.norm.weight"]
    assert looked[2] == looked[3] == final.numpy().tobytes()


def test_segments_by_given_grades(run, tmp_path):
    grades = tmp_path / "grades.jsonl"
    data = Path(run.out) / "data" / "train.jsonl"
    rows = [
        {"problem_id": p["id"], "overall": 0.5, "thoughts": [0.5, 1.0], "progress": [0.2, 0.6]}
        for _, p in read_rows(data)
    ]
    write_rows(grades, rows)
    method = {
        "kind": "segment_rft",
        "beta": 0.0,
        "cut": "sentence",
        "grader": {"kind": "fixed", "path": str(grades)},
        "reward": {"rho": 2.0},
    }
    config = stage(run, "segment_rft", method=method, steps=2)
    folder = train(run, config)
    seen = 0
    for _, figures in read_rows(folder / "steps.jsonl"):
        log = folder / "rollouts" / f"step-{figures['step']:05d}.jsonl"
        found = [row for _, row in read_rows(log)]
        assert len(found) == figures["samples"] == 12
        for row in found:
            thoughts = row["grades"]["thoughts"]
            assert thoughts == [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0][: len(thoughts)]
            seen += len(thoughts)
            if len(row["steps"]) > len(thoughts):
                assert row["steps"][-1][1] == 1.0
    assert seen
    # Other grades make the stage again; without its file it says so.
    inode = (folder / "manifest.json").stat().st_ino
    assert (train(run, config) / "manifest.json").stat().st_ino == inode
    write_rows(grades, [{**row, "overall": 0.75} for row in rows])
    assert (train(run, config) / "manifest.json").stat().st_ino != inode
    grades.unlink()
    with pytest.raises(UserError, match="no such file"):
        train(run, config)


def test_older_samplers_are_asked_for_in_one_way(run):
    config = stage(run, "segments", staleness=1, correction={"kind": "token"})
    with pytest.raises(UserError, match="refresh"):
        train(run, config)
    with pytest.raises(UserError, match="no gold answer"):
        stage_of = {"rule": 0.0, "model": 1.0, "model_init": "judge"}
        train(run, stage(run, "segments", prompts="preferences", reward=stage_of))


@pytest.mark.parametrize("kind", ["off", "token", "sequence"])
def test_the_gap_between_sampler_and_trainer_is_logged_every_step(run, kind):
    config = stage(run, "grpo", correction={"kind": kind})
    folder = train(run, config)
    for _, row in read_rows(folder / "steps.jsonl"):
        if "objective" not in row:
            continue
        # Two implementations in float32: close, and not the same.
        assert 0 < row["sampler_gap_mean"] <= row["sampler_gap_max"] < 1e-3
        assert abs(row["sampler_kl"]) <= row["sampler_gap_mean"]
        assert ("correction_mean" in row) is (kind != "off")
        if kind != "off":
            assert row["correction_mean"] == pytest.approx(1.0, abs=1e-2)
            assert row["correction_capped_share"] == 0.0


def test_a_correction_changes_the_step_by_its_weights(run, monkeypatch):
    """A sampler that reports log-probs too low by log 4 is capped at weight 2 everywhere."""
    draw = rollout_module.Rollouts.draw

    def off_by_log_four(self, step):
        drawn = draw(self, step)
        for sequence in drawn.everything:
            sequence.logprobs = [value - math.log(4.0) for value in sequence.logprobs]
        return drawn

    # No clipping and one step: the norm of the gradient is what the weights make it.
    plain = {"steps": 1, "optimizer": {"clip_norm": 0.0}, "agreement": {"on_gap": "off"}}
    norms = {}
    for kind in ("off", "token", "sequence"):
        with monkeypatch.context() as patch:
            patch.setattr(rollout_module.Rollouts, "draw", off_by_log_four)
            config = stage(run, "grpo", correction={"kind": kind, "cap": 2.0}, **plain)
            folder = train(run, config)
        ((_, row),) = read_rows(folder / "steps.jsonl")
        norms[kind] = row["grad_norm"]
        assert row["sampler_gap_mean"] == pytest.approx(math.log(4.0), abs=1e-3)
        if kind != "off":
            assert row["correction_capped_share"] == 1.0
    assert norms["token"] == pytest.approx(2.0 * norms["off"], rel=1e-4)
    assert norms["sequence"] == pytest.approx(2.0 * norms["off"], rel=1e-4)


def test_options_that_make_no_sense_are_refused(run):
    with pytest.raises(UserError, match="correction"):
        train(run, stage(run, "rft", correction={"kind": "token"}))
    truncated = run.model_copy(update={"sampling": SamplingConfig(max_tokens=20, top_p=0.9)})
    with pytest.raises(UserError, match=r"top_p = 0\.9"):
        train(truncated, stage(run, "rloo"))
    allowed = stage(run, "rloo", allow_truncated_sampling=True, steps=1)
    assert (train(truncated, allowed) / "checkpoint").is_dir()
    with pytest.raises(UserError, match="updates"):
        stage(run, "reinforce", method={"kind": "reinforce", "updates": 2})


def test_a_gradient_that_is_not_finite_stops_with_the_batch_kept(run, monkeypatch):
    config = stage(run, "rft")
    from pipeline.methods.rft import Rft

    monkeypatch.setattr(Rft, "_scale", property(lambda self: float("nan")))
    with pytest.raises(UserError, match="batch"):
        train(run, config)
    assert list((Path(run.out) / "rft.failed").glob("batch.jsonl"))


def test_nothing_to_train_on_is_said(run, seal_again):
    out = Path(run.out)
    for path in (out / "verify").glob("verdicts-*.jsonl"):
        write_rows(path, ({**row, "outcome": "incorrect"} for _, row in read_rows(path)))
    seal_again(out / "verify")
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
    with pytest.raises(UserError, match="biases every ratio"):
        train(truncated, grpo)
    for key, value, match in (
        ("min_p", 0.05, r"min_p = 0\.05"),
        ("top_k", 20, "top_k = 20"),
        ("repetition_penalty", 1.1, "repetition_penalty"),
    ):
        sampling = run.sampling.model_copy(update={key: value})
        with pytest.raises(UserError, match=match):
            train(run.model_copy(update={"sampling": sampling}), grpo)
    # What the trainer cannot reproduce stays refused.
    penalised = run.model_copy(
        update={"sampling": run.sampling.model_copy(update={"repetition_penalty": 1.1})}
    )
    with pytest.raises(UserError, match="repetition_penalty"):
        train(penalised, grpo.model_copy(update={"allow_truncated_sampling": True}))
    with pytest.raises(UserError, match="random weights"):
        train(run, grpo.model_copy(update={"init": "model"}))
    with pytest.raises(UserError, match=r"'watch_reference': True for 'rft', which does not"):
        train(run, stage(run, "rft", watch_reference=True))
    with pytest.raises(UserError, match="of 2 steps each, 3 fit"):
        train(run, stage(run, "grpo", steps=6, iterations=5))
    with pytest.raises(UserError, match="asks only what is correct"):
        train(run, stage(run, "online_rft", reward={"length": 0.5}))
    with pytest.raises(UserError, match="number of steps"):
        train(run, grpo.model_copy(update={"steps": 0}))
    cramped = run.model_copy(update={"model": run.model.model_copy(update={"context": 16})})
    with pytest.raises(UserError, match="context holds 16"):
        train(cramped, sft)


def test_truncated_sampling_can_be_allowed(run):
    sampling = run.sampling.model_copy(update={"top_p": 0.9})
    grpo = stage(run, "grpo").model_copy(update={"allow_truncated_sampling": True})
    folder = train(run.model_copy(update={"sampling": sampling}), grpo)
    assert (folder / "checkpoint").is_dir()


def test_a_checker_that_fails_is_said_with_its_reason(run, capsys):
    checker = Path(run.verify.checker["kind"])
    before = checker.read_text("utf-8")
    checker.write_text(before.replace("outcome =", "undefined\n        outcome ="), "utf-8")
    capsys.readouterr()
    verify(run, run.verify)
    said = capsys.readouterr().err
    assert "warning: 30 of 30 samples could not be judged and are not trained on" in said
    assert "most often (30): error, NameError: name 'undefined' is not defined" in said
    with pytest.raises(UserError, match="no sample of 30 can be used; 30 could not be judged") as e:
        train(run, stage(run, "rft"))
    assert "`detail`" in e.value.fix
    checker.write_text(before, "utf-8")
    verify(run, run.verify)
    assert "warning" not in capsys.readouterr().err


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
