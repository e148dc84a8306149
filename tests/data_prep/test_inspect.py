import pytest

from data_prep import inspect
from data_prep.build import DataConfig, build
from data_prep.config import validate
from data_prep.errors import UserError


@pytest.fixture(scope="module")
def stage(tmp_path_factory):
    config = validate(DataConfig, {
        "profile": "embedded", "workers": 1,
        "sources": [{"kind": "embedded", "train": 20, "validation": 5, "test": 5}],
    }, "test")
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
