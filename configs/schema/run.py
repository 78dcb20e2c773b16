"""All settings of a run, and the rules between its sections."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from configs.annotations import DisplayName
from configs.schema.base import MAX_SERVED_RANK, FilePath, Role, Settings, Shared
from configs.schema.infra import (
    CheckpointSettings,
    ClusterSettings,
    DeadlineSettings,
    LoggerSettings,
    OffloadSettings,
    PlacementSettings,
    RayMetricsSettings,
    RecoverySettings,
    RolloutSettings,
    TensorBoardSettings,
    VerifySettings,
    WeightSyncSettings,
)
from configs.schema.model import ModelSettings
from configs.schema.rl import PPOSettings
from configs.schema.training import RewardModelSettings, SFTSettings
from configs.zero import ZERO, Strategy


class RunConfig(Settings):
    """All settings of a run."""

    name: Annotated[
        str,
        Field(pattern=r"^\w[\w.-]{0,62}$"),
        DisplayName("1 to 63 letters, digits, _ . and -, not starting with . or -"),
    ]
    """Name of the run and of its folder."""
    runs: FilePath = "runs"
    """Folder for the folders of all runs."""
    start_from: FilePath | None = None
    """Folder of another run. Its finished models are used where this run does not train its own: the SFT model for rm and ppo,
    the reward model for ppo; also models that it took from a third run. `model.path`, `model.end_tokens`, `chat_template`,
    `chat_template_args` and `system_prompt` must be the same as in that run."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 1
    """Seed of all random numbers."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda where the cluster has GPUs."""
    strategy: Strategy = "ddp"
    """States that are sharded over a role's ranks. ddp: none; zero1: optimizer states; zero2: gradients too; zero3: parameters
    too. _offload: optimizer states, and with zero3 parameters, in host memory; zero3_nvme: optimizer states on disk, in
    `offload.nvme_path`. auto: the fastest that fits by predicted memory."""
    strategies: dict[Role, Strategy] = {}
    """Strategies of single roles, instead of `strategy`."""
    shared_base: list[Shared] = []
    """PPO roles that share one frozen base in one process of each rank, each with its own adapters and head: actor, critic,
    reference, reward. Needs `model.lora`; results are the same as without sharing."""
    model: ModelSettings
    """The starting model."""
    plugins: list[str] = []
    """Modules to import in every process. The settings can select the components that they register (losses, advantages)."""
    chat_template: bool = False
    """Apply the tokenizer's chat template to text prompts. It is always applied to prompts of messages."""
    chat_template_args: dict[str, bool | int | str] = {}
    """Additional variables for the chat template, such as `enable_thinking: false`."""
    system_prompt: str | None = None
    """System message for conversations without one."""
    sft: SFTSettings | None = None
    """Stage 1."""
    rm: RewardModelSettings | None = None
    """Stage 2."""
    ppo: PPOSettings | None = None
    """Stage 3."""
    rollout: RolloutSettings = RolloutSettings()
    """vLLM engines."""
    weight_sync: WeightSyncSettings = WeightSyncSettings()
    """Sending weights to the engines."""
    verify: VerifySettings = VerifySettings()
    """Checks that engines and exported models compute the same as the trainer."""
    offload: OffloadSettings = OffloadSettings()
    """Offload to disk."""
    placement: PlacementSettings = PlacementSettings()
    """Placement of roles on devices."""
    cluster: ClusterSettings = ClusterSettings()
    """Ray cluster."""
    deadlines: DeadlineSettings = DeadlineSettings()
    """Deadlines of calls to workers."""
    recovery: RecoverySettings = RecoverySettings()
    """Recovery from faults."""
    checkpoint: CheckpointSettings = CheckpointSettings()
    """Checkpoints."""
    loggers: list[Annotated[LoggerSettings, Field(discriminator="kind")]] = [
        TensorBoardSettings(),
        RayMetricsSettings(),
    ]
    """Loggers besides metrics.jsonl and the progress line in the terminal, which are always written. The first error of a logger
    is a warning, and the run continues."""

    @model_validator(mode="after")
    def _has_demonstrations(self) -> Self:
        if self.ppo and self.ppo.ptx and self.ppo.ptx.data is None and self.sft is None:
            raise ValueError("ppo.ptx.data: missing; without a section sft there are no demonstrations to use")
        return self

    @model_validator(mode="after")
    def _logs_once(self) -> Self:
        if twice := [logger for logger in self.loggers if self.loggers.count(logger) > 1]:
            raise ValueError(f"loggers: {twice[0].kind} is listed more than once with the same settings")
        return self

    @model_validator(mode="after")
    def _can_share(self) -> Self:
        if len(self.shared_base) == 1:
            raise ValueError(
                f"shared_base: {self.shared_base[0]} alone shares nothing; name two roles or more, or none"
            )
        if twice := [role for role in self.shared_base if self.shared_base.count(role) > 1]:
            raise ValueError(f"shared_base: {twice[0]} is listed more than once")
        if self.shared_base and self.model.lora is None:
            raise ValueError(
                "shared_base: needs model.lora, which is none: roles can share a base only if none of them trains it"
            )
        if "critic" in self.shared_base and self.model.lora and self.model.lora.dora:
            raise ValueError(
                "shared_base: includes critic and model.lora.dora is true, but DoRA would normalize by the base's "
                "weights, without the reward model's adapter; remove one of the two"
            )
        return self

    @model_validator(mode="after")
    def _adapter_can_be_served(self) -> Self:
        if self.weight_sync.lora == "adapter" and (reason := self._why_merged()):
            raise ValueError(f"weight_sync.lora: was 'adapter', but {reason}; merged would fit")
        return self

    def _why_merged(self) -> str | None:
        """Why engines cannot serve this model's adapter beside the weights that they started with; None where they can."""
        lora = self.model.lora
        if lora is None:
            return "model.lora is none, so there is no adapter"
        if lora.dora:
            return "vLLM serves no DoRA adapters (model.lora.dora)"
        if lora.rank > MAX_SERVED_RANK:
            return f"vLLM serves adapters up to rank {MAX_SERVED_RANK}, and model.lora.rank is {lora.rank}"
        if self.model.quantize:
            return (
                f"the engines' weights differ from the trainer's, which model.quantize={self.model.quantize} quantizes"
            )
        return None

    def gap_bound(self, model: ModelSettings) -> float:
        """Largest mean |difference| of log-probabilities between the trainer's model and an engine or exported folder."""
        return self.verify.bfloat16 if model.dtype == "bfloat16" else self.verify.float32

    def section(self, stage: str) -> Any:
        """The settings of a stage; None where the run does not describe it."""
        return getattr(self, stage, None)

    def strategy_of(self, role: Role) -> Strategy:
        return self.strategies.get(role, self.strategy)

    def trained_models(self) -> Iterator[tuple[Role, str, ModelSettings]]:
        """Roles that some stage trains; for each the settings of its starting model, and their dotted path."""
        if self.sft or self.ppo:
            yield "actor", "model", self.model
        if self.ppo and self.ppo.critic:
            yield "critic", "model", self.model
        if self.rm:
            yield ("reward", "rm.model", self.rm.model) if self.rm.model else ("reward", "model", self.model)

    @model_validator(mode="after")
    def _offered(self) -> Self:
        for role, path, model in self.trained_models():
            strategy = self.strategy_of(role)
            if model.optimizer_dtype == "bfloat16" and strategy != "auto" and not ZERO[strategy].bfloat16_optimizer:
                names = ", ".join(name for name, zero in ZERO.items() if zero.bfloat16_optimizer)
                raise ValueError(
                    f"{path}.optimizer_dtype: was 'bfloat16', which {strategy} of the {role} does not support; {names} do"
                )
        if self.offload.nvme_path is None and "zero3_nvme" in (self.strategy, *self.strategies.values()):
            raise ValueError("offload.nvme_path: was none; zero3_nvme needs a folder on a fast disk of every node")
        return self
