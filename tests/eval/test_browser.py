"""The report in headless Chromium: filters, search, unpacking, nothing from outside."""

from __future__ import annotations

import html
import json
import re
import shutil

import pytest

from data_prep.jsonl import read_json, read_rows
from eval.regrade import main as regrade
from eval.report import main as report

from ..hostile import ALL, EVIL, RUN, check
from .conftest import simulate_run

# Walks through the page as a reader would and writes what it saw into the title.
SCRIPT = r"""
<script>addEventListener('load', async () => {
  const seen = {title: document.title, errors: []};
  addEventListener('error', (e) => seen.errors.push(String(e.message)));
  const pick = (id, value) => {
    const e = document.getElementById(id); e.value = value;
    e.dispatchEvent(new Event(e.tagName === 'INPUT' ? 'input' : 'change'));
  };
  const wait = (ms) => new Promise((done) => setTimeout(done, ms));
  const count = () => document.getElementById('count').textContent;
  seen.filters = [...document.getElementById('filter').options].map((o) => o.textContent);
  pick('checkpoint', 'grpo'); pick('beside', 'sft');
  seen.counts = {};
  for (const name of ['all', 'gained', 'lost', 'none', 'cut', 'disputed']) {
    if ([...document.getElementById('filter').options].some((o) => o.value === name)) {
      pick('filter', name); seen.counts[name] = count();
    }
  }
  pick('filter', 'all'); pick('search', 'sum-17'); await wait(400);
  seen.search = count();
  document.querySelector('.item').click(); await wait(600);
  seen.columns = [...document.querySelectorAll('.columns h4')].map((h) => h.textContent);
  seen.cards = document.querySelectorAll('.sample').length;
  seen.text = document.querySelector('.sample pre').textContent;
  seen.badge = document.querySelector('.sample .badge').textContent;
  pick('search', ''); await wait(400);
  seen.listed = document.querySelectorAll('.items > li').length;
  document.getElementById('more').click();
  seen.more = document.querySelectorAll('.items > li').length;
  seen.requests = performance.getEntriesByType('resource').map((r) => r.name)
    .filter((name) => !name.startsWith('data:'));
  seen.taken = document.title !== seen.title;
  seen.wide = document.documentElement.scrollWidth > innerWidth;
  const out = document.createElement('pre'); out.id = 'seen';
  out.textContent = JSON.stringify(seen); document.body.append(out);
});</script>
"""


def seen_in(dom):
    """Return what the script saw."""
    found = re.search(r'<pre id="seen">(.*?)</pre>', dom, re.DOTALL)
    assert found, dom[-2000:]
    return json.loads(html.unescape(found.group(1)))


@pytest.fixture(scope="module")
def run(simulated_run, tmp_path_factory):
    """A copy of the run whose last checkpoint was graded a second time, by exact spelling."""
    copy = tmp_path_factory.mktemp("browser") / "run"
    shutil.copytree(simulated_run, copy)
    regrade([str(copy / "eval-grpo"), "--checker", "exact", "--workers", "1"])
    report(["--run", str(copy)])
    return copy


def test_second_grader_leaves_the_evaluation_as_it_was(run, simulated_run):
    for name in ("figures.json", "verdicts.jsonl", "samples-00000.jsonl"):
        first = (simulated_run / "eval-grpo/embedded" / name).read_bytes()
        assert (run / "eval-grpo/embedded" / name).read_bytes() == first
    second = read_json(run / "eval-grpo/embedded/second/figures.json")
    assert second["checker"] == {"kind": "exact"}
    assert second["samples"] == 240 * 9
    rows = [row for _, row in read_rows(run / "eval-grpo/embedded/second/disagreements.jsonl")]
    assert second["disagreements"] == len(rows) > 0
    assert all((row["first"] == "correct") != (row["second"] == "correct") for row in rows)


def test_nothing_of_a_hostile_run_runs(checkpoint, tmp_path, chromium):
    """Names, ids, questions, samples, answers, levels, statistics: all are hostile."""
    evil = "".join(char for char in ALL if char.isprintable())  # TOML and ids are text
    folder = simulate_run(tmp_path / "run", checkpoint, 12, n=2, evil=evil)
    name = f"<img src=x onerror={RUN}>"
    (folder / "eval-grpo").rename(folder / f"eval-{name}")
    report(["--run", str(folder)])
    check(folder / "report/report.html", chromium, [*EVIL[:4], name])


@pytest.mark.parametrize("width", [1200, 420])
def test_reading_the_page(run, chromium, width):
    seen = seen_in(chromium(run / "report/report.html", SCRIPT, width))
    assert seen["errors"] == [] and seen["requests"] == []
    assert not seen["taken"], "a question's markup ran"
    assert seen["counts"]["all"] == "240 of 240 questions"
    assert int(seen["counts"]["gained"].split()[0]) > 100
    assert seen["counts"]["lost"].endswith("of 240 questions")
    rows = [row for _, row in read_rows(run / "eval-grpo/embedded/second/disagreements.jsonl")]
    disputed = len({row["problem_id"] for row in rows})
    assert seen["counts"]["disputed"] == f"{disputed} of 240 questions"
    assert seen["search"] == "11 of 240 questions"  # sum-17 and sum-170 … 179
    assert seen["columns"] == ["grpo", "sft"]
    assert seen["cards"] == 18
    assert "\\boxed{" in seen["text"]
    assert any(word in seen["badge"] for word in ("correct", "incorrect"))
    assert (seen["listed"], seen["more"]) == (40, 80)
    assert not seen["wide"], "the page scrolls sideways"
