"""What the tests of hostile pages rest on, in Chromium: traps spring, the policy stops them."""

from __future__ import annotations

import html
import re

from data_prep.config import validate
from data_prep.content_policy import content_policy
from data_prep.jsonl import script_json, write_rows
from data_prep.mixture import build_mixture
from data_prep.mixture_config import MixtureConfig
from data_prep.schema import Problem
from data_prep.tokenizer import train_tokenizer
from pipeline.steps import write_step
from prompts import load_layout, load_profile

from ..hostile import ALL, EVIL, RUN, check


def test_the_traps_spring_where_nothing_protects_and_the_policy_alone_stops_them(
    tmp_path, chromium
):
    for evil in (EVIL[0], EVIL[2], f"<svg onload={RUN}>"):
        for policy in ("default-src * 'unsafe-inline'", content_policy(), content_policy("x")):
            page = tmp_path / "page.html"
            page.write_text(
                '<!doctype html><html><head><meta charset="utf-8">'
                f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
                f"</head><body>{evil}</body></html>"
            )
            ran = re.search(r"<html[^>]*data-taken", chromium(page))
            spared = policy.startswith("default-src 'none'")
            assert bool(ran) != spared, (evil, policy)


def test_the_policy_lets_the_own_script_run(tmp_path, chromium):
    page = tmp_path / "page.html"
    page.write_text(
        '<!doctype html><html><head><meta charset="utf-8"><meta '
        f'http-equiv="Content-Security-Policy" content="{html.escape(content_policy(RUN))}">'
        f"</head><body><script>{RUN}</script></body></html>"
    )
    assert re.search(r"<html[^>]*data-taken", chromium(page))


def test_json_in_a_script_element_stays_in_it(tmp_path, chromium):
    page = tmp_path / "page.html"
    page.write_text(
        '<!doctype html><html><head><meta charset="utf-8">'
        '<meta http-equiv="Content-Security-Policy" content="none"></head><body>'
        f'<script type="application/json" id="d">{script_json({ALL: [ALL]})}</script>'
        "<p id=p></p><script>p.textContent = Object.keys(JSON.parse(d.textContent))[0]</script>"
        "</body></html>"
    )
    check(page, chromium, [EVIL[0], EVIL[3]])


# No slash, so that it can be a name on the disk.
NAME = f"<img src=x onerror={RUN}>"


def test_the_page_of_a_step(tmp_path, chromium):
    run = tmp_path / NAME
    texts = [f"What is 1+2? {ALL}", f"3 {ALL}"]
    profile = load_profile("embedded")
    tokenizer = train_tokenizer(texts * 5, 600, load_layout(profile.layout), profile.system)
    tokenizer.save_pretrained(run / "data" / "tokenizer")
    problem = Problem("p", texts[0], ALL, "x", "train", {}, level=ALL, subject=ALL)
    evil_id = Problem(ALL, texts[0], ALL, "x", "train", {}, level=ALL)
    write_rows(run / "data" / "train.jsonl", [problem.to_row(), evil_id.to_row()])
    stage = run / "grpo"
    (stage / "rollouts").mkdir(parents=True)
    write_rows(stage / "steps.jsonl", [{"step": 0, "reward_mean": 0.5}])
    ids = tokenizer.encode(texts[1], add_special_tokens=False)
    whose = {"problem_id": "p", "group": 0, "prefix": {"token_ids": ids}}
    sample = {
        "token_ids": ids,
        "logprobs": [-0.5] * len(ids),
        "outcome": "correct",
        "answer": ALL,
        "reward": 1.0,
        "finish_reason": "stop",
        "steps": [],
    }
    rows = [{**whose, **sample, "sample_index": i} for i in range(2)]
    rows.append({"problem_id": ALL, "group": 1, "error": ALL})
    write_rows(stage / "rollouts" / "step-00000.jsonl", rows)
    check(write_step(run, "grpo", 0), chromium, [*EVIL[:4], NAME])


def test_the_page_of_a_mixture(tmp_path, chromium):
    def chat(*turns):
        roles = ("user", "assistant")
        messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(turns)]
        return {"prompt": "", "prompt_id": "x", "messages": messages}

    words = [
        "one",
        "two",
        "three",
        "four",
        "five",
        "six",
        "seven",
        "eight",
        "nine",
        "ten",
        "eleven",
        "twelve",
    ]
    rows = [chat(f"{word} {ALL}?", f"{word * 3} {ALL}") for word in words]
    rows += [rows[0], {"prompt": ALL, ALL: ALL}, {"messages": ALL}]
    path = tmp_path / f"{NAME}.jsonl"
    write_rows(path, rows)
    write_rows(tmp_path / "suite.jsonl", [{"question": f"one {ALL}?", "answer": ALL}])
    table = {
        "max_length": 4096,
        "validation_rows": 2,
        "workers": 1,
        "on_bad_row": "skip",
        "tokenizer": {"vocab_size": 600},
        "sources": [{"source": {"kind": "ultrachat", "train": str(path)}}],
        "suites": [
            {"name": NAME, "source": {"kind": "questions", "test": str(tmp_path / "suite.jsonl")}}
        ],
    }
    folder = build_mixture(validate(MixtureConfig, table, "x"), tmp_path / "run", 1)
    check(folder / "report.html", chromium, [*EVIL[:4], NAME])
