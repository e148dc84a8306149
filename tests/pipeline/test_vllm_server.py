"""The engine of vLLM servers, over real HTTP with stand-ins: protocol, faults, deaths."""

from __future__ import annotations

import re
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch

from data_prep.build import build
from data_prep.config import validate
from data_prep.errors import UserError
from data_prep.jsonl import read_rows
from pipeline.agreement import Agreement, AgreementConfig
from pipeline.config import TrainConfig
from pipeline.engines import Prompt, Sampling, vllm_server
from pipeline.engines import embedded as embedded_engine
from pipeline.generate import generate, render_prompts
from pipeline.model import load_model
from pipeline.train import train

from .small_run import small_run
from .stand_in import StandIn

SAMPLING = Sampling(n=3, max_tokens=6, temperature=0.9, seed=5)


@pytest.fixture
def start(checkpoint):
    """Start stand-ins and an engine over them; both end with the test."""
    stack = []

    def begin(count=2, faults=(), **options):
        faults = [*faults, *({} for _ in range(count - len(faults)))]
        servers = [StandIn(checkpoint, **fault) for fault in faults]
        stack.extend(server.stop for server in servers)
        options = {"retries": 2, "max_sequences": 4, "timeout_s": 20, **options}
        config = vllm_server.Config(urls=tuple(s.url for s in servers), **options)
        engine = vllm_server.create(config, checkpoint)
        stack.append(engine.close)
        return engine, servers

    yield begin
    for end in reversed(stack):
        end()


@pytest.fixture
def prompts(checkpoint, problems):
    return render_prompts(problems[:6], embedded_engine.load_tokenizer(checkpoint), "embedded")


@pytest.fixture
def expected(checkpoint, prompts):
    """The same samples from the embedded engine."""
    engine = embedded_engine.create(embedded_engine.Config(), checkpoint)
    return engine.generate(prompts, SAMPLING)


def assert_equal(found, expected):
    assert [g.prompt.id for g in found] == [g.prompt.id for g in expected]
    for one, two in zip(found, expected, strict=True):
        assert one.error is None
        for a, b in zip(one.completions, two.completions, strict=True):
            assert (a.token_ids, a.text, a.seed) == (b.token_ids, b.text, b.seed)
            assert a.finish_reason == b.finish_reason
            assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4)


def served(servers) -> Counter:
    return sum((server.served for server in servers), Counter())


@pytest.mark.parametrize("count", [1, 2, 3])
def test_samples_are_those_of_their_seeds_whatever_the_number_of_servers(
    start, prompts, expected, count
):
    engine, servers = start(count)
    assert_equal(engine.generate(prompts, SAMPLING), expected)
    assert set(served(servers).values()) == {1}
    assert sum(served(servers).values()) == 18
    assert all(server.served for server in servers)


def test_requests_that_fail_are_tried_again(start, prompts, expected, capsys):
    engine, servers = start(2, [{"fail": 1}, {"fail": 2}])
    assert_equal(engine.generate(prompts[:3], SAMPLING), expected[:3])
    assert set(served(servers).values()) == {1}
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("after", [0, 1, 3])
def test_the_work_of_a_server_that_dies_goes_to_the_others(start, prompts, expected, after, capsys):
    engine, servers = start(3, [{"die_after": after}], retries=1)
    assert_equal(engine.generate(prompts, SAMPLING), expected)
    assert "is given up" in capsys.readouterr().err
    assert sum(servers[0].served.values()) == after
    # None lost, none twice.
    assert len(served(servers)) == 18
    assert set(served(servers).values()) == {1}
    # It is not asked again, and nothing is said again.
    assert_equal(engine.generate(prompts, SAMPLING), expected)
    assert capsys.readouterr().err == ""


def test_when_all_are_dead_it_says_why(start, prompts):
    engine, servers = start(2, [{"die_after": 1}, {"die_after": 2}], retries=0)
    with pytest.raises(UserError, match="no server is left") as error:
        engine.generate(prompts, SAMPLING)
    assert all(server.url in str(error.value) for server in servers)
    with pytest.raises(UserError, match="no server is left"):
        engine.load_weights([], 1)


def test_a_push_reaches_every_server_paused_with_caches_emptied(start, prompts, checkpoint):
    engine, servers = start(2)
    model = load_model(checkpoint)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.2)
    for server in servers:
        server.calls.clear()
    engine.load_weights(model.state_dict().items(), 7)
    assert engine.policy_version == 7
    for server in servers:
        assert server.calls == [
            "pause",
            "collective_rpc",
            "reset_prefix_cache",
            "update_weight_version",
            "resume",
        ]
        assert server.version.endswith(":7")
        # Tied embeddings travel once.
        assert server.loaded[-1] == {n for n, _ in model.named_parameters()}
    ours = embedded_engine.create(embedded_engine.Config(), checkpoint)
    ours.load_weights(model.state_dict().items(), 7)
    assert_equal(engine.generate(prompts, SAMPLING), ours.generate(prompts, SAMPLING))


