"""Work over servers that die: every job answered once, whoever dies when."""

from __future__ import annotations

import asyncio
import random
from collections import Counter

import pytest

from pipeline.engines._balance import spread


class Down(Exception):
    pass


def run(groups, hosts, ask, width=3):
    given_up: list[str] = []
    answers = asyncio.run(
        spread(groups, hosts, width, ask, Down, lambda host, error: given_up.append(host))
    )
    return answers, given_up


def jobs(groups: int, n: int):
    return [[(g, i) for i in range(n)] for g in range(groups)]


def test_the_jobs_of_a_group_meet_one_host_where_all_are_as_fast():
    met: dict[int, set[str]] = {}

    async def ask(host, job):
        met.setdefault(job[0], set()).add(host)
        await asyncio.sleep(0)
        return job

    answers, given_up = run(jobs(6, 4), ["a", "b"], ask)
    assert answers == {job: job for group in jobs(6, 4) for job in group}
    assert all(len(hosts) == 1 for hosts in met.values())
    assert not given_up


def test_a_fast_host_takes_from_a_slow_one():
    done: Counter[str] = Counter()

    async def ask(host, job):
        await asyncio.sleep(0.02 if host == "slow" else 0)
        done[host] += 1
        return host

    answers, _ = run(jobs(10, 4), ["slow", "fast"], ask, width=1)
    assert len(answers) == 40
    assert done["fast"] > 30


@pytest.mark.parametrize("seed", range(30))
def test_hosts_that_die_at_random_lose_and_double_nothing(seed):
    rng = random.Random(seed)
    hosts = ["a", "b", "c", "d"]
    dies_after = {host: rng.choice([0, 1, 5, 12, 10**6]) for host in hosts[1:]}
    asked: Counter[str] = Counter()
    answered: Counter[tuple[int, int]] = Counter()

    async def ask(host, job):
        asked[host] += 1
        # All that are in its hands fail together.
        await asyncio.sleep(rng.random() * 0.002)
        if asked[host] > dies_after.get(host, 10**9):
            raise Down(host)
        answered[job] += 1
        return f"{job}"

    answers, given_up = run(jobs(7, 5), hosts, ask, width=rng.randint(1, 8))
    assert answers == {job: f"{job}" for group in jobs(7, 5) for job in group}
    assert set(answered.values()) == {1}
    assert set(given_up) <= set(dies_after)


def test_it_ends_when_every_host_is_given_up():
    async def ask(host, job):
        await asyncio.sleep(0)
        if job[0] == 2:
            raise Down
        return 1

    answers, given_up = run(jobs(4, 2), ["a", "b"], ask, width=2)
    assert set(given_up) == {"a", "b"}
    assert (2, 0) not in answers or (2, 1) not in answers


def test_another_error_ends_the_whole():
    async def ask(host, job):
        await asyncio.sleep(0.001)
        if job == (1, 1):
            raise ZeroDivisionError
        return 1

    with pytest.raises(ZeroDivisionError):
        run(jobs(4, 2), ["a", "b"], ask)
