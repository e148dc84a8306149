"""What a stage will take: the arithmetic, what is refused, and the forecast beside real peaks."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from data_prep.config import dump_toml
from data_prep.errors import UserError
from data_prep.plugins import load_plugin
from pipeline import machine
from pipeline.config import load_run
from pipeline.estimate import ROWS_PER_S, Forecast
from pipeline.estimate_training import SHARDING
from pipeline.forecast import (
    count_text,
    forecast,
    refuse_what_cannot_fit,
    size_text,
    table,
    time_text,
)
from pipeline.launch import Launch, launch_of, refuse_without_ranks
from pipeline.lengths import lengths_of, vocabulary_of
from pipeline.machine import GIB, Machine, this_machine
from pipeline.run import main, resolve
from pipeline.shape import shape_of_config, shape_of_model

from .small_run import write_small

# Forecast over measured peak, and under it.
FACTOR = 1.6

DECODERS = {
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen2 untied": {"model_type": "qwen2", "tie_word_embeddings": False},
    "qwen3": {"model_type": "qwen3", "head_dim": 24, "tie_word_embeddings": True},
    "llama": {"model_type": "llama", "tie_word_embeddings": False},
    "mistral": {"model_type": "mistral", "tie_word_embeddings": False},
    "mixture of experts": {
        "model_type": "qwen3_moe",
        "head_dim": 24,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 40,
        "tie_word_embeddings": False,
    },
}
NUMBERS = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}


@pytest.mark.parametrize("name", DECODERS)
def test_parameters_are_counted_from_the_configuration_alone(name, tmp_path):
    table = NUMBERS | DECODERS[name]
    (tmp_path / "config.json").write_text(json.dumps(table))
    shape = shape_of_model(str(tmp_path))
    rest = {key: value for key, value in table.items() if key != "model_type"}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(str(table["model_type"]), **rest)
        )
    counted = sum(parameter.numel() for parameter in model.parameters())
    # A router of the experts is what the formula leaves out.
    routers = sum(p.numel() for n, p in model.named_parameters() if n.endswith("mlp.gate.weight"))
    assert shape.parameters == counted - routers


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3"])
def test_what_autograd_keeps_is_as_the_formula_says(architecture, tmp_path):
    """The slope over layers: what one more layer keeps of one token."""
    table = NUMBERS | DECODERS[architecture]
    rest = {key: value for key, value in table.items() if key != "model_type"}
    tokens, kept = 96, {}
    for layers in (2, 4):
        rest["num_hidden_layers"] = layers
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **rest))
        own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        held: dict[int, torch.UntypedStorage] = {}

        def keep(tensor, own=own, held=held):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                held[storage.data_ptr()] = storage
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model.base_model(input_ids=torch.zeros((2, tokens // 2), dtype=torch.long))
        kept[layers] = sum(storage.nbytes() for storage in held.values()) / 4 / tokens
    (tmp_path / "config.json").write_text(json.dumps(table))
    formula = shape_of_model(str(tmp_path)).kept
    assert formula == pytest.approx((kept[4] - kept[2]) / 2, rel=0.15)


def test_a_broken_configuration_of_a_model_is_named(tmp_path):
    for text, part in (
        ("{", "not JSON"),
        ("[]", "JSON list"),
        ('{"hidden_size": "wide"}', "hidden_size"),
        (json.dumps(NUMBERS | {"num_hidden_layers": 0}), "num_hidden_layers"),
    ):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(UserError, match=part):
            shape_of_model(str(tmp_path))
    assert shape_of_model("no-such-owner/no-such-model") is None


def test_a_mixture_takes_the_time_of_the_rows_it_reads(root, tmp_path):
    """Not of the packed sequences that it writes, of which there are a fifteenth."""
    run = load_run(root / "data_prep" / "configs" / "sft_900k.toml")
    found = forecast(run.model_copy(update={"out": str(tmp_path)}))[0]
    assert found.stage == "mixture"
    assert sum(source.pool for source in run.mixture.sources) == 1_670_000
    assert found.other_s == 1_670_000 / ROWS_PER_S


def test_every_stage_has_a_line_and_the_parts_add_up(tmp_path):
    run = load_run(write_small(tmp_path))
    found = forecast(run)
    assert [stage.stage for stage in found] == [
        "data", "sft", "generate", "verify", "rft", "dpo", "grpo", "evaluate",
    ]  # fmt: skip
    for stage in found:
        assert stage.peak == sum(stage.memory.values()) > 0
        assert stage.disk > 0
        assert stage.seconds(1e9) > stage.seconds(1e12) or not stage.operations
    by_name = {stage.stage: stage for stage in found}
    assert "reference" in by_name["dpo"].memory
    assert "reference" not in by_name["rft"].memory
    assert "keys and values" in by_name["grpo"].memory
    assert "keys and values" not in by_name["sft"].memory
    text = table(found, 1e11, lengths_of(run))
    assert all(stage.stage in text for stage in found)
    assert "estimated from the first rows" in text


def changed(run, stage: str, **keys):
    """Return the run with keys of a training stage changed."""
    stages = tuple(s.model_copy(update=keys) if s.name == stage else s for s in run.train)
    return run.model_copy(update={"train": stages})


def part_of(run, stage: str, part: str) -> int:
    return forecast(run, [stage])[0].memory.get(part, 0)


def test_keys_move_the_parts_that_they_are_said_to_move(tmp_path):
    run = load_run(write_small(tmp_path))
    lora = run.train[0].lora.model_copy(update={"rank": 2})
    assert part_of(changed(run, "sft", lora=lora), "sft", "optimizer") < part_of(
        run, "sft", "optimizer"
    )
    assert part_of(changed(run, "dpo", lora=lora), "dpo", "reference") == 0
    few = changed(run, "sft", micro_tokens=64)
    assert part_of(few, "sft", "activations") < part_of(run, "sft", "activations")
    spared = changed(run, "sft", gradient_checkpointing=True)
    assert part_of(spared, "sft", "activations") < part_of(run, "sft", "activations")
    wide = run.model_copy(update={"model": run.model.model_copy(update={"width": 64})})
    assert part_of(wide, "sft", "weights") > part_of(run, "sft", "weights")
    doubled = run.model_copy(update={"model": run.model.model_copy(update={"dtype": "float64"})})
    assert part_of(doubled, "sft", "weights") == 2 * part_of(run, "sft", "weights")
    slots = run.engine.model_copy(update={"slots": 4})
    fewer = run.model_copy(update={"engine": slots})
    assert part_of(fewer, "grpo", "keys and values") < part_of(run, "grpo", "keys and values")


@pytest.mark.parametrize(
    ("words", "count", "here"),
    [
        ("", 1, 1),
        ("torchrun --nproc-per-node 8", 8, 8),
        ("torchrun --nnodes=3 --nproc_per_node=8 --master-port 29500", 24, 8),
        ("torchrun --nproc-per-node gpu", 4, 4),
        ("torchrun --nnodes 2:4 --nproc-per-node 8", 16, 8),
        ("accelerate launch --num_processes 24 --num_machines 3", 24, 8),
        ("accelerate launch --cpu --num_processes=2", 2, 2),
        ("mpirun -n 4", 4, 4),
        ("/opt/mpi/bin/mpirun -np 16 --npernode 8 --bind-to core", 16, 8),
        ("mpiexec -n 16 -ppn 4 -f hosts", 16, 4),
        ("mpirun -n 3 -ppn 1 torchrun --nnodes=3 --nproc-per-node=8", 24, 8),
        ("srun --ntasks=16 --ntasks-per-node=8 ./with_ranks.sh", 16, 8),
        ("mpirun -n 3 python -m torch.distributed.run --nnodes=3 --nproc-per-node=8", 24, 8),
    ],
)
def test_a_launcher_says_how_many_processes_there_will_be(monkeypatch, words, count, here):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    found = launch_of(words.split())
    assert (found.count, found.here) == (count, here)


@pytest.mark.parametrize(
    ("words", "starter"),
    [
        ("mpirun -n 4 python", "mpirun"),
        ("/opt/mpi/bin/mpirun -np 16 --npernode 8 --bind-to core /env/bin/python3.12", "mpirun"),
        ("mpiexec -n 2", "mpiexec"),
        ("srun --ntasks=8 --unbuffered", "srun"),
        ("mpirun -n 1 python", ""),
        ("srun python", ""),
        ("mpirun -n 3 -ppn 1 torchrun --nnodes=3 --nproc-per-node=8", ""),
        ("srun -n 3 accelerate launch --num_processes 24 --num_machines 3", ""),
        ("srun -n 2 python -m torch.distributed.run --nnodes 2 --nproc-per-node 8", ""),
        ("mpirun -n 4 ./with_ranks.sh", ""),
        ("nice -n 10 python", ""),
        ("torchrun --nproc-per-node 8", ""),
        ("", ""),
    ],
)
def test_a_launcher_that_tells_no_ranks_is_refused(words, starter):
    if not starter:
        refuse_without_ranks(words.split())
        return
    with pytest.raises(UserError, match=f"{starter}, which starts .* tells none its rank") as error:
        refuse_without_ranks(words.split())
    assert "torchrun" in error.value.fix


def test_what_processes_split_and_what_each_keeps(tmp_path):
    """Of every process, beside the numbers of one that is alone."""
    run = load_run(write_small(tmp_path))
    run = changed(run, "dpo", parallel="fsdp2", micro_tokens=8)
    shape = shape_of_config(run.model, vocabulary_of(run))
    (alone,) = forecast(run, ["dpo"], Launch())
    (split,) = forecast(run, ["dpo"], Launch(4, 2))
    (whole,) = forecast(changed(run, "dpo", parallel="ddp"), ["dpo"], Launch(4, 2))
    for part in ("weights", "gradients", "optimizer", "reference"):
        assert split.memory[part] == alone.memory[part] // 4
        assert whole.memory[part] == alone.memory[part]
    assert whole.memory["gradients under way"] == 4 * shape.parameters
    assert "gathered" not in whole.memory
    # Both layers and the tied embedding whole, and gradients of the embedding and one layer.
    embedding = shape.vocabulary * shape.width
    layer = (shape.parameters - embedding) // 2
    assert split.memory["gathered"] == 4 * (2 * embedding + 3 * layer)
    assert whole.memory["program"] == alone.memory["program"]
    assert split.memory["program"] == alone.memory["program"] + SHARDING
    assert split.on_machine == 2 * split.peak + split.first
    assert whole.first == alone.first == 0
    passes = sum(split.memory[part] for part in ("activations", "attention", "log-probs"))
    state = 12 * shape.parameters
    assert split.first == max(0, state - split.memory["gathered"] - passes)
    assert "2 × " in table([split], 1e11, lengths_of(run))


def test_processes_of_one_machine_share_its_cores_and_many_machines_the_work(tmp_path):
    run = load_run(write_small(tmp_path))
    one, here, apart = (
        forecast(run, ["sft"], Launch(count, on, False))[0]
        for count, on in ((1, 1), (4, 4), (4, 1))
    )
    assert here.operations == one.operations
    assert apart.operations == one.operations / 4
    assert apart.other_s == pytest.approx(one.other_s / 4)


def test_the_rate_of_products_is_not_that_of_loading_them(monkeypatch):
    """A GPU's libraries take longer to load than all tries together."""
    clock, calls = [0.0], [0]

    def product(a, b):
        calls[0] += 1
        clock[0] += 0.5 if calls[0] == 1 else 0.01

    monkeypatch.setattr(machine, "product", product)
    monkeypatch.setattr(machine, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    assert machine.product_rate(64, 128) == pytest.approx(2 * 2048 * 64 * 128 / 0.01)


def test_what_vllm_takes_of_a_gpu(tmp_path, monkeypatch):
    """A share for each server on the trainer's; less while it sleeps and a pass runs."""
    card = Machine(1 << 40, 1 << 40, 1 << 44, 80 * GIB, 80 * GIB)
    monkeypatch.setattr("pipeline.estimate.this_machine", lambda out: card)
    run = load_run(write_small(tmp_path))

    def forecast_of(gpus, launch=None, **table):
        monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
        table = {"device": "cuda", "gpu_memory_share": 0.25, **table}
        engine = load_plugin("pipeline.engines", table["kind"], where="kind").Config(**table)
        other = run.model_copy(update={"engine": engine})
        return forecast(other, ["grpo"], launch or Launch())[0].memory

    servers = {"kind": "vllm_server", "servers": 2}
    alone = forecast_of(1, kind="vllm")
    assert alone["vLLM"] == 20 * GIB
    assert forecast_of(1, **servers)["vLLM"] == 40 * GIB
    assert forecast_of(2, **servers)["vLLM"] == 20 * GIB
    assert forecast_of(2, **servers, transfer="ipc")["vLLM"] == 40 * GIB
    assert "vLLM" not in forecast_of(3, **servers)
    asleep = forecast_of(1, kind="vllm", sleep=True)
    passes = sum(alone[part] for part in ("activations", "attention", "log-probs"))
    assert passes > 0
    assert asleep == {**alone, "vLLM": 20 * GIB - passes}


QWEN_7B = {
    "model_type": "qwen2", "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944,
    "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
    "max_position_embeddings": 4096, "tie_word_embeddings": False,
}  # fmt: skip


def test_the_arithmetic_of_the_7b_files_is_the_forecasts(root, tmp_path):
    """The table of pipeline/configs/README.md: GB of each of 8 GPUs."""
    (tmp_path / "config.json").write_text(json.dumps(QWEN_7B))
    run = load_run(root / "pipeline" / "configs" / "gsm8k_7b_node.toml")
    model = run.model.model_copy(update={"path": str(tmp_path)})
    engine = run.engine.model_copy(update={"device": "cuda"})
    run = run.model_copy(update={"model": model, "engine": engine})
    (found,) = forecast(run, ["sft"], Launch(8, 8))
    gb = {part: size / 1e9 for part, size in found.memory.items()}
    assert gb["weights"] == pytest.approx(3.8, abs=0.05)
    assert gb["gradients"] == pytest.approx(3.8, abs=0.05)
    assert gb["optimizer"] == pytest.approx(11.4, abs=0.05)
    assert gb["gathered"] == pytest.approx(6.2 + 5.3, abs=0.1)
    assert gb["copies in bfloat16"] < 0.6
    (whole,) = forecast(changed(run, "sft", parallel="ddp"), ["sft"], Launch(8, 8))
    with pytest.raises(UserError, match=r"'sft': it would take about .* of GPU memory"):
        # The card of the files; the forecast's own look is at this machine.
        refuse_what_cannot_fit(run, [whole], Machine(1 << 40, 1 << 40, 1 << 44, 80 * GIB, 80 * GIB))
    assert (
        refuse_what_cannot_fit(run, [found], Machine(1 << 40, 1 << 40, 1 << 44, 80 * GIB, 80 * GIB))
        == []
    )
    # Its servers are on other GPUs.
    (grpo,) = forecast(run, ["grpo"], Launch(5, 5))
    assert "vLLM" not in grpo.memory


def test_what_cannot_fit_is_refused_with_the_key_that_would_help(tmp_path):
    run = load_run(write_small(tmp_path))
    one = Forecast(
        "grpo",
        memory={"program": GIB, "activations": 8 * GIB},
        kept={"checkpoint": 3 * GIB},
        scratch=GIB,
        keys={"activations": "lower micro_tokens of stage 'grpo'", "checkpoint": "train less"},
    )
    roomy = Machine(memory=16 * GIB, available=12 * GIB, disk=100 * GIB)
    assert refuse_what_cannot_fit(run, [one], roomy) == []
    tight = Machine(memory=16 * GIB, available=4 * GIB, disk=100 * GIB)
    assert "4.0 GiB is free now" in refuse_what_cannot_fit(run, [one], tight)[0]
    small = Machine(memory=8 * GIB, available=8 * GIB, disk=100 * GIB)
    with pytest.raises(
        UserError, match=r"'grpo'.*9\.0 GiB of memory, 8\.0 GiB of it for activ"
    ) as e:
        refuse_what_cannot_fit(run, [one], small)
    assert "lower micro_tokens of stage 'grpo'" in e.value.fix
    full = Machine(memory=16 * GIB, available=12 * GIB, disk=2 * GIB)
    with pytest.raises(UserError, match=r"4\.0 GiB of disk, 3\.0 GiB of it for checkpoint") as e:
        refuse_what_cannot_fit(run, [one], full)
    assert "train less" in e.value.fix


def test_a_run_that_cannot_fit_ends_before_its_first_stage(tmp_path, capsys):
    huge = Path(write_small(tmp_path)).read_text().replace("width = 32", "width = 65536")
    huge = huge.replace("feed_forward = 48", "feed_forward = 262144\nrope_theta = 1e4")
    path = tmp_path / "huge.toml"
    path.write_text(huge.replace("layers = 2", "layers = 96"))
    with pytest.raises(UserError, match=r"stage 'sft': it would take about .* for optimizer") as e:
        main(["--config", str(path)])
    assert "lora.rank" in e.value.fix
    assert "--no-forecast" in e.value.fix
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match="it would take"):
        main(["--config", str(path), "--dry-run"])
    main(["--config", str(path), "--dry-run", "--no-forecast"])
    assert "width = 65536" in capsys.readouterr().out


