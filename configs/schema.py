"""The settings of a run.

The docstring below a field is its documentation: `troupe config` and docs/settings.md are generated from it.
A default lives here and nowhere else.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from typing import Annotated, Literal, Self
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from configs.annotations import Called
from configs.zero import ZERO
from configs.zero import Strategy as Strategy

Role = Literal["actor", "critic", "reference", "reward", "rollout"]
ROLES: tuple[Role, ...] = ("actor", "critic", "reference", "reward", "rollout")
Shared = Literal["actor", "critic", "reference", "reward"]
"""A role that can share its base with others."""

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
BelowOne = Annotated[float, Field(ge=0.0, lt=1.0)]
Seconds = Annotated[float, Field(gt=0.0, le=86_400.0)]
MAX_SERVED_RANK = 512
"""Highest rank of an adapter that vLLM serves."""

Overlong = Literal["refuse", "cut", "drop"]
"""What happens to rows that are too long."""

FunctionPath = Annotated[str, Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$"), Called("module:function")]


def with_home(path: str) -> str:
    """A path with a home folder in place of `~` or `~name`. Done where settings are read, so that workers on other nodes, whose
    home may be another, and a resumed run have the same path. Raises ValueError where no such user is known."""
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        raise ValueError(f"was {path!r}, but there is no user {path.partition('/')[0]} here")
    if "\0" in path:
        raise ValueError(f"was {path!r}; a path holds no null character")
    return expanded


FilePath = Annotated[str, Field(min_length=1), AfterValidator(with_home), Called("path")]
ModelPath = Annotated[str, Field(min_length=1), AfterValidator(with_home), Called("folder or hub name")]


class Settings(BaseModel):
    """Base of all settings: unknown keys are refused, docstrings are descriptions."""

    model_config = ConfigDict(extra="forbid", validate_default=True, use_attribute_docstrings=True, allow_inf_nan=False)


# ---------------------------------------------------------------- model


class LoraSettings(Settings):
    """Low-rank adapters (Hu et al. 2021): the base weights stay frozen."""

    rank: PositiveInt = 16
    """Rank of the adapters."""
    alpha: PositiveFloat = 32.0
    """Scale: the adapter's product is multiplied by alpha / rank."""
    rslora: bool = False
    """Multiply by alpha / sqrt(rank) instead, which keeps high ranks learning (Kalajdzievski 2023)."""
    dora: bool = False
    """Learn the length of each output's weights apart from their direction (Liu et al. 2024). Slower; always sent merged."""
    dropout: BelowOne = 0.0
    """Dropout before the adapters, not in PPO. Each rank draws it for each micro-batch: results depend on the number of both."""
    targets: Annotated[list[str], Field(min_length=1)] | Literal["all-linear"] = "all-linear"
    """Names of the modules that get an adapter."""


class ModelSettings(Settings):
    """The language model that the run starts from."""

    path: ModelPath
    """Hugging Face folder or hub name: config.json, tokenizer, and weights unless `init` is random."""
    init: Literal["pretrained", "random"] = "pretrained"
    """random: a new model of the shape in config.json, drawn with the run's seed."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of the parameters. auto: bfloat16 where the device multiplies it faster (GPUs; CPUs with AMX or AVX-512 bf16, by a
    short measurement that run.json notes), else float32. Beside bfloat16 the optimizer has weights of its own, in float32."""
    optimizer_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the optimizer's weights and moments. bfloat16: half the memory, and small updates are lost in rounding; for
    models in bfloat16 under zero1, zero2 and zero3."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    activation_offload: bool = False
    """Keep the layers' inputs, which are all that gradient checkpointing keeps, in host memory. Without effect on CPU."""
    lora: LoraSettings | None = None
    """Train adapters in place of all weights, in every trained role."""
    quantize: Literal["4bit", "8bit"] | None = None
    """Keep the frozen weights below the adapters in 4 or 8 bits (Dettmers et al. 2023): on GPU, with the package bitsandbytes."""
    end_tokens: Annotated[list[str], Field(min_length=1)] | None = None
    """Tokens of which each ends an answer, in training, sampling, scoring and the exported model. none: the tokenizer's eos
    token and those of generation_config.json. Name them where the chat template ends a turn with another one."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Leave off unless you trust its author."""

    @model_validator(mode="after")
    def _offered(self) -> Self:
        if self.optimizer_dtype == "bfloat16" and self.dtype != "bfloat16":
            raise ValueError(
                f"optimizer_dtype: was 'bfloat16', which is for models with dtype bfloat16; dtype was {self.dtype!r}"
            )
        if self.activation_offload and not self.gradient_checkpointing:
            raise ValueError("activation_offload: was true, which needs gradient_checkpointing: true")
        return self

    @model_validator(mode="after")
    def _quantized(self) -> Self:
        if self.quantize and self.init == "random":
            raise ValueError(
                f"quantize: was {self.quantize!r}, but init is random, and such weights have all to be trained"
            )
        if self.quantize and not self.lora:
            raise ValueError(
                f"quantize: was {self.quantize!r}, but weights of so few bits cannot be trained, and there are no adapters; "
                "set lora too (lora.rank), or leave quantize out"
            )
        return self


