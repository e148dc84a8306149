"""Start vLLM servers for `engine.kind = "vllm_server"`, until Ctrl-C.

    python -m pipeline.serve --model runs/cpu/sft/checkpoint --servers 2
    python -m pipeline.serve --config pipeline/configs/gsm8k_gpu.toml --model … --servers 2

    python -m pipeline.serve --model … --servers 8 --cluster auto --host node

Prints the `[engine]` table for a configuration. With `--config` the settings of that file's own
`[engine]` table are taken; `--engine.KEY VALUE` changes one. The model only has to have the shape
of the one to be sampled from: a stage pushes its own weights when it begins.

The servers have endpoints that load weights and run code. They listen on loopback; `--host`
names another address, for a network of one's own alone.

With more GPUs than the servers take, the first is left to the trainer and weights travel by NCCL;
on the only GPU, which all share, by CUDA IPC; otherwise through a folder. `CUDA_VISIBLE_DEVICES`
says which GPUs there are.

`--cluster ADDRESS` spreads the servers over the nodes of a Ray cluster ("auto" for the one that
this machine belongs to, "local" for one that begins and ends with the servers); without ADDRESS
that of the configuration's `[cluster]`, whose `cpus` are a server's cores. A server takes
`engine.tensor_parallel` GPUs where the cluster has any, so start Ray without the trainer's:
`CUDA_VISIBLE_DEVICES=1,2,3 ray start …`. On several machines `--host node` lets each server listen
on its node's own address in the cluster; weights travel by NCCL, without GPUs through a folder that
all share (`engine.folder`).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tomli_w

from data_prep.arguments import Arguments, at_least, unknown_argument
from data_prep.cluster import ClusterConfig
from data_prep.config import validate
from data_prep.errors import UserError, command
from pipeline.config import load_run
from pipeline.engines import EngineConfig
from pipeline.engines._fleet import NODE, Fleet
from pipeline.engines._servers import LOOPBACK, Servers, free_ports, is_loopback
from pipeline.engines._vllm import VllmConfig
from pipeline.engines.vllm_server import Config
from pipeline.plan import check_model_name
from verifiers.plain import plain


def settings(table: dict[str, Any], words: list[str], options: Sequence[str] = ()) -> Config:
    """Return the engine's settings.

    Args:
        table: Of a configuration's `[engine]`, of whatever kind.
        words: `--engine.KEY VALUE` pairs from the command line.
        options: The other options, to suggest from.

    Raises:
        UserError: An argument is not of that form, or a key or value is wrong.
    """
    # Of another engine's table only what every engine means alike.
    model = VllmConfig if str(table.get("kind", "")).startswith("vllm") else EngineConfig
    known = {key: value for key, value in table.items() if key in model.model_fields}
    pairs = [word for argument in words for word in argument.split("=", 1)]
    if len(pairs) % 2:
        raise UserError(
            "command line", f"{pairs[-1]!r} without a value", "--engine.KEY VALUE", "mend it"
        )
    for option, value in zip(pairs[::2], pairs[1::2], strict=True):
        if not option.startswith("--engine."):
            raise unknown_argument(option, options, "--engine.KEY VALUE")
        known[option.removeprefix("--engine.").replace("-", "_")] = value
    return validate(Config, {**known, "kind": "vllm_server"}, "command line")


def main(arguments: list[str]) -> None:
    """Command line."""
    parser = Arguments("python -m pipeline.serve", __doc__)
    parser.add_argument("--model", required=True, help="model folder or hub id")
    parser.add_argument("--servers", type=at_least(1), default=1, help="how many")
    parser.add_argument(
        "--port", type=at_least(0), default=0, help="of the first (default: free ones)"
    )
    parser.add_argument(
        "--host", default=LOOPBACK, help='address to listen on; "node" for each node\'s own'
    )
    parser.add_argument(
        "--cluster", nargs="?", const="", metavar="ADDRESS", help="spread over a Ray cluster"
    )
    parser.add_argument("--config", help="a run's TOML, whose [engine] table is taken")
    parser.add_argument("--transfer", choices=["auto", "folder", "ipc", "nccl"], help="of weights")
    parser.add_argument("--start-s", type=float, default=600.0, help="longest wait for a start")
    known, rest = parser.parse_known_args(arguments)
    run = load_run(known.config) if known.config else None
    config = settings(run.engine.model_dump() if run else {}, rest, parser.options())
    if known.host == NODE and known.cluster is None:
        raise UserError("--host", f"{NODE!r} without --cluster", "an address", "add --cluster")
    # The nodes of a cluster may hold what this machine does not; a GGUF file is a model too.
    if known.cluster is None and not Path(known.model).is_file():
        check_model_name(known.model, "command line, --model")
    if not is_loopback(known.host):
        where = "their nodes' addresses" if known.host == NODE else known.host
        _say(
            f"warning: the servers listen on {where}; whoever reaches them can replace the "
            "model and run code as this user"
        )
    ports = [known.port + number if known.port else 0 for number in range(known.servers)]
    options = {
        "host": known.host,
        "transfer": known.transfer or config.transfer,
        "wait_s": known.start_s,
        "say": _say,
    }
    if known.cluster is None:
        ports = ports if known.port else free_ports(known.servers)
        servers = Servers(config, known.model, ports, **options)
    else:
        cluster = cluster_of(known.cluster, run.cluster if run else None)
        servers = Fleet(cluster, config, known.model, ports, **options)
    try:
        chosen = config.model_dump(mode="json", exclude_defaults=True)
        chosen = {"kind": "vllm_server", "urls": servers.urls, **chosen}
        print(tomli_w.dumps({"engine": chosen}), flush=True)
        _say(f"ready; logs: {servers.place}; Ctrl-C ends the servers")
        _watch(servers)
    except KeyboardInterrupt:
        _say("ending the servers")
    finally:
        servers.close()


def cluster_of(address: str, table: ClusterConfig | None) -> ClusterConfig:
    """Return the cluster that servers are spread over.

    Args:
        address: Of it; "local" for a new one on this machine, empty for the table's.
        table: The configuration's; None where it has none.
    """
    found = table or ClusterConfig(address="auto")
    if not address:
        return found
    if address == "local":  # which no machine will join
        return found.model_copy(update={"address": "", "wait_s": 0.0})
    return found.model_copy(update={"address": address})


def _watch(servers: Servers | Fleet) -> None:
    """Wait until every server has ended; tell of each.

    One whose worker cannot tell is given up, and ends with the others.

    Raises:
        UserError: All have.
    """
    running = set(range(len(servers.urls)))
    while running:
        for number in sorted(running):
            try:
                status = servers.ended(number)
            except UserError as error:
                running.remove(number)
                _say(f"lost: {plain(error)}")
                continue
            if status is not None:
                running.remove(number)
                _say(f"{servers.urls[number]} {status}:\n{servers.tail(number)}")
        time.sleep(0.5)
    raise UserError(
        "python -m pipeline.serve",
        "every server has ended or is lost",
        "servers that run until Ctrl-C",
        "see above what they said last; python -m pipeline.doctor checks vLLM and the GPU",
    )


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    command(main)
