"""vLLM for real, in process: the same tokens and log-probs as the embedded engine."""

from __future__ import annotations

import math

import pytest
import torch

from data_prep.errors import UserError
from data_prep.sources.embedded import Config as EmbeddedSource
from data_prep.sources.embedded import read
from pipeline.agreement import Agreement, AgreementConfig
from pipeline.engines import Prompt, Sampling
from pipeline.engines import embedded as embedded_engine
from pipeline.generate import render_prompts
from pipeline.model import load_model

from .conftest import make_checkpoint
from .exact import exact_distribution

pytestmark = [
    pytest.mark.vllm,
    # vLLM and what it imports warn in many places; none of them is ours.
    pytest.mark.filterwarnings("ignore"),
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Heads of 32: the smallest that vLLM's CPU attention has. Room for three cache blocks."""
    folder = tmp_path_factory.mktemp("vllm") / "tiny"
    return make_checkpoint(folder, width=64, heads=2, kv_heads=1, context=512)


@pytest.fixture(scope="module")
def engines(checkpoint):
    from pipeline.engines import vllm as vllm_engine

    theirs = vllm_engine.create(vllm_engine.Config(), checkpoint)
    ours = embedded_engine.create(embedded_engine.Config(), checkpoint)
    yield ours, theirs
    theirs.close()


@pytest.fixture(scope="module")
def prompts(engines, problems):
    return render_prompts(problems[:40], engines[0].tokenizer, "embedded")


def test_greedy_tokens_are_equal_and_logprobs_agree(engines, prompts):
    sampling = Sampling(n=1, temperature=0.0, max_tokens=24)
    ours, theirs = (engine.generate(prompts, sampling) for engine in engines)
    for one, two in zip(ours, theirs, strict=True):
        assert one.completions[0].token_ids == two.completions[0].token_ids
        assert one.completions[0].text == two.completions[0].text
        assert one.completions[0].finish_reason == two.completions[0].finish_reason
        assert one.completions[0].logprobs == pytest.approx(two.completions[0].logprobs, abs=1e-3)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampled_logprobs_are_those_of_the_tempered_distribution(
    engines, prompts, checkpoint, temperature
):
    model = load_model(checkpoint)
    sampling = Sampling(n=2, temperature=temperature, max_tokens=16)
    for group in engines[1].generate(prompts[:10], sampling):
        assert len(group.completions) == 2
        for completion in group.completions:
            ids = torch.tensor([[*group.prompt.token_ids, *completion.token_ids]])
            with torch.no_grad():
                logp = torch.log_softmax(model(ids).logits[0] / temperature, dim=-1)
            start = len(group.prompt.token_ids)
            expected = [
                float(logp[start + i - 1, token]) for i, token in enumerate(completion.token_ids)
            ]
            assert completion.logprobs == pytest.approx(expected, abs=1e-3)


def test_seeds_are_recorded_and_repeat(engines, prompts):
    sampling = Sampling(n=3, max_tokens=8, seed=4)
    first, second = (engines[1].generate(prompts[:6], sampling) for _ in range(2))
    for one, two in zip(first, second, strict=True):
        assert [c.token_ids for c in one.completions] == [c.token_ids for c in two.completions]
        assert len({c.seed for c in one.completions}) == 3


def test_pushed_weights_are_the_ones_used(engines, prompts, checkpoint):
    model = load_model(checkpoint)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    sampling = Sampling(n=1, temperature=0.0, max_tokens=16)
    before = [g.completions[0].token_ids for g in engines[1].generate(prompts, sampling)]
    for engine in engines:
        engine.load_weights(model.state_dict().items(), 1)
    ours, theirs = (engine.generate(prompts, sampling) for engine in engines)
    after = [g.completions[0].token_ids for g in theirs]
    assert after == [g.completions[0].token_ids for g in ours]
    assert after != before
    for engine in engines:
        engine.load_weights(load_model(checkpoint).state_dict().items(), 2)


def test_more_prompt_tokens_than_one_step_takes(engines):
    """Seeded requests whose prompts vLLM would cut into pieces."""
    long = [Prompt(f"p{i}", tuple(range(30, 150))) for i in range(50)]
    groups = engines[1].generate(long, Sampling(n=2, max_tokens=2))
    assert [len(group.completions) for group in groups] == [2] * 50


def test_a_prompt_longer_than_the_context_fails_alone(engines, prompts):
    groups = engines[1].generate(
        [Prompt("long", (30,) * 512), prompts[0]], Sampling(n=1, max_tokens=4)
    )
    assert "512 tokens" in str(groups[0].error)
    assert len(groups[1].completions) == 1


def test_greedy_tokens_of_200_prompts_are_equal_in_all_three(engines, checkpoint):
    model = load_model(checkpoint)
    many = list(read(EmbeddedSource(train=1, validation=1, test=200), 3))[-200:]
    prompts = render_prompts(many, engines[0].tokenizer, "embedded")
    sampling = Sampling(n=1, temperature=0.0, max_tokens=24)
    ours, theirs = (engine.generate(prompts, sampling) for engine in engines)
    for prompt, one, two in zip(prompts, ours, theirs, strict=True):
        completion = one.completions[0]
        assert completion.token_ids == two.completions[0].token_ids
        ids = torch.tensor([[*prompt.token_ids, *completion.token_ids]])
        with torch.no_grad():
            logits = model(ids).logits[0, len(prompt.token_ids) - 1 : -1]
        assert completion.token_ids == logits.argmax(-1).tolist()


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.0, "repetition_penalty": 1.3},
        {"temperature": 0.8, "min_p": 0.05, "top_k": 40, "top_p": 0.9},
        {"temperature": 1.2, "min_p": 0.02, "repetition_penalty": 1.3},
    ],
)
def test_penalty_truncation_stop_tokens_and_budgets_mean_the_same(
    engines, prompts, checkpoint, options
):
    """Both engines' log-probs are those of the exact distribution; greedy tokens are equal."""
    stops, model = (40, 41, 42), load_model(checkpoint)
    sampling = Sampling(n=2, stop_token_ids=stops, max_tokens=12, **options)
    asked = [
        Prompt(p.id, p.token_ids, max_tokens=5 if i % 2 else None)
        for i, p in enumerate(prompts[:16])
    ]
    both = [engine.generate(asked, sampling) for engine in engines]
    if not options["temperature"]:
        tokens = [[c.token_ids for g in groups for c in g.completions] for groups in both]
        assert tokens[0] == tokens[1]
    plain = sampling.model_copy(update={"temperature": sampling.temperature or 1.0})
    for prompt, group in [(p, g) for groups in both for p, g in zip(asked, groups, strict=True)]:
        for completion in group.completions:
            assert len(completion.token_ids) <= (prompt.max_tokens or 12)
            assert not set(completion.token_ids[:-1]) & set(stops)
            if completion.token_ids[-1] in stops:
                assert completion.finish_reason == "stop"
            ids = list(prompt.token_ids)
            for token, logprob in zip(completion.token_ids, completion.logprobs, strict=True):
                p = exact_distribution(model, ids, plain)
                assert logprob == pytest.approx(math.log(p[token]), abs=1e-3)
                ids.append(token)


