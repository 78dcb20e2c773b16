"""A layout: the stage's roles parted into groups, each with its devices. Presets are partitions like any other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from configs.schema import PlacementSettings, Role, RunConfig, Strategy
from configs.zero import ZERO
from placement.cluster.bin_packing import Packing, Request
from placement.types import TRAINED, Device, Problem, Stage

PRESETS: dict[str, tuple[tuple[Role, ...], ...]] = {
    "separate": (("actor",), ("critic",), ("reference",), ("reward",), ("rollout",)),
    "paired": (("actor", "reference"), ("critic", "reward"), ("rollout",)),
    "colocated": (("actor", "critic", "reference", "reward", "rollout"),),
}


@dataclass(frozen=True)
class GroupSpec:
    """One group of roles and its devices; `setting` is the path that says so."""

    roles: tuple[Role, ...]
    devices: int
    packing: Packing
    setting: str
    tensor_parallel: int = 1

    @property
    def name(self) -> str:
        return "+".join(self.roles)

    @property
    def devices_per_bundle(self) -> int:
        """A bundle lies on one node: an engine of a group for rollout alone takes one whole, so none crosses nodes."""
        return self.tensor_parallel if self.roles == ("rollout",) else 1

    @property
    def engines_fit(self) -> bool:
        """On GPUs an engine of several devices needs them for itself: a share of a bundle is at most one GPU."""
        return self.tensor_parallel == 1 or (self.roles == ("rollout",) and self.devices % self.tensor_parallel == 0)

    def ranks(self, role: Role) -> int:
        return self.devices // self.tensor_parallel if role == "rollout" else self.devices

    def request(self, device: Device, cpus_per_device: float) -> Request:
        bundle = {"CPU": round(cpus_per_device * self.devices_per_bundle, 4)}
        if device == "cuda":
            bundle["GPU"] = float(self.devices_per_bundle)
        return Request(bundle, self.devices // self.devices_per_bundle, self.packing)


def roles_of(config: RunConfig, stage: Stage) -> tuple[Role, ...]:
    """The roles that a stage needs."""
    if stage != "ppo":
        return ("actor",) if stage == "sft" else ("reward",)
    assert config.ppo is not None
    critic: tuple[Role, ...] = ("critic",) if config.ppo.critic else ()
    return ("actor", *critic, "reference", "reward", "rollout")


def roles_by_process(config: RunConfig, roles: tuple[Role, ...]) -> list[tuple[Role, ...]]:
    """The roles of each process of a rank: those of `share` together, every other one alone."""
    run_concurrently = tuple(role for role in roles if role in config.share)
    alone: list[tuple[Role, ...]] = [(role,) for role in roles if role not in config.share]
    return [run_concurrently, *alone] if run_concurrently else alone


def strategy_in(stage: Stage, role: Role, config: RunConfig) -> Strategy | None:
    """How a role is sharded. A frozen one has parameters only, and only the reference's can be sharded."""
    if role == "rollout":
        return None
    strategy = config.strategy_of(role)
    sharded = role in TRAINED[stage] or (role == "reference" and ZERO[strategy].stage == 3)
    return strategy if sharded else "ddp"


def partition(
    placement: PlacementSettings, roles: tuple[Role, ...], processes: Sequence[tuple[Role, ...]] = ()
) -> tuple[list[GroupSpec], list[Problem]]:
    """The groups of the roles that the stage needs, and what is wrong with them."""
    if placement.groups is None:
        return preset(placement, placement.layout, roles, processes), []
    problems = []
    shares = [
        GroupSpec(kept, group.devices, group.packing, f"placement.groups.{index}")
        for index, group in enumerate(placement.groups)
        if (kept := tuple(role for role in roles if role in group.roles))
    ]
    for process_roles in processes:
        places = [share for share in shares if set(process_roles) & set(share.roles)]
        if len(places) > 1:
            named = ", ".join(
                f"{share.setting} holds {', '.join(r for r in share.roles if r in process_roles)}" for share in places
            )
            problems.append(
                Problem("share", f"{', '.join(process_roles)} live in one process, so in one group, but {named}")
            )
    missing = [role for role in roles if not any(role in share.roles for share in shares)]
    if missing:
        text = f"no group holds {', '.join(missing)}; the stage needs each of {', '.join(roles)} in one group"
        problems.append(Problem("placement.groups", text))
    if placement.devices:
        named = ", ".join(placement.devices)
        text = f"names {named}, which `placement.groups` overrides; give each group its `devices` instead"
        problems.append(Problem("placement.devices", text))
    return shares, problems


def preset(
    placement: PlacementSettings, layout: str, roles: tuple[Role, ...], processes: Sequence[tuple[Role, ...]] = ()
) -> list[GroupSpec]:
    """A preset's groups, those joined that hold roles of one process; a group has as many devices as its largest role."""
    groups = [set(group) & set(roles) for group in PRESETS[layout]]
    for process_roles in processes:
        joined = set[Role]().union(*(group for group in groups if group & set(process_roles)))
        groups = [joined if group & set(process_roles) else group for group in groups]
    kept = dict.fromkeys(tuple(role for role in roles if role in group) for group in groups if group)
    return [GroupSpec(group, _devices(placement, group), "PACK", _setting(placement, group)) for group in kept]


def with_engines(shares: list[GroupSpec], size: int) -> list[GroupSpec]:
    """The same groups, where the one that holds rollout knows the engines' tensor parallel size."""
    return [replace(share, tensor_parallel=size) if "rollout" in share.roles else share for share in shares]


def capped(shares: list[GroupSpec], most: int) -> list[GroupSpec]:
    """The same groups with at most so many devices each (an engine keeps all of its own)."""

    def devices(share: GroupSpec) -> int:
        return min(share.devices, max(1, most // share.tensor_parallel) * share.tensor_parallel)

    return [replace(share, devices=devices(share)) for share in shares]


def _devices(placement: PlacementSettings, roles: tuple[Role, ...]) -> int:
    return max(placement.devices.get(role, 1) for role in roles)


def _setting(placement: PlacementSettings, roles: tuple[Role, ...]) -> str:
    largest = [role for role in roles if placement.devices.get(role) == _devices(placement, roles)]
    return f"placement.devices.{largest[0]}" if largest else "placement.layout"
