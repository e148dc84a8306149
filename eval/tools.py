"""Tool-integrated reasoning: an engine whose completions run their programs as they go.

The model writes "```python … ```" and then "```output"; there sampling stops, the sandbox runs
the program, what it printed goes into the context, and sampling goes on, for a set number of
rounds. State lives within one conversation: its programs share one session.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from eval.sandbox import SandboxConfig, Session
from eval.transcripts import PROGRAM
from pipeline.engines import Completion, Engine, Group, Prompt, Sampling

MARK = "```output"
# Interpreters kept alive at once; a conversation whose interpreter was given up gets a new one,
# in which its earlier programs run again.
ALIVE = 32


@dataclass(slots=True)
class _Conversation:
    """One sample on its way."""

    prompt: Prompt
    group: Group
    index: int
    completion: Completion
    programs: list[str] = field(default_factory=list)
    is_done: bool = False


class ToolEngine:
    """Wraps an engine; has its shape.

    Args:
        engine: Draws tokens.
        tokenizer: Encodes what programs print.
        rounds: Most programs of one sample.
        sandbox: Limits of the programs.
        workers: Programs that run side by side.
    """

    def __init__(
        self, engine: Engine, tokenizer: Any, rounds: int, sandbox: SandboxConfig, workers: int
    ) -> None:
        """Keep the parts; interpreters start with the first program."""
        self.policy_version = engine.policy_version
        self._engine, self._tokenizer = engine, tokenizer
        self._rounds, self._sandbox, self._workers = rounds, sandbox, workers
        self._sessions: OrderedDict[int, Session] = OrderedDict()

    def load_weights(self, weights: Iterable[tuple[str, Any]], version: int) -> None:
        """Hand new weights on."""
        self._engine.load_weights(weights, version)
        self.policy_version = version

    def close(self) -> None:
        """End the interpreters and the engine."""
        self._give_up(0)
        self._engine.close()

    def generate(self, prompts: list[Prompt], sampling: Sampling) -> list[Group]:
        """Return one group a prompt; a completion is the whole transcript.

        Tokens of programs' output count towards `max_tokens` and carry log-prob 0: they were
        not sampled. A sample that is still writing programs after the last round ends with
        finish reason "length".
        """
        groups = [Group(prompt) for prompt in prompts]
        running = [
            _Conversation(group.prompt, group, index, Completion([], [], "", "length", 0))
            for group in groups
            for index in range(sampling.n)
        ]
        everyone = list(running)
        for turn in range(self._rounds + 1):
            if not running:
                break
            running = self._draw(running, sampling, turn)
            if turn < self._rounds:
                self._run_programs(running, sampling)
                running = [c for c in running if not c.is_done]
        self._give_up(0)
        for conversation in everyone:
            if conversation.group.error is None:
                conversation.group.completions.append(conversation.completion)
        return groups

    def _draw(
        self, running: list[_Conversation], sampling: Sampling, turn: int
    ) -> list[_Conversation]:
        """Sample on; return the conversations that now wait for a program."""
        longest = max(sampling.max_tokens - len(c.completion.token_ids) for c in running)
        step = sampling.model_copy(
            update={
                "n": 1,
                "max_tokens": longest,
                "stop": (*sampling.stop, MARK),
                "step": sampling.step * (self._rounds + 1) + turn,
            }
        )
        # The sample's index is part of the id, and so of the seed.
        asked = [
            Prompt(f"{c.prompt.id}\x1f{c.index}", (*c.prompt.token_ids, *c.completion.token_ids))
            for c in running
        ]
        waiting = []
        for conversation, group in zip(running, self._engine.generate(asked, step), strict=True):
            whole = conversation.completion
            if group.error is not None:
                # The first turn has no room at all; a later one has filled the context.
                if turn == 0:
                    conversation.group.error = group.error
                continue
            part = group.completions[0]
            room = sampling.max_tokens - len(whole.token_ids)
            cut = len(part.token_ids) > room
            whole.token_ids += part.token_ids[:room]
            whole.logprobs += part.logprobs[:room]
            whole.seed = whole.seed or part.seed
            whole.text += (
                self._tokenizer.decode(part.token_ids[:room], skip_special_tokens=True)
                if cut
                else part.text
            )
            programs = PROGRAM.findall(whole.text)
            asks = part.finish_reason == "stop" and part.text.rstrip().endswith(MARK)
            if cut or part.finish_reason == "length":
                continue
            if asks and len(programs) > len(conversation.programs):
                waiting.append(conversation)
            else:
                whole.finish_reason = "stop"
        return waiting

    def _run_programs(self, waiting: list[_Conversation], sampling: Sampling) -> None:
        """Run each conversation's newest program and write its output into the context."""
        for start in range(0, len(waiting), ALIVE):
            part = waiting[start : start + ALIVE]
            self._give_up(ALIVE - len(part), keep={id(c) for c in part})
            with ThreadPoolExecutor(self._workers) as pool:
                outputs = list(pool.map(self._run_one, part))
            for conversation, output in zip(part, outputs, strict=True):
                whole = conversation.completion
                text = f"\n{output.rstrip()}\n```\n"
                tokens = self._tokenizer.encode(text, add_special_tokens=False)
                room = sampling.max_tokens - len(whole.token_ids)
                whole.token_ids += tokens[:room]
                whole.logprobs += [0.0] * len(tokens[:room])
                whole.text += text
                conversation.is_done = len(tokens) >= room

    def _run_one(self, conversation: _Conversation) -> str:
        """Run the newest program in the conversation's session."""
        program = PROGRAM.findall(conversation.completion.text)[-1]
        session = self._sessions.get(id(conversation))
        if session is None:
            session = Session(self._sandbox)
            for earlier in conversation.programs:
                session.run(earlier)
            self._sessions[id(conversation)] = session
        conversation.programs.append(program)
        return session.run(program).output

    def _give_up(self, left: int, keep: frozenset[int] | set[int] = frozenset()) -> None:
        """End the oldest interpreters until `left` besides those to keep remain."""
        others = [key for key in self._sessions if key not in keep]
        for key in others[: max(0, len(others) - left)]:
            self._sessions.pop(key).close()
