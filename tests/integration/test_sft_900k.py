"""The shipped mixture of 899,907 rows, from local files in place of the hub, at a thousandth."""

from __future__ import annotations

from pathlib import Path

import pytest
import tomli_w

from data_prep import mixture
from data_prep.config import read_toml
from data_prep.errors import UserError
from data_prep.jsonl import read_json
from data_prep.plugins import plugin_names
from pipeline import train
from pipeline.model import load_tokenizer

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared" / "data"
CONFIG = ROOT / "data_prep" / "configs" / "sft_900k.toml"
SOURCES = [
    ("numina_math_cot", "numina_math_cot_500_hubformat.jsonl"),
    ("openmathinstruct2", "openmathinstruct2_quoted2.jsonl"),
    ("ultrachat", "ultrachat_200k_quoted1_first2turns.jsonl"),
    ("orca_math", "orca_math_quoted1.jsonl"),
    ("metamathqa", "metamathqa_quoted4.jsonl"),
]
# Three have no file here and take another: what is asked is that every entry can be a file.
SUITES = {
    "gsm8k": "gsm8k/test.jsonl",
    "math": "math/test.jsonl",
    "math500": "math500/test.jsonl",
    "mgsm_zh": "mgsm_zh/mgsm_zh.jsonl",
    "mgsm_en": "mgsm_en/mgsm_en_tsv.jsonl",
    "cmath": "cmath/test_deepseek.jsonl",
    "svamp": "svamp/test.jsonl",
    "gsm_hard": "gsm_hard/test.jsonl",
    "olympiadbench": "olympiadbench/test.jsonl",
    "minerva": "gsm_hard/test.jsonl",
    "aime": "math500/test.jsonl",
    "amc": "math500/test.jsonl",
}
SMALL = {"width": 32, "layers": 2, "heads": 2, "kv_heads": 1, "feed_forward": 48, "context": 4096}


def run_file(folder: Path) -> Path:
    """The shipped file with a model that is built here: hub ids cannot be reached in tests."""
    table = read_toml(CONFIG)
    table |= {"out": str(folder / "run"), "model": SMALL}
    table["mixture"]["tokenizer"] = {"vocab_size": 1024}
    path = folder / "run.toml"
    path.write_text(tomli_w.dumps(table))
    return path


def test_the_shipped_mixture_trains_from_local_files(tmp_path):
    if not SHARED.is_dir():
        pytest.skip(f"real data is absent: {SHARED}")
    path = run_file(tmp_path)
    words = ["--config", str(path), "--scale", "0.001"]
    for index, (_, name) in enumerate(SOURCES):
        words += [f"--sources.{index}.source.train", str(SHARED / "sft_samples" / name)]
    other = {
        "cmath": ("validation", "cmath/test_qwen.jsonl"),
        "svamp": ("train", "svamp/SVAMP_original.jsonl"),
    }
    suites = [suite["name"] for suite in read_toml(CONFIG)["mixture"]["suites"]]
    # Every suite of the evaluation but those that have no questions of their own.
    assert set(suites) == set(plugin_names("eval.suites")) - {"embedded", "own", "cmath_dev"}
    for index, name in enumerate(suites):
        words += [f"--suites.{index}.source.test", str(SHARED / SUITES[name])]
        if name in other:
            split, file = other[name]
            words += [f"--suites.{index}.source.{split}", str(SHARED / file)]
    mixture.main(words)
    figures = read_json(tmp_path / "run" / "mixture" / "statistics.json")
    sources = figures["sources"]
    assert [source["asked"] for source in sources.values()] == [260, 228, 203, 110, 99]
    assert [source["rows"] for source in sources.values()] == [260, 2, 1, 1, 4]
    assert all(s["rows"] + s["missing"] == s["asked"] for s in sources.values())
    assert figures["rows"]["validation"] == 9
    train.main(
        [
            "--config",
            str(path),
            "--stage",
            "sft",
            "--batch",
            "4",
            "--steps",
            "3",
            "--precision",
            "float32",
            "--validate-every",
            "3",
            "--micro-tokens",
            "4096",
            "--optimizer.learning-rate",
            "0.003",
            "--optimizer.warmup-steps",
            "1",
        ]
    )
    checkpoint = tmp_path / "run" / "sft" / "checkpoint"
    made = load_tokenizer(tmp_path / "run" / "mixture" / "tokenizer")
    assert load_tokenizer(checkpoint).chat_template == made.chat_template
    assert "validation_loss" in (tmp_path / "run" / "sft" / "steps.jsonl").read_text()


def test_without_hub_and_files_it_says_what_to_give(tmp_path, monkeypatch):
    import datasets

    def load(identity, *rest, **more):
        raise ConnectionError(f"Couldn't reach '{identity}' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(UserError, match=r"AI-MO/NuminaMath-CoT.*Couldn't reach") as caught:
        mixture.main(["--config", str(run_file(tmp_path))])
    assert "local file" in str(caught.value)
    assert not (tmp_path / "run" / "mixture.partial").exists()
