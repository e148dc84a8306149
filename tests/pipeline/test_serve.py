"""Starting vLLM servers: flags, addresses, transfers; what needs no vLLM and no GPU."""

from __future__ import annotations

import importlib.util
import itertools
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from data_prep.cluster import ClusterConfig, connect, import_ray
from data_prep.errors import UserError
from pipeline.engines import _servers, vllm_server
from pipeline.engines._fleet import Fleet
from pipeline.engines._servers import (
    LOOPBACK,
    Servers,
    _devices,
    _environment,
    choose_transfer,
    command,
    free_ports,
    is_loopback,
)
from pipeline.engines._transfer import OfflineClient, Together
from pipeline.serve import _watch, cluster_of, main, settings


def flags(words: list[str]) -> dict[str, str]:
    return {a: b for a, b in itertools.pairwise(words) if a.startswith("--")}


def test_servers_share_the_cores(monkeypatch):
    monkeypatch.setattr(_servers.os, "cpu_count", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    config = vllm_server.Config()
    for servers, threads in ((1, "8"), (3, "2"), (20, "1")):
        assert _environment(config, "folder", None, servers)["OMP_NUM_THREADS"] == threads
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert _environment(config, "folder", None, 3)["OMP_NUM_THREADS"] == "5"


def test_flags_on_a_cpu(checkpoint):
    config = vllm_server.Config(max_sequences=7)
    words = command(config, checkpoint, LOOPBACK, 8123, on_gpu=False, transfer="folder")
    found = flags(words)
    assert words[1:3] == ["-m", "vllm.entrypoints.openai.api_server"]
    assert found["--host"] == "127.0.0.1"
    assert found["--port"] == "8123"
    assert found["--logprobs-mode"] == "processed_logprobs"
    assert found["--dtype"] == "float32"
    assert found["--max-num-seqs"] == "7"
    assert int(found["--max-num-batched-tokens"]) >= 4096
    for flag in ("--enable-scale-out", "--enforce-eager", "--no-enable-chunked-prefill"):
        assert flag in words
    assert "--weight-transfer-config" not in words
    assert "--gpu-memory-utilization" not in words
    environment = _environment(config, "folder", None, 2)
    assert environment["VLLM_SERVER_DEV_MODE"] == "1"
    assert environment["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"
    assert "VLLM_ALLOW_INSECURE_SERIALIZATION" not in environment
    root = environment["PYTHONPATH"].split(":")[0]
    assert (Path(root) / "pipeline" / "engines" / "_worker.py").is_file()


def test_flags_on_gpus(checkpoint):
    config = vllm_server.Config(gpu_memory_share=0.4, tensor_parallel=2, dtype="bfloat16")
    words = command(config, checkpoint, LOOPBACK, 8123, on_gpu=True, transfer="nccl")
    found = flags(words)
    assert found["--gpu-memory-utilization"] == "0.4"
    assert found["--tensor-parallel-size"] == "2"
    assert found["--weight-transfer-config"] == '{"backend": "nccl"}'
    assert "--enforce-eager" not in words
    ipc = _environment(config, "ipc", "0", 2)
    assert ipc["VLLM_ALLOW_INSECURE_SERIALIZATION"] == "1"
    assert ipc["CUDA_VISIBLE_DEVICES"] == "0"


def test_which_gpus_the_servers_get(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert _devices("folder", 0, 1, 0, 1, 1) is None
    # Trainers keep theirs to themselves where there are enough, however weights come.
    assert [_devices("nccl", n, 2, 8, 6, 1) for n in range(3)] == ["1,2", "3,4", "5,6"]
    assert [_devices("nccl", n, 1, 8, 4, 4) for n in range(4)] == ["4", "5", "6", "7"]
    assert _devices("folder", 0, 1, 2, 1, 1) == "1"
    assert [_devices("folder", n, 1, 2, 2, 1) for n in range(2)] == ["0", "1"]
    # Handles are of the trainer's own GPU, whatever others there are.
    assert [_devices("ipc", n, 1, 4, 2, 1) for n in range(2)] == ["0", "0"]
    # What this process sees is not all of the machine: the commands of gsm8k_7b_node.toml.
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4, 5,6,7")
    assert [_devices("nccl", n, 1, 4, 3, 1) for n in range(3)] == ["5", "6", "7"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-3f,GPU-a0")
    assert _devices("ipc", 0, 1, 2, 1, 1) == "GPU-3f"


def test_a_server_does_not_take_itself_for_a_process_that_trains(monkeypatch):
    """Started by torchrun's first process, vLLM would wait for that one's store for good."""
    for name in (*_servers.RANK_VARIABLES, "TORCHELASTIC_USE_AGENT_STORE", "TORCHELASTIC_RUN_ID"):
        monkeypatch.setenv(name, "True")
    monkeypatch.setenv("RANKINE", "1")
    found = _environment(vllm_server.Config(), "folder", None, 1)
    assert not {*_servers.RANK_VARIABLES} & found.keys()
    assert not [name for name in found if name.startswith("TORCHELASTIC")]
    assert found["RANKINE"] == "1"


@pytest.mark.parametrize(
    ("asked", "gpus", "workers", "host", "expected"),
    [
        ("auto", 0, 2, LOOPBACK, "folder"),
        ("auto", 1, 1, LOOPBACK, "ipc"),
        ("auto", 3, 2, LOOPBACK, "nccl"),
        ("folder", 4, 1, LOOPBACK, "folder"),
        ("nccl", 0, 1, LOOPBACK, "without a GPU"),
        ("ipc", 0, 1, LOOPBACK, "without a GPU"),
        ("nccl", 2, 2, LOOPBACK, "a GPU of its own"),
        ("ipc", 1, 1, "0.0.0.0", "run code"),  # noqa: S104 - refused
        ("auto", 1, 1, "0.0.0.0", "run code"),  # noqa: S104 - refused
    ],
)
def test_how_weights_will_come(asked, gpus, workers, host, expected):
    if " " in expected:
        with pytest.raises(UserError, match=expected):
            choose_transfer(asked, gpus, workers, host)
    else:
        assert choose_transfer(asked, gpus, workers, host) == expected


def test_what_is_loopback():
    assert all(map(is_loopback, ("127.0.0.1", "localhost", "::1", "127.9.9.9")))
    assert not any(map(is_loopback, ("0.0.0.0", "10.0.0.1", "gpu-7", "::")))  # noqa: S104 - refused


def test_free_ports_are_free_and_apart():
    ports = free_ports(5)
    assert len(set(ports)) == 5
    for port in ports:
        with socket.socket() as sock:
            sock.bind((LOOPBACK, port))


def test_settings_come_from_a_table_of_any_kind_and_the_command_line():
    table = {"kind": "embedded", "dtype": "bfloat16", "slots": 64, "memory_gib": 16}
    config = settings(table, ["--engine.max-sequences", "9", "--engine.memory-gib=2"])
    assert (config.kind, config.dtype, config.max_sequences) == ("vllm_server", "bfloat16", 9)
    assert config.memory_gib == 2
    assert settings(table, []).memory_gib == 1  # the embedded engine's is another
    assert settings({"kind": "vllm", "memory_gib": 3, "sleep": True}, []).memory_gib == 3
    for words in (["--engine.colour", "red"], ["--port"], ["--what", "1"]):
        with pytest.raises(UserError):
            settings({}, words)


# Processes: a stand-in for vLLM's server that answers /health, or does not.

SERVER = """
import http.server, signal, subprocess, sys, time
mode, port = sys.argv[1], int(sys.argv[2])
print("hello from", mode, flush=True)
if mode == "dies":
    sys.exit("no such model")
if mode == "stubborn":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if mode != "alone":
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    print("child", child.pid, flush=True)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()
if mode != "silent":
    http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
time.sleep(600)
"""


@pytest.fixture
def stand_in(monkeypatch, tmp_path):
    """Let `Servers` start something else than vLLM."""
    script = tmp_path / "server.py"
    script.write_text(SERVER)

    def start(mode: str, count: int = 1, **options: Any) -> Servers:
        def words(config, model, host, port, **_):
            return [sys.executable, str(script), mode, str(port)]

        monkeypatch.setattr(_servers, "command", words)
        monkeypatch.setattr(_servers.importlib.util, "find_spec", lambda name: object())
        return Servers(vllm_server.Config(), "m", free_ports(count), **options)

    return start


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("mode", ["answers", "stubborn"])
def test_servers_are_waited_for_and_ended_with_their_workers(stand_in, monkeypatch, mode):
    if mode == "stubborn":
        # It does not listen to SIGTERM: killed when the wait is over.
        wait = subprocess.Popen.wait
        monkeypatch.setattr(
            subprocess.Popen, "wait", lambda self, timeout=None: wait(self, min(timeout or 10, 0.5))
        )
    servers = stand_in(mode, 2)
    pids = [process.pid for process in servers.processes]
    pids += [int(servers.tail(n).split("child ")[1].split()[0]) for n in range(2)]
    assert all(map(is_running, pids))
    assert [url.startswith("http://127.0.0.1:") for url in servers.urls] == [True, True]
    folder = servers.logs[0].parent
    servers.close()
    deadline = time.monotonic() + 10
    while any(map(is_running, pids)) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not any(map(is_running, pids))
    assert not folder.exists()


@pytest.mark.parametrize(("gpus", "expected"), [(0, "ssww"), (1, "swsw"), (2, "ssww")])
def test_servers_on_one_gpu_start_one_after_the_other(stand_in, monkeypatch, gpus, expected):
    """VLLM measures what it may keep by what is free, before and after."""
    order, popen, wait = [], subprocess.Popen, Servers._wait

    def started(*words, **options):
        order.append("s")
        return popen(*words, **options)

    def waited(self, number, deadline):
        wait(self, number, deadline)
        order.append("w")

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    monkeypatch.setattr(_servers.subprocess, "Popen", started)
    monkeypatch.setattr(Servers, "_wait", waited)
    stand_in("alone", 2).close()
    assert "".join(order) == expected


def test_a_server_that_ends_at_once_says_what_it_wrote(stand_in):
    with pytest.raises(UserError, match=r"(?s)ended with status 1.*no such model"):
        stand_in("dies", 2)


def test_a_server_that_never_answers_is_not_waited_for_forever(stand_in):
    with pytest.raises(UserError, match="did not answer in time"):
        stand_in("silent", wait_s=0.3)


def test_addresses_that_others_reach():
    assert _servers.reachable("127.0.0.1") == "127.0.0.1"
    assert _servers.reachable("10.0.0.3") == "10.0.0.3"
    assert _servers.reachable("::1") == "[::1]"
    assert _servers.reachable("0.0.0.0") == socket.gethostname()  # noqa: S104 - refused
    assert _servers.own_address("127.0.0.1") == "127.0.0.1"


def test_servers_on_gpus_of_their_own_share_none_with_a_trainer():
    assert choose_transfer("auto", 1, 1, "10.0.0.3", is_alone=True) == "nccl"
    assert choose_transfer("auto", 0, 1, "10.0.0.3", is_alone=True) == "folder"
    with pytest.raises(UserError, match="GPUs of their own"):
        choose_transfer("ipc", 1, 1, LOOPBACK, is_alone=True)


def test_several_trainers_keep_a_gpu_each_and_share_no_handles():
    assert choose_transfer("auto", 8, 4, LOOPBACK, trainers=4) == "nccl"
    assert choose_transfer("auto", 8, 5, LOOPBACK, trainers=4) == "folder"
    assert choose_transfer("auto", 8, 8, "10.0.0.3") == "folder"
    with pytest.raises(UserError, match="8 GPUs for 4 trainers and 5 workers"):
        choose_transfer("nccl", 8, 5, LOOPBACK, trainers=4)
    # Handles are of one GPU: not of a server's second, nor of another process's.
    assert choose_transfer("auto", 2, 2, LOOPBACK) == "folder"
    for many in ({"trainers": 2}, {"parallel": 2}):
        assert choose_transfer("auto", 2, 2, LOOPBACK, **many) == "folder"
        with pytest.raises(UserError, match="the one GPU"):
            choose_transfer("ipc", 2, 2, LOOPBACK, **many)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--engine.transfer", "folder"], "folder"),
        (["--engine.transfer", "folder", "--transfer", "auto"], "auto"),
        ([], "auto"),
    ],
)
def test_how_weights_come_is_the_engines_key_unless_the_command_says(
    monkeypatch, checkpoint, words, expected
):
    def start(*_, **options):
        raise UserError("servers", options["transfer"], "none", "")

    monkeypatch.setattr("pipeline.serve.Servers", start)
    with pytest.raises(UserError, match=f"servers: {expected}"):
        main(["--model", str(checkpoint), *words])


def test_which_cluster_is_meant():
    table = ClusterConfig(address="head:6379", cpus=4.0)
    assert cluster_of("", table) == table
    assert cluster_of("", None).address == "auto"
    assert cluster_of("local", table).address == ""
    assert cluster_of("other:1", table).cpus == 4.0
    waits = table.model_copy(update={"wait_s": 60.0})
    assert cluster_of("other:1", waits).wait_s == 60.0
    assert cluster_of("local", waits).wait_s == 0.0
    with pytest.raises(UserError, match="add --cluster"):
        main(["--model", "m", "--host", "node"])


# What `python -m vllm.entrypoints.openai.api_server` is when a folder before the real one says so.
PACKAGE_SERVER = """
import argparse, http.server, os, sys
parser = argparse.ArgumentParser()
parser.add_argument("--host"), parser.add_argument("--port", type=int)
known, _ = parser.parse_known_args()
print("pid", os.getpid(), flush=True)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(f"{os.getpid()} {os.environ.get('OMP_NUM_THREADS')}".encode())
    def log_message(self, *words):
        pass
http.server.HTTPServer((known.host, known.port), Handler).serve_forever()
"""


def asked(url: str) -> tuple[int, str]:
    pid, threads = httpx.get(f"{url}/health", trust_env=False).text.split()
    return int(pid), threads


def said(process: subprocess.Popen[str], words: str) -> str:
    """Read what a process writes to its standard error until it says so."""
    assert process.stderr is not None
    text = ""
    while words not in text:
        line = process.stderr.readline()
        assert line, text
        text += line
    return text


@pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="ray is not installed (pip install -e '.[ray]')"
)
def test_a_cluster_holds_a_server_beside_each_of_its_workers(checkpoint, tmp_path, root):
    """Started, reached, one killed, the rest ended by Ctrl-C."""
    package = tmp_path / "vllm" / "entrypoints" / "openai"
    package.mkdir(parents=True)
    for folder in (package, package.parent, package.parent.parent):
        (folder / "__init__.py").touch()
    (package / "api_server.py").write_text(PACKAGE_SERVER)
    words = ["--model", str(checkpoint), "--servers", "2", "--cluster", "local"]
    process = subprocess.Popen(
        [sys.executable, "-m", "pipeline.serve", *words, "--host", "node"],
        cwd=root,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )
    assert process.stdout is not None
    assert process.stderr is not None
    try:
        text = said(process, "ready; logs: ")
        assert "run code as this user" in text
        table = ""
        while "urls" not in table or "]\n" not in table.partition("urls")[2]:
            line = process.stdout.readline()
            assert line, text
            table += line
        engine = tomllib.loads(table)["engine"]
        urls = vllm_server.Config(**engine).urls
        assert len(set(urls)) == 2
        assert not any(is_loopback(urlsplit(url).hostname or "") for url in urls)
        found = [asked(url) for url in urls]
        assert len({pid for pid, _ in found}) == 2
        assert {threads for _, threads in found} == {"1"}  # the cores that Ray gave
        os.kill(found[0][0], signal.SIGKILL)
        text = said(process, "ended with status -9")
        assert urls[0] in text
        assert f"pid {found[0][0]}" in said(process, "pid")  # its last lines
        assert asked(urls[1]) == found[1]
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does on Ctrl-C
        assert "ending the servers" in said(process, "ending")
        assert process.wait(60) == 0
        assert not is_running(found[1][0])
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        process.stderr.close()


def test_servers_end_when_their_starter_is_killed(stand_in, tmp_path, root):
    """No process outlives a SIGKILL of the one that started it."""
    script = tmp_path / "server.py"
    code = f"""
import sys, time
from pipeline.engines import _servers, vllm_server
words = [sys.executable, {str(script)!r}, "alone"]
_servers.command = lambda c, m, h, port, **_: [*words, str(port)]
_servers.importlib.util.find_spec = lambda name: object()
s = _servers.Servers(vllm_server.Config(), "m", _servers.free_ports(1))
print(s.processes[0].pid, flush=True)
time.sleep(600)
"""
    starter = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=root,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(tmp_path)},  # its logs outlive it
    )
    assert starter.stdout is not None
    pid = int(starter.stdout.readline())
    assert is_running(pid)
    starter.send_signal(signal.SIGKILL)
    starter.wait()
    starter.stdout.close()
    deadline = time.monotonic() + 10
    while is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not is_running(pid)


