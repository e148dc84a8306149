"""Evaluating a checkpoint for real: embedded engine, verifier pool, figures."""

from __future__ import annotations

import json
import shutil

import pytest

import eval.evaluate
from data_prep.errors import UserError
from data_prep.jsonl import read_json
from eval.report import main as write_report
from eval.run import dotted, engine_config, main
from pipeline.engines import create_engine


def figures(out, name="sft", suite="gsm8k"):
    return read_json(out / f"eval-{name}" / suite / "figures.json")


def arguments(checkpoint, gsm8k_file, out, *more):
    return [
        "--model",
        str(checkpoint),
        "--suites",
        f"gsm8k={gsm8k_file}",
        "--n",
        "4",
        "--max-tokens",
        "12",
        "--shard-size",
        "5",
        "--workers",
        "1",
        "--bootstrap",
        "200",
        "--out",
        str(out),
        *more,
    ]


@pytest.fixture(scope="module")
def engines(request):
    """Count how often an engine is created."""
    created = []
    patch = pytest.MonkeyPatch()

    def counting(config, model):
        created.append(model)
        return create_engine(config, model)

    patch.setattr(eval.evaluate, "create_engine", counting)
    yield created
    patch.undo()


def test_from_published_file_to_figures(checkpoint, gsm8k_file, tmp_path, engines, capsys):
    out = tmp_path / "out"
    main(arguments(checkpoint, gsm8k_file, out))
    printed = capsys.readouterr().out
    result = figures(out)
    assert result["questions"] == 12
    assert result["k"] == [1, 2, 4]
    assert set(result["figures"]) >= {"greedy", "avg@4", "pass@4", "maj@4", "truncated"}
    for name in ("greedy", "avg@4", "pass@2", "maj@4"):
        figure = result["figures"][name]
        assert figure["n"] == 12
        assert 0.0 <= figure["low"] <= figure["value"] <= figure["high"] <= 1.0
    assert "sft" in printed and "avg@4" in printed and "gsm8k" in printed

    # Complete: nothing runs again. Another K: figures anew, samples taken over.
    count = len(engines)
    main(arguments(checkpoint, gsm8k_file, out))
    main(arguments(checkpoint, gsm8k_file, out, "--k", "3"))
    assert len(engines) == count
    assert "pass@3" in figures(out)["figures"]
    # Another temperature decides other samples; going back finds the first ones.
    main(arguments(checkpoint, gsm8k_file, out, "--temperature", "0.5"))
    assert len(engines) == count + 1
    assert figures(out) != result
    main(arguments(checkpoint, gsm8k_file, out))
    assert len(engines) == count + 1
    assert figures(out) == result
    # Another suite comes beside the first; another checker keeps the samples.
    mine = tmp_path / "mine.jsonl"
    mine.write_text('{"question": "What is 1+1?", "answer": 2}\n')
    words = arguments(checkpoint, gsm8k_file, out, "--checker.kind", "exact")
    words[3] = str(mine)
    main(words)
    assert len(engines) == count + 2
    assert figures(out) == result
    assert figures(out, suite="mine")["questions"] == 1
    # Drawn with another n it has columns of its own.
    words[words.index("--n") + 1] = "2"
    capsys.readouterr()
    main(words)
    head, *rows = capsys.readouterr().out.splitlines()[:3]
    assert "avg@4" in head and "avg@2" in head
    assert all("–" in row for row in rows)
    # What was drawn for either is still there.
    assert len(list((out / "samples/sft").glob("mine-*"))) == 2
    assert len(list((out / "samples/sft").glob("gsm8k-*"))) == 2


def test_a_complete_evaluation_gives_its_log_back_what_that_has_lost(
    checkpoint, gsm8k_file, tmp_path, engines, capsys
):
    words = arguments(checkpoint, gsm8k_file, tmp_path)
    main(words)
    (log,) = (tmp_path / "samples/sft").iterdir()
    expected = {path.name: path.read_bytes() for path in log.iterdir()}
    shards = sorted(name for name in expected if name.endswith(".jsonl") and "-" in name)
    assert len(shards) > 3
    (log / "generation.json").unlink()
    (log / shards[0]).unlink()
    # Another file, not the evaluation's own under its second name.
    copied = (log / shards[1]).read_bytes()
    (log / shards[1]).unlink()
    (log / shards[1]).write_bytes(copied[:-3])
    count = len(engines)
    capsys.readouterr()
    main(words)
    said = capsys.readouterr().err
    for name in ("generation.json", shards[0], shards[1]):
        assert str(log / name) in said
    assert {path.name: path.read_bytes() for path in log.iterdir()} == expected
    assert len(engines) == count
    main(words)
    assert str(log) not in capsys.readouterr().err


