"""Rollouts of the current policy: prompts, completions, verdicts, rewards."""

from __future__ import annotations

import random
from pathlib import Path

from data_prep.jsonl import write_rows
from data_prep.schema import Problem
from pipeline.batch import Sequence
from pipeline.engines import Engine, Prompt, Sampling
from pipeline.reward import reward_of
from verifiers import VerifierPool


class Rollouts:
    """Draws a batch of groups for a step; the same for the same step, whatever came before.

    Args:
        problems: What is asked, in a fixed order.
        prompts: Their rendered tokens, in the same order.
        engine: Samples.
        pool: Judges.
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
        sampling: Sampling,
        batch: int,
        folder: Path,
    ) -> None:
        """Keep what a step needs."""
        self.problems, self.prompts = problems, prompts
        self.engine, self.pool, self.sampling = engine, pool, sampling
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

    def draw(self, step: int) -> list[Sequence]:
        """Sample, judge and log the groups of a step.

        Returns:
            One sequence a sample, rewards set; prompts that could not be completed are left
            out (the log says why).
        """
        indices = self.order(step)
        sampling = self.sampling.model_copy(update={"step": step})
        groups = self.engine.generate([self.prompts[i] for i in indices], sampling)
        pairs = [
            (self.problems[i].answer, completion.text)
            for i, group in zip(indices, groups, strict=True)
            for completion in group.completions
        ]
        verdicts = iter(self.pool.verify_many(pairs))
        sequences: list[Sequence] = []
        rows = []
        for number, (i, group) in enumerate(zip(indices, groups, strict=True)):
            if group.error is not None:
                rows.append({"problem_id": group.prompt.id, "error": group.error})
            for index, completion in enumerate(group.completions):
                verdict = next(verdicts)
                reward = reward_of(verdict)
                sequences.append(
                    Sequence(
                        prompt=list(group.prompt.token_ids),
                        completion=completion.token_ids,
                        mask=[True] * len(completion.token_ids),
                        group=number,
                        reward=reward,
                        correct=None if reward is None else verdict.is_correct,
                        logprobs=completion.logprobs,
                        finish_reason=completion.finish_reason,
                        level=self.problems[i].level,
                        text=completion.text,
                    )
                )
                rows.append(
                    {
                        "problem_id": group.prompt.id,
                        "sample_index": index,
                        "token_ids": completion.token_ids,
                        "logprobs": completion.logprobs,
                        "text": completion.text,
                        "finish_reason": completion.finish_reason,
                        "policy_version": self.engine.policy_version,
                        "seed": completion.seed,
                        "outcome": verdict.outcome.value,
                        "reward": reward,
                    }
                )
        write_rows(self.folder / f"step-{step:05d}.jsonl", rows)
        return sequences
