"""Any OpenAI-compatible endpoint: conversations in, text out, for evaluation and graders.

    python -m eval.run --model NAME --engine.kind openai --suites gsm8k=test.jsonl

A prompt is a list of chat messages; the endpoint renders them with its model's own template, so
nothing is rendered here, and no tokenizer is needed. `--model` is the name that the endpoint knows.
The text has no token ids and no log-probs of them, so training and `pipeline.generate` refuse this
engine.

The key is read from the environment variable that `key_env` names, sent in the header, and
written nowhere. A sample is a request of its own, with its own hashed seed (31 bits of it, which
every endpoint takes); endpoints promise nothing about seeds.
"""

from __future__ import annotations

import asyncio
import os
import random
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal
from urllib.parse import urlsplit

import httpx
from pydantic import Field, field_validator
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, stop_after_attempt

from data_prep.errors import UserError
from pipeline.engines import Completion, EngineConfig, Group, Prompt, Sampling, sample_seed
from pipeline.engines._address import Address

if TYPE_CHECKING:
    from torch import Tensor

RETRIED = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
LONGEST_WAIT_S = 60.0
_SECRET = re.compile(r"(?i)(api[_-]?key|authorization|password|secret|(^|[_-])token)$")


class Config(EngineConfig):
    """Settings of the engine.

    Attributes:
        base_url: Up to and without `/chat/completions`.
        model: Name at the endpoint; empty takes the name of the model that is evaluated.
        key_env: Environment variable that holds the key; where it is not set, no key is sent.
        concurrency: Requests at a time.
        timeout_s: Longest wait for an answer.
        retries: Further tries of a request that failed.
        limit_key: What the endpoint calls the longest completion.
        extra: Further keys of every request, such as { reasoning_effort = "low" }.
    """

    incidental: ClassVar[frozenset[str]] = frozenset(
        {"key_env", "concurrency", "timeout_s", "retries"}
    )
    takes: ClassVar[Literal["tokens", "messages"]] = "messages"

    among: ClassVar[Literal["each", "leader", "alone"]] = "leader"

    kind: str = "openai"
    base_url: Address = "https://api.openai.com/v1"
    model: str = ""
    key_env: str = "OPENAI_API_KEY"
    concurrency: int = Field(default=16, ge=1)
    timeout_s: float = Field(default=120.0, gt=0.0)
    retries: int = Field(default=6, ge=0)
    limit_key: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    extra: dict[str, Any] = {}

    @field_validator("extra")
    @classmethod
    def _no_secret(cls, extra: dict[str, Any]) -> dict[str, Any]:
        for key in extra:
            if _SECRET.search(key):
                raise ValueError(
                    f"{key!r} looks like a key, and configurations are logged; keys come from "
                    "the environment variable that key_env names"
                )
        return extra


class _Unwell(Exception):
    """A request failed in a way that another try may mend."""

    def __init__(self, words: str, wait_s: float = 0.0) -> None:
        super().__init__(words)
        self.wait_s = wait_s


