"""The reinforcement-learning stage."""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, field_validator, model_validator

from configs.schema.advantages import AnswerAdvantageSettings, GAEAdvantage, ReinforceAdvantage
from configs.schema.base import Fraction, Overlong, Settings
from configs.schema.data import DatasetSettings
from configs.schema.evaluation import EVALUATION_METRICS, EvaluationSettings
from configs.schema.kl import AdaptiveKL, KLSettings
from configs.schema.losses import PPOClipLoss, ReinforceLoss
from configs.schema.rewards import ModelReward, Reward
from configs.schema.training import OptimizerSettings


class PretrainingMix(Settings):
    """PPO-ptx: a language-modelling loss added to the policy loss (Ouyang et al. 2022)."""

    coefficient: PositiveFloat
    """Weight of the loss on the demonstrations."""
    batch_size: PositiveInt = 32
    """Demonstrations in each optimizer step, over all ranks."""
    data: DatasetSettings | None = None
    """Demonstrations; none: the rows of `sft.train`."""


REWARD_METRICS = ("mean", "std")
"""Last parts of PPO's metrics `reward/...`; no reward source may have such a name."""


class AnswerLogSettings(Settings):
    """Training responses saved for reading, in samples/ppo.jsonl of the run's folder."""

    every: PositiveInt = 10
    """Steps between saved steps; the first and the last step are always saved."""
    answers: PositiveInt = 8
    """Responses saved of such a step, drawn at random."""
    most_mib: PositiveInt = 64
    """Largest size of the file in MiB; beyond it the oldest steps are dropped."""


