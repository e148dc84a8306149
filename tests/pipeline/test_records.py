"""The figures of a step, worked by hand."""

from __future__ import annotations

import json
import math

import pytest
import torch

from data_prep.errors import UserError
from pipeline.batch import Sequence, flatten
from pipeline.divergence import figures as kl_figures
from pipeline.records import HISTOGRAM_EDGES, Records, advantage_figures, rollout_figures


def sample(group, correct, length, answer="", level="", reason="stop", reward=None):
    return Sequence(
        [1],
        [2] * length,
        [True] * length,
        group,
        reward=float(bool(correct)) if reward is None else reward,
        correct=correct,
        finish_reason=reason,
        level=level,
        text=f"{answer}{length}",
        answer=answer,
    )


def test_rollout_figures_by_hand():
    sequences = [
        sample(0, True, 4, "7", "1"),
        sample(0, False, 8, "8", "1"),
        sample(0, False, 8, "8", "1"),
        sample(0, False, 10, "", "1", "length"),
        sample(1, True, 6, "3", "2"),
        sample(1, True, 6, "3", "2"),
    ]
    found = rollout_figures(sequences, sequences[:4])
    assert found["reward_mean"] == pytest.approx(0.5)
    assert found["reward_std"] == pytest.approx(0.5)
    assert found["zero_signal_share"] == 0.5
    assert found["truncated_share"] == pytest.approx(1 / 6)
    assert found["length_correct"] == pytest.approx(16 / 3)
    assert found["length_incorrect"] == pytest.approx(26 / 3)
    assert found["accuracy_level_1"] == 0.25
    assert found["accuracy_level_2"] == 1.0
    assert found["distinct_answers"] == 1.5
    assert found["distinct_completions"] == 2.0
    solved = {k: v for k, v in found.items() if k.startswith("groups_solved")}
    assert solved == {
        "groups_solved_none": 0.0,
        "groups_solved_few": 0.5,
        "groups_solved_some": 0.0,
        "groups_solved_most": 0.0,
        "groups_solved_all": 0.5,
    }


@pytest.mark.parametrize(
    ("right", "name"), [(0, "none"), (2, "few"), (3, "some"), (6, "some"), (7, "most"), (8, "all")]
)
def test_groups_by_their_own_accuracy(right, name):
    group = [sample(0, i < right, 3) for i in range(8)]
    found = rollout_figures(group, group)
    assert found[f"groups_solved_{name}"] == 1.0


def test_rollouts_without_a_score_divide_by_nothing():
    unscored = [sample(0, None, 3) for _ in range(2)]
    for sequence in unscored:
        sequence.reward = None
    assert rollout_figures(unscored, [])["unscored_share"] == 1.0


def test_a_group_of_equal_rewards_has_signal_where_its_method_finds_some():
    """Their steps may differ, or the baseline be a critic or the batch, as with groups of one."""
    alone = [sample(number, number > 1, 3) for number in range(4)]
    assert rollout_figures(alone, [])["zero_signal_share"] == 1.0
    assert rollout_figures(alone, alone)["zero_signal_share"] == 0.0
    assert rollout_figures(alone, alone[:1])["zero_signal_share"] == 0.75
    # Unequal rewards that a full batch had no place for are signal all the same.
    mixed = [sample(0, right, 3) for right in (True, False)]
    assert rollout_figures(mixed, [])["zero_signal_share"] == 0.0


def test_the_histogram_counts_every_token_once():
    values = torch.tensor([-9.0, -0.3780, -0.3780, 0.0, 0.05, 2.6458, 9.0])
    found = advantage_figures(values)
    assert len(found["advantage_histogram"]) == len(HISTOGRAM_EDGES) + 1
    assert found["advantage_histogram"] == [1, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1, 1]
    assert found["advantage_mean"] == pytest.approx(float(values.mean()))
    assert found["advantage_std"] == pytest.approx(float(values.std(unbiased=False)))


def test_three_estimates_to_the_reference_and_to_the_policy_before():
    tokens = flatten([sample(0, True, 2)])
    logp = torch.tensor([-1.0, -2.0])
    tokens.old_logp, tokens.ref_logp = logp - 0.5, logp + torch.tensor([1.0, -1.0])
    found = kl_figures(tokens, logp)
    assert found["update_kl_k1"] == pytest.approx(0.5)
    assert found["update_kl_k2"] == pytest.approx(0.125)
    assert found["update_kl_k3"] == pytest.approx(math.exp(-0.5) - 0.5)
    assert found["kl_k1"] == pytest.approx(0.0)
    assert found["kl_k2"] == pytest.approx(0.5)
    assert found["kl_k3"] == pytest.approx((math.e - 2 + math.exp(-1.0)) / 2)


def test_rows_hold_numbers_lists_and_null(tmp_path):
    records = Records(tmp_path, 0, 1, "test")
    records.write(0, {"a": 1 / 3, "b": math.inf, "c": [1, math.nan]}, {"tokens_per_s": 2.0})
    records.close()
    row = json.loads((tmp_path / "steps.jsonl").read_text())
    assert row == {"step": 0, "a": 0.3333333, "b": None, "c": [1.0, None]}
    assert json.loads((tmp_path / "timing.jsonl").read_text()) == {"step": 0, "tokens_per_s": 2.0}


def test_damaged_rates_are_named_and_left_out(tmp_path, capsys):
    rows = [{"step": step, "draw_s": 0.5} for step in range(5)]
    lines = [json.dumps(row).encode() for row in rows]
    lines[1] = lines[1].replace(b"step", b"stdp")
    lines[2] = lines[2].replace(b"2", b'"')
    lines[3] = lines[3].replace(b"s", b"\xf3")
    (tmp_path / "timing.jsonl").write_bytes(b"\n".join([*lines, b"[4]", b""]))
    Records(tmp_path, 5, 9, "x").close()
    found = [json.loads(line) for line in (tmp_path / "timing.jsonl").read_text().splitlines()]
    assert found == [rows[0], rows[4]]
    said = capsys.readouterr().err
    for line in (2, 3, 4, 6):
        assert f"timing.jsonl, line {line}: damaged; left out" in said
    # What counts is refused, where no state vouches for it.
    (tmp_path / "steps.jsonl").write_bytes(lines[1] + b"\n")
    with pytest.raises(UserError, match=r"steps\.jsonl, line 1"):
        Records(tmp_path, 5, 9, "x")