# The control calls of weight transfers.


class Client:
    def __init__(self, meeting: threading.Barrier):
        self.calls: list[Any] = []
        self.meeting = meeting

    def init_weight_transfer_engine(self, init_info):
        # As NCCL does: nobody goes on before all are there.
        self.meeting.wait(5)
        self.calls.append(("init", init_info))

    def start_weight_update(self):
        self.calls.append("start")

    def update_weights(self, update_info):
        self.meeting.wait(5)
        self.calls.append(("update", update_info))

    def finish_weight_update(self, weight_version=None):
        self.calls.append(("finish", weight_version))


def test_all_servers_join_at_once_with_ranks_of_their_own():
    meeting = threading.Barrier(3)
    clients = [Client(meeting) for _ in range(3)]
    together = Together(clients, [2, 1, 4])
    together.init_weight_transfer_engine({"rank_offset": 1, "world_size": 8})
    together.start_weight_update()
    together.update_weights({"names": ["w"]})
    together.finish_weight_update()
    offsets = [client.calls[0][1]["rank_offset"] for client in clients]
    assert offsets == [1, 3, 4]  # the trainer is rank 0; 2, 1 and 4 workers follow
    for client in clients:
        assert client.calls[1:] == ["start", ("update", {"names": ["w"]}), ("finish", None)]
    ipc = [Client(threading.Barrier(1))]
    Together(ipc, [1]).init_weight_transfer_engine({"packed": True})
    assert ipc[0].calls == [("init", {"packed": True})]


