"""Rows in the formats of a mixture's five sources, made up: nothing is downloaded.

Words by Zipf's law, formulas, boxed answers, lengths like the real sources', and some of what real
sources hold too: copies, near-copies, proofs, boxes that contradict their answer, evaluation
questions.
"""

from __future__ import annotations

import bisect
import itertools
import json
import random
from pathlib import Path

# Shares of the mixture of 899,907 rows, and mean words of question and answer that come out near
# 448 tokens a row.
SOURCES = {
    "numina_math_cot": (260_085, 40, 130),
    "openmathinstruct2": (228_408, 35, 105),
    "ultrachat": (202_618, 25, 85),
    "orca_math": (109_618, 35, 75),
    "metamathqa": (99_178, 35, 75),
}
FULL = sum(count for count, _, _ in SOURCES.values())
VALIDATION = 8_785
# Rows made beyond those asked for: what is left out has to come from somewhere.
SPARE = 1.06
PLANTED = 20


class Words:
    """Words by Zipf's law, with numbers and formulas in between."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        parts = [
            "ka",
            "ri",
            "to",
            "men",
            "sal",
            "ver",
            "in",
            "do",
            "el",
            "pra",
            "st",
            "un",
            "qui",
            "lo",
            "ba",
            "ter",
            "ing",
            "ous",
            "ed",
            "ly",
            "tion",
            "al",
            "e",
            "an",
            "co",
        ]
        words = dict.fromkeys(
            "".join(self.rng.choices(parts, k=self.rng.choice((1, 2, 2, 3, 3, 4))))
            for _ in range(40_000)
        )
        self.words = list(words)
        self.weights = list(itertools.accumulate(1 / (rank + 3) for rank in range(len(words))))

    def text(self, mean: int) -> str:
        rng = self.rng
        count = max(6, int(rng.lognormvariate(0, 0.55) * mean * 0.86))
        top = self.weights[-1]
        chosen = [self.words[bisect.bisect(self.weights, rng.random() * top)] for _ in range(count)]
        for place in range(5, count, rng.randint(7, 12)):
            a, b = rng.randint(2, 99), rng.randint(2, 999)
            chosen[place] = rng.choice(
                (
                    f"${a}x + {b} = {a + b}$",
                    str(b),
                    f"\\frac{{{a}}}{{{b}}}",
                    f"{a}+{b}={a + b}",
                )
            )
        for place in range(11, count, 13):
            chosen[place] += rng.choice((".", ",", ".\n", ":"))
        return " ".join(chosen).capitalize()


def row_of(source: str, words: Words, question: str, answer: str) -> dict:
    """One raw row in a source's published format."""
    gold = str(words.rng.randint(1, 9999))
    odd = words.rng.random()
    if source == "numina_math_cot":
        ending = "Which was to be shown." if odd < 0.01 else f"so it is $\\boxed{{{gold}}}$."
        return {
            "source": "cn_k12",
            "problem": question,
            "solution": f"{answer} {ending}",
            "messages": [],
        }
    if source == "openmathinstruct2":
        box = f"{gold}1" if odd < 0.01 else gold
        solution = f"{answer}\n\\[ y = \\boxed{{{box}}} \\]"
        return {
            "problem": question,
            "generated_solution": solution,
            "expected_answer": gold,
            "problem_source": "augmented_math",
        }
    if source == "orca_math":
        return {"question": question, "answer": f"{answer}\nTherefore, the answer is {gold}."}
    if source == "metamathqa":
        return {
            "type": "GSM_Rephrased",
            "query": question,
            "original_question": question[::-1],
            "response": f"{answer}\n#### {gold}\nThe answer is: {gold}",
        }
    turns = [question, answer]
    for _ in range(words.rng.choice((1, 2, 3, 3, 4))):
        turns += [words.text(20), words.text(85)]
    return {
        "prompt": question,
        "prompt_id": f"{words.rng.getrandbits(64):x}",
        "messages": [
            {"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)
        ],
    }


def generate(folder: Path, rows: int) -> dict[str, int]:
    """Write a file a source; return the rows asked of each."""
    asked = {name: round(rows * count / FULL) for name, (count, _, _) in SOURCES.items()}
    asked["metamathqa"] += rows - sum(asked.values())
    folder.mkdir(parents=True, exist_ok=True)
    for number, (name, (_, q, a)) in enumerate(SOURCES.items()):
        path = folder / f"{name}.jsonl"
        if path.is_file():
            continue
        words = Words(number)
        previous = None
        with path.with_suffix(".tmp").open("w", encoding="utf-8") as file:
            for _ in range(int(asked[name] * SPARE) + 50):
                row = row_of(name, words, words.text(q), words.text(a))
                if previous is not None and words.rng.random() < 0.01:
                    row = previous
                file.write(json.dumps(row) + "\n")
                previous = row
        path.with_suffix(".tmp").rename(path)
    return asked


def plant(folder: Path) -> None:
    """Write an evaluation suite of 5,000 questions, `PLANTED` of them rows of the mixture."""
    path = folder / "suite.jsonl"
    if path.is_file():
        return
    words = Words(99)
    with (folder / "metamathqa.jsonl").open(encoding="utf-8") as file:
        questions = [json.loads(line)["query"] for line in itertools.islice(file, PLANTED)]
    questions += [words.text(45) for _ in range(5_000 - PLANTED)]
    with path.with_suffix(".tmp").open("w", encoding="utf-8") as file:
        for question in questions:
            file.write(json.dumps({"question": question, "answer": "So it is 1.\n#### 1"}) + "\n")
    path.with_suffix(".tmp").rename(path)


def configuration(folder: Path, asked: dict[str, int], workers: int) -> dict:
    plant(folder)
    return {
        "profile": "boxed",
        "max_length": 4096,
        "workers": workers,
        "validation_rows": round(sum(asked.values()) * VALIDATION / FULL),
        "tokenizer": {"vocab_size": 16384},
        "sources": [
            {"source": {"kind": name, "train": str(folder / f"{name}.jsonl")}, "count": count}
            for name, count in asked.items()
        ],
        "suites": [
            {"name": "suite", "source": {"kind": "gsm8k", "test": str(folder / "suite.jsonl")}}
        ],
    }
