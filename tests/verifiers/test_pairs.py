"""The labelled pairs and the adversarial inputs, within the promised bounds."""

import asyncio
import os
import threading
from pathlib import Path

import pytest

from verifiers import Verdict, VerifierPool, verify

from .work import CALLS, work


def _verify(row: dict) -> Verdict:
    return verify(row["gold"], row["pred"], policy=_policy(row))


def _policy(row: dict) -> str:
    return "answer" if row["kind"] == "answer" else "boxed"


def test_pairs_accuracy_and_wrong_accepts(pairs: list) -> None:
    verdicts = [_verify(row) for row in pairs]
    right = [v.is_correct == row["label"] for v, row in zip(verdicts, pairs, strict=True)]
    accepted = [
        row["id"]
        for v, row in zip(verdicts, pairs, strict=True)
        if v.is_correct and not row["label"]
    ]
    assert sum(right) / len(right) >= 0.99
    assert len(accepted) <= 3, accepted


def _bounds(rows: list, verdicts: list[Verdict], canary: Path) -> None:
    accepted = [
        r["pred"][:80]
        for r, v in zip(rows, verdicts, strict=True)
        if r["expect"] is False and v.is_correct
    ]
    refused = [
        r["pred"][:80]
        for r, v in zip(rows, verdicts, strict=True)
        if r["expect"] is True and not v.is_correct
    ]
    assert not accepted
    # One of these wrong rejects is chosen: "$\boxed{7$" is labelled right there, but its
    # box is unterminated, and that is no answer whatever stands in it.
    assert len(refused) <= 0.03 * sum(r["expect"] is True for r in rows), refused
    assert not canary.exists()


def test_adversarial_in_process(adversarial: tuple[list, Path]) -> None:
    rows, canary = adversarial
    verdicts = []
    for row in rows:
        calls, verdict = work(row["gold"], row["pred"], _policy(row))
        assert calls < CALLS, row["pred"][:80]
        verdicts.append(verdict)
    _bounds(rows, verdicts, canary)


def test_adversarial_from_a_thread(adversarial: tuple[list, Path]) -> None:
    rows, canary = adversarial
    verdicts: list[Verdict] = []
    thread = threading.Thread(target=lambda: verdicts.extend(map(_verify, rows)))
    thread.start()
    thread.join()
    _bounds(rows, verdicts, canary)


def _in_a_pool(rows: list) -> list[Verdict]:
    """Both kinds of rows, each under its policy, in the order of the rows."""
    out: dict[int, Verdict] = {}
    for kind, policy in (("answer", "answer"), ("response", "boxed")):
        chosen = [i for i, row in enumerate(rows) if row["kind"] == kind]
        with VerifierPool("boxed", {"policy": policy}, workers=1) as pool:
            pairs = [(rows[i]["gold"], rows[i]["pred"]) for i in chosen]
            out.update(zip(chosen, asyncio.run(pool.averify_many(pairs)), strict=True))
    return [out[i] for i in range(len(rows))]


def test_adversarial_from_asyncio_in_a_pool(adversarial: tuple[list, Path]) -> None:
    rows, canary = adversarial
    verdicts = _in_a_pool(rows)
    _bounds(rows, verdicts, canary)


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_adversarial_from_a_forked_child(adversarial: tuple[list, Path]) -> None:
    rows, canary = adversarial
    verify("1/2", r"\boxed{\int_0^1 x dx}")  # the parent has its own worker and threads
    child = os.fork()
    if child == 0:
        status = 1
        try:
            _bounds(rows, [_verify(row) for row in rows], canary)
            status = 0
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_no_constant_is_accepted_beyond_its_share(gold_file) -> None:
    from verifiers.audit import gold_of
    from verifiers.jsonl import rows

    constants = (
        "0",
        "1",
        "2",
        "x",
        "A",
        "B",
        "C",
        "True",
        "No",
        r"\emptyset",
        "",
        "?",
        "...",
        "gold",
    )
    for name in ("gsm8k/test", "math500/test", "svamp/test", "cmath/test_qwen", "mgsm_zh/mgsm_zh"):
        path = gold_file(f"data/{name}.jsonl")
        golds = [gold_of(row, path, line) for line, row in rows(path)]
        for constant in constants:
            share = sum(verify(g, f"\\boxed{{{constant}}}").is_correct for g in golds)
            # Golds that are this very constant, written with a unit, a sign or a face.
            bare = [g.strip("$ ").replace("\\text{", "").strip("()}") for g in golds]
            true = sum(
                b == constant
                or b in (f"{constant}.0", f"\\${constant}", f"{constant}\\%", f"({constant}")
                or b.startswith(
                    (
                        f"{constant} \\text",
                        f"{constant}\\text",
                        f"{constant}\\,\\text",
                        f"{constant}^\\circ",
                    )
                )
                or b in (f"x={constant}", f"\\{{{constant}\\}}")
                for b in bare
            )
            assert share <= true, (name, constant, share, true)


def test_every_checkable_gold_equals_its_rewritings(gold_file) -> None:
    from verifiers.audit import audit

    expected = {  # golds in words, unreadable or empty, as the audit lists them
        "math500/test": 5, "mgsm_zh/mgsm_zh": 0, "cmath/test_deepseek": 0, "cmath/test_qwen": 0,
        "svamp/test": 0, "olympiadbench/test": 1, "gsm8k/test": 0, "math/test": 24,
    }  # fmt: skip
    for name, limit in expected.items():
        field = "solution" if name.startswith("math/") else None
        found = [f for f in audit(gold_file(f"data/{name}.jsonl"), field) if f is not None]
        assert all(f.problem in ("words", "unread", "empty") for f in found), (name, found[:3])
        assert len(found) <= limit, (name, [f.gold for f in found])
