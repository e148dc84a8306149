"""Options and fixtures that all tests share."""

from __future__ import annotations

import importlib.util
import re
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from data_prep.config import fingerprint
from data_prep.files import file_hash
from data_prep.jsonl import read_json, write_json
from data_prep.manifest import sealed

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
BROWSER = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
POLICY = re.compile(r'<meta http-equiv="Content-Security-Policy"[^>]*>')


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--require-vllm", action="store_true", help="fail where vLLM tests would be skipped"
    )


def pytest_configure() -> None:
    """Take Ctrl-C as a terminal gives it.

    A script's background job is started with it ignored, and so are the programs that it starts:
    they would wait for ever for the signals that tests send them.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


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


@pytest.fixture(scope="session")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Open a page in headless Chromium; return the document as it stands in the end.

    `probe` is markup that is put at the end of the body; the page's policy, which would keep its
    script from running, is taken away. Without one the page is opened as it is.
    """
    if BROWSER is None:
        pytest.skip("no Chromium on this machine")

    def open_page(page: Path, probe: str = "", width: int = 1200) -> str:
        folder = tmp_path_factory.mktemp("chromium")
        text = page.read_text("utf-8")
        if probe:
            assert POLICY.search(text), "the page has no policy"
            text = POLICY.sub("", text, count=1).replace("</body>", f"{probe}</body>")
        (folder / "page.html").write_text(text, "utf-8")
        words = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"]
        words += ["--disable-background-networking", f"--user-data-dir={folder / 'profile'}"]
        words += [f"--window-size={width},900", "--virtual-time-budget=15000", "--dump-dom"]
        words.append((folder / "page.html").as_uri())
        done = subprocess.run(words, capture_output=True, text=True, check=True, timeout=120)
        return done.stdout

    return open_page


@pytest.fixture(scope="session")
def seal_again() -> Callable[[Path], None]:
    """Let a complete stage vouch for its files as a test has changed them."""

    def seal(stage: Path) -> None:
        manifest = read_json(stage / "manifest.json")
        del manifest["seal"]
        manifest["outputs"] = {name: file_hash(stage / name) for name in manifest["outputs"]}
        manifest["result"] = fingerprint(manifest["outputs"])
        write_json(stage / "manifest.json", sealed(manifest))

    return seal
