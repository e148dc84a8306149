"""TRL's and transformers' losses against ours, on the same model and the same sequences.

The gradient is taken in all parameters by `pipeline.trainer.Trainer` here and by the trainer of TRL
there. In float64 they agree to 1e-9 of its norm for SFT, DPO with and without length
normalisation, Bradley–Terry, GRPO with k3, DAPO, Dr. GRPO, CISPO, GSPO, PPO's policy term with its
dual clip and entropy bonus, process-supervised GRPO, REINFORCE, Online RFT, and RLOO at its first
update; with the rounding of TRL's float32 head left in, to 1e-5. Where definitions differ, each
test named `test_difference_…` shows by how much, and why:

| what                 | TRL 1.16            | here                | figure             |
|----------------------|---------------------|---------------------|--------------------|
| spread of rewards    | G − 1 below         | population          | 2.4742 is 2.6458   |
| added to it          | 1e-4                | 1e-6, a setting     | 0.414 is 0.990     |
| group without signal | in the denominators | leaves the step     | × 8/12             |
| no verdict           | in the denominators | leaves the step     | × 10/12            |
| masked truncation    | in the baseline     | has no reward       | −½ is −⅓           |
| token mean "bnpo"    | of a micro-batch    | of the step         | 5 %                |
| token mean "dapo"    | of the generation   | of the step         | × 27/28.5          |
| unequal parts, DPO   | mean of means       | mean of the step    | 38 %               |
| unequal parts, SFT¹  | mean of means       | mean of the step    | 34 %               |
| KL term              | ρ·k3, by default    | k3; k2 at ρ = 1     | k2: 0, then 23 %   |
| sampler correction   | drops beyond C²     | bounded by C        | 97 %               |
| correction of the KL | none                | as the surrogate    | 9 %                |
| entropy bonus        | a token mean        | as the normaliser   | 2 %                |
| RLOO's ratio         | of the sequence     | of each token       | none is e^0.15     |
| RLOO's denominator   | N                   | N·|o|, by default   | 57 %               |
| RLOO's KL            | before comparing    | after, to go        | β · mean of others |
| CISPO's bound        | ε_high              | 1 + ε_high          | × 0.28             |
| GRPO as it comes     | token mean, no KL   | 000_… eq. 15        | 63 %               |
| GSPO as it comes     | token mean          | sequence mean       | 58 %               |
| DPO's leading β      | there               | there; not in 000_… | × β                |
| long pairs           | cut, then trained   | refused or dropped  | 69 %               |
| temperature of DPO   | none                | the sample log's    | 44 %               |
| left padding         | positions shifted   | from 0              | 7e-7 nat           |

Figures read "TRL's is ours", or what ours is multiplied by; per cents are ‖difference‖ / ‖gradient‖
on the data of this file. ¹ transformers' loss without `num_items_in_batch`. ² by default. TRL has
no peer of PPO's GAE and value loss, the process reward model, DAPO's dynamic sampling and the
normaliser "group_token".
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
from pipeline.methods import dapo, dr_grpo, grpo, rloo
from pipeline.model import load_model, load_tokenizer
from pipeline.policy import logprobs_of
from pipeline.reward import overlong_penalty

from .small_run import small_run
from .trl_peer import DenseHead, Sides, import_trl, logps

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
def test_difference_the_denominator_of_rloo(sides):
    """TRL adds the tokens of a sequence up, and so weighs a sequence by its length.

    That is `normaliser = "constant"` with L_max = 1 (any other scales the step); our default is
    the mean over tokens, as in GRPO. At the first update the two then agree.
    """
    sequences = make_sequences(masked=False)
    expected = sides.theirs("RLOO", sequences, beta=0.0)
    options = {"normaliser": "constant", "max_tokens": 1}
    found = sides.ours("rloo", sequences, **options)
    same_gradient(found, expected)
    ours = sides.ours("rloo", sequences)
    direction = mix((float(found[1].norm() / ours[1].norm()), ours))
    assert gap(direction, expected) > 0.3


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


# --- What differs ----------------------------------------------------------------------------


def short(count: int, size: int = 4) -> list[Sequence]:
    """Completions of unequal length whose rewards alone matter."""
    rng = random.Random(9)
    return [
        Sequence([31, 32, 33], [rng.randrange(20, 300) for _ in range(1 + n % 3)], [], n // size)
        for n in range(count)
    ]


def with_rewards(sequences: list[Sequence], rewards: list[float | None]) -> list[Sequence]:
    return [
        replace(s, mask=[True] * len(s.completion), reward=r)
        for s, r in zip(sequences, rewards, strict=True)
    ]


def test_difference_the_spread_has_g_less_one(sides):
    """TRL divides by the sample standard deviation (G − 1), 002_… and we by the population's.

    Every advantage of TRL is √(G/(G−1)) times smaller: with one correct of 8, 2.4742 and −0.3535
    where methods.md has 2.6458 and −0.3780.
    """
    rewards = [1.0] + [0.0] * 7
    trainer = sides.trainer("GRPO", per_device_train_batch_size=8, num_generations=8)
    found = sides.rollouts(trainer, short(8, 8), rewards)["advantages"].tolist()
    assert found == pytest.approx([2.4742] + [-0.3535] * 7, abs=5e-5)
    ours = grpo.create(grpo.Config(epsilon=0.0)).compare(rewards)
    assert ours == pytest.approx([2.6458] + [-0.3780] * 7, abs=5e-5)
    spread = math.sqrt(7) / 8
    factor = spread / (spread * math.sqrt(8 / 7) + 1e-4)
    assert found == pytest.approx([a * factor for a in ours], rel=1e-5)


def test_difference_epsilon_of_the_spread(sides):
    """TRL adds 1e-4 to the spread, we 1e-6 (ε_R, a setting).

    It shows where rewards are nearly equal: 0 and 2e-4 become ∓0.414 there and ∓0.990 here.
    """
    rewards = [0.0, 2e-4]
    trainer = sides.trainer("GRPO", per_device_train_batch_size=2, num_generations=2)
    found = sides.rollouts(trainer, short(2, 2), rewards)["advantages"].tolist()
    assert found == pytest.approx([-0.4142, 0.4142], abs=5e-5)
    assert grpo.create(grpo.Config()).compare(rewards) == pytest.approx([-0.9901, 0.9901], abs=5e-5)


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("normaliser", ["sequence", "token"])
def test_difference_groups_without_signal(sides, normaliser):
    """TRL counts them in its denominators, with advantage 0; here they leave the step.

    The gradients are the same but for the share of the sequences (or tokens) that has signal:
    8 of 12. With a KL term TRL also pulls such groups to the reference.
    """
    sequences = short(12)
    rewards = [1.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.0, 1.0, 0.0, 0.0]
    peer = "grpo" if normaliser == "sequence" else "dapo"
    trainer = sides.trainer("GRPO", scale_rewards="none", loss_type=peer)
    expected = sides.loss(trainer, sides.rollouts(trainer, sequences, rewards))
    scored = with_rewards(sequences, rewards)
    kept = dr_grpo.create(dr_grpo.Config()).advantages(scored)
    assert len(kept) == 8
    share = 8 / 12
    if normaliser == "token":
        share = sum(len(s.mask) for s in kept) / sum(len(s.mask) for s in scored)
    ours = sides.ours("dr_grpo", kept, normaliser=normaliser)
    same(mix((share, ours)), expected)


@pytest.mark.usefixtures("exact")
def test_difference_what_nobody_could_judge(sides):
    """A reward that is None leaves the baseline on both sides; TRL keeps it in the denominator.

    Two of twelve: TRL's gradient is 10/12 of ours.
    """
    sequences = short(12)
    rewards = [1.0, 0.0, None, None, 1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0, 1.0]
    trainer = sides.trainer("GRPO", scale_rewards="none", loss_type="grpo")
    inputs = sides.rollouts(trainer, sequences, rewards)
    assert inputs["advantages"].tolist()[:4] == [0.5, -0.5, 0.0, 0.0]
    kept = dr_grpo.create(dr_grpo.Config()).advantages(with_rewards(sequences, rewards))
    ours = sides.ours("dr_grpo", kept, normaliser="sequence")
    same(mix((10 / 12, ours)), sides.loss(trainer, inputs))


@pytest.mark.usefixtures("exact")
def test_difference_masked_truncations(sides):
    """TRL takes a cut-off completion out of the loss, and leaves its reward in the baseline.

    Our overlong mask says that it has no reward: with 1, 0, 0, 1 and the first cut off, TRL's
    others have −½, −½, ½ and N counts four; ours −⅓, −⅓, ⅔ and N counts three.
    """
    end = sides.tokenizer.eos_token_id
    sequences = [
        replace(s, completion=[*s.completion, end][: None if n else 1], finish_reason="stop")
        for n, s in enumerate(short(4))
    ]
    sequences[0].finish_reason = "length"
    trainer = sides.trainer(
        "GRPO",
        per_device_train_batch_size=4,
        scale_rewards="none",
        loss_type="grpo",
        mask_truncated_completions=True,
    )
    inputs = sides.rollouts(trainer, sequences, [1.0, 0.0, 0.0, 1.0])
    assert inputs["advantages"].tolist()[1:] == [-0.5, -0.5, 0.5]
    assert int(inputs["completion_mask"][0].sum()) == 0
    expected = sides.loss(trainer, inputs)

    method = dapo.create(dapo.Config(overlong_mask=True, overlong_share=0.0))
    shaped = [method.shape(r, s, 9) for r, s in zip([1.0, 0.0, 0.0, 1.0], sequences, strict=True)]
    assert shaped == [None, 0.0, 0.0, 1.0]
    kept = dr_grpo.create(dr_grpo.Config()).advantages(with_rewards(sequences, shaped))
    assert [s.advantage for s in kept] == pytest.approx([-1 / 3, -1 / 3, 2 / 3])
    for s, advantage in zip(kept, [-0.5, -0.5, 0.5], strict=True):
        s.advantage = advantage  # and with TRL's, the denominator is what is left
    same(mix((3 / 4, sides.ours("dr_grpo", kept, normaliser="sequence"))), expected)


@pytest.mark.usefixtures("exact")
def test_difference_the_token_mean_of_a_micro_batch(sides):
    """TRL's "bnpo" is a token mean over each micro-batch: the gradient depends on the split.

    Its "dapo" counts the tokens of the whole batch, and so does our `token`, split or not.
    """
    sequences = make_sequences()
    halves = sequences[:6], sequences[6:]
    whole = sides.ours("grpo", sequences, beta=0.0, normaliser="token")

    def split(loss_type: str):
        trainer = sides.trainer(
            "GRPO",
            loss_type=loss_type,
            per_device_train_batch_size=6,
            gradient_accumulation_steps=2,
            num_generations=3,
        )
        trainer.current_gradient_accumulation_steps = 2
        count = torch.tensor(sum(sum(s.mask) for s in sequences))
        inputs = [{**sides.padded(half), "num_items_in_batch": count} for half in halves]
        return mix(*((1.0, sides.loss(trainer, part)) for part in inputs))

    same(split("dapo"), whole)
    own = [sides.ours("grpo", half, beta=0.0, normaliser="token") for half in halves]
    same(split("bnpo"), mix((0.5, own[0]), (0.5, own[1])))
    counts = [sum(sum(s.mask) for s in half) for half in halves]
    assert counts == [27, 30]
    assert gap(split("bnpo"), whole) > 0.02


@pytest.mark.usefixtures("exact")
def test_difference_several_steps_of_one_generation(sides):
    """TRL's "dapo" divides by the mean token count of the steps that share a generation.

    Ours divides each optimizer step by its own count: 27 tokens where TRL has (27 + 30) / 2.
    """
    sequences = make_sequences()
    counts = [sum(sum(s.mask) for s in half) for half in (sequences[:6], sequences[6:])]
    trainer = sides.trainer(
        "GRPO",
        loss_type="dapo",
        per_device_train_batch_size=6,
        steps_per_generation=2,
        num_generations=3,
    )
    inputs = {**sides.padded(sequences[:6]), "num_items_in_batch": torch.tensor(sum(counts))}
    ours = sides.ours("dapo", sequences[:6], clip_high=0.2)
    same(mix((counts[0] / (sum(counts) / 2), ours)), sides.loss(trainer, inputs))


@pytest.mark.usefixtures("exact")
def test_difference_unequal_micro_batches_of_dpo(sides):
    """TRL averages the means of micro-batches; a smaller last one weighs its pairs more.

    Four pairs and two: TRL gives each half the weight, we two thirds and one third.
    """
    sequences = make_sequences(masked=False)
    parts = sequences[:8], sequences[8:]
    theirs = [trl_dpo(sides, part) for part in parts]
    whole = sides.ours("dpo", sequences, data="pairs")
    same(mix((4 / 6, theirs[0]), (2 / 6, theirs[1])), whole)
    assert gap(mix((0.5, theirs[0]), (0.5, theirs[1])), whole) > 0.3


def test_difference_the_mean_of_a_micro_batch_in_sft(sides):
    """A causal LM's own loss is the mean over its micro-batch; ours is over the step's tokens.

    Trainers pass `num_items_in_batch` for that reason, and then both agree.
    """
    sequences = make_sequences()
    parts = sequences[:8], sequences[8:]
    whole = sides.ours("sft", sequences)
    means = mix(*((0.5, causal_lm(sides, part)) for part in parts))
    assert gap(means, whole) > 0.2
    count = sum(sum(s.mask) for s in sequences)
    sums = (causal_lm(sides, part, num_items_in_batch=count) for part in parts)
    same(mix(*((1.0, found) for found in sums)), whole, 1e-6)


@pytest.mark.usefixtures("exact")
def test_difference_the_kl_is_weighed_by_the_ratio(sides):
    """TRL's default multiplies k3 by ρ (`use_bias_correction_kl`); 003_… and we do not.

    ∇(ρ k3) at ρ = 1 is (k3 + 1 − e^−d)∇log π = d ∇log π: the gradient of our `kl = "k2"`, that
    of KL(π‖ref) where k3's is KL(ref‖π)'s. The values differ, and later updates do.
    """
    sequences = make_sequences()
    peer = {"loss_type": "grpo", "beta": 0.3}
    expected = sides.theirs("GRPO", sequences, **peer)
    same_gradient(sides.ours("grpo", sequences, beta=0.3, kl="k2"), expected)
    k3 = sides.ours("grpo", sequences, beta=0.3)
    assert k3[0] == pytest.approx(expected[0], rel=EXACT)
    assert gap(k3, expected) > 1.0
    old = moved(sides, sequences)
    later = sides.theirs("GRPO", sequences, old=old, **peer)
    k2 = sides.ours("grpo", sequences, old=old, beta=0.3, kl="k2")
    assert gap(k2, later) > 0.1


def sampled_elsewhere(sides: Sides, seed: int = 2) -> list[Sequence]:
    """Completions with sampler log-probs that float32 holds, off ours by some tenths of a nat."""
    sequences = make_sequences(masked=False)
    logp = own_logp(sides, sequences)
    noise = torch.randn(logp.shape, generator=torch.Generator().manual_seed(seed))
    parts = (logp.float() + 0.2 * noise).split([len(s.mask) for s in sequences])
    return [replace(s, logprobs=p.tolist()) for s, p in zip(sequences, parts, strict=True)]


def corrected(sides: Sides, sequences: list[Sequence], mode: str, **options):
    """TRL's loss with its own weights for a sampler that is not the trainer."""
    trainer = sides.trainer(
        "GRPO",
        loss_type="grpo",
        vllm_importance_sampling_mode=mode,
        vllm_importance_sampling_clip_max=1.2,
        **options,
    )
    trainer.use_vllm = True  # what samples is replaced; what corrects is not
    sampler = [s.logprobs for s in sequences]
    inputs = sides.rollouts(trainer, sequences, [1.0, 0.0, 0.0, 0.0] * 3, sampler)
    inputs["advantages"] = sides.padded(sequences)["advantages"]
    return sides.loss(trainer, inputs)


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("kind", ["token", "sequence"])
def test_the_truncated_correction_of_the_sampler(sides, kind):
    """The same min(π_old/π_sampler, C) on both sides.

    The loss that is shown is not: ours is J, without the correction.
    """
    sequences = sampled_elsewhere(sides)
    ours = sides.ours("grpo", sequences, beta=0.0, correction={"kind": kind, "cap": 1.2})
    same_gradient(ours, corrected(sides, sequences, f"{kind}_truncate"))
    assert gap(sides.ours("grpo", sequences, beta=0.0), ours) > 0.05


