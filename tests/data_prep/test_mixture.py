import hashlib
import importlib.util
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tomli_w

from data_prep import chunk, mixture, shards
from data_prep.cluster import ClusterConfig
from data_prep.config import read_toml, validate
from data_prep.errors import UserError
from data_prep.formatting import load_formatter
from data_prep.jsonl import read_json
from data_prep.loader import Sequences
from data_prep.manifest import VOLATILE
from data_prep.mixture import build_mixture
from data_prep.mixture_config import MixtureConfig
from data_prep.mixture_figures import _histogram
from data_prep.tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parents[2]
NAMES = ["Mia", "Tom", "Ana", "Leo", "Zoe", "Ben", "Kim", "Sam"]
THINGS = ["pens", "books", "coins", "cards", "shells", "stamps", "apples", "marbles"]
PLACES = ["at the fair", "in the garden", "near the lake", "on the train", "after school"]


def story(rng):
    a, b = rng.randint(2, 900), rng.randint(2, 900)
    question = (
        f"{rng.choice(NAMES)} has {a} {rng.choice(THINGS)} {rng.choice(PLACES)} and gets {b} more "
        f"from {rng.choice(NAMES)}. How many now?"
    )
    return question, f"First there are {a}, then {b} come. So {a}+{b}={a + b}.", a + b


def raw_files(folder, rows=60):
    """Files of three sources: distinct rows, then what has to be left out."""
    rng = random.Random(3)
    numina, meta, chats = [], [], []
    for _ in range(rows):
        question, work, gold = story(rng)
        numina.append(
            {
                "source": "cn_k12",
                "problem": question,
                "messages": [],
                "solution": f"{work} It is $\\boxed{{{gold}}}$.",
            }
        )
        question, work, gold = story(rng)
        for rewrite in range(3):
            meta.append(
                {
                    "type": "GSM_Rephrased",
                    "original_question": question,
                    "query": f"{question} Say it in way {rewrite}{rewrite}.",
                    "response": f"{work} Way {rewrite}.\n#### {gold}\nThe answer is: {gold}",
                }
            )
        turns = [story(rng)[0], story(rng)[1], "And then?", story(rng)[1]]
        chats.append(
            {
                "prompt": "",
                "prompt_id": "x",
                "messages": [
                    {"role": ("user", "assistant")[i % 2], "content": text}
                    for i, text in enumerate(turns)
                ],
            }
        )
    numina += [
        {**numina[0], "problem": numina[0]["problem"].upper()},  # the same but for its dress
        {**numina[1], "solution": "As was to be shown."},
    ]
    meta.append({**meta[0], "response": f"\\boxed{{1}}\n{meta[0]['response']}"})
    chats.append(
        {
            "prompt": "",
            "prompt_id": "x",
            "messages": [
                {"role": "user", "content": "Talk a lot."},
                {"role": "assistant", "content": "Well."},
                {"role": "user", "content": "More."},
                {"role": "assistant", "content": "and on and on " * 150},
            ],
        }
    )
    paths = {}
    for name, table in (("numina_math_cot", numina), ("metamathqa", meta), ("ultrachat", chats)):
        paths[name] = folder / f"{name}.jsonl"
        paths[name].write_text("".join(json.dumps(row) + "\n" for row in table))
    return paths


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return raw_files(tmp_path_factory.mktemp("raw"))


def table(files, **changes):
    return {
        "max_length": 256,
        "validation_rows": 20,
        "chunk_rows": 32,
        "shard_sequences": 16,
        "workers": 1,
        "tokenizer": {"vocab_size": 400},
        "sources": [
            {
                "source": {"kind": "numina_math_cot", "train": str(files["numina_math_cot"])},
                "count": 50,
            },
            {"source": {"kind": "metamathqa", "train": str(files["metamathqa"])}, "count": 120},
            {"source": {"kind": "ultrachat", "train": str(files["ultrachat"])}, "count": 70},
        ],
        **changes,
    }


def build(files, run, seed=1, **changes):
    return build_mixture(validate(MixtureConfig, table(files, **changes), "test"), run, seed)


def digest(folder):
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in VOLATILE
    }


