"""What the reference says of a batch that comes again is asked once, and nothing else changes."""

from __future__ import annotations

import pytest
import torch

from pipeline import trainer as trainer_module
from pipeline.batch import Sequence
from pipeline.config import TrainConfig
from pipeline.methods import create_method
from pipeline.model import load_model

from .small_run import small_run


def batches() -> list[list[Sequence]]:
    def pair(prompt: int, group: int) -> list[Sequence]:
        return [
            Sequence([prompt, 31], [50 + prompt, 60, 41], [True] * 3, group, sign=1),
            Sequence([prompt, 31], [52 + prompt, 44], [True] * 2, group, sign=-1),
        ]

    return [pair(30, 0) + pair(33, 1), pair(35, 0) + pair(38, 1)]


def trained(checkpoint, tmp_path, monkeypatch, *, places: bool, updates: int = 1):
    """Return the weights after two epochs, and how often the reference was run."""
    config = TrainConfig(name="x", method={"kind": "dpo", "updates": updates})
    reference = load_model(checkpoint).requires_grad_(False)
    trainer = trainer_module.Trainer(
        small_run(tmp_path), config, create_method(config.method), load_model(checkpoint), reference
    )
    asked, own = [], trainer_module.hidden_states

    def counted(backbone, *rest):
        asked.append(backbone is reference.base_model)
        return own(backbone, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(trainer_module, "hidden_states", counted)
        for step in range(4):
            place = step % 2
            trainer.update(batches()[place], step, 4, place if places else None)
    assert sum(not own for own in asked) == 4 * updates
    return trainer, sum(asked)


@pytest.mark.parametrize("updates", [1, 2])
def test_a_batch_that_comes_again_has_its_reference(checkpoint, tmp_path, monkeypatch, updates):
    kept, few = trained(checkpoint, tmp_path, monkeypatch, places=True, updates=updates)
    fresh, many = trained(checkpoint, tmp_path, monkeypatch, places=False, updates=updates)
    assert (few, many) == (2, 4)
    pairs = zip(kept.model.parameters(), fresh.model.parameters(), strict=True)
    assert all(torch.equal(*pair) for pair in pairs)


def test_a_new_reference_is_asked_anew(checkpoint, tmp_path, monkeypatch):
    trainer, _ = trained(checkpoint, tmp_path, monkeypatch, places=True)
    assert set(trainer.references) == {0, 1}
    trainer.reset_reference()
    assert not trainer.references
