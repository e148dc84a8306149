import numpy as np
import pytest

from data_prep import inspect
from data_prep.build import DataConfig, build
from data_prep.config import validate
from data_prep.errors import UserError
from data_prep.rows import TokenisedPairs
from data_prep.shards import Document, write_shards


@pytest.fixture(scope="module")
def stage(tmp_path_factory):
    config = validate(
        DataConfig,
        {
            "profile": "embedded",
            "workers": 1,
            "sources": [{"kind": "embedded", "train": 20, "validation": 5, "test": 5}],
        },
        "test",
    )
    return build(config, tmp_path_factory.mktemp("run"), 0)


def test_a_row_is_shown_as_tokens_and_mask(stage, capsys):
    inspect.main([str(stage), "--row", "3", "--plain"])
    title, *lines = capsys.readouterr().out.splitlines()
    _, ids, mask = inspect.read_row(stage, "train", 3)
    assert f"{len(ids)} tokens, {sum(mask)} carry loss" in title
    assert len(lines) == len(ids)
    assert lines[0].split()[:3] == ["0", "0", str(ids[0])]
    assert "<|bos|>" in lines[0]
    assert lines[-1].split()[1] == "1"


def test_a_packed_sequence_names_its_documents(tmp_path):
    ids = [np.arange(5, 9, dtype=np.int32), np.arange(2, 5, dtype=np.int32)]
    masks = [np.array([0, 0, 1, 1], dtype=np.int8), np.array([0, 1, 1], dtype=np.int8)]
    pairs = TokenisedPairs([(0, "a"), (1, "a")], ids, masks)
    documents = [Document("", 0, 4, 1, 17), Document("", 1, 3, 0, 4)]
    write_shards(tmp_path, "train", documents, [[0, 1]], pairs, ["one", "two"], 8, 1)
    title, tokens, mask = inspect.read_row(tmp_path, "train", 0)
    assert title == "sequence 0 of 1: two 17, one 4"
    assert tokens == [5, 6, 7, 8, 2, 3, 4]
    assert mask == [0, 0, 1, 1, 0, 1, 1]


def test_colours_tell_loss_and_control_tokens_apart():
    text = inspect.coloured(["<a>", "x", "<b>"], [0, 1, 1], [True, False, True])
    assert text == (
        f"{inspect.DIM}{inspect.RED}<a>{inspect.OFF}{inspect.GREEN}x{inspect.OFF}"
        f"{inspect.GREEN}{inspect.RED}<b>{inspect.OFF}"
    )


@pytest.mark.parametrize("row", ["40", "-1"])
def test_a_row_that_is_not_there_is_named(stage, row):
    with pytest.raises(UserError, match="0 to 39"):
        inspect.main([str(stage), "--row", row])


def test_a_folder_that_is_no_stage_is_named(tmp_path):
    with pytest.raises(UserError, match="shards of split"):
        inspect.main([str(tmp_path)])