# ---------------------------------------------------------------- data


class DatasetSettings(Settings):
    """One dataset: files (.jsonl, .json, .csv, each also with .gz, .parquet), a folder of such files, a pattern such as
    `data/*.parquet`, a folder written by datasets.save_to_disk, or a hub name."""

    path: FilePath | Annotated[list[FilePath], Field(min_length=1)]
    """File, folder, pattern or hub name; a list of them is read one after the other."""
    split: str | None = None
    """Split, where the dataset has several."""
    configuration: str | None = None
    """Configuration of a hub dataset, where it has several."""
    revision: str | None = None
    """Branch, tag or commit of a hub dataset."""
    columns: dict[str, str] = {}
    """Our column -> the dataset's column. Ours: prompt, completion, messages, chosen, rejected, margin, input, tools. Of prompts
    also a name of one's own -> another column, which reward functions then get under that name."""
    limit: PositiveInt | None = None
    """Use the first so many rows only."""

    @property
    def paths(self) -> list[str]:
        return [self.path] if isinstance(self.path, str) else self.path

    @property
    def name(self) -> str:
        """For errors and reports: the path, and how many more there are."""
        first, *others = self.paths
        return f"{first} and {len(others)} more" if others else first


# ---------------------------------------------------------------- training


class OptimizerSettings(Settings):
    """AdamW (Loshchilov & Hutter 2019) with warm-up."""

    lr: PositiveFloat
    """Peak learning rate."""
    betas: tuple[BelowOne, BelowOne] = (0.9, 0.95)
    """Decay of the first and the second moment."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay."""
    warmup: Fraction = 0.0
    """Share of the steps in which the rate rises to `lr`, rounded up: of W such steps the first has 1 / W of it, the last all."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How the rate goes on after the warm-up; linear and cosine fall towards 0, which would come one step after the last."""
    max_grad_norm: PositiveFloat = 1.0
    """Gradients are scaled down to this global norm."""
    refuse_grad_norm: PositiveFloat = 1e5
    """A step is not applied where the global norm is larger than this before scaling, or where it or the loss is not finite."""


class BatchSettings(Settings):
    """What the supervised stages share."""

    train: DatasetSettings
    """Rows to train on."""
    validation: DatasetSettings | None = None
    """Held-out rows."""
    epochs: PositiveFloat = 1.0
    """Passes over the training rows (a fraction is allowed)."""
    batch_size: PositiveInt = 32
    """Rows (pairs, for the reward model) in one optimizer step, over all ranks."""
    micro_batch_tokens: PositiveInt = 4096
    """Tokens, padding included, in one forward pass of one rank; of a pair (for the reward model) both sides count."""
    max_length: PositiveInt = 512
    """Longest sequence in tokens."""
    overlong: Overlong = "cut"
    """Rows longer than max_length. cut: the prompt's text is cut on the left (of a conversation the oldest turns go first; the
    template's headers stay), down to half of max_length, then the answer on the right. drop: they are left out. refuse: the run
    does not start."""
    validate_every: PositiveInt | None = None
    """Steps between validations, with `validation`; none: only at the end."""
    optimizer: OptimizerSettings
    """AdamW."""

    @model_validator(mode="after")
    def _validates(self) -> Self:
        # With `validation: none` somebody has turned it off, and the rest of the section may stay as it is.
        if self.validate_every and "validation" not in self.model_fields_set:
            raise ValueError(
                f"validate_every: was {self.validate_every}, but there are no held-out rows to validate on (validation)"
            )
        return self


class SFTSettings(BatchSettings):
    """Supervised fine-tuning: loss on the assistant's tokens only."""

    turns: Literal["all", "last"] = "all"
    """Which turns of the assistant are learnt from `messages`: all of them, or the last one alone."""


