"""How sequences lie in tensors: a shared prefix is computed once, nothing is padded in the maths.

A `Sequence` is a prompt and a completion. Sequences of one group share their prompt: a
*document* is [prompt, completion 1, …, completion G], where each completion sees the prompt and
itself. A forward pass takes documents up to a budget of tokens (`pipeline.layout`).

Whatever the layout, the methods see completion tokens as one flat axis T, ordered by sequence:
log-probs, advantages and coefficients are [T], rewards and lengths [N]. There is no padding in
that axis, so no formula can depend on it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from pipeline.layout import Layout, layout_of


@dataclass(slots=True)
class Sequence:
    """A prompt and what followed it.

    Attributes:
        prompt: Token ids that only condition.
        completion: Token ids after them.
        mask: One a completion token: whether it carries loss.
        group: Sequences of one group have the same prompt and the same number here.
        reward: Reward of the whole sequence; None where it could not be judged.
        correct: Whether the verdict was "correct"; None where there was no verdict.
        steps: Rewards or labels within the completion: (index of the token that ends the step,
            value), in order; empty where only the whole is judged.
        advantage: One number for all tokens (outcome supervision).
        advantages: One a completion token (process supervision), in place of `advantage`.
        segments: Number of the segment that each completion token belongs to, from 0 upwards;
            empty where the completion is not cut.
        pieces: Texts of the segments.
        answered: Whether the last segment is the final answer.
        success: Share of correct solutions among continuations from behind each segment but the
            last, None where none could be judged; empty where nobody asked.
        prefix: Tokens at the end of the prompt that are the beginning of the solution, which
            the completion goes on from.
        logprobs: Sampler log-probs, one a completion token; empty for data that was not sampled.
        sign: +1 or -1 for the two sides of a preference pair, 0 otherwise.
        finish_reason: As in the sample log; empty for data that was not sampled.
        level: Difficulty of the problem, for the records.
        text: The solution as text, prefix included; empty for data that was not sampled.
        staleness: Training steps between the policy that sampled it and the one that it trains.
        problem_id: Of the problem that it answers; empty for data that was not sampled.
        sample_index: Which of the problem's samples it is.
        answer: What the verifier read as its answer, in normal form where it has one; empty for
            none.
    """

    prompt: list[int]
    completion: list[int]
    mask: list[bool]
    group: int
    reward: float | None = None
    correct: bool | None = None
    steps: list[tuple[int, float]] = field(default_factory=list)
    advantage: float = 0.0
    advantages: list[float] = field(default_factory=list)
    segments: list[int] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    answered: bool = False
    success: list[float | None] = field(default_factory=list)
    prefix: int = 0
    logprobs: list[float] = field(default_factory=list)
    sign: int = 0
    finish_reason: str = ""
    level: str = ""
    text: str = ""
    staleness: int = 0
    problem_id: str = ""
    sample_index: int = 0
    answer: str = ""

    @property
    def cut_points(self) -> list[int]:
        """How many tokens come before each segment but the first."""
        numbers = self.segments
        return [i for i in range(1, len(numbers)) if numbers[i] != numbers[i - 1]]

    def signed(self, sign: int) -> Sequence:
        """Return a copy that stands on one side of a preference pair."""
        return replace(self, sign=sign)

    def in_group(self, group: int) -> Sequence:
        """Return a copy that belongs to another group."""
        return replace(self, group=group)


@dataclass(slots=True)
class Tokens:
    """The flat view of N sequences' T loss-carrying tokens, as the methods see it.

    Attributes:
        sequence: [T] int64, which of the N sequences a token belongs to.
        group: [N] int64, which group a sequence belongs to.
        lengths: [N], loss-carrying tokens a sequence, over the whole sequence.
        reward: [N], NaN where unscored.
        truncated: [N] bool, completions that were cut off.
        step_reward: [T], the step values at the tokens that end a step; NaN elsewhere.
        segment: [T] int64, which segment of the whole flat axis a token belongs to; a sequence
            that is not cut is one segment.
        advantage: [T].
        sign: [N], +1/-1 for the sides of a pair, 0 otherwise.
        weight: [T], 1/Z of the method's normaliser over the whole optimizer step.
        sampler_logp: [T], NaN for data that was not sampled.
        old_logp: [T], log π_old; None until known.
        ref_logp: [T], log π_ref; None where the method has no reference.
        old_value: [T], V of the state before each token, by the critic before the first update on
            the batch; None where the method has no critic.
        end_value: [T], the same of the state after each token.
        old_kl: [T], KL(π_old‖π_ref) over the whole vocabulary; None where nobody asks.
        value: [T], V of the state before each token, by the critic as it is now.
        target: [T], what the critic should say; None until the method knows.
    """

    sequence: Tensor
    group: Tensor
    lengths: Tensor
    reward: Tensor
    truncated: Tensor
    step_reward: Tensor
    segment: Tensor
    advantage: Tensor
    sign: Tensor
    weight: Tensor
    sampler_logp: Tensor
    old_logp: Tensor | None = None
    ref_logp: Tensor | None = None
    old_value: Tensor | None = None
    end_value: Tensor | None = None
    old_kl: Tensor | None = None
    value: Tensor | None = None
    target: Tensor | None = None

    @property
    def is_last(self) -> Tensor:
        """[T] bool: the last loss-carrying token of each sequence."""
        last = torch.zeros(len(self.sequence), dtype=torch.bool, device=self.sequence.device)
        last[torch.cumsum(self.lengths.to(torch.int64), 0) - 1] = True
        return last

    @property
    def starts_segment(self) -> Tensor:
        """[T] bool: the first loss-carrying token of each segment."""
        first = torch.ones(len(self.segment), dtype=torch.bool, device=self.segment.device)
        first[1:] = self.segment[1:] != self.segment[:-1]
        return first

    def over_segment(self, values: Tensor) -> Tensor:
        """Sum [T] values over the segment of each token, to [T]."""
        place = torch.cumsum(self.starts_segment, 0) - 1
        total = torch.zeros(len(values), dtype=values.dtype, device=values.device)
        return total.index_add(0, place, values)[place]

    def per_sequence(self, values: Tensor) -> Tensor:
        """Sum [T] values over each sequence's tokens, to [N]."""
        total = torch.zeros(len(self.lengths), dtype=values.dtype, device=values.device)
        return total.index_add(0, self.sequence, values)

    def to_go(self, values: Tensor) -> Tensor:
        """Sum [T] values from each token to the end of its sequence, to [T]."""
        # One running sum over all sequences, minus what precedes: float64, or it would lose digits.
        running = torch.cumsum(values.double(), 0)
        ends = torch.cumsum(self.lengths.to(torch.int64), 0) - 1
        return (running[ends][self.sequence] - running + values).to(values.dtype)

    def to(self, device: torch.device) -> Tokens:
        """Return the same on a device."""
        moved = {
            f.name: value.to(device)
            for f in fields(self)
            if isinstance(value := getattr(self, f.name), Tensor)
        }
        return replace(self, **moved)