def test_what_a_launcher_will_start_is_forecast(tmp_path, capsys):
    main(
        [
            "--config",
            str(write_small(tmp_path)),
            "--dry-run",
            "--launch",
            "torchrun --nproc-per-node 4",
        ]
    )
    rows = dict(line.split(maxsplit=1) for line in capsys.readouterr().err.splitlines())
    assert all(rows[stage].startswith("4 × ") for stage in ("sft", "rft", "dpo", "grpo"))
    assert not rows["generate"].startswith("4 × ")
    with pytest.raises(UserError, match="each would train alone"):
        main(["--config", str(tmp_path / "small.toml"), "--dry-run", "--launch", "mpirun -n 4"])


def test_numbers_are_written_for_people():
    assert [size_text(s) for s in (0, 2048, 3 * 2**20, 12.34 * 2**30, 1.5 * 2**30)] == [
        "0 KiB", "2 KiB", "3.0 MiB", "12 GiB", "1.5 GiB",
    ]  # fmt: skip
    assert [count_text(c) for c in (0, 12, 2300, 4.56e6, 7e9)] == [
        "–",
        "12",
        "2.3 k",
        "4.6 M",
        "7.0 G",
    ]
    assert [time_text(t) for t in (3, 600, 7200, 3e5)] == ["3 s", "10 min", "2.0 h", "3.5 days"]


