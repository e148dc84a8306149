"""Options and fixtures that all tests share."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--require-vllm", action="store_true", help="fail where vLLM tests would be skipped"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if importlib.util.find_spec("vllm") is not None:
        return
    if config.getoption("--require-vllm"):
        raise pytest.UsageError("vLLM is not installed, and --require-vllm asks for its tests")
    skip = pytest.mark.skip(reason="vLLM is not installed (see the README)")
    for item in items:
        if "vllm" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository's root."""
    return ROOT


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data beside the repository; skips where it is absent."""
    if not (SHARED / "data").is_dir():
        pytest.skip(f"no folder {SHARED.name}/data beside the repository")
    return SHARED
