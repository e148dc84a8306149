"""The reward model of iterative training: it learns from the policy it judges, and replays.

At the start of each further outer iteration the reward model takes a number of Bradley–Terry
updates on pairs of correct and incorrect samples: of the iteration that has just ended, and a
share of earlier ones (earlier iterations, and the run's sample log where there is one), so that it
does not forget what it judged before.

What the pairs are is read back from the stage's own rollouts, so a killed run that goes on sees
the same.

Source: 003_… algorithm 1, line 12; the share of 10 % is DeepSeekMath's (methods.md section 4).
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_prep.jsonl import read_rows
from pipeline.batch import Sequence
from pipeline.config import OptimizerConfig, RunConfig, TrainConfig
from pipeline.fixed import read_log
from pipeline.methods import create_method
from pipeline.methods.reward_model import Config as RewardModelConfig
from pipeline.pairs import verified_pairs
from pipeline.scorer import ModelScorer
from pipeline.trainer import Trainer

if TYPE_CHECKING:
    from pipeline.rollout import Rollouts
    from pipeline.source import Data
    from pipeline.state import Part

PAIRS_A_GROUP = 4


class Replay:
    """Trains the reward model on at the start of an outer iteration.

    Args:
        run: The whole run's configuration.
        config: The online stage's.
        rollouts: Its log.
        scorer: Its reward model.
    """

    def __init__(
        self, run: RunConfig, config: TrainConfig, rollouts: Rollouts, scorer: ModelScorer
    ) -> None:
        """Build the trainer."""
        reward = config.reward
        self.run, self.reward, self.rollouts = run, reward, rollouts
        self.model: Any = scorer.model.requires_grad_(True)
        method = create_method(RewardModelConfig(data="samples"))
        own = TrainConfig(
            name=f"{config.name}/reward_model",
            init=config.init,
            method=method.config,
            micro_tokens=config.micro_tokens,
            precision=config.precision,
            optimizer=OptimizerConfig(
                learning_rate=reward.retrain_rate, warmup_steps=0, schedule="constant"
            ),
        )
        self.method = method
        self.trainer = Trainer(run, own, method, self.model, ranks=rollouts.ranks.replicated())

    @classmethod
    def of(cls, run: RunConfig, config: TrainConfig, data: Data) -> Replay | None:
        """Return the replay that a stage asks for, or None."""
        if not config.reward.retrain or data.rollouts is None:
            return None
        scorer = data.rollouts.rewards.scorer
        if not isinstance(scorer, ModelScorer):
            raise TypeError("a reward model that is trained on is a ModelScorer")
        return cls(run, config, data.rollouts, scorer)

    def parts(self) -> dict[str, Part]:
        """Return what a saved state holds."""
        return {"reward_model": self.trainer.parts()["model"]}

    def train_on(self, iteration: int, span: int) -> dict[str, float]:
        """Take the updates of one iteration's start; return the last one's figures.

        Args:
            iteration: Which begins, from 1.
            span: Steps an iteration.
        """
        rng = random.Random(f"{self.run.seed}/replay/{iteration}")  # noqa: S311 - an order, not a secret
        first = (iteration - 1) * span
        fresh = self._pairs(range(first, first + span), rng)
        earlier = self._pairs(range(first), rng) + self._of_log(rng)
        figures: dict[str, float] = {}
        for update in range(self.reward.retrain):
            chosen = [
                rng.choice(
                    earlier
                    if earlier and (not fresh or rng.random() < self.reward.replay)
                    else fresh
                )
                for _ in range(self.reward.retrain_batch)
                if fresh or earlier
            ]
            sequences = [
                side
                for number, pair in enumerate(chosen)
                for side in self.method.marked([side.in_group(number) for side in pair])
            ]
            if sequences:
                figures = self.trainer.update(sequences, update, self.reward.retrain)
        wanted = ("objective", "accuracy", "margin", "calibration_error")
        found = {f"reward_model_{k}": figures[k] for k in wanted if k in figures}
        return {**found, "reward_model_pairs": float(len(fresh))}

    def _pairs(self, steps: range, rng: random.Random) -> list[list[Sequence]]:
        """Return the pairs in the rollouts of some steps."""
        prompts = {prompt.id: prompt.token_ids for prompt in self.rollouts.prompts}
        sequences: list[Sequence] = []
        for step in steps:
            groups: dict[tuple[Any, ...], int] = {}
            before = max((s.group for s in sequences), default=-1) + 1
            for _, row in read_rows(self.rollouts.path(step)):
                if "error" in row or row["outcome"] not in ("correct", "incorrect", "no_answer"):
                    continue
                prefix = row.get("prefix", {}).get("token_ids", [])
                prompt = [*prompts[row["problem_id"]], *prefix]
                group = before + groups.setdefault((row["problem_id"], *prefix), len(groups))
                sequences.append(_sequence(prompt, row, group))
        return verified_pairs(sequences, rng, PAIRS_A_GROUP)

    def _of_log(self, rng: random.Random) -> list[list[Sequence]]:
        out = Path(self.run.out)
        if not (out / "generate").is_dir() or not (out / "verify").is_dir():
            return []
        return verified_pairs(read_log(out / "generate", out / "verify"), rng, PAIRS_A_GROUP)


def _sequence(prompt: list[int], row: dict[str, Any], group: int) -> Sequence:
    completion = row["token_ids"]
    return Sequence(
        prompt,
        completion,
        [True] * len(completion),
        group,
        correct=row["outcome"] == "correct",
    )
