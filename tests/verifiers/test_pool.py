"""The pool: order, limits, replacement, threads, event loops, forks."""

import asyncio
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest

from verifiers import Outcome, VerifierPool, averify_many, verify_many

SLOW = """
import time
from verifiers.checkers import Checker, Outcome, Verdict

class Odd(Checker):
    def check(self, gold, text):
        if text == "sleep":
            time.sleep(60)
        if text == "spin":
            while True:
                pass
        if text == "hold":
            sum(range(10**12))
        if text == "eat":
            held = []
            while True:
                held.append(bytearray(1 << 24))
        if text == "die":
            import os
            os._exit(7)
        if text == "raise":
            raise RuntimeError("no")
        if text == "print":
            print("noise on standard output")
        return Verdict(Outcome.CORRECT if gold == text else Outcome.INCORRECT, rule="odd")
"""


@pytest.fixture
def odd(tmp_path: Path) -> str:
    path = tmp_path / "odd.py"
    path.write_text(SLOW)
    return str(path)


def test_verdicts_come_in_the_order_of_the_rows() -> None:
    rows = [(str(i % 7), f"\\boxed{{{i % 5}}}") for i in range(500)]
    verdicts = verify_many(rows, workers=2)
    assert [v.is_correct for v in verdicts] == [i % 7 == i % 5 for i in range(500)]


@pytest.mark.parametrize(
    ("text", "outcome", "rule"),
    [
        ("sleep", Outcome.TIMEOUT, "timeout"),
        ("spin", Outcome.TIMEOUT, "timeout"),
        ("hold", Outcome.TIMEOUT, "timeout"),
        ("eat", Outcome.ERROR, "memory_limit"),
        ("die", Outcome.ERROR, "worker_died"),
        ("raise", Outcome.ERROR, "checker_failed"),
        ("print", Outcome.INCORRECT, "odd"),
    ],
)
def test_one_bad_row_costs_that_row_only(odd: str, text: str, outcome: Outcome, rule: str) -> None:
    rows = [("a", "a"), ("a", "b"), ("a", text), ("a", "a"), ("a", "b")]
    with VerifierPool(odd, workers=1, time_limit_s=0.6, memory_limit_mb=256) as pool:
        verdicts = pool.verify_many(rows, chunk_size=5)
        again = pool.verify_many([("a", "a")])
    assert [v.is_correct for v in verdicts] == [True, False, False, True, False]
    assert (verdicts[2].outcome, verdicts[2].rule) == (outcome, rule)
    assert again[0].is_correct


def test_a_row_that_never_ends_is_ended(odd: str) -> None:
    with VerifierPool(odd, workers=1, time_limit_s=0.5) as pool:
        pool.start()
        started = time.perf_counter()
        verdict = pool.verify_many([("a", "spin")])[0]
        # How close to the limit is the benchmark's business; a busy machine may take longer.
        assert time.perf_counter() - started < 20
    assert not verdict.is_scorable


def test_a_successor_is_ready_when_a_worker_is_killed(odd: str) -> None:
    with VerifierPool(odd, workers=1, time_limit_s=2.0) as pool:
        assert pool.verify_many([("a", "spin")])[0].rule == "timeout"
        spare = [process.pid for process in pool._spares]
        assert len(spare) == 1
        assert pool.verify_many([("a", "a")])[0].is_correct
        assert [process.pid for process in pool._processes.values()] == spare


def test_a_worker_lost_while_a_successor_is_about_to_start_waits_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    starting, go_on = threading.Event(), threading.Event()

    class SlowThread(threading.Thread):
        def start(self) -> None:
            starting.set()
            assert go_on.wait(60)
            super().start()

    with VerifierPool(workers=2) as pool, ThreadPoolExecutor(2) as threads:
        pool.start()
        slow = SimpleNamespace(Thread=SlowThread, Lock=threading.Lock)
        monkeypatch.setattr("verifiers.pool.threading", slow)
        preparing = threads.submit(pool._prepare_spare)
        assert starting.wait(60)
        taken = threads.submit(pool._next_process)
        with pytest.raises(TimeoutError):
            taken.result(0.2)
        go_on.set()
        preparing.result(60)
        process = taken.result(60)
        assert process.alive and pool._spares == []
        process.kill()


