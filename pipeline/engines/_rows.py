"""Running samples: what each has drawn, whether it has ended, and why.

All that a step changes is in tensors on the device, so that it takes no Python per row. A row
that has ended stays in the batch, drawing what nobody reads, until it is worth closing the gaps.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from data_prep.errors import UserError
from pipeline.engines import Completion, Group, Sampling, sample_seed
from pipeline.engines._random import seed_states
from pipeline.engines._sampler import Sampler

# Rows of the state: one number a running sample.
TOKEN, LENGTH, COUNT, BUDGET, HOME, ALIVE, HASH = range(7)


class Size(NamedTuple):
    """What a batch has room for.

    Attributes:
        rows: Samples that run side by side.
        blocks: Prompts that run side by side.
        prompt: Tokens of the longest prompt.
        completion: Most tokens of a completion.
    """

    rows: int
    blocks: int
    prompt: int
    completion: int


def fitting_size(
    slots: int,
    n: int,
    prompts: int,
    prompt: int,
    completion: int,
    size_bytes: Callable[[Size], float],
    most_bytes: float,
) -> Size:
    """Return the largest batch whose keys and values fit; one prompt's samples always run.

    Args:
        slots: Most samples side by side.
        n: Samples a prompt.
        prompts: Prompts in all.
        prompt: Tokens of the longest.
        completion: Most tokens of a completion.
        size_bytes: The keys and values of a batch, bytes; rises with its rows and blocks.
        most_bytes: What they may take.
    """

    def size(rows: int) -> Size:
        # A group whose samples have nearly all left still holds its prompt.
        return Size(rows, min(2 * (rows // n), prompts), prompt, completion)

    wished = range(n, min(slots, n * prompts) + 1)
    fitting = bisect_right(wished, most_bytes, key=lambda rows: size_bytes(size(rows)))
    return size(max(n, n + fitting - 1))


class Rows:
    """The samples of one `generate` call that are running.

    A sample's tokens and log-probs are kept at its *home*, which it has until it leaves.

    Args:
        sampling: How tokens are drawn.
        capacity: Samples that run side by side.
        longest: Most tokens of any completion.
        vocabulary: Size of the model's vocabulary.
        end_token_ids: The model's own end tokens.
        tokenizer: Decodes, where there are stop strings.
        dtype: Of log-probs.
        device: Where the state lives.

    Raises:
        UserError: A stop token is outside the vocabulary.
    """

    def __init__(
        self,
        sampling: Sampling,
        capacity: int,
        longest: int,
        vocabulary: int,
        end_token_ids: list[int],
        tokenizer: Any,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Allocate."""
        if unknown := [token for token in sampling.stop_token_ids if token >= vocabulary]:
            raise UserError(
                "sampling, key 'stop_token_ids'",
                f"token {unknown[0]}",
                f"tokens of the model's vocabulary, 0 to {vocabulary - 1}",
                "take the ids from the model's own tokenizer",
            )
        self.sampling, self.sampler, self.device = sampling, Sampler(sampling), device
        self.ends = {*end_token_ids, *sampling.stop_token_ids}
        self.is_end = torch.zeros(vocabulary, dtype=torch.bool, device=device)
        self.is_end[sorted(self.ends)] = True
        # An index without a sample looks like one that has ended, at a home that is nobody's: a
        # step may run over more rows than there are.
        self.nobody = torch.zeros((7, 1), dtype=torch.int64, device=device)
        self.nobody[COUNT], self.nobody[BUDGET], self.nobody[HOME] = 1, 1, capacity
        self.state = self.nobody.repeat(1, capacity)
        # One column more than a completion can have: where ended rows draw to.
        self.tokens = torch.zeros((capacity + 1, longest + 1), dtype=torch.int64, device=device)
        self.logprobs = torch.zeros((capacity + 1, longest + 1), dtype=dtype, device=device)
        self.seen = (
            torch.zeros((capacity, vocabulary), dtype=torch.bool, device=device)
            if self.sampler.penalises
            else None
        )
        self.stops = _StopStrings(sampling.stop, tokenizer, vocabulary) if sampling.stop else None
        self.homes = list(range(capacity))[::-1]
        self.held: list[_Row] = []
        # The host's own copies, by index like `held`.
        self.alive = np.zeros(capacity, dtype=bool)
        self.count = np.zeros(capacity, dtype=np.int64)

    def __len__(self) -> int:
        """Return how many rows the batch has, ended ones included."""
        return len(self.held)

    @property
    def running(self) -> int:
        """Rows that have not ended."""
        return int(self.alive[: len(self.held)].sum())

    @property
    def longest(self) -> int:
        """Most tokens that a running sample has."""
        held = len(self.held)
        return int(self.count[:held][self.alive[:held]].max())

    def enter(self, groups: list[Group], budgets: list[int]) -> None:
        """Add n samples for each group, after those that are there."""
        first, columns = len(self.held), []
        for group, budget in zip(groups, budgets, strict=True):
            prompt = group.prompt
            for index in range(self.sampling.n):
                seed = sample_seed(self.sampling.seed, self.sampling.step, prompt.id, index)
                completion = Completion([], [], "", "length", seed)
                group.completions.append(completion)
                row = _Row(completion, self.homes.pop())
                self.held.append(row)
                columns.append([0, len(prompt.token_ids), 0, budget, row.home, 1, seed])
        self.alive[first : len(self.held)] = True
        self.count[first : len(self.held)] = 0
        fresh = torch.tensor(columns).T.to(self.device)
        fresh[HASH] = seed_states(fresh[HASH])
        self.state[:, first : len(self.held)] = fresh
        if self.seen is not None:
            for number, group in enumerate(groups):
                start = first + number * self.sampling.n
                part = self.seen[start : start + self.sampling.n]
                part.zero_()
                part[:, list(group.prompt.token_ids)] = True

    def draw(self, logits: Tensor, first: int, last: int) -> Tensor:
        """Draw a token for the rows from `first` to before `last`; return who has ended, [B].

        Only tensor operations: no Python a row, no wait for the device.

        Args:
            logits: [B, V] of those rows.
            first: Index of the first row.
            last: Index after the last row.
        """
        state = self.state[:, first:last]
        count, home, alive = state[COUNT], state[HOME], state[ALIVE]
        seen = None if self.seen is None else self.seen[first:last]
        tokens, logprobs = self.sampler.draw(logits, state[HASH], count, seen)
        state[TOKEN] = tokens
        where = home * self.tokens.shape[1] + count
        self.tokens.view(-1).index_copy_(0, where, tokens)
        self.logprobs.view(-1).index_copy_(0, where, logprobs.to(self.logprobs.dtype))
        if seen is not None:
            seen.scatter_(1, tokens[:, None], True)
        count += alive
        ended = self.is_end[tokens] | (count >= state[BUDGET])
        alive.mul_(~ended)
        return ended

    def settle(self, ended: Tensor, first: int) -> None:
        """Take note of who has ended among the rows from `first` on; waits for the device."""
        ended = ended[: len(self.held) - first]
        part = slice(first, first + len(ended))
        before = self.alive[part].copy()
        self.count[part] += before
        self.alive[part] &= ~ended.cpu().numpy()
        self._look_for_stops(before, first)

    def take(self) -> None:
        """Take note of what was drawn beside `draw`: compiled code writes to the state itself."""
        held = len(self.held)
        before = self.alive[:held].copy()
        self.count[:held] = self.state[COUNT, :held]
        self.alive[:held] = self.state[ALIVE, :held]
        self._look_for_stops(before, 0)

    def _look_for_stops(self, before: np.ndarray, first: int) -> None:
        """End the rows whose newest token completes a stop string.

        Args:
            before: Which rows drew a token, of those from `first` on.
            first: Index of the first row.
        """
        if self.stops is None:
            return
        drawn = self.state[TOKEN, first : first + len(before)].tolist()
        for index in (np.flatnonzero(before) + first).tolist():
            if self.stops.may_end(drawn[index - first]):
                row, count = self.held[index], int(self.count[index])
                tail = self.tokens[row.home, max(0, count - self.stops.window) : count]
                if self.stops.found(tail.tolist()):
                    row.stopped, self.alive[index] = True, False
                    self.state[ALIVE, index] = 0

    def leave(self) -> list[int]:
        """Hand over the completions that have ended; return the order of the rows that stay.

        The last rows fill the gaps, so that few move.
        """
        alive = self.alive[: len(self.held)]
        ended = np.flatnonzero(~alive).tolist()
        if ended:
            width = int(self.count[ended].max())
            homes = torch.tensor([self.held[index].home for index in ended], device=self.device)
            tokens = self.tokens[homes, :width].tolist()
            logprobs = self.logprobs[homes, :width].tolist()
            for index, ids, values in zip(ended, tokens, logprobs, strict=True):
                row, count = self.held[index], int(self.count[index])
                completion = row.completion
                completion.token_ids, completion.logprobs = ids[:count], values[:count]
                over = row.stopped or completion.token_ids[-1] in self.ends
                completion.finish_reason = "stop" if over else "length"
                self.homes.append(row.home)
        count = int(alive.sum())
        order = list(range(count))
        holes = np.flatnonzero(~alive[:count]).tolist()
        movers = (np.flatnonzero(alive[count:]) + count).tolist()
        for hole, mover in zip(holes, movers, strict=True):
            order[hole] = mover
        if holes:
            new, old = (torch.tensor(part, device=self.device) for part in (holes, movers))
            self.state[:, new] = self.state[:, old]
            if self.seen is not None:
                self.seen[new] = self.seen[old]
            self.count[holes] = self.count[movers]
        self.state[:, count : len(self.held)] = self.nobody
        self.held = [self.held[index] for index in order]
        self.alive[:count], self.alive[count:] = True, False
        return order