def test_a_killed_run_goes_on_to_equal_figures(checkpoint, gsm8k_file, tmp_path, monkeypatch):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    main(arguments(checkpoint, gsm8k_file, whole))
    made = []

    def failing(config, model):
        engine = create_engine(config, model)
        draw = engine.generate

        def generate(prompts, sampling):
            if len(made) == 4:  # in the middle of the sampled shards
                raise KeyboardInterrupt
            made.append(len(prompts))
            return draw(prompts, sampling)

        engine.generate = generate
        return engine

    with monkeypatch.context() as patch:
        patch.setattr(eval.evaluate, "create_engine", failing)
        with pytest.raises(KeyboardInterrupt):
            main(arguments(checkpoint, gsm8k_file, cut))
    (partial,) = (cut / "samples/sft").glob("gsm8k-*")
    assert len(list(partial.glob("samples-*.jsonl"))) == 1
    assert not (cut / "eval-sft").exists()
    before = (partial / "samples-00000.jsonl").stat().st_mtime_ns
    # Gone on with under another K: what was drawn is taken over all the same.
    with monkeypatch.context() as patch:
        patch.setattr(eval.evaluate, "create_engine", failing)
        with pytest.raises(KeyboardInterrupt):
            main(arguments(checkpoint, gsm8k_file, cut, "--k", "1", "2"))
    assert (partial / "samples-00000.jsonl").stat().st_mtime_ns == before
    main(arguments(checkpoint, gsm8k_file, cut))
    assert (cut / "eval-sft/gsm8k/samples-00000.jsonl").stat().st_mtime_ns == before
    assert figures(cut) == figures(whole)
    assert not list(cut.glob("*.partial"))


def test_a_prompt_too_long_counts_and_is_reported(checkpoint, tmp_path, capsys):
    rows = [
        {"question": "What is 1+1?", "answer": 2},
        {"question": "long " * 400, "answer": "3", "id": "far"},
    ]
    file = tmp_path / "mine.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    main(
        [
            "--model",
            str(checkpoint),
            "--suites",
            str(file),
            "--n",
            "2",
            "--max-tokens",
            "4",
            "--out",
            str(tmp_path / "out"),
            "--workers",
            "1",
        ]
    )
    result = figures(tmp_path / "out", suite="mine")["figures"]
    assert result["not_run"]["value"] == 0.5
    assert result["avg@2"]["n"] == 2
    assert "longer than the model's context" in capsys.readouterr().out


def test_what_cannot_be_judged_is_reported_with_its_reason(
    checkpoint, gsm8k_file, tmp_path, capsys
):
    own = tmp_path / "own.py"
    own.write_text(
        "from verifiers.checkers import Checker\n"
        "class Own(Checker):\n    def check(self, gold, text):\n        return undefined\n"
    )
    words = arguments(checkpoint, gsm8k_file, tmp_path / "out", "--limit", "2", "--k", "1,2")
    main([*words, "--checker.kind", str(own)])
    said = capsys.readouterr().out
    assert "100.0 % of the samples could not be judged (counted as not correct)" in said
    assert "; most often: error, NameError: name 'undefined' is not defined" in said
    assert "pass@2" in said  # "1,2" is 1 2


