"""A small checkpoint with random weights, suites, and a run of a simulated model.

The simulated model stands behind the engine contract and answers in two styles of differing
reliability; everything after it (log, verdicts, figures, report) is the real thing.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

import eval.evaluate
from data_prep.errors import UserError
from data_prep.jsonl import write_json
from data_prep.schema import Problem
from data_prep.tokenizer import train_tokenizer
from eval.run import main
from pipeline.engines import Completion, Group, sample_seed
from pipeline.model import ModelConfig, build_model, save_checkpoint
from prompts import load_layout, load_profile


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def real(shared) -> Path:
    """The folder of real data; skips where it is absent."""
    return shared / "data"


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    """A complete model folder; its random weights answer nothing."""
    folder = tmp_path_factory.mktemp("run") / "sft" / "checkpoint"
    profile = load_profile("embedded")
    layout = load_layout(profile.layout)
    texts = ["What is 1+2?", "1+2=3 \\boxed{3}", profile.system] * 20
    tokenizer = train_tokenizer(texts, 300, layout, profile.system)
    model = build_model(
        ModelConfig(width=32, layers=2, heads=2, kv_heads=2, feed_forward=64, context=160),
        tokenizer,
        seed=0,
    )
    ends = [tokenizer.convert_tokens_to_ids(layout.end)]
    save_checkpoint(folder, model, tokenizer, ends, "embedded")
    return folder


@pytest.fixture
def gsm8k_file(tmp_path) -> Path:
    """Twelve rows in GSM8K's published format."""
    rows = [
        {"question": f"What is {i} + {i}?", "answer": f"It is <<{i}+{i}={2 * i}>>.\n#### {2 * i}"}
        for i in range(12)
    ]
    return write_jsonl(tmp_path / "gsm8k_test.jsonl", rows)


# checkpoint → (share of worked answers, how often those are right, how often bare ones are)
SKILLS = {
    "sft": (0.5, 0.88, 0.12),
    "rft": (0.72, 0.88, 0.14),
    "dpo": (0.8, 0.88, 0.13),
    "grpo": (0.99, 0.93, 0.15),
}


class SimulatedEngine:
    """Answers `What is a + b?` with a checkpoint's shares of styles and errors."""

    policy_version = 0

    def __init__(
        self, checkpoint: str, answers: dict[str, tuple[int, int]], evil: str = ""
    ) -> None:
        self.worked, self.right, self.bare_right = SKILLS[checkpoint]
        self.answers, self.evil = answers, evil

    def generate(self, prompts, sampling):
        return [
            Group(prompt, [self._one(prompt.id, index, sampling) for index in range(sampling.n)])
            for prompt in prompts
        ]

    def _one(self, problem_id, index, sampling):
        a, b = self.answers[problem_id]
        seed = sample_seed(sampling.seed, 0, problem_id, index)
        rng = random.Random(seed)
        hard = 0.75 + 0.25 * ((a * 31 + b * 17) % 97) / 97
        is_worked = rng.random() < self.worked if sampling.temperature else self.worked > 0.6
        is_right = rng.random() < (self.right if is_worked else self.bare_right) ** (2 - hard)
        result = a + b if is_right else a + b + rng.choice([-10, -1, 1, 2])
        answer = f"{result}{self.evil if seed % 3 == 0 else ''}"
        text = f"{a} + {b} = {result}\n\\boxed{{{answer}}}" if is_worked else f"\\boxed{{{answer}}}"
        text = f"{self.evil}{text}" if is_worked else text
        reason = "stop"
        if rng.random() < 0.01:
            text, reason = text[: len(text) // 2], "length"
        return Completion([1] * len(text), [-0.1] * len(text), text, reason, seed)

    def load_weights(self, weights, version):
        raise UserError("simulated engine", "no weights")

    def close(self):
        pass


def simulate_run(folder: Path, checkpoint: Path, problems: int, n: int = 8, evil: str = "") -> Path:
    """Build a run folder with every part a report reads; return it.

    `evil` is put into every text: names, questions, ids, samples, answers, statistics.
    """
    answers = {f"{evil}sum-{i}": (i % 89, i * 7 % 83) for i in range(problems)}
    rows = [
        Problem(
            id=key,
            question=f"What is {a} + {b}?{evil}",
            answer=str(a + b),
            source="sums",
            split="test",
            level=f"{evil}{1 + (a + b) // 70}",
            subject=f"{evil}with carry" if a % 10 + b % 10 > 9 else "plain",
        ).to_row()
        for key, (a, b) in answers.items()
    ]
    # What a hostile sample or question could try on the page.
    rows[0]["question"] += " </script><script>document.title='taken'</script><b>&amp;"
    (folder / "data").mkdir(parents=True)
    write_jsonl(folder / "data" / "test.jsonl", rows)
    levels = {"levels": {"1": problems // 2, "2": problems - problems // 2}, "subjects": {}}
    write_json(
        folder / "data" / "statistics.json",
        {
            "problems": {f"sums{evil}": {f"test{evil}": {"problems": problems, **levels}}},
            f"more{evil}": [evil, {evil: evil}],
            "sft_train": {"rows": 49152, "by_style": {"bare": 9869, "worked": 39283}},
        },
    )
    stages = "".join(
        f'[[train]]\nname = "{name}"\ninit = "{"model" if name == "sft" else "sft"}"\n'
        f'method = {{ kind = "{name}" }}\nsteps = 60\n\n'
        for name in SKILLS
    )
    (folder / "config.toml").write_text(
        f"name = {json.dumps('simulated' + evil)}\nseed = 7\n"
        f"out = {json.dumps(str(folder))}\n\n[data]\n"
        f'[[data.sources]]\nkind = "embedded"\n\n[model]\n\n{stages}'
        f'[evaluate]\nsuites = ["embedded"]\nn = {n}\n'
        f"k = {[k for k in (1, 2, 4, 8, 16, 32, 64) if k <= n]}\n",
        encoding="utf-8",
    )
    for name in SKILLS:
        (folder / name / "checkpoint").mkdir(parents=True)
        for path in checkpoint.iterdir():
            (folder / name / "checkpoint" / path.name).write_bytes(path.read_bytes())
        curve = random.Random(name)
        write_jsonl(
            folder / name / "steps.jsonl",
            [
                {
                    "step": i,
                    "loss": 3 / (1 + i / 8) + curve.random() / 9,
                    "objective": curve.random(),
                    "accuracy": 0.4 + 0.5 * i / 60 + curve.random() / 12,
                    "grad_norm": curve.random(),
                    "learning_rate": 1e-3 * (1 - i / 60),
                }
                for i in range(60)
            ],
        )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            eval.evaluate,
            "create_engine",
            lambda config, model: SimulatedEngine(Path(model).parent.name, answers, evil),
        )
        main(["--config", str(folder / "config.toml")])
    return folder


@pytest.fixture(scope="session")
def simulated_run(tmp_path_factory, checkpoint) -> Path:
    """A run of 240 questions × 8 samples with four evaluated checkpoints."""
    return simulate_run(tmp_path_factory.mktemp("simulated") / "run", checkpoint, 240)
