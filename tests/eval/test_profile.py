"""Profiles: what is sent in each language, exemplars, and checks before sampling."""

from __future__ import annotations

from dataclasses import replace

import pytest

from data_prep.errors import UserError
from data_prep.schema import Problem
from eval.profile import FOLDER, load_evaluation_profile, load_shots
from eval.prompting import preflight
from eval.run import main
from pipeline.engines import Prompt
from verifiers import load_checker

PROBLEM = Problem("1", "1+1是多少？", "2", "own", "test", solutions={"reference": "It is\n\n2."})
NAMES = sorted(path.stem for path in FOLDER.glob("*.toml"))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("tools", [False, True])
def test_every_profile_asks_the_question(name, language, tools):
    profile, path = load_evaluation_profile(name)
    shots = [] if tools else load_shots(profile, path, language, tools, [PROBLEM])
    messages = profile.messages(PROBLEM, language, shots, tools)
    assert PROBLEM.question in messages[-1]["content"]
    assert messages[-1]["role"] == "user"
    assert "{question}" not in str(messages)
    assert len(shots) == 2 * profile.shots * (not tools)


def test_deepseek_math_speaks_the_suite_s_language():
    profile, _ = load_evaluation_profile("deepseek_math")
    chinese = profile.messages(PROBLEM, "zh", [], tools=False)
    assert chinese == [
        {
            "role": "user",
            "content": "1+1是多少？\n请通过逐步推理来解答问题，并把最终答案放置于\\boxed{}中。",
        }
    ]
    tools = profile.messages(PROBLEM, "en", [], tools=True)[0]["content"]
    assert "integrate natural language reasoning with programs" in tools


@pytest.mark.parametrize("name", NAMES)
def test_every_profile_s_checkers_exist(name):
    profile, _ = load_evaluation_profile(name)
    for checker in (profile.checker, *profile.checkers.values()):
        options = {key: value for key, value in checker.items() if key != "kind"}
        checked = load_checker(checker["kind"], options)
        assert checked.check("4", "The answer is $\\boxed{4}$.").is_correct
    assert len(load_evaluation_profile("deepseek_math")[0].checkers) == 1


def test_exemplars_of_the_suite_itself_are_refused(tmp_path):
    profile, path = load_evaluation_profile("few_shot")
    shots = load_shots(profile, path, "en", False, [])
    leaked = Problem("1", shots[0]["content"], "3", "own", "test")
    with pytest.raises(UserError, match="is a question of the suite"):
        load_shots(profile, path, "en", False, [leaked])
    with pytest.raises(UserError, match="0 exemplars in language 'fr'"):
        load_shots(profile, path, "fr", False, [])


def test_exemplars_from_a_training_split(gsm8k_file):
    profile, path = load_evaluation_profile("few_shot")
    drawn = profile.model_copy(update={"exemplars": f"gsm8k:{gsm8k_file}", "shots": 2})
    shots = load_shots(drawn, path, "en", False, [])
    assert [turn["role"] for turn in shots] == ["user", "assistant"] * 2
    assert shots[2]["content"] == "What is 1 + 1?"
    assert shots[3]["content"].endswith("\\boxed{2}")


def test_a_profile_of_ones_own_and_its_errors(tmp_path, checkpoint, gsm8k_file, capsys):
    own = tmp_path / "mine.toml"
    own.write_text(
        'description = "x"\nchecker = { kind = "boxed" }\n[checkers]\n[question]\n'
        'en = "Q {question}"\n[tool_question]\nen = "{question}"\n'
    )
    main(
        [
            "--model",
            str(checkpoint),
            "--suites",
            f"gsm8k={gsm8k_file}",
            "--profile",
            str(own),
            "--dry-run",
        ]
    )
    assert "What is 0 + 0?" in capsys.readouterr().out
    own.write_text(own.read_text().replace("{question}", "question"))
    with pytest.raises(UserError, match=r"a text with \{question\} in it"):
        load_evaluation_profile(str(own))
    own.write_text("descripton = 'x'\n")
    with pytest.raises(UserError, match=r"mine\.toml, key"):
        load_evaluation_profile(str(own))
    with pytest.raises(UserError, match="did you mean 'qwen_math'"):
        load_evaluation_profile("qwen_maths")


class Tokens:
    bos_token_id = 1

    def decode(self, ids):
        return " ".join(map(str, ids))

    def get_added_vocab(self):
        return {"<|end|>": 2}


def test_preflight_refuses_two_bos_and_reports_collisions():
    good = [Prompt("a", (1, 5, 6))]
    lines = preflight(good, Tokens(), ["\n\n"], [PROBLEM])
    assert "BOS (id 1) a prompt: 1" in lines
    assert any("stands in 1 reference solutions" in line for line in lines)
    with pytest.raises(UserError, match="has two BOS tokens side by side"):
        preflight([*good, Prompt("b", (1, 1, 5))], Tokens(), [], [PROBLEM])
    with pytest.raises(UserError, match="prompt of b: has two BOS tokens side by side"):
        preflight([*good, Prompt("b", (7, 1, 1))], Tokens(), [], [PROBLEM])
    posing = replace(PROBLEM, question="What does <|end|> mean?")
    assert any(
        "'<|end|>' stands as text in 1 questions" in line
        for line in preflight(good, Tokens(), [], [posing])
    )
    assert not any("stands as text" in line for line in lines)
