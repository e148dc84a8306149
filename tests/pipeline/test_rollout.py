"""What a step draws: which prompts, how refilling fills the batch, and how it gives up."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from data_prep.schema import Problem
from pipeline.batch import Sequence
from pipeline.engines import Completion, Group, Prompt, Sampling, sample_seed
from pipeline.methods import dapo, grft, grpo
from pipeline.records import rollout_figures
from pipeline.reward import RewardConfig, RewardMaker
from pipeline.rollout import Rollouts
from verifiers import Outcome, Verdict


class Engine:
    """Completes prompt p<i> with `size` samples; those below `correct[i]` say "yes"."""

    policy_version = 0

    def __init__(self, correct: list[int], finish_reason: str = "stop"):
        self.correct, self.finish_reason = correct, finish_reason
        self.asked: list[list[int]] = []

    def generate(self, prompts, sampling):
        indices = [int(prompt.id[1:]) for prompt in prompts]
        self.asked.append(indices)
        groups = []
        for i, prompt in zip(indices, prompts, strict=True):
            if self.correct[i] < 0:
                groups.append(Group(prompt, error="too long"))
                continue
            texts = ["yes" if s < self.correct[i] else "no" for s in range(sampling.n)]
            groups.append(
                Group(
                    prompt,
                    [Completion([5, 6], [-1.0, -1.0], t, self.finish_reason, 0) for t in texts],  # type: ignore[arg-type]
                )
            )
        return groups


class Pool:
    def verify_many(self, pairs):
        names = {"yes": Outcome.CORRECT, "no": Outcome.INCORRECT}
        return [Verdict(names[text]) for _, text in pairs]


def rollouts(folder: Path, correct: list[int], method, batch: int, **engine) -> Rollouts:
    problems = [
        Problem(id=f"p{i}", question="?", answer="yes", source="test", split="train")
        for i in range(len(correct))
    ]
    prompts = [Prompt(f"p{i}", (1, 2)) for i in range(len(correct))]
    return Rollouts(
        problems,
        prompts,
        Engine(correct, **engine),  # type: ignore[arg-type]
        Pool(),  # type: ignore[arg-type]
        RewardMaker(RewardConfig(), str),
        method,
        Sampling(n=4, seed=3, max_tokens=10),
        batch,
        folder,
    )


def dapo_with(**options) -> dapo.Dapo:
    return dapo.create(dapo.Config(**options))


def problems_of(drawn, made: Rollouts) -> list[int]:
    """The problems of the chosen groups, in order; groups are numbered in the order of asking."""
    asked = [i for batch in made.engine.asked for i in batch]  # type: ignore[attr-defined]
    return list(dict.fromkeys(asked[s.group] for s in drawn.chosen))


def test_a_method_without_refill_takes_every_group_once(tmp_path):
    made = rollouts(tmp_path, [0, 4, 2, 1], grpo.create(grpo.Config()), batch=4)
    drawn = made.draw(0)
    assert len(made.engine.asked) == 1  # type: ignore[attr-defined]
    assert drawn.chosen == drawn.everything
    assert len(drawn.chosen) == 16
    assert drawn.rounds == 0


class Seeded(Engine):
    """Samples what its seeds say, as every engine does."""

    def generate(self, prompts, sampling):
        groups = []
        for prompt in prompts:
            seeds = [sample_seed(sampling.seed, sampling.step, prompt.id, i) for i in range(4)]
            found = [Completion([s % 97], [-1.0], "yes", "stop", s) for s in seeds]
            groups.append(Group(prompt, found))
        return groups


def test_a_problem_that_stands_twice_in_a_step_is_sampled_twice(tmp_path, monkeypatch):
    """Two epochs' border goes through a step of four of three problems."""
    method = grpo.create(grpo.Config())
    made = rollouts(tmp_path, [0, 0, 0], method, 4)
    made.engine = Seeded([0, 0, 0])  # type: ignore[assignment]

    def score(problems, sequences):
        return [{"note": s.completion[0]} for s in sequences]

    monkeypatch.setattr(method, "score", score)
    (twice,) = [i for i in range(3) if made.order(0).count(i) == 2]
    drawn = made.draw(0)
    assert [s.group for s in drawn.everything] == [g for g in range(4) for _ in range(4)]
    rows = [json.loads(line) for line in made.path(0).read_text().splitlines()]
    assert len({row["seed"] for row in rows}) == 16
    assert sum(row["problem_id"] == f"p{twice}" for row in rows) == 8
    assert [row["note"] for row in rows] == [row["token_ids"][0] for row in rows]
    # What stands once, and the first of two, is drawn as by its own name.
    first = {row["group"]: row for row in reversed(rows)}
    for place, problem in enumerate(made.order(0)):
        own = first[place]["seed"] == sample_seed(3, 0, f"p{problem}", 0)
        assert own == (made.order(0).index(problem) == place)


