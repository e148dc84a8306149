"""Work spread over servers that may die: every job is answered once."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

# (prompt, sample index)
Job = tuple[int, int]
Host = TypeVar("Host")
Answer = TypeVar("Answer")


async def spread(
    groups: Sequence[list[Job]],
    hosts: Sequence[Host],
    width: int,
    ask: Callable[[Host, Job], Awaitable[Answer]],
    failure: type[Exception],
    give_up: Callable[[Host, Exception], None],
) -> dict[Job, Answer]:
    """Let hosts answer jobs, `width` at a time each; return the answers.

    Groups are dealt out in turn, so that the jobs of one, which share a prompt, meet one host's
    prefix cache; a host that has nothing left takes from the longest queue. A job is in a queue
    or in one worker's hands, never both. A host that fails a job puts it back, is given up, and
    the others take its queue.

    Args:
        groups: Jobs that belong together.
        hosts: Who answers.
        width: Jobs of one host at a time.
        ask: Answers a job; other errors than `failure` end the whole.
        failure: What a host fails with when its work is another's from then on.
        give_up: Told of a host that failed, possibly several times.

    Returns:
        Answers by job; some are missing where every host was given up.
    """
    queues: list[deque[Job]] = [deque() for _ in hosts]
    for number, group in enumerate(groups):
        queues[number % len(hosts)].extend(group)
    total = sum(map(len, queues))
    answers: dict[Job, Answer] = {}
    given_up: set[int] = set()
    news = asyncio.Condition()

    def take(own: int) -> Job | None:
        if queues[own]:
            return queues[own].popleft()
        longest = max(queues, key=len)
        return longest.pop() if longest else None

    async def work(own: int) -> None:
        while own not in given_up and len(answers) < total:
            job = take(own)
            if job is None:
                # What others hold may yet come back.
                async with news:
                    await news.wait_for(
                        lambda: any(queues) or len(answers) == total or own in given_up
                    )
                continue
            try:
                answers[job] = await ask(hosts[own], job)
            except failure as error:
                queues[own].append(job)
                given_up.add(own)
                give_up(hosts[own], error)
            if own in given_up or len(answers) == total:
                async with news:
                    news.notify_all()

    workers = [
        asyncio.ensure_future(work(own))
        for own in range(len(hosts))
        for _ in range(min(width, total))
    ]
    try:
        await asyncio.gather(*workers)
    finally:
        for worker in workers:
            worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)
    return answers
