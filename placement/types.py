"""What a plan is: groups of bundles, roles on them, the batch arithmetic; and what is said where there can be none."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from configs.schema import Role, RunConfig, Strategy
from placement.cluster.bin_packing import Packing
from placement.cluster.spec import Cluster

GIB = 2**30
MIB = 2**20
Stage = Literal["sft", "rm", "ppo"]
Device = Literal["cpu", "cuda"]

PHASES: dict[Stage, tuple[tuple[Role, ...], ...]] = {
    "sft": (("actor",),),
    "rm": (("reward",),),
    "ppo": (("rollout",), ("reference", "critic", "reward"), ("actor", "critic")),
}
"""Which roles run at the same time. The phases take turns; so do the roles of one group within a phase."""

TRAINED: dict[Stage, tuple[Role, ...]] = {"sft": ("actor",), "rm": ("reward",), "ppo": ("actor", "critic")}


class Problem(NamedTuple):
    """Why a plan cannot be: the setting's dotted path, and what is wrong and what would fit."""

    setting: str
    text: str


class PlanError(ValueError):
    """A stage cannot be placed. `problems` lists everything that is wrong."""

    def __init__(self, stage: Stage, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        lines = "".join(f"\n  {problem.setting}: {problem.text}" for problem in problems)
        super().__init__(f"stage {stage} cannot be placed:{lines}")


@dataclass(frozen=True)
class GroupPlan:
    """One placement group: `bundles` alike, laid by `packing`; `nodes` is where each would lie."""

    name: str
    roles: tuple[Role, ...]
    bundles: tuple[dict[str, float], ...]
    packing: Packing
    nodes: tuple[str, ...]
    devices_per_bundle: int = 1


@dataclass(frozen=True)
class RolePlan:
    """One role's workers.

    Attributes:
        ranks: workers; for rollout, engines.
        devices_per_rank: tensor parallel size of an engine; 1 for all others.
        threads: CPU threads of each process of a worker (an engine has one for each of its devices).
        cpus, gpus: what each worker asks for of its bundle.
        strategy: how the states are sharded over the ranks; none for rollout.
        crew: the roles that its processes serve, itself among them; each process asks for what all of them ask for.
    """

    role: Role
    group: str
    ranks: int
    devices_per_rank: int
    threads: int
    cpus: float
    gpus: float
    strategy: Strategy | None
    process_roles: tuple[Role, ...]


@dataclass(frozen=True)
class BatchPlan:
    """Rows of a step. Of the supervised stages, `prompts` are the rows (pairs) of an optimizer step."""

    prompts: int
    samples: int
    mini_batches: int
    epochs: float
    per_rank: dict[Role, int]
    """Trained role -> rows of one optimizer step on one of its ranks, at most."""
    words: tuple[str, ...] = field(repr=False)
    """The same in sentences."""

    @property
    def sequences(self) -> int:
        return self.prompts * self.samples


@dataclass(frozen=True)
class Plan:
    """Who runs where in one stage. Groups partition the roles; every bundle fits."""

    stage: Stage
    device: Device
    cluster: Cluster
    groups: tuple[GroupPlan, ...]
    roles: dict[Role, RolePlan]
    batch: BatchPlan

    def group(self, name: str) -> GroupPlan:
        return next(group for group in self.groups if group.name == name)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return dataclasses.asdict(self)


def transport_of(config: RunConfig, plan: Plan) -> str:
    """How weights reach the engines: what `publish.transport` says and, where there are engines, what `auto` becomes."""
    asked = config.publish.transport
    if asked != "auto" or "rollout" not in plan.roles:
        return asked
    if plan.device == "cpu":
        return "object_store"
    return "ipc" if plan.roles["actor"].group == plan.roles["rollout"].group else "nccl"
