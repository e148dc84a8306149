"""Supervised rows as the trainer reads them: packed shards, document by document."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from data_prep.packing import training_sequences
from data_prep.shards import Document, write_shards
from pipeline.batch import Sequence, flatten, micro_batches
from pipeline.fixed import Rows
from pipeline.methods.sft import Config, create
from pipeline.model import load_model
from pipeline.policy import logprobs_of

LENGTHS = [23, 9, 14, 31, 7, 18, 5, 26, 11]
CAPACITY = 40
# Two assistant turns: what stands between them carries no loss.
TURNS = [0, 0, 1, 1, 0, 0, 1, 1]


class Drawn:
    """Documents of random tokens, each with a prompt and one or two answers."""

    def __init__(self) -> None:
        rng = np.random.default_rng(5)
        self.ids = [rng.integers(0, 320, n, dtype=np.int32) for n in LENGTHS]
        self.masks = [np.resize(np.array(TURNS, dtype=np.int8), n) for n in LENGTHS]

    def read(self, document: Document) -> tuple[np.ndarray, np.ndarray]:
        return self.ids[document.offset], self.masks[document.offset]


@pytest.fixture
def drawn() -> Drawn:
    return Drawn()


@pytest.fixture
def stage(tmp_path: Path, drawn: Drawn) -> Path:
    """A packed stage: fewer sequences than documents."""
    sequences = training_sequences(LENGTHS, CAPACITY, "best_fit", 0)
    assert len(sequences) < len(LENGTHS)
    documents = [Document("", i, n, 0, i) for i, n in enumerate(LENGTHS)]
    write_shards(tmp_path, "train", documents, sequences, drawn, ["drawn"], size=2, workers=1)
    return tmp_path


def tiny(checkpoint: Path) -> Any:
    """The model of 320 tokens, with weights that are not too flat, in float64."""
    return load_model(checkpoint, "float64")


def gradient(model: Any, loss: torch.Tensor) -> torch.Tensor:
    model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def packed_gradient(model: Any, sequences: list[Sequence], micro_tokens: int) -> torch.Tensor:
    """The trainer's gradient: coefficients of SFT over micro-batches of documents side by side."""
    method = create(Config())
    tokens = flatten(sequences, torch.float64)
    tokens.weight = method.weights(tokens, 64)
    loss = torch.zeros((), dtype=torch.float64)
    for micro in micro_batches(sequences, tokens, micro_tokens):
        logp = logprobs_of(model, micro.layout).logp
        coefficient = method.gradient_coefficient(micro.tokens, logp.detach())
        loss = loss - (coefficient * micro.tokens.weight * logp).sum()
    return gradient(model, loss)


def alone_gradient(model: Any, drawn: Drawn) -> torch.Tensor:
    """The mean loss of the masked tokens, every document in a forward pass of its own."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for ids, mask in zip(drawn.ids, drawn.masks, strict=True):
        tokens = torch.from_numpy(ids.astype(np.int64))[None]
        losses = cross_entropy(
            model(input_ids=tokens).logits[0, :-1], tokens[0, 1:], reduction="none"
        )
        kept = torch.from_numpy(mask[1:].astype(np.float64))
        total, count = total + (losses * kept).sum(), count + int(mask[1:].sum())
    return gradient(model, total / count)


@pytest.mark.parametrize("micro_tokens", [1, CAPACITY, 96, 10_000])
def test_packed_documents_give_the_gradient_of_documents_alone(
    stage, drawn, checkpoint, micro_tokens
):
    model = tiny(checkpoint)
    rows = Rows(stage, "train")
    found = packed_gradient(model, rows.take(range(len(rows))), micro_tokens)
    expected = alone_gradient(model, drawn)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert float(expected.norm()) > 0.1


def test_a_sequence_read_as_one_text_gives_another_gradient(stage, checkpoint):
    # What the boundaries are for: without them the same tokens train something else.
    rows = Rows(stage, "train")
    joined = []
    for index in range(len(rows)):
        documents = rows.take([index])
        ids = [t for d in documents for t in d.prompt + d.completion]
        mask = [m for d in documents for m in [False] * len(d.prompt) + d.mask]
        joined.append(Sequence(ids[:1], ids[1:], mask[1:], index))
    model = tiny(checkpoint)
    apart = packed_gradient(model, rows.take(range(len(rows))), 10_000)
    as_one = packed_gradient(model, joined, 10_000)
    assert float((apart - as_one).norm() / apart.norm()) > 0.01


def test_a_batch_is_the_documents_of_its_sequences(stage, drawn):
    rows = Rows(stage, "train")
    assert rows.sequences.longest == max(LENGTHS)
    whole = rows.take(range(len(rows)))
    assert sorted(len(s.prompt) + len(s.completion) for s in whole) == sorted(LENGTHS)
    texts = {
        tuple(ids.tolist()): mask.tolist() for ids, mask in zip(drawn.ids, drawn.masks, strict=True)
    }
    for sequence in whole:
        mask = texts[tuple(sequence.prompt + sequence.completion)]
        assert [0] * len(sequence.prompt) + [int(m) for m in sequence.mask] == mask
        assert sequence.mask[0]
    parts = [rows.take([i]) for i in range(len(rows))]
    assert [s.prompt for part in parts for s in part] == [s.prompt for s in whole]
    assert len({s.group for s in whole}) == len(whole)


def test_the_last_turn_alone_can_carry_the_loss(stage, drawn):
    rows = Rows(stage, "train")
    everything = rows.take(range(len(rows)))
    last = rows.take(range(len(rows)), last_turn_only=True)
    for one, other in zip(everything, last, strict=True):
        assert one.prompt + one.completion == other.prompt + other.completion
        whole = [False] * len(one.prompt) + one.mask
        kept = [False] * len(other.prompt) + other.mask
        # Turns are two tokens, and may be cut to one at the end of a document.
        end = max(i for i, bit in enumerate(whole) if bit)
        start = max([0, *(i + 1 for i in range(end) if not whole[i])])
        assert kept == [start <= i <= end for i in range(len(whole))]
    assert sum(sum(s.mask) for s in last) < sum(sum(s.mask) for s in everything)
