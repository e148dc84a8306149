"""Coefficients that a stage keeps are those of its gradient; a page shows them, in Chromium."""

from __future__ import annotations

import html
import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from data_prep.build import build
from data_prep.config import validate
from data_prep.errors import UserError
from data_prep.jsonl import read_rows, write_rows
from pipeline.batch import Sequence, flatten, micro_batches
from pipeline.coefficients import path_of, read_coefficients, write_coefficients
from pipeline.config import TrainConfig
from pipeline.methods import create_method
from pipeline.model import load_model
from pipeline.policy import logprobs_of
from pipeline.steps import groups_of, main, write_step
from pipeline.train import train
from pipeline.trainer import Trainer

from .small_run import small_run

HOSTILE = "</script><script>document.title='taken'</script><img src=x onerror=alert(1)> 1 < 2 & 3"

SCRIPT = r"""
<script>addEventListener('load', async () => {
  const seen = {title: document.title, errors: []};
  addEventListener('error', (e) => seen.errors.push(String(e.message)));
  const wait = (ms) => new Promise((done) => setTimeout(done, ms));
  const pick = (id, value) => {
    const e = document.getElementById(id); e.value = value;
    e.dispatchEvent(new Event(e.tagName === 'INPUT' ? 'input' : 'change'));
  };
  const count = () => document.getElementById('count').textContent;
  seen.all = count();
  seen.colours = [...document.getElementById('colour').options].map((o) => o.value);
  seen.question = document.querySelector('summary .question').textContent;
  seen.samples = document.querySelectorAll('details[open] .sample').length;
  seen.signs = [...document.querySelectorAll('details:first-of-type .sample')].map(
    (s) => [...new Set([...s.querySelectorAll('.token')].map((t) => t.dataset.sign || ''))]);
  seen.texts = [...document.querySelectorAll('details:first-of-type .sample pre')]
    .map((p) => p.textContent);
  seen.tip = document.querySelector('pre .token').title;
  seen.alpha = [...document.querySelectorAll('pre .token')].map(
    (t) => Number(t.style.getPropertyValue('--a') || 0));
  pick('filter', 'mixed'); seen.mixed = count();
  pick('filter', 'all'); pick('colour', 'logp'); seen.logp = document.querySelectorAll(
    'pre .token[data-sign="-"]').length;
  pick('search', 'no such words'); await wait(400); seen.none = count();
  seen.requests = performance.getEntriesByType('resource').map((r) => r.name)
    .filter((name) => !name.startsWith('data:'));
  seen.taken = document.title !== seen.title;
  const labels = [...document.querySelectorAll('.bars span')];
  seen.labels = labels.map((l) => l.textContent);
  seen.cut = labels.filter((l) => l.scrollWidth > l.clientWidth + 1 ||
    l.scrollHeight > l.clientHeight + 1).map((l) => l.textContent);
  seen.figures = document.querySelector('.figures').textContent;
  seen.wide = document.documentElement.scrollWidth > innerWidth;
  const out = document.createElement('pre'); out.id = 'seen';
  out.textContent = JSON.stringify(seen); document.body.append(out);
});</script>
"""


def stage(run, **changes) -> TrainConfig:
    grpo = next(s for s in run.train if s.name == "grpo")
    return validate(TrainConfig, {**grpo.model_dump(), "steps": 3, **changes}, "grpo")


@pytest.fixture(scope="module")
def run(tmp_path_factory, seal_again) -> Path:
    """A run of three steps whose first question is hostile."""
    folder = tmp_path_factory.mktemp("steps")
    config = small_run(folder)
    out = Path(config.out)
    build(config.data, out, config.seed)
    train(config, next(s for s in config.train if s.name == "sft"))
    train(config, stage(config))
    first = next(row for _, row in read_rows(out / "grpo" / "rollouts" / "step-00000.jsonl"))
    rows = [row for _, row in read_rows(out / "data" / "train.jsonl")]
    for row in rows:
        if row["id"] == first["problem_id"]:
            row["question"] = HOSTILE
    write_rows(out / "data" / "train.jsonl", rows)
    seal_again(out / "data")
    return out


@pytest.mark.parametrize("options", [{"beta": 0.05}, {"supervision": "process"}])
def test_the_gradient_is_the_sum_of_coefficients(checkpoint, tmp_path, options):
    sequences = [
        Sequence(
            [30, 31],
            [40 + i, 50, 41],
            [True, i != 1, True],
            i // 2,
            reward=float(i % 2),
            steps=[(0, 0.5 * i), (2, float(i % 2))],
            logprobs=[-5.0] * 3,
            sample_index=i % 2,
        )
        for i in range(4)
    ]
    table = {"name": "x", "method": {"kind": "grpo", "updates": 2, **options}, "micro_tokens": 8}
    config = validate(TrainConfig, table, "x")
    method = create_method(config.method)
    model = load_model(checkpoint, "float64")
    reference = load_model(checkpoint, "float64") if method.reference else None
    trainer = Trainer(small_run(tmp_path), config, method, model, reference)
    kept = method.advantages(sequences)
    *_, coefficients = trainer._accumulate(kept, trainer.flat(kept))
    found = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    (micro,) = micro_batches(kept, flatten(kept, torch.float64), 10_000)
    logp = logprobs_of(model, micro.layout).logp
    (-(coefficients[micro.token_index] * logp).sum()).backward()
    for one, two in zip(found, model.parameters(), strict=True):
        torch.testing.assert_close(one, two.grad, rtol=1e-10, atol=1e-12)
    trainer.update(kept, 0, 1)
    write_coefficients(tmp_path, 0, kept, trainer.watched)
    rows = read_coefficients(tmp_path, 0)
    assert set(rows) == {(0, 0), (0, 1), (1, 0), (1, 1)}
    flat = [c for s in kept for c in rows[s.group, s.sample_index]["coefficient"] if c is not None]
    torch.testing.assert_close(torch.tensor(flat).double(), coefficients, rtol=1e-3, atol=1e-9)
    assert rows[0, 1]["coefficient"][1] is None
    assert len(rows[0, 1]["last_coefficient"]) == 3


