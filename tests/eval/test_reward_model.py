"""Reward-model scores in an evaluation: best-of-K and the weighted vote, against enumeration."""

from __future__ import annotations

import csv
import json
import math
import shutil
from itertools import combinations
from statistics import mean

import pytest
import torch

import eval.evaluate
from data_prep.errors import UserError
from data_prep.jsonl import read_json, read_rows
from data_prep.tokenizer import train_tokenizer
from eval.compare import main as compare
from eval.export import main as export
from eval.regrade import main as regrade
from eval.report import main as report
from eval.reward_model import RewardModel, read_scores
from eval.run import main
from eval.score import main as score
from pipeline.critic import load_scalar_model
from pipeline.engines import Prompt
from pipeline.model import load_tokenizer
from pipeline.samples import Sample
from prompts import load_layout, load_profile

# Few different values, so that scores tie; it sees tokens alone.
SCORER = """
class Length:
    def score(self, prompts, completions):
        return [((len(c) * 7 + len(p)) % 5 - 2) / 2 for p, c in zip(prompts, completions)]


def load_scorer():
    return Length()
"""


@pytest.fixture(scope="module")
def scored(simulated_run, tmp_path_factory):
    """A copy of the simulated run, its last checkpoint evaluated again with a reward model."""
    folder = tmp_path_factory.mktemp("scored")
    run, file = folder / "run", folder / "length.py"
    shutil.copytree(simulated_run, run)
    file.write_text(SCORER, encoding="utf-8")

    def refuse(config, model):
        raise AssertionError("a sample was drawn again")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(eval.evaluate, "create_engine", refuse)
        main(
            [
                "--config",
                str(run / "config.toml"),
                "--out",
                str(run),
                "--checkpoints",
                "grpo",
                "--reward-model",
                str(file),
            ]
        )
    return run, file


def groups(folder):
    """Return (class, correct, score) of every question's samples."""
    found = {}
    pairs = zip(
        read_rows(folder / "verdicts.jsonl"), read_rows(folder / "scores.jsonl"), strict=True
    )
    for (_, verdict), (_, value) in pairs:
        assert (verdict["problem_id"], verdict["sample_index"]) == (
            value["problem_id"],
            value["sample_index"],
        )
        found.setdefault(verdict["problem_id"], []).append(
            (verdict["answer_class"], verdict["outcome"] == "correct", value["score"])
        )
    return list(found.values())


def test_figures_equal_enumeration(scored):
    run, _ = scored
    folder = run / "eval-grpo" / "embedded"
    figures = read_json(folder / "figures.json")["figures"]
    questions = groups(folder)
    assert len({s for q in questions for _, _, s in q}) > 2
    for k in (1, 2, 4, 8):
        expected = []
        for question in questions:
            chosen = []
            for subset in combinations(question, k):
                top = max(s for _, _, s in subset)
                chosen.append(mean(ok for _, ok, s in subset if s == top))
            expected.append(mean(chosen))
        assert figures[f"best@{k}"]["value"] == pytest.approx(mean(expected), abs=1e-12)
    expected = []
    for question in questions:
        weights, members = {}, {}
        for name, ok, s in question:
            if name is not None:
                weights[name] = weights.get(name, 0.0) + math.exp(s)
                members.setdefault(name, []).append(ok)
        top = max(weights.values(), default=0.0)
        winners = [mean(members[w]) for w in weights if weights[w] == pytest.approx(top)]
        expected.append(mean(winners) if winners else 0.0)
    assert figures["weighted@8"]["value"] == pytest.approx(mean(expected), abs=1e-12)
    # Everything else is as it was without a reward model.
    before = read_json(run / "eval-sft" / "embedded" / "figures.json")["figures"]
    assert "best@8" not in before and "weighted@8" not in before


def test_report_export_and_compare_show_them(scored, tmp_path, capsys):
    run, _ = scored
    report(["--run", str(run)])
    page = (run / "report" / "report.html").read_text("utf-8")
    figures = read_json(run / "eval-grpo" / "embedded" / "figures.json")["figures"]
    assert "best@8" in page and "weighted@8" in page and "Best-of-K" in page
    assert f"{100 * figures['best@8']['value']:.1f}" in page
    stored = read_json(run / "report" / "report.json")["figures"]["grpo"]["embedded"]
    assert stored["best@4"] == figures["best@4"]
    export(["--run", str(run), "--output", str(tmp_path)])
    with (tmp_path / "figures.csv").open(newline="") as file:
        rows = {(r["checkpoint"], r["by"], r["metric"]) for r in csv.DictReader(file)}
    assert ("grpo", "", "best@8") in rows
    capsys.readouterr()
    with pytest.raises(UserError, match=r"sft has no 'best@8'"):
        compare([str(run / "eval-grpo"), str(run / "eval-sft"), "--metric", "best@8"])


