"""TRL's and transformers' losses against ours, on the same model and the same sequences.

The gradient is taken in all parameters by `pipeline.train.Trainer` here and by the trainer of TRL
there; in float64, to 1e-9 of its norm.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import math
import random
from dataclasses import replace

import pytest
import torch

from pipeline.batch import Sequence, flatten, micro_batches
from pipeline.critic import load_scalar_model
from pipeline.model import load_model, load_tokenizer
from pipeline.policy import logprobs_of
from pipeline.reward import overlong_penalty

from .small_run import small_run
from .trl_peer import DenseHead, Sides, import_trl

if importlib.util.find_spec("trl") is None:
    pytest.skip("TRL is not installed (it is in the dev extra)", allow_module_level=True)
if not importlib.metadata.version("trl").startswith("1.16."):
    pytest.skip("the differences are those of TRL 1.16", allow_module_level=True)

EXACT = 1e-9


@pytest.fixture(scope="module")
def trl():
    from accelerate.state import AcceleratorState, GradientState

    yield import_trl()
    # Its trainers leave the process's accelerator behind.
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture(scope="module")
def sides(trl, checkpoint, tmp_path_factory) -> Sides:
    folder = tmp_path_factory.mktemp("peers")
    reference = load_model(checkpoint, "float64").requires_grad_(False)
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for p in reference.parameters():
            p += 0.05 * torch.randn(p.shape, dtype=p.dtype, generator=generator)
    return Sides(
        trl,
        small_run(folder),
        folder,
        load_model(checkpoint, "float64"),
        reference,
        load_tokenizer(checkpoint),
    )


@pytest.fixture
def exact(trl, monkeypatch) -> None:
    """TRL's loss in float64: see `trl_peer`."""
    monkeypatch.setattr(trl.utils, "_ChunkedLogProbFunction", DenseHead)


def make_sequences(seed: int = 5, masked: bool = True, prompt: int = 6) -> list[Sequence]:
    """Three prompts of four completions, 1 … 9 tokens, some of them without loss."""
    rng = random.Random(seed)
    sequences = []
    for group in range(3):
        ids = [rng.randrange(20, 300) for _ in range(prompt)]
        for number in range(4):
            length = rng.randint(1, 9)
            mask = [not masked or rng.random() < 0.8 for _ in range(length)]
            mask[rng.randrange(length)] = True
            sequences.append(
                Sequence(
                    ids,
                    [rng.randrange(20, 300) for _ in range(length)],
                    mask,
                    group,
                    reward=1.0,
                    advantage=rng.gauss(0.0, 1.0),
                    sign=1 if number % 2 == 0 else -1,
                )
            )
    return sequences


def own_logp(sides: Sides, sequences: list[Sequence], temperature: float = 1.0):
    """log π_θ of every loss-carrying token, [T]."""
    tokens = flatten(sequences, torch.float64)
    (micro,) = micro_batches(sequences, tokens, 16384)
    with torch.no_grad():
        found = torch.zeros_like(tokens.weight)
        found[micro.token_index] = logprobs_of(sides.model, micro.layout, temperature).logp
    return found


def moved(sides: Sides, sequences: list[Sequence], spread: float = 0.3):
    """log π_old so that ratios lie on both sides of every clip, [T]."""
    logp = own_logp(sides, sequences)
    noise = torch.randn(logp.shape, dtype=logp.dtype, generator=torch.Generator().manual_seed(1))
    return logp + spread * noise


def same_gradient(found, expected, tolerance: float = EXACT) -> None:
    """Gradients agree, relative to their norm."""
    norm = float(expected[1].norm())
    assert norm > 1e-4
    assert float((found[1] - expected[1]).norm()) / norm < tolerance


def same(found, expected, tolerance: float = EXACT) -> None:
    """Losses and gradients agree."""
    same_gradient(found, expected, tolerance)
    assert found[0] == pytest.approx(expected[0], rel=tolerance, abs=tolerance)


def mix(*terms: tuple[float, tuple]) -> tuple:
    """Σ factor · (loss, gradient)."""
    return tuple(sum(factor * found[i] for factor, found in terms) for i in (0, 1))


def gap(found, expected) -> float:
    """‖difference of the gradients‖ / ‖expected‖."""
    return float((found[1] - expected[1]).norm() / expected[1].norm())


# --- What agrees -----------------------------------------------------------------------------