def test_a_machine_is_looked_at_without_its_run_folder(tmp_path):
    found = this_machine(tmp_path / "not" / "there")
    assert found.memory >= found.available > 0
    assert found.disk > 0


# The demo, and a model of 25 million parameters on the demo's data: whole steps, few of them.
MODELS = {
    "1m": {},
    "25m": {"width": 512, "layers": 8, "heads": 8, "kv_heads": 8, "feed_forward": 1408},
}
FEW = {"sft": 3, "rft": 3, "dpo": 3, "grpo": 2}


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("size", MODELS)
def test_the_forecast_is_near_the_measured_peaks(size, root, tmp_path):
    run = resolve(root / "pipeline" / "configs" / "cpu.toml", {"out": str(tmp_path / "run")})
    for name, steps in FEW.items():
        run = changed(run, name, steps=steps, validate_every=steps if name == "sft" else 0)
    model = run.model.model_copy(update=MODELS[size])
    generate = run.generate.model_copy(update={"limit": 256})
    evaluate = run.evaluate.model_copy(update={"limit": 256})
    # A model of three steps rarely ends by itself: it is given the length that is expected of one
    # that has learnt, and a checker that gives both verdicts, or no group would carry signal.
    sampling = run.sampling.model_copy(update={"max_tokens": 32})
    write_small(tmp_path)
    verify = run.verify.model_copy(update={"checker": {"kind": str(tmp_path / "even_length.py")}})
    run = run.model_copy(
        update={
            "model": model,
            "generate": generate,
            "evaluate": evaluate,
            "sampling": sampling,
            "verify": verify,
        }
    )
    path = tmp_path / "run.toml"
    path.write_text(dump_toml(run), encoding="utf-8")
    measured = {}
    commands = {
        "data": ["data_prep.build"],
        "sft": ["pipeline.train", "--stage", "sft"],
        "generate": ["pipeline.generate"],
        "verify": ["pipeline.verify"],
        "rft": ["pipeline.train", "--stage", "rft"],
        "dpo": ["pipeline.train", "--stage", "dpo"],
        "grpo": ["pipeline.train", "--stage", "grpo"],
        "evaluate": ["eval.run", "--checkpoints", "sft"],
    }
    for name, words in commands.items():
        measured[name] = peak_of([*words, "--config", str(path)], root)
    expected = {stage.stage: stage.peak for stage in forecast(run)}
    ratios = {name: expected[name] / peak for name, peak in measured.items()}
    shown = {name: f"{ratios[name]:.2f} of {size_text(peak)}" for name, peak in measured.items()}
    print(json.dumps({"size": size, "forecast over measured": shown}))
    assert all(1 / FACTOR < ratio < FACTOR for ratio in ratios.values()), shown


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
def test_the_forecast_of_two_processes_is_near_their_peaks(parallel, root, tmp_path):
    """Of each of them, with 25 million parameters: SFT, DPO with a reference, GRPO."""
    run = resolve(root / "pipeline" / "configs" / "cpu.toml", {"out": str(tmp_path / "run")})
    for name, steps in FEW.items():
        run = changed(run, name, steps=steps, validate_every=0, parallel=parallel)
    write_small(tmp_path)
    run = run.model_copy(
        update={
            "model": run.model.model_copy(update=MODELS["25m"]),
            "generate": run.generate.model_copy(update={"limit": 128}),
            "sampling": run.sampling.model_copy(update={"max_tokens": 32}),
            "verify": run.verify.model_copy(
                update={"checker": {"kind": str(tmp_path / "even_length.py")}}
            ),
        }
    )
    path = tmp_path / "run.toml"
    path.write_text(dump_toml(run), encoding="utf-8")
    shown, ratios = {}, {}
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    for name in ("data", "sft", "generate", "verify", "dpo", "grpo"):
        if name in ("data", "generate", "verify"):
            module = {"data": "data_prep.build"}.get(name, f"pipeline.{name}")
            peak_of([module, "--config", str(path)], root)
            continue
        words = [*torchrun, "pipeline.train", "--stage", name, "--config", str(path)]
        measured = sorted(peaks_of(words, root))
        (found,) = forecast(run, [name], Launch(2, 2))
        expected = sorted([found.peak, found.peak + found.first])
        ratios[name] = [e / m for e, m in zip(expected, measured, strict=True)]
        shown[name] = [
            f"{e / m:.2f} of {size_text(m)}" for e, m in zip(expected, measured, strict=True)
        ]
    print(json.dumps({"parallel": parallel, "forecast over measured": shown}))
    assert all(1 / FACTOR < ratio < FACTOR for two in ratios.values() for ratio in two), shown