def test_scores_in_a_file_of_their_own(scored, tmp_path):
    run, _ = scored
    folder = run / "eval-grpo" / "embedded"
    rows = [row for _, row in read_rows(folder / "verdicts.jsonl")]
    samples = tmp_path / "samples.jsonl"
    samples.write_text(
        "".join(
            json.dumps(
                {
                    "problem_id": r["problem_id"],
                    "sample_index": r["sample_index"],
                    "answer": r["extracted"],
                    "correct": r["outcome"] == "correct",
                    "class": r["answer_class"],
                }
            )
            + "\n"
            for r in rows
        )
    )
    out = tmp_path / "metrics.json"
    words = ["--samples", str(samples), "--k", "1,4,8", "--output", str(out)]
    score([*words, "--scores", str(folder / "scores.jsonl")])
    figures = read_json(folder / "figures.json")["figures"]
    for name in ("best@1", "best@4", "best@8", "weighted@8"):
        assert read_json(out)[name] == pytest.approx(figures[name]["value"], abs=1e-12)
    lines = (folder / "scores.jsonl").read_text().splitlines(keepends=True)
    short = tmp_path / "short.jsonl"
    short.write_text("".join(lines[:-1]))
    with pytest.raises(UserError, match=r"has scores of samples \[0, 1, 2, 3, 4, 5, 6\]"):
        score([*words, "--scores", str(short)])
    short.write_text("".join([*lines, lines[-1]]))
    with pytest.raises(UserError, match="comes twice"):
        score([*words, "--scores", str(short)])


def test_second_grading_by_profile_and_with_a_reward_model(scored, capsys):
    run, file = scored
    capsys.readouterr()
    regrade(
        [
            str(run / "eval-grpo"),
            "--profile",
            "deepseek_math",
            "--reward-model",
            str(file),
            "--workers",
            "1",
        ]
    )
    printed = capsys.readouterr().out
    folder = run / "eval-grpo" / "embedded"
    second = read_json(folder / "second" / "figures.json")
    assert second["checker"]["policy"] == "deepseek_math"
    assert "the graders disagree on" in printed and "best@8" in printed
    first = read_json(folder / "figures.json")["figures"]
    assert (folder / "second/scores.jsonl").read_bytes() == (folder / "scores.jsonl").read_bytes()
    if not second["disagreements"]:
        assert second["figures"]["best@8"]["value"] == first["best@8"]["value"]
    with pytest.raises(UserError, match="no second grader"):
        regrade([str(run / "eval-grpo")])
    with pytest.raises(UserError, match="beside --checker"):
        regrade([str(run / "eval-grpo"), "--profile", "boxed", "--checker", "exact"])


def sample(index, error=None):
    return Sample(
        "p", index, [] if error else [1, 2], [], "", "error" if error else "stop", 0, 0, error
    )


def test_what_a_scorer_may_not_do(tmp_path, checkpoint):
    def rows(body):
        file = tmp_path / f"{abs(hash(body))}.py"
        file.write_text(body)
        reward = RewardModel(str(file), checkpoint)
        return list(reward.rows([Prompt("p", (1,))], [sample(0), sample(1)]))

    one = "class S:\n    def score(self, prompts, completions): return {}\n"
    load = "def load_scorer(): return S()\n"
    assert [r["score"] for r in rows(one.format("[1, 2]") + load)] == [1.0, 2.0]
    with pytest.raises(UserError, match="1 scores for 2 samples"):
        rows(one.format("[1.0]") + load)
    with pytest.raises(UserError, match="score nan for sample 1 of 'p'"):
        rows(one.format("[1.0, float('nan')]") + load)
    with pytest.raises(UserError, match=r"no function load_scorer"):
        rows(one.format("[1.0]"))
    with pytest.raises(UserError, match="no file"):
        RewardModel(str(tmp_path / "absent.py"), checkpoint)
    with pytest.raises(UserError, match="no folder"):
        RewardModel(str(tmp_path / "absent"), checkpoint)


def test_a_reward_model_of_another_tokenizer_is_refused(tmp_path, checkpoint):
    profile = load_profile("embedded")
    other = train_tokenizer(["ab ba " * 50], 290, load_layout(profile.layout), profile.system)
    shutil.copytree(checkpoint, tmp_path / "other")
    with pytest.raises(UserError, match="a language model, which has no score"):
        RewardModel(str(tmp_path / "other"), checkpoint)
    scalar_model(checkpoint, tmp_path / "other")
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match="its tokenizer is not that of"):
        RewardModel(str(tmp_path / "other"), checkpoint)