class OpenAiEngine:
    """Asks a chat model over HTTP.

    Args:
        config: Settings.
        model: Its name at the endpoint, unless the settings name one.
    """

    def __init__(self, config: Config, model: str | Path) -> None:
        """Find the key.

        Raises:
            UserError: There is none for OpenAI's own endpoint.
        """
        self.config, self.policy_version = config, 0
        self.model = config.model or str(model)
        self._url = config.base_url.rstrip("/") + "/chat/completions"
        self._key = os.environ.get(config.key_env, "").strip()
        if not (self._key.isascii() and self._key.isprintable()):
            raise self._no_key("characters that no key has")
        if not self._key and urlsplit(config.base_url).hostname == "api.openai.com":
            raise self._no_key("no key")

    def generate(self, prompts: list[Prompt], sampling: Sampling) -> list[Group]:
        """Return one group a prompt, in order.

        Raises:
            UserError: The endpoint does not answer, lets nobody in, refuses every prompt, or
                the sampling asks for what its interface has not.
        """
        self._check(prompts, sampling)
        groups = [Group(prompt) for prompt in prompts]
        jobs = [(group, index) for group in groups for index in range(sampling.n)]
        answers = asyncio.run(self._ask_all(jobs, sampling))
        for (group, _), answer in zip(jobs, answers, strict=True):
            if isinstance(answer, str):
                group.error = answer
            else:
                group.completions.append(answer)
        for group in groups:
            if group.error is not None:
                group.completions = []
        if len(groups) > 1 and all(group.error for group in groups):
            raise UserError(
                self._url,
                f"every prompt was refused, the first with: {groups[0].error}",
                "requests that this endpoint takes",
                "mend engine.model, engine.limit_key or what it names",
            )
        return groups

    def _check(self, prompts: list[Prompt], sampling: Sampling) -> None:
        plain = Sampling()
        for key in ("top_k", "min_p", "repetition_penalty", "stop_token_ids"):
            if (found := getattr(sampling, key)) != getattr(plain, key):
                raise UserError(
                    f"sampling, key {key!r}",
                    f"{found!r} with engine.kind = 'openai'",
                    "what the interface knows: temperature, top_p, max_tokens, stop, seed",
                    "remove the key, or sample with another engine",
                )
        if any(not prompt.messages for prompt in prompts):
            raise UserError(
                "engine.kind = 'openai'",
                "a prompt of token ids",
                "chat messages: the endpoint takes text",
                "use it in eval.run, or sample with another engine",
            )

    async def _ask_all(
        self, jobs: list[tuple[Group, int]], sampling: Sampling
    ) -> list[Completion | str]:
        gate = asyncio.Semaphore(self.config.concurrency)
        timeout = httpx.Timeout(self.config.timeout_s, connect=10.0)
        async with httpx.AsyncClient(timeout=timeout) as client:

            async def one(prompt: Prompt, index: int) -> Completion | str:
                async with gate:
                    return await self._with_retries(client, prompt, index, sampling)

            tasks = [asyncio.ensure_future(one(g.prompt, index)) for g, index in jobs]
            try:
                return await asyncio.gather(*tasks)
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    async def _with_retries(
        self, client: httpx.AsyncClient, prompt: Prompt, index: int, sampling: Sampling
    ) -> Completion | str:
        retrying = AsyncRetrying(
            stop=stop_after_attempt(1 + self.config.retries),
            wait=_wait,
            retry=retry_if_exception_type(_Unwell),
            reraise=True,
        )
        try:
            async for attempt in retrying:
                with attempt:
                    return await self._ask(client, prompt, index, sampling)
        except _Unwell as error:
            raise UserError(
                self._url,
                f"{error}, after {1 + self.config.retries} tries",
                "an endpoint that answers",
                "look whether it is up; the same command goes on after the last complete shard",
            ) from None
        raise AssertionError("tenacity ends with a value or an error")

    async def _ask(
        self, client: httpx.AsyncClient, prompt: Prompt, index: int, sampling: Sampling
    ) -> Completion | str:
        """Return one sample, or why its prompt was refused.

        Raises:
            _Unwell: Another try may mend it.
            UserError: None will.
        """
        seed = sample_seed(sampling.seed, sampling.step, prompt.id, index)
        body: dict[str, Any] = {
            "model": self.model,
            "messages": [dict(message) for message in prompt.messages],
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            self.config.limit_key: prompt.budget(sampling),
            "seed": seed & 0x7FFFFFFF,
            **({"stop": list(sampling.stop)} if sampling.stop else {}),
            **self.config.extra,
        }
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        try:
            reply = await client.post(self._url, json=body, headers=headers)
        except httpx.HTTPError as error:
            raise _Unwell(f"{type(error).__name__}: {error}") from None
        if reply.status_code in (401, 403):
            raise self._no_key(f"it answers {reply.status_code}")
        if reply.status_code == 404:
            raise UserError(
                self._url,
                f"it answers 404: {self._said(reply, 200)}",
                f"an endpoint with a model {self.model!r}",
                "mend engine.base_url, or --model",
            )
        if reply.status_code in RETRIED:
            wait = reply.headers.get("retry-after", "")
            seconds = float(wait) if wait.replace(".", "", 1).isdigit() else 0.0
            raise _Unwell(f"it answers {reply.status_code}: {self._said(reply, 200)}", seconds)
        if reply.status_code != 200:
            return f"{self._url} answers {reply.status_code}: {self._said(reply, 300)}"
        try:
            answer = reply.json()
            choice = answer["choices"][0]
            text = choice["message"]["content"] or ""
            reason = "length" if choice["finish_reason"] == "length" else "stop"
            count = (answer.get("usage") or {}).get("completion_tokens")
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise _Unwell(f"an answer that is no chat completion ({error})") from None
        return Completion([], [], text, reason, seed, token_count=count)

    def _said(self, reply: httpx.Response, most: int) -> str:
        """Return the beginning of a reply, without the key should the endpoint repeat it."""
        text = reply.text.replace(self._key, "[key]") if self._key else reply.text
        return text[:most]

    def _no_key(self, found: str) -> UserError:
        state = "is set" if self._key else "is not set"
        return UserError(
            self._url,
            f"{found}; the environment variable {self.config.key_env} {state}",
            "a key that this endpoint takes",
            f"set {self.config.key_env}, or name another variable with engine.key_env",
        )

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Refuse: the weights are the endpoint's.

        Raises:
            UserError: Always.
        """
        raise UserError(
            "engine.kind = 'openai'",
            "new weights",
            "an engine of token ids",
            'set engine.kind = "embedded", "vllm" or "vllm_server"',
        )

    def close(self) -> None:
        """Nothing is held."""


def _wait(state: RetryCallState) -> float:
    """Return how long to wait: doubled each time, spread, and at least what the endpoint asks."""
    error = state.outcome.exception() if state.outcome else None
    asked = error.wait_s if isinstance(error, _Unwell) else 0.0
    backoff = min(LONGEST_WAIT_S, 0.25 * 2**state.attempt_number)
    return max(asked, backoff * (0.5 + random.random() / 2))  # noqa: S311 - spreads retries


def create(config: Config, model: str | Path) -> OpenAiEngine:
    """Return the engine."""
    return OpenAiEngine(config, model)