@pytest.fixture(scope="module")
def built(files, tmp_path_factory):
    return build(files, tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def figures(built):
    return read_json(built / "statistics.json")


def test_counts_are_exact_or_what_is_missing_is_said(figures):
    rows = {name: source["rows"] for name, source in figures["sources"].items()}
    assert rows == {"numina_math_cot": 50, "metamathqa": 120, "ultrachat": 60}
    missing = {name: source["missing"] for name, source in figures["sources"].items()}
    assert missing == {"numina_math_cot": 0, "metamathqa": 0, "ultrachat": 10}
    assert figures["sources"]["ultrachat"]["left_out"] == {"too_long": 1}
    assert figures["rows"] == {"train": 210, "validation": 20}


def test_what_is_left_out_is_counted_by_reason(figures):
    assert figures["sources"]["numina_math_cot"]["left_out"] == {
        "exact duplicate": 1,
        "proof_without_answer": 1,
    }
    assert figures["sources"]["metamathqa"]["left_out"] == {"answer_contradicts_box": 1}
    assert figures["duplicates"] == {"exact, numina_math_cot, also in numina_math_cot": 1}
    for source in figures["sources"].values():
        assert source["raw"] == source["available"] + sum(source["left_out"].values())


def test_the_missing_are_printed(files, tmp_path, capsys):
    build(files, tmp_path)
    printed = capsys.readouterr().err
    assert "10 of 70 are missing: 61 raw rows, 1 too_long" in printed
    assert "rows/s" in printed
    assert "tokens/s" in printed


def documents(stage, split):
    """Every document's (ids, mask, sequence) of a split."""
    data = Sequences(stage, split)
    for number in range(len(data)):
        for ids, mask in data[number]:
            yield ids.tolist(), mask.tolist(), number


def test_every_document_is_what_the_formatter_makes_of_a_row(built, files):
    formatter = load_formatter(load_tokenizer(str(built / "tokenizer")), "boxed")
    rows = [json.loads(line) for line in files["ultrachat"].read_text().splitlines()]
    chats = {tuple(formatter.conversation(row["messages"])[0]): row for row in rows}
    seen = 0
    for split in ("train", "validation"):
        for ids, mask, _ in documents(built, split):
            if tuple(ids) in chats:
                seen += 1
                expected = formatter.conversation(chats[tuple(ids)]["messages"])
                assert (ids, mask) == expected
                assert sum(mask[i] > mask[i - 1] for i in range(1, len(mask))) == 2  # two turns
            else:
                text = formatter.tokenizer.decode([t for t, m in zip(ids, mask, strict=True) if m])
                assert "\\boxed{" in text
                assert text.endswith("<|end|><|eos|>")
    assert seen == 60


def test_sequences_hold_whole_documents_within_the_length(built, figures):
    data = Sequences(built, "train")
    assert len(data) == figures["packing"]["train"]["sequences"]
    assert data.lengths.max() <= 256
    bos = load_tokenizer(str(built / "tokenizer")).bos_token_id
    found = list(documents(built, "train"))
    assert len(found) == 210
    assert all(ids[0] == bos and ids.count(bos) == 1 for ids, _, _ in found)
    assert sum(len(ids) for ids, _, _ in found) == figures["tokens"]["train"]


def test_rewrites_of_a_problem_stay_on_one_side(built, files):
    tokenizer = load_tokenizer(str(built / "tokenizer"))
    sides = {}
    for split in ("train", "validation"):
        for ids, _, _ in documents(built, split):
            text = tokenizer.decode(ids)
            if "Say it in way" in text:
                question = text.split("<|user|>")[1].split(" Say it")[0]
                sides.setdefault(question, set()).add(split)
    assert {len(side) for side in sides.values()} == {1}
    assert {"train"} in sides.values()
    assert {"validation"} in sides.values()


def test_weights_are_shown_beside_the_implied_ones(figures):
    sources = figures["sources"]
    assert sum(source["weight"] for source in sources.values()) == pytest.approx(1, abs=1e-5)
    assert sources["metamathqa"]["weight"] == pytest.approx(120 / 230, abs=1e-6)
    assert sources["metamathqa"]["implied_weight"] == pytest.approx(180 / 300, abs=1e-6)


def test_weights_share_out_the_rows(files, tmp_path):
    sources = table(files)["sources"]
    for source, weight in zip(sources, (1, 2, 1), strict=True):
        del source["count"]
        source["weight"] = weight
    stage = build(files, tmp_path, sources=sources, rows=101)
    rows = [s["rows"] for s in read_json(stage / "statistics.json")["sources"].values()]
    assert rows == [25, 51, 25]


def test_a_trial_scales_every_number_of_the_shipped_mixture():
    shipped = read_toml(ROOT / "data_prep" / "configs" / "sft_900k.toml")["mixture"]
    whole = validate(MixtureConfig, shipped, "test")
    assert whole.asked() == [260085, 228408, 202618, 109618, 99178]
    assert sum(whole.asked()) == 899907
    trial = whole.model_copy(update={"scale": 0.001})
    assert trial.asked() == [260, 228, 203, 110, 99]
    assert trial.scaled(whole.validation_rows) == 9
    assert (trial.scaled(1), trial.scaled(0)) == (1, 0)


def test_a_pool_considers_about_as_many_rows(files, tmp_path):
    sources = table(files)["sources"]
    sources[1] = {**sources[1], "count": 0, "pool": 90}
    stage = build(files, tmp_path, sources=sources)
    source = read_json(stage / "statistics.json")["sources"]["metamathqa"]
    assert 60 < source["rows"] < 120
    assert source["left_out"]["not_in_pool"] == 181 - source["available"] - (
        source["left_out"].get("answer_contradicts_box", 0)
    )


def test_long_conversations_can_be_shortened_by_turns(files, tmp_path):
    stage = build(files, tmp_path, on_too_long="shorten")
    source = read_json(stage / "statistics.json")["sources"]["ultrachat"]
    assert source["rows"] == 61
    assert source["left_out"] == {"shortened (kept)": 1}
    tokenizer = load_tokenizer(str(stage / "tokenizer"))
    texts = [
        tokenizer.decode(ids)
        for split in ("train", "validation")
        for ids, _, _ in documents(stage, split)
    ]
    (short,) = [text for text in texts if "Talk a lot." in text]
    assert short.endswith("<|assistant|>Well.<|end|><|eos|>")


def test_a_suites_question_without_a_gold_is_one_all_the_same(files, tmp_path):
    rows = [json.loads(line) for line in files["numina_math_cot"].read_text().splitlines()]
    suite = tmp_path / "suite.jsonl"
    suite.write_text(json.dumps({"question": rows[3]["problem"], "answer": "unknown"}) + "\n")
    suites = [{"name": "mine", "source": {"kind": "gsm8k", "test": str(suite)}}]
    stage = build(files, tmp_path / "run", suites=suites)
    assert read_json(stage / "statistics.json")["findings"]["counts"]["leaked, mine"] == 1


@pytest.mark.parametrize(
    ("kind", "text", "match"),
    [
        ("gsm8k", "{broken\n", "line 1: not JSON"),
        ("questions", '{"answer": "1"}\n', "line 1"),
        (
            "ultrachat",
            json.dumps(
                {
                    "prompt": "p",
                    "prompt_id": "1",
                    "messages": [
                        {"role": "user", "content": "a"},
                        {"role": "assistant", "content": "b"},
                    ],
                }
            )
            + "\n",
            "it gives Chat rows",
        ),
    ],
)
def test_a_broken_suite_ends_the_build(files, tmp_path, kind, text, match):
    path = tmp_path / "suite.jsonl"
    path.write_text(text)
    suites = [{"name": "mine", "source": {"kind": kind, "test": str(path)}}]
    with pytest.raises(UserError, match=match):
        build(files, tmp_path / "run", suites=suites)


def test_evaluation_questions_are_left_out(files, tmp_path):
    rows = [json.loads(line) for line in files["numina_math_cot"].read_text().splitlines()]
    exact, flagged = rows[3]["problem"], rows[4]["problem"].replace("How many now?", "How much?")
    suite = tmp_path / "suite.jsonl"
    suite.write_text(
        "".join(
            json.dumps({"question": text, "answer": "#### 1"}) + "\n" for text in (exact, flagged)
        )
    )
    suites = [{"name": "mine", "source": {"kind": "gsm8k", "test": str(suite)}}]
    stage = build(files, tmp_path / "run", suites=suites)
    found = read_json(stage / "statistics.json")["findings"]
    assert found["counts"]["leaked, mine"] == 1
    assert found["examples"]["leaked"][0]["where"].endswith("numina_math_cot.jsonl, line 4")
    tokenizer = load_tokenizer(str(stage / "tokenizer"))
    for split in ("train", "validation"):
        for ids, _, _ in documents(stage, split):
            assert exact not in tokenizer.decode(ids)


def test_two_builds_are_byte_identical_whatever_the_workers(built, files, tmp_path):
    assert digest(build(files, tmp_path, workers=2)) == digest(built)
    assert digest(build(files, tmp_path / "b", seed=2)) != digest(built)


# MetaMathQA's rows; the first worker that meets a certain one dies.
DEADLY = """
import os, signal
from pathlib import Path
from data_prep.sources import metamathqa
from data_prep.sources.metamathqa import HUB, SPLITS, Config

def convert(row, place):
    works = os.getpid() != {pid}
    if works and "in way 22" in row["query"] and not Path("{mark}").exists():
        Path("{mark}").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return metamathqa.convert(row, place)
"""


@pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="ray is not installed (pip install -e '.[ray]')"
)
def test_a_cluster_builds_the_same_bytes_with_a_worker_killed(files, tmp_path, recwarn):
    """Conversion, tokenising and decontamination, and the shards; Ray leaves sockets open."""
    mark, source = tmp_path / "died", tmp_path / "deadly.py"
    source.write_text(DEADLY.format(mark=mark, pid=os.getpid()))
    suite = tmp_path / "suite.jsonl"
    row = json.loads(files["numina_math_cot"].read_text().splitlines()[3])
    suite.write_text(json.dumps({"question": row["problem"], "answer": "#### 1"}) + "\n")
    suites = [{"name": "mine", "source": {"kind": "gsm8k", "test": str(suite)}}]
    changes = table(files, suites=suites)
    changes["sources"][1]["source"]["kind"] = str(source)
    config = validate(MixtureConfig, changes, "test")
    found = build_mixture(config, tmp_path / "ray", 1, ClusterConfig(workers=2))
    assert mark.is_file()
    expected = build_mixture(config, tmp_path / "one", 1)
    assert digest(found) == digest(expected)
    assert len(list(found.glob("train-*.arrow"))) > 2
    counts = read_json(found / "statistics.json")["findings"]["counts"]
    assert counts["leaked, mine"] == 1


