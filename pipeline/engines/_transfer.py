"""Weights from the trainer to vLLM on GPUs, by vLLM's own weight-transfer engines.

"nccl": the trainer on one GPU, vLLM's workers on others, one broadcast for all servers.
"ipc": both on one GPU, by CUDA IPC handles; over HTTP those are pickled, so the server must run
with VLLM_ALLOW_INSECURE_SERIALIZATION=1, which `pipeline.serve` sets on loopback alone.

Written against vLLM 0.32 (`vllm.distributed.weight_transfer`) and not yet run: it needs GPUs.
The order of calls and the ranks are tested without them.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import httpx
import torch
from torch import Tensor

from pipeline.engines._servers import free_ports

Backend = Literal["nccl", "ipc"]


class OfflineClient:
    """The control calls of `vllm.LLM`, as vLLM's trainer side makes them.

    Args:
        llm: The engine.
    """

    def __init__(self, llm: Any) -> None:
        """Keep the engine."""
        self._llm = llm

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Open the receiving side."""
        self._llm.init_weight_transfer_engine({"init_info": init_info})

    def start_weight_update(self) -> None:
        """Begin an update."""
        self._llm.start_weight_update()

    def update_weights(self, update_info: Any) -> None:
        """Receive tensors."""
        self._llm.update_weights({"update_info": update_info})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """End an update."""
        self._llm.finish_weight_update(weight_version)


class Together:
    """The control calls of several servers, made at once: NCCL waits until all have joined.

    Args:
        clients: One a server.
        worlds: Workers of each server, in the same order.
    """

    def __init__(self, clients: list[Any], worlds: list[int]) -> None:
        """Keep the servers."""
        self._clients, self._worlds = clients, worlds

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Open the receiving sides; every worker has a rank of its own after the trainer's."""
        infos, offset = [], init_info.get("rank_offset")
        for world in self._worlds:
            infos.append(init_info if offset is None else {**init_info, "rank_offset": offset})
            offset = None if offset is None else offset + world
        self._all(lambda client, info: client.init_weight_transfer_engine(info), infos)

    def start_weight_update(self) -> None:
        """Begin an update."""
        self._all(lambda client, _: client.start_weight_update())

    def update_weights(self, update_info: Any) -> None:
        """Receive tensors."""
        self._all(lambda client, _: client.update_weights(update_info))

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """End an update."""
        self._all(lambda client, _: client.finish_weight_update(weight_version))

    def _all(self, call: Callable[[Any, Any], None], values: list[Any] | None = None) -> None:
        values = values or [None] * len(self._clients)
        with ThreadPoolExecutor(len(self._clients)) as pool:
            pairs = zip(self._clients, values, strict=True)
            for done in [pool.submit(call, client, value) for client, value in pairs]:
                done.result()


class Transfer:
    """The sending side: opened at the first push, used for every one.

    Args:
        backend: "nccl" or "ipc".
        client: Makes the control calls.
        world_size: Workers of all servers together (NCCL).
        address: Where the workers find the trainer (NCCL).
    """

    def __init__(
        self, backend: Backend, client: Any, world_size: int = 1, address: str = "127.0.0.1"
    ) -> None:
        """Keep the settings."""
        self._backend, self._client = backend, client
        self._world_size, self._address = world_size, address
        self._engine: Any = None
        self._source: Any = None

    def send(self, weights: list[tuple[str, Tensor]]) -> None:
        """Send parameters; returns when the workers hold them."""
        if self._engine is None:
            self._open(weights)
        for device in {value.device for _, value in weights if value.is_cuda}:
            # vLLM reads on streams of its own, which do not wait for what is under way on ours:
            # the optimizer's step, merged adapters.
            torch.cuda.current_stream(device).synchronize()
        self._source.weights = weights
        engine: Any = self._engine
        engine.send_weights()
        self._source.weights = []

    def _open(self, weights: list[tuple[str, Tensor]]) -> None:
        module: Any = importlib.import_module("vllm.distributed.weight_transfer")
        self._source = _source(module, self._backend)(weights)
        info: Any
        if self._backend == "nccl":
            nccl: Any = importlib.import_module("vllm.distributed.weight_transfer.nccl_engine")
            info = nccl.NCCLTrainerInitInfo(
                self._address, free_ports(1)[0], 1 + self._world_size, rank=0
            )
        else:
            ipc: Any = importlib.import_module("vllm.distributed.weight_transfer.ipc_engine")
            # Packed: one buffer of bounded size instead of a handle a tensor. It holds the largest:
            # a vocabulary's embedding in float32 may be beyond vLLM's own size.
            size = max(ipc.DEFAULT_PACKED_BUFFER_SIZE_BYTES, *(w.nbytes for _, w in weights))
            info = ipc.IPCTrainerInitInfo(packed=True, packed_buffer_size_bytes=size, rank=0)
        self._engine = module.WeightTransferTrainerFactory.trainer_init(
            info, client=self._client, source=self._source
        )

    def close(self) -> None:
        """Leave the group."""
        shutdown = getattr(self._engine, "shutdown", None)
        if shutdown is not None:
            shutdown()
        self._engine = None


def _source(module: Any, backend: str) -> Any:
    """Return a class of vLLM's `WeightSource` over a list of parameters.

    NCCL sends from the GPU alone, so what lies in main memory is brought there one by one.
    """

    class Source(module.WeightSource):
        """Parameters of the push that is under way."""

        def __init__(self, weights: list[tuple[str, Tensor]]) -> None:
            self.weights = weights

        def metadata(self) -> list[Any]:
            return [module.ParamMeta(n, w.dtype, tuple(w.shape)) for n, w in self.weights]

        def __iter__(self) -> Iterator[tuple[str, Tensor]]:
            if backend != "nccl":
                return iter(self.weights)
            return ((n, w if w.is_cuda else w.to("cuda")) for n, w in self.weights)

    return Source


def http_client(url: str, timeout_s: float) -> Any:
    """Return vLLM's own client of a server's control calls, which here asks no proxy."""
    module: Any = importlib.import_module("vllm.distributed.weight_transfer")

    class Client(module.HTTPVLLMWeightSyncClient):
        def _post(self, path: str, json: dict[str, Any] | None = None) -> None:
            address = f"{self.base_url}/{path}"
            reply = httpx.post(address, json=json, timeout=self.timeout, trust_env=False)
            reply.raise_for_status()

    return Client(url, timeout_s)