class RewardModelSettings(BatchSettings):
    """Reward model: pairwise logistic loss (Bradley & Terry 1952; Ouyang et al. 2022)."""

    model: ModelSettings | None = None
    """Start from another model than the SFT stage's."""
    margin: NonNegativeFloat = 0.0
    """Factor of the rows' `margin` column, subtracted from the difference of the scores (Touvron et al. 2023)."""
    center: NonNegativeFloat = 0.0
    """Weight of the squared sum of a pair's scores, which keeps them near 0."""
    dropout: BelowOne = 0.0
    """Dropout on the hidden states before the head and on the embeddings, against overfitting of small models."""
    normalize_on: DatasetSettings | None = None
    """Demonstrations on which scores get mean 0 and deviation 1. none: the rows of `sft.train`; without a section `sft` scores
    stay as they are."""


# ---------------------------------------------------------------- PPO


class FixedKL(Settings):
    """The same coefficient throughout."""

    kind: Literal["fixed"] = "fixed"
    coefficient: NonNegativeFloat = 0.1
    """Weight of the per-token KL penalty."""


class AdaptiveKL(Settings):
    """Proportional controller of the coefficient (Ziegler et al. 2019)."""

    kind: Literal["adaptive"] = "adaptive"
    coefficient: PositiveFloat = 0.1
    """First value."""
    target: PositiveFloat = 0.1
    """Wanted KL in nats per token."""
    horizon: PositiveInt = 2000
    """Samples over which the coefficient follows."""


class KLSettings(Settings):
    place: Literal["reward", "loss"] = "reward"
    """reward: taken from each token's reward, which weighs on the tokens before it too. loss: added to the policy's loss token
    by token, so that no answer gains by being short; its weight is then against advantages as they are trained on: whitened,
    unless told otherwise."""
    estimator: Literal["k1", "k2", "k3"] = "k1"
    """Per-token estimator of KL(actor | reference) (Schulman 2020). In the loss k2's gradient is that of
    KL(actor | reference), k3's that of KL(reference | actor), and k1's is 0 in the mean: refused."""
    control: Annotated[FixedKL | AdaptiveKL, Field(discriminator="kind")] = FixedKL()
    """How the coefficient is chosen."""

    @model_validator(mode="after")
    def _pulls(self) -> Self:
        if self.place == "loss" and self.estimator == "k1":
            raise ValueError(
                "k1 in the loss has a gradient whose mean is 0: it holds nothing back. Take estimator=k2 or k3."
            )
        return self


class ModelReward(Settings):
    """A trained reward model."""

    kind: Literal["model"] = "model"
    name: str = "model"
    """Name in metrics."""
    path: ModelPath | None = None
    """Folder of the model; none: what the rm stage of this run trained, or of the run that `start_from` names."""
    tokenizer: Literal["policy", "own"] = "policy"
    """policy: it scores the policy's tokens, so its tokenizer, chat template and end tokens must be the policy's (checked before
    the start). own: answers are decoded, and prompt and answer tokenised by its own tokenizer and chat template."""
    weight: float = 1.0
    """Factor in the sum of rewards."""


class FunctionSettings(Settings):
    """A Python function (prompts, answers, **columns) -> one score per answer, in a process of its own."""

    name: str
    """Name in metrics."""
    function: FunctionPath
    """module:function, importable from the folder that the run was started in."""
    timeout: Seconds = 60.0
    """Seconds for one call; past them its process is killed, and the call's answers have no score."""
    batch_size: PositiveInt | None = None
    """Answers in one call, which share its timeout and its errors; none: all that a reward worker has."""
    start_timeout: Seconds = 120.0
    """Seconds for its process to start and import the function."""

    def longest(self, answers: int) -> float:
        """Seconds that so many answers may take at worst."""
        calls = math.ceil(answers / self.batch_size) if self.batch_size else 1
        return calls * (self.start_timeout + self.timeout)


class FunctionReward(FunctionSettings):
    """A Python function (prompts, answers, **columns) -> one score per answer (docs/rewards.md)."""

    kind: Literal["function"] = "function"
    weight: float = 1.0
    """Factor in the sum of rewards."""


class HttpReward(Settings):
    """A service that is asked over HTTP (docs/rewards.md)."""

    kind: Literal["http"] = "http"
    name: str
    """Name in metrics."""
    url: Annotated[
        str,
        Field(pattern=r"^https?://[^\s/@?#]+(/[^\s?#]*)?$"),
        Called("http:// or https:// address without user, password, query and spaces"),
    ]
    """Where requests are posted, without user, password and query."""
    token_env: Annotated[str, Field(pattern=r"^[A-Za-z_]\w*$"), Called("name of an environment variable")] | None = None
    """Environment variable, of the driver and of the nodes, with the token that is sent as `Authorization: Bearer`."""
    timeout: Seconds = 300.0
    """Seconds for all answers of a reward worker, retries included; what has no score by then has timed out."""
    request_timeout: Seconds = 30.0
    """Seconds for one request, from the connection to the last byte."""
    retries: Annotated[int, Field(ge=0, le=10)] = 3
    """Further attempts after a failed connection, a timeout, or an answer 429 or 5xx."""
    batch_size: PositiveInt = 32
    """Answers in one request."""
    concurrency: Annotated[int, Field(ge=1, le=64)] = 4
    """Requests at a time, of each reward worker."""
    max_response_bytes: PositiveInt = 2**20
    """Longest response; a longer one is an error."""
    samples: bool = False
    """Send records of the answers too: token ids, whether they ended by themselves, sample number, step."""
    weight: float = 1.0
    """Factor in the sum of rewards."""

    @field_validator("url")
    @classmethod
    def _has_a_port(cls, url: str) -> str:
        try:
            urlsplit(url).port  # noqa: B018  reads it
        except ValueError as error:
            raise ValueError(f"was {url!r}: {error}") from None
        return url

    def longest(self, answers: int) -> float:
        """Seconds that so many answers may take at worst."""
        return self.timeout