@pytest.mark.usefixtures("exact")
def test_difference_the_correction_masks_by_default(sides):
    """TRL's default drops a whole sequence whose weight exceeds C, and keeps it in N.

    Ours, as methods.md section 9, bounds the weight.
    """
    sequences = sampled_elsewhere(sides)
    logp = own_logp(sides, sequences).split([len(s.mask) for s in sequences])
    weights = [
        math.exp(float(p.sum()) - math.fsum(s.logprobs))
        for p, s in zip(logp, sequences, strict=True)
    ]
    beyond = [w > 1.2 for w in weights]
    assert 0 < sum(beyond) < 12
    left = [s for s, out in zip(sequences, beyond, strict=True) if not out]
    correction = {"kind": "sequence", "cap": 1.2}
    ours = sides.ours("grpo", left, beta=0.0, correction=correction)
    found = corrected(sides, sequences, "sequence_mask")
    same_gradient(mix((len(left) / 12, ours)), found)
    bounded = sides.ours("grpo", sequences, beta=0.0, correction=correction)
    assert gap(found, bounded) > 0.5


@pytest.mark.usefixtures("exact")
def test_difference_the_correction_of_the_kl(sides):
    """Ours weighs the whole coefficient, the KL's part too; TRL adds its KL uncorrected.

    Both terms are expectations over the trainer's policy, so both need the weight.
    """
    sequences = sampled_elsewhere(sides)
    correction = {"kind": "token", "cap": 1.2}
    options = {"beta": 0.3, "use_bias_correction_kl": False}
    found = corrected(sides, sequences, "token_truncate", **options)
    surrogate = sides.ours("grpo", sequences, beta=0.0, correction=correction)
    both = sides.ours("grpo", sequences, beta=0.3)
    kl = mix((1.0, both), (-1.0, sides.ours("grpo", sequences, beta=0.0)))
    same_gradient(mix((1.0, surrogate), (1.0, kl)), found)
    ours = sides.ours("grpo", sequences, beta=0.3, correction=correction)
    assert gap(ours, found) > 0.05