def resident(process: Any) -> int:
    """Return the memory of a process and of those that it started, bytes.

    Between its fork and its program's start a child has the command line and the pages of its
    parent, which are there once.
    """
    words = process.cmdline()
    children = [p for p in process.children(recursive=True) if p.cmdline() != words]
    return sum(p.memory_info().rss for p in (process, *children))


def peaks_of(words: list[str], root: Path) -> list[int]:
    """Return the largest memory of each process that a launcher starts, bytes, with its own."""
    import psutil

    process = subprocess.Popen(
        [sys.executable, "-m", *words], cwd=root, env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    largest: dict[int, int] = {}
    launcher = psutil.Process(process.pid)
    while process.poll() is None:
        for rank in launcher.children():
            try:
                largest[rank.pid] = max(largest.get(rank.pid, 0), resident(rank))
            except psutil.NoSuchProcess:
                continue
        time.sleep(0.05)
    with process.stderr as errors:
        assert process.returncode == 0, errors.read()[-2000:]
    return [size for size in largest.values() if size > 100 * 2**20]


def peak_of(words: list[str], root: Path) -> int:
    """Return the largest memory that a command and its processes had at one time, bytes."""
    import psutil

    command = [sys.executable, "-m", words[0], *words[1:]]
    process = subprocess.Popen(
        command, cwd=root, env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    largest, own = 0, psutil.Process(process.pid)
    while True:
        with contextlib.suppress(psutil.NoSuchProcess):
            largest = max(largest, resident(own))
        try:
            process.wait(0.05)
            break
        except subprocess.TimeoutExpired:
            continue
    with process.stderr as errors:
        assert process.returncode == 0, errors.read()[-2000:]
    return largest
