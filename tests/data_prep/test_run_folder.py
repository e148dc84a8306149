"""Stage folders: whose manifest it is, and folders that were moved elsewhere."""

from __future__ import annotations

import json

import pytest

from data_prep.run_folder import Stage, stage_of


@pytest.mark.parametrize("value", [[{"a": 1}], {"result": "ok"}, {"plan": 1}, {}, 3])
def test_a_manifest_of_another_program_is_nobodys_stage(tmp_path, value):
    (tmp_path / "manifest.json").write_text(json.dumps(value))
    data = tmp_path / "train.jsonl"
    data.write_text("{}\n")
    assert stage_of(data) is None


def test_a_stage_that_was_moved_and_linked_is_made_again(tmp_path):
    run, elsewhere = tmp_path / "run", tmp_path / "disk"
    run.mkdir()
    elsewhere.mkdir()
    for number in range(4):
        stage = Stage(run, "sft", {"number": number}, {})
        work = stage.begin()
        (work / "out.txt").write_text(str(number))
        final = stage.complete()
        assert stage_of(final / "out.txt") == final
        if number == 0:
            final.rename(elsewhere / "sft")
            final.symlink_to(elsewhere / "sft")
    assert (run / "sft" / "out.txt").read_text() == "3"
    assert not (run / "sft.old").is_symlink()
    assert (elsewhere / "sft" / "out.txt").read_text() == "0"
