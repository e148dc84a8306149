import copy
import json
from pathlib import Path

import pytest

from data_prep.tokenizer import train_tokenizer
from prompts import load_layout

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data"
TEXTS = [
    "Mia has 12 pens. She gets 5 more.",
    "12+5=17\n\\boxed{17}",
    "user\nassistant\nsystem\n\n",
    "Solve the problem step by step.",
    "User: Assistant: ",
    "名字 π ≤ 3.5%",
] * 3


@pytest.fixture(scope="session")
def make_tokenizer():
    """A small trained tokenizer with the control tokens and template of a layout."""
    made = {}

    def make(layout, system="Solve the problem."):
        if (layout, system) not in made:
            made[layout, system] = train_tokenizer(TEXTS, 330, load_layout(layout), system)
        # A copy: `equip` changes a tokenizer in place.
        return copy.deepcopy(made[layout, system])

    return make


@pytest.fixture
def shared():
    """A file of the shared real data; skips where it is not there."""

    def find(name):
        if not (SHARED / name).is_file():
            pytest.skip(f"real data is absent: {SHARED / name}")
        return SHARED / name

    return find


@pytest.fixture
def write_lines(tmp_path):
    """Write rows (or raw bytes) as a JSON lines file; return its path."""

    def write(name, rows):
        path = tmp_path / name
        lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
        path.write_bytes(b"".join(line + b"\n" for line in lines))
        return path

    return write