Reward = Annotated[ModelReward | FunctionReward | HttpReward, Field(discriminator="kind")]


class Judge(FunctionSettings):
    """A function that scores answers in evaluations only, never in training."""


class PretrainingMix(Settings):
    """PPO-ptx: a language-modelling loss beside the policy loss (Ouyang et al. 2022)."""

    coefficient: PositiveFloat
    """Weight of the loss on the demonstrations."""
    batch_size: PositiveInt = 32
    """Demonstrations in each optimizer step, over all ranks."""
    data: DatasetSettings | None = None
    """Demonstrations; none: the rows of `sft.train`."""


class EvaluationSettings(Settings):
    """Answers to held-out prompts, before and after training."""

    prompts: DatasetSettings
    """Held-out prompts."""
    every: PositiveInt | None = None
    """Steps between evaluations; none: only before the first step and after the last."""
    samples: PositiveInt = 16
    """Prompts that the report shows with their answers."""
    judges: list[Judge] = []
    """Independent judges."""


REWARD_METRICS = ("mean", "std")
"""Last parts of PPO's metrics `reward/...` that are no source's name."""
EVALUATION_METRICS = ("reward", "reward_ci_low", "reward_ci_high", "reward_std", "kl", "length", "distinct", "unscored")
"""Last parts of the metrics `evaluation/...` that are no judge's name."""


class AnswerLogSettings(Settings):
    """Answers of training that are kept to be read, in samples/ppo.jsonl of the run's folder."""

    every: PositiveInt = 10
    """Steps between those of which answers are kept; the first and the last are always among them."""
    answers: PositiveInt = 8
    """Answers that are kept of such a step, drawn at random."""
    most_mib: PositiveInt = 64
    """Largest size of the file in MiB; where it would grow beyond, its oldest steps are dropped."""


