"""The learning rate of every step, and which parameters decay."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

from pipeline.config import OptimizerConfig
from pipeline.optimizer import build_optimizer, learning_rate, set_learning_rate


def rates(total: int, beyond: int = 0, **options) -> list[float]:
    config = OptimizerConfig(**{"learning_rate": 1.0, **options})
    return [learning_rate(config, step, total) for step in range(total + beyond)]


def test_the_warm_up_ends_at_the_peak_and_the_last_step_still_moves():
    found = rates(8, 2, warmup_steps=4, schedule="linear")
    assert found == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0, 0.0])
    assert rates(3, warmup_steps=0, schedule="linear") == pytest.approx([1.0, 2 / 3, 1 / 3])
    assert rates(1, warmup_steps=0, schedule="cosine") == [1.0]
    # A stage that is shorter than its warm-up never reaches the peak.
    assert rates(2, warmup_steps=4, schedule="cosine") == pytest.approx([0.25, 0.5])


def test_it_falls_to_a_share_of_the_peak():
    for schedule in ("linear", "cosine"):
        found = rates(8, 1, warmup_steps=2, schedule=schedule, final_share=0.1)
        assert found[5] == pytest.approx(0.55)  # half way
        assert found[8] == pytest.approx(0.1)
        assert found[2:] == sorted(found[2:], reverse=True)
    assert rates(6, warmup_steps=2, schedule="constant", final_share=0.1)[2:] == [1.0] * 4


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_behind_the_warm_up_it_is_the_schedule_of_transformers(kind):
    make = {"linear": get_linear_schedule_with_warmup, "cosine": get_cosine_schedule_with_warmup}
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = make[kind](optimizer, num_warmup_steps=3, num_training_steps=11)
    theirs = []
    for _ in range(11):
        theirs.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert rates(11, warmup_steps=3, schedule=kind)[3:] == pytest.approx(theirs[3:])


def test_matrices_decay_and_a_module_may_have_a_share_of_the_rate():
    policy, critic = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2)), nn.Linear(2, 1)
    policy[0].bias.requires_grad_(False)
    config = OptimizerConfig(learning_rate=0.5, weight_decay=0.1)
    optimizer = build_optimizer((policy, 1.0), (critic, 0.2), config=config)
    set_learning_rate(optimizer, 0.4)
    found = {
        id(parameter): (group["weight_decay"], pytest.approx(group["lr"]))
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    assert found == {
        id(policy[0].weight): (0.1, 0.4),
        id(policy[1].weight): (0.0, 0.4),
        id(policy[1].bias): (0.0, 0.4),
        id(critic.weight): (0.1, 0.08),
        id(critic.bias): (0.0, 0.08),
    }
