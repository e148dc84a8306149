import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from data_prep.errors import UserError
from data_prep.loader import Batch, Sequences
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
    write_shards(tmp_path, "train", documents, SEQUENCES, size=2, workers=2)
    return tmp_path


def test_batches_hold_the_documents_in_order(stage):
    data = Sequences(stage, "train")
    assert len(data) == 5
    batch = next(data.batches(2))
    assert batch.input_ids.tolist() == [
        [1, 2, 3, 4, 5, 101, 102, 103], [201, 202, 203, 204, 301, 302, 0, 0]
    ]
    assert batch.mask.tolist() == [[0, 1, 1, 1, 1, 0, 1, 1], [0, 1, 1, 1, 0, 1, 0, 0]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 0, 1, 2], [0, 1, 2, 3, 0, 1, 0, 0]]
    assert batch.document_ids.tolist() == [[0, 0, 0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 1, 1, -1, -1]]
    assert batch.lengths.tolist() == [8, 6]
    assert batch.cumulative_lengths().tolist() == [0, 5, 8, 12, 14]


def test_batches_go_on_from_any_point(stage):
    data = Sequences(stage, "train")
    whole = [batch.input_ids.tolist() for batch in data.batches(2)]
    assert len(whole) == 3
    assert [batch.input_ids.tolist() for batch in data.batches(2, start=1)] == whole[1:]
    grouped = [batch.input_ids.tolist() for batch in data.length_grouped(12, seed=4)]
    again = data.length_grouped(12, seed=4, start=2)
    assert [batch.input_ids.tolist() for batch in again] == grouped[2:]


def test_length_grouped_batches_pad_little_and_keep_to_the_budget(stage):
    data = Sequences(stage, "train")
    batches = list(data.length_grouped(16, seed=0))
    assert all(batch.input_ids.size <= 16 for batch in batches)
    assert sorted(n for batch in batches for n in batch.lengths.tolist()) == [6, 6, 7, 8, 8]
    assert sum(batch.input_ids.size - batch.lengths.sum() for batch in batches) <= 1
    orders = {
        tuple(tuple(b.lengths.tolist()) for b in data.length_grouped(8, seed)) for seed in range(9)
    }
    assert len(orders) > 1


def test_what_a_token_sees_is_its_own_documents_past(stage):
    batch = next(Sequences(stage, "train").batches(2))
    sees = batch.attention_mask()[:, 0]
    for row in range(2):
        for query in range(8):
            for key in range(8):
                document = batch.document_ids[row]
                expected = document[query] == document[key] >= 0 and key <= query
                assert sees[row, query, key] == expected


def test_a_model_gives_packed_documents_the_logits_of_separate_ones(stage):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=1000, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, attn_implementation="eager",
    )).double().eval()
    batch: Batch = next(Sequences(stage, "train").batches(5))
    ids = torch.from_numpy(batch.input_ids).long()
    # Padding sees itself, so that its softmax is defined; nothing else sees padding.
    sees = torch.from_numpy(batch.attention_mask()) | torch.eye(ids.shape[1], dtype=torch.bool)
    bias = torch.zeros(sees.shape, dtype=torch.float64).masked_fill(~sees, -1e300)
    with torch.no_grad():
        packed = model(
            input_ids=ids, attention_mask=bias,
            position_ids=torch.from_numpy(batch.position_ids).long(),
        ).logits
        for row in range(5):
            for document in range(batch.document_ids[row].max() + 1):
                place = torch.from_numpy(batch.document_ids[row] == document)
                alone = model(input_ids=ids[row][place][None]).logits[0]
                torch.testing.assert_close(packed[row][place], alone, rtol=0, atol=1e-10)


def test_a_missing_shard_is_named(stage):
    next(stage.glob("train-00001-*")).unlink()
    with pytest.raises(UserError, match="2 of 3 shards"):
        Sequences(stage, "train")
    with pytest.raises(UserError, match="0 of no shards"):
        Sequences(stage, "validation")


def test_a_truncated_token_file_is_noticed(stage):
    (stage / "chunks" / "c.mask").write_bytes(b"\x00")
    files = TokenFiles(stage / "chunks")
    with pytest.raises(OSError, match=r"c.mask: 0 bytes at 5"):
        files.read(Document("c", 5, 3, 0, 1))
    files.close()
