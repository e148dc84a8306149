"""Rollouts of the current policy: prompts, completions, verdicts, rewards."""

from __future__ import annotations

import math
import random
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data_prep.jsonl import write_rows
from data_prep.schema import Problem
from pipeline.batch import Sequence
from pipeline.engines import Engine, Group, Prompt, Sampling
from pipeline.methods import Method
from pipeline.non_finite import NonFiniteError
from pipeline.reward import RewardMaker
from verifiers import Verdict, VerifierPool


@dataclass(slots=True)
class Drawn:
    """The rollouts of one step.

    Attributes:
        everything: All samples, rewards set; prompts that could not be completed are left out
            (the log says why).
        chosen: Those of the groups that fill the batch; all of them for a method that takes
            every group.
        rounds: Refill rounds that were needed.
    """

    everything: list[Sequence]
    chosen: list[Sequence]
    rounds: int = 0


class Rollouts:
    """Draws a batch of groups for a step; the same for the same step, whatever came before.

    Args:
        problems: What is asked, in a fixed order.
        prompts: Their rendered tokens, in the same order.
        engine: Samples.
        pool: Judges.
        rewards: Makes rewards of verdicts and models.
        method: Shapes rewards, and says which groups may fill the batch.
        sampling: How; `sampling.step` is replaced by the step.
        batch: Prompts a step.
        folder: Where each step's rollouts are logged.
    """

    def __init__(
        self,
        problems: list[Problem],
        prompts: list[Prompt],
        engine: Engine,
        pool: VerifierPool,
        rewards: RewardMaker,
        method: Method,
        sampling: Sampling,
        batch: int,
        folder: Path,
    ) -> None:
        """Keep what a step needs."""
        self.problems, self.prompts = problems, prompts
        self.engine, self.pool, self.sampling = engine, pool, sampling
        self.rewards, self.method = rewards, method
        self.batch, self.folder = batch, folder
        folder.mkdir(parents=True, exist_ok=True)

    def order(self, step: int) -> list[int]:
        """Return the indices of a step's problems: seeded permutations, one after the other."""
        count = len(self.problems)
        chosen: list[int] = []
        position = step * self.batch
        while len(chosen) < self.batch:
            epoch, offset = divmod(position + len(chosen), count)
            permutation = list(range(count))
            random.Random(f"{self.sampling.seed}/prompts/{epoch}").shuffle(permutation)  # noqa: S311
            chosen += permutation[offset : offset + self.batch - len(chosen)]
        return chosen

    def spare(self, step: int) -> list[int]:
        """Return the other problems, in the order in which a step draws them for refilling.

        A function of seed and step alone: earlier steps leave no position behind, so a step that
        is taken again after a kill draws the same.
        """
        own = set(self.order(step))
        others = [i for i in range(len(self.problems)) if i not in own]
        random.Random(f"{self.sampling.seed}/refill/{step}").shuffle(others)  # noqa: S311
        return others

    def path(self, step: int) -> Path:
        """Return the log of a step's rollouts."""
        return self.folder / f"step-{step:05d}.jsonl"

    def draw(self, step: int) -> Drawn:
        """Sample, judge and log the groups of a step, refilling where the method asks for it."""
        drawn = Drawn([], [])
        rows: list[dict[str, Any]] = []
        waiting, spare = self.order(step), self.spare(step) if self.method.refill else []
        places = asked = 0
        while waiting:
            sequences = self._sample(waiting, step, asked, drawn.rounds, rows)
            asked += len(waiting)
            drawn.everything += sequences
            groups: dict[int, list[Sequence]] = defaultdict(list)
            for sequence in sequences:
                groups[sequence.group].append(sequence)
            for group in groups.values():
                usable = self.method.usable([s for s in group if s.reward is not None])
                if usable and places < self.batch:
                    places += 1
                    drawn.chosen += group
            missing = self.batch - places
            if not missing or drawn.rounds == self.method.refill:
                break
            # As many as should fill the places at the share of usable groups so far.
            count = min(self.batch, math.ceil(missing * asked / max(1, places)))
            waiting, spare = spare[:count], spare[count:]
            drawn.rounds += bool(waiting)
        if self.method.refill and places < self.batch:
            tqdm.write(
                f"warning: step {step}: {places} of {self.batch} prompts are usable after "
                f"{asked} drawn in {1 + drawn.rounds} rounds; the step is smaller. Easier or "
                "harder problems, more samples a prompt or more refill rounds would fill it.",
                file=sys.stderr,
            )
        write_rows(self.path(step), rows)
        return drawn

    def _sample(
        self, indices: list[int], step: int, first: int, refill: int, rows: list[dict[str, Any]]
    ) -> list[Sequence]:
        """Return the scored samples of some problems; append what was seen to `rows`.

        Args:
            indices: Which problems.
            step: Takes part in the seeds.
            first: Group number of the first of them.
            refill: Which refill round this is; 0 is the step's own batch.
            rows: The step's log.
        """
        sampling = self.sampling.model_copy(update={"step": step})
        groups = self.engine.generate([self.prompts[i] for i in indices], sampling)
        verdicts = self._judge(indices, groups)
        staleness = step - self.engine.policy_version
        sequences: list[Sequence] = []
        for number, (i, group) in enumerate(zip(indices, groups, strict=True), start=first):
            for index, completion in enumerate(group.completions):
                verdict = verdicts[len(sequences)]
                scored = verdict is not None and verdict.is_scorable
                sequences.append(
                    Sequence(
                        prompt=list(group.prompt.token_ids),
                        completion=completion.token_ids,
                        mask=[True] * len(completion.token_ids),
                        group=number,
                        correct=verdict.is_correct if verdict is not None and scored else None,
                        logprobs=completion.logprobs,
                        finish_reason=completion.finish_reason,
                        level=self.problems[i].level,
                        text=completion.text,
                        staleness=staleness,
                        problem_id=group.prompt.id,
                        sample_index=index,
                        answer=_answer(verdict),
                    )
                )
        self.rewards.fill(sequences, verdicts)
        for sequence in sequences:
            if sequence.reward is not None:
                sequence.reward = self.method.shape(sequence.reward, sequence, sampling.max_tokens)
        if not all(math.isfinite(s.reward) for s in sequences if s.reward is not None):
            raise NonFiniteError(f"a reward of step {step} is not finite", sequences)
        place = 0
        for group in groups:
            if group.error is not None:
                rows.append({"problem_id": group.prompt.id, "error": group.error})
            for index, completion in enumerate(group.completions):
                verdict, sequence = verdicts[place], sequences[place]
                place += 1
                rows.append(
                    {
                        "problem_id": group.prompt.id,
                        "sample_index": index,
                        "refill": refill,
                        "token_ids": completion.token_ids,
                        "logprobs": completion.logprobs,
                        "text": completion.text,
                        "finish_reason": completion.finish_reason,
                        "policy_version": self.engine.policy_version,
                        "staleness": staleness,
                        "seed": completion.seed,
                        "outcome": None if verdict is None else verdict.outcome.value,
                        "answer": None if verdict is None else verdict.extracted,
                        "reward": sequence.reward,
                        **({"steps": sequence.steps} if sequence.steps else {}),
                    }
                )
        return sequences

    def _judge(self, indices: list[int], groups: list[Group]) -> list[Verdict | None]:
        """Return a verdict for every completion, None where there is no gold answer."""
        asked = [
            (self.problems[i].answer, completion.text)
            for i, group in zip(indices, groups, strict=True)
            for completion in group.completions
        ]
        found = iter(self.pool.verify_many([pair for pair in asked if pair[0]]))
        return [next(found) if gold else None for gold, _ in asked]


def _answer(verdict: Verdict | None) -> str:
    return "" if verdict is None else verdict.answer_normal or verdict.extracted or ""