SURROGATES = {
    "grpo": ("grpo", {"beta": 0.0}, {"loss_type": "grpo"}),
    "grpo with k3": (
        "grpo",
        {"beta": 0.3},
        {"loss_type": "grpo", "beta": 0.3, "use_bias_correction_kl": False},
    ),
    "dapo": ("dapo", {}, {"loss_type": "dapo", "epsilon_high": 0.28}),
    "dr_grpo": ("dr_grpo", {}, {"loss_type": "dr_grpo"}),
    "grpo by tokens": ("grpo", {"beta": 0.0, "normaliser": "token"}, {"loss_type": "bnpo"}),
    "cispo": (
        "cispo",
        {"clip_high": 0.28, "normaliser": "token"},
        {"loss_type": "cispo", "epsilon_high": 1.28},
    ),
    "gspo": (
        "gspo",
        {"clip_low": 0.05, "clip_high": 0.08},
        {
            "loss_type": "grpo",
            "importance_sampling_level": "sequence",
            "epsilon": 0.05,
            "epsilon_high": 0.08,
        },
    ),
    "gspo with k3": (
        "gspo",
        {"clip_low": 0.05, "clip_high": 0.05, "beta": 0.2},
        {
            "loss_type": "grpo",
            "importance_sampling_level": "sequence",
            "epsilon": 0.05,
            "beta": 0.2,
            "use_bias_correction_kl": False,
        },
    ),
}


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("off_policy", [False, True])
@pytest.mark.parametrize("name", SURROGATES)
def test_clipped_surrogates(sides, name, off_policy):
    kind, options, peer = SURROGATES[name]
    sequences = make_sequences()
    old = moved(sides, sequences) if off_policy else None
    same(
        sides.ours(kind, sequences, old=old, **options),
        sides.theirs("GRPO", sequences, old=old, **peer),
    )


@pytest.mark.usefixtures("exact")
def test_the_clips_bind_in_these_comparisons(sides):
    """Else they would compare ρÂ and nothing more."""
    sequences = make_sequences()
    old = moved(sides, sequences)
    clipped = sides.ours("grpo", sequences, old=old, beta=0.0)
    wide = sides.ours("grpo", sequences, old=old, beta=0.0, clip_low=0.99, clip_high=99.0)
    assert gap(wide, clipped) > 0.1


@pytest.mark.usefixtures("exact")
def test_micro_batches_of_ours_change_nothing_of_it(sides):
    sequences = make_sequences()
    expected = sides.theirs("GRPO", sequences, loss_type="grpo")
    same(sides.ours("grpo", sequences, beta=0.0, micro_tokens=20), expected)


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("off_policy", [False, True])
def test_advantages_of_tokens(sides, off_policy):
    """PPO's policy term, and process supervision: TRL's loss takes advantages [N, T] too."""
    sequences = make_sequences()
    generator = torch.Generator().manual_seed(3)
    for s in sequences:
        s.advantages = torch.randn(len(s.mask), generator=generator, dtype=torch.float64).tolist()
    old = moved(sides, sequences) if off_policy else None
    expected = sides.theirs("GRPO", sequences, old=old, loss_type="grpo")
    same(sides.ours("ppo", sequences, old=old), expected)
    same(sides.ours("grpo", sequences, old=old, beta=0.0, supervision="process"), expected)


@pytest.mark.usefixtures("exact")
def test_dual_clip_is_the_two_sided_clip(sides):
    """TRL's `delta` bounds ρ itself: below 0 that is c·A, above 0 the upper clip binds first."""
    sequences = make_sequences()
    old = moved(sides, sequences, 0.6)
    expected = sides.theirs("GRPO", sequences, old=old, loss_type="grpo", delta=1.5)
    same(sides.ours("ppo", sequences, old=old, dual_clip=1.5), expected)
    assert gap(sides.ours("ppo", sequences, old=old), expected) > 0.05


@pytest.mark.usefixtures("exact")
def test_methods_without_a_ratio_are_the_surrogate_at_its_first_update(sides):
    """At ρ = 1 a surrogate's gradient is Â·∇log π, whatever made Â."""
    sequences = make_sequences()
    expected = sides.theirs("GRPO", sequences, loss_type="grpo")
    same_gradient(sides.ours("reinforce", sequences), expected)
    for number, s in enumerate(sequences):
        s.advantage = float(number % 3 == 0)  # I(o)
    expected = sides.theirs("GRPO", sequences, loss_type="grpo")
    same_gradient(sides.ours("online_rft", sequences, denominator="sampled"), expected)
    # "kept" is the mean over the correct ones alone: 12 of 4 here.
    correct = [s for s in sequences if s.advantage]
    assert len(correct) == 4
    same_gradient(sides.ours("online_rft", correct), mix((12 / 4, expected)))