def test_a_batch_is_refilled_until_it_is_full_of_mixed_groups(tmp_path, capsys):
    correct = [0, 4, 2, 0, 1, 4, 3, 0, 2, 1, 0, 4]
    made = rollouts(tmp_path, correct, dapo_with(refill=20), batch=4)
    drawn = made.draw(0)
    chosen = problems_of(drawn, made)
    assert len(chosen) == 4
    assert all(0 < correct[i] < 4 for i in chosen)
    asked = [i for batch in made.engine.asked for i in batch]  # type: ignore[attr-defined]
    assert len(asked) == len(set(asked))
    # The first mixed ones that were drawn, none left out for a later one.
    assert chosen == [i for i in asked if 0 < correct[i] < 4][:4]
    assert drawn.rounds == len(made.engine.asked) - 1 > 0  # type: ignore[attr-defined]
    assert len(drawn.everything) == 4 * len(asked)
    rows = [json.loads(line) for line in (tmp_path / "step-00000.jsonl").read_text().splitlines()]
    assert len(rows) == len(drawn.everything)
    assert {row["refill"] for row in rows} == set(range(drawn.rounds + 1))
    assert capsys.readouterr().err == ""


def test_a_step_draws_the_same_whatever_came_before(tmp_path):
    correct = [0, 4, 2, 0, 1, 4, 3, 0, 2, 1, 0, 4]
    first = rollouts(tmp_path / "a", correct, dapo_with(refill=20), batch=3)
    for step in range(4):
        first.draw(step)
    log = (tmp_path / "a" / "step-00003.jsonl").read_bytes()
    alone = rollouts(tmp_path / "b", correct, dapo_with(refill=20), batch=3)
    alone.draw(3)
    assert (tmp_path / "b" / "step-00003.jsonl").read_bytes() == log


def test_refills_of_two_steps_come_in_different_orders(tmp_path, monkeypatch):
    made = rollouts(tmp_path, [1] * 12, dapo_with(), batch=3)
    monkeypatch.setattr(made, "order", lambda step: [0, 1, 2])
    orders = {tuple(made.spare(step)) for step in range(8)}
    assert len(orders) == 8
    assert {tuple(sorted(order)) for order in orders} == {tuple(range(3, 12))}


@pytest.mark.parametrize(("refill", "asked"), [(0, 2), (1, 4), (2, 6)])
def test_after_the_last_round_it_says_what_is_missing(tmp_path, capsys, refill, asked):
    made = rollouts(tmp_path, [0] * 12, dapo_with(refill=refill), batch=2)
    drawn = made.draw(0)
    assert drawn.chosen == []
    assert len(drawn.everything) == 4 * asked
    assert drawn.rounds == refill
    found = capsys.readouterr().err
    if refill:
        assert f"step 0: 0 of 2 prompts are usable after {asked} drawn in {refill + 1}" in found
    else:
        assert found == ""