@pytest.fixture
def probe(engines, prompts, checkpoint, tmp_path):
    """Prove a push to vLLM; give back what was found."""
    from data_prep.jsonl import read_json

    model = load_model(checkpoint)
    agreement = Agreement(
        AgreementConfig(),
        model,
        0.7,
        8192,
        autocast=False,
        sampler_dtype="float32",
        bos_token_id=1,
    )

    def run():
        note = tmp_path / "agreement.json"
        agreement.prove_push(engines[1], prompts, 512, 1, note)
        return read_json(note)

    yield run
    # Whatever a fault left behind.
    engines[1].load_weights(model.state_dict().items(), 2)


def test_after_a_push_the_log_probs_agree_to_a_thousandth(probe):
    found = probe()
    assert found["gap_before"] < 1e-3
    assert found["gap_after_push"] < 1e-3
    assert found["distance_of_pushed_weights"] > 0.05


def test_a_prefix_cache_that_is_not_reset_is_caught(probe, engines, monkeypatch):
    monkeypatch.setattr(engines[1]._llm, "reset_prefix_cache", lambda: True)
    with pytest.raises(UserError, match=r"(?s)after a push of other weights.*stale cache"):
        probe()


def test_weights_that_are_not_taken_are_caught(probe, engines, checkpoint, monkeypatch):
    engines[1].load_weights(load_model(checkpoint).state_dict().items(), 1)
    monkeypatch.setattr(engines[1]._llm, "collective_rpc", lambda *_, **__: None)
    with pytest.raises(UserError, match=r"(?s)after a push of other weights.*stale weights"):
        probe()


@pytest.mark.parametrize("repaired", [True, False])
def test_a_tied_output_embedding_has_to_be_packed_again(
    probe, engines, prompts, checkpoint, monkeypatch, repaired
):
    """vLLM 0.32 on a CPU keeps its packed copy where a push does not name it, as folders do not."""
    from pipeline.engines import vllm as vllm_engine

    if not repaired:
        monkeypatch.setattr(vllm_engine, "pack_again", lambda worker: None)
    model = load_model(checkpoint)
    with torch.no_grad():
        embedding = model.get_input_embeddings().weight
        embedding.add_(0.1 * torch.randn(embedding.shape, generator=torch.Generator()))
    engines[1].load_weights(((n, p) for n, p in model.named_parameters()), 3)
    gaps = []
    for group in engines[1].generate(prompts[:10], Sampling(n=1, max_tokens=8)):
        (completion,) = group.completions
        ids = torch.tensor([[*group.prompt.token_ids, *completion.token_ids]])
        with torch.no_grad():
            logp = torch.log_softmax(model(ids).logits[0], dim=-1)
        first = len(group.prompt.token_ids) - 1
        gaps += [
            abs(float(logp[first + i, token]) - value)
            for i, (token, value) in enumerate(
                zip(completion.token_ids, completion.logprobs, strict=True)
            )
        ]
    assert (max(gaps) < 1e-3) is repaired


def test_what_needs_a_gpu_is_refused_without_one(checkpoint):
    from pipeline.engines import vllm as vllm_engine

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    for options in ({"sleep": True}, {"transfer": "ipc"}):
        with pytest.raises(UserError, match="without a GPU"):
            vllm_engine.create(vllm_engine.Config(**options), checkpoint)
