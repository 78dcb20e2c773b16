"""The types of a plan: groups of bundles, roles on them, batch arithmetic; and the problems where no plan is possible."""

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
Stage = str
"""A name in placement.stages.STAGES."""
Device = Literal["cpu", "cuda"]


class Problem(NamedTuple):
    """Why no plan is possible: the setting's dotted path, and what is wrong and what would fit."""

    setting: str
    text: str


class PlanError(ValueError):
    """A stage cannot be placed. `problems` lists every reason."""

    def __init__(self, stage: Stage, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        lines = "".join(f"\n  {problem.setting}: {problem.text}" for problem in problems)
        super().__init__(f"stage {stage} cannot be placed:{lines}")


@dataclass(frozen=True)
class GroupPlan:
    """One placement group: equal `bundles`, placed by the policy `packing`; `nodes` has the expected node of each bundle."""

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
        ranks: number of workers; for rollout, of engines.
        devices_per_rank: tensor parallel size of an engine; 1 for all others.
        threads: CPU threads of each process of a worker (an engine has one process for each of its devices).
        cpus, gpus: the part of its bundle that each worker requests.
        strategy: how the states are sharded over the ranks; none for rollout.
        process_roles: the roles that its processes serve, itself included; each process requests the sum of their parts.
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
    """Rows of a step. In the supervised stages `prompts` are the rows (pairs) of an optimizer step."""

    prompts: int
    samples: int
    mini_batches: int
    epochs: float
    per_rank: dict[Role, int]
    """Trained role -> most rows of one optimizer step on one of its ranks."""
    description: tuple[str, ...] = field(repr=False)
    """The same as sentences."""

    @property
    def sequences(self) -> int:
        return self.prompts * self.samples


@dataclass(frozen=True)
class Plan:
    """Where each role of one stage runs. Groups partition the roles; every bundle fits."""

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
    """How weights reach the engines: `weight_sync.transport`, or what `auto` becomes where the stage has engines."""
    transport = config.weight_sync.transport
    if transport != "auto" or "rollout" not in plan.roles:
        return transport
    if plan.device == "cpu":
        return "object_store"
    return "ipc" if plan.roles["actor"].group == plan.roles["rollout"].group else "nccl"