@pytest.mark.usefixtures("exact")
def test_rloo_at_its_first_update(sides):
    """TRL adds the tokens of a sequence up; `constant` with L_max = 1 is that."""
    sequences = make_sequences(masked=False)
    expected = sides.theirs("RLOO", sequences)
    options = {"normaliser": "constant", "max_tokens": 1}
    same_gradient(sides.ours("rloo", sequences, **options), expected)


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("temperature", [0.7, 1.3])
def test_both_divide_logits_by_the_temperature_of_the_sampler(sides, temperature):
    sequences = make_sequences()
    expected = sides.theirs("GRPO", sequences, loss_type="grpo", temperature=temperature)
    same(sides.ours("grpo", sequences, beta=0.0, temperature=temperature), expected)
    assert gap(sides.ours("grpo", sequences, beta=0.0), expected) > 0.1


def pairs_of(sequences: list[Sequence]) -> list[dict]:
    """Pairs as TRL's collator takes them."""
    return [
        {"prompt_ids": a.prompt, "chosen_ids": a.completion, "rejected_ids": b.completion}
        for a, b in zip(sequences[::2], sequences[1::2], strict=True)
    ]


DPO = {False: "sigmoid", True: "sigmoid_norm"}


def trl_dpo(sides: Sides, sequences: list[Sequence], **options):
    trainer = sides.trainer("DPO", **options)
    return sides.loss(trainer, trainer.data_collator(pairs_of(sequences)))


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("prompt", [6, 1])
@pytest.mark.parametrize("beta", [0.1, 0.7])
@pytest.mark.parametrize("length_norm", [False, True])
def test_dpo(sides, length_norm, beta, prompt):
    sequences = make_sequences(masked=False, prompt=prompt)
    expected = trl_dpo(sides, sequences, beta=beta, loss_type=[DPO[length_norm]])
    options = {"beta": beta, "length_norm": length_norm, "data": "pairs"}
    same(sides.ours("dpo", sequences, **options), expected)
    same(sides.ours("dpo", sequences, micro_tokens=40, **options), expected)


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("length_norm", [False, True])
def test_dpo_at_the_reference_is_log_two_on_both_sides(sides, length_norm):
    sequences = make_sequences(masked=False)
    at = replace(sides, reference=sides.model)
    trainer = replace(sides).trainer("DPO", loss_type=[DPO[length_norm]])
    trainer.ref_model = sides.model
    expected = sides.loss(trainer, trainer.data_collator(pairs_of(sequences)))
    assert expected[0] == pytest.approx(math.log(2), rel=1e-12)
    same(at.ours("dpo", sequences, length_norm=length_norm, data="pairs"), expected)


@pytest.fixture(scope="module")
def judge(checkpoint):
    model = load_scalar_model(checkpoint, "float64")
    with torch.no_grad():
        model.score.weight.normal_(generator=torch.Generator().manual_seed(4))  # type: ignore[union-attr]
    return model


def test_reward_model(sides, judge):
    """Bradley–Terry: the logit of TRL's model at its last token that is no padding."""
    sequences = make_sequences(masked=False)
    at = replace(sides, model=judge)
    trainer = at.trainer("Reward")
    inputs = trainer.data_collator(
        [
            {"chosen_ids": a.prompt + a.completion, "rejected_ids": b.prompt + b.completion}
            for a, b in zip(sequences[::2], sequences[1::2], strict=True)
        ]
    )
    same(sides.ours("reward_model", sequences, model=judge), at.loss(trainer, inputs))


@pytest.mark.usefixtures("exact")
def test_sft(sides):
    """Rows with several turns: holes in the mask are labels −100."""
    sequences = make_sequences()
    assert any(not all(s.mask) for s in sequences)
    trainer = sides.trainer("SFT")
    same(sides.ours("sft", sequences), sides.loss(trainer, sides.rows(sequences)))


def causal_lm(sides: Sides, sequences: list[Sequence], **options):
    """The loss inside transformers' causal LM, and its gradient."""
    loss = sides.model(**sides.rows(sequences), **options).loss
    loss.backward()
    return float(loss.detach()), sides.gradient()


