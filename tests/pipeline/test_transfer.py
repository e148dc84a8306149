"""Weights on their way to vLLM on GPUs: what can be proven without vLLM and without GPUs."""

from __future__ import annotations

import http.server
import inspect
import threading
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import torch

from data_prep.errors import UserError
from pipeline.engines import _transfer
from pipeline.engines import vllm as vllm_engine
from pipeline.engines._servers import LOOPBACK
from pipeline.engines._transfer import Transfer, http_client

MODULE = "vllm.distributed.weight_transfer"


@pytest.fixture
def said(monkeypatch):
    """Put a stand-in in the place of vLLM's sending side; return what it is told, in order."""
    told: list[Any] = []

    class Engine:
        def __init__(self, source):
            self.source = source

        def send_weights(self):
            told.append([name for name, value in self.source if value is not None])

    def trainer_init(info, *, client, source):
        told.append(info)
        return Engine(source)

    modules = {
        MODULE: SimpleNamespace(
            WeightSource=object,
            ParamMeta=tuple,
            WeightTransferTrainerFactory=SimpleNamespace(trainer_init=trainer_init),
        ),
        f"{MODULE}.nccl_engine": SimpleNamespace(NCCLTrainerInitInfo=lambda *_, rank: "nccl"),
        f"{MODULE}.ipc_engine": SimpleNamespace(
            DEFAULT_PACKED_BUFFER_SIZE_BYTES=1024, IPCTrainerInitInfo=lambda **given: given
        ),
    }
    monkeypatch.setattr(_transfer, "importlib", SimpleNamespace(import_module=modules.__getitem__))
    return told


@pytest.mark.parametrize(("rows", "size"), [(1, 1024), (1000, 16000)])
def test_the_buffer_of_handles_holds_the_largest_tensor(said, rows, size):
    """VLLM refuses one beyond the buffer: a 7 B model's embedding takes 2 GiB in float32."""
    Transfer("ipc", None).send([("norm", torch.ones(4)), ("embed", torch.ones(rows, 4))])
    assert said == [
        {"packed": True, "packed_buffer_size_bytes": size, "rank": 0},
        ["norm", "embed"],
    ]


class OnGpu:
    """A tensor that says it is on a GPU."""

    is_cuda, device, nbytes = True, torch.device("cuda", 2), 4


def test_nothing_is_sent_before_it_is_computed(said, monkeypatch):
    """VLLM's side streams do not wait for the trainer's own."""

    def stream(device):
        return SimpleNamespace(synchronize=lambda: said.append(f"{device} is done"))

    monkeypatch.setattr("torch.cuda.current_stream", stream)
    transfer = Transfer("ipc", None)
    for _ in range(2):
        said.clear()
        transfer.send([("w", OnGpu())])  # type: ignore[list-item]
        assert said[-2:] == ["cuda:2 is done", ["w"]]


def test_nccl_is_given_what_lies_in_main_memory_from_the_gpu(said):
    class InMemory:
        is_cuda, device = False, torch.device("cpu")

        def to(self, device):
            said.append(f"to {device}")
            return OnGpu()

    Transfer("nccl", None).send([("a", InMemory()), ("b", InMemory())])  # type: ignore[list-item]
    assert said == ["nccl", "to cuda", "to cuda", ["a", "b"]]


@pytest.mark.vllm
@pytest.mark.filterwarnings("ignore")
def test_vllm_has_what_the_stand_ins_take_for_granted():
    pytest.importorskip("vllm")
    from vllm.distributed.weight_transfer import HTTPVLLMWeightSyncClient, ipc_engine

    info = ipc_engine.IPCTrainerInitInfo(packed=True, packed_buffer_size_bytes=1 << 31, rank=0)
    assert info.is_sender
    assert ipc_engine.DEFAULT_PACKED_BUFFER_SIZE_BYTES == 1 << 30
    parameters = inspect.signature(HTTPVLLMWeightSyncClient._post).parameters
    assert list(parameters) == ["self", "path", "json"]


def test_control_calls_ask_no_proxy(monkeypatch):
    class Base:
        def __init__(self, base_url, timeout):
            self.base_url, self.timeout = base_url, timeout

    module = SimpleNamespace(HTTPVLLMWeightSyncClient=Base)
    monkeypatch.setattr(_transfer, "importlib", SimpleNamespace(import_module=lambda name: module))
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"] or 0))
            asked.append((self.path, body))
            self.send_response(200 if self.path == "/start_weight_update" else 500)
            self.end_headers()

        def log_message(self, *words):
            pass

    server = http.server.HTTPServer((LOOPBACK, 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, f"http://{LOOPBACK}:9")  # nobody's
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    try:
        client = http_client(f"http://{LOOPBACK}:{server.server_address[1]}", 5.0)
        client._post("start_weight_update", {"a": 1})
        assert asked == [("/start_weight_update", b'{"a":1}')]
        with pytest.raises(httpx.HTTPStatusError, match="500"):
            client._post("other")
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


# The engine in process.


class Llm:
    """What `VllmEngine` calls of `vllm.LLM`, in order."""

    def __init__(self, calls):
        self.calls = calls

    def wake_up(self, tags):
        self.calls.append(("wake", tags))

    def collective_rpc(self, method, kwargs=None):
        for name, _ in (kwargs or {}).get("weights_iterator", ()):
            self.calls.append(("loads", name))

    def reset_prefix_cache(self):
        return True


def engine_with(calls, *, transfer=None, is_spread=False):
    engine = vllm_engine.VllmEngine.__new__(vllm_engine.VllmEngine)
    engine._llm, engine._transfer, engine._is_spread = Llm(calls), transfer, is_spread
    engine._asleep = {"weights", "kv_cache"}
    return engine


def weights(calls):
    for name in "abc":
        calls.append(("made", name))
        yield name, torch.ones(2)


def test_weights_reach_vllm_in_this_process_one_by_one():
    """All merged adapters together would be a second model in the GPU's memory."""
    calls: list[Any] = []
    engine_with(calls).load_weights(weights(calls), 3)
    assert calls[1:] == [(word, name) for name in "abc" for word in ("made", "loads")]
    calls.clear()
    engine_with(calls, is_spread=True).load_weights(weights(calls), 3)  # other processes' workers
    assert calls[1:] == [(word, name) for word in ("made", "loads") for name in "abc"]


def test_a_process_that_wakes_gets_what_training_has_freed(monkeypatch):
    calls: list[Any] = []
    monkeypatch.setattr("torch.cuda.empty_cache", lambda: calls.append("given back"))
    engine = engine_with(calls, transfer=SimpleNamespace(send=lambda values: calls.append("sent")))
    engine.load_weights(weights([]), 1)
    assert calls == ["given back", ("wake", ["weights"]), "sent"]
    engine._wake("weights", "kv_cache")
    assert calls[3:] == ["given back", ("wake", ["kv_cache"])]
    engine._wake("weights", "kv_cache")
    assert len(calls) == 5


def test_handles_are_of_one_gpu(monkeypatch, checkpoint):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    with pytest.raises(UserError, match=r"tensor_parallel = 2"):
        vllm_engine.create(vllm_engine.Config(transfer="ipc", tensor_parallel=2), checkpoint)