class PPOSettings(Settings):
    """Proximal policy optimization (Schulman et al. 2017) on the reward, with a KL penalty."""

    prompts: DatasetSettings
    """Prompts to answer."""
    steps: PositiveInt
    """Rollout-and-train steps."""
    prompts_per_step: PositiveInt = 64
    """Prompts in one step."""
    samples_per_prompt: PositiveInt = 1
    """Answers to each prompt."""
    epochs: PositiveInt = 1
    """Passes over a step's samples, in the same mini-batches."""
    mini_batches: PositiveInt = 1
    """Optimizer steps in one pass. Their samples differ by one at most; where too few samples have a score there are fewer."""
    micro_batch_tokens: PositiveInt = 4096
    """Tokens, padding included, in one forward pass of one rank."""
    max_prompt_tokens: PositiveInt = 256
    """Longest prompt in tokens."""
    overlong: Overlong = "refuse"
    """Prompts longer than max_prompt_tokens. refuse: the run does not start. drop: they are left out. cut: their text is cut on
    the left; of a conversation the oldest turns go first, and the template's headers stay."""
    rewards: Annotated[list[Reward], Field(min_length=1)] = [ModelReward()]
    """Sources of the reward; their weighted sum is trained on."""
    max_unscored: Fraction = 0.1
    """Share of a step's samples that may lack a score; above it the run stops. The others are trained on without them."""
    kl: KLSettings = KLSettings()
    """Penalty for leaving the reference."""
    policy_loss: str = "ppo_clip"
    """Name in the registry of policy losses: ppo_clip, or reinforce for one update in a step."""
    value_loss: str = "clipped"
    """Name in the registry of value losses: clipped, mse."""
    critic: bool = True
    """Train a critic beside the actor. Without one the settings of its training are not looked at: critic_optimizer,
    critic_warmup, value_loss, value_clip_range."""
    advantage: str = "gae"
    """Name in the registry of advantage estimators: gae, which needs the critic, or reinforce. Where critic is false and none is
    named, it is reinforce."""
    gamma: Fraction = 1.0
    """Discount per token."""
    gae_lambda: Fraction = 0.95
    """Lambda of generalised advantage estimation (Schulman et al. 2016), the estimator gae."""
    clip_range: PositiveFloat = 0.2
    """Half-width of the clip on the probability ratio, of policy losses that clip: ppo_clip."""
    value_clip_range: PositiveFloat = 0.2
    """Half-width of the clip on the change of a value."""
    entropy_coefficient: NonNegativeFloat = 0.0
    """Weight of the entropy bonus."""
    whiten_advantages: bool = True
    """Advantages of a step get mean 0 and deviation 1."""
    whiten_rewards: bool = False
    """Scores of a step get mean 0 and deviation 1."""
    reward_clip: PositiveFloat | None = None
    """Scores are cut to [-clip, clip]; none: they are not cut."""
    missing_eos_penalty: NonNegativeFloat = 0.0
    """Taken from the score of an answer without an end-of-sequence token."""
    target_kl: PositiveFloat | None = None
    """A step's remaining updates are dropped once the mean KL between the policy that sampled and the present one passes this;
    none: never."""
    refuse_kl: PositiveFloat = 10.0
    """Nats per token; from a step whose mean KL to the reference is larger, or not a number, neither actor nor critic learns."""
    critic_warmup: Annotated[int, Field(ge=0)] = 0
    """First steps in which only the critic learns; fewer than `steps`."""
    ptx: PretrainingMix | None = None
    """Pretraining-loss mix."""
    max_log_prob_gap: PositiveFloat | None = None
    """Largest mean |difference| between the engine's and the trainer's log-probabilities of a step's answers; beyond it the run
    stops. none: as `verify` says for the model's dtype."""
    actor_optimizer: OptimizerSettings
    """AdamW of the actor."""
    critic_optimizer: OptimizerSettings | None = None
    """AdamW of the critic; needed where there is one."""
    evaluation: EvaluationSettings | None = None
    """Evaluation on held-out prompts."""
    answer_log: AnswerLogSettings | None = AnswerLogSettings()
    """Answers of training that are kept to be read; none: no answers are kept."""

    @property
    def sequences_per_step(self) -> int:
        return self.prompts_per_step * self.samples_per_prompt

    @property
    def warmup_steps(self) -> int:
        """Steps before the actor learns."""
        return self.critic_warmup if self.critic else 0

    def longest_scoring(self, answers: int) -> float:
        """Seconds that functions, services and judges may take at worst over so many answers, by their own timeouts."""
        judges = self.evaluation.judges if self.evaluation else []
        timed = [source for source in (*self.rewards, *judges) if not isinstance(source, ModelReward)]
        return sum(source.longest(answers) for source in timed)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.mini_batches > self.sequences_per_step:
            raise ValueError(
                f"mini_batches: was {self.mini_batches}, but a step has {self.sequences_per_step} sequences (prompts_per_step "
                f"{self.prompts_per_step} x samples_per_prompt {self.samples_per_prompt}); up to so many would fit"
            )
        return self

    @model_validator(mode="after")
    def _with_critic(self) -> Self:
        if not self.critic:
            if "advantage" not in self.model_fields_set:
                self.advantage = "reinforce"
            if self.advantage == "gae":
                raise ValueError("advantage: was 'gae', which needs a critic, and critic is false; reinforce would fit")
            return self
        if self.critic_optimizer is None:
            names = ", ".join(OptimizerSettings.model_fields)
            raise ValueError(f"critic_optimizer: missing; must be settings ({names}): critic is true")
        if self.critic_warmup >= self.steps:
            raise ValueError(
                f"critic_warmup: was {self.critic_warmup}, and steps is {self.steps}: the actor would never learn; "
                f"{self.steps - 1} or less would fit"
            )
        return self

    @model_validator(mode="after")
    def _learns(self) -> Self:
        updates = self.epochs * self.mini_batches
        if self.policy_loss == "reinforce" and updates > 1:
            raise ValueError(
                f"policy_loss: was 'reinforce', which is right for one update in a step, but epochs ({self.epochs}) x "
                f"mini_batches ({self.mini_batches}) make {updates}; epochs 1 and mini_batches 1 would fit, or ppo_clip"
            )
        if all(source.weight == 0 for source in self.rewards):
            raise ValueError(
                "rewards: every weight is 0, so nothing is rewarded; one at least must have another weight"
            )
        if self.whiten_rewards and self.sequences_per_step == 1:
            raise ValueError(
                "whiten_rewards: was true, but a step has 1 sequence, whose whitened score is always 0; more "
                "prompts_per_step would fit, or false"
            )
        control = self.kl.control
        if isinstance(control, AdaptiveKL) and self.refuse_kl <= control.target:
            raise ValueError(
                f"refuse_kl: was {self.refuse_kl:g}, and kl.control.target is {control.target:g}: a step at its target "
                "would not change the actor; a larger one would fit"
            )
        return self

    @model_validator(mode="after")
    def _names(self) -> Self:
        judges = self.evaluation.judges if self.evaluation else []
        rewards = [source.name for source in self.rewards]
        names = rewards + [judge.name for judge in judges]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"rewards: the name {name} stands more than once; rewards and judges need one each")
        for kind, named, taken in (
            ("rewards", rewards, {*REWARD_METRICS, *(f"{name}_std" for name in rewards)}),
            ("evaluation.judges", [judge.name for judge in judges], set(EVALUATION_METRICS)),
        ):
            if clashes := [name for name in named if name in taken]:
                raise ValueError(f"{kind}: the name {clashes[0]} is that of a metric; choose another")
        return self


