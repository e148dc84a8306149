"""Faults: whatever ends a run, or damages its folder, nothing silently differs afterwards."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

DRIVER = Path(__file__).with_name("fault_run.py")
STAGES = {
    "data_prep.mixture",
    "data_prep.build",
    "sft",
    "pipeline.generate",
    "pipeline.verify",
    "rft",
    "dpo",
    "grpo",
    "ppo",
    "eval.run",
    "eval.report",
}


def drive(root: Path, folder: Path, *faults: str) -> dict[str, Any]:
    """Run the driver; return what it found."""
    done = subprocess.run(
        [sys.executable, str(DRIVER), "--out", str(folder), *faults],
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, f"{done.stdout[-3000:]}{done.stderr[-6000:]}"
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def short(root, tmp_path_factory) -> dict[str, Any]:
    """A few of every fault, on one machine in half a minute."""
    faults = "kill=5 stop=3 fill=2 refuse=1 limit=2 memory=2 damage=4 workers=2"
    return drive(root, tmp_path_factory.mktemp("faults"), *faults.split())


def found_in(report: dict[str, Any], fault: str) -> dict[str, Any]:
    if "skipped" in report[fault]:
        pytest.skip(report[fault]["skipped"])
    assert report[fault]["differences"] == []
    return report[fault]


@pytest.mark.timeout(900)
def test_a_run_that_is_killed_five_times_ends_bit_for_bit_the_same(short):
    found = found_in(short, "kill")
    assert len(found["kills"]) == 5
    assert len({kill["in"] for kill in found["kills"]}) >= 3
    assert found["files"] > 150


@pytest.mark.timeout(900)
def test_a_stage_that_is_asked_to_stop_ends_whole(short):
    check_stops(found_in(short, "stop"))


def check_stops(found: dict[str, Any]) -> None:
    assert found["ended"]
    for end in found["ended"]:
        # No step that was taken before the signal is taken again.
        assert not end["held"] or end.get("steps") == end.get("saved")


@pytest.mark.timeout(900)
@pytest.mark.parametrize("fault", ["fill", "refuse", "limit", "memory"])
def test_want_of_room_ends_with_a_message_and_goes_on_exactly(short, fault):
    assert found_in(short, fault)["ended"]


@pytest.mark.timeout(900)
def test_a_damaged_file_is_named_and_refused_or_repaired(short):
    assert len(found_in(short, "damage")["found"]) == 4


@pytest.mark.timeout(900)
def test_the_number_of_workers_changes_nothing(short):
    one, two = found_in(short, "workers")["fingerprints"]
    assert one == two
    assert set(one) == {"parameters", "samples", "verdicts", "figures", "all"}


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_run_that_is_killed_fifty_times_ends_bit_for_bit_the_same(root, tmp_path):
    found = found_in(drive(root, tmp_path, "kill=50"), "kill")
    assert len(found["kills"]) == 50
    assert {kill["in"] for kill in found["kills"]} == STAGES
    assert {kill["kind"] for kill in found["kills"]} == {"before", "torn", "moment"}


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_stage_stops_whole_and_every_disk_fills_up(root, tmp_path):
    faults = ("stop=11", "fill=20", "refuse=11", "limit=20", "memory=7", "workers=3")
    found = drive(root, tmp_path, *faults)
    check_stops(found_in(found, "stop"))
    for fault in ("limit", "memory", "fill", "refuse"):
        places = [end["in"] for end in found_in(found, fault)["ended"]]
        assert len(set(places)) >= 4


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_every_kind_of_file_in_every_way_damaged_is_named(root, tmp_path):
    found = found_in(drive(root, tmp_path, "damage=0"), "damage")
    assert len(found["found"]) == found["cases"] > 100
