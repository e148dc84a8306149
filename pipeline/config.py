"""The one complete configuration of a run: a TOML file with a table a stage."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from data_prep.build import DataConfig
from data_prep.cluster import ClusterConfig
from data_prep.config import Config, plugin_config, read_toml, validate
from data_prep.errors import UserError, nearest
from data_prep.mixture_config import MixtureConfig
from data_prep.run_folder import folder_name
from pipeline.adapters import LoraConfig
from pipeline.agreement import AgreementConfig
from pipeline.correction import CorrectionConfig
from pipeline.engines import Sampling, StopString
from pipeline.model import ModelConfig
from pipeline.monitor import MonitorConfig
from pipeline.reward import RewardConfig


class SamplingConfig(Config):
    """How rollouts are drawn; see `pipeline.engines.Sampling`.

    Attributes:
        temperature: Of the sampler; the trainer divides its logits by the same.
        top_p: Nucleus.
        top_k: 0 keeps the whole vocabulary.
        min_p: Smallest share of the most probable token's probability; 0 keeps all.
        repetition_penalty: 1 is none; refused in training, which cannot reproduce it.
        max_tokens: Longest completion.
        stop: Strings that end a completion; kept in it.
        stop_token_ids: Tokens that end a completion, beside the model's own end tokens; kept.
    """

    temperature: float = Field(default=1.0, gt=0.0)
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    top_k: int = Field(default=0, ge=0)
    min_p: float = Field(default=0.0, ge=0.0, le=1.0)
    repetition_penalty: float = Field(default=1.0, gt=0.0)
    max_tokens: int = Field(default=64, ge=1)
    stop: tuple[StopString, ...] = ()
    stop_token_ids: tuple[int, ...] = ()

    def of_run(self, *, n: int, seed: int) -> Sampling:
        """Return what an engine is asked for."""
        return Sampling(n=n, seed=seed, **self.model_dump())


class GenerateConfig(Config):
    """Groups for the offline methods.

    Attributes:
        model: Name of the training stage whose checkpoint samples, or a model folder.
        problems: Which file of the data stage: "train", "validation" or "test".
        limit: Number of problems; 0 takes all.
        group_size: Samples a problem (G).
        shard_size: Problems a shard: what a killed run repeats at most.
    """

    model: str = "sft"
    problems: Literal["train", "validation", "test"] = "train"
    limit: int = Field(default=0, ge=0)
    group_size: int = Field(default=8, ge=1)
    shard_size: int = Field(default=256, ge=1)


class VerifyConfig(Config):
    """Verdicts for every sample.

    Attributes:
        checker: `kind` of a checker and its options.
        workers: Judging processes.
        time_limit_s: Wall-clock limit of one verdict; far above what any takes, so that a busy
            machine changes no reward.
    """

    checker: dict[str, Any] = {"kind": "boxed"}
    workers: int = Field(default=2, ge=1)
    time_limit_s: float = Field(default=5.0, gt=0.0)


Decay = Annotated[float, Field(ge=0.0, lt=1.0)]


class OptimizerConfig(Config):
    """AdamW and its schedule.

    Attributes:
        learning_rate: Peak.
        betas: Decay rates of the two moments.
        weight_decay: On matrices only.
        warmup_steps: Linear from 0.
        schedule: What follows the warm-up, down to `final_share` of the peak.
        final_share: What the rate falls to, as a share of the peak: that of a step behind the
            last one, which itself still moves the weights.
        clip_norm: Largest global gradient norm, of the model and of a critic each by itself; 0
            clips nothing.
    """

    learning_rate: float = Field(default=1e-3, gt=0.0)
    betas: tuple[Decay, Decay] = (0.9, 0.98)
    weight_decay: float = Field(default=0.0, ge=0.0)
    warmup_steps: int = Field(default=10, ge=0)
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    final_share: float = Field(default=0.0, ge=0.0, le=1.0)
    clip_norm: float = Field(default=1.0, ge=0.0)


# Folders that a run folder holds beside its training stages'.
TAKEN = (
    "data",
    "mixture",
    "generate",
    "verify",
    "evaluate",
    "report",
    "export",
    "pages",
    "tracking",
    "model",
)


class TrainConfig(Config):
    """One training stage.

    Attributes:
        name: Name of the stage, of its folder and of its checkpoint in the report.
        init: "model" (a fresh or given model), the name of an earlier training stage, or a
            model folder.
        method: `kind` of a method and its settings.
        steps: Optimizer steps; 0 takes one epoch over the method's data.
        sample_budget: Samples after which an online method ends, though steps are left; 0 is no
            limit. Methods that draw unequal numbers a step can so be given equal shares.
        iterations: Outer iterations of an online method, of equal length in steps (the last may
            be shorter). Each begins with π_ref ← π_θ and, where the reward says so, with the
            reward model trained on.
        batch: Sequences (SFT, RFT; of a mixture, packed ones), pairs (DPO, reward models),
            solutions (process reward models) or prompts (online methods) a step.
        batch_tokens: Tokens of a step, padded to its longest sequence, in place of `batch`: the
            sequences of a step are then of like lengths (SFT); 0 takes them in the data's order.
        group_size: Samples a prompt of online methods.
        prompts: What online methods ask: the data stage's "train" problems, or the prompts of
            its "preferences", which have no gold answer.
        reward: What the rewards of online methods are made of.
        correction: What is done about the gap between the sampler's log-probs and the
            trainer's (online methods).
        staleness: Steps by which the policy that samples may lag behind the one that is trained,
            so that generation overlaps training (online methods); 0 is strictly on policy.
        agreement: What is done where sampler and trainer compute different log-probs.
        allow_truncated_sampling: Whether online methods may sample with top_p, top_k or min_p:
            the policy that is trained is then not the one that samples.
        lora: Low-rank adapters in place of the whole model; off at rank 0. A separate critic
            gets adapters too.
        watch_reference: Whether π_ref is asked also where the method needs none, so that the
            records have the KL to it (online methods).
        gradient_checkpointing: Whether the backward pass computes the layers' activations again
            rather than keep them: less memory, a third more time, the same gradient.
        micro_tokens: Most tokens of one forward pass: memory grows with them, and on a CPU more
            than some thousands are no faster; a GPU and a small model take more.
        precision: "bfloat16" runs matrix products in bfloat16 (autocast); parameters, sums and
            the optimizer keep `model.dtype`.
        parallel: What several processes do with the model: each keeps it whole ("ddp"), or they
            split it ("fsdp2"); "auto" does what accelerate was configured for, and "ddp" without.
        save_every: Steps between checkpoints that a killed run goes on from.
        keep_states: How many of those are kept: where the last is damaged, the one before is used.
        validate_every: Steps between looks at held-out data: the loss on validation rows or
            pairs, or, for methods that learn from samples, the share of validation problems
            that greedy completions solve; 0 never.
        validate_limit: Validation problems that are solved.
        monitor: Thresholds of the warnings about how an online method goes.
        trackers: What shows the records as curves beside `steps.jsonl`: "tensorboard", "wandb".
        wandb: Whether W&B keeps its files in the run folder or uploads them.
        coefficients_every: Steps between those whose coefficients are kept, one a token, for
            `python -m pipeline.steps`; 0 keeps none.
        push_to_hub: Repository "owner/name" that takes the checkpoint when the stage is complete;
            empty for none.
    """

    name: str
    init: str = "model"
    method: plugin_config("pipeline.methods")  # type: ignore[valid-type]
    optimizer: OptimizerConfig = OptimizerConfig()
    steps: int = Field(default=0, ge=0)
    sample_budget: int = Field(default=0, ge=0)
    iterations: int = Field(default=1, ge=1)
    batch: int = Field(default=32, ge=1)
    batch_tokens: int = Field(default=0, ge=0)
    group_size: int = Field(default=8, ge=1)
    prompts: Literal["train", "preferences"] = "train"
    reward: RewardConfig = RewardConfig()
    correction: CorrectionConfig = CorrectionConfig()
    staleness: int = Field(default=0, ge=0)
    agreement: AgreementConfig = AgreementConfig()
    allow_truncated_sampling: bool = False
    lora: LoraConfig = LoraConfig()
    watch_reference: bool = False
    gradient_checkpointing: bool = False
    micro_tokens: int = Field(default=4096, ge=1)
    precision: Literal["float32", "bfloat16"] = "float32"
    parallel: Literal["auto", "ddp", "fsdp2"] = "auto"
    save_every: int = Field(default=50, ge=1)
    keep_states: int = Field(default=2, ge=1)
    validate_every: int = Field(default=0, ge=0)
    validate_limit: int = Field(default=128, ge=1)
    monitor: MonitorConfig = MonitorConfig()
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ()
    wandb: Literal["offline", "online"] = "offline"
    coefficients_every: int = Field(default=1, ge=0)
    push_to_hub: str = ""


class EvaluateConfig(Config):
    """What is measured on every checkpoint.

    Attributes:
        suites: Names of suites.
        paths: Suite name to local file, for suites that read one.
        n: Samples a problem; metrics at K use K up to n. With 0 the greedy sample is the only
            one, and stands where the samples would.
        k: The K of Pass@K and Maj@K.
        limit: Problems a suite; 0 takes all.
        temperature: Of the n samples; one greedy sample is always drawn beside them.
        top_p: Nucleus of the n samples.
        top_k: Most probable tokens that the n samples are drawn from; 0 keeps all.
        min_p: Smallest share of the most probable token's probability; 0 keeps all.
        max_tokens: Longest completion.
        profile: Evaluation profile: a name of `eval/profiles/` or the path of a file.
        tool_rounds: Programs that a sample may run; 0 is chain of thought alone.
        sandbox: Limits of the programs, see `eval.sandbox.SandboxConfig`.
        checker: `kind` of a checker and its options; empty takes the profile's.
        reward_model: Scores the samples for best-of-K and the weighted vote: name of a training
            stage, model folder or plug-in file (see `eval.reward_model`); empty for none.
        workers: Judging processes.
        time_limit_s: Wall-clock limit of one verdict; far above what any takes, so that a busy
            machine changes no reward.
        shard_size: Problems a shard: what a killed run repeats at most.
        bootstrap: Resamples behind every interval.
    """

    suites: tuple[str, ...] = ("embedded",)
    paths: dict[str, str] = {}
    n: int = Field(default=8, ge=0)
    k: tuple[int, ...] = (1, 2, 4, 8)
    limit: int = Field(default=0, ge=0)
    temperature: float = Field(default=1.0, gt=0.0)
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    top_k: int = Field(default=0, ge=0)
    min_p: float = Field(default=0.0, ge=0.0, le=1.0)
    max_tokens: int = Field(default=64, ge=1)
    profile: str = "boxed"
    tool_rounds: int = Field(default=0, ge=0)
    sandbox: dict[str, Any] = {}
    checker: dict[str, Any] = {}
    reward_model: str = ""
    workers: int = Field(default=2, ge=1)
    time_limit_s: float = Field(default=5.0, gt=0.0)
    shard_size: int = Field(default=256, ge=1)
    bootstrap: int = Field(default=2000, ge=100)

    @model_validator(mode="after")
    def _k_up_to_n(self) -> EvaluateConfig:
        if not self.k or min(self.k) < 1 or max(self.k) > max(1, self.n):
            raise ValueError(f"every K is between 1 and n = {max(1, self.n)}, found {list(self.k)}")
        return self


class RunConfig(Config):
    """A whole run.

    Attributes:
        name: Shown in the report.
        seed: Every random choice of the run follows from it.
        out: The run folder.
        data: The problems, preference pairs and labelled steps, and supervised rows made of the
            problems.
        mixture: Supervised rows of many sources, in place of those of `data`. One of the two is
            needed.
        cluster: Ray workers that sample, judge, evaluate and convert the mixture's rows; this
            machine's own processes do where it is left out.
    """

    name: str
    seed: int = Field(default=0, ge=0, lt=2**63)
    out: str = Field(min_length=1)
    data: DataConfig | None = None
    mixture: MixtureConfig | None = None
    model: ModelConfig
    engine: plugin_config("pipeline.engines") = {"kind": "embedded"}  # type: ignore[valid-type]
    sampling: SamplingConfig = SamplingConfig()
    train: tuple[TrainConfig, ...] = ()
    generate: GenerateConfig | None = None
    verify: VerifyConfig = VerifyConfig()
    evaluate: EvaluateConfig | None = None
    cluster: ClusterConfig | None = None

    @property
    def profile(self) -> str:
        """Name or path of the profile that the run's rows are rendered with."""
        stage = self.mixture or self.data
        assert stage is not None  # noqa: S101 - validated
        return stage.profile

    @property
    def rows(self) -> Path:
        """Folder of the stage that makes the supervised rows."""
        return Path(self.out) / ("data" if self.mixture is None else "mixture")

    @property
    def tokenizer(self) -> Path:
        """Folder of the tokenizer that everything before training was made with."""
        return Path(self.out) / ("mixture" if self.data is None else "data") / "tokenizer"

    @model_validator(mode="after")
    def _code_of_the_model(self) -> RunConfig:
        if self.model.trust_remote_code and "trust_remote_code" in type(self.engine).model_fields:
            # The engine loads what the trainer does; one key allows both.
            engine = self.engine.model_copy(update={"trust_remote_code": True})
            object.__setattr__(self, "engine", engine)
        return self

    @model_validator(mode="after")
    def _some_data(self) -> RunConfig:
        data, mixture = self.data, self.mixture
        if data is None and mixture is None:
            raise ValueError("a table [data] or [mixture] is expected")
        if data is not None and mixture is not None:
            if data.profile != mixture.profile:
                raise ValueError(
                    f"data.profile is {data.profile!r} and mixture.profile {mixture.profile!r}: "
                    "what is trained on would be worded unlike what is asked; give both one"
                )
            paths = (data.tokenizer.path, mixture.tokenizer.path)
            if all(paths) and paths[0] != paths[1]:
                raise ValueError(
                    f"data.tokenizer.path is {paths[0]!r} and mixture.tokenizer.path {paths[1]!r}"
                    ": a run has one tokenizer; leave out that of data"
                )
        return self

    @model_validator(mode="after")
    def _names(self) -> RunConfig:
        names = [folder_name(stage.name, "train, key 'name'") for stage in self.train]
        for name in names:
            ending = name.rpartition(".")[2] in ("partial", "old", "failed", "tmp")
            if name in TAKEN or name.startswith("eval-") or ending:
                raise ValueError(f"a training stage named {name!r}, as another folder of the run")
        if len(set(names)) != len(names):
            raise ValueError(f"two training stages share a name: {names}")
        asked = {f"init of stage {stage.name!r}": stage.init for stage in self.train}
        for stage in self.train:
            asked[f"reward.model_init of stage {stage.name!r}"] = stage.reward.model_init
            asked[f"reward.process_init of stage {stage.name!r}"] = stage.reward.process_init
            critic = getattr(stage.method, "critic_init", "")
            asked[f"method.critic_init of stage {stage.name!r}"] = critic
        asked = {where: name for where, name in asked.items() if name}
        if self.generate is not None:
            asked["generate.model"] = self.generate.model
        for where, name in asked.items():
            # A slash makes it a path or a hub id; "model" is the run's own model.
            if name not in (*names, "model") and "/" not in name and not Path(name).is_dir():
                raise ValueError(
                    f"{where} is {name!r}, which is no training stage and no folder "
                    f"{nearest(name, names)}; one of {', '.join(['model', *names])}, a model "
                    "folder, or a hub id such as owner/name"
                )
        return self


def load_run(path: str | Path) -> RunConfig:
    """Read and validate a run's configuration.

    Raises:
        UserError: The file is missing or broken, or a key or value is not allowed.
    """
    table = read_toml(path)
    if "study" in table:
        raise UserError(
            f"{path}, key 'study'",
            "a study of several methods",
            "the configuration of one run",
            "start it with python -m pipeline.study, or remove the table",
        )
    for section in ("name", "out", "data", "model"):
        if section not in table and not (section == "data" and "mixture" in table):
            raise UserError(
                f"{path}, key {section!r}",
                "missing",
                "a complete run configuration",
                "start from pipeline/configs/cpu.toml",
            )
    return validate(RunConfig, table, str(path))
