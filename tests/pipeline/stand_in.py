"""A small real HTTP server with the endpoints of a vLLM server, and faults on demand.

It samples from a transformers model, token by token, with the embedded engine's random numbers,
so that its samples are known; what a request asks of the protocol is checked here.
"""

from __future__ import annotations

import json
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import torch
from safetensors.torch import load_file

from pipeline.engines._random import seed_states, uniforms
from pipeline.engines._worker import EXTENSION
from pipeline.model import load_model


class StandIn:
    """One server on a free port of loopback.

    Faults:
        fail: Answers of 503 that each sample gets before its own.
        die_after: Samples after which it breaks every connection and answers nothing more.
        deaf: Says that it has taken new weights, and has not.
        hides: Endpoints that it has not.
        answer: Changes a sample's answer.
    """

    def __init__(self, model: Path, **faults: Any):
        self.path = model
        self.model = load_model(model)
        config = json.loads((model / "generation_config.json").read_text())
        ends = config["eos_token_id"]
        self.ends = set(ends if isinstance(ends, list) else [ends])
        self.context = self.model.config.max_position_embeddings
        self.fail, self.die_after, self.deaf = 0, 10**9, False
        self.hides: tuple[str, ...] = ()
        self.answer = lambda choice: choice
        self.info = {
            "model_config": {"logprobs_mode": "processed_logprobs", "dtype": "torch.float32"},
            "parallel_config": {"worker_extension_cls": EXTENSION},
            "device_config": {"device": "cpu"},
            "weight_transfer_config": None,
        }
        for name, value in faults.items():
            setattr(self, name, value)
        self.version, self.paused, self.dead = "default", False, False
        self.calls: list[str] = []
        self.served: Counter[int] = Counter()
        self.tried: Counter[int] = Counter()
        self.loaded: list[set[str]] = []
        self.lock = threading.Lock()
        self.start(0)

    def start(self, port: int) -> None:
        handler = type("Handler", (_Handler,), {"owner": self})
        self.http = _Server(("127.0.0.1", port), handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"
        self.thread = threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True)
        self.thread.start()

    def stop(self) -> None:
        self.dead = True
        self.http.shutdown()
        self.http.server_close()

    def restart(self) -> None:
        """Come back on the same port as a new process would: with its first weights."""
        port = self.http.server_address[1]
        self.model, self.version, self.dead = load_model(self.path), "default", False
        self.die_after = 10**9
        self.start(int(port))

    def load(self, folder: str) -> None:
        if self.deaf and self.loaded:
            return
        tensors = load_file(Path(folder) / "model.safetensors")
        self.loaded.append(set(tensors))
        self.model.load_state_dict(tensors, strict=False)
        self.model.tie_weights()

    @torch.no_grad()
    def sample(self, body: dict[str, Any]) -> dict[str, Any]:
        given = body["sampling_params"]
        assert given["n"] == 1
        assert given["logprobs"] == 0
        ids, found, logprobs = list(body["token_ids"]), [], []
        reason = "length"
        while len(found) < given["max_tokens"]:
            logits = self.model(input_ids=torch.tensor([ids + found])).logits[0, -1]
            if given["temperature"] == 0:
                logp = torch.log_softmax(logits, -1)
                token = int(logp.argmax())
            else:
                logp = torch.log_softmax(logits / given["temperature"], -1)
                mass = torch.cumsum(logp.double().exp(), -1)
                state = seed_states(torch.tensor([given["seed"]]))
                point = float(uniforms(state, torch.tensor([len(found)]))) * float(mass[-1])
                token = int((mass <= point).sum())
            found.append(token)
            logprobs.append({"token_id": token, "logprob": float(logp[token])})
            if token in self.ends:
                reason = "stop"
                break
        choice = {
            "token_ids": found,
            "finish_reason": reason,
            "logprobs": {"content": logprobs},
            "weight_versions": [{"version": self.version, "start": 0, "end": len(found)}],
        }
        return {"choices": [self.answer(choice)]}


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    # As many as ask at once.
    request_queue_size = 256

    def handle_error(self, request, client_address):
        """A client that went away is no matter."""


class _Handler(BaseHTTPRequestHandler):
    owner: StandIn
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        self._answer(None)

    def do_POST(self):
        length = int(self.headers.get("Content-Length", 0))
        self._answer(json.loads(self.rfile.read(length) or b"null"))

    def _answer(self, body):
        owner = self.owner
        if owner.dead:
            self.close_connection = True
            return
        split = urlsplit(self.path)
        path, query = split.path, parse_qs(split.query)
        if path in owner.hides:
            self._send(404, {"error": "not found"})
            return
        if path == "/inference/v1/generate":
            self._generate(body)
            return
        owner.calls.append(path.removeprefix("/"))
        reply: Any = {}
        if path == "/v1/models":
            reply = {"data": [{"id": "m", "max_model_len": owner.context}]}
        elif path == "/server_info":
            reply = {"vllm_config": owner.info}
        elif path == "/get_world_size":
            reply = {"world_size": 1}
        elif path == "/pause":
            assert query["mode"] == ["wait"]
            owner.paused = True
        elif path == "/collective_rpc":
            assert owner.paused
            assert body["method"] == "renew"
            try:
                owner.load(body["kwargs"]["weights_path"])
            except OSError as error:
                self._send(500, {"error": str(error)})
                return
        elif path == "/reset_prefix_cache":
            reply = {"success": True}
        elif path == "/update_weight_version":
            owner.version = body["new_version"]
        elif path == "/resume":
            owner.paused = False
        else:
            assert path == "/health"
        self._send(200, reply)

    def _generate(self, body):
        owner = self.owner
        seed = body["sampling_params"]["seed"]
        with owner.lock:
            owner.tried[seed] += 1
            if owner.tried[seed] <= owner.fail:
                self._send(503, {"error": "overloaded"})
                return
            if sum(owner.served.values()) >= owner.die_after:
                owner.dead = True
            if owner.dead:
                self.close_connection = True
                return
            if len(body["token_ids"]) + body["sampling_params"]["max_tokens"] > owner.context:
                self._send(400, {"error": "longer than the context"})
                return
            assert not owner.paused
            reply = owner.sample(body)
            owner.served[seed] += 1
        self._send(200, reply)

    def _send(self, status, value):
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
