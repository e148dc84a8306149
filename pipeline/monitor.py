"""Early signs that reinforcement goes wrong: each is said once, with what was found and what to do.

A warning never stops a run: a person decides. It goes to the screen and to `warnings.jsonl` of the
stage. What is looked at are the step records alone, so a run that goes on after a kill warns as one
that was never killed.

| sign             | what is looked at (means over the last `window` steps)                      |
|------------------|-----------------------------------------------------------------------------|
| entropy          | entropy below `entropy_share` of its mean over the first `window` steps      |
| zero_signal      | share of groups of equal rewards that teach nothing, at or above             |
|                  | `zero_signal`                                                                |
| truncated        | share of completions that were cut off, at or above `truncated`              |
| reward_zero      | every reward of every step was 0                                             |
| unscored         | share of samples without a reward (not judged), at or above `zero_signal`    |
| length           | mean completion `length_growth` times as long as in the first `window` steps |
|                  | while the reward is no higher                                                |
| incorrect_length | incorrect completions `length_gap` times as long as correct ones             |
| kl               | kl_k3 to the reference, nats a token, at or above `kl`                       |
| update_kl        | update_kl_k3, of the updates on one batch but the last, at or above          |
|                  | `update_kl`                                                                  |

Where the defaults come from: a healthy run of `pipeline/configs/cpu.toml` ends with an entropy of
16 % of its start, 84 % of groups without signal and no truncation; each threshold lies beyond
that. A KL of 1 nat a token is ten times what runs that keep their language report; 0.1 nats by a
single batch is more than the clip of 0.2 lets through at on-policy ratios.

Source: 001_… (failure points: response length bias, lack of diversity, prompts without signal);
methods.md section 7.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from pydantic import Field
from tqdm import tqdm

from data_prep.config import Config
from verifiers.plain import plain

Row = dict[str, Any]


class MonitorConfig(Config):
    """Thresholds of the warnings; see the table above.

    Attributes:
        window: Steps that a mean is taken over.
        entropy_share: Of the first window's entropy.
        zero_signal: Share of groups, and of samples without a reward.
        truncated: Share of completions.
        length_growth: Times the first window's mean length.
        length_gap: Length of incorrect completions over that of correct ones.
        kl: To the reference, nats a token (k3).
        update_kl: To the policy that a batch began with, nats a token (k3).
    """

    window: int = Field(default=5, ge=1)
    entropy_share: float = Field(default=0.05, ge=0.0, lt=1.0)
    zero_signal: float = Field(default=0.9, gt=0.0)
    truncated: float = Field(default=0.9, gt=0.0)
    length_growth: float = Field(default=2.0, gt=1.0)
    length_gap: float = Field(default=3.0, gt=1.0)
    kl: float = Field(default=1.0, gt=0.0)
    update_kl: float = Field(default=0.1, gt=0.0)


@dataclass(frozen=True, slots=True)
class Warned:
    """One warning.

    Attributes:
        step: At which it was due.
        sign: Which of the table.
        found: What was seen.
        advice: What to do.
    """

    step: int
    sign: str
    found: str
    advice: str

    def to_row(self) -> Row:
        """Return a JSON-ready row."""
        return asdict(self)


class Monitor:
    """Watches the records of a stage whose method samples.

    Args:
        config: Thresholds.
        label: Names the stage on the screen.
    """

    def __init__(self, config: MonitorConfig, label: str) -> None:
        """Begin with no record."""
        self.config, self.label = config, label
        self._first: list[Row] = []
        self._last: list[Row] = []
        self._warned: set[str] = set()
        self._signs: dict[str, Callable[[], tuple[str, str] | None]] = {
            "entropy": self._entropy,
            "zero_signal": self._zero_signal,
            "truncated": self._truncated,
            "reward_zero": self._reward_zero,
            "unscored": self._unscored,
            "length": self._length,
            "incorrect_length": self._incorrect_length,
            "kl": lambda: self._kl("kl_k3", self.config.kl, "the reference"),
            "update_kl": lambda: self._kl(
                "update_kl_k3", self.config.update_kl, "the policy that the batch began with"
            ),
        }

    def observe(self, row: Row) -> list[Warned]:
        """Take a step's record; return the warnings that are new.

        Args:
            row: As it stands in `steps.jsonl`; rows without rollouts are passed over.
        """
        if "samples" not in row and "signal_share" not in row:
            return []
        window = self.config.window
        if len(self._first) < window:
            self._first.append(row)
        self._last = [*self._last, row][-window:]
        if len(self._last) < window:
            return []
        found = []
        for sign, look in self._signs.items():
            if sign not in self._warned and (words := look()) is not None:
                self._warned.add(sign)
                found.append(Warned(int(row["step"]), sign, *words))
        return found

    def say(self, warned: Warned) -> None:
        """Print a warning above the progress bar."""
        words = f"stage {self.label!r}, step {warned.step}: {warned.found}. {warned.advice}"
        tqdm.write(plain(f"warning: {words}"), file=sys.stderr)

    def _mean(self, rows: list[Row], key: str) -> float | None:
        """Return the mean of a figure over the rows that have it; None where none has."""
        values = [row[key] for row in rows if row.get(key) is not None]
        return sum(values) / len(values) if values else None

    def _over(self) -> str:
        return f"over the last {self.config.window} steps"

    def _entropy(self) -> tuple[str, str] | None:
        now, first = self._mean(self._last, "entropy"), self._mean(self._first, "entropy")
        if now is None or not first or now >= self.config.entropy_share * first:
            return None
        return (
            f"entropy {now:.3g} nats {self._over()}, {now / first:.1%} of the {first:.3g} it began "
            "with: the samples of a prompt are nearly all the same",
            "Raise method.clip_high (DAPO: 0.28), the temperature or an entropy bonus, or take an "
            "earlier checkpoint; where the accuracy is near 1 the policy has simply converged.",
        )

    def _zero_signal(self) -> tuple[str, str] | None:
        share = self._mean(self._last, "zero_signal_share")
        if share is None or share < self.config.zero_signal:
            return None
        solved, failed = (
            self._mean(self._last, f"groups_solved_{name}") or 0.0 for name in ("all", "none")
        )
        way = "harder" if solved >= failed else "easier"
        return (
            f"{share:.0%} of groups have equal rewards {self._over()} and teach nothing "
            f"(all solved: {solved:.0%}, none solved: {failed:.0%})",
            f"Give {way} problems, more samples a prompt, or method.kind = 'dapo', which draws "
            "others in their place.",
        )

    def _truncated(self) -> tuple[str, str] | None:
        share = self._mean(self._last, "truncated_share")
        if share is None or share < self.config.truncated:
            return None
        return (
            f"{share:.0%} of completions are cut off {self._over()}: they have no end to judge",
            "Raise sampling.max_tokens; if the model never ends, train the end token first (SFT), "
            "or check that its end tokens are those of the chat template.",
        )

    def _reward_zero(self) -> tuple[str, str] | None:
        rows = [row for row in self._last if row.get("reward_mean") is not None]
        if not rows or any(row["reward_mean"] or row["reward_std"] for row in rows):
            return None
        return (
            f"every reward is 0 {self._over()}: no sample was right",
            "Look at some with python -m pipeline.steps. Give easier problems or a better start, "
            "and check that the verifier reads the form of the answers.",
        )

    def _unscored(self) -> tuple[str, str] | None:
        share = self._mean(self._last, "unscored_share")
        if share is None or share < self.config.zero_signal:
            return None
        return (
            f"{share:.0%} of samples have no reward {self._over()}: they could not be judged, or "
            "the method leaves them out",
            "Look at the outcomes in the stage's rollouts; where they are errors or timeouts, try "
            "the checker by itself with python -m verifiers check.",
        )

    def _length(self) -> tuple[str, str] | None:
        now, first = (self._mean(rows, "completion_length") for rows in (self._last, self._first))
        reward, before = (self._mean(rows, "reward_mean") for rows in (self._last, self._first))
        if not now or not first or now < self.config.length_growth * first:
            return None
        if reward is not None and before is not None and reward > before:
            return None  # longer, and better for it
        return (
            f"completions have {now:.0f} tokens {self._over()}, {now / first:.1f} times the "
            f"{first:.0f} they began with, and the reward has not risen",
            "Use the normaliser 'token' or 'constant' (Dr. GRPO), reward.length, or DAPO's "
            "overlong penalty; a mean per sequence forgives long wrong answers.",
        )

    def _incorrect_length(self) -> tuple[str, str] | None:
        wrong = self._mean(self._last, "length_incorrect")
        right = self._mean(self._last, "length_correct")
        if not wrong or not right or wrong < self.config.length_gap * right:
            return None
        return (
            f"incorrect completions have {wrong:.0f} tokens {self._over()}, correct ones "
            f"{right:.0f}",
            "Response length bias: use the normaliser 'token' or 'constant' (Dr. GRPO), or "
            "reward.length.",
        )

    def _kl(self, key: str, limit: float, to: str) -> tuple[str, str] | None:
        kl = self._mean(self._last, key)
        if kl is None or kl < limit:
            return None
        return (
            f"the policy is {kl:.3g} nats a token (k3) from {to} {self._over()}",
            "Lower the learning rate or method.updates, or raise method.beta.",
        )
