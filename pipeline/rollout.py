"""Rollouts of the current policy: prompts, completions, verdicts, rewards."""

from __future__ import annotations

import itertools
import math
import random
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data_prep.jsonl import write_rows
from data_prep.schema import Problem
from pipeline.batch import Sequence
from pipeline.engines import Engine, Prompt, Sampling
from pipeline.methods import Method
from pipeline.non_finite import NonFiniteError
from pipeline.ranks import ALONE, Ranks
from pipeline.reward import RewardMaker
from pipeline.segments import By, segments_of
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
        samples: Everything that was sampled, continuations that only measure included.
    """

    everything: list[Sequence]
    chosen: list[Sequence]
    rounds: int = 0
    samples: int = 0


@dataclass(frozen=True, slots=True)
class _Ask:
    """A prompt of a round.

    Attributes:
        problem: Which problem it is of.
        prompt: What the engine is given.
        sample: The sample of the problem's own prompt that it goes on from; None for that prompt.
        prefix: The tokens of that sample that stand at its end.
    """

    problem: int
    prompt: Prompt
    sample: int | None = None
    prefix: tuple[int, ...] = ()


class Rollouts:
    """Draws a batch of groups for a step; the same for the same step, whatever came before.

    Args:
        problems: What is asked, in a fixed order.
        prompts: Their rendered tokens, in the same order.
        engine: Samples.
        pool: Judges.
        rewards: Makes rewards of verdicts and models.
        method: Shapes rewards, says from which prefixes a prompt is sampled again, and which
            groups may fill the batch.
        sampling: How; `sampling.step` is replaced by the step.
        batch: Prompts a step.
        folder: Where each step's rollouts are logged.
        ranks: The processes that draw together; the leader logs.
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
        ranks: Ranks = ALONE,
    ) -> None:
        """Keep what a step needs."""
        self.ranks = ranks
        self.problems, self.prompts = problems, prompts
        self.engine, self.pool, self.sampling = engine, pool, sampling
        self.rewards, self.method = rewards, method
        self.batch, self.folder = batch, folder
        self._epoch: tuple[int, list[int]] = (-1, [])
        folder.mkdir(parents=True, exist_ok=True)

    def order(self, step: int) -> list[int]:
        """Return the indices of a step's problems: seeded permutations, one after the other."""
        count = len(self.problems)
        chosen: list[int] = []
        position = step * self.batch
        while len(chosen) < self.batch:
            epoch, offset = divmod(position + len(chosen), count)
            chosen += self._permutation(epoch)[offset : offset + self.batch - len(chosen)]
        return chosen

    def _permutation(self, epoch: int) -> list[int]:
        """Return the order of an epoch, kept until another is asked for."""
        known, permutation = self._epoch
        if known != epoch:
            permutation = list(range(len(self.problems)))
            random.Random(f"{self.sampling.seed}/prompts/{epoch}").shuffle(permutation)  # noqa: S311 - an order, not a secret
            self._epoch = epoch, permutation
        return permutation

    def spare(self, step: int) -> list[int]:
        """Return the other problems, in the order in which a step draws them for refilling.

        A function of seed and step alone: earlier steps leave no position behind, so a step that
        is taken again after a kill draws the same.
        """
        own = set(self.order(step))
        others = [i for i in range(len(self.problems)) if i not in own]
        random.Random(f"{self.sampling.seed}/refill/{step}").shuffle(others)  # noqa: S311 - an order, not a secret
        return others

    def path(self, step: int) -> Path:
        """Return the log of a step's rollouts."""
        return self.folder / f"step-{step:05d}.jsonl"

    def forget(self, step: int) -> None:
        """Remove the logs from a step on, which were drawn ahead and are not trained on."""
        for path in self.folder.glob("step-*.jsonl"):
            if int(path.stem.removeprefix("step-")) >= step:
                path.unlink()

    def draw(self, step: int) -> Drawn:
        """Sample, judge and log the groups of a step, refilling where the method asks for it."""
        drawn = Drawn([], [])
        rows: list[dict[str, Any]] = []
        waiting = self.order(step)
        # Put in order only where they are asked for: there may be a million.
        spare: Iterator[int] | None = None
        places = asked = 0
        groups = itertools.count()
        while waiting:
            own = self._asks(waiting)
            # A problem's groups: of its prompt, then of each prefix.
            families = [[g] for g in self._sample(own, step, groups, drawn.rounds, rows)]
            asked += len(waiting)
            further = [self._prefixed(a, f[0], step) for a, f in zip(own, families, strict=True)]
            if any(further):
                flat = [ask for asks in further for ask in asks]
                found = iter(self._sample(flat, step, groups, drawn.rounds, rows))
                for family, asks in zip(families, further, strict=True):
                    family += itertools.islice(found, len(asks))
            if self.method.continuations:
                self._follow(own, [f[0] for f in families], step, groups, drawn.rounds, rows)
            self._score(own, families, rows)
            for family in families:
                usable: list[Sequence] = []
                for group in filter(None, family):
                    drawn.everything += group
                    if self.method.usable([s for s in group if s.reward is not None]):
                        usable += group
                if usable and places < self.batch:
                    places += 1
                    drawn.chosen += usable
            missing = self.batch - places
            if not missing or drawn.rounds == self.method.refill:
                break
            # As many as should fill the places at the share of usable groups so far.
            count = min(self.batch, math.ceil(missing * asked / max(1, places)))
            spare = iter(self.spare(step)) if spare is None else spare
            waiting = list(itertools.islice(spare, count))
            drawn.rounds += bool(waiting)
        if self.method.refill and places < self.batch:
            tqdm.write(
                f"warning: step {step}: {places} of {self.batch} prompts are usable after "
                f"{asked} drawn in {1 + drawn.rounds} rounds; the step is smaller. Easier or "
                "harder problems, more samples a prompt or more refill rounds would fill it.",
                file=sys.stderr,
            )
        drawn.samples = sum("error" not in row for row in rows)
        if self.ranks.leads:
            write_rows(self.path(step), rows)
        return drawn

    def _asks(self, problems: list[int]) -> list[_Ask]:
        """Return the prompts of some problems.

        Across the border of two epochs a step may hold a problem twice. Its second group has seeds
        of its own, by the prompt's name: the same samples again would count twice in the update.
        """
        seen: Counter[int] = Counter()
        asks = []
        for problem in problems:
            prompt, before = self.prompts[problem], seen[problem]
            if before:
                prompt = replace(prompt, id=f"{prompt.id}/again-{before}")
            seen[problem] += 1
            asks.append(_Ask(problem, prompt))
        return asks

    def _prefixed(self, ask: _Ask, group: list[Sequence], step: int) -> list[_Ask]:
        """Return the prompts that go on from prefixes of a problem's samples."""
        if not group:
            return []
        seed = f"{self.sampling.seed}/prefixes/{step}/{ask.prompt.id}"
        chosen = self.method.prefixes(group, random.Random(seed))  # noqa: S311 - an order, not a secret
        return [self._from(ask, group, sample, length) for sample, length in chosen]

    def _from(self, ask: _Ask, group: list[Sequence], sample: int, length: int) -> _Ask:
        """Return the prompt that goes on from the first tokens of a problem's sample."""
        prefix = tuple(group[sample].completion[:length])
        prompt = Prompt(
            f"{ask.prompt.id}/sample-{sample}/prefix-{length}",
            (*ask.prompt.token_ids, *prefix),
            ask.prompt.budget(self.sampling) - length,
        )
        return _Ask(ask.problem, prompt, sample, prefix)

    def _follow(
        self,
        asks: list[_Ask],
        groups: list[list[Sequence]],
        step: int,
        numbers: Iterator[int],
        refill: int,
        rows: list[dict[str, Any]],
    ) -> None:
        """Set how often continuations from behind each segment end well.

        Equal beginnings of one problem are asked once.
        """
        wanted: dict[tuple[int, tuple[int, ...]], _Ask] = {}
        for ask, group in zip(asks, groups, strict=True):
            for sample, sequence in enumerate(group):
                for length in sequence.cut_points:
                    found = self._from(ask, group, sample, length)
                    wanted.setdefault((ask.problem, found.prefix), found)
        if not wanted:
            return
        count = self.method.continuations
        families = self._sample(
            list(wanted.values()), step, numbers, refill, rows, continuations=count
        )
        shares: dict[tuple[int, tuple[int, ...]], float | None] = {}
        for key, family in zip(wanted, families, strict=True):
            judged = [s.correct for s in family if s.correct is not None]
            shares[key] = sum(judged) / len(judged) if judged else None
        for ask, group in zip(asks, groups, strict=True):
            for sequence in group:
                sequence.success = [
                    shares[ask.problem, tuple(sequence.completion[:length])]
                    for length in sequence.cut_points
                ]

    def _score(
        self, asks: list[_Ask], families: list[list[list[Sequence]]], rows: list[dict[str, Any]]
    ) -> None:
        """Let the method make rewards of segments, and log them."""
        whole = [(ask, s) for ask, family in zip(asks, families, strict=True) for s in family[0]]
        found = self.ranks.dealt(self._graded, whole)
        for (_, sequence), (reward, steps, _) in zip(whole, found, strict=True):
            sequence.reward, sequence.steps = reward, steps
        if not any(log for _, _, log in found):
            return
        of = {
            (s.group, s.sample_index): (s, log)
            for (_, s), (_, _, log) in zip(whole, found, strict=True)
        }
        for row in rows:
            key = (row.get("group", -1), row.get("sample_index", -1))
            if "prefix" not in row and key in of:
                sequence, log = of[key]
                row |= {"reward": sequence.reward, "steps": sequence.steps, **log}

    def _graded(
        self, asked: list[tuple[_Ask, Sequence]]
    ) -> list[tuple[float | None, list[tuple[int, float]], dict[str, Any]]]:
        """Return what the method makes of each solution: its reward, its steps', and its log."""
        sequences = [sequence for _, sequence in asked]
        logs = self.method.score([self.problems[ask.problem] for ask, _ in asked], sequences)
        return [(s.reward, s.steps, log) for s, log in zip(sequences, logs, strict=True)]

    def _sample(
        self,
        asks: list[_Ask],
        step: int,
        numbers: Iterator[int],
        refill: int,
        rows: list[dict[str, Any]],
        continuations: int = 0,
    ) -> list[list[Sequence]]:
        """Return the scored samples of some prompts; append what was seen to `rows`.

        Args:
            asks: Which prompts.
            step: Takes part in the seeds.
            numbers: Of the groups.
            refill: Which refill round this is; 0 is the step's own batch.
            rows: The step's log.
            continuations: How many samples, where they are only to be judged; 0 draws groups.

        Returns:
            One list a prompt, empty where it could not be completed.
        """
        sampling = self.sampling.model_copy(update={"step": step})
        if continuations:
            sampling = sampling.model_copy(update={"n": continuations})
        groups = self.engine.generate([ask.prompt for ask in asks], sampling)
        staleness = step - self.engine.policy_version
        sequences: list[Sequence] = []
        for ask, group, number in zip(asks, groups, numbers, strict=False):
            for index, completion in enumerate(group.completions):
                text = completion.text
                if ask.prefix:
                    text = self.rewards.decode([*ask.prefix, *completion.token_ids])
                sequences.append(
                    Sequence(
                        prompt=list(group.prompt.token_ids),
                        completion=completion.token_ids,
                        mask=[True] * len(completion.token_ids),
                        group=number,
                        prefix=len(ask.prefix),
                        logprobs=completion.logprobs,
                        finish_reason=completion.finish_reason,
                        level=self.problems[ask.problem].level,
                        text=text,
                        staleness=staleness,
                        problem_id=self.prompts[ask.problem].id,
                        sample_index=index,
                    )
                )
                if self.method.cut is not None and not continuations:
                    self._cut(sequences[-1], completion.text, self.method.cut)
        of = [ask.problem for ask, g in zip(asks, groups, strict=True) for _ in g.completions]
        verdicts = self._judge(of, sequences)
        for sequence, verdict in zip(sequences, verdicts, strict=True):
            sequence.answer = _answer(verdict)
            if verdict is not None and verdict.is_scorable:
                sequence.correct = verdict.is_correct
        if not continuations:
            self.rewards.fill(sequences, verdicts)
        for sequence in sequences:
            self._shape(sequence, sampling.max_tokens)
        if not all(math.isfinite(s.reward) for s in sequences if s.reward is not None):
            raise NonFiniteError(f"a reward of step {step} is not finite", sequences)
        families: list[list[Sequence]] = []
        place = 0
        for ask, group in zip(asks, groups, strict=True):
            whose: dict[str, Any] = {"problem_id": self.prompts[ask.problem].id}
            if ask.sample is not None:
                whose["prefix"] = {"sample_index": ask.sample, "token_ids": list(ask.prefix)}
            if group.error is not None:
                rows.append({**whose, "error": group.error})
            first = place
            for index, completion in enumerate(group.completions):
                verdict, sequence = verdicts[place], sequences[place]
                place += 1
                rows.append(
                    {
                        **whose,
                        "group": sequence.group,
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
            families.append(sequences[first:place])
        return families

    def _shape(self, sequence: Sequence, max_tokens: int) -> None:
        """Let the method shape the reward, and with it the whole's share of the steps' rewards."""
        made = sequence.reward
        if made is None:
            return
        sequence.reward = self.method.shape(made, sequence, max_tokens)
        if sequence.steps and sequence.reward is not None:
            # The last token carries the whole's reward (`pipeline.reward`).
            end, value = sequence.steps[-1]
            sequence.steps[-1] = (end, value + (sequence.reward - made))

    def _cut(self, sequence: Sequence, text: str, by: By) -> None:
        """Set the segments of what was sampled; a prefix is not among them."""
        found = segments_of(
            self.rewards.decode, sequence.completion, text, by, self.method.thoughts
        )
        sequence.segments, sequence.answered = found.numbers, found.answered
        sequence.pieces = found.texts

    def _judge(self, problems: list[int], sequences: list[Sequence]) -> list[Verdict | None]:
        """Return a verdict for every solution, None where there is no gold answer."""
        asked = [
            (self.problems[i].answer, sequence.text)
            for i, sequence in zip(problems, sequences, strict=True)
        ]
        found = iter(self.pool.verify_many([pair for pair in asked if pair[0]]))
        return [next(found) if gold else None for gold, _ in asked]


def _answer(verdict: Verdict | None) -> str:
    return "" if verdict is None else verdict.answer_normal or verdict.extracted or ""
