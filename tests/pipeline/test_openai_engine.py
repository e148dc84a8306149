"""The engine of OpenAI-compatible endpoints, over real HTTP."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from data_prep.config import validate
from data_prep.errors import UserError
from data_prep.jsonl import read_json, read_rows
from eval.run import main as evaluate
from pipeline.config import TrainConfig
from pipeline.engines import Prompt, Sampling, openai
from pipeline.generate import generate
from pipeline.train import train

from .small_run import small_run

KEY = "sk-secret-of-the-test"


class Endpoint:
    """Answers chat completions with the number of z in the question in a box."""

    def __init__(self):
        self.asked: list[dict] = []
        self.headers: list[dict] = []
        self.faults: list = []
        self.running = self.most = 0
        self.reason = "stop"
        self.pause_s = 0.0
        self.lock = threading.Lock()
        owner = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with owner.lock:
                    owner.asked.append(body)
                    owner.headers.append(dict(self.headers))
                    owner.running += 1
                    owner.most = max(owner.most, owner.running)
                    fault = owner.faults.pop(0) if owner.faults else None
                time.sleep(owner.pause_s)
                with owner.lock:
                    owner.running -= 1
                if fault == "drop":
                    self.close_connection = True
                    return
                if callable(fault):
                    fault = fault(body)
                status, extra, reply = fault or (200, {}, owner.answer(body))
                data = reply if isinstance(reply, bytes) else json.dumps(reply).encode()
                self.send_response(status)
                for name, value in {**extra, "Content-Length": str(len(data))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, request, client_address):
                pass

        self.http = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/v1"
        self.thread = threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True)
        self.thread.start()

    def answer(self, body):
        text = rf"It is \boxed{{{body['messages'][-1]['content'].count('z')}}}."
        return {
            "choices": [{"message": {"content": text}, "finish_reason": self.reason}],
            "usage": {"completion_tokens": 7},
        }


@pytest.fixture
def endpoint():
    made = Endpoint()
    yield made
    made.http.shutdown()
    made.http.server_close()


@pytest.fixture
def engine(endpoint, monkeypatch):
    monkeypatch.setenv("OWN_KEY", KEY)
    monkeypatch.setattr(openai, "LONGEST_WAIT_S", 0.01)

    def make(**options):
        options = {"base_url": endpoint.url, "key_env": "OWN_KEY", "retries": 3, **options}
        return openai.create(openai.Config(**options), "some-model")

    return make


def prompts(count=3):
    return [
        Prompt(
            f"p{i}",
            (),
            messages=({"role": "system", "content": "s"}, {"role": "user", "content": "z" * i}),
        )
        for i in range(count)
    ]


def test_a_request_says_what_was_asked_and_each_sample_has_its_own_seed(engine, endpoint):
    sampling = Sampling(n=3, temperature=0.5, top_p=0.9, max_tokens=11, stop=("###",), seed=4)
    groups = engine(extra={"reasoning_effort": "low"}).generate(prompts(), sampling)
    assert [[c.text for c in g.completions] for g in groups] == [
        [rf"It is \boxed{{{i}}}."] * 3 for i in range(3)
    ]
    assert {c.finish_reason for g in groups for c in g.completions} == {"stop"}
    assert {c.token_count for g in groups for c in g.completions} == {7}
    assert len({c.seed for g in groups for c in g.completions}) == 9
    assert {body["seed"] for body in endpoint.asked} == {
        c.seed & 0x7FFFFFFF for g in groups for c in g.completions
    }
    for body in endpoint.asked:
        assert body["model"] == "some-model"
        assert body["messages"][0] == {"role": "system", "content": "s"}
        assert (body["temperature"], body["top_p"], body["max_tokens"]) == (0.5, 0.9, 11)
        assert body["stop"] == ["###"]
        assert body["reasoning_effort"] == "low"
    assert {h["Authorization"] for h in endpoint.headers} == {f"Bearer {KEY}"}


def test_names_and_limits_follow_the_settings(engine, endpoint):
    endpoint.reason = "length"
    made = engine(model="other", limit_key="max_completion_tokens", key_env="NOT_THERE")
    (group,) = made.generate(
        [Prompt("p", (), max_tokens=2, messages=({"role": "user", "content": "?"},))],
        Sampling(n=1, max_tokens=9),
    )
    assert group.completions[0].finish_reason == "length"
    (body,) = endpoint.asked
    assert body["model"] == "other"
    assert body["max_completion_tokens"] == 2
    assert "max_tokens" not in body
    assert "stop" not in body
    assert "Authorization" not in endpoint.headers[0]


def test_no_more_requests_at_a_time_than_allowed(engine, endpoint):
    endpoint.pause_s = 0.01
    engine(concurrency=3).generate(prompts(8), Sampling(n=2))
    assert len(endpoint.asked) == 16
    assert 1 < endpoint.most <= 3


@pytest.mark.parametrize(
    "fault",
    [
        "drop",
        (429, {"Retry-After": "0.01"}, {"error": "slow down"}),
        (503, {}, {"error": "busy"}),
        (200, {}, b"<html>not JSON</html>"),
        (200, {}, {"choices": []}),
    ],
)
def test_what_may_pass_is_tried_again(engine, endpoint, fault):
    endpoint.faults = [fault, fault]
    groups = engine().generate(prompts(), Sampling(n=2))
    assert [len(g.completions) for g in groups] == [2, 2, 2]
    assert len(endpoint.asked) == 6 + 2
    # Tried again as they were.
    counts = Counter(json.dumps(body, sort_keys=True) for body in endpoint.asked)
    assert len(counts) == 6


def test_what_does_not_pass_says_so(engine, endpoint):
    endpoint.faults = [(503, {}, {"error": "busy"})] * 99
    with pytest.raises(UserError, match=r"(?s)answers 503.*busy.*after 4 tries"):
        engine().generate(prompts(1), Sampling(n=1))
    assert len(endpoint.asked) == 4


@pytest.mark.parametrize(
    ("status", "words"), [(401, "OWN_KEY is set"), (404, "a model 'some-model'")]
)
def test_what_no_try_mends_is_asked_once(engine, endpoint, status, words):
    endpoint.faults = [(status, {}, {"error": f"no, {KEY} is bad"})] * 9
    with pytest.raises(UserError, match=words) as error:
        engine().generate(prompts(1), Sampling(n=1))
    assert len(endpoint.asked) == 1
    if status == 401:
        assert KEY not in str(error.value)


def test_one_refused_prompt_fails_alone_and_all_refused_end_it(engine, endpoint):
    def long(body):
        if len(body["messages"][-1]["content"]) == 1:
            return 400, {}, {"error": "too long"}
        return None

    endpoint.faults = [long] * 6
    groups = engine().generate(prompts(), Sampling(n=2))
    assert [len(g.completions) for g in groups] == [2, 0, 2]
    assert "too long" in str(groups[1].error)
    endpoint.faults = [(400, {}, {"error": "unknown key max_tokens"})] * 6
    with pytest.raises(UserError, match=r"every prompt was refused.*unknown key"):
        engine().generate(prompts(), Sampling(n=2))


def test_what_the_interface_has_not_is_refused(engine):
    with pytest.raises(UserError, match="top_k"):
        engine().generate(prompts(), Sampling(top_k=5))
    with pytest.raises(UserError, match="token ids"):
        engine().generate([Prompt("p", (1, 2))], Sampling())
    with pytest.raises(UserError, match="new weights"):
        engine().load_weights([], 1)


def test_the_key_of_the_public_endpoint_is_asked_for_first(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(UserError, match="OPENAI_API_KEY is not set"):
        openai.create(openai.Config(), "gpt")


def test_training_and_generation_refuse_it(tmp_path, endpoint):
    run = small_run(tmp_path)
    run = run.model_copy(update={"engine": openai.Config(base_url=endpoint.url)})
    grpo = next(s for s in run.train if s.name == "grpo")
    with pytest.raises(UserError, match="log-probs of the sampled tokens"):
        train(run, validate(TrainConfig, grpo.model_dump(), "grpo"))
    assert run.generate is not None
    with pytest.raises(UserError, match="log-probs of the sampled tokens"):
        generate(run, run.generate)


def test_an_evaluation_from_questions_to_figures(tmp_path, endpoint, monkeypatch, capsys):
    monkeypatch.setenv("OWN_KEY", KEY)
    suite = tmp_path / "questions.jsonl"
    rows = [{"question": "z" * n, "answer": f"#### {n + n % 2}"} for n in range(4, 10)]
    suite.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--model", "lab/some-model", "--suites", f"gsm8k={suite}", "--out", str(tmp_path)]
    words += ["--n", "2", "--bootstrap", "200", "--workers", "1", "--profile", "deepseek_math"]
    words += ["--engine.kind", "openai", "--engine.base-url", endpoint.url]
    words += ["--engine.key-env", "OWN_KEY"]
    evaluate(words)
    (folder,) = tmp_path.glob("eval-some-model*")
    figures = read_json(folder / "gsm8k" / "figures.json")
    assert figures["questions"] == 6
    assert len(endpoint.asked) == 6 * 3
    # Even numbers of z are answered rightly.
    assert figures["figures"]["avg@2"]["value"] == 0.5
    assert figures["figures"]["greedy"]["value"] == 0.5
    samples = [r for p in (folder / "gsm8k").glob("samples-*") for _, r in read_rows(p)]
    assert {r["token_count"] for r in samples} == {7}
    assert figures["figures"]["mean_tokens"]["value"] == 7
    rows = [r for _, r in read_rows(folder / "gsm8k" / "prompts.jsonl")]
    assert all(r["messages"][-1]["role"] == "user" for r in rows)
    # Complete: another command asks nothing.
    evaluate(words)
    assert len(endpoint.asked) == 6 * 3
    # The key is nowhere.
    assert not [p for p in tmp_path.rglob("*") if p.is_file() and KEY.encode() in p.read_bytes()]
    captured = capsys.readouterr()
    assert KEY not in captured.out + captured.err
    with pytest.raises(UserError, match="tool_rounds"):
        evaluate([*words, "--tool-rounds", "2"])


def test_a_run_has_no_checkpoint_at_an_endpoint(tmp_path, endpoint):
    from .small_run import write_small

    path = write_small(tmp_path)
    with pytest.raises(UserError, match="--model NAME"):
        evaluate(["--config", str(path), "--engine.kind", "openai"])
