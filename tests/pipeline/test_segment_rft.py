"""Segment-level RFT: the reward processing worked by hand, its graders, targets and terms."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from data_prep.config import validate
from data_prep.errors import UserError
from data_prep.schema import Problem
from pipeline.batch import Sequence, flatten
from pipeline.config import TrainConfig
from pipeline.engines import Completion, Group, Prompt, Sampling
from pipeline.methods import segment_rft
from pipeline.model import load_model
from pipeline.reward import RewardConfig, RewardMaker
from pipeline.rollout import Rollouts
from pipeline.segment_grader import (
    FixedGrader,
    GraderConfig,
    ModelGrader,
    RuleGrader,
    create_grader,
    read_grades,
)
from pipeline.segment_reward import (
    Grades,
    SegmentRewardConfig,
    moving_average,
    progress_effect,
    scaled_thoughts,
    segment_rewards,
    standardised,
)
from pipeline.trainer import Trainer
from verifiers import Outcome, Verdict

from .small_run import small_run

EXACT = {"rtol": 1e-12, "atol": 1e-12}
# G = 0.5; three thoughts.
GRADES = Grades(0.5, [0.2, 0.6, 1.0], [0.5, 0.75, 0.25])
CONSTANTS = SegmentRewardConfig(
    epsilon_std=0.01,
    alpha=1.5,
    delta=0.5,
    window=2,
    kappa_plus=2.0,
    kappa_minus=4.0,
    base=1.25,
    lam=2.0,
    rho=3.0,
)
# μ_S = 0.6; var = (0.16 + 0 + 0.16)/3 = 8/75; σ_S = √(8/75 + 0.01).
SIGMA_S = math.sqrt(8 / 75 + 0.01)
S_HAT = [0.5 * -0.4 / SIGMA_S, 0.0, 1.5 * 0.4 / SIGMA_S]
# P̄ = 0.5, 0.5, (0.5 + 0.75)/2 = 0.625; ΔP = 0, 0.25, −0.375.
P_BAR = [0.5, 0.5, 0.625]
# E: 0; √0.25·0.75/2 = 0.1875; −log(1.375)·(1.25 − 0.25)/4.
E = [0.0, 0.1875, -math.log(1.375) / 4]
# m = S/2 = 0.1, 0.3, 0.5; Q = E·m.
Q = [0.0, 0.05625, -math.log(1.375) / 8]
C = [0.5 + s + q for s, q in zip(S_HAT, Q, strict=True)]


def test_thoughts_are_standardised_and_scaled_by_side():
    assert scaled_thoughts(GRADES.thoughts, CONSTANTS) == pytest.approx(S_HAT, rel=1e-12)
    # √(0.106667 + 0.01) = 0.341565, so −0.2/0.341565 and 0.6/0.341565.
    assert pytest.approx([-0.585540, 0.0, 1.756620], abs=1e-6) == S_HAT
    assert scaled_thoughts([0.7, 0.7], CONSTANTS) == [0.0, 0.0]
    assert scaled_thoughts([], CONSTANTS) == []


def test_progress_is_compared_with_the_mean_of_the_window():
    assert moving_average(GRADES.progress, 2) == P_BAR
    assert moving_average(GRADES.progress, 1) == [0.5, 0.5, 0.75]
    # W larger than what came before: the mean of all of it.
    assert moving_average([1.0, 0.0, 0.5, 0.25], 9) == [1.0, 1.0, 0.5, 0.5]
    assert moving_average([], 2) == []


def test_gain_and_loss_of_progress_have_their_own_form():
    found = [progress_effect(p, m, CONSTANTS) for p, m in zip(GRADES.progress, P_BAR, strict=True)]
    assert found == pytest.approx(E, rel=1e-12)
    assert found[2] == pytest.approx(-0.079613, abs=1e-6)


def test_rewards_of_segments_term_by_term():
    found = segment_rewards(GRADES, True, CONSTANTS)
    # C = G + Ŝ + Q = 0.5 − 0.585540 + 0, 0.5 + 0 + 0.05625, 0.5 + 1.756620 − 0.039807;
    # the answer: ρ·G = 1.5.
    assert found == pytest.approx([*C, 1.5], rel=1e-12)
    assert found == pytest.approx([-0.085540, 0.55625, 2.216813, 1.5], abs=1e-6)
    assert segment_rewards(GRADES, False, CONSTANTS) == found[:3]
    assert segment_rewards(Grades(1.0, [], []), True, CONSTANTS) == [3.0]


def test_combined_scores_can_be_standardised():
    found = segment_rewards(GRADES, True, CONSTANTS.model_copy(update={"zscore": True}))
    mean = sum(C) / 3
    sigma = math.sqrt(sum((c - mean) ** 2 for c in C) / 3 + 0.01)
    assert found == pytest.approx([*((c - mean) / sigma for c in C), 1.5], rel=1e-12)
    assert sum(found[:3]) == pytest.approx(0.0, abs=1e-12)


def test_caps_bound_thoughts_and_not_the_answer():
    capped = CONSTANTS.model_copy(update={"alpha1": 0.25, "alpha2": 1.0})
    # α1·G = 0.125 and G + α2 = 1.5.
    assert segment_rewards(GRADES, True, capped) == pytest.approx([0.125, 0.55625, 1.5, 1.5])
    low = CONSTANTS.model_copy(update={"alpha1": 0.25})
    assert segment_rewards(GRADES, True, low)[2] == pytest.approx(C[2])
    high = CONSTANTS.model_copy(update={"alpha2": 0.0})
    assert segment_rewards(GRADES, True, high)[:2] == pytest.approx([C[0], 0.5])


def solution(pieces: list[str], answered: bool = True, **fields: Any) -> Sequence:
    """A token a piece."""
    count = len(pieces)
    fields = {"reward": 1.0, "correct": True, **fields}
    return Sequence(
        [1],
        list(range(10, 10 + count)),
        [True] * count,
        0,
        pieces=pieces,
        answered=answered,
        segments=list(range(count)),
        text="".join(pieces),
        **fields,
    )


PROBLEM = Problem("p0", "What is 12+5-3?", "14", "test", "train")
PIECES = ["12+5=17\n", "so far so good\n", "17-3=15\n", "\\boxed{14}"]


def rule(sequence: Sequence) -> Grades | None:
    (found,) = RuleGrader().grade([PROBLEM], [sequence])
    return found


def test_the_rule_grades_by_equations_continuations_and_verdict():
    # Shares 1, none, 0: the second takes their mean.
    graded = solution(PIECES, success=[0.25, 0.5, 0.75])
    assert rule(graded) == Grades(1.0, [1.0, 0.5, 0.0], [0.25, 0.5, 0.75])
    words = solution(["one\n", "two\n", "\\boxed{1}"], reward=0.0, success=[0.5, 0.25])
    assert rule(words) == Grades(0.0, [1.0, 1.0], [0.5, 0.25])
    # Without an answer the last segment is a thought, and behind it is the verdict.
    cut_off = solution(["1+1=2\n", "2+2="], False, reward=0.0, correct=False, success=[0.5])
    assert rule(cut_off) == Grades(0.0, [1.0, 1.0], [0.5, 0.0])
    assert rule(solution(["\\boxed{14}"])) == Grades(1.0, [], [])


def test_what_has_no_verdict_has_no_grade():
    assert rule(solution(PIECES, reward=None, success=[0.1, 0.2, 0.3])) is None
    assert rule(solution(PIECES, success=[0.1, None, 0.3])) is None
    assert rule(solution(["a"], False, correct=None)) is None
    method = segment_rft.create(segment_rft.Config())
    masked = solution(PIECES, success=[0.1, None, 0.3])
    assert method.score([PROBLEM], [masked]) == [{}]
    assert masked.reward is None
    assert method.advantages([masked]) == []


def test_rewards_stand_at_the_last_token_of_their_segment():
    method = segment_rft.create(segment_rft.Config(reward=CONSTANTS))
    graded = solution(["a", "b"], success=[0.5])
    graded.completion, graded.segments = [5, 6, 7, 8, 9], [0, 0, 0, 1, 1]
    graded.mask = [True] * 5
    (log,) = method.score([PROBLEM], [graded])
    # One thought: Ŝ = 0, ΔP = 0, so R = G = 1; the answer 3·1.
    assert graded.steps == [(2, 1.0), (4, 3.0)]
    assert log == {
        "grades": {"overall": 1.0, "thoughts": [1.0], "progress": [0.5]},
        "pieces": ["a", "b"],
    }


def write_grades(folder: Path, *rows: dict[str, Any]) -> str:
    path = folder / "grades.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_grades_can_be_given(tmp_path):
    row = {"problem_id": "p0", "overall": 0.5, "thoughts": [0.1, 0.9], "progress": [0.2, 0.8]}
    grader = create_grader(GraderConfig(kind="fixed", path=write_grades(tmp_path, row)))
    found = grader.grade([PROBLEM, PROBLEM], [solution(PIECES), solution(PIECES[2:])])
    assert found == [Grades(0.5, [0.1, 0.9, 0.9], [0.2, 0.8, 0.8]), Grades(0.5, [0.1], [0.2])]
    other = Problem("p1", "", "", "test", "train")
    with pytest.raises(UserError, match="no row of problem 'p1'"):
        grader.grade([other], [solution(PIECES)])


@pytest.mark.parametrize(
    "change",
    [
        {"overall": "good"},
        {"thoughts": [0.1]},
        {"thoughts": [], "progress": []},
        {"progress": [0.1, float("nan")]},
        {"overall": None},
    ],
)
def test_given_grades_that_are_none_are_refused(tmp_path, change):
    row = {"problem_id": "p0", "overall": 0.5, "thoughts": [0.1, 0.9], "progress": [0.2, 0.8]}
    with pytest.raises(UserError, match="line 1"):
        FixedGrader(write_grades(tmp_path, {**row, **change}))


class _Model(ThreadingHTTPServer):
    """An OpenAI-compatible endpoint whose replies a function makes."""

    def __init__(self, reply: Callable[[int, dict[str, Any]], tuple[int, str]]) -> None:
        self.reply, self.requests = reply, []
        super().__init__(("127.0.0.1", 0), _Handler)


class _Handler(BaseHTTPRequestHandler):
    server: _Model

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        number = len(self.server.requests)
        self.server.requests.append(body)
        status, content = self.server.reply(number, body)
        data = json.dumps({"choices": [{"message": {"content": content}}]}).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass


@pytest.fixture
def endpoint() -> Iterator[Any]:
    servers: list[_Model] = []

    def start(reply: Callable[[int, dict[str, Any]], tuple[int, str]], **options: Any):
        server = _Model(reply)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}).start()
        servers.append(server)
        url = f"http://127.0.0.1:{server.server_port}/v1"
        plain = {"base_url": url, "backoff_s": 0.0, "timeout_s": 5.0, "model": "judge"}
        return server, GraderConfig(kind="model", **{**plain, **options})

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def reply_of(overall: float, *pairs: tuple[float, float]) -> str:
    entries = [{"thought": s, "progress": p} for s, p in pairs]
    return json.dumps({"overall": overall, "thoughts": entries})


GOOD = reply_of(0.5, (1, 0.25), (0.5, 0.5), (0, 0.75))


def test_a_model_grades_by_numbers_in_json(endpoint):
    server, config = endpoint(lambda n, body: (200, GOOD), sampling_params={"temperature": 0})
    found = ModelGrader(config).grade([PROBLEM], [solution(PIECES)])
    assert found == [Grades(0.5, [1.0, 0.5, 0.0], [0.25, 0.5, 0.75])]
    (body,) = server.requests
    text = body["messages"][1]["content"]
    for part in ("What is 12+5-3?", "Reference answer: 14", "[1] 12+5=17", "[3] 17-3=15", "boxed"):
        assert part in text
    assert "[4]" not in text
    assert body["temperature"] == 0
    schema = body["response_format"]["json_schema"]["schema"]
    assert schema["properties"]["thoughts"]["minItems"] == 3


def test_unusable_replies_are_asked_for_again_and_end_as_no_grade(endpoint):
    replies = [(503, "busy"), (200, "0.5"), (200, GOOD)]
    server, config = endpoint(lambda n, body: replies[n], workers=1)
    assert ModelGrader(config).grade([PROBLEM], [solution(PIECES)])[0] is not None
    assert len(server.requests) == 3
    server, config = endpoint(lambda n, body: (200, reply_of(0.5, (1, 1))), retries=1)
    assert ModelGrader(config).grade([PROBLEM], [solution(PIECES)]) == [None]
    assert len(server.requests) == 2


def test_grades_of_many_solutions_keep_their_order(endpoint):
    def by_solution(number: int, body: dict[str, Any]) -> tuple[int, str]:
        text = body["messages"][1]["content"]
        return 200, reply_of(int(text.rsplit("{", 1)[1].rstrip("}")) / 100, (1, 1))

    _, config = endpoint(by_solution)
    many = [solution(["1+1=2\n", f"\\boxed{{{i}}}"]) for i in range(40)]
    found = ModelGrader(config).grade([PROBLEM] * 40, many)
    assert [g and g.overall for g in found] == [i / 100 for i in range(40)]


@pytest.mark.parametrize(
    "reply",
    [
        "0.5",
        "overall: 0.5",
        "[]",
        '{"overall": 0.5}',
        '{"overall": 0.5, "thoughts": [{"thought": 1, "progress": 1}], "why": ""}',
        '{"overall": 1.5, "thoughts": [{"thought": 1, "progress": 1}]}',
        '{"overall": true, "thoughts": [{"thought": 1, "progress": 1}]}',
        '{"overall": "0.5", "thoughts": [{"thought": 1, "progress": 1}]}',
        '{"overall": NaN, "thoughts": [{"thought": 1, "progress": 1}]}',
        '{"overall": 0.5, "thoughts": []}',
        '{"overall": 0.5, "thoughts": [{"thought": 1}]}',
        '{"overall": 0.5, "thoughts": [{"thought": 1, "progress": -0.1}]}',
        '{"overall": 0.5, "thoughts": [0.5]}',
    ],
)
def test_replies_are_read_strictly(reply):
    with pytest.raises(ValueError):
        read_grades(reply, 1)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"kind": "fixed"}, "path"),
        ({"kind": "rule", "path": "x"}, "path"),
        ({"kind": "model", "continuations": 7}, "continuations is for the grader 'rule'"),
        ({"kind": "rule", "base_url": "http://x"}, "base_url is for the grader 'model'"),
        ({"kind": "model", "base_url": "x"}, "http"),
        ({"kind": "model", "input": [{"role": "user"}]}, "role and content"),
        ({"kind": "model", "input": [{"role": "user", "content": "{{item.x}}"}]}, "item.x"),
    ],
)
def test_graders_that_make_no_sense_are_refused(options, match):
    with pytest.raises(ValidationError, match=match):
        GraderConfig(**options)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"critic_init": "judge"}, "critic_init"),
        ({"kl": "policy", "beta": 0.0}, "beta"),
        ({"kl": "k3"}, "kl"),
    ],
)
def test_methods_that_make_no_sense_are_refused(options, match):
    with pytest.raises(ValidationError, match=match):
        segment_rft.Config(**options)


class Bits:
    """A solution is three lines of a bit and an answer; all continuations, each as often.

    From behind j bits there are 2^(3 − j) of them: with eight samples the shares of what follows
    are exact probabilities.
    """

    policy_version = 0

    def __init__(self) -> None:
        self.asked: list[tuple[str, int, int]] = []

    def generate(self, prompts, sampling):
        groups = []
        for prompt in prompts:
            self.asked.append((prompt.id, sampling.n, prompt.budget(sampling)))
            known = len(prompt.token_ids) - 2
            completions = []
            for index in range(sampling.n):
                bits = [index >> j & 1 for j in range(3 - known)]
                ids = [*bits, 9]
                completions.append(Completion(ids, [-0.7] * len(ids), text_of(ids), "stop", index))
            groups.append(Group(prompt, completions))
        return groups


def text_of(ids: list[int]) -> str:
    return "".join("\\boxed{}" if i == 9 else f"{i}\n" for i in ids)


class Majority:
    """Correct where at least two of the three bits are set."""

    def verify_many(self, pairs):
        return [
            Verdict(Outcome.CORRECT if text.count("1") >= 2 else Outcome.INCORRECT)
            for _, text in pairs
        ]


def bits_of(folder: Path, **options: Any) -> Rollouts:
    return Rollouts(
        [Problem("p0", "?", "x", "test", "train")],
        [Prompt("p0", (7, 8))],
        Bits(),  # type: ignore[arg-type]
        Majority(),  # type: ignore[arg-type]
        RewardMaker(RewardConfig(), text_of),
        segment_rft.create(segment_rft.Config(**options)),
        Sampling(n=8, seed=1, max_tokens=6),
        1,
        folder,
    )


def test_progress_by_continuations_is_the_exact_chance_of_success(tmp_path):
    made = bits_of(tmp_path, grader={"continuations": 8})
    drawn = made.draw(0)
    chance = [
        # P(at least 2 of 3 | the first j bits), by counting what is left.
        {0: 0.25, 1: 0.75},
        {(0, 0): 0.0, (0, 1): 0.5, (1, 0): 0.5, (1, 1): 1.0},
    ]
    for sequence in drawn.chosen:
        a, b, c, _ = sequence.completion
        expected = [chance[0][a], chance[1][a, b], float(a + b + c >= 2)]
        assert sequence.success == expected
        assert sequence.answered
        assert [place for place, _ in sequence.steps] == [0, 1, 2, 3]
        grades = Grades(float(sequence.correct or 0.0), [1.0] * 3, expected)
        rewards = segment_rewards(grades, True, SegmentRewardConfig())
        assert [value for _, value in sequence.steps] == rewards
    # Equal beginnings are asked once: 2 + 4 + 8 of them, 8 samples each, beside the 8 themselves.
    asked = made.engine.asked  # type: ignore[attr-defined]
    assert len(asked) == 1 + 14
    assert asked[1] == ("p0/sample-0/prefix-1", 8, 5)
    assert drawn.samples == 8 + 14 * 8
    assert len(drawn.everything) == len(drawn.chosen) == 8
    assert made.method.samples(8) == 8 * (1 + 8 * 8) >= drawn.samples
    rows = [json.loads(line) for line in (tmp_path / "step-00000.jsonl").read_text().splitlines()]
    assert len(rows) == drawn.samples
    assert rows[0]["grades"]["progress"] == [0.25, 0.0, 0.0]
    assert rows[0]["pieces"] == ["0\n", "0\n", "0\n", "\\boxed{}"]
    assert len(rows[0]["steps"]) == 4
    assert all("prefix" in row and row["reward"] is None for row in rows[8:])


def test_later_thoughts_can_be_joined(tmp_path):
    made = bits_of(tmp_path, grader={"continuations": 4}, thoughts=2)
    drawn = made.draw(0)
    assert drawn.chosen[0].pieces == ["0\n", "0\n0\n", "\\boxed{}"]
    assert drawn.chosen[0].segments == [0, 1, 1, 2]
    assert made.method.samples(8) == 8 * (1 + 2 * 4)


def double(values: list[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def two_solutions():
    """Three segments of 2, 1 and 2 tokens, and one of 2."""
    first = Sequence(
        [1],
        [2] * 5,
        [True] * 5,
        0,
        reward=1.0,
        segments=[0, 0, 1, 2, 2],
        steps=[(1, 0.5), (2, -0.25), (4, 1.0)],
    )
    second = Sequence([1], [3, 4], [True] * 2, 1, reward=0.0, segments=[0, 0], steps=[(1, 2.0)])
    tokens = flatten([first, second], torch.float64)
    tokens.old_logp = double([-1.0] * 7)
    tokens.old_value = double([0.1, 9.0, 0.2, 0.3, 9.0, 0.4, 9.0])
    tokens.end_value = double([9.0] * 7)
    return tokens


def test_targets_and_advantages_by_hand():
    method = segment_rft.create(segment_rft.Config(gamma=0.9, beta=0.0))
    tokens = two_solutions()
    method.prepare(tokens)
    # Y = 0.5 + 0.9·0.2, −0.25 + 0.9·0.3, 1 (nothing follows); 2.
    expected = [0.68, 0.68, 0.02, 1.0, 1.0, 2.0, 2.0]
    torch.testing.assert_close(tokens.target, double(expected), **EXACT)
    # A by V_rollout, before the first update: Y − 0.1, 0.2, 0.3, 0.4.
    before = [0.58, 0.58, -0.18, 0.7, 0.7, 1.6, 1.6]
    torch.testing.assert_close(tokens.advantage, double(before), **EXACT)
    # A by V_θ as it is now, read where a segment starts.
    tokens.value = double([0.5, 9.0, 0.5, 0.5, 9.0, 0.5, 9.0])
    now = [0.18, 0.18, -0.48, 0.5, 0.5, 1.5, 1.5]
    torch.testing.assert_close(method.advantage(tokens), double(now), **EXACT)


def test_policy_and_value_terms_by_hand():
    method = segment_rft.create(segment_rft.Config(gamma=0.9, beta=0.5, value_clip=0.2))
    tokens = two_solutions()
    method.prepare(tokens)
    tokens.value = double([0.5, 9.0, 0.5, 0.5, 9.0, 0.5, 9.0])
    tokens.weight = method.weights(tokens, 8)
    assert tokens.weight.tolist() == [0.5] * 7  # 1/N a trajectory
    # log ρ: two tokens add up. ρ = 1.1, 0.5, 1.5 and 1.
    step = [math.log(1.1) / 2] * 2 + [math.log(0.5)] + [math.log(1.5) / 2] * 2 + [0.0] * 2
    logp = _old(tokens) + double(step)
    # 1.1·0.18; A = −0.48 < 0 and ρ < 0.8: 0.8·(−0.48); A = 0.5 > 0 and ρ > 1.2: 1.2·0.5; 1.5.
    policy = 0.198 - 0.384 + 0.6 + 1.5
    assert float(method.objective(tokens, logp)) == pytest.approx(policy / 2, rel=1e-12)
    found = method.gradient_coefficient(tokens, logp).tolist()
    assert found == pytest.approx([0.198, 0.198, 0.0, 0.0, 0.0, 1.5, 1.5], rel=1e-12)
    # β·KL(π_rollout‖π_ref) of every token, without a coefficient.
    tokens.old_kl = double([0.1] * 7)
    assert float(method.objective(tokens, logp)) == pytest.approx((policy - 0.35) / 2, rel=1e-12)
    assert method.gradient_coefficient(tokens, logp).tolist() == found
    # Value, at starts: V = 0.5 is 0.4, 0.3, 0.2 and 0.1 from V_rollout; c_v = 0.2, so V_clip is
    # 0.3, 0.4, 0.5, 0.5. Y = 0.68, 0.02, 1, 2: the worse of (−0.18, −0.38), (0.48, 0.38),
    # (−0.5, −0.5) and (−1.5, −1.5).
    value = _old(tokens) * 0 + tokens.value
    loss = 0.5 * (0.38**2 + 0.48**2 + 0.5**2 + 1.5**2)
    assert float(method.value_loss(tokens, value)) == pytest.approx(loss / 2, rel=1e-12)
    slope = method.value_coefficient(tokens, value).tolist()
    assert slope == pytest.approx([0.0, 0.0, 0.48, -0.5, 0.0, -1.5, 0.0], rel=1e-12)
    plain = segment_rft.create(segment_rft.Config(value_clip=-1.0))
    loss = 0.5 * (0.18**2 + 0.48**2 + 0.5**2 + 1.5**2)
    assert float(plain.value_loss(tokens, value)) == pytest.approx(loss / 2, rel=1e-12)


def _old(tokens) -> torch.Tensor:
    assert tokens.old_logp is not None
    return tokens.old_logp


@pytest.mark.parametrize("whiten", ["trajectory", "batch"])
def test_rewards_are_whitened_over_what_is_said(whiten):
    method = segment_rft.create(segment_rft.Config(whiten=whiten, reward={"epsilon_std": 0.01}))
    samples = [
        solution(["a", "b"], steps=[(0, 1.0), (1, 3.0)]),
        solution(["a"], steps=[(0, 5.0)]),
        solution(["a"], steps=[(0, 9.0)], reward=None),
    ]
    found = [[v for _, v in s.steps] for s in method.advantages(samples)]
    if whiten == "trajectory":
        assert found == [standardised([1.0, 3.0], 0.01), [0.0]]
    else:
        flat = standardised([1.0, 3.0, 5.0], 0.01)
        assert found == [flat[:2], flat[2:]]
    assert samples[0].steps == [(0, 1.0), (1, 3.0)]


def test_terms_without_what_they_need_are_errors():
    method = segment_rft.create(segment_rft.Config())
    tokens = two_solutions()
    tokens.old_logp = None
    with pytest.raises(ValueError, match="behaviour policy"):
        method.prepare(tokens)
    tokens.old_logp, tokens.old_value = double([0.0] * 7), None
    with pytest.raises(ValueError, match="critic"):
        method.prepare(tokens)
    with pytest.raises(ValueError, match="critic"):
        method.advantage(tokens)


@pytest.mark.parametrize("kl", ["rollout", "policy"])
def test_the_divergence_as_written_is_told_and_has_no_gradient(checkpoint, tmp_path, kl):
    """Against the dense KL of whole distributions; with the policy's own it has a gradient."""
    options = {"kind": "segment_rft", "beta": 0.5, "kl": kl}
    config = validate(TrainConfig, {"name": "s", "method": options}, "s")
    method = segment_rft.create(config.method)  # type: ignore[arg-type]
    model = load_model(checkpoint, "float64")
    reference = load_model(checkpoint, "float64").requires_grad_(False)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.mul_(0.9)
    from pipeline.critic import value_head

    trainer = Trainer(small_run(tmp_path), config, method, model, reference, value_head(model))
    # Rewards of 0 and a critic that says 0: nothing but the divergence is left.
    sequences = [
        Sequence([20, 41, 62], [5, 6, 7], [True] * 3, 0, reward=0.0, steps=[(2, 0.0)]),
        Sequence([21, 40], [8, 9], [True] * 2, 1, reward=0.0, steps=[(1, 0.0)]),
    ]
    dense = 0.0
    for s in sequences:
        ids = torch.tensor([s.prompt + s.completion])
        start = len(s.prompt) - 1
        with torch.no_grad():
            ours = torch.log_softmax(model(ids).logits[0, start:-1], -1)
            theirs = torch.log_softmax(reference(ids).logits[0, start:-1], -1)
        dense += float((ours.exp() * (ours - theirs)).sum())
    tokens = trainer.flat(sequences)
    found, own, *_ = trainer._accumulate(sequences, tokens)
    assert found["objective"] == pytest.approx(-0.5 * dense / 2, rel=1e-9)
    largest = max(float(p.grad.abs().max()) for p in model.parameters() if p.grad is not None)
    if kl == "rollout":
        assert own["kl_rollout"] == pytest.approx(dense / 5, rel=1e-9)
        assert largest == 0.0
    else:
        assert "kl_rollout" not in own
        assert largest > 1e-4