def test_a_worker_stays_below_its_memory_limit(odd: str) -> None:
    with VerifierPool(odd, workers=1, time_limit_s=5.0, memory_limit_mb=200) as pool:
        pool.start()
        pid = next(iter(pool._processes.values())).pid
        seen = []
        stop = threading.Event()

        def watch() -> None:
            while not stop.is_set():
                try:
                    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
                except (OSError, IndexError):
                    return
                seen.append(pages * os.sysconf("SC_PAGE_SIZE"))
                time.sleep(0.002)

        thread = threading.Thread(target=watch)
        thread.start()
        verdict = pool.verify_many([("a", "eat")])[0]
        stop.set()
        thread.join()
    assert verdict.rule == "memory_limit"
    assert max(seen) < 200 << 20


def test_threads_share_a_pool() -> None:
    with VerifierPool(workers=2) as pool:
        results: dict[int, list[bool]] = {}

        def work(seed: int) -> None:
            rows = [(str(seed), f"\\boxed{{{i}}}") for i in range(50)]
            results[seed] = [v.is_correct for v in pool.verify_many(rows)]

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert results == {seed: [i == seed for i in range(50)] for seed in range(6)}


def test_the_event_loop_keeps_running(odd: str) -> None:
    async def both() -> tuple[int, list]:
        with VerifierPool(odd, workers=1, time_limit_s=0.5) as pool:
            pool.start()
            task = asyncio.create_task(pool.averify_many([("a", "spin"), ("a", "a")]))
            ticks = 0
            while not task.done():
                await asyncio.sleep(0.01)
                ticks += 1
            return ticks, await task

    ticks, verdicts = asyncio.run(both())
    assert ticks >= 20
    assert [v.outcome for v in verdicts] == [Outcome.TIMEOUT, Outcome.CORRECT]


def test_the_asyncio_form_of_verify_many() -> None:
    verdicts = asyncio.run(averify_many([("1", "\\boxed{1}"), ("1", "\\boxed{2}")], workers=1))
    assert [v.is_correct for v in verdicts] == [True, False]


def test_a_stream_is_taken_only_a_little_ahead() -> None:
    taken = 0

    def endless():
        nonlocal taken
        while True:
            taken += 1
            yield "7", "\\boxed{7}"

    with VerifierPool(workers=1) as pool:
        stream = pool.iter_many(endless(), chunk_size=4)
        assert all(next(stream).is_correct for _ in range(20))
        assert taken <= 40
        stream.close()


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_forked_child_uses_the_pool_it_inherited() -> None:
    with VerifierPool(workers=1) as pool:
        assert pool.verify_many([("1", "\\boxed{1}")])[0].is_correct
        child = os.fork()
        if child == 0:
            status = 1
            try:
                status = 0 if pool.verify_many([("2", "\\boxed{2}")])[0].is_correct else 2
                pool.terminate()
            finally:
                os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert pool.verify_many([("3", "\\boxed{3}")])[0].is_correct


def test_wrong_use_is_named() -> None:
    with pytest.raises(ValueError, match="workers is 0"):
        VerifierPool(workers=0)
    with pytest.raises(ValueError, match=r"no checker 'boxd'; did you mean 'boxed'"):
        VerifierPool("boxd")
    with pytest.raises(ValueError, match="no_such"):
        VerifierPool("boxed", {"no_such": 1})
    with VerifierPool(workers=1) as pool, pytest.raises(TypeError, match="row 1"):
        pool.verify_many([("1", "\\boxed{1}"), ("1", None)], chunk_size=1)  # type: ignore[list-item]
    with pytest.raises(RuntimeError, match="closed"):
        pool.verify_many([("1", "1")])


def test_no_worker_is_left_behind(odd: str) -> None:
    with VerifierPool(odd, workers=2) as pool:
        pool.verify_many([("a", "a")] * 8, chunk_size=1)
        pids = [process.pid for process in pool._processes.values()]
    assert pids
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