def test_dry_run_draws_nothing(checkpoint, gsm8k_file, tmp_path, capsys):
    main(arguments(checkpoint, gsm8k_file, tmp_path / "out", "--dry-run"))
    assert "gsm8k: 12 questions" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_errors_say_what_to_do(checkpoint, gsm8k_file, tmp_path):
    def fails(match, *words):
        with pytest.raises(UserError, match=match):
            main([*words, "--out", str(tmp_path / "out"), "--dry-run"])

    model = ["--model", str(checkpoint)]
    fails(r"'gsm9k' did you mean 'gsm8k'", *model, "--suites", "gsm9k")
    fails(r"between 1 and n = 2", *model, "--suites", f"gsm8k={gsm8k_file}", "--n", "2", "--k", "4")
    fails(r"no column 'problem'", *model, "--suites", f"math={gsm8k_file}")
    fails(r"no such file", *model, "--suites", "gsm8k=absent.jsonl")
    fails(r"--suites: none", *model)
    fails(r"--checkpoints: without --config", *model, "--suites", "gsm8k", "--checkpoints", "sft")
    fails(r"no such folder", "--model", "./nowhere", "--suites", "gsm8k")
    fails(r"unknown argument '--sooites'", *model, "--sooites", "gsm8k")
    broken = tmp_path / "broken"
    shutil.copytree(checkpoint, broken)
    (broken / "model.safetensors").unlink()
    fails(
        r"incomplete model folder without weights",
        "--model",
        str(broken),
        "--suites",
        f"gsm8k={gsm8k_file}",
    )
    weights = (checkpoint / "model.safetensors").read_bytes()
    for damaged in (weights[:-64], weights[:100], b"", b"no weights at all, but a text"):
        (broken / "model.safetensors").write_bytes(damaged)
        fails(r"cut short or damaged", "--model", str(broken), "--suites", f"gsm8k={gsm8k_file}")
    (broken / "model.safetensors").write_bytes(weights)
    (broken / "model.safetensors.index.json").write_text(
        '{"weight_map": {"a": "model.safetensors", "b": "model-00002.safetensors"}}'
    )
    fails(
        r"1 of the 2 weights files in .* are not there, such as model-00002",
        "--model",
        str(broken),
        "--suites",
        f"gsm8k={gsm8k_file}",
    )
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    fails(r"no rows", *model, "--suites", f"gsm8k={empty}")


def test_engine_options_are_checked_by_the_engine():
    def engine(*words, base=None):
        return engine_config(dotted(list(words), ("engine", "sandbox"))["engine"], base)

    assert engine("--engine.slots", "64").slots == 64
    assert engine().kind == "embedded"
    base = engine("--engine.slots=7")
    assert engine("--engine.refill-share", "0.5", base=base).slots == 7
    with pytest.raises(UserError, match="unknown key"):
        engine("--engine.slotz", "64")
    with pytest.raises(UserError, match="unknown kind 'embeded' did you mean 'embedded'"):
        engine("--engine.kind", "embeded")
    with pytest.raises(UserError, match=r"--engine\.kind without a value"):
        engine("--engine.kind")


def test_greedy_alone(checkpoint, gsm8k_file, tmp_path, capsys):
    out = tmp_path / "out"
    main(
        [
            *arguments(checkpoint, gsm8k_file, out)[:4],
            "--n",
            "0",
            "--max-tokens",
            "12",
            "--workers",
            "1",
            "--out",
            str(out),
        ]
    )
    found = figures(out)
    assert found["figures"]["avg@1"] == found["figures"]["greedy"]
    assert not list((out / "eval-sft/gsm8k").glob("samples-*"))
    write_report(["--run", str(out)])
    page = (out / "report/report.html").read_text("utf-8")
    assert "gsm8k" in page and "12 questions" in page


def test_a_name_belongs_to_one_model(checkpoint, gsm8k_file, tmp_path):
    out = tmp_path / "out"
    main(arguments(checkpoint, gsm8k_file, out, "--n", "0"))
    other = tmp_path / "run" / "sft" / "checkpoint"
    shutil.copytree(checkpoint, other)
    with pytest.raises(UserError, match="holds the evaluation of"):
        main(arguments(other, gsm8k_file, out, "--n", "0"))
    main(arguments(other, gsm8k_file, out, "--n", "0", "--name", "other"))
    # Another profile is another column, not a replacement.
    main(arguments(checkpoint, gsm8k_file, out, "--n", "0", "--profile", "deepseek_math"))
    found = sorted(path.name for path in out.glob("eval-*"))
    assert found == ["eval-other", "eval-sft", "eval-sft-deepseek_math"]