def test_the_engine_in_process_is_called_as_vllm_wants():
    class Llm:
        def __init__(self):
            self.calls = []

        def __getattr__(self, name):
            return lambda *arguments: self.calls.append((name, *arguments))

    llm = Llm()
    client = OfflineClient(llm)
    client.init_weight_transfer_engine({"packed": True})
    client.start_weight_update()
    client.update_weights({"names": []})
    client.finish_weight_update()
    assert llm.calls == [
        ("init_weight_transfer_engine", {"init_info": {"packed": True}}),
        ("start_weight_update",),
        ("update_weights", {"update_info": {"names": []}}),
        ("finish_weight_update", None),
    ]


class LosesItsLog:
    """A worker whose node's temporary files were tidied away."""

    def look(self) -> None:
        raise FileNotFoundError(2, "No such file or directory", "server-8000.log")


@pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="ray is not installed (pip install -e '.[ray]')"
)
def test_a_worker_that_cannot_tell_of_its_server_is_named(recwarn):
    ray = import_ray()
    leave = connect(ClusterConfig(workers=1))
    try:
        fleet = Fleet.__new__(Fleet)  # as it is when its servers run
        fleet._ray, fleet._lost, fleet._tails = ray, {}, [""]
        fleet.urls, fleet.place = ["http://10.0.0.3:8000"], "10.0.0.3:/tmp/boxed-1"
        fleet._workers = [ray.remote(LosesItsLog).remote()]
        with pytest.raises(UserError, match=r"10\.0\.0\.3:8000: .*server-8000\.log") as error:
            fleet.ended(0)
        assert "boxed-1" in str(error.value)
        assert "Traceback" not in str(error.value)
    finally:
        leave()


