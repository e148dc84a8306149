"""Warnings about how reinforcement goes: each sign on its own, said once, and only when due."""

from __future__ import annotations

import pytest

from data_prep.jsonl import read_rows
from pipeline.monitor import Monitor, MonitorConfig
from pipeline.records import Records

HEALTHY = {
    "samples": 64,
    "reward_mean": 0.5,
    "reward_std": 0.5,
    "entropy": 0.8,
    "zero_signal_share": 0.3,
    "truncated_share": 0.1,
    "unscored_share": 0.0,
    "completion_length": 100.0,
    "length_correct": 90.0,
    "length_incorrect": 110.0,
    "groups_solved_all": 0.2,
    "groups_solved_none": 0.1,
    "kl_k3": 0.01,
    "update_kl_k3": 0.001,
}
ILL = {
    "entropy": ({"entropy": 0.03}, "3.8% of the 0.8"),
    "zero_signal": ({"zero_signal_share": 0.95, "groups_solved_all": 0.9}, "Give harder problems"),
    "truncated": ({"truncated_share": 0.97}, "97% of completions are cut off"),
    "reward_zero": ({"reward_mean": 0.0, "reward_std": 0.0}, "no sample was right"),
    "unscored": ({"unscored_share": 0.98}, "98% of samples have no reward"),
    "length": ({"completion_length": 250.0}, "220 tokens"),
    "incorrect_length": ({"length_incorrect": 300.0}, "correct ones 90"),
    "kl": ({"kl_k3": 1.5}, "1.2 nats a token"),
    "update_kl": ({"update_kl_k3": 0.2}, "0.12 nats a token"),
}


def watch(rows):
    monitor = Monitor(MonitorConfig(), "grpo")
    return [w for step, row in enumerate(rows) for w in monitor.observe({"step": step, **row})]


@pytest.mark.parametrize("sign", ILL)
def test_each_sign_is_said_once_when_a_whole_window_shows_it(sign):
    change, words = ILL[sign]
    ill = {**HEALTHY, **change}
    found = watch([HEALTHY] * 5 + [ill] * 12)
    assert [w.sign for w in found] == [sign]
    # A mean over five steps: the further beyond its threshold, the sooner.
    assert 5 <= found[0].step <= 9
    assert words in f"{found[0].found}. {found[0].advice}"


def test_a_healthy_run_is_not_warned_of():
    assert watch([HEALTHY] * 40) == []


def test_one_bad_step_is_no_sign():
    for change, _ in ILL.values():
        bad = {**HEALTHY, **change}
        assert watch([HEALTHY] * 9 + [bad] + [HEALTHY] * 9) == []


def test_longer_and_better_is_no_run_away():
    better = {**HEALTHY, "completion_length": 400.0, "reward_mean": 0.7}
    assert watch([HEALTHY] * 5 + [better] * 9) == []


def test_steps_without_rollouts_are_not_looked_at():
    assert watch([{"objective": 0.1, "entropy": 1.0}] * 5 + [{"entropy": 0.0}] * 9) == []


def test_figures_that_are_missing_or_null_warn_of_nothing():
    thin = {"samples": 4, "reward_mean": None, "kl_k3": None, "entropy": None}
    assert watch([thin] * 12) == []


def test_a_run_that_goes_on_warns_as_one_that_was_never_killed(tmp_path, capsys):
    rows = [HEALTHY] * 5 + [{**HEALTHY, **ILL["truncated"][0]}] * 12

    def write(folder, steps, start=0):
        folder.mkdir(exist_ok=True)
        records = Records(folder, start, 17, "grpo", Monitor(MonitorConfig(), "grpo"))
        for step in steps:
            records.write(step, rows[step], {"tokens_per_s": 1.0})
        records.close()
        return (folder / "warnings.jsonl").read_bytes()

    whole = write(tmp_path / "whole", range(17))
    ((_, row),) = read_rows(tmp_path / "whole" / "warnings.jsonl")
    assert row["sign"] == "truncated"
    assert capsys.readouterr().err.count("are cut off") == 1
    # Killed after the warning was written; the state is of before, then of after it.
    for start in (4, row["step"] + 1):
        folder = tmp_path / f"from-{start}"
        write(folder, range(row["step"] + 2))
        assert write(folder, range(start, 17), start) == whole