@pytest.mark.usefixtures("exact")
def test_difference_the_mean_of_the_entropy_bonus(sides):
    """TRL's bonus is a token mean whatever the loss's normaliser; ours follows the normaliser."""
    sequences = make_sequences()

    def ours(normaliser: str, entropy: float):
        return sides.ours("ppo", sequences, normaliser=normaliser, entropy=entropy)

    same(ours("token", 0.1), sides.theirs("GRPO", sequences, loss_type="dapo", entropy_coef=0.1))
    found = sides.theirs("GRPO", sequences, loss_type="grpo", entropy_coef=0.1)
    bonus = mix((1.0, ours("token", 0.1)), (-1.0, ours("token", 0.0)))
    same(mix((1.0, ours("sequence", 0.0)), (1.0, bonus)), found)
    assert gap(ours("sequence", 0.1), found) > 0.01


@pytest.mark.usefixtures("exact")
def test_difference_the_ratio_of_rloo(sides):
    """TRL's ρ is that of the whole sequence, Π_t π_θ/π_old; ours is one a token, as in GRPO.

    With every token at ρ = e^0.15 and Â > 0, sequences of two tokens are beyond TRL's clip of
    1.2 (e^0.3 = 1.35) and have no gradient there; here each token is within it.
    """
    sequences = [s for s in make_sequences(masked=False) if len(s.mask) > 1][:8]
    for s in sequences:
        s.advantage = 1.0
    old = own_logp(sides, sequences) - 0.15
    loss, gradient = sides.theirs(
        "RLOO", sequences, old=old, beta=0.0, per_device_train_batch_size=8
    )
    assert float(gradient.norm()) == 0.0
    assert loss == pytest.approx(-1.2)
    options = {"normaliser": "constant", "max_tokens": 1}
    on_policy = sides.ours("rloo", sequences, **options)
    ours = sides.ours("rloo", sequences, old=old, **options)
    same_gradient(ours, mix((math.exp(0.15), on_policy)))