def test_weights_leave_nothing_behind(start, checkpoint, tmp_path):
    engine, _ = start(1, folder=str(tmp_path))
    engine.load_weights(load_model(checkpoint).state_dict().items(), 1)
    assert not list(tmp_path.iterdir())


class OnGpu:
    """A value made for a push: the GPU's memory of one is the next one's, too."""

    def __init__(self, value):
        self.value, self.shape = value, value.shape

    def data_ptr(self):
        return 1 << 20

    def detach(self):
        return self

    def to(self, device):
        return self.value.to(device, copy=True)


def test_merged_weights_at_one_address_are_not_taken_for_tied(start, prompts, checkpoint):
    engine, servers = start(1)
    model = load_model(checkpoint)
    values = {name: p.detach() * 1.2 for name, p in model.named_parameters()}
    engine.load_weights(((name, OnGpu(value)) for name, value in values.items()), 1)
    assert servers[0].loaded[-1] == values.keys()
    ours = embedded_engine.create(embedded_engine.Config(), checkpoint)
    ours.load_weights(values.items(), 1)
    assert_equal(engine.generate(prompts, SAMPLING), ours.generate(prompts, SAMPLING))


def test_several_trainers_push_by_folder_where_servers_were_started_for_handles(
    start, checkpoint, monkeypatch
):
    monkeypatch.setenv("WORLD_SIZE", "2")
    engine, servers = start(1)
    engine.servers[0].backend = "ipc"
    engine.load_weights(load_model(checkpoint).state_dict().items(), 1)
    assert len(servers[0].loaded) == 2


def test_a_folder_that_is_not_there_is_made(start, checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    engine, servers = start(1, folder="runs/weights")
    engine.load_weights(load_model(checkpoint).state_dict().items(), 1)
    assert len(servers[0].loaded) == 2
    assert not list((tmp_path / "runs" / "weights").iterdir())


def test_a_server_that_is_restarted_is_given_up_and_joins_at_the_next_push(
    start, prompts, expected, checkpoint, capsys
):
    engine, servers = start(2)
    weights = load_model(checkpoint).state_dict()
    servers[0].stop()
    servers[0].restart()
    assert_equal(engine.generate(prompts, SAMPLING), expected)
    assert "it answers with the weights ['default']" in capsys.readouterr().err
    engine.load_weights(weights.items(), 1)
    assert "answers again" in capsys.readouterr().err
    for server in servers:
        server.served.clear()
    assert_equal(engine.generate(prompts, SAMPLING), expected)
    assert all(server.served for server in servers)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (lambda c: {**c, "finish_reason": "abort"}, "ended with 'abort'"),
        (lambda c: {**c, "token_ids": [5]}, "not those of the sampled tokens"),
        (lambda c: {**c, "weight_versions": None}, r"weights \[\]"),
    ],
)
def test_an_answer_that_cannot_be_used_is_not_used(start, prompts, expected, fault, words, capsys):
    engine, _ = start(2, [{"answer": fault}], retries=1)
    assert_equal(engine.generate(prompts, SAMPLING), expected)
    assert re.search(words, capsys.readouterr().err)


def test_a_prompt_longer_than_the_context_fails_alone(start, prompts, expected):
    engine, _ = start(2)
    found = engine.generate([Prompt("long", (30,) * 128), *prompts], SAMPLING)
    assert "128 tokens" in str(found[0].error)
    assert_equal(found[1:], expected)
    # As long as can be: what is left of the context is sampled.
    (group,) = engine.generate([Prompt("just", (30,) * 125)], SAMPLING)
    assert group.error is None
    assert all(len(c.token_ids) <= 3 for c in group.completions)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ({"hides": ("/server_info",)}, "VLLM_SERVER_DEV_MODE=1"),
        (
            {"info": {"model_config": {"logprobs_mode": "raw_logprobs", "dtype": "torch.float32"}}},
            "logprobs_mode is 'raw_logprobs'",
        ),
        (
            {
                "info": {
                    "model_config": {
                        "logprobs_mode": "processed_logprobs",
                        "dtype": "torch.bfloat16",
                    }
                }
            },
            "dtype is 'torch.bfloat16'",
        ),
    ],
)
def test_a_server_with_other_flags_is_refused(start, fault, words):
    if "info" in fault:
        rest = {
            "parallel_config": {"worker_extension_cls": vllm_server.EXTENSION},
            "device_config": {"device": "cpu"},
        }
        fault = {"info": {**fault["info"], **rest}}
    with pytest.raises(UserError, match=words) as error:
        start(1, [fault])
    assert "pipeline.serve" in str(error.value)


def test_a_server_without_token_endpoint_names_the_flag(start, prompts):
    engine, _ = start(1, [{"hides": ("/inference/v1/generate",)}])
    with pytest.raises(UserError, match="--enable-scale-out"):
        engine.generate(prompts, SAMPLING)


