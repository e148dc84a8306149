"""Any number of vLLM servers over HTTP: token ids in, token ids and log-probs out.

Without `urls` the engine starts servers of its own on loopback and ends them with itself, so
that `kind = "vllm_server"` is all a configuration needs. `python -m pipeline.serve` starts
servers that outlive a stage and prints their `urls`.

A sample is one request with its own hashed seed; what vLLM promises about seeds stands in
`_vllm.py`. Requests that fail are tried again after a growing wait. A server that goes on failing
is given up: the samples that it had not returned go to the others, so that none is lost and none
is taken twice, and it is asked again at the next push. Every answer names the weights that made
it; a server that answers with others (it was restarted, or another run pushes to it) is given up.

Weights come by `transfer`:

* "folder": safetensors in a folder that the servers read (CPU and GPU).
* "nccl": one broadcast to all servers, which run on other GPUs than the trainer.
* "ipc": CUDA IPC handles, for servers on the trainer's own GPU.

Around every push the servers are paused, their prefix caches emptied, and the version set that
their answers will name.

Tried: "folder" on CPUs. Written and not yet run: everything on a GPU.
"""

from __future__ import annotations

import asyncio
import shutil
import sys
import tempfile
import uuid
from collections.abc import Awaitable, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar, Literal
from urllib.parse import urlsplit

import httpx
import torch
from pydantic import Field
from safetensors.torch import save_file
from tenacity import (
    AsyncRetrying,
    retry_if_exception,
    stop_after_attempt,
    wait_random_exponential,
)
from tqdm import tqdm

from data_prep.errors import UserError
from pipeline.engines import Completion, Group, Prompt, Sampling, sample_seed
from pipeline.engines._address import Address
from pipeline.engines._balance import Job, spread
from pipeline.engines._servers import (
    LOOPBACK,
    Servers,
    free_ports,
    is_loopback,
    own_address,
)
from pipeline.engines._vllm import LOGPROBS_MODE, VllmConfig, refusal, sampling_values
from pipeline.engines._worker import EXTENSION
from pipeline.launch import launched
from pipeline.model import load_tokenizer
from verifiers.plain import plain

START = "start it with `python -m pipeline.serve`, or without `urls` let this engine start its own"


class Config(VllmConfig):
    """Settings of the engine.

    Attributes:
        urls: Running servers, such as "http://127.0.0.1:8000"; empty starts `servers` of them.
        servers: How many to start where there are no `urls`.
        transfer: How weights come, see above; "auto" takes what the servers were started for.
        folder: Where "folder" puts weights; the servers must read the same path. Empty takes
            this machine's memory disk, which serves servers on this machine alone.
        timeout_s: Longest wait for one sample, and for new weights.
        start_s: Longest wait for a server to start.
        retries: Further tries of a request that failed, before its server is given up.
    """

    # What may change without another result: they take no part in a stage's plan.
    incidental: ClassVar[frozenset[str]] = frozenset(
        {"urls", "servers", "transfer", "folder", "timeout_s", "start_s", "retries"}
        | VllmConfig.incidental
    )

    among: ClassVar[Literal["each", "leader", "alone"]] = "leader"

    kind: str = "vllm_server"
    urls: tuple[Address, ...] = ()
    servers: int = Field(default=1, ge=1)
    transfer: Literal["auto", "folder", "ipc", "nccl"] = "auto"
    folder: str = ""
    timeout_s: float = Field(default=600.0, gt=0.0)
    start_s: float = Field(default=600.0, gt=0.0)
    retries: int = Field(default=4, ge=0)


class Unwell(Exception):
    """A server failed in a way that another try, or another server, may mend."""


class OtherWeights(Unwell):
    """A server answered with weights that are not this engine's."""