def scalar_model(checkpoint, folder):
    """Turn a checkpoint into a reward model with a random head; return it."""
    torch.manual_seed(3)
    model = load_scalar_model(checkpoint)
    torch.nn.init.normal_(model.score.weight)
    model.save_pretrained(folder)
    load_tokenizer(checkpoint).save_pretrained(folder)
    return model.eval()


def test_a_reward_model_s_folder_scores_what_was_sampled(checkpoint, gsm8k_file, tmp_path):
    """Against transformers' own classifier, sample by sample, on the tokens of the log."""
    model = scalar_model(checkpoint, tmp_path / "reward")
    words = [
        "--model",
        str(checkpoint),
        "--suites",
        f"gsm8k={gsm8k_file}",
        "--n",
        "4",
        "--max-tokens",
        "12",
        "--workers",
        "1",
        "--bootstrap",
        "200",
        "--limit",
        "6",
        "--out",
        str(tmp_path / "out"),
    ]
    main(words)
    before = sorted((tmp_path / "out/samples").rglob("*-*.jsonl"))
    stamps = [path.stat().st_mtime_ns for path in before]
    main([*words, "--reward-model", str(tmp_path / "reward")])
    assert [path.stat().st_mtime_ns for path in before] == stamps
    folder = tmp_path / "out" / "eval-sft" / "gsm8k"
    prompts = {r["problem_id"]: r["token_ids"] for _, r in read_rows(folder / "prompts.jsonl")}
    scores = {
        (r["problem_id"], r["sample_index"]): r["score"]
        for _, r in read_rows(folder / "scores.jsonl")
    }
    seen = 0
    for path in folder.glob("samples-*.jsonl"):
        for _, row in read_rows(path):
            ids = torch.tensor([prompts[row["problem_id"]] + row["token_ids"]])
            with torch.no_grad():
                states = model.model(input_ids=ids).last_hidden_state
                expected = model.score(states)[0, -1, 0].item()
            got = scores[row["problem_id"], row["sample_index"]]
            assert got == pytest.approx(expected, abs=2e-5)
            seen += 1
    assert seen == 24 and len(set(scores.values())) > 12
    figures = read_json(folder / "figures.json")["figures"]
    assert "best@4" in figures and "weighted@4" in figures
    with pytest.raises(UserError, match="a reward model, which answers no question"):
        main(["--model", str(tmp_path / "reward"), *words[2:]])


def test_a_sample_that_was_not_drawn_loses_to_every_other(tmp_path, checkpoint):
    file = tmp_path / "length.py"
    file.write_text(SCORER)
    reward = RewardModel(str(file), checkpoint)
    rows = list(reward.rows([Prompt("p", (1,))], [sample(0), sample(1, "too long")]))
    assert [row["score"] for row in rows][1] is None
    path = tmp_path / "scores.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    ((first, second),) = read_scores(path, {"p": range(2)})
    assert second < first and math.isfinite(second)


def test_recorded_scores_of_a_published_reward_model(real, tmp_path):
    """100 MATH questions × 8 samples with the scores of Qwen2.5-Math-RM, against enumeration."""
    lines = (real / "recorded_groups/qwen_math_cot_100.jsonl").read_text("utf-8").splitlines()
    recorded = [json.loads(line) for line in lines]
    samples, scores = tmp_path / "samples.jsonl", tmp_path / "scores.jsonl"
    rows = [
        ({"problem_id": r["idx"], "sample_index": i}, answer, correct, value)
        for r in recorded
        for i, (answer, correct, (value,)) in enumerate(
            zip(r["pred"], r["score"], r["pred_score"], strict=True)
        )
    ]
    samples.write_text(
        "".join(json.dumps(k | {"answer": a or None, "correct": ok}) + "\n" for k, a, ok, _ in rows)
    )
    # A file of its own may be in any order.
    scores.write_text("".join(json.dumps(k | {"score": v}) + "\n" for k, _, _, v in rows[::-1]))
    out = tmp_path / "metrics.json"
    score(
        ["--samples", str(samples), "--scores", str(scores), "--k", "1,2,4,8", "--output", str(out)]
    )
    got = read_json(out)
    for k in (1, 2, 4, 8):
        expected = []
        for r in recorded:
            pairs = [(s[0], ok) for s, ok in zip(r["pred_score"], r["score"], strict=True)]
            best = [max(subset)[0] for subset in combinations(pairs, k)]
            expected.append(
                mean(
                    mean(ok for s, ok in subset if s == top)
                    for subset, top in zip(combinations(pairs, k), best, strict=True)
                )
            )
        assert got[f"best@{k}"] == pytest.approx(mean(expected), abs=1e-12)
    assert got["best@8"] == pytest.approx(0.94)
    assert got["weighted@8"] == pytest.approx(0.94)
