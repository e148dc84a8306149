"""What a stage says about itself: records, warnings, batches without signal, bad numbers."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch

from data_prep.build import build
from data_prep.config import validate
from data_prep.errors import UserError
from data_prep.jsonl import read_rows
from data_prep.plugins import load_plugin, plugin_names
from pipeline import rollout as rollout_module
from pipeline.config import RunConfig, TrainConfig
from pipeline.methods import create_method
from pipeline.methods.grpo import Grpo
from pipeline.reward import RewardMaker
from pipeline.train import train
from verifiers import Outcome, Verdict

from .small_run import small_run

ONLINE = {
    "grpo": {"beta": 0.05},
    "online_rft": {},
    "dr_grpo": {},
    "rloo": {"beta": 0.05, "kl": "k1"},
    "reinforce": {},
    "gspo": {},
    "cispo": {},
    "dapo": {"refill": 1},
    "ppo": {"beta": 0.05},
    "grft": {},
    "segment_rft": {"thoughts": 1},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """Data and SFT."""
    folder = tmp_path_factory.mktemp("base")
    run = small_run(folder)
    build(run.data, Path(run.out), run.seed)
    train(run, next(s for s in run.train if s.name == "sft"))
    return folder


@pytest.fixture
def run(base, tmp_path) -> RunConfig:
    """A copy of the base run that a test may change."""
    shutil.copytree(base / "run", tmp_path / "run")
    return small_run(tmp_path)


def stage(run: RunConfig, **changes) -> TrainConfig:
    grpo = next(s for s in run.train if s.name == "grpo")
    return validate(TrainConfig, {**grpo.model_dump(), **changes}, "grpo")


def steps(folder: Path) -> list[dict]:
    return [row for _, row in read_rows(folder / "steps.jsonl")]


def weights(folder: Path) -> bytes:
    return (folder / "checkpoint" / "model.safetensors").read_bytes()


def all_judged(monkeypatch, outcome: Outcome) -> None:
    def judge(self, problems, sequences):
        return [Verdict(outcome, rule="test") for _ in sequences]

    monkeypatch.setattr(rollout_module.Rollouts, "_judge", judge)


def test_every_step_writes_what_a_reader_needs(run):
    folder = train(run, stage(run, reward={"format": 0.1}))
    taken = [row for row in steps(folder) if not row["skipped"]]
    assert len(taken) >= 4
    names = """
        reward_mean reward_std zero_signal_share signal_share advantage_mean advantage_std
        advantage_histogram ratio_mean ratio_min ratio_max clip_share clip_share_low
        clip_share_high kl_k1 kl_k2 kl_k3 update_kl_k1 update_kl_k2 update_kl_k3 entropy
        completion_length truncated_share accuracy groups_solved_none groups_solved_few
        groups_solved_some groups_solved_most groups_solved_all sampler_gap_mean sampler_gap_max
        grad_norm learning_rate objective distinct_completions distinct_answers
    """
    wanted = names.split()
    for row in taken:
        assert set(wanted) <= set(row)
        shares = [v for k, v in row.items() if k.startswith("groups_solved")]
        assert sum(shares) == pytest.approx(1.0, abs=1e-6)
        assert row["clip_share"] == pytest.approx(row["clip_share_low"] + row["clip_share_high"])
        log = folder / "rollouts" / f"step-{row['step']:05d}.jsonl"
        drawn = [sample for _, sample in read_rows(log)]
        # Tokens of the groups that carry signal, and no others.
        by_problem: dict[str, list[dict]] = {}
        for sample in drawn:
            by_problem.setdefault(sample["problem_id"], []).append(sample)
        kept = sum(
            len(sample["token_ids"])
            for group in by_problem.values()
            if len({sample["reward"] for sample in group}) > 1
            for sample in group
        )
        assert sum(row["advantage_histogram"]) == kept
    assert {"length_correct", "length_incorrect"} <= {key for row in taken for key in row}
    timing = [row for _, row in read_rows(folder / "timing.jsonl")]
    assert all(row["tokens_per_s"] > 0 for row in timing)


def test_every_method_that_samples_is_among_them():
    created = [create_method(plugin_config_of(n)) for n in plugin_names("pipeline.methods")]
    assert {m.config.kind for m in created if m.source == "policy"} == set(ONLINE)


def plugin_config_of(name: str):
    return load_plugin("pipeline.methods", name).Config(kind=name)


@pytest.mark.parametrize("name", ONLINE)
@pytest.mark.parametrize("outcome", [Outcome.INCORRECT, Outcome.ERROR])
def test_a_batch_without_signal_is_skipped_and_counted(run, monkeypatch, name, outcome):
    """All rewards equal, or no sample scored: no step is taken, and nothing is divided by zero."""
    all_judged(monkeypatch, outcome)
    folder = train(run, stage(run, name=name, steps=2, method={"kind": name, **ONLINE[name]}))
    # Where the baseline is V, equal rewards may teach; here V says 0 and they are 0.
    stays = name in ("ppo", "segment_rft") and outcome is Outcome.INCORRECT
    for row in steps(folder):
        assert row["skipped"] == float(not stays)
        assert None not in row.values()
    assert weights(folder) == weights(Path(run.out) / "sft")


def test_collapse_is_warned_of_and_stops_nothing(run, monkeypatch, capsys):
    all_judged(monkeypatch, Outcome.INCORRECT)
    folder = train(run, stage(run, steps=6))
    warned = {row["sign"]: row for _, row in read_rows(folder / "warnings.jsonl")}
    assert {"reward_zero", "zero_signal"} <= set(warned)
    assert warned["reward_zero"]["step"] == 4
    assert len(steps(folder)) == 6
    shown = capsys.readouterr().err
    assert shown.count("every reward is 0") == 1
    assert "Give easier problems" in shown


def kept_batch(run, config) -> list[dict]:
    with pytest.raises(UserError) as caught:
        train(run, config)
    assert "the batch is kept in" in str(caught.value)
    path = Path(run.out) / f"{config.name}.failed" / "batch.jsonl"
    assert not (Path(run.out) / config.name).exists()
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_an_objective_that_is_not_finite_stops_before_the_step(run, monkeypatch):
    """The gradient alone would not tell: its coefficient is finite."""
    config = stage(run)
    monkeypatch.setattr(Grpo, "objective", lambda *a: torch.tensor(math.inf))
    rows = kept_batch(run, config)
    assert all(row["completion"] and row["problem_id"] for row in rows)
    assert any(row["advantage"] for row in rows)


def test_a_score_that_is_not_finite_keeps_the_sequences(run, monkeypatch):
    def fill(self, sequences, verdicts):
        RewardMaker._model_scores(self, sequences)

    class Judge:
        def score(self, prompts, completions):
            return [math.nan if i == 1 else 0.5 for i in range(len(prompts))]

    monkeypatch.setattr(RewardMaker, "fill", fill)
    monkeypatch.setattr(RewardMaker, "scorer", Judge(), raising=False)
    monkeypatch.setattr(
        RewardMaker,
        "__init__",
        lambda self, config, *rest: setattr(self, "config", config),
    )
    rows = kept_batch(run, stage(run))
    assert [row["reward"] for row in rows[:3]] == [0.5, "nan", 0.5]
    assert len(rows) == 12


def test_a_shaped_reward_that_is_not_finite_keeps_the_sequences(run, monkeypatch):
    monkeypatch.setattr(Grpo, "shape", lambda *a: math.inf)
    rows = kept_batch(run, stage(run))
    assert {row["reward"] for row in rows} == {"inf"}
    assert len(rows) == 12


def test_bad_numbers_of_a_batch_drawn_ahead_are_kept_too(run, monkeypatch):
    monkeypatch.setattr(Grpo, "shape", lambda *a: math.nan)
    config = stage(run, staleness=1, correction={"kind": "token"})
    assert len(kept_batch(run, config)) == 12
