"""A tiny model folder, made once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from data_prep.formatting import load_formatter
from data_prep.sources.embedded import Config as EmbeddedSource
from data_prep.sources.embedded import read
from data_prep.tokenizer import train_tokenizer
from pipeline.model import ModelConfig, build_model, save_checkpoint
from prompts import load_layout, load_profile


def make_checkpoint(folder: Path, architecture: str = "qwen2", **shape: Any) -> Path:
    """Write a checkpoint with random weights that are not too flat to sample from."""
    problems = list(read(EmbeddedSource(train=200, validation=1, test=1), 0))
    profile = load_profile("embedded")
    texts = [f"{p.question} {p.solutions['worked']}" for p in problems]
    tokenizer = train_tokenizer(texts, 320, load_layout(profile.layout), profile.system)
    config = ModelConfig(
        architecture=architecture,  # type: ignore[arg-type]
        **{
            "width": 32,
            "layers": 2,
            "heads": 4,
            "kv_heads": 2,
            "feed_forward": 48,
            "context": 128,
            **shape,
        },
    )
    model = build_model(config, tokenizer, seed=7)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0.0, 0.35, generator=generator)
            else:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    ends = load_formatter(tokenizer, "embedded").end_token_ids
    save_checkpoint(folder, model, tokenizer, ends, "embedded")
    return folder


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Tiny tensors gain nothing from a second thread, and lose much when the other core is busy."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="session")
def problems() -> list:
    return list(read(EmbeddedSource(train=64, validation=1, test=40), 0))
