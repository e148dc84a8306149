"""Prompts of a suite under a profile, and what is checked before the first token is sampled."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from data_prep.errors import UserError
from data_prep.formatting import Formatter, load_formatter
from data_prep.schema import Problem
from eval.profile import EvaluationProfile, load_shots
from pipeline.engines import Prompt
from pipeline.generate import profile_of


def suite_formatter(model: Path, tokenizer: Any, profile: EvaluationProfile) -> Formatter:
    """Return the formatter of a checkpoint's tokenizer under an evaluation profile."""
    return load_formatter(
        tokenizer, profile.prompt_profile or profile_of(model, "boxed"), profile.layout
    )


def suite_prompts(
    problems: list[Problem],
    formatter: Formatter,
    profile: EvaluationProfile,
    path: Path,
    language: str,
    tools: bool,
) -> list[Prompt]:
    """Return the prompt tokens of every problem.

    Args:
        problems: Of one suite.
        formatter: Of the checkpoint's tokenizer.
        profile: Evaluation profile.
        path: Its file, which exemplars are relative to.
        language: Of the suite's questions.
        tools: Whether programs are run.
    """
    shots = load_shots(profile, path, language, tools, problems)
    return [
        Prompt(p.id, tuple(formatter.prompt(profile.messages(p, language, shots, tools))))
        for p in problems
    ]


def suite_conversations(
    problems: list[Problem], profile: EvaluationProfile, path: Path, language: str
) -> list[Prompt]:
    """Return the conversation of every problem, for an engine whose endpoint has the template.

    Args:
        problems: Of one suite.
        profile: Evaluation profile.
        path: Its file, which exemplars are relative to.
        language: Of the suite's questions.
    """
    shots = load_shots(profile, path, language, False, problems)
    return [
        Prompt(p.id, (), messages=tuple(profile.messages(p, language, shots, False)))
        for p in problems
    ]


def preflight(
    prompts: Sequence[Prompt], tokenizer: Any, stop: Sequence[str], problems: Sequence[Problem]
) -> list[str]:
    """Check a suite's prompts and return what to show of them.

    Args:
        prompts: Rendered prompts.
        tokenizer: The checkpoint's.
        stop: Stop strings.
        problems: The problems, whose reference solutions a stop string must not cut.

    Raises:
        UserError: A prompt has two BOS tokens side by side, or a stop string is empty.
    """
    first = list(prompts[0].token_ids)
    bos = tokenizer.bos_token_id
    lines = [
        f"prompt of {prompts[0].id}: {len(first)} tokens {first}",
        f"as text: {tokenizer.decode(first)!r}",
    ]
    if bos is None:
        lines.append("BOS: the tokenizer has none")
    else:
        for prompt in prompts:
            if any(a == b == bos for a, b in pairwise(prompt.token_ids)):
                raise UserError(
                    f"prompt of {prompt.id}",
                    f"has two BOS tokens side by side (id {bos})",
                    "one",
                    "the chat template adds a BOS and so does the tokenizer: switch off "
                    "add_bos_token in tokenizer_config.json, or take it out of the template",
                )
        counts = sorted({sum(token == bos for token in p.token_ids) for p in prompts})
        lines.append(f"BOS (id {bos}) a prompt: {' or '.join(map(str, counts))}")
    for token in sorted(tokenizer.get_added_vocab()):
        # Such a question would close its own turn, or open another.
        inside = [p.id for p in problems if token.strip() and token in p.question]
        if inside:
            lines.append(
                f"the template's token {token!r} stands as text in {len(inside)} questions "
                f"(such as {inside[0]}): the model reads it as the token"
            )
    for text in stop:
        if not text:
            raise UserError("profile, key 'stop'", "an empty string", "a text", "remove it")
        cut = [p.id for p in problems if any(text in s for s in p.solutions.values())]
        inside = [p.id for p in problems if text in p.question]
        if cut or inside:
            lines.append(
                f"stop string {text!r} stands in {len(cut)} reference solutions and "
                f"{len(inside)} questions (such as {(cut or inside)[0]}): it cuts such answers"
            )
    return lines
