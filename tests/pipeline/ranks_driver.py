"""Trains stages in several processes, one after the other in the same ones: starting is slow.

    RANK=0 WORLD_SIZE=2 MASTER_ADDR=… python tests/pipeline/ranks_driver.py JOBS.json

A job: config, stage, parallel, port, `stop`, the number of steps after whose saved state the
processes stop as if they were killed (0 for never), and `interrupt`, that of those after which the
first process alone gets Ctrl-C while it saves. With a world of one it trains alone.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist

import pipeline.train
from pipeline.config import load_run
from pipeline.state import save_state

torch.set_num_threads(1)


class Stopped(Exception):
    """The processes stop here."""


def run(job: dict) -> None:
    os.environ["MASTER_PORT"] = str(job["port"])
    config = load_run(job["config"])
    stage = next(s for s in config.train if s.name == job["stage"])
    stage = stage.model_copy(update={"parallel": job["parallel"]})

    def save(work, step, *others):
        oldest = save_state(work, step, *others)
        if step == job["stop"]:
            raise Stopped
        if step == job["interrupt"] and os.environ["RANK"] == "0":
            signal.raise_signal(signal.SIGINT)
        return oldest

    pipeline.train.save_state = save
    try:
        pipeline.train.train(config, stage)
    except (Stopped, KeyboardInterrupt):
        if dist.is_initialized():
            dist.barrier()
            dist.destroy_process_group()


for found in json.loads(Path(sys.argv[1]).read_text()):
    run(found)