class Server:
    """One server as this engine sees it.

    Attributes:
        url: Its address.
        alive: Whether it is asked.
        trouble: Why it is not.
        context: Longest prompt plus completion, tokens.
        workers: Processes that hold its model.
        backend: Weight transfer that it was started for, or "folder".
        loader: Method of its workers that reads weights from a folder.
    """

    def __init__(self, url: str, timeout_s: float) -> None:
        """Nothing is asked yet."""
        self.url, self.timeout_s = url.rstrip("/"), timeout_s
        self.alive, self.trouble = True, ""
        self.context, self.workers, self.backend = 0, 1, "folder"
        self.loader = "reload_weights"

    def inspect(self, dtype: str) -> None:
        """Read what the server is, and refuse one that cannot serve.

        Raises:
            UserError: It does not answer, or was started without what is needed.
        """
        try:
            found = self.call("GET", "/v1/models")["data"][0]
            info = self.call("GET", "/server_info", params={"config_format": "json"})["vllm_config"]
            self.workers = self.call("GET", "/get_world_size")["world_size"]
        except Unwell as error:
            where = f"the vLLM server {self.url}"
            raise UserError(where, str(error), "a running server", START) from None
        self.context = int(found["max_model_len"])
        self.backend = (info.get("weight_transfer_config") or {}).get("backend", "folder")
        found = info["model_config"] | info["parallel_config"]
        needed = {"logprobs_mode": LOGPROBS_MODE, "dtype": f"torch.{dtype}"}
        if info["device_config"]["device"] == "cpu":
            needed["worker_extension_cls"] = EXTENSION
        self.loader = "renew" if found["worker_extension_cls"] == EXTENSION else "reload_weights"
        for key, expected in needed.items():
            if found[key] != expected:
                raise UserError(
                    f"the vLLM server {self.url}",
                    f"{key} is {found[key]!r}",
                    f"{expected!r}",
                    START if key != "dtype" else f"{START}; or set engine.dtype as the server's",
                )

    def call(self, method: str, path: str, **options: Any) -> Any:
        """Make a control call and return its JSON.

        Raises:
            Unwell: No answer, or one of failure.
            UserError: The server has no such endpoint.
        """
        timeout = options.pop("timeout", self.timeout_s)
        try:
            with httpx.Client(trust_env=False, timeout=timeout) as client:
                reply = client.request(method, self.url + path, **options)
        except httpx.HTTPError as error:
            raise Unwell(f"{method} {path}: {type(error).__name__}: {error}") from None
        return self.read(reply, path)

    def read(self, reply: httpx.Response, path: str) -> Any:
        """Return a reply's JSON.

        Raises:
            Unwell: The server says that it failed, or what it says is no JSON.
            UserError: The server has no such endpoint, or lets nobody in.
        """
        if reply.status_code in (401, 403, 404):
            raise UserError(
                f"the vLLM server {self.url}",
                f"{path} answers {reply.status_code}: {reply.text[:200]}",
                "a server with VLLM_SERVER_DEV_MODE=1 and --enable-scale-out",
                START,
            )
        if reply.status_code != 200:
            raise Unwell(f"{path} answers {reply.status_code}: {reply.text[:500]}")
        try:
            return reply.json()
        except ValueError:
            raise Unwell(f"{path} answers no JSON: {reply.text[:100]!r}") from None

    def is_healthy(self) -> bool:
        """Return whether it answers."""
        try:
            with httpx.Client(trust_env=False, timeout=5.0) as client:
                return client.get(f"{self.url}/health").status_code == 200
        except httpx.HTTPError:
            return False

    def reload(self, folder: str) -> None:
        """Let it read weights from a folder or hub id.

        Raises:
            Unwell: It could not.
        """
        body = {"method": self.loader, "kwargs": {"weights_path": folder}}
        self.call("POST", "/collective_rpc", json=body)

    def pause(self) -> None:
        """Let running requests end and hold new ones back."""
        self.call("POST", "/pause", params={"mode": "wait"})

    def resume(self, version: str) -> None:
        """Empty the prefix cache, name the weights and go on.

        Raises:
            Unwell: The cache was not emptied.
        """
        if not self.call("POST", "/reset_prefix_cache")["success"]:
            raise Unwell("the prefix cache was not emptied")
        self.call("POST", "/update_weight_version", json={"new_version": version})
        self.call("POST", "/resume")


