"""vLLM on GPUs: sleep, CUDA IPC, NCCL. Each ends in the probe that the pushed weights are used."""

from __future__ import annotations

import pytest
import torch

from data_prep.jsonl import read_json
from pipeline.agreement import Agreement, AgreementConfig
from pipeline.engines import Sampling, create_engine
from pipeline.engines import vllm as vllm_engine
from pipeline.engines import vllm_server as server_engine
from pipeline.generate import render_prompts
from pipeline.model import load_model, load_tokenizer

from .conftest import make_checkpoint

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpu") / "tiny"
    return make_checkpoint(folder, width=256, heads=4, kv_heads=2, feed_forward=512, context=512)


def prove(config, checkpoint, problems, tmp_path, between=lambda engine: None):
    """Start an engine, prove a push to it, and return what was found."""
    model = load_model(checkpoint).to("cuda")  # type: ignore[arg-type]
    prompts = render_prompts(problems[:20], load_tokenizer(checkpoint), "embedded")
    engine = create_engine(config, checkpoint)
    try:
        probe = Agreement(
            AgreementConfig(), model, 0.9, 8192, autocast=False, sampler_dtype="float32"
        )
        note = tmp_path / "agreement.json"
        probe.prove_push(engine, prompts, 512, 0, note)
        engine.load_weights(model.state_dict().items(), 0)
        between(engine)
        groups = engine.generate(prompts, Sampling(n=2, max_tokens=8))
        assert [len(group.completions) for group in groups] == [2] * 20
        return read_json(note)
    finally:
        engine.close()


def test_in_process_with_sleep(checkpoint, problems, tmp_path):
    """The trainer has vLLM's memory between `generate` and the next push."""
    free = []

    def watch(engine):
        free.append(torch.cuda.mem_get_info()[0])
        engine.generate([], Sampling())
        free.append(torch.cuda.mem_get_info()[0])

    config = vllm_engine.Config(sleep=True, gpu_memory_share=0.3)
    found = prove(config, checkpoint, problems, tmp_path, watch)
    assert found["gap_after_push"] < 1e-3
    # Asleep but for the weights that the push woke: most of its share is free.
    assert min(free) > 0.7 * torch.cuda.mem_get_info()[1]


def test_a_process_of_its_own_by_ipc(checkpoint, problems, tmp_path):
    config = vllm_engine.Config(transfer="ipc", gpu_memory_share=0.3)
    assert prove(config, checkpoint, problems, tmp_path)["gap_after_push"] < 1e-3


@pytest.mark.parametrize("transfer", ["folder", "ipc", "nccl"])
def test_servers(checkpoint, problems, tmp_path, transfer):
    if transfer == "nccl" and torch.cuda.device_count() < 3:
        pytest.skip("NCCL needs a GPU for the trainer and one for each of two servers")
    share = 0.9 if transfer == "nccl" else 0.2
    config = server_engine.Config(servers=2, transfer=transfer, gpu_memory_share=share)
    assert prove(config, checkpoint, problems, tmp_path)["gap_after_push"] < 1e-3