class _Row:
    """What does not change while a sample runs, and whether a stop string ended it."""

    __slots__ = ("completion", "home", "stopped")

    def __init__(self, completion: Completion, home: int) -> None:
        self.completion, self.home, self.stopped = completion, home, False


class _StopStrings:
    """Finds out whether the newest token completes a stop string.

    A token is only looked at when its own text holds the last character of a stop string, or is
    not text of its own (a piece of a character, a special token). Of the completion, the last
    tokens are enough: `window` of them hold more characters than the longest stop string.
    """

    def __init__(self, stops: tuple[str, ...], tokenizer: Any, vocabulary: int) -> None:
        self.stops, self.tokenizer = stops, tokenizer
        self.window = max(len(stop.encode()) for stop in stops) + 8
        lasts = {stop[-1] for stop in stops}
        # Decoders strip or add spaces at the edges, so a text's spaces say nothing.
        self.everything = any(last.isspace() for last in lasts)
        self.lasts, self.known = lasts, dict[int, bool]()

    def may_end(self, token: int) -> bool:
        if self.everything:
            return True
        known = self.known.get(token)
        if known is None:
            text = self.tokenizer.decode([token])
            known = not text or "\ufffd" in text or not self.lasts.isdisjoint(text)
            self.known[token] = known
        return known

    def found(self, tail: list[int]) -> bool:
        text = self.tokenizer.decode(tail)
        return any(stop in text for stop in self.stops)
