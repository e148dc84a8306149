"""Whatever the layout and the split, log-probs and gradients are those of lone sequences."""

from __future__ import annotations

import random

import pytest
import torch

from data_prep.errors import UserError
from pipeline.batch import Sequence, flatten, micro_batches
from pipeline.model import load_model
from pipeline.normaliser import token_weights
from pipeline.policy import check_head, logprobs_of


@pytest.fixture(scope="module")
def model(checkpoint):
    return load_model(checkpoint, "float64")


def make_sequences(groups: int, size: int) -> list[Sequence]:
    rng = random.Random(5)
    sequences = []
    for group in range(groups):
        prompt = [rng.randrange(20, 300) for _ in range(rng.randint(3, 9))]
        for _ in range(size):
            length = rng.randint(1, 12)
            completion = [rng.randrange(20, 300) for _ in range(length)]
            mask = [rng.random() < 0.7 for _ in range(length)]
            mask[rng.randrange(length)] = True
            sequences.append(Sequence(prompt, completion, mask, group))
    rng.shuffle(sequences)
    return sequences


def lone_logprobs(model, sequence: Sequence, temperature: float) -> torch.Tensor:
    """The slow, plain way: one sequence, dense logits, every loss-carrying token."""
    ids = torch.tensor([sequence.prompt + sequence.completion])
    logp = torch.log_softmax(model(ids).logits[0] / temperature, dim=-1)
    at = [len(sequence.prompt) + i for i, kept in enumerate(sequence.mask) if kept]
    return torch.stack([logp[i - 1, ids[0, i]] for i in at])


def collect(model, sequences, micro_tokens, share, temperature=1.0):
    tokens = flatten(sequences, torch.float64)
    result = torch.zeros(len(tokens.weight), dtype=torch.float64)
    for micro in micro_batches(sequences, tokens, micro_tokens, share=share):
        result[micro.token_index] = logprobs_of(model, micro.layout, temperature)[0].detach()
    return result


@pytest.fixture(params=["packed", "rows"])
def passes(request, monkeypatch):
    """Through the pass over packed tokens, and through transformers' own over padded rows."""
    if request.param == "rows":
        monkeypatch.setattr("pipeline.policy.serves", lambda _: False)


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("micro_tokens", [1, 60, 100000])
def test_every_layout_gives_the_log_probs_of_lone_sequences(model, share, micro_tokens, passes):
    sequences = make_sequences(groups=5, size=3)
    expected = torch.cat([lone_logprobs(model, s, 0.7) for s in sequences])
    found = collect(model, sequences, micro_tokens, share, 0.7)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_a_row_whose_loss_spans_several_turns(model):
    sequence = Sequence([21], [30, 31, 32, 33, 34], [True, False, False, True, True], 0)
    expected = lone_logprobs(model, sequence, 1.0)
    torch.testing.assert_close(collect(model, [sequence], 64, True), expected)


def gradient(model, sequences, kind, micro_tokens, share):
    model.zero_grad()
    tokens = flatten(sequences, torch.float64)
    tokens.weight = token_weights(tokens, kind, max_tokens=16)
    generator = torch.Generator().manual_seed(2)
    coefficient = torch.randn(len(tokens.weight), dtype=torch.float64, generator=generator)
    for micro in micro_batches(sequences, tokens, micro_tokens, share=share):
        logp = logprobs_of(model, micro.layout).logp
        (coefficient[micro.token_index] * micro.tokens.weight * logp).sum().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("kind", ["sequence", "token", "group_token", "constant"])
def test_the_gradient_does_not_depend_on_the_split(model, kind, passes):
    sequences = make_sequences(groups=4, size=3)
    whole = gradient(model, sequences, kind, 100000, True)
    assert whole.abs().max() > 1e-3
    for micro_tokens, share in [(1, True), (40, True), (40, False), (100000, False)]:
        split = gradient(model, sequences, kind, micro_tokens, share)
        torch.testing.assert_close(split, whole, rtol=1e-10, atol=1e-10)


def test_passes_are_full_and_none_is_too_full(model):
    sequences = make_sequences(groups=9, size=2)
    tokens = flatten(sequences)
    alone = [len(layout_tokens) for layout_tokens in passes_of(sequences, tokens, 1)]
    assert len(alone) == 9
    found = [len(layout_tokens) for layout_tokens in passes_of(sequences, tokens, 60)]
    assert sum(found) == sum(alone) and max(found) <= 60
    # Only the next document's size, at most the largest, keeps a pass from being full.
    assert min(found[:-1]) > 60 - max(alone)


def passes_of(sequences, tokens, micro_tokens):
    return [m.layout.input_ids for m in micro_batches(sequences, tokens, micro_tokens)]


def test_normalisers_by_hand():
    lengths = [2, 4, 3]
    sequences = [
        Sequence([1], [5] * n, [True] * n, group)
        for n, group in zip(lengths, [0, 0, 1], strict=True)
    ]
    tokens = flatten(sequences, torch.float64)
    first = [0, 2, 6]  # the first token of each sequence

    def at_first(kind):
        return token_weights(tokens, kind, max_tokens=10)[first].tolist()

    assert at_first("sequence") == pytest.approx([1 / 6, 1 / 12, 1 / 9])
    assert at_first("token") == pytest.approx([1 / 9] * 3)
    assert at_first("group_token") == pytest.approx([1 / 12, 1 / 12, 1 / 6])
    assert at_first("constant") == pytest.approx([1 / 30] * 3)


def test_bfloat16_autocast_is_close_and_reaches_every_parameter(checkpoint):
    model = load_model(checkpoint)
    sequences = make_sequences(groups=3, size=2)
    tokens = flatten(sequences)
    (micro,) = micro_batches(sequences, tokens, 100000)
    exact = logprobs_of(model, micro.layout).logp
    rounded = logprobs_of(model, micro.layout, autocast=True).logp
    assert rounded.dtype == torch.float32
    gap = (rounded.detach() - exact.detach()).abs().mean()
    assert 0 < float(gap) < 0.05 * float(exact.detach().abs().mean())
    rounded.sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_heads_that_do_more_than_a_product_are_refused(checkpoint):
    model = load_model(checkpoint)
    check_head(model)
    model.config.final_logit_softcapping = 30.0
    with pytest.raises(UserError, match="final_logit_softcapping"):
        check_head(model)


def test_a_model_that_does_not_name_its_backbone_is_refused(checkpoint):
    model = load_model(checkpoint)
    model.base_model_prefix = "language_model"
    with pytest.raises(UserError, match="does not name its backbone"):
        check_head(model)