class OneCannotTell:
    """Three servers: the first runs a while, the second's worker cannot tell, the third ends."""

    urls = ("http://10.0.0.1:1", "http://10.0.0.2:1", "http://10.0.0.3:1")

    def __init__(self) -> None:
        self.asked = [0, 0, 0]

    def ended(self, number: int) -> str | None:
        self.asked[number] += 1
        if number == 1:
            raise UserError(f"the vLLM server {self.urls[1]}", "cannot tell", "a worker", "mend it")
        return "ended with status 0" if number == 2 or self.asked[0] == 5 else None

    def tail(self, number: int) -> str:
        return f"last words of {number}"


def test_a_server_whose_worker_cannot_tell_is_given_up_and_the_others_run_on(monkeypatch, capsys):
    monkeypatch.setattr("pipeline.serve.time", SimpleNamespace(sleep=lambda seconds: None))
    servers: Any = OneCannotTell()
    with pytest.raises(UserError, match="every server has ended or is lost"):
        _watch(servers)
    assert servers.asked == [5, 1, 1]
    said = capsys.readouterr().err
    assert "lost: the vLLM server http://10.0.0.2:1: cannot tell" in said
    assert said.index("lost: ") < said.index("http://10.0.0.3:1 ended with status 0")
    assert said.endswith("http://10.0.0.1:1 ended with status 0:\nlast words of 0\n")