PER_SEQUENCE = frozenset({"group", "lengths", "reward", "truncated", "sign"})


def flatten(sequences: list[Sequence], dtype: torch.dtype = torch.float32) -> Tokens:
    """Return the flat view of sequences; weights are 0 until a normaliser fills them."""
    lengths = [sum(s.mask) for s in sequences]
    groups: dict[int, int] = {}
    nothing = float("nan")
    counts = torch.tensor(lengths)
    index = torch.repeat_interleave(torch.arange(len(sequences)), counts)
    empty = torch.full((len(index),), nothing, dtype=dtype)
    advantage = torch.tensor([s.advantage for s in sequences], dtype=dtype)[index]
    if any(s.advantages for s in sequences):
        advantage = _flat(
            sequences, dtype, lambda s: s.advantages or [s.advantage] * len(s.completion)
        )
    steps, sampled = empty, empty.clone()
    if any(s.steps for s in sequences):
        steps = _flat(sequences, dtype, _step_values)
    if any(s.logprobs for s in sequences):
        sampled = _flat(sequences, dtype, lambda s: s.logprobs or [nothing] * len(s.completion))
    return Tokens(
        sequence=index,
        group=torch.tensor([groups.setdefault(s.group, len(groups)) for s in sequences]),
        lengths=torch.tensor(lengths, dtype=dtype),
        reward=torch.tensor(
            [nothing if s.reward is None else s.reward for s in sequences], dtype=dtype
        ),
        truncated=torch.tensor([s.finish_reason == "length" for s in sequences]),
        step_reward=steps,
        segment=_segments(sequences, index),
        advantage=advantage,
        sign=torch.tensor([s.sign for s in sequences], dtype=dtype),
        weight=torch.zeros(len(index), dtype=dtype),
        sampler_logp=sampled,
    )


