"""Tool-integrated reasoning: programs run between rounds, state lives within a conversation."""

from __future__ import annotations

import re

import pytest

import eval.evaluate
from data_prep.errors import UserError
from data_prep.jsonl import read_json
from eval.run import main
from eval.sandbox import SandboxConfig, Session
from eval.tools import MARK, ToolEngine
from eval.transcripts import OUTPUT, answer_text
from pipeline.engines import Completion, Group, Prompt, Sampling
from pipeline.model import load_tokenizer


class Characters:
    """A tokenizer of one token a character."""

    def encode(self, text, add_special_tokens=False):
        return [ord(c) for c in text]

    def decode(self, ids, skip_special_tokens=True):
        return "".join(map(chr, ids))


class Script:
    """An engine that says prepared parts, one a turn, by what its context already holds."""

    policy_version = 0

    def __init__(self, *parts):
        self.parts, self.asked = parts, []

    def generate(self, prompts, sampling):
        groups = []
        for prompt in prompts:
            context = "".join(map(chr, prompt.token_ids))
            self.asked.append((prompt.id, context))
            text = self.parts[min(len(OUTPUT.findall(context)), len(self.parts) - 1)]
            text = text.replace("SAMPLE", prompt.id.split("\x1f")[1])[: sampling.max_tokens]
            ids = [ord(c) for c in text]
            groups.append(Group(prompt, [Completion(ids, [-1.0] * len(ids), text, "stop", 7)]))
        return groups

    def load_weights(self, weights, version):
        raise AssertionError

    def close(self):
        pass


@pytest.fixture(autouse=True)
def sandbox():
    try:
        Session().close()
    except UserError as error:
        pytest.skip(str(error))
    return SandboxConfig.model_validate({"wall_s": 2.0})


def program(code):
    return f"```python\n{code}\n```\n{MARK}"


def generate(engine, sandbox, rounds, *, n=2, max_tokens=2000):
    tools = ToolEngine(engine, Characters(), rounds, sandbox, workers=2)
    prompts = [Prompt("p", tuple(map(ord, "Q: ")))]
    sampling = Sampling.model_validate({"n": n, "max_tokens": max_tokens})
    (group,) = tools.generate(prompts, sampling)
    tools.close()
    return group


def test_two_programs_share_their_state_and_samples_do_not(sandbox):
    engine = Script(program("x = SAMPLE + 40\nprint(x)"), program("print(x * 2)"), "So \\boxed{1}.")
    group = generate(engine, sandbox, rounds=4)
    for index, completion in enumerate(group.completions):
        assert OUTPUT.findall(completion.text) == [f"{index + 40}\n", f"{(index + 40) * 2}\n"]
        assert completion.finish_reason == "stop"
        assert completion.text.endswith("So \\boxed{1}.")
        assert "".join(map(chr, completion.token_ids)) == completion.text
        assert len(completion.logprobs) == len(completion.token_ids)
        assert 0.0 in completion.logprobs and -1.0 in completion.logprobs
        assert answer_text(completion.text).strip().endswith("\\boxed{1}.")
    # What a program printed was in the context of the next turn.
    assert any("```output\n41\n```" in context for _, context in engine.asked)


def test_rounds_are_limited(sandbox):
    engine = Script(program("print(1)"), program("print(2)"), program("print(3)"))
    group = generate(engine, sandbox, rounds=2, n=1)
    assert OUTPUT.findall(group.completions[0].text) == ["1\n", "2\n"]
    assert group.completions[0].finish_reason == "length"


def test_a_program_that_never_ends_is_told_so(sandbox):
    engine = Script(program("while True: pass"), "I give up.")
    completion = generate(engine, sandbox, rounds=1, n=1).completions[0]
    assert "TimeoutError: the program ran longer than 2 s" in completion.text
    assert completion.text.endswith("I give up.")


def test_the_token_budget_holds_for_output_too(sandbox):
    engine = Script(program("print('x' * 500)"), "\\boxed{1}")
    completion = generate(engine, sandbox, rounds=3, n=1, max_tokens=120).completions[0]
    assert len(completion.token_ids) == 120
    assert completion.finish_reason == "length"


def test_a_given_up_interpreter_is_built_anew(sandbox, monkeypatch):
    monkeypatch.setattr("eval.tools.ALIVE", 2)
    engine = Script(program("x = SAMPLE"), program("print(x + 100)"), "done")
    group = generate(engine, sandbox, rounds=3, n=5)
    found = [OUTPUT.findall(completion.text)[1] for completion in group.completions]
    assert found == [f"{index + 100}\n" for index in range(5)]


def test_an_evaluation_with_tools_grades_what_programs_print(
    checkpoint, gsm8k_file, tmp_path, monkeypatch
):
    class Programmer:
        """Writes a program for `What is a + a?`, and says its result in words."""

        policy_version = 0

        def generate(self, prompts, sampling):
            groups = []
            for prompt in prompts:
                text = tokenizer.decode(prompt.token_ids)
                number = re.search(r"What is (\d+) \+", text).group(1)
                says = (
                    f"That is it, for {number} items."
                    if "```output" in text
                    else program(f"print({number} * 2)")
                )
                ids = tokenizer.encode(says, add_special_tokens=False)
                groups.append(Group(prompt, [Completion(ids, [-1.0] * len(ids), says, "stop", 1)]))
            return groups

        def close(self):
            pass

    tokenizer = load_tokenizer(checkpoint)
    monkeypatch.setattr(eval.evaluate, "create_engine", lambda config, model: Programmer())
    main(
        [
            "--model",
            str(checkpoint),
            "--suites",
            f"gsm8k={gsm8k_file}",
            "--n",
            "2",
            "--tool-rounds",
            "2",
            "--sandbox.wall-s",
            "3",
            "--max-tokens",
            "400",
            "--workers",
            "1",
            "--out",
            str(tmp_path),
        ]
    )
    figures = read_json(tmp_path / "eval-sft/gsm8k/figures.json")["figures"]
    assert figures["greedy"]["value"] == figures["maj@2"]["value"] == 1.0
    plan = read_json(tmp_path / "eval-sft/gsm8k/generation.json")
    assert plan["tool_rounds"] == 2 and plan["sandbox"]["wall_s"] == 3.0
    with pytest.raises(UserError, match="unknown key did you mean 'wall_s'"):
        main(
            [
                "--model",
                str(checkpoint),
                "--suites",
                f"gsm8k={gsm8k_file}",
                "--tool-rounds",
                "1",
                "--sandbox.wal-s",
                "3",
                "--out",
                str(tmp_path),
            ]
        )