def test_no_problem_is_drawn_twice_when_they_run_out(tmp_path, capsys):
    made = rollouts(tmp_path, [0, 0, 2, 0, 0], dapo_with(refill=50), batch=2)
    drawn = made.draw(0)
    assert problems_of(drawn, made) == [2]
    asked = [i for batch in made.engine.asked for i in batch]  # type: ignore[attr-defined]
    assert sorted(asked) == [0, 1, 2, 3, 4]
    assert "1 of 2 prompts are usable after 5 drawn" in capsys.readouterr().err


def test_prompts_that_cannot_be_completed_are_replaced(tmp_path):
    made = rollouts(tmp_path, [-1, 2, 1, -1, 3], dapo_with(refill=10), batch=3)
    drawn = made.draw(0)
    assert sorted(problems_of(drawn, made)) == [1, 2, 4]


def test_the_overlong_mask_takes_cut_off_samples_out_but_keeps_their_verdict(tmp_path):
    method = dapo_with(overlong_mask=True, refill=0)
    made = rollouts(tmp_path, [2, 2], method, batch=2, finish_reason="length")
    drawn = made.draw(0)
    assert drawn.chosen == []
    assert all(s.reward is None for s in drawn.everything)
    assert [s.correct for s in drawn.everything[:4]] == [True, True, False, False]
    kept = rollouts(tmp_path, [2, 2], method, batch=2).draw(0)
    assert len(kept.chosen) == 8


def test_accuracy_counts_what_was_judged_and_rewards_what_was_scored(tmp_path):
    made = rollouts(tmp_path, [1, 3], dapo_with(overlong_mask=True), batch=2)
    drawn = made.draw(0)
    for sequence in drawn.everything[:2]:  # one correct, one not, cut off
        sequence.reward = None
    found = rollout_figures(drawn.everything, drawn.chosen)
    assert found["accuracy"] == pytest.approx(4 / 8)
    assert found["reward_mean"] == pytest.approx(3 / 6)
    assert found["unscored_share"] == pytest.approx(2 / 8)


def test_the_overlong_penalty_reaches_the_rewards_of_steps(tmp_path):
    """Two tokens of at most ten, with a penalty from the first on: −0.2 at the last token."""
    method = dapo_with(supervision="process", overlong_share=1.0, refill=0)
    made = rollouts(tmp_path, [1], method, batch=1)
    made.rewards = RewardMaker(RewardConfig(process="steps"), lambda ids: "yes"[: len(ids)])
    drawn = made.draw(0)
    assert [s.reward for s in drawn.everything] == pytest.approx([0.8, -0.2, -0.2, -0.2])
    for sequence in drawn.everything:
        assert sequence.steps[-1] == (1, pytest.approx(sequence.reward))
    # What two outputs of other lengths differ in is then their advantage as well.
    rows = [json.loads(line) for line in made.path(0).read_text().splitlines()]
    assert [row["steps"][-1][1] for row in rows] == [row["reward"] for row in rows]


class Lines(Engine):
    """Writes "a⏎b⏎\\\\boxed{c}", a token a letter or line, from wherever it is asked to go on."""

    SOLUTION = (10, 11, 12)
    TEXT = {1: "", 2: "", 10: "a\n", 11: "b\n", 12: "\\boxed{c}"}

    def __init__(self):
        super().__init__([])
        self.prompts: list[Prompt] = []

    def generate(self, prompts, sampling):
        self.prompts += prompts
        groups = []
        for prompt in prompts:
            rest = list(self.SOLUTION[len(prompt.token_ids) - 2 :])
            text = "".join(self.TEXT[t] for t in rest)
            completions = [
                Completion(rest, [-1.0] * len(rest), text, "stop", i) for i in range(sampling.n)
            ]
            groups.append(Group(prompt, completions))
        return groups


class Texts:
    """Keeps what it is asked, and finds every second solution correct."""

    def __init__(self):
        self.asked: list[tuple[str, str]] = []

    def verify_many(self, pairs):
        self.asked += pairs
        return [Verdict([Outcome.CORRECT, Outcome.INCORRECT][i % 2]) for i in range(len(pairs))]