def test_a_stage_keeps_them_every_so_many_steps(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    config = small_run(tmp_path)
    for every, expected in ((1, {0, 1, 2}), (2, {0, 2}), (0, set())):
        folder = train(config, stage(config, coefficients_every=every))
        kept = {int(p.stem.split("-")[1]) for p in folder.glob("coefficients/*.jsonl")}
        taken = {row["step"] for _, row in read_rows(folder / "steps.jsonl") if not row["skipped"]}
        assert kept == expected & taken
    page = write_step(tmp_path / "run", "grpo", 0)
    assert "No coefficients were kept" in page.read_text("utf-8")


def test_the_page_holds_what_the_log_says(run):
    groups = groups_of(run, run / "grpo", 0)
    rows = [row for _, row in read_rows(run / "grpo" / "rollouts" / "step-00000.jsonl")]
    assert [len(g["samples"]) for g in groups] == [4, 4, 4]
    assert groups[0]["question"] == HOSTILE
    flat = [(g, s) for g in groups for s in g["samples"]]
    kept = read_coefficients(run / "grpo", 0)
    for row, (_, sample) in zip(rows, flat, strict=True):
        assert (sample["reward"], sample["outcome"]) == (row["reward"], row["outcome"])
        assert len(sample["tokens"]) == len(sample["logp"]) == len(row["token_ids"])
        assert row["text"] in re.sub(r"<\|\w+\|>", "", "".join(sample["tokens"]))
        own = kept.get((row["group"], row["sample_index"]))
        assert sample["coefficient"] == (own and own["coefficient"])
    assert any(sample["coefficient"] for _, sample in flat)


def test_a_sample_of_which_a_part_was_trained_on_is_shown_whole(run, tmp_path):
    """GRFT by segments: prefixes head their groups, tokens behind the segment have nothing."""
    shutil.copytree(run, tmp_path / "run")
    config = small_run(tmp_path)
    method = {"kind": "grft", "prefixes": 2, "cut": "sentence", "beta": 0.0}
    folder = train(config, stage(config, coefficients_every=1, method=method))
    part = prefixes = 0
    for step in range(3):
        for group in groups_of(tmp_path / "run", folder, step):
            prefixes += bool(group["prefix"])
            for sample in group["samples"]:
                if sample["coefficient"]:
                    assert len(sample["coefficient"]) == len(sample["tokens"])
                    part += sample["coefficient"][-1] is None
    assert part
    assert prefixes


def test_a_running_stage_is_shown_too(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "grpo").rename(tmp_path / "run" / "grpo.partial")
    shutil.rmtree(tmp_path / "run" / "grpo.partial" / "checkpoint")
    assert write_step(tmp_path / "run", "grpo", 1, tmp_path / "page.html").is_file()


def test_what_is_not_there_is_said(run, tmp_path):
    with pytest.raises(UserError, match="one of 0 … 2"):
        write_step(run, "grpo", 9)
    with pytest.raises(UserError, match="one of grpo"):
        write_step(run, "sft", 0)
    with pytest.raises(UserError, match="whose method samples"):
        write_step(tmp_path, "grpo", 0)


@pytest.mark.parametrize("width", [1200, 420])
def test_reading_the_page(run, tmp_path, chromium, capsys, width):
    main(["--run", str(run), "--stage", "grpo", "--step", "0", "--out", str(tmp_path / "a.html")])
    assert capsys.readouterr().out.strip() == str(tmp_path / "a.html")
    dom = chromium(tmp_path / "a.html", SCRIPT, width)
    found = re.search(r'<pre id="seen">(.*?)</pre>', dom, re.DOTALL)
    assert found, dom[-2000:]
    seen = json.loads(html.unescape(found.group(1)))
    assert seen["errors"] == [] and seen["requests"] == []
    assert not seen["taken"], "a question's markup ran"
    assert seen["question"] == HOSTILE
    assert seen["all"] == "3 of 3 groups"
    assert seen["samples"] == 8  # the first two groups stand open
    assert seen["colours"] == ["coefficient", "last", "advantage", "logp"]
    groups = groups_of(run, run / "grpo", 0)
    # A token that is part of a character shows a dot; the character stands at its last one.
    texts = ["".join(t or "\u2027" for t in s["tokens"]) for s in groups[0]["samples"]]
    assert seen["texts"] == texts
    for sample, signs in zip(groups[0]["samples"], seen["signs"], strict=True):
        values = sample["coefficient"] or [0.0]
        assert set(signs) == {"+" if v > 0 else "-" if v < 0 else "" for v in values}
    assert max(seen["alpha"]) <= 1.0 and min(seen["alpha"]) >= 0.0
    assert "log-prob" in seen["tip"]
    mixed = sum(len({s["reward"] for s in g["samples"]}) > 1 for g in groups)
    assert seen["mixed"] == f"{mixed} of 3 groups"
    assert seen["logp"] > 0
    assert seen["none"] == "0 of 3 groups"
    assert not seen["wide"], "the page scrolls sideways"
    assert seen["labels"][:2] == ["≤ −3", "−3 to −2"] and not seen["cut"]
    assert "-" not in seen["figures"] + re.sub(r'".*?"', "", seen["tip"]).replace("log-prob", "")


def test_files_of_steps_are_named_alike(tmp_path):
    assert path_of(tmp_path, 12).name == "step-00012.jsonl"