@pytest.mark.parametrize("place", ["convert", "write"])
def test_an_interrupted_build_goes_on_and_ends_the_same(built, files, tmp_path, monkeypatch, place):
    done = []
    inner = chunk.Converter.run if place == "convert" else shards.write_shard

    def stops(*arguments):
        if len(done) == 2:
            raise KeyboardInterrupt
        inner(*arguments)
        done.append(arguments)

    owner, name = (chunk.Converter, "run") if place == "convert" else (shards, "write_shard")
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, stops)
        with pytest.raises(KeyboardInterrupt):
            build(files, tmp_path)
    assert (tmp_path / "mixture.partial").is_dir()
    kept = {
        path: path.stat().st_mtime_ns for path in (tmp_path / "mixture.partial").rglob("*.arrow")
    }
    assert kept
    finished = []
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, lambda *a: (finished.append(a), inner(*a)))
        stage = build(files, tmp_path)
    assert digest(stage) == digest(built)
    total = len(finished) + 2
    assert total == (10 if place == "convert" else len(list(built.glob("*.arrow"))))


def test_a_killed_build_goes_on_and_ends_byte_identical(built, files, tmp_path):
    config = tmp_path / "run.toml"
    config.write_text(
        tomli_w.dumps(
            {
                "seed": 1,
                "out": str(tmp_path / "run"),
                "mixture": table(files, chunk_rows=32, workers=2),
            }
        )
    )
    command = [sys.executable, "-m", "data_prep.mixture", "--config", str(config)]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    chunks = tmp_path / "run" / "mixture.partial" / "chunks"
    deadline = time.monotonic() + 60
    while len(list(chunks.glob("*.json"))) < 3 and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(tmp_path / "run" / "mixture")
    assert digest(tmp_path / "run" / "mixture") == digest(built)