# ---------------------------------------------------------------- rollout


class RolloutSettings(Settings):
    """The vLLM engines."""

    max_new_tokens: PositiveInt = 128
    """Longest answer in tokens."""
    temperature: Annotated[float, Field(ge=0.01)] = 1.0
    """Sampling temperature; log-probabilities are taken under it. vLLM would raise lower ones to 0.01."""
    ignore_eos: bool = False
    """Go on to max_new_tokens (for benchmarks)."""
    tensor_parallel: PositiveInt = 1
    """Devices of one engine."""
    max_sequences: PositiveInt = 256
    """Sequences that an engine works on at a time."""
    kv_cache_gib: PositiveFloat = 1.0
    """Memory of an engine's key-value cache on CPU, in GiB; one sequence of full length must fit."""
    gpu_memory_share: Annotated[float, Field(gt=0.0, le=1.0)] = 0.4
    """Share of a GPU's memory that an engine may use."""
    compile: Literal["auto"] | bool = "auto"
    """torch.compile and CUDA graphs: slower start, faster generation. auto: on GPUs."""


class VerifySettings(Settings):
    """How near engines and exported folders must come to what the trainer computes. Log-probabilities of a few random tokens are
    compared: of an engine after loading and after every update, of an exported folder read back from disk."""

    float32: PositiveFloat = 1e-4
    """Largest mean |difference| in nats per token for models in float32."""
    bfloat16: PositiveFloat = 0.25
    """The same for models in bfloat16, whose products are rounded to 8 bits: two ways to compute the same SmolLM2-135M differ by
    0.09 for random tokens, whose log-probabilities are about -15, and by 0.03 for likely ones."""


class PublishSettings(Settings):
    """How new weights reach the engines."""

    transport: Literal["auto", "object_store", "nccl", "ipc"] = "auto"
    """auto: object_store on CPU; on GPU ipc where actor and rollout are colocated, else nccl."""
    bucket_mib: PositiveInt = 128
    """Size of a bucket of weights in MiB."""
    lora: Literal["merged", "adapter"] = "merged"
    """With `model.lora`. merged: all weights, the adapter added; generation costs nothing more. adapter: it alone is sent, a few
    percent of the bytes, and applied by the engine's LoRA kernels."""


# ---------------------------------------------------------------- placement


class GroupSettings(Settings):
    """Roles that share one placement group."""

    roles: Annotated[list[Role], Field(min_length=1)]
    """Roles on the same devices."""
    devices: PositiveInt = 1
    """Bundles, one device each. A training role has a rank on each; rollout has devices / tensor_parallel engines."""
    packing: Literal["PACK", "STRICT_PACK", "SPREAD", "STRICT_SPREAD"] = "PACK"
    """How the bundles lie over nodes."""


class PlacementSettings(Settings):
    """Which roles share devices, and how many they get."""

    layout: Literal["separate", "paired", "colocated"] = "separate"
    """separate: each role its own group. paired: actor+reference, critic+reward, rollout. colocated: one group."""
    devices: dict[Role, PositiveInt] = {}
    """Devices of a role in a preset layout (1 where not named; a group takes its largest)."""
    groups: list[GroupSettings] | None = None
    """A partition of the roles of one's own, in place of `layout`."""
    cpus_per_device: PositiveFloat | None = None
    """CPU cores that a bundle asks for; none: 1 beside a GPU; without GPUs all cores, divided among the bundles."""
    timeout: PositiveFloat = 120.0
    """Seconds to wait for the placement groups, also while another run holds their room."""

    @model_validator(mode="after")
    def _partition(self) -> Self:
        named = [role for group in self.groups or [] for role in group.roles]
        for role in named:
            if named.count(role) > 1:
                raise ValueError(f"groups: the role {role} stands in more than one group")
        return self