class ServerEngine:
    """Samples through vLLM servers.

    Args:
        config: Settings.
        model: A model folder or hub id.
    """

    def __init__(self, config: Config, model: str | Path) -> None:
        """Find or start the servers, and give them the model's weights.

        Raises:
            UserError: There is a server that cannot serve.
        """
        self.config = config
        self.policy_version = 0
        # Tells this engine's pushes from those of others to the same servers.
        self._name = uuid.uuid4().hex[:12]
        self._tokenizer: Any = load_tokenizer(model)
        self._owned: Servers | None = None
        self._transfer: Any = None
        urls = config.urls
        if not urls:
            self._owned = Servers(
                config,
                model,
                free_ports(config.servers),
                transfer=config.transfer,
                wait_s=config.start_s,
                say=lambda text: tqdm.write(text, file=sys.stderr),
            )
            urls = tuple(self._owned.urls)
        self.servers = [Server(url, config.timeout_s) for url in urls]
        try:
            for server in self.servers:
                server.inspect(config.dtype)
            self.context = min(server.context for server in self.servers)
            source = str(Path(model).resolve()) if Path(model).is_dir() else str(model)
            self._each(self.servers, lambda s: self._renew(s, lambda: s.reload(source)))
            self._require_one()
        except BaseException:
            self.close()
            raise

    def generate(self, prompts: list[Prompt], sampling: Sampling) -> list[Group]:
        """Return one group a prompt, in order.

        Raises:
            UserError: No server is left.
        """
        groups = [Group(prompt) for prompt in prompts]
        jobs: list[list[Job]] = []
        for number, group in enumerate(groups):
            group.error = refusal(group.prompt, self.context)
            if group.error is None:
                jobs.append([(number, index) for index in range(sampling.n)])
        if not jobs:
            return groups
        answers = asyncio.run(self._ask_all(jobs, prompts, sampling))
        self._require_one()
        for group_jobs in jobs:
            group = groups[group_jobs[0][0]]
            found = [answers[job] for job in group_jobs]
            refused = next((answer for answer in found if isinstance(answer, str)), None)
            if refused is not None:
                group.error = refused
            else:
                group.completions = [a for a in found if not isinstance(a, str)]
        return groups

    async def _ask_all(
        self, jobs: list[list[Job]], prompts: list[Prompt], sampling: Sampling
    ) -> dict[Job, Completion | str]:
        alive = [server for server in self.servers if server.alive]
        width = self.config.max_sequences
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=width)
        timeout = httpx.Timeout(self.config.timeout_s, connect=10.0)
        async with httpx.AsyncClient(trust_env=False, limits=limits, timeout=timeout) as client:

            async def ask(server: Server, job: Job) -> Completion | str:
                number, index = job
                return await self._with_retries(
                    server, lambda: self._ask(client, server, prompts[number], index, sampling)
                )

            return await spread(jobs, alive, width, ask, Unwell, self._give_up)

    async def _with_retries(
        self, server: Server, ask: Callable[[], Awaitable[Completion | str]]
    ) -> Completion | str:
        retrying = AsyncRetrying(
            stop=stop_after_attempt(1 + self.config.retries),
            wait=wait_random_exponential(multiplier=0.2, max=5.0),
            retry=retry_if_exception(
                lambda error: (
                    isinstance(error, Unwell)
                    and not isinstance(error, OtherWeights)
                    # Others have given it up meanwhile: no use in waiting.
                    and server.alive
                )
            ),
            reraise=True,
        )
        async for attempt in retrying:
            with attempt:
                return await ask()
        raise AssertionError("tenacity ends with a value or an error")

    async def _ask(
        self,
        client: httpx.AsyncClient,
        server: Server,
        prompt: Prompt,
        index: int,
        sampling: Sampling,
    ) -> Completion | str:
        """Return one sample, or why its prompt was refused.

        Raises:
            Unwell: The server failed, or answered with other weights.
        """
        seed = sample_seed(sampling.seed, sampling.step, prompt.id, index)
        body = {
            "token_ids": list(prompt.token_ids),
            "sampling_params": sampling_values(prompt, sampling, seed, self.context),
        }
        path = "/inference/v1/generate"
        try:
            reply = await client.post(server.url + path, json=body)
        except httpx.HTTPError as error:
            raise Unwell(f"{type(error).__name__}: {error}") from None
        if reply.status_code == 400:
            return f"the vLLM server refused the prompt: {reply.text[:300]}"
        choice = server.read(reply, path)["choices"][0]
        if choice["finish_reason"] not in ("stop", "length"):
            raise Unwell(f"the sample ended with {choice['finish_reason']!r}")
        versions = {span["version"] for span in choice["weight_versions"] or []}
        if versions != {self._version}:
            raise OtherWeights(
                f"it answers with the weights {sorted(versions)}, and {self._version!r} were "
                "pushed: it was restarted, or another run pushes to it"
            )
        ids = choice["token_ids"]
        entries = choice["logprobs"]["content"]
        if [entry["token_id"] for entry in entries] != ids:
            raise Unwell("the log-probs are not those of the sampled tokens")
        text = self._tokenizer.decode(ids, skip_special_tokens=True)
        logprobs = [entry["logprob"] for entry in entries]
        return Completion(ids, logprobs, text, choice["finish_reason"], seed)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """Take a policy's parameters, named as in its `state_dict`.

        Raises:
            UserError: No server could take them.
        """
        self.policy_version = version
        for server in self.servers:
            if not server.alive and server.is_healthy():
                server.inspect(self.config.dtype)
                server.alive, server.trouble = True, ""
                self._say(f"{server.url} answers again")
        self._require_one()
        alive = [server for server in self.servers if server.alive]
        backend = alive[0].backend if self.config.transfer == "auto" else self.config.transfer
        if backend == "ipc" and launched().count > 1:
            # vLLM would have all of them hand in handles, and only this one pushes.
            backend = "folder"
        if backend == "folder":
            self._by_folder(alive, weights)
        else:
            self._by_transfer(alive, backend, weights)
        self._require_one()

    def _by_folder(
        self, servers: list[Server], weights: Iterable[tuple[str, torch.Tensor]]
    ) -> None:
        tensors: dict[str, torch.Tensor] = {}
        seen: dict[tuple[int, torch.Size], str] = {}
        for name, value in weights:
            kept = value.detach().to("cpu").contiguous()
            # A tied output embedding is its input embedding; vLLM ties it by itself. Told by what
            # is kept: the memory of merged or gathered values on a GPU is the next one's, too.
            if seen.setdefault((kept.data_ptr(), kept.shape), name) == name:
                tensors[name] = kept
        folder = Path(tempfile.mkdtemp(prefix="boxed-weights-", dir=self._folder(tensors)))
        try:
            save_file(tensors, folder / "model.safetensors")
            self._each(servers, lambda s: self._renew(s, lambda: s.reload(str(folder))))
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _folder(self, tensors: dict[str, torch.Tensor]) -> str | None:
        if self.config.folder:
            folder = Path(self.config.folder).absolute()
            folder.mkdir(parents=True, exist_ok=True)
            return str(folder)
        away = [s.url for s in self.servers if not is_loopback(urlsplit(s.url).hostname or "")]
        if away:
            raise UserError(
                "engine.folder",
                f"not set, and {away[0]} may be another machine",
                "a folder that this machine and the servers share",
                "set it, or start the servers for transfer = 'nccl'",
            )
        memory = Path("/dev/shm")  # noqa: S108 - a new folder in it, for this user alone
        size = sum(value.nbytes for value in tensors.values())
        roomy = memory.is_dir() and shutil.disk_usage(memory).free > 2 * size
        return str(memory) if roomy else None

    def _by_transfer(
        self,
        servers: list[Server],
        backend: Any,
        weights: Iterable[tuple[str, torch.Tensor]],
    ) -> None:
        from pipeline.engines._transfer import Together, Transfer, http_client

        if self._transfer is None:
            clients = [http_client(server.url, self.config.timeout_s) for server in servers]
            worlds = [server.workers for server in servers]
            hosts = [urlsplit(server.url).hostname or LOOPBACK for server in servers]
            away = [host for host in hosts if not is_loopback(host)]
            address = own_address(away[0] if away else LOOPBACK)
            self._transfer = Transfer(backend, Together(clients, worlds), sum(worlds), address)
        self._each(servers, Server.pause)
        self._transfer.send([(name, value.detach()) for name, value in weights])
        self._each(servers, lambda server: server.resume(self._version))

    def _renew(self, server: Server, load: Callable[[], None]) -> None:
        server.pause()
        load()
        server.resume(self._version)

    @property
    def _version(self) -> str:
        return f"{self._name}:{self.policy_version}"

    def _each(self, servers: list[Server], act: Callable[[Server], None]) -> None:
        """Do something to all servers at once; give up those that fail."""

        def guarded(server: Server) -> None:
            try:
                act(server)
            except Unwell as error:
                self._give_up(server, error)

        with ThreadPoolExecutor(len(servers)) as pool:
            list(pool.map(guarded, servers))

    def _give_up(self, server: Server, error: Exception) -> None:
        if server.alive:
            server.alive, server.trouble = False, str(error)
            self._say(f"{server.url} is given up: {error}")

    def _require_one(self) -> None:
        if any(server.alive for server in self.servers):
            return
        told = "; ".join(f"{server.url}: {server.trouble}" for server in self.servers)
        if self._owned is not None:
            told += "\n" + "\n".join(self._owned.tail(i) for i in range(len(self.servers)))
        raise UserError(
            "vllm_server",
            f"no server is left: {told}",
            "at least one that answers",
            "look at what they wrote; the same command goes on from the last state",
        )

    def _say(self, text: str) -> None:
        tqdm.write(plain(f"warning: {text}"), file=sys.stderr)

    def close(self) -> None:
        """Leave the servers; end those that this engine started."""
        if self._transfer is not None:
            self._transfer.close()
        if self._owned is not None:
            self._owned.close()
            self._owned = None


def create(config: Config, model: str | Path) -> ServerEngine:
    """Return the engine."""
    return ServerEngine(config, model)