def test_sft_is_the_causal_lm_loss_of_transformers(sides):
    """With labels −100; it rounds logits to float32, hence the tolerance."""
    sequences = make_sequences()
    same(sides.ours("sft", sequences), causal_lm(sides, sequences), 1e-6)
    alone = [(1 / 12, causal_lm(sides, [s])) for s in sequences]
    same(sides.ours("sft", sequences, normaliser="sequence"), mix(*alone), 1e-6)


def test_rft_is_the_causal_lm_loss_over_what_it_keeps(sides):
    """`kept` is fine-tuning on the filtered set; `sampled` counts what was thrown away, too."""
    log = make_sequences(masked=False)
    for number, s in enumerate(log):
        s.correct, s.text = number % 4 < 2, f"{number} = {number}"
    kept = [s for s in log if s.correct]
    mean = mix(*((1 / len(kept), causal_lm(sides, [s])) for s in kept))
    same(sides.ours("rft", [], log=log), mean, 1e-6)
    same(sides.ours("rft", [], log=log, normaliser="token"), causal_lm(sides, kept), 1e-6)
    sampled = sides.ours("rft", [], log=log, denominator="sampled")
    same(sampled, mix((len(kept) / len(log), mean)), 1e-6)


def plain_logp(model, sequences: list[Sequence], inputs: dict, temperature: float):
    """log softmax of the model's own logits on a padded batch, [T] in our order."""
    with torch.no_grad():
        logits = model(**inputs).logits / temperature
    logp = torch.log_softmax(logits, -1)[:, :-1]
    logp = logp.gather(-1, inputs["input_ids"][:, 1:, None])[..., 0]
    width, kept = inputs["input_ids"].shape[1], []
    for row, s in enumerate(sequences):
        left = int(inputs["attention_mask"][row].argmax())
        start = left + len(s.prompt) - 1
        assert start + len(s.completion) < width
        kept.append(logp[row, start : start + len(s.completion)][torch.tensor(s.mask)])
    return torch.cat(kept)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_are_those_of_padded_batches(sides, temperature):
    sequences = make_sequences(seed=1) + make_sequences(seed=2, prompt=3)
    ours = own_logp(sides, sequences, temperature)
    right = sides.rows(sequences)
    right.pop("labels")
    found = plain_logp(sides.model, sequences, right, temperature)
    torch.testing.assert_close(found, ours, rtol=EXACT, atol=EXACT)
    # Padded on the left as TRL's online trainers do, with the positions that this implies.
    padded = sides.padded(sequences)
    left = {
        "input_ids": torch.cat([padded["prompt_ids"], padded["completion_ids"]], 1),
        "attention_mask": torch.cat([padded["prompt_mask"], padded["completion_mask"]], 1),
    }
    left["position_ids"] = (left["attention_mask"].cumsum(1) - 1).clamp(min=0)
    found = plain_logp(sides.model, sequences, left, temperature)
    torch.testing.assert_close(found, ours, rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("name", ["grpo with k3", "dapo", "gspo"])
def test_with_the_float32_kernel_left_in(sides, name):
    """Nothing of TRL is replaced: its head's rounding is all that is between the two."""
    kind, options, peer = SURROGATES[name]
    sequences = make_sequences()
    found = sides.ours(kind, sequences, **options)
    expected = sides.theirs("GRPO", sequences, **peer)
    same(found, expected, 1e-5)
    assert gap(found, expected) > 1e-9


def test_dpo_and_sft_with_the_float32_kernel_left_in(sides):
    sequences = make_sequences(masked=False)
    same(sides.ours("dpo", sequences, data="pairs"), trl_dpo(sides, sequences), 1e-5)
    trainer = sides.trainer("SFT")
    same(sides.ours("sft", sequences), sides.loss(trainer, sides.rows(sequences)), 1e-5)


@pytest.mark.parametrize("length", [1, 70, 80, 81, 90, 100, 120])
def test_the_soft_overlong_penalty(length):
    rewards = importlib.import_module("trl.rewards")
    peer = rewards.get_soft_overlong_punishment(max_completion_len=100, soft_punish_cache=20)
    (expected,) = peer(completion_ids=[[1] * length])
    assert overlong_penalty(length, 100, 20) == pytest.approx(expected)
