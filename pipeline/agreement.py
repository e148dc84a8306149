"""Do sampler and trainer agree? Probes that refuse to train on wrong log-probs.

Two programs compute one policy: the engine that samples, the trainer that differentiates. Every
online method rests on their log-probs being the same, and nothing else notices when they are not:
the loss goes on falling. The gap of a token is |log π_trainer − log π_sampler|, both at the
sampling temperature; what is compared with the tolerance is its mean over tokens.

* `prove_push`, before the first step: a few prompts are sampled with the first weights; then
  every parameter is moved by a tenth of its spread, pushed, and the same prompts are sampled
  again. Now the gap to the moved weights must be within the tolerance, and the moved weights are
  so far from the first ones that no other weights could pass (a real step is too small to show
  that). Then the first weights are put back, bit for bit, to be pushed.
* `judge`, from the log-probs that a step computes anyway, before its gradient is used: the
  first batch, and the one after the first push, refuse to go on beyond the tolerance; later
  ones warn.

Beyond the tolerance the same tokens are put to other hypotheses (another temperature, the weights
before the push, a prefix cache of those, another prompt, one place off, bfloat16), and the one
that explains the sampler's numbers is named.

Source: methods.md section 9. That bfloat16 alone makes gaps of about 0.01 nats, with single
tokens far beyond, is what the verl and vLLM projects report; hence its tolerance.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor
from tqdm import tqdm

from data_prep.config import Config
from data_prep.errors import UserError
from data_prep.jsonl import write_json
from pipeline.adapters import plain_weights
from pipeline.batch import Sequence, flatten, micro_batches
from pipeline.engines import Engine, Prompt, Sampling
from pipeline.policy import logprobs_of
from pipeline.split import own_part, part_for, whole

TOLERANCE = {"float32": 1e-3, "bfloat16": 0.05}
# Version that the moved weights are pushed as: no step's.
MOVED = -1
# Tokens of the long probe prompts: past two blocks of 128, the largest that vLLM caches.
LONG = 320
PROBE_TOKENS = 16
TEMPERATURES = tuple(2.0 ** (k / 4) for k in range(-8, 9))
BLOCKS = (16, 32, 64, 128)

Weights = Mapping[str, Tensor]


class AgreementConfig(Config):
    """What is done where sampler and trainer disagree.

    Attributes:
        on_gap: "refuse" to train, "warn", or look at nothing ("off").
        tolerance: Largest mean gap of a token's log-prob, nats; 0 takes 1e-3 where sampler and
            trainer compute in float32, and 0.05 where either computes in bfloat16.
    """

    on_gap: Literal["refuse", "warn", "off"] = "refuse"
    tolerance: float = Field(default=0.0, ge=0.0)


@dataclass(slots=True)
class Cause:
    """A hypothesis about a gap, and the gap that is left under it."""

    gap: float
    words: str


class Agreement:
    """Compares what an engine sampled with what the trainer computes.

    Args:
        config: Tolerance, and what follows beyond it.
        model: The trainer's model; between calls it is what it was before.
        temperature: Of the sampler.
        micro_tokens: Largest number of tokens in one forward pass.
        autocast: Whether the trainer's matrix products run in bfloat16.
        sampler_dtype: What the engine computes in.
        bos_token_id: Of the tokenizer, or None.
        where: Names the stage in errors.
    """

    def __init__(
        self,
        config: AgreementConfig,
        model: Any,
        temperature: float,
        micro_tokens: int,
        *,
        autocast: bool,
        sampler_dtype: str,
        bos_token_id: int | None = None,
        where: str = "agreement",
    ) -> None:
        """Find the tolerance."""
        self.config, self.model, self.temperature = config, model, temperature
        self.micro_tokens, self.autocast = micro_tokens, autocast
        self.bos_token_id, self.where = bos_token_id, where
        low = autocast or sampler_dtype == "bfloat16" or _parameter(model).dtype == torch.bfloat16
        self.tolerance = config.tolerance or TOLERANCE["bfloat16" if low else "float32"]
        self.previous: Weights | None = None
        self._judged = 0
        self._warned = False

    @torch.no_grad()
    def prove_push(
        self,
        engine: Engine,
        prompts: Iterable[Prompt],
        context: int,
        version: int,
        note: Path | None = None,
    ) -> None:
        """Prove that pushed weights are the ones used.

        The engine is left with weights that are nobody's: what follows is a push.

        Args:
            engine: Takes weights and samples.
            prompts: The run's; some of them are asked, and two long ones made of them.
            context: Longest prompt plus completion, tokens.
            version: What the model's weights are called.
            note: JSON file that takes what was found, where it is not there yet; None for none.

        Raises:
            UserError: They disagree by more than the tolerance, and the configuration refuses.
        """
        if self.config.on_gap == "off":
            return
        asked = probe_prompts(list(prompts), context)
        sampling = Sampling(n=1, temperature=self.temperature, max_tokens=PROBE_TOKENS)
        engine.load_weights(plain_weights(self.model), version)
        before = self._sampled(engine, asked, sampling)
        first = self._gap(before)
        if first > self.tolerance:
            self._refuse(first, "before the first step", before, None)
        saved = _kept(self.model)
        distance, amount, moved = 0.0, 0.1, 0.1
        try:
            # The far weights must be beyond doubt: as far as four tolerances, and no noise.
            while distance < max(0.05, 4 * self.tolerance) and amount < 2.0:
                self._restore(saved)
                _move(self.model, amount)
                after = self.logprobs(before)
                self._restore(saved)
                distance = float((after - self.logprobs(before)).abs().mean())
                moved, amount = amount, 2 * amount
            _move(self.model, moved)
            engine.load_weights(plain_weights(self.model), MOVED)
            again = self._sampled(engine, asked, sampling)
            second = self._gap(again)
            if second > self.tolerance:
                self._refuse(second, "after a push of other weights", again, saved)
        finally:
            self._restore(saved)
        self.previous = saved
        if note is not None and not note.is_file():
            found = {
                "tolerance": self.tolerance,
                "tokens": sum(len(s.completion) for s in before + again),
                "gap_before": first,
                "gap_after_push": second,
                "distance_of_pushed_weights": distance,
            }
            write_json(note, {key: float(f"{value:.4g}") for key, value in found.items()})

    def judge(self, gap: float, sequences: list[Sequence]) -> None:
        """Judge a step's mean gap, before its gradient is used.

        Only batches that the current weights sampled are judged: the gap of a stale batch is
        the policy's own way since. The first two may stop the run, later ones warn once.

        Args:
            gap: Mean of |log π_trainer − log π_sampler| over the step's tokens.
            sequences: The step's.

        Raises:
            UserError: As `prove_push`.
        """
        if self.config.on_gap == "off":
            return
        if any(s.staleness for s in sequences):
            self.previous = None  # a batch of the weights after it will not come fresh
            return
        if math.isnan(gap) and not any(math.isnan(v) for s in sequences for v in s.logprobs):
            return  # the trainer's own, which its gradient's norm stops with the batch kept
        self._judged += 1
        if not gap <= self.tolerance:
            when = {1: "in the first batch", 2: "after the first push"}.get(
                self._judged, "in a later batch"
            )
            if self._judged <= 2:
                self._refuse(gap, when, sequences[:64], self.previous)
            elif not self._warned:
                self._warned = True
                self._say(f"{self._words(gap, when)}; training goes on")
        if self._judged == 2:
            self.previous = None

    def logprobs(self, sequences: list[Sequence], temperature: float | None = None) -> Tensor:
        """Return the trainer's log-probs of the completions' tokens, [T], in their order."""
        return self._logprobs(sequences, temperature or self.temperature, self.autocast)

    @torch.no_grad()
    def _logprobs(self, sequences: list[Sequence], temperature: float, autocast: bool) -> Tensor:
        tokens = flatten(sequences)
        found = torch.zeros(len(tokens.weight), dtype=torch.float64)
        device = _parameter(self.model).device
        for micro in micro_batches(sequences, tokens, self.micro_tokens):
            logp = logprobs_of(self.model, micro.layout.to(device), temperature, autocast).logp
            found[micro.token_index] = logp.double().cpu()
        return found

    def _sampled(self, engine: Engine, prompts: list[Prompt], sampling: Sampling) -> list[Sequence]:
        sequences = []
        for number, group in enumerate(engine.generate(prompts, sampling)):
            if group.error is not None:
                raise UserError(
                    self.where,
                    f"a probe of the engine failed: {group.error}",
                    "a completion of a short prompt",
                    "mend the engine's settings, or the prompts' length",
                )
            if len(group.completions) != sampling.n:
                raise UserError(
                    self.where,
                    f"the engine gave {len(group.completions)} completions of a prompt",
                    f"{sampling.n}, as many as it was asked for",
                    "mend the engine's generate",
                )
            for c in group.completions:
                ids = list(group.prompt.token_ids)
                mask = [True] * len(c.token_ids)
                sequences.append(Sequence(ids, c.token_ids, mask, number, logprobs=c.logprobs))
        return sequences

    def _gap(self, sequences: list[Sequence]) -> float:
        return _mean_gap(self.logprobs(sequences), _sampler(sequences))

    def _restore(self, saved: Weights) -> None:
        with torch.no_grad():
            for name, parameter in _named(self.model):
                own_part(parameter).copy_(saved[name])

    @contextmanager
    def _with(self, weights: Weights) -> Iterator[None]:
        """Let the model have other weights for a while."""
        own = _kept(self.model)
        self._restore(weights)
        try:
            yield
        finally:
            self._restore(own)

    def _words(self, gap: float, when: str) -> str:
        return (
            f"sampler and trainer disagree {when}: their log-probs of the same tokens differ by "
            f"{gap:.2g} nats on average, the tolerance is {self.tolerance:.2g}"
        )

    def _say(self, text: str) -> None:
        tqdm.write(f"warning: {self.where}: {text}", file=sys.stderr)

    def _refuse(
        self, gap: float, when: str, sequences: list[Sequence], previous: Weights | None
    ) -> None:
        cause = self.diagnose(sequences, previous)
        words = self._words(gap, when)
        if self.config.on_gap == "warn":
            self._say(f"{words}; likely cause: {cause}")
            return
        raise UserError(
            self.where,
            f"{words}; likely cause: {cause}",
            "an engine that samples from the very policy that is trained",
            'mend the cause; agreement.tolerance or agreement.on_gap = "warn" train all the same',
        )

    @torch.no_grad()
    def diagnose(self, sequences: list[Sequence], previous: Weights | None = None) -> str:
        """Return what explains the sampler's log-probs of some sequences.

        Args:
            sequences: With the sampler's log-probs.
            previous: Weights before the last push, where there was one.
        """
        sampler = _sampler(sequences)
        plain = _mean_gap(self.logprobs(sequences), sampler)
        found = [
            cause
            for ask in (
                self._as_temperature,
                self._as_other_prompt,
                self._as_shifted,
                lambda s, t: [] if previous is None else self._as_previous(s, t, previous),
            )
            for cause in ask(sequences, sampler)
        ]
        best = min(found, key=lambda cause: cause.gap)
        if best.gap <= max(self.tolerance, plain / 4) and best.gap < plain:
            return f"{best.words} (that leaves {best.gap:.2g} of {plain:.2g} nats)"
        rounding = _mean_gap(
            self._logprobs(sequences, self.temperature, True),
            self._logprobs(sequences, self.temperature, False),
        )
        if plain <= 2 * rounding:
            return (
                "dtype: the gap is as large as what bfloat16 makes on these tokens "
                f"({rounding:.2g} nats), so one side computes in bfloat16; set engine.dtype as "
                "the trainer computes, or a tolerance for bfloat16"
            )
        return (
            "not the temperature, the prompt, older weights or rounding; the two compute "
            "different models (another checkpoint, a push that left tensors out, rope scaling, "
            "quantisation, a truncated distribution; the best guess, "
            f"{best.words!r}, leaves {best.gap:.2g} nats)"
        )

    def _as_temperature(self, sequences: list[Sequence], sampler: Tensor) -> list[Cause]:
        def gap(temperature: float) -> float:
            return _mean_gap(self.logprobs(sequences, temperature), sampler)

        fitted = _minimise(gap, TEMPERATURES)
        if self.temperature != 1.0 and gap(1.0) <= gap(fitted) + self.tolerance:
            words = (
                "temperature: the sampler's log-probs are those of temperature 1, not of "
                f"{self.temperature:g} (vLLM without logprobs_mode = processed_logprobs)"
            )
            return [Cause(gap(1.0), words)]
        words = (
            f"temperature: the sampler's log-probs are those of temperature {fitted:.2f}, "
            f"the trainer's of {self.temperature:g}"
        )
        return [Cause(gap(fitted), words)]

    def _as_other_prompt(self, sequences: list[Sequence], sampler: Tensor) -> list[Cause]:
        def changed(change: Callable[[list[int]], list[int]], words: str) -> Cause:
            others = [
                Sequence(change(s.prompt), s.completion, s.mask, n) for n, s in enumerate(sequences)
            ]
            gap = _mean_gap(self.logprobs(others), sampler)
            return Cause(gap, f"template: the sampler's prompts {words}")

        found = []
        bos = self.bos_token_id
        if bos is not None:
            found.append(changed(lambda p: [bos, *p], "begin with one BOS token more"))
        if all(len(s.prompt) > 1 for s in sequences):
            found += [
                changed(lambda p: p[1:], "lack their first token, such as BOS"),
                changed(lambda p: p[:-1], "lack their last token"),
            ]
        return found

    def _as_shifted(self, sequences: list[Sequence], sampler: Tensor) -> list[Cause]:
        now = self.logprobs(sequences)
        inner = torch.cat([torch.arange(len(s.completion)) for s in sequences]) > 0
        index = inner.nonzero().squeeze(-1)
        if not len(index):
            return []
        words = "alignment: each log-prob belongs to the token {} it"
        return [
            Cause(_mean_gap(now[index - 1], sampler[index]), words.format("before")),
            Cause(_mean_gap(now[index], sampler[index - 1]), words.format("after")),
        ]

    def _as_previous(
        self, sequences: list[Sequence], sampler: Tensor, previous: Weights
    ) -> list[Cause]:
        with self._with(previous):
            gap = _mean_gap(self.logprobs(sequences), sampler)
        stale = "stale weights: the sampler still uses those of before the last push"
        cached = (
            "stale cache: keys and values of the prompts are those of the weights before the "
            "last push; the prefix cache was not reset"
        )
        return [Cause(gap, stale), Cause(self._cached_gap(sequences, sampler, previous), cached)]

    def _cached_gap(self, sequences: list[Sequence], sampler: Tensor, previous: Weights) -> float:
        """Return the gap if whole blocks of the prompts were cached with other weights."""
        # Long prompts first: a short one may fill no block. A few say enough.
        order = sorted(range(len(sequences)), key=lambda i: -len(sequences[i].prompt))[:8]
        starts = torch.tensor([0, *(len(s.completion) for s in sequences)]).cumsum(0)
        best = float("inf")
        for block in BLOCKS:
            kept = [(i, (len(sequences[i].prompt) - 1) // block * block) for i in order]
            kept = [(i, length) for i, length in kept if length]
            if not kept:
                continue
            caches = {}
            with self._with(previous):
                for i, length in kept:
                    caches[i] = self._run(sequences[i].prompt[:length], None).past_key_values
            gaps = []
            for i, length in kept:
                s = sequences[i]
                logits = self._run([*s.prompt[length:], *s.completion], caches[i]).logits[0]
                first = len(s.prompt) - length - 1
                logp = torch.log_softmax(logits[first:-1].double() / self.temperature, dim=-1)
                chosen = torch.tensor(s.completion, device=logp.device)[:, None]
                now = logp.gather(-1, chosen).squeeze(-1).cpu()
                gaps.append((now - sampler[starts[i] : starts[i + 1]]).abs())
            best = min(best, float(torch.cat(gaps).mean()))
        return best

    def _run(self, ids: list[int], cache: Any) -> Any:
        device = _parameter(self.model).device
        with torch.autocast(device.type, torch.bfloat16, enabled=self.autocast):
            return self.model(
                input_ids=torch.tensor([ids], device=device),
                past_key_values=cache,
                use_cache=True,
            )


def probe_prompts(prompts: list[Prompt], context: int) -> list[Prompt]:
    """Return a few of a run's prompts, and two long ones made of them.

    The long ones reach past a prefix cache's blocks and into positions that short prompts never
    see.

    Args:
        prompts: The run's.
        context: Longest prompt plus completion, tokens.
    """
    room = max(1, context - PROBE_TOKENS)
    fitting = [p for p in prompts if 0 < len(p.token_ids) <= room] or [
        Prompt("cut", prompts[0].token_ids[:room])
    ]
    chosen = [Prompt(f"probe/{n}", p.token_ids) for n, p in enumerate(fitting[:6])]
    for number, start in enumerate((0, len(fitting) // 2)):
        joined: list[int] = []
        position = start
        while len(joined) < LONG:
            joined += fitting[position % len(fitting)].token_ids
            position += 1
        chosen.append(Prompt(f"probe/long-{number}", tuple(joined[: min(LONG, room)])))
    return chosen


def _move(model: Any, amount: float) -> None:
    """Move every parameter by seeded noise: a share of a matrix's spread, or of a vector's size.

    Both kinds and all layers, so that a push that leaves any of them out shows.
    """
    with torch.no_grad():
        for number, (_, parameter) in enumerate(_named(model)):
            generator = torch.Generator(parameter.device).manual_seed(number)
            value = whole(parameter.detach())
            noise = torch.empty_like(value).normal_(generator=generator)
            size = value.std() if value.ndim > 1 else value.abs().mean()
            parameter.add_(part_for(parameter, noise * (amount * size)))


def _kept(model: Any) -> dict[str, Tensor]:
    """Return copies of a model's weights on the CPU, of a split model this process's parts."""
    return {n: own_part(p.detach()).to("cpu", copy=True) for n, p in _named(model)}


def _minimise(function: Callable[[float], float], grid: tuple[float, ...]) -> float:
    """Return where a function of one positive number is least, to about a hundredth."""
    values = [function(x) for x in grid]
    at = values.index(min(values))
    low, high = grid[max(0, at - 1)], grid[min(len(grid) - 1, at + 1)]
    for _ in range(14):
        first, second = low + (high - low) / 3, high - (high - low) / 3
        if function(first) <= function(second):
            high = second
        else:
            low = first
    return (low + high) / 2


def _sampler(sequences: list[Sequence]) -> Tensor:
    return torch.tensor([v for s in sequences for v in s.logprobs], dtype=torch.float64)


def _mean_gap(one: Tensor, two: Tensor) -> float:
    return float((one - two).abs().mean())


def _named(model: Any) -> Iterator[tuple[str, torch.nn.Parameter]]:
    return model.named_parameters()


def _parameter(model: Any) -> Tensor:
    return next(model.parameters())
