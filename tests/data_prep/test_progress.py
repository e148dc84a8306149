"""Progress on a terminal, where a bar is rewritten, and in a log, where lines stay."""

import os
import re
import sys
import termios

import pytest
from tqdm import tqdm

from data_prep import progress as module
from data_prep.progress import EVERY_S, progress


class Clock:
    """Time that only the test moves; what tqdm and the helper look at."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    time = monotonic


@pytest.fixture
def clock(monkeypatch):
    found = Clock()
    monkeypatch.setattr(module, "time", found)
    monkeypatch.setattr("tqdm.std.time", found.time)
    return found


def test_a_log_has_a_line_every_half_minute_and_a_last_one(clock, capsys):
    with progress("grpo", "step", 600, 60) as bar:
        for step in range(540):
            clock.now += 0.25
            bar.set_postfix({"reward_mean": f"{step / 1000:.3f}"})
            bar.update()
            if step == 200:
                tqdm.write("warning: entropy fell", file=sys.stderr)
    text = capsys.readouterr().err
    assert "\r" not in text
    assert text.endswith("\n")
    assert text.splitlines() == [
        # 135 seconds: four times thirty, then the end. A line comes with what was known before it.
        "grpo:  30% 179/600 [00:30<01:45,  4.00step/s, reward_mean=0.119]",
        "warning: entropy fell",
        "grpo:  50% 299/600 [01:00<01:15,  4.00step/s, reward_mean=0.239]",
        "grpo:  70% 419/600 [01:30<00:45,  4.00step/s, reward_mean=0.359]",
        "grpo:  90% 539/600 [02:00<00:15,  4.00step/s, reward_mean=0.479]",
        "grpo: 100% 600/600 [02:15<00:00,  4.00step/s, reward_mean=0.539]",
    ]


def test_a_short_run_has_its_last_line_once(clock, capsys):
    bar = progress("verify", "shard", 3)
    clock.now += 1.0
    bar.update(3)
    assert capsys.readouterr().err == ""
    bar.close()
    bar.close()
    assert capsys.readouterr().err == "verify: 100% 3/3 [00:01<00:00,  3.00shard/s]\n"


def test_what_ends_early_says_how_far_it_came(clock, capsys):
    with pytest.raises(KeyboardInterrupt), progress("samples", "sample", 64) as bar:
        clock.now += 8.0
        bar.update(16)
        raise KeyboardInterrupt
    assert capsys.readouterr().err == "samples:  25% 16/64 [00:08<00:24,  2.00sample/s]\n"


def test_a_count_without_an_end(clock, capsys):
    with progress("grade greedy", "sample") as bar:
        clock.now += EVERY_S
        bar.update(60)
        clock.now += EVERY_S
        bar.update(60)
    assert capsys.readouterr().err.splitlines() == [
        "grade greedy: 60sample [00:30,  2.00sample/s]",
        "grade greedy: 120sample [01:00,  2.00sample/s]",
        "grade greedy: 120sample [01:00,  2.00sample/s]",
    ]


def test_what_is_hidden_says_nothing(capsys):
    with progress("write train", "shard", 1, hidden=True) as bar:
        bar.update()
    assert capsys.readouterr().err == ""


def test_a_terminal_has_the_bar(monkeypatch):
    """A real terminal's other end reads the bar, rewritten in its line."""
    ours, theirs = os.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    with os.fdopen(theirs, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        with progress("sft", "step", 4) as bar:
            assert type(bar) is tqdm
            for _ in range(4):
                bar.set_postfix({"objective": "-0.693"})
                bar.update()
        text = os.read(ours, 100_000).decode()
    os.close(ours)
    assert re.search(r"\rsft:   0%\|\s+\| 0/4 ", text)
    assert re.search(r"\rsft: 100%\|█+\| 4/4 \[[^\r\n]*objective=-0\.693\]\r\n$", text)


def test_no_stage_makes_a_bar_of_its_own(root):
    """Else its log would be full of carriage returns."""
    folders = ("data_prep", "eval", "pipeline", "prompts", "verifiers")
    made = [
        str(path.relative_to(root))
        for folder in folders
        for path in sorted((root / folder).rglob("*.py"))
        if re.search(r"\b(tqdm|trange)\(", path.read_text("utf-8"))
    ]
    assert not made
