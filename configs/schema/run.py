"""All settings of a run, and the rules that hold between its sections."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from configs.annotations import Called
from configs.schema.base import MAX_SERVED_RANK, FilePath, Role, Settings, Shared
from configs.schema.infra import (
    CheckpointSettings,
    ClusterSettings,
    DeadlineSettings,
    OffloadSettings,
    PlacementSettings,
    PublishSettings,
    RecoverySettings,
    RolloutSettings,
    VerifySettings,
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
