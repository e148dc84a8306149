"""The checkers beyond `boxed`, on examples worked by hand."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from verifiers import Outcome, load_checker
from verifiers.checkers._formula import Formula
from verifiers.checkers._grader import TemplateError, fill


def _check(kind: str, gold: str, text: str, **options: object):
    return load_checker(kind, options).check(gold, text)


class _Model(ThreadingHTTPServer):
    """An OpenAI-compatible endpoint that plays back replies and records requests."""

    def __init__(self, replies: list) -> None:
        self.replies, self.requests = list(replies), []
        super().__init__(("127.0.0.1", 0), _Handler)

    def handle_error(self, request, client_address) -> None:
        pass


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append((self.path, body))  # type: ignore[attr-defined]
        reply = self.server.replies.pop(0)  # type: ignore[attr-defined]
        status, content = reply if isinstance(reply, tuple) else (200, reply)
        data = json.dumps({"choices": [{"message": {"content": content}}]}).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def model() -> Iterator:
    servers = []

    def start(*replies: object) -> tuple[_Model, dict]:
        server = _Model(list(replies))
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}).start()
        servers.append(server)
        url = f"http://127.0.0.1:{server.server_port}/v1"
        return server, {"base_url": url, "backoff_s": 0.0, "timeout_s": 5.0, "model": "judge"}

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    ("operation", "text", "reference", "score"),
    [
        ("eq", "cat", "cat", 1), ("eq", "cat ", "cat", 0), ("ne", "cat", "dog", 1),
        ("ne", "cat", "cat", 0), ("like", "a cat sat", "cat", 1), ("like", "a Cat sat", "cat", 0),
        ("ilike", "a Cat sat", "cAt", 1), ("ilike", "a dog", "cat", 0), ("like", "a", "a_%", 0),
    ],
)  # fmt: skip
def test_string_check(operation: str, text: str, reference: str, score: int) -> None:
    options = {
        "type": "string_check", "name": "x", "operation": operation,
        "input": "{{sample.output_text}}", "reference": "{{item.wanted}}",
    }  # fmt: skip
    verdict = _check("string_check", json.dumps({"wanted": reference}), text, **options)
    assert verdict.score == score
    assert verdict.is_correct == bool(score)


@pytest.mark.parametrize(
    "metric",
    ["fuzzy_match", "bleu", "gleu", "meteor", "cosine", "rouge_1", "rouge_2", "rouge_3", "rouge_l"],
)
def test_text_similarity_orders_texts(metric: str) -> None:
    library = {"fuzzy_match": "rapidfuzz", "bleu": "sacrebleu", "gleu": "nltk", "meteor": "nltk"}
    pytest.importorskip(library.get(metric, "rouge_score"))
    reference = "the quick brown fox jumps over the lazy dog near the river"
    near = "the quick brown fox jumped over the lazy dog near a river"
    scores = [
        _check("text_similarity", reference, text, evaluation_metric=metric).score
        for text in (reference, near, "entirely different words altogether here")
    ]
    assert scores[0] == pytest.approx(1.0, abs=0.01)
    assert scores[0] > scores[1] > scores[2]
    assert scores[2] < 0.45


def test_text_similarity_values_by_hand() -> None:
    pytest.importorskip("rapidfuzz")
    pytest.importorskip("rouge_score")
    # 2 * 3 matching characters of 3 + 4; one of two words in common
    assert _check("text_similarity", "abcd", "abc").score == pytest.approx(6 / 7, abs=1e-3)
    assert _check(
        "text_similarity", "a b", "a c", evaluation_metric="cosine"
    ).score == pytest.approx(0.5)
    assert _check("text_similarity", "one two", "one six", evaluation_metric="rouge_1").score == 0.5


def test_score_model_reads_strictly_and_retries(model) -> None:
    server, options = model((503, "busy"), "0.9 I think", '{"result": 7}', '{"result": 0.75}')
    verdict = _check(
        "score_model", json.dumps({"q": "2+2?", "reference": "4"}), "four", **options, retries=3,
        type="score_model", name="j", range=[0, 1], pass_threshold=0.5,
        sampling_params={"temperature": 0},
        input=[{"role": "user", "content": "{{item.q}} {{item.reference}} {{sample.output_text}}"}],
    )  # fmt: skip
    assert (verdict.outcome, verdict.score) == (Outcome.CORRECT, 0.75)
    path, body = server.requests[-1]
    assert (path, body["model"], body["temperature"]) == ("/v1/chat/completions", "judge", 0)
    assert body["messages"] == [{"role": "user", "content": "2+2? 4 four"}]
    assert len(server.requests) == 4


@pytest.mark.parametrize(
    "reply", ["1.5", '{"result": 2}', '"1"', "true", '{"score": null}', "", "one", "NaN"]
)
def test_score_model_never_guesses(model, reply: str) -> None:
    _, options = model(reply)
    verdict = _check("score_model", "4", "four", **options, retries=0)
    assert verdict.outcome is Outcome.ERROR
    assert verdict.score is None
    assert "judge" in (verdict.detail or "")


def test_score_model_gives_up_at_once_on_a_refusal(model) -> None:
    server, options = model((401, "no key"))
    assert _check("score_model", "4", "four", **options, retries=3).outcome is Outcome.ERROR
    assert len(server.requests) == 1


def test_label_model(model) -> None:
    labels = {"labels": ["good", "bad", "odd"], "passing_labels": ["good"]}
    _, options = model('{"label": "good"}', "bad", '{"label": "great"}', "good indeed")
    grader = load_checker("label_model", {**options, **labels, "retries": 0, "type": "label_model"})
    outcomes = [grader.check("4", "four").outcome.value for _ in range(4)]
    assert outcomes == ["correct", "incorrect", "error", "error"]


def test_a_template_is_not_filled_twice() -> None:
    item, sample = (
        {"secret": "s", "x": {"y": [1, {"z": "deep"}]}},
        {"output_text": "{{item.secret}}"},
    )
    assert fill("{{sample.output_text}}", item, sample) == "{{item.secret}}"
    assert fill("{{ item.x.y[1].z }} {{item.x.y.0}}", item, sample) == "deep 1"
    with pytest.raises(TemplateError, match=r"no 'nope'; found \['secret', 'x'\]"):
        fill("{{item.nope}}", item, sample)
    with pytest.raises(TemplateError, match="not of the form"):
        fill("{{item.__class__()}}", item, sample)


def test_output_json() -> None:
    options = {"input": "{{sample.output_json.answer}}", "reference": "{{item.answer}}"}
    assert _check("string_check", '{"answer": 4}', '{"answer": 4}', **options).is_correct
    assert _check("string_check", '{"answer": 4}', "not json", **options).outcome is Outcome.ERROR


def test_multi_by_hand() -> None:
    pytest.importorskip("rapidfuzz")
    options = {
        "type": "multi", "name": "m",
        "graders": {
            "same": {"type": "string_check", "name": "s", "operation": "eq",
                     "input": "{{sample.output_text}}", "reference": "{{item.reference}}"},
            "like": {"type": "text_similarity", "name": "l", "evaluation_metric": "fuzzy_match",
                     "input": "{{sample.output_text}}", "reference": "{{item.reference}}"},
        },
        "calculate_output": "0.25 * same + 0.75 * max(like, 0) ^ 2",
    }  # fmt: skip
    verdict = _check("multi", "abcd", "abc", **options)
    assert verdict.score == pytest.approx(0.75 * (6 / 7) ** 2, abs=1e-3)
    with pytest.raises(ValueError, match="names"):
        _check("multi", "a", "a", **{**options, "calculate_output": "same + other"})


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1 + 2 * 3", 7), ("(1 + 2) * 3", 9), ("2 ^ 3 ^ 2", 512), ("-2 ^ 2", -4),
        ("7 / 2 - 1", 2.5),
        ("min(3, x, 2)", 2), ("max(x)", 5), ("abs(-x)", 5), ("floor(2.9) + ceil(2.1)", 5),
        ("exp(0) + sqrt(16) + log(1)", 5), ("1e2", 100), ("10 - 4 - 3", 3),
    ],
)  # fmt: skip
def test_formula(text: str, value: float) -> None:
    assert Formula(text, {"x"}).value({"x": 5}) == value


@pytest.mark.parametrize(
    "text",
    ["", "y", "x x", "x +", "(x", "min()", "abs(1, 2)", "__import__('os')", "x.real", "x[0]",
     "lambda: x", "x if x else x", "(" * 60 + "x" + ")" * 60, "'x'", "x; x", "x = 1"],
)  # fmt: skip
def test_a_formula_is_read_whole_or_refused(text: str) -> None:
    with pytest.raises(ValueError, match="calculate_output"):
        Formula(text, {"x"})


@pytest.mark.parametrize("text", ["1 / 0", "sqrt(0 - 1)", "log(0)", "10 ^ 400", "(0 - 8) ^ 0.5"])
def test_a_formula_without_a_value(text: str) -> None:
    with pytest.raises(ArithmeticError):
        Formula(text, set()).value({})


def test_steps_by_hand() -> None:
    text = (
        "48/2 = <<48/2=24>>24 clips in May.\n"
        "Together $48 + 24 = 72$ and $72 = 73$.\n"
        "Let $x = 5$.\n"
        "$(a+b)^2 = a^2 + 2ab + b^2$\n"
        "So \\boxed{72}"
    )
    verdict = _check("steps", "72", text)
    assert verdict.steps == (1.0, 0.5, None, 1.0, None)
    assert verdict.score == pytest.approx(2.5 / 3)
    assert verdict.is_correct


@pytest.mark.parametrize(
    ("text", "good", "score"),
    [
        (r"<think>a</think>\boxed{1}", True, 1.0),
        (r"<think></think>\boxed{1}", False, 0.5),
        (r"<think>a</think>", False, 0.0),
        (r"a</think>\boxed{1}", False, 0.5),
        (r"<think>a<think>b</think>\boxed{1}", False, 0.5),
        (r"x<think>a</think>\boxed{1}", False, 0.5),
        (r"<think>\boxed{1}</think>no", False, 0.5),
    ],
)
def test_format(text: str, good: bool, score: float) -> None:
    verdict = _check("format", "", text, think=True)
    assert (verdict.is_correct, verdict.score) == (good, score)


def test_format_after_a_prompt_that_opened_the_tag() -> None:
    assert _check("format", "", r"thought</think>\boxed{1}", think=True, opened=True).is_correct
    assert not _check(
        "format", "", "<answer>1</answer><answer>2</answer>", box=False, answer_tag=True
    ).is_correct


def test_length_by_hand() -> None:
    options = {"maximum": 10, "soft": 4, "unit": "words"}
    scores = [_check("length", "", "w " * n, **options).score for n in (3, 6, 8, 10, 11)]
    assert scores == [0.0, 0.0, -0.5, -1.0, -1.0]
    with pytest.raises(ValueError, match="soft"):
        load_checker("length", {"maximum": 3, "soft": 4})


def test_compose_keeps_could_not_judge_apart() -> None:
    parts = [{"kind": "boxed"}, {"kind": "format", "options": {"think": True}, "weight": 3}]
    text = r"so \boxed{7}"
    assert _check("compose", "7", text, parts=parts).outcome is Outcome.INCORRECT
    assert _check("compose", "7", text, parts=parts, mode="any").outcome is Outcome.CORRECT
    weighted = _check("compose", "7", text, parts=parts, mode="weighted", threshold=0.7)
    assert weighted.score == pytest.approx((1 * 1 + 3 * 0.5) / 4)
    assert weighted.outcome is Outcome.INCORRECT
    # an empty gold cannot be judged; the format alone settles "all" only when it fails
    good = r"<think>a</think>\boxed{7}"
    assert _check("compose", "", good, parts=parts).outcome is Outcome.GOLD_UNPARSEABLE
    assert (
        _check("compose", "", good, parts=parts, mode="weighted").outcome
        is Outcome.GOLD_UNPARSEABLE
    )


def test_numeric_exact_choice() -> None:
    assert _check("numeric", "100", r"\boxed{100.009}").is_correct
    assert not _check("numeric", "100", r"\boxed{100.02}").is_correct
    assert _check("numeric", r"\frac{1}{3}", r"\boxed{0.33}", relative=0.02).is_correct
    assert _check("exact", "Yes", " yes ", policy="whole", ignore_case=True).is_correct
    assert _check("choice", "AC", r"\boxed{C, A}").is_correct
    assert not _check("choice", "A", r"\boxed{A or B}").is_correct
    assert _check("choice", "B", "I first thought A, but the answer is (B) 12").is_correct


def test_options_of_another_grader_are_refused() -> None:
    with pytest.raises(ValueError, match="'type' is 'multi', expected 'string_check'"):
        load_checker("string_check", {"type": "multi"})
    with pytest.raises(ValueError, match="operation is 'equals', expected one of eq"):
        load_checker("string_check", {"operation": "equals"})
    with pytest.raises(ValueError, match="passing_labels"):
        load_checker("label_model", {"passing_labels": ["great"]})
    with pytest.raises(ValueError, match=r"graders.x: type is 'pyhton'"):
        load_checker("multi", {"graders": {"x": {"type": "pyhton"}}, "calculate_output": "x"})