class OffloadSettings(Settings):
    """Where zero3_nvme keeps what it takes off the devices."""

    nvme_path: FilePath | None = None
    """Folder on each node's fast disk; what a run puts there is gone when its workers are."""


class ClusterSettings(Settings):
    """The Ray cluster."""

    address: str | None = None
    """Running cluster to join: HOST:PORT, or auto for the one on this machine; none: RAY_ADDRESS, else one is started here for
    the run."""
    dashboard_port: Annotated[int, Field(ge=1, le=65_535)] | None = None
    """Port of the dashboard of a cluster that the run starts; none: 8265, or the next one that is free."""


class DeadlineSettings(Settings):
    """Seconds that a call to a worker may take. A phase without a number of its own goes by `first`, `least` and `patience`."""

    start: PositiveFloat | None = 600.0
    """Workers start, meet, and load models and data."""
    generate: PositiveFloat | None = None
    """An engine writes a step's answers."""
    score: PositiveFloat | None = None
    """Reference, critic or reward score a step's answers."""
    train: PositiveFloat | None = None
    """Actor or critic learn from a step."""
    publish: PositiveFloat | None = None
    """New weights reach all engines."""
    save: PositiveFloat | None = None
    """Workers save, restore or export."""
    first: PositiveFloat = 1800.0
    """The first time that a call of its kind is made, when nothing is known of its speed."""
    least: PositiveFloat = 60.0
    """Later calls get no less."""
    patience: PositiveFloat = 10.0
    """Later calls get so many times the longest that the latest ones of their kind took, in proportion to what there is to do."""


class RecoverySettings(Settings):
    """What happens when a worker dies or hangs."""

    restarts: Annotated[int, Field(ge=0)] = 3
    """Restarts of a role within `window`, or within one step; one failure more ends the run. 0: every failure does."""
    window: PositiveFloat = 3600.0
    """Seconds over which restarts are counted."""
    snapshot_every: PositiveInt | None = 10
    """Steps between snapshots of the training state, kept in Ray's object store, from which lost steps are replayed; none:
    they are replayed from the latest checkpoint, or from the stage's start."""
    node_timeout: PositiveFloat = 600.0
    """Seconds to wait for room elsewhere when a node is lost."""
    grace: PositiveFloat = 25.0
    """Seconds that a run asked to stop has to end its step; then it stops at once, with the latest snapshot as checkpoint."""
    refused_steps: PositiveInt = 3
    """So many training steps in a row without a finite loss and gradient end the run."""


class CheckpointSettings(Settings):
    """Where a run can be taken up again."""

    every: PositiveInt | None = None
    """Steps between checkpoints; none: only when the run is asked to stop."""
    keep: PositiveInt = 2
    """Checkpoints kept per stage."""
    on_error: Literal["stop", "continue"] = "stop"
    """When a checkpoint or metrics cannot be written, as on a full disk. continue: warn, and try again at the next ones."""


