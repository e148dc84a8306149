"""vLLM servers on the nodes of a Ray cluster: started, watched and ended from one place.

Each server is an ordinary process beside a Ray worker, which starts it, looks after it and takes
its cores and GPUs from the cluster's count; `tensor_parallel` GPUs where the cluster has any. Ray
chooses the nodes, as far apart as they can be. Who started them holds them: whether it ends or is
killed, Ray ends the workers, and the servers end with those.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from data_prep.cluster import ClusterConfig, connect, import_ray, start_with_room
from data_prep.errors import UserError
from pipeline.engines._servers import Servers, Transfer, free_ports, is_loopback
from pipeline.engines._vllm import VllmConfig

# Stands for the address by which a node is known in the cluster.
NODE = "node"
# Longest wait for a worker's word about its server.
ANSWER_S = 30.0
Found = TypeVar("Found")


class Fleet:
    """Some servers of one model, each beside a Ray worker; asked as `Servers` is.

    Args:
        cluster: Where; `workers` and `gpus` follow from the servers. One that starts machines by
            itself may have no GPU yet: with `wait_s`, its `gpus` above 0 say that it will.
        config: vLLM's settings.
        model: A model folder that every node sees under the same path, or a hub id.
        ports: One a server; 0 takes one that is free there.
        host: Address to listen on; "node" takes each node's own in the cluster.
        transfer: How weights will come; "auto" takes NCCL where there are GPUs.
        wait_s: Longest wait for all servers to answer.
        say: Told what happens.

    Attributes:
        urls: Addresses, in the order of the ports.
        place: Where the servers write what they say.
    """

    def __init__(
        self,
        cluster: ClusterConfig,
        config: VllmConfig,
        model: str | Path,
        ports: list[int],
        *,
        host: str,
        transfer: Transfer,
        wait_s: float,
        say: Callable[[str], None],
    ) -> None:
        """Start all of them, then wait until each answers.

        Raises:
            UserError: The cluster cannot be reached or has no room, a server is on another machine
                and would listen on loopback, or it ended or did not answer in time.
        """
        self._ray = ray = import_ray()
        cluster = cluster.model_copy(update={"workers": len(ports)})
        self._leave = connect(cluster)
        self._workers: list[Any] = []
        self.urls: list[str] = []
        self._tails = [""] * len(ports)
        self._lost: dict[int, str] = {}
        try:
            will_have = cluster.wait_s > 0 and cluster.gpus > 0
            has_gpus = will_have or ray.cluster_resources().get("GPU", 0.0) > 0
            gpus = config.tensor_parallel if has_gpus else 0
            remote = ray.remote(
                num_cpus=cluster.cpus,
                num_gpus=gpus,
                scheduling_strategy="SPREAD",
                max_restarts=0,
            )(_Keeper)

            def start() -> None:
                self._workers = [remote.remote() for _ in ports]

            start_with_room(ray, cluster, gpus, start)
            deadline = time.monotonic() + wait_s
            nodes = self._all([worker.node.remote() for worker in self._workers], deadline)
            here = ray.get_runtime_context().get_node_id()
            for number, (node, address) in enumerate(nodes):
                if is_loopback(host) and node != here:
                    raise UserError(
                        "--host",
                        f"{host}, and server {number + 1} of {len(ports)} is to run on {address}, "
                        "another machine",
                        "an address that the trainer reaches",
                        f"--host {NODE} listens on each node's own address in the cluster, which "
                        "has to be a network of one's own",
                    )
            own = str(Path(model).resolve()) if Path(model).is_dir() else str(model)
            say(f"starting {len(ports)} vLLM servers on {', '.join(a for _, a in nodes)}")
            left = deadline - time.monotonic()
            starts = [
                worker.start.remote(
                    config, own, port, address if host == NODE else host, transfer, left
                )
                for worker, port, (_, address) in zip(self._workers, ports, nodes, strict=True)
            ]
            found = self._all(starts, deadline + ANSWER_S)
        except BaseException:
            self.close()
            raise
        self.urls = [url for url, _, _ in found]
        self.transfer = found[0][1]
        logs = [f"{address}:{log}" for (_, _, log), (_, address) in zip(found, nodes, strict=True)]
        self.place = ", ".join(dict.fromkeys(logs))

    def ended(self, number: int) -> str | None:
        """Return how a server ended; None while it runs.

        Raises:
            UserError: Its worker cannot tell.
        """
        if number in self._lost:
            return self._lost[number]
        exceptions = self._ray.exceptions
        try:
            status, self._tails[number] = self._ray.get(
                self._workers[number].look.remote(), timeout=ANSWER_S
            )
        except exceptions.RayActorError as error:
            status = "ended with its Ray worker"
            self._tails[number] = str(error).strip().splitlines()[0]
        except exceptions.GetTimeoutError:
            return None  # a busy node; one that is gone is told by Ray
        except exceptions.RayError as error:
            cause = getattr(error, "cause", None) or error
            raise UserError(
                f"the vLLM server {self.urls[number]}",
                f"its Ray worker cannot look after it: {type(cause).__name__}: {cause}",
                "a worker that tells whether its server runs",
                f"mend that (its node's disk and folder of temporary files; {self.place}) and "
                "start the servers again",
            ) from None
        if status is not None:
            self._lost[number] = status
        return status

    def tail(self, number: int) -> str:
        """Return the last lines that a server wrote, as far as they were seen."""
        return self._tails[number]

    def close(self) -> None:
        """End the servers: asked first, killed with their workers when that takes too long."""
        # A worker that is waiting for its server's start hears nothing.
        asked = [worker.close.remote() for worker in self._workers if self.urls]
        if asked:
            with suppress(Exception):  # those of lost nodes
                self._ray.wait(asked, num_returns=len(asked), timeout=20.0)
        for worker in self._workers:
            self._ray.kill(worker)
        self._workers.clear()
        self._leave()

    def _all(self, asked: list[Any], deadline: float) -> list[Any]:
        """Return what all workers answer; raise what the first one raises that fails.

        Raises:
            UserError: A worker failed, or not all have answered in time.
        """
        exceptions = self._ray.exceptions
        left = list(asked)
        while left:
            wait = max(0.0, deadline - time.monotonic())
            done, left = self._ray.wait(left, num_returns=1, timeout=wait)
            if not done:
                raise UserError(
                    "--cluster",
                    f"{len(left)} of {len(asked)} servers' workers did not start in time",
                    "free cores and GPUs on the cluster",
                    "see `ray status` for who has them, or raise --start-s",
                )
            try:
                self._ray.get(done)
            except exceptions.RayTaskError as error:
                raise getattr(error, "cause", None) or error from None
            except exceptions.RayActorError as error:
                raise UserError(
                    "--cluster",
                    f"a server's worker ended: {error}",
                    "workers that live",
                    "look at the memory of the machines",
                ) from None
        return self._ray.get(asked)


class _Keeper:
    """Starts and holds a server on its node."""

    def __init__(self) -> None:
        self._servers: Servers | None = None

    def node(self) -> tuple[str, str]:
        """Return its node's id and address."""
        ray = import_ray()
        return ray.get_runtime_context().get_node_id(), ray.util.get_node_ip_address()

    def start(
        self,
        config: VllmConfig,
        model: str,
        port: int,
        host: str,
        transfer: Transfer,
        wait_s: float,
    ) -> tuple[str, str, str]:
        """Return the server's address, how weights come, and where it writes."""
        self._servers = Servers(
            config,
            model,
            [port or free_ports(1, host)[0]],
            host=host,
            transfer=transfer,
            wait_s=wait_s,
            is_alone=True,
        )
        return self._servers.urls[0], self._servers.transfer, self._servers.place

    def look(self) -> tuple[str | None, str]:
        """Return how the server ended, None while it runs, and its last lines."""
        if self._servers is None:
            return None, ""
        return self._servers.ended(0), self._servers.tail(0)

    def close(self) -> None:
        """End the server."""
        if self._servers is not None:
            self._servers.close()
            self._servers = None
