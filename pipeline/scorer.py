"""Reward models as judges: the score of a completion, or of each step of it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from data_prep.errors import UserError
from data_prep.jsonl import read_json
from pipeline.batch import Sequence, flatten, micro_batches
from pipeline.critic import critic_of, load_scalar_model
from pipeline.model import pick_device
from pipeline.ranks import ALONE, Ranks

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class ModelScorer:
    """Scores by a model with one scalar a state.

    Args:
        model: As `load_scalar_model` loads it; training it further changes the scores.
        micro_tokens: Largest number of tokens in one forward pass.
        ranks: The processes that ask together; each scores its share.
    """

    def __init__(
        self, model: PreTrainedModel, micro_tokens: int = 16384, ranks: Ranks = ALONE
    ) -> None:
        """Keep the model."""
        self.ranks = ranks
        self.model, self.micro_tokens = model, micro_tokens
        self.critic = critic_of(model)

    def score(self, prompts: list[list[int]], completions: list[list[int]]) -> list[float]:
        """Return R_φ of each completion, read after its last token.

        Args:
            prompts: Token ids; equal ones are computed once.
            completions: Token ids, at least one each.
        """
        ends = [[len(completion) - 1] for completion in completions]
        return [row[0] for row in self._scores(prompts, completions, ends)]

    def score_steps(
        self, prompts: list[list[int]], completions: list[list[int]], ends: list[list[int]]
    ) -> list[list[float]]:
        """Return σ(R_φ) after each token that ends a step.

        Args:
            prompts: Token ids.
            completions: Token ids.
            ends: Indices of tokens within each completion, ascending; equal ones score alike.
        """
        rows = self._scores(prompts, completions, ends)
        return [torch.sigmoid(torch.tensor(row, dtype=torch.float64)).tolist() for row in rows]

    def _scores(
        self, prompts: list[list[int]], completions: list[list[int]], ends: list[list[int]]
    ) -> list[list[float]]:
        asked = list(zip(prompts, completions, ends, strict=True))
        return self.ranks.dealt(lambda part: self._own_scores(*zip(*part, strict=True)), asked)

    @torch.no_grad()
    def _own_scores(
        self,
        prompts: tuple[list[int], ...],
        completions: tuple[list[int], ...],
        ends: tuple[list[int], ...],
    ) -> list[list[float]]:
        groups: dict[tuple[int, ...], int] = {}
        sequences = []
        for prompt, completion, wanted in zip(prompts, completions, ends, strict=True):
            if not wanted:
                continue
            mask = [False] * len(completion)
            for end in wanted:
                mask[end] = True
            group = groups.setdefault(tuple(prompt), len(groups))
            sequences.append(Sequence(list(prompt), list(completion), mask, group))
        if not sequences:
            return [[] for _ in ends]
        tokens = flatten(sequences)
        values = torch.empty(len(tokens.weight))
        device = next(self.model.parameters()).device
        for micro in micro_batches(sequences, tokens, self.micro_tokens):
            _, after = self.critic(micro.layout.to(device))
            values[micro.token_index] = after.float().cpu()
        parts = iter(torch.split(values, [int(n) for n in tokens.lengths]))
        scores = []
        for wanted in ends:
            found = (
                dict(zip(sorted(set(wanted)), next(parts).tolist(), strict=True)) if wanted else {}
            )
            scores.append([found[end] for end in wanted])
        return scores


def load_scorer(
    folder: str | Path, reads: str = "end", device: str = "auto", ranks: Ranks = ALONE
) -> ModelScorer:
    """Load a reward model that a training stage made.

    Args:
        folder: Its checkpoint.
        reads: "end" for a reward model, "steps" for a process reward model.
        device: Where it runs.
        ranks: The processes that ask together.

    Raises:
        UserError: The folder is no such model.
    """
    note: dict[str, Any] = {}
    if (Path(folder) / "boxed.json").is_file():
        note = read_json(Path(folder) / "boxed.json")
    if note.get("reads", reads) != reads:
        kinds = {"end": "a reward model", "steps": "a process reward model"}
        raise UserError(
            str(folder),
            kinds.get(note["reads"], f"reads = {note['reads']!r} in boxed.json"),
            kinds[reads],
            "give the stage of the other kind",
        )
    model = load_scalar_model(folder).eval().requires_grad_(False)
    return ModelScorer(model.to(pick_device(device)), ranks=ranks)  # type: ignore[arg-type]
