import numpy as np
import pyarrow as pa
import pytest

from data_prep.errors import UserError
from data_prep.loader import Sequences
from data_prep.shards import Document, TokenFiles, write_shards

LENGTHS = [5, 3, 4, 2, 6, 1, 4, 3, 5, 2]
SEQUENCES = [[0, 1], [2, 3], [4], [5, 6, 7], [8, 9]]


@pytest.fixture
def stage(tmp_path):
    """A stage of five sequences in three shards; document d has the tokens 100·d + 1, …"""
    (tmp_path / "chunks").mkdir()
    ids = [np.arange(1, n + 1, dtype=np.int32) + 100 * d for d, n in enumerate(LENGTHS)]
    masks = [np.array([0] + [1] * (n - 1), dtype=np.int8) for n in LENGTHS]
    (tmp_path / "chunks" / "c.ids").write_bytes(np.concatenate(ids).tobytes())
    (tmp_path / "chunks" / "c.mask").write_bytes(np.concatenate(masks).tobytes())
    offsets = np.cumsum([0, *LENGTHS[:-1]]).tolist()
    documents = [
        Document("c", offset, length, d % 2, d)
        for d, (offset, length) in enumerate(zip(offsets, LENGTHS, strict=True))
    ]
    files = TokenFiles(tmp_path / "chunks")
    for split, sequences in (("train", SEQUENCES), ("validation", [])):
        write_shards(
            tmp_path, split, documents, sequences, files, ["even", "odd"], size=2, workers=2
        )
    files.close()
    return tmp_path


def test_sequences_hold_the_documents_in_order(stage):
    data = Sequences(stage, "train")
    assert len(data) == 5
    for number, chosen in enumerate(SEQUENCES):
        found = [(d.input_ids.tolist(), d.mask.tolist()) for d in data[number]]
        assert found == [
            ([100 * d + t for t in range(1, LENGTHS[d] + 1)], [0] + [1] * (LENGTHS[d] - 1))
            for d in chosen
        ]
        assert data.origins(number) == [("odd" if d % 2 else "even", d) for d in chosen]
    assert data.lengths.tolist() == [8, 6, 6, 8, 7]
    assert data.longest == 6
    with pytest.raises(IndexError):
        data[5]


def test_length_grouped_batches_pad_little_and_keep_to_the_budget(stage):
    data = Sequences(stage, "train")
    lengths = data.lengths
    batches = data.length_grouped(16, seed=0)
    assert sorted(index for batch in batches for index in batch) == [0, 1, 2, 3, 4]
    sizes = [len(batch) * int(lengths[batch].max()) for batch in batches]
    assert max(sizes) <= 16
    assert sum(sizes) - int(lengths.sum()) <= 1
    assert data.length_grouped(16, seed=0) == batches
    assert len({str(data.length_grouped(8, seed)) for seed in range(9)}) > 1
    # A sequence above the budget is alone.
    assert [len(batch) for batch in data.length_grouped(4, seed=0)] == [1] * 5


def test_views_are_of_the_mapped_file(stage):
    # Nothing is copied: what a training process holds in memory does not grow with the data.
    (first, *_) = Sequences(stage, "train")[0]
    assert not first.input_ids.flags.owndata
    assert not first.input_ids.flags.writeable


def test_an_empty_split_is_empty_and_a_missing_one_is_an_error(stage):
    empty = Sequences(stage, "validation")
    assert len(empty) == empty.longest == 0
    assert empty.length_grouped(8, 0) == []
    next(stage.glob("train-00001-*")).unlink()
    with pytest.raises(UserError, match="2 of 3 shards"):
        Sequences(stage, "train")
    next(stage.glob("validation-*")).unlink()
    with pytest.raises(UserError, match="no shards of split"):
        Sequences(stage, "validation")


def test_a_broken_or_foreign_shard_is_named(stage):
    path = next(stage.glob("train-00001-*"))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"train-00001.*cannot be read"):
        Sequences(stage, "train")
    with pa.OSFile(str(path), "wb") as file:
        table = pa.table({"input_ids": [[1]]})
        with pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)
    with pytest.raises(UserError, match="schema version none"):
        Sequences(stage, "train")


def test_a_truncated_token_file_is_noticed(stage):
    (stage / "chunks" / "c.mask").write_bytes(b"\x00")
    files = TokenFiles(stage / "chunks")
    with pytest.raises(OSError, match=r"c.mask: 0 bytes at 5"):
        files.read(Document("c", 5, 3, 0, 1))
    files.close()
