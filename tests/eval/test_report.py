"""The report of a simulated run: same numbers everywhere, escaped, self-contained."""

from __future__ import annotations

import base64
import gzip
import json
import re
import shutil

import pytest

from data_prep.errors import UserError
from data_prep.jsonl import read_json
from eval.report import main


@pytest.fixture(scope="module")
def report(simulated_run):
    main(["--run", str(simulated_run)])
    folder = simulated_run / "report"
    return (folder / "report.html").read_text(encoding="utf-8"), read_json(folder / "report.json")


def test_figures_are_those_of_the_evaluations(report, simulated_run):
    page, data = report
    assert data["checkpoints"] == ["sft", "rft", "dpo", "grpo"]
    assert (data["name"], data["seed"]) == ("simulated", 7)
    for checkpoint in data["checkpoints"]:
        figures = data["figures"][checkpoint]["embedded"]
        stored = read_json(simulated_run / f"eval-{checkpoint}/embedded/figures.json")["figures"]
        assert figures == stored
        for metric in ("greedy", "avg@8", "pass@8", "maj@8"):
            figure = figures[metric]
            assert set(figure) == {"value", "low", "high", "n"}
            assert f'<span class="value">{100 * figure["value"]:.1f}</span>' in page
    assert data["reading"] in page


def test_the_parts_of_the_gain_add_up(report):
    _, data = report
    found = data["decomposition"]["embedded"]
    assert set(found) == {"rft", "dpo", "grpo"}
    for checkpoint, parts in found.items():
        difference = parts["difference"]["value"]
        assert parts["choice"]["value"] + parts["skill"]["value"] == pytest.approx(difference)
        before, after = (
            data["figures"][c]["embedded"]["avg@8"]["value"] for c in ("sft", checkpoint)
        )
        assert difference == pytest.approx(after - before)
    # The simulated GRPO gains by choosing the worked style.
    assert found["grpo"]["choice"]["low"] > 5 * abs(found["grpo"]["skill"]["value"])


def test_the_page_is_self_contained_and_escaped(report):
    page, _ = report
    assert not re.findall(r'(?:src|href)="(?!#|data:,)[^"]*"', page)
    assert "<script>document.title" not in page
    assert page.count("<script") == page.count("</script>")
    for text in ("svg", "Maj@K", "grad norm", "Where the gain comes from", "var(--series-1)"):
        assert text in page
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))


def test_blocks_hold_every_sample(report, simulated_run):
    page, _ = report
    index = json.loads(re.search(r'id="index">(.*?)</script>', page).group(1))  # type: ignore[union-attr]
    suite = index["suites"]["embedded"]
    blocks = dict(re.findall(r'data-block="([^"]+)">([^<]+)<', page))
    assert len(suite["items"]) == 240
    for checkpoint in index["checkpoints"]:
        items = []
        for number in range(-(-240 // suite["block"])):
            packed = base64.b64decode(blocks[f"embedded/{checkpoint}/{number}"])
            items += json.loads(gzip.decompress(packed))
        assert [len(samples) for samples in items] == [9] * 240
        right = [sum(sample[1] == "c" for sample in samples[1:]) for samples in items]
        assert right == suite["results"][checkpoint]["right"]
        assert suite["results"][checkpoint]["greedy"] == "".join(s[0][1] for s in items)


def test_the_same_run_gives_the_same_page(report, simulated_run):
    page, _ = report
    main(["--run", str(simulated_run)])
    assert (simulated_run / "report/report.html").read_text(encoding="utf-8") == page


def test_a_run_without_evaluations_is_an_error(tmp_path):
    with pytest.raises(UserError, match="no complete evaluation"):
        main(["--run", str(tmp_path)])


def test_figures_of_another_version_are_named(simulated_run, tmp_path, seal_again):
    copy = tmp_path / "run"
    shutil.copytree(simulated_run, copy)
    path = copy / "eval-sft/embedded/figures.json"
    path.write_text(path.read_text().replace('"schema": ', '"schema": 9'))
    seal_again(copy / "eval-sft")
    with pytest.raises(UserError, match=r"figures\.json, key 'schema'"):
        main(["--run", str(copy)])


def test_without_a_configuration_supervised_training_comes_first(simulated_run, tmp_path):
    copy = tmp_path / "results"
    for name in ("grpo", "sft"):
        shutil.copytree(simulated_run / f"eval-{name}", copy / f"eval-{name}")
    main(["--run", str(copy)])
    data = read_json(copy / "report/report.json")
    assert data["checkpoints"] == ["sft", "grpo"]
    assert data["seed"] == 7  # from the evaluations themselves
    assert data["reading"].startswith("On 240 questions of the suite “embedded”, GRPO answers")