def _segments(sequences: list[Sequence], index: Tensor) -> Tensor:
    """Return the segment of each token; `index` are the tokens' sequences, one segment each."""
    if not any(s.segments for s in sequences):
        return index
    segments: list[int] = []
    following = 0
    for s in sequences:
        own = s.segments or [0] * len(s.mask)
        segments += [following + number for number in _kept(own, s.mask)]
        following += max(own, default=-1) + 1
    return torch.tensor(segments)


def _flat(
    sequences: list[Sequence], dtype: torch.dtype, of: Callable[[Sequence], list[float]]
) -> Tensor:
    values = [value for s in sequences for value in _kept(of(s), s.mask)]
    return torch.tensor(values, dtype=dtype)


def _kept(values: list[Any], mask: list[bool]) -> list[Any]:
    return [value for value, kept in zip(values, mask, strict=True) if kept]


def _step_values(sequence: Sequence) -> list[float]:
    values = [float("nan")] * len(sequence.mask)
    for end, value in sequence.steps:
        values[end] = value
    return values


@dataclass(slots=True)
class MicroBatch:
    """What one forward and backward pass takes: a layout and the matching flat view."""

    layout: Layout
    tokens: Tokens
    token_index: Tensor  # [T of this micro-batch], positions in the step's flat axis
    idle: bool = False  # run to keep pace with other processes, for nothing (`pipeline.ranks`)


class _Document:
    """A prompt with the completions that share it."""

    __slots__ = ("length", "members", "prompt")

    def __init__(self, prompt: list[int]) -> None:
        self.prompt = prompt
        self.members: list[int] = []
        self.length = len(prompt)


def documents_of(sequences: list[Sequence], share: bool) -> list[_Document]:
    """Join sequences of one group and prompt, where sharing is wanted."""
    documents: dict[tuple[int, ...], _Document] = {}
    for index, sequence in enumerate(sequences):
        key = (sequence.group, *sequence.prompt) if share else (index,)
        document = documents.setdefault(key, _Document(sequence.prompt))
        document.members.append(index)
        document.length += len(sequence.completion)
    return list(documents.values())


def micro_batches(
    sequences: list[Sequence], tokens: Tokens, micro_tokens: int, *, share: bool = True
) -> Iterable[MicroBatch]:
    """Split a step into forward passes of at most `micro_tokens` tokens.

    Groups (and pairs) stay together. A document longer than the limit makes a pass of its own.

    Args:
        sequences: N sequences.
        tokens: Their flat view, weights filled.
        micro_tokens: Most tokens of a pass.
        share: Whether prompts are computed once a group.
    """
    # Neighbours are of like length: little is padded wherever something must be.
    documents = sorted(documents_of(sequences, share), key=lambda d: -d.length)
    starts = [0, *accumulate(int(n) for n in tokens.lengths.tolist())]
    first = 0
    while first < len(documents):
        end, room = first + 1, micro_tokens - documents[first].length
        while end < len(documents) and documents[end].length <= room:
            room -= documents[end].length
            end += 1
        chosen = documents[first:end]
        members = [m for document in chosen for m in document.members]
        index = torch.cat([torch.arange(starts[m], starts[m + 1]) for m in members])
        layout = layout_of(
            (d.prompt, [(sequences[m].completion, sequences[m].mask) for m in d.members])
            for d in chosen
        )
        yield MicroBatch(layout, subset(tokens, members, index), index)
        first = end


def subset(tokens: Tokens, members: list[int], index: Tensor) -> Tokens:
    """Return the view of some sequences; `index` are the positions of their tokens."""
    chosen = torch.tensor(members)
    found: dict[str, Any] = {}
    for name in (f.name for f in fields(Tokens)):
        value = getattr(tokens, name)
        if value is not None:
            found[name] = value[chosen if name in PER_SEQUENCE else index]
    counts = found["lengths"].to(torch.int64)
    found["sequence"] = torch.repeat_interleave(torch.arange(len(members)), counts)
    return Tokens(**found)
