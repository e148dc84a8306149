"""Where tensors are: no operation of training or sampling mixes a GPU's with the CPU's.

"meta", which has shapes and devices and no numbers, stands for the GPU: every operation is looked
at as it is dispatched, and what reads a number gets one that is made up.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental import _config as fx_config
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from data_prep.config import validate
from pipeline.batch import Sequence
from pipeline.config import TrainConfig
from pipeline.engines import Prompt, Sampling, embedded
from pipeline.engines._decoder import Unwritten
from pipeline.methods import create_method
from pipeline.model import load_model, load_tokenizer
from pipeline.trainer import Trainer, build_trainer

from .small_run import small_run

GPU = torch.device("meta")
# Between the devices goes what says so.
COPIES = ("aten::copy_", "aten::_to_copy")
# What a CUDA graph cannot hold: it would wait for the GPU, or for memory that is not pinned.
WAITS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::unique")


READS = (
    Tensor.cpu, Tensor.tolist, Tensor.item, Tensor.numpy,
    Tensor.__float__, Tensor.__int__, Tensor.__index__, Tensor.__bool__,
)  # fmt: skip


class OneDevice(TorchDispatchMode):
    """Refuses an operation on tensors of two devices; numbers without an axis may be anywhere."""

    captures = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name()
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        found = {x.device.type for x in tensors if x.ndim}
        is_copy = name.startswith(COPIES)
        assert len(found) <= 1 or (is_copy and not self.captures), f"{name} on {sorted(found)}"
        if self.captures:
            assert found <= {"meta"}, f"{name} on {sorted(found)}"
            assert not name.startswith(WAITS), f"{name} waits for the GPU"
            flags = name.startswith("aten::index") and any(
                x.dtype == torch.bool for x in tensors[1:]
            )
            assert not flags, f"{name} by flags counts them on the CPU"
            assert (kwargs or {}).get("device", GPU).type == "meta", f"{name} of another device"
        return func(*args, **(kwargs or {}))


class Numbers(TorchFunctionMode):
    """Gives made-up numbers to who reads them: flags are now of some samples, now of all."""

    def __init__(self, looks: OneDevice) -> None:
        super().__init__()
        self.looks, self.asked = looks, 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if not args or not isinstance(args[0], Tensor) or args[0].device != GPU:
            return func(*args, **kwargs)
        given = args[0]
        assert not (self.looks.captures and func in READS), f"{func.__name__} waits for the GPU"
        if func is Tensor.cpu and given.dtype == torch.bool:
            self.asked += 1
            ended = torch.zeros(given.shape, dtype=torch.bool)
            ended[:: 2 if self.asked % 9 else 1] = not self.asked % 3
            return ended
        to_cpu = func is Tensor.to and any(str(a) == "cpu" for a in (*args[1:], *kwargs.values()))
        if func is Tensor.cpu or to_cpu:
            dtype = next((a for a in args[1:] if isinstance(a, torch.dtype)), given.dtype)
            return torch.ones(given.shape, dtype=dtype)
        if func is Tensor.tolist:
            return torch.ones(given.shape, dtype=given.dtype).tolist()
        if func in (Tensor.item, Tensor.__float__):
            return 0.5
        if func in (Tensor.__int__, Tensor.__index__, Tensor.__bool__):
            return True if func is Tensor.__bool__ else 1
        assert func is not Tensor.numpy, "numpy of a GPU's tensor"
        return func(*args, **kwargs)


@pytest.fixture
def one_device(monkeypatch):
    """Let "meta" do what a GPU does beyond operations."""
    for module in ("pipeline.stage_models", "pipeline.engines.embedded"):
        monkeypatch.setattr(f"{module}.pick_device", lambda name: GPU)
    known = torch.autocast

    def autocast(device_type, *words, **options):
        return nullcontext() if device_type == "meta" else known(device_type, *words, **options)

    monkeypatch.setattr(torch, "autocast", autocast)
    monkeypatch.setattr(Trainer, "_clip", lambda self, module: 1.0)
    with fx_config.patch(meta_nonzero_assume_all_nonzero=True):
        yield OneDevice()


def samples(ends_only: bool) -> list[Sequence]:
    """Two groups of two, of other lengths each, with all that a method may look at."""
    found = []
    for group, index in ((0, 0), (0, 1), (1, 0), (1, 1)):
        length = 3 + group + index
        found.append(
            Sequence(
                [1, 2, 3 + group],
                list(range(4, 4 + length)),
                [not ends_only or i == length - 1 for i in range(length)],
                group,
                reward=float(index),
                correct=bool(index),
                steps=[(length - 1, 0.0)] if ends_only else [(1, 1.0), (length - 1, 0.0)],
                advantage=0.5 - index,
                segments=[0, 0] + [1] * (length - 2),
                logprobs=[-1.0] * length,
                sign=1 - 2 * index,
                finish_reason="stop",
            )
        )
    return found


@pytest.mark.parametrize(
    ("method", "more"),
    [
        ({"kind": "sft"}, {"precision": "bfloat16"}),
        ({"kind": "rft"}, {"lora": {"rank": 2}}),
        ({"kind": "dpo"}, {}),
        ({"kind": "online_rft"}, {}),
        ({"kind": "reinforce"}, {}),
        ({"kind": "rloo"}, {}),
        ({"kind": "dr_grpo"}, {}),
        ({"kind": "cispo"}, {}),
        ({"kind": "gspo"}, {}),
        ({"kind": "dapo"}, {"correction": {"kind": "sequence"}}),
        ({"kind": "grft"}, {}),
        ({"kind": "segment_rft"}, {}),
        ({"kind": "reward_model"}, {}),
        ({"kind": "process_reward_model"}, {"lora": {"rank": 2}}),
        ({"kind": "grpo", "beta": 0.04, "updates": 2}, {"correction": {"kind": "token"}}),
        ({"kind": "grpo", "beta": 0.04}, {"lora": {"rank": 2}, "precision": "bfloat16"}),
        ({"kind": "ppo"}, {}),
        ({"kind": "ppo", "critic": "separate"}, {"precision": "bfloat16"}),
    ],
    ids=lambda value: "-".join(str(v) for v in value.values()) or "plain",
)
def test_a_step_of_every_method(one_device, checkpoint, tmp_path, method, more):
    run = small_run(tmp_path)
    table = {"name": "t", "init": str(checkpoint), "method": method, "micro_tokens": 12, **more}
    config = validate(TrainConfig, table, "stage")
    chosen = create_method(config.method)
    tokenizer = load_tokenizer(checkpoint)
    trainer = build_trainer(run, config, chosen, str(checkpoint), tokenizer)
    trainer.optimizer.step = lambda: None  # type: ignore[assignment, method-assign]
    batch = samples(ends_only=method["kind"] == "reward_model")
    with Numbers(one_device), one_device:
        figures = trainer.update(batch, 0, 3)
        if chosen.source != "policy":
            trainer.held_out(batch)
    assert figures["grad_norm"] == 1.0
    gradients = [p.grad for m in trainer.trained.values() for p in m.parameters()]
    assert any(g is not None and g.device == GPU for g in gradients)


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"top_p": 0.9, "top_k": 5, "min_p": 0.01, "temperature": 0.7},
        {"repetition_penalty": 1.2, "stop": ("x",)},
        {"temperature": 0.0},
    ],
    ids=["plain", "cut", "penalised", "greedy"],
)
@pytest.mark.parametrize(
    ("written", "dtype"), [(True, "float32"), (True, "bfloat16"), (False, "float32")]
)
def test_sampling(one_device, checkpoint, monkeypatch, dtype, how, written):
    """Where the decoder is ours, a step also holds nothing that a CUDA graph cannot."""
    if not written:

        def unwritten(*_: Any) -> None:
            raise Unwritten("nothing")

        monkeypatch.setattr(embedded, "Decoder", unwritten)
    compute, steps = embedded._Batch._compute, []

    def captured(batch, size):
        one_device.captures = written
        steps.append(compute(batch, size))
        one_device.captures = False
        return steps[-1]

    monkeypatch.setattr(embedded._Batch, "_compute", captured)
    config = embedded.Config(dtype=dtype, slots=8, compiled=False)
    with one_device, Numbers(one_device):
        if written:
            engine = embedded.create(config, checkpoint)
        else:
            with pytest.warns(UserWarning, match="own forward pass"):
                engine = embedded.create(config, checkpoint)
        prompts = [Prompt(str(i), tuple(range(3, 5 + 3 * i))) for i in range(6)]
        for version in range(2):
            state = load_model(checkpoint, dtype).state_dict()
            weights = {name: torch.empty_like(value, device=GPU) for name, value in state.items()}
            engine.load_weights(weights.items(), version)
            groups = engine.generate(prompts, Sampling(n=3, max_tokens=12, **how))
            assert [len(group.completions) for group in groups] == [3] * 6
    assert {step.device for step in steps} == {GPU}
