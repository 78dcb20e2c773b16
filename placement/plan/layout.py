"""A layout: a partition of the stage's roles into groups with devices. Presets are partitions like any other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from configs import ZERO
from configs.schema import ModelReward, PlacementSettings, Role, RunConfig, Strategy
from placement.cluster.bin_packing import Packing, Request
from placement.stages import STAGES
from placement.types import Device, Problem, Stage

PRESETS: dict[str, tuple[tuple[Role, ...], ...]] = {
    "separate": (("actor",), ("critic",), ("reference",), ("reward",), ("rollout",)),
    "paired": (("actor", "reference"), ("critic", "reward"), ("rollout",)),
    "colocated": (("actor", "critic", "reference", "reward", "rollout"),),
}


@dataclass(frozen=True)
class GroupSpec:
    """One group of roles and its devices; `setting` is the dotted path that defines it."""

    roles: tuple[Role, ...]
    devices: int
    packing: Packing
    setting: str
    tensor_parallel: int = 1
    needs_gpu: bool = True

    @property
    def name(self) -> str:
        return "+".join(self.roles)

    @property
    def devices_per_bundle(self) -> int:
        """A bundle is on one node. In a group of rollout alone a bundle holds a whole engine, so no engine spans nodes."""
        return self.tensor_parallel if self.roles == ("rollout",) else 1

    @property
    def engines_fit(self) -> bool:
        """On GPUs an engine of several devices cannot share them: a worker gets a share of one GPU at most."""
        return self.tensor_parallel == 1 or (self.roles == ("rollout",) and self.devices % self.tensor_parallel == 0)

    def ranks(self, role: Role) -> int:
        return self.devices // self.tensor_parallel if role == "rollout" else self.devices

    def request(self, device: Device, cpus_per_device: float) -> Request:
        bundle = {"CPU": round(cpus_per_device * self.devices_per_bundle, 4)}
        if device == "cuda" and self.needs_gpu:
            bundle["GPU"] = float(self.devices_per_bundle)
        return Request(bundle, self.devices // self.devices_per_bundle, self.packing)


def roles_of(config: RunConfig, stage: Stage) -> tuple[Role, ...]:
    """The roles that a stage asks for."""
    return STAGES[stage].roles(config)


def roles_by_process(config: RunConfig, roles: tuple[Role, ...]) -> list[tuple[Role, ...]]:
    """The roles of each process of a rank: one process for all roles of `shared_base`, one for every other role."""
    sharing = tuple(role for role in roles if role in config.shared_base)
    alone: list[tuple[Role, ...]] = [(role,) for role in roles if role not in config.shared_base]
    return [sharing, *alone] if sharing else alone


def needs_gpu(spec: GroupSpec, stage: Stage, config: RunConfig) -> bool:
    """Whether a group asks for GPUs, in a run on GPUs. The reward role alone does not if no reward is a model."""
    frozen_reward = spec.roles == ("reward",) and "reward" not in STAGES[stage].trained
    return not (frozen_reward and config.ppo and not any(isinstance(r, ModelReward) for r in config.ppo.rewards))


def strategy_in(stage: Stage, role: Role, config: RunConfig) -> Strategy | None:
    """How a role is sharded. A frozen role has parameters only, and only the reference can shard them."""
    if role == "rollout":
        return None
    strategy = config.strategy_of(role)
    sharded = role in STAGES[stage].trained or (role == "reference" and ZERO[strategy].stage == 3)
    return strategy if sharded else "ddp"


def partition(
    placement: PlacementSettings, roles: tuple[Role, ...], processes: Sequence[tuple[Role, ...]] = ()
) -> tuple[list[GroupSpec], list[Problem]]:
    """The groups of the roles that the stage needs, and the problems of the partition."""
    if placement.groups is None:
        return preset(placement, placement.layout, roles, processes), []
    problems = []
    specs = [
        GroupSpec(needed, group.devices, group.packing, f"placement.groups.{index}")
        for index, group in enumerate(placement.groups)
        if (needed := tuple(role for role in roles if role in group.roles))
    ]
    for process_roles in processes:
        holders = [spec for spec in specs if set(process_roles) & set(spec.roles)]
        if len(holders) > 1:
            parts = ", ".join(
                f"{spec.setting} holds {', '.join(r for r in spec.roles if r in process_roles)}" for spec in holders
            )
            text = f"{', '.join(process_roles)} are in one process and must be in one group, but {parts}"
            problems.append(Problem("shared_base", text))
    missing = [role for role in roles if not any(role in spec.roles for spec in specs)]
    if missing:
        text = f"no group holds {', '.join(missing)}; the stage needs each of {', '.join(roles)} in one group"
        problems.append(Problem("placement.groups", text))
    if placement.devices:
        ignored = ", ".join(placement.devices)
        text = f"was set for {ignored}, but `placement.groups` overrides it; set `devices` of each group instead"
        problems.append(Problem("placement.devices", text))
    return specs, problems


def preset(
    placement: PlacementSettings, layout: str, roles: tuple[Role, ...], processes: Sequence[tuple[Role, ...]] = ()
) -> list[GroupSpec]:
    """A preset's groups. Groups that hold roles of one process are joined; a group has the devices of its largest role."""
    groups = [set(group) & set(roles) for group in PRESETS[layout]]
    for process_roles in processes:
        joined = set[Role]().union(*(group for group in groups if group & set(process_roles)))
        groups = [joined if group & set(process_roles) else group for group in groups]
    ordered = dict.fromkeys(tuple(role for role in roles if role in group) for group in groups if group)
    return [GroupSpec(group, _devices(placement, group), "PACK", _setting(placement, group)) for group in ordered]


def with_engines(specs: list[GroupSpec], size: int) -> list[GroupSpec]:
    """The same groups; the group that holds rollout gets the engines' tensor parallel size."""
    return [replace(spec, tensor_parallel=size) if "rollout" in spec.roles else spec for spec in specs]


def capped(specs: list[GroupSpec], most: int) -> list[GroupSpec]:
    """The same groups with at most `most` devices each, and never fewer than one whole engine."""

    def devices(spec: GroupSpec) -> int:
        return min(spec.devices, max(1, most // spec.tensor_parallel) * spec.tensor_parallel)

    return [replace(spec, devices=devices(spec)) for spec in specs]


def _devices(placement: PlacementSettings, roles: tuple[Role, ...]) -> int:
    return max(placement.devices.get(role, 1) for role in roles)


def _setting(placement: PlacementSettings, roles: tuple[Role, ...]) -> str:
    largest = [role for role in roles if placement.devices.get(role) == _devices(placement, roles)]
    return f"placement.devices.{largest[0]}" if largest else "placement.layout"