class PPOSettings(Settings):
    """Proximal policy optimization (Schulman et al. 2017) on the reward, with a KL penalty."""

    prompts: DatasetSettings
    """Training prompts."""
    steps: PositiveInt
    """Rollout-and-train steps."""
    prompts_per_step: PositiveInt = 64
    """Prompts in one step."""
    samples_per_prompt: PositiveInt = 1
    """Responses to each prompt."""
    epochs: PositiveInt = 1
    """Passes over a step's samples, with the same mini-batches in each."""
    mini_batches: PositiveInt = 1
    """Optimizer steps in one pass. Their sizes differ by at most one sample. Fewer, if too few samples have a score."""
    micro_batch_tokens: PositiveInt = 4096
    """Tokens, padding included, in one forward pass of one rank."""
    max_prompt_tokens: PositiveInt = 256
    """Longest prompt in tokens."""
    overlong: Overlong = "refuse"
    """Prompts longer than max_prompt_tokens. refuse: the run does not start. drop: they are not used. cut: their text is cut on
    the left; a conversation loses its oldest turns first and keeps the template's headers."""
    rewards: Annotated[list[Reward], Field(min_length=1)] = [ModelReward()]
    """Reward sources; the reward is their weighted sum."""
    max_unscored: Fraction = 0.1
    """Largest share of a step's samples without a score; above it the run stops. Samples without a score are not trained on."""
    kl: KLSettings = KLSettings()
    """KL penalty to the reference."""
    loss: Annotated[PPOClipLoss | ReinforceLoss, Field(discriminator="kind")] = PPOClipLoss()
    """Policy loss: one of these kinds, or a plugin's. The kind alone means its defaults."""
    value_loss: str = "clipped"
    """Name of a registered value loss: clipped, mse."""
    critic: bool = True
    """Train a critic too. Without one the settings of its training are ignored: critic_optimizer,
    critic_warmup, value_loss, value_clip_range."""
    advantage: Annotated[GAEAdvantage | ReinforceAdvantage, Field(discriminator="kind")] = GAEAdvantage()
    """Advantages: gae, which needs the critic, reinforce, or a plugin's, per token or per response. A kind alone means its
    defaults. If critic is false, the default is reinforce."""
    gamma: Fraction = 1.0
    """Discount per token."""
    gae_lambda: Fraction = 0.95
    """Lambda of generalised advantage estimation (Schulman et al. 2016), the estimator gae."""
    value_clip_range: PositiveFloat = 0.2
    """Half-width of the clip on the change of a value."""
    entropy_coefficient: NonNegativeFloat = 0.0
    """Weight of the entropy bonus."""
    whiten_advantages: bool = True
    """Normalize the advantages of a step to mean 0 and standard deviation 1 over its tokens. Advantages per response are not
    normalized unless this is set to true."""
    whiten_rewards: bool = False
    """Normalize the scores of a step to mean 0 and standard deviation 1."""
    reward_clip: PositiveFloat | None = None
    """Clip scores to [-clip, clip]; none: no clipping."""
    missing_eos_penalty: NonNegativeFloat = 0.0
    """Subtracted from the score of a response without an end-of-sequence token."""
    target_kl: PositiveFloat | None = None
    """Skip a step's remaining updates once the mean KL between the sampling policy and the current one exceeds this; none:
    never."""
    max_kl_per_step: PositiveFloat = 10.0
    """Largest mean KL to the reference, in nats per token. A step with a larger KL, or one that is not a number, trains neither
    actor nor critic."""
    critic_warmup: Annotated[int, Field(ge=0)] = 0
    """Number of first steps that train only the critic; fewer than `steps`."""
    ptx: PretrainingMix | None = None
    """Pretraining-loss mix."""
    max_logprob_mismatch: PositiveFloat | None = None
    """Largest mean |difference| between the engine's and the trainer's log-probabilities of a step's responses; beyond it the run
    stops. none: the bound in `verify` for the model's dtype."""
    actor_optimizer: OptimizerSettings
    """AdamW of the actor."""
    critic_optimizer: OptimizerSettings | None = None
    """AdamW of the critic; required where `critic` is true."""
    evaluation: EvaluationSettings | None = None
    """Evaluation on held-out prompts."""
    answer_log: AnswerLogSettings | None = AnswerLogSettings()
    """Training responses saved for reading; none: no responses are saved."""

    @property
    def sequences_per_step(self) -> int:
        return self.prompts_per_step * self.samples_per_prompt

    @property
    def warmup_steps(self) -> int:
        """Number of steps before the actor is trained."""
        return self.critic_warmup if self.critic else 0

    def longest_scoring(self, responses: int) -> float:
        """Most seconds that functions, services and judges may take for `responses` responses, by their own timeouts."""
        judges = self.evaluation.judges if self.evaluation else []
        timed = [source for source in (*self.rewards, *judges) if not isinstance(source, ModelReward)]
        return sum(source.longest(responses) for source in timed)

    @field_validator("loss", "advantage", mode="before")
    @classmethod
    def _in_full(cls, value: Any) -> Any:
        """A kind that is named alone."""
        return {"kind": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.mini_batches > self.sequences_per_step:
            raise ValueError(
                f"mini_batches: was {self.mini_batches}, but a step has {self.sequences_per_step} sequences (prompts_per_step "
                f"{self.prompts_per_step} x samples_per_prompt {self.samples_per_prompt}); that many or fewer would fit"
            )
        return self

    @model_validator(mode="after")
    def _with_critic(self) -> Self:
        if not self.critic:
            if "advantage" not in self.model_fields_set:
                self.advantage = ReinforceAdvantage()
            if isinstance(self.advantage, GAEAdvantage):
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
    def _per_answer(self) -> Self:
        if not isinstance(self.advantage, AnswerAdvantageSettings):
            return self
        if self.critic:
            raise ValueError(
                "critic: was true, but an advantage per response uses no values; false would fit, or advantage gae"
            )
        if self.kl.apply_to == "reward" and self.kl.controller.coefficient:
            raise ValueError(
                "kl.apply_to: was reward, but an advantage per response does not include the KL penalty of each token; "
                "kl={apply_to: loss, estimator: k3} would fit, or kl.controller.coefficient 0"
            )
        if "whiten_advantages" not in self.model_fields_set:
            self.whiten_advantages = False
        return self

    @model_validator(mode="after")
    def _learns(self) -> Self:
        updates = self.epochs * self.mini_batches
        if isinstance(self.loss, ReinforceLoss) and updates > 1:
            raise ValueError(
                f"loss: was reinforce, which is correct for one update per step only, but epochs ({self.epochs}) x "
                f"mini_batches ({self.mini_batches}) make {updates}; epochs 1 and mini_batches 1 would fit, or ppo_clip"
            )
        if all(source.weight == 0 for source in self.rewards):
            raise ValueError(
                "rewards: every weight is 0, so there is no reward; at least one weight must differ from 0"
            )
        if self.whiten_rewards and self.sequences_per_step == 1:
            raise ValueError(
                "whiten_rewards: was true, but a step has 1 sequence, whose whitened score is always 0; more "
                "prompts_per_step would fit, or false"
            )
        control = self.kl.controller
        if isinstance(control, AdaptiveKL) and self.max_kl_per_step <= control.target:
            raise ValueError(
                f"max_kl_per_step: was {self.max_kl_per_step:g}, and kl.controller.target is {control.target:g}: a step at its "
                "target would not change the actor; a larger one would fit"
            )
        return self

    @model_validator(mode="after")
    def _names(self) -> Self:
        judges = self.evaluation.judges if self.evaluation else []
        rewards = [source.name for source in self.rewards]
        names = rewards + [judge.name for judge in judges]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(
                    f"rewards: the name {name} is used more than once; each reward and judge needs its own"
                )
        for setting, own, reserved in (
            ("rewards", rewards, {*REWARD_METRICS, *(f"{name}_std" for name in rewards)}),
            ("evaluation.judges", [judge.name for judge in judges], set(EVALUATION_METRICS)),
        ):
            if clashes := [name for name in own if name in reserved]:
                raise ValueError(f"{setting}: the name {clashes[0]} is the name of a metric; choose another")
        return self