def test_difference_the_kl_in_the_reward_of_rloo(sides):
    """TRL subtracts β Σ k1 before the leave-one-out, we the return to go after the comparison.

    TRL's advantage is thus β · (mean Σ k1 of the others) larger: a baseline, which changes no
    expectation. Ours lets a token answer only for the divergence that is still to come.
    """
    sequences = short(12)
    rewards: list[float | None] = [1.0, 0.0, 0.0, None, 1.0, 1.0, 0.0, 1.0, 0.0, 0.0, 1.0, 0.0]
    plain = sides.trainer("RLOO", beta=0.0)
    found = sides.rollouts(plain, sequences, rewards)["advantages"].tolist()
    method = rloo.create(rloo.Config(beta=0.3, kl="k1"))
    scored = method.advantages(with_rewards(sequences, rewards))
    at = [n for n, r in enumerate(rewards) if r is not None]
    assert found[3] == 0.0
    assert [found[n] for n in at] == pytest.approx([s.advantage for s in scored], rel=1e-6)

    found = sides.rollouts(sides.trainer("RLOO", beta=0.3), sequences, rewards)["advantages"]
    tokens = flatten(scored, torch.float64)
    tokens.old_logp = own_logp(sides, scored)
    tokens.ref_logp = own_logp(replace(sides, model=sides.reference), scored)
    ends = torch.cumsum(tokens.lengths.long(), 0)
    ours = method.advantage(tokens)[torch.cat([torch.zeros(1, dtype=torch.int64), ends[:-1]])]
    k1 = tokens.per_sequence(tokens.old_logp - tokens.ref_logp)
    for n, place in enumerate(at):
        others = [float(k1[m]) for m in range(len(at)) if m != n and at[m] // 4 == place // 4]
        baseline = 0.3 * sum(others) / len(others)
        assert float(found[place] - ours[n]) == pytest.approx(baseline, abs=1e-5)
    assert float((found[at] - ours).abs().max()) > 0.1


@pytest.mark.usefixtures("exact")
def test_difference_the_cap_of_cispo_is_absolute_in_trl(sides):
    """TRL's `epsilon_high` is the largest weight itself; our `clip_high` is what 1 may grow by.

    0.28 in TRL weighs every on-policy token 0.28; the counterpart of ours is 1.28.
    """
    sequences = make_sequences()
    ours = sides.ours("cispo", sequences, clip_high=0.28)
    found = sides.theirs("GRPO", sequences, loss_type="cispo", epsilon_high=0.28)
    same_gradient(found, mix((0.28, ours)))


@pytest.mark.usefixtures("exact")
def test_difference_the_default_of_the_grpo_trainer(sides):
    """TRL's GRPOTrainer is DAPO's token mean with equal clips and no KL unless told otherwise.

    Ours is 000_… eq. 15 to 17: the mean of sequence means, and β = 0.05.
    """
    sequences = make_sequences()
    old = moved(sides, sequences)
    found = sides.theirs("GRPO", sequences, old=old)
    same(sides.ours("dapo", sequences, old=old, clip_high=0.2), found)
    assert gap(sides.ours("grpo", sequences, old=old), found) > 0.4


@pytest.mark.usefixtures("exact")
def test_difference_gspo_by_tokens(sides):
    """With TRL's default loss type a sequence ratio weighs long sequences more.

    That is our `normaliser = "token"`; GSPO's mean over sequences is our default, and needs
    `loss_type="grpo"` there.
    """
    sequences = make_sequences()
    old = moved(sides, sequences)
    clips = {"clip_low": 0.05, "clip_high": 0.05}
    found = sides.theirs(
        "GRPO", sequences, old=old, importance_sampling_level="sequence", epsilon=0.05
    )
    same(sides.ours("gspo", sequences, old=old, normaliser="token", **clips), found)
    ours = sides.ours("gspo", sequences, old=old, **clips)
    assert gap(ours, found) > 0.3


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("length_norm", [False, True])
def test_difference_the_leading_factor_of_dpo(sides, length_norm):
    """000_… eq. 10 and 004_… eq. 7 have no leading β; the derivative of the loss has it.

    At π_θ = π_ref their coefficient is ±½ a token (÷ |o| where log-ratios are averaged). TRL's
    gradient is β times that, and so is ours.
    """
    sequences = make_sequences(masked=False)
    tokens = flatten(sequences, torch.float64)
    (micro,) = micro_batches(sequences, tokens, 16384)
    logp = logprobs_of(sides.model, micro.layout).logp
    view = micro.tokens
    coefficient = 0.5 * view.sign / (view.lengths if length_norm else 1.0)
    (-(coefficient[view.sequence] * logp).sum() / 6).backward()
    written = math.log(2), sides.gradient()
    trainer = sides.trainer("DPO", beta=0.1, loss_type=[DPO[length_norm]])
    trainer.ref_model = sides.model
    found = sides.loss(trainer, trainer.data_collator(pairs_of(sequences)))
    same_gradient(mix((0.1, written)), found)
    at = replace(sides, reference=sides.model)
    same(at.ours("dpo", sequences, length_norm=length_norm, data="pairs"), found)


@pytest.mark.usefixtures("exact")
def test_difference_dpo_cuts_long_pairs(sides):
    """TRL keeps the first `max_length` tokens of each side; our data stage refuses or drops.

    With 10 of them, 6 the prompt's, TRL trains on the first 4 tokens of each completion.
    """
    sequences = make_sequences(masked=False)
    found = trl_dpo(sides, sequences, max_length=10)
    cut = [replace(s, completion=s.completion[:4], mask=s.mask[:4]) for s in sequences]
    same(sides.ours("dpo", cut, data="pairs"), found)
    ours = sides.ours("dpo", sequences, data="pairs")
    assert gap(found, ours) > 0.4


@pytest.mark.usefixtures("exact")
def test_difference_the_temperature_of_pairs_that_were_sampled(sides):
    """DPO and RFT on a sample log train the distribution that sampled, at its temperature.

    TRL's DPO knows no temperature. On preference data there is none here either.
    """
    sequences = make_sequences(masked=False)
    found = trl_dpo(sides, sequences)
    same(sides.ours("dpo", sequences, data="pairs", temperature=0.7), found)
    ours = sides.ours("dpo", sequences, data="samples", temperature=0.7)
    assert gap(ours, found) > 0.3


@pytest.mark.usefixtures("exact")
def test_difference_left_padding_without_positions(sides):
    """TRL pads prompts on the left and passes no positions: rotary angles are of other places.

    Attention depends on their differences alone, so what is left is the rounding of the angles
    to float32: 7e-7 of a nat here, and nothing where prompts are equally long.
    """
    sequences = make_sequences(seed=1) + make_sequences(seed=2, prompt=3)
    trainer = sides.trainer("GRPO")
    inputs = sides.padded(sequences)
    kept = (inputs["completion_mask"] * inputs["tool_mask"]).bool()
    with torch.no_grad():
        found = logps(trainer, sides.model, inputs)[kept]
    worst = float((found - own_logp(sides, sequences)).abs().max())
    assert 1e-9 < worst < 1e-4


def test_what_has_no_peer_in_trl():
    """TRL 1.16 has neither PPO (GAE, value loss) nor a process reward model any more.

    They are proven elsewhere: by hand and against double sums in test_critic.py, and by exact
    enumeration in tests/conformance.
    """
    trl = importlib.import_module("trl")
    assert not [n for n in dir(trl) if "PPO" in n or "PRM" in n]
    for name in ("ppo", "prm"):
        assert importlib.util.find_spec(f"trl.experimental.{name}") is None