def test_a_complete_stage_is_kept(built, files, capsys):
    assert build(files, built.parent) == built
    assert "kept as it is" in capsys.readouterr().err


@pytest.mark.parametrize("workers", [1, 2])
def test_a_bad_row_ends_the_build_from_any_worker_and_leaves_nothing(files, tmp_path, workers):
    path = tmp_path / "bad.jsonl"
    lines = files["numina_math_cot"].read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:40], b"{broken\n", *lines[40:]]))
    sources = [{"source": {"kind": "numina_math_cot", "train": str(path)}}]
    with pytest.raises(UserError, match=r"bad.jsonl, line 41: not JSON"):
        build(files, tmp_path / "run", sources=sources, workers=workers)
    assert not (tmp_path / "run" / "mixture.partial").exists()
    stage = build(files, tmp_path / "run", sources=sources, workers=workers, on_bad_row="skip")
    figures = read_json(stage / "statistics.json")
    assert figures["sources"]["numina_math_cot"]["left_out"]["bad_row"] == 1
    assert figures["findings"]["examples"]["bad_row"][0]["where"].endswith("line 41")
    assert figures["sources"]["numina_math_cot"]["rows"] == 60


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sources": []}, "sources"),
        ({"rows": 10}, "goes with weights"),
        ({"sources": [{"source": {"kind": "embedded"}}]}, "reads no files"),
        ({"sources": [{"source": {"kind": "gsm8k", "train": "absent.jsonl"}}]}, "absent.jsonl"),
        ({"profile": "bxed"}, "did you mean 'boxed'"),
        ({"tokenizer": {"layout": "chatlm"}}, "did you mean 'chatml'"),
        ({"on_too_long": "cut"}, "on_too_long"),
    ],
)
def test_a_broken_configuration_is_named_and_leaves_nothing(files, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        build(files, tmp_path, **changes)
    assert not (tmp_path / "mixture.partial").exists()
    assert not (tmp_path / "mixture").exists()


def test_rows_that_do_not_train_are_refused(tmp_path, files):
    path = tmp_path / "pairs.jsonl"
    path.write_text(
        json.dumps(
            {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"}
        )
        + "\n"
    )
    sources = [{"source": {"kind": "hh_rlhf", "train": str(path)}}]
    with pytest.raises(UserError, match="a Preference row without a solution"):
        build(files, tmp_path / "run", sources=sources)


def test_the_report_shows_what_was_asked_for(built):
    page = (built / "report.html").read_text()
    for words in (
        "Source composition",
        "numina_math_cot",
        "proof_without_answer",
        "too_long",
        'class="loss"',
        'class="loss control"',
        "<svg",
        "implied weight",
        "Ten rows",
    ):
        assert words in page
    assert "<script" not in page
    assert page.count('<figure class="row">') == 10
    assert '<span class="control">&lt;|bos|&gt;&lt;|system|&gt;</span>' in page
    assert '<span class="loss control">&lt;|end|&gt;&lt;|eos|&gt;</span>' in page
    # One histogram in all and one a source.
    assert page.count("<svg") == 1 + len(read_json(built / "statistics.json")["sources"])


def test_what_rows_say_is_text_on_the_page(files, tmp_path):
    path = tmp_path / "evil.jsonl"
    text = "<script>alert(1)</script> & <b>"
    path.write_text(
        "".join(
            json.dumps(
                {
                    "prompt_id": str(n),
                    "prompt": "p",
                    "messages": [
                        {"role": "user", "content": f"{n} {text}"},
                        {"role": "assistant", "content": text},
                    ],
                }
            )
            + "\n"
            for n in range(3)
        )
    )
    sources = [{"source": {"kind": "ultrachat", "train": str(path)}}]
    page = (
        build(files, tmp_path / "run", sources=sources, validation_rows=0) / "report.html"
    ).read_text()
    assert "<script" not in page
    assert page.count("&lt;script&gt;alert(1)&lt;/script&gt; &amp; &lt;b&gt;") == 6


def test_a_histogram_counts_every_row_once():
    lengths = np.array([1, 30, 31, 32, 5000, 62, 0])
    found = _histogram(["a", "b"], lengths, np.array([0, 0, 1, 1, 1, 0, 1]))
    step = found["edges"][1]
    for name, own in (("all", lengths), ("a", lengths[[0, 1, 5]]), ("b", lengths[[2, 3, 4, 6]])):
        for edge, count in zip(found["edges"][:-1], found["counts"][name][:-1], strict=True):
            assert count == sum(edge <= n < edge + step for n in own)
        assert found["counts"][name][-1] == sum(n >= found["edges"][-1] for n in own)


def test_rows_without_packing_are_a_sequence_each(files, tmp_path):
    stage = build(files, tmp_path, packing="none")
    data = Sequences(stage, "train")
    assert len(data) == 210
    assert all(len(data[i]) == 1 for i in range(len(data)))


def test_the_command_prints_its_plan(files, tmp_path, capsys):
    config = tmp_path / "run.toml"
    config.write_text(tomli_w.dumps({"seed": 1, "out": str(tmp_path), "mixture": table(files)}))
    mixture.main(["--config", str(config), "--max-length", "128", "--dry-run"])
    printed = capsys.readouterr().out
    assert "max_length = 128" in printed
    assert "numina_math_cot" in printed


def test_the_shipped_configuration_asks_for_the_documents_counts():
    from data_prep.config import read_toml

    found = read_toml(ROOT / "data_prep" / "configs" / "sft_900k.toml")
    config = validate(MixtureConfig, found["mixture"], "sft_900k.toml")
    assert config.asked() == [260085, 228408, 202618, 109618, 99178]
    assert sum(config.asked()) == 899907
    assert (config.validation_rows, config.max_length) == (8785, 4096)
