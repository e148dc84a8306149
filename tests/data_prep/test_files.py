"""A folder's journal: what it vouches for, and what a damaged line of it does."""

import json

import pytest

from data_prep.files import JOURNAL, Journal


@pytest.fixture
def shards(tmp_path):
    """Two files as a journal wrote them."""
    journal = Journal(tmp_path)
    paths = [tmp_path / f"samples-{number:05d}.jsonl" for number in range(2)]
    for path in paths:
        with journal.writing(path) as temporary:
            temporary.write_text(f"{path.name}\n", encoding="utf-8")
    return paths


def test_a_file_holds_until_it_changes(shards, capsys):
    folder = shards[0].parent
    assert all(Journal(folder).holds(path) for path in shards)
    assert Journal(folder).changed() == []
    shards[0].write_text("other\n", encoding="utf-8")
    shards[1].unlink()
    assert Journal(folder).changed() == shards
    assert not any(Journal(folder).holds(path) for path in shards)
    said = capsys.readouterr().err
    assert "samples-00000.jsonl: not what was written; it is made again" in said
    assert "samples-00001.jsonl: missing; it is made again" in said
    assert not shards[0].exists()


def test_a_line_with_any_bit_changed_vouches_for_nothing_and_names_no_other_file(shards):
    folder = shards[0].parent
    journal = folder / JOURNAL
    whole = journal.read_bytes()
    end = whole.index(b"\n") + 1
    for place in range(end):
        for bit in range(8):
            changed = bytes([whole[place] ^ (1 << bit)])
            journal.write_bytes(whole[:place] + changed + whole[place + 1 :])
            # No file that never was is missed; at most the two lines run into one another.
            assert Journal(folder).changed() == []
            text = shards[0].read_bytes()
            held = Journal(folder).holds(shards[0])
            # White space between the values, or at the line's end, is no part of them.
            assert held == shards[0].exists() and (not held or chr(whole[place]) in " \n")
            shards[0].write_bytes(text)


def test_lines_without_a_check_are_those_of_an_earlier_version_and_hold(shards, capsys):
    journal = shards[0].parent / JOURNAL
    rows = [json.loads(line) for line in journal.read_text(encoding="utf-8").splitlines()]
    plain = [{"name": row["name"], "sha256": row["sha256"]} for row in rows]
    journal.write_text("".join(f"{json.dumps(row)}\n" for row in plain), encoding="utf-8")
    assert all(Journal(journal.parent).holds(path) for path in shards)
    journal.write_text("[]\n3\n{}\n", encoding="utf-8")
    assert not any(Journal(journal.parent).holds(path) for path in shards)
    assert "not what was written" in capsys.readouterr().err