def test_nobody_listens(checkpoint):
    config = vllm_server.Config(urls=("http://127.0.0.1:9",))
    with pytest.raises(UserError, match=r"(?s)127\.0\.0\.1:9.*pipeline\.serve"):
        vllm_server.create(config, checkpoint)


def test_weights_for_another_machine_need_a_shared_folder(start, checkpoint):
    engine, _ = start(1)
    engine.servers[0].url = "http://10.0.0.1:8000"
    with pytest.raises(UserError, match=r"engine\.folder"):
        engine.load_weights(load_model(checkpoint).state_dict().items(), 1)


def test_a_server_that_keeps_its_weights_is_caught_by_the_probe(
    start, prompts, checkpoint, tmp_path
):
    probe = Agreement(
        AgreementConfig(),
        load_model(checkpoint),
        1.0,
        4096,
        autocast=False,
        sampler_dtype="float32",
    )
    note = tmp_path / "agreement.json"
    engine, _ = start(1)
    probe.prove_push(engine, prompts, 128, 0, note)
    engine, _ = start(1, [{"deaf": True}])
    with pytest.raises(UserError, match=r"after a push of other weights.*stale weights"):
        probe.prove_push(engine, prompts, 128, 0, note)


# In a run: the same configuration, another engine.


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    run = small_run(folder)
    build(run.data, Path(run.out), run.seed)
    train(run, run.train[0])
    return folder


@pytest.fixture
def run(base, tmp_path):
    shutil.copytree(base / "run", tmp_path / "run")
    return small_run(tmp_path)


@pytest.fixture
def serving(run):
    servers = [StandIn(Path(run.out) / "sft" / "checkpoint") for _ in range(2)]
    yield servers
    for server in servers:
        server.stop()


def served_by(run, servers, **options):
    urls = tuple(s.url for s in servers)
    engine = vllm_server.Config(urls=urls, max_sequences=4, retries=0, **options)
    return run.model_copy(update={"engine": engine})


@pytest.mark.parametrize("staleness", [0, 1])
def test_training_over_servers_one_of_which_dies(run, serving, staleness):
    grpo = next(s for s in run.train if s.name == "grpo").model_dump()
    more = {"staleness": staleness, "correction": {"kind": "token"}, "steps": 3}
    config = validate(TrainConfig, {**grpo, **more}, "grpo")
    serving[0].die_after = 15
    folder = train(served_by(run, serving), config)
    rows = [row for _, row in read_rows(folder / "steps.jsonl")]
    assert len(rows) == config.steps
    for step in range(config.steps):
        samples = [r for _, r in read_rows(folder / "rollouts" / f"step-{step:05d}.jsonl")]
        keys = Counter((r["problem_id"], r["sample_index"]) for r in samples)
        assert len(keys) == config.batch * config.group_size
        assert set(keys.values()) == {1}
        assert {r["policy_version"] for r in samples} == {max(0, step - staleness)}
    if not staleness:
        assert max(r["sampler_gap_mean"] for r in rows if "sampler_gap_mean" in r) < 1e-3
    assert serving[0].dead


def test_other_addresses_do_not_make_a_stage_again(run, serving):
    config = run.generate
    assert config is not None
    folder = generate(served_by(run, serving), config)
    inode = (folder / "manifest.json").stat().st_ino
    # Nobody would answer there.
    moved = vllm_server.Config(urls=("http://127.0.0.1:9",), max_sequences=4, retries=2)
    assert generate(run.model_copy(update={"engine": moved}), config) == folder
    assert (folder / "manifest.json").stat().st_ino == inode


def test_generation_goes_on_where_its_servers_left_it(run, serving):
    """All servers die in the third shard: two are kept, and neither is asked for again."""
    config = run.generate
    assert config is not None
    for server in serving:
        server.die_after = 13  # two shards of 4 problems × 3 samples are 24
    with pytest.raises(UserError, match="no server is left"):
        generate(served_by(run, serving), config)
    partial = Path(run.out) / "generate.partial"
    kept = {p.name: p.stat().st_mtime_ns for p in partial.glob("samples-*.jsonl")}
    assert sorted(kept) == ["samples-00000.jsonl", "samples-00001.jsonl"]
    first = served(serving)
    for server in serving:
        server.stop()
        server.restart()
        server.served.clear()
    folder = generate(served_by(run, serving), config)
    for name, time in kept.items():
        assert (folder / name).stat().st_mtime_ns == time
    samples = [r for path in sorted(folder.glob("samples-*")) for _, r in read_rows(path)]
    assert len(samples) == 10 * 3
    assert len({r["seed"] for r in samples}) == 30
    assert set(served(serving)) == {r["seed"] for r in samples[24:]}
    assert {r["policy_version"] for r in samples} == {0}
    assert set(first.values()) == {1}