def prefixed(folder: Path, **options) -> Rollouts:
    made = rollouts(folder, [0, 0], grft.create(grft.Config(**options)), batch=2)
    made.engine, made.pool = Lines(), Texts()  # type: ignore[assignment]
    made.rewards = RewardMaker(RewardConfig(), lambda ids: "".join(Lines.TEXT[t] for t in ids))
    return made


def test_prefixes_are_sampled_from_and_solutions_judged_whole(tmp_path):
    made = prefixed(tmp_path, prefixes=3)
    drawn = made.draw(0)
    engine: Lines = made.engine  # type: ignore[assignment]
    first, second = made.order(0)
    assert [(p.id, p.token_ids, p.max_tokens) for p in engine.prompts] == [
        (f"p{first}", (1, 2), None),
        (f"p{second}", (1, 2), None),
        (f"p{first}/sample-0/prefix-1", (1, 2, 10), 9),
        (f"p{first}/sample-0/prefix-2", (1, 2, 10, 11), 8),
        (f"p{second}/sample-0/prefix-1", (1, 2, 10), 9),
        (f"p{second}/sample-0/prefix-2", (1, 2, 10, 11), 8),
    ]
    assert made.pool.asked == [("yes", "a\nb\n\\boxed{c}")] * 24  # type: ignore[attr-defined]
    assert made.method.samples(4) == 12
    assert len(drawn.everything) == 24
    assert drawn.chosen == drawn.everything
    assert [s.group for s in drawn.chosen[::4]] == [0, 2, 3, 1, 4, 5]
    assert [s.prefix for s in drawn.chosen[::4]] == [0, 1, 2] * 2
    assert [s.segments for s in drawn.chosen[:12:4]] == [[0, 1, 2], [0, 1], [0]]
    assert all(s.answered and s.text == "a\nb\n\\boxed{c}" for s in drawn.chosen)
    rows = [json.loads(line) for line in (tmp_path / "step-00000.jsonl").read_text().splitlines()]
    assert [row["problem_id"] for row in rows[8:12]] == [f"p{first}"] * 4
    assert rows[8]["prefix"] == {"sample_index": 0, "token_ids": [10]}
    assert rows[8]["token_ids"] == [11, 12]
    assert "prefix" not in rows[0]


def test_siblings_are_compared_with_each_other_and_answer_for_their_segment(tmp_path):
    made = prefixed(tmp_path, prefixes=3)
    kept = made.method.advantages(made.draw(0).chosen)
    assert {tuple(s.completion) for s in kept} == {(10,), (11,), (12,)}
    assert [s.advantage for s in kept] == pytest.approx([1.0, -1.0] * 12, rel=1e-5)
    assert all(len(s.mask) == len(s.logprobs) == len(s.segments) == 1 for s in kept)
    tail = grft.create(grft.Config(prefixes=3, mode="tail")).advantages(made.draw(0).chosen)
    assert [len(s.completion) for s in tail[:12]] == [3] * 4 + [2] * 4 + [1] * 4


def test_missing_cut_points_come_from_the_next_sample():
    method = grft.create(grft.Config(prefixes=4))

    def sample(completion, segments):
        return Sequence([1], completion, [True] * len(completion), 0, segments=segments)

    rng = random.Random(0)
    group = [sample([5, 6, 7], [0, 0, 1]), sample([5, 6, 8], [0, 0, 1]), sample([5, 9], [0, 1])]
    # (0, 2) is the first's only cut; the second's is the same; the third's is new.
    assert method.prefixes(group, rng) == [(0, 2), (2, 1)]
    long = [sample(list(range(9)), list(range(9)))]
    drawn = {tuple(method.prefixes(long, random.Random(seed))) for seed in range(2000)}
    assert len(drawn) == 56  # every way to choose 3 of 8
    assert all(list(found) == sorted(found) for found in drawn)