class RunConfig(Settings):
    """All settings of a run."""

    name: Annotated[
        str,
        Field(pattern=r"^\w[\w.-]{0,62}$"),
        Called("1 to 63 letters, digits, _ . and -, the first no . and no -"),
    ]
    """Name of the run and of its folder."""
    runs: FilePath = "runs"
    """Folder that holds the runs' folders."""
    start_from: FilePath | None = None
    """Folder of another run, whose finished models serve where this run does not train its own: the SFT model for rm and ppo, the
    reward model for ppo. What that run took from a third one serves too. `model.path`, `model.end_tokens`, `chat_template`,
    `chat_template_args` and `system_prompt` must be as in that run."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 1
    """Seed of everything random."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda where the cluster has GPUs."""
    strategy: Strategy = "ddp"
    """What is sharded over a role's ranks: ddp nothing; zero1 optimizer states; zero2 gradients too; zero3 parameters too.
    _offload: optimizer states, and under zero3 parameters, in host memory; zero3_nvme: its optimizer states on disk, in
    `offload.nvme_path`.
    auto: the fastest that fits, by the plan."""
    strategies: dict[Role, Strategy] = {}
    """Another strategy for single roles."""
    share: list[Shared] = []
    """Roles of PPO that one frozen base serves, in one process of each rank, by adapters and heads: actor, critic, reference,
    reward. Needs `model.lora`; the results are those of the same roles apart."""
    model: ModelSettings
    """The starting model."""
    plugins: list[str] = []
    """Modules to import in every process: what they register (estimators, losses) can be named in the settings."""
    chat_template: bool = False
    """Wrap prompts of text in the tokenizer's chat template. Prompts of messages always are."""
    chat_template_args: dict[str, bool | int | str] = {}
    """Further variables for the chat template, such as `enable_thinking: false`."""
    system_prompt: str | None = None
    """System message of conversations that have none."""
    sft: SFTSettings | None = None
    """Stage 1."""
    rm: RewardModelSettings | None = None
    """Stage 2."""
    ppo: PPOSettings | None = None
    """Stage 3."""
    rollout: RolloutSettings = RolloutSettings()
    """The engines."""
    publish: PublishSettings = PublishSettings()
    """Weights to the engines."""
    verify: VerifySettings = VerifySettings()
    """Proof that engines and exported models compute what was trained."""
    offload: OffloadSettings = OffloadSettings()
    """Offload to disk."""
    placement: PlacementSettings = PlacementSettings()
    """Roles to devices."""
    cluster: ClusterSettings = ClusterSettings()
    """Ray."""
    deadlines: DeadlineSettings = DeadlineSettings()
    """Deadlines of the calls to workers."""
    recovery: RecoverySettings = RecoverySettings()
    """Recovery from faults."""
    checkpoint: CheckpointSettings = CheckpointSettings()
    """Checkpoints."""

    @model_validator(mode="after")
    def _has_demonstrations(self) -> Self:
        if self.ppo and self.ppo.ptx and self.ppo.ptx.data is None and self.sft is None:
            raise ValueError("ppo.ptx.data: missing; without a section sft there are no demonstrations to take")
        return self

    @model_validator(mode="after")
    def _can_share(self) -> Self:
        if len(self.share) == 1:
            raise ValueError(f"share: {self.share[0]} alone shares nothing; name two roles or more, or none")
        if twice := [role for role in self.share if self.share.count(role) > 1]:
            raise ValueError(f"share: {twice[0]} stands more than once")
        if self.share and self.model.lora is None:
            raise ValueError("share: needs model.lora, which is none: only a base that no role trains serves several")
        if "critic" in self.share and self.model.lora and self.model.lora.dora:
            raise ValueError(
                "share: critic is among them and model.lora.dora is true, but DoRA would measure the base's weights, not those "
                "that the reward model's adapter makes of them; leave one of the two out"
            )
        return self

    @model_validator(mode="after")
    def _adapter_can_be_served(self) -> Self:
        if self.publish.lora == "adapter" and (reason := self._why_merged()):
            raise ValueError(f"publish.lora: was 'adapter', but {reason}; merged would fit")
        return self

    def _why_merged(self) -> str | None:
        """What keeps engines from serving this model's adapter beside the weights that they were started with."""
        lora = self.model.lora
        if lora is None:
            return "model.lora is none, so that there is no adapter"
        if lora.dora:
            return "vLLM serves no DoRA adapters (model.lora.dora)"
        if lora.rank > MAX_SERVED_RANK:
            return f"vLLM serves adapters of rank {MAX_SERVED_RANK} at most, and model.lora.rank is {lora.rank}"
        if self.model.quantize:
            return f"the engines' own weights are not those that model.quantize={self.model.quantize} makes"
        return None

    def gap_bound(self, model: ModelSettings) -> float:
        """Largest mean |difference| between log-probabilities of the trainer's model and of an engine or an exported folder."""
        return self.verify.bfloat16 if model.dtype == "bfloat16" else self.verify.float32

    def strategy_of(self, role: Role) -> Strategy:
        return self.strategies.get(role, self.strategy)

    def learners(self) -> Iterator[tuple[Role, str, ModelSettings]]:
        """Roles that learn in some stage, and the model that each starts from: its settings' path and its settings."""
        if self.sft or self.ppo:
            yield "actor", "model", self.model
        if self.ppo and self.ppo.critic:
            yield "critic", "model", self.model
        if self.rm:
            yield ("reward", "rm.model", self.rm.model) if self.rm.model else ("reward", "model", self.model)

    @model_validator(mode="after")
    def _offered(self) -> Self:
        for role, path, model in self.learners():
            strategy = self.strategy_of(role)
            if model.optimizer_dtype == "bfloat16" and strategy != "auto" and not ZERO[strategy].bfloat16_optimizer:
                names = ", ".join(name for name, zero in ZERO.items() if zero.bfloat16_optimizer)
                raise ValueError(
                    f"{path}.optimizer_dtype: was 'bfloat16', which {strategy} of the {role} does not offer; {names} do"
                )
        if self.offload.nvme_path is None and "zero3_nvme" in (self.strategy, *self.strategies.values()):
            raise ValueError("offload.nvme_path: was none; zero3_nvme needs a folder on a fast disk of every node")
        return self
