"""A plan's memory: each role's in each phase, the sums on nodes and GPUs, what is left, and what would help where it is not.

It warns and refuses nothing: docs/memory.md says what it was checked against, and what it does not know.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from configs.schema import ROLES, LoraSettings, ModelSettings, Role, RunConfig
from placement.memory.phases import (
    PHASES,
    Phase,
    Uses,
    Work,
    adapted,
    engine,
    frozen,
    optimizer_bytes,
    received_bytes,
    sent_bytes,
    state_bytes,
    trainer,
)
from placement.memory.states import Model, Sharding, moved
from placement.memory.usage import MemoryBreakdown, MemoryUse
from placement.models.activations import Adapters
from placement.models.architecture import Architecture
from placement.models.shapes import SIZES, Shapes, least_cache, longest_row, model_settings
from placement.plan.layout import strategy_in
from placement.plan.time_sharing import time_shared
from placement.types import GIB, MIB, TRAINED, GroupPlan, Plan, Stage, transport_of

STAGE_PHASES: dict[Stage, tuple[Phase, ...]] = {
    "sft": ("load", "train", "save"),
    "rm": ("load", "train", "save"),
    "ppo": PHASES,
}
BUSY: dict[Phase, tuple[Role, ...]] = {
    "load": ROLES,
    "generate": ("rollout",),
    "score": ("reference", "critic", "reward"),
    "publish": ("actor", "rollout"),
}
"""Who works in a phase; in the others those that learn. Roles of one group take turns, but publishing takes both ends."""


@dataclass(frozen=True)
class RoleMemory:
    """Of one role: what its first rank holds, and what a snapshot takes of the first rank and of each other."""

    uses: Uses
    first_snapshot: int = 0
    other_snapshot: int = 0

    @cached_property
    def idle(self) -> MemoryUse:
        """What it holds when it does nothing."""
        return min(self.uses.values(), key=lambda use: (use.device.total, use.host.total))


@dataclass(frozen=True)
class Place:
    """A node's memory, or that of each GPU of a group: what is in it in each phase, and its size (none: unknown)."""

    name: str
    parts: dict[Phase, MemoryBreakdown]
    size: int | None

    @property
    def used(self) -> dict[Phase, int]:
        return {phase: held.total for phase, held in self.parts.items()}

    @property
    def tightest(self) -> Phase:
        return max(self.used, key=lambda phase: self.used[phase])

    @property
    def headroom(self) -> int | None:
        """Negative where it does not fit."""
        return None if self.size is None else self.size - self.used[self.tightest]

    def as_dict(self) -> dict[str, Any]:
        parts = {phase: held.parts() for phase, held in self.parts.items()}
        fields = {"name": self.name, "used": self.used, "parts": parts, "size": self.size}
        return fields | {"tightest": self.tightest, "headroom": self.headroom}


@dataclass(frozen=True)
class MemoryEstimate:
    """Predicted memory of a stage. `warnings`: what else cannot work; `advice`: what would help where it does not fit."""

    phases: tuple[Phase, ...]
    roles: dict[Role, RoleMemory]
    places: tuple[Place, ...]
    warnings: tuple[str, ...] = ()
    advice: tuple[str, ...] = ()

    @property
    def missing(self) -> int:
        """Bytes by which the places do not fit, together."""
        return sum(-place.headroom for place in self.places if place.headroom is not None and place.headroom < 0)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON; bytes."""
        roles = {role: {p: known.uses[p].as_dict() for p in self.phases} for role, known in self.roles.items()}
        return {
            "roles": roles,
            "places": [place.as_dict() for place in self.places],
            "fits": not self.missing and not self.warnings,
            "warnings": list(self.warnings),
            "advice": list(self.advice),
        }


def _model(
    shape: Architecture, settings: ModelSettings, scalar: bool, adapts: bool, on_shared_base: bool = False
) -> Model:
    adapters = _adapters(settings.lora) if adapts and settings.lora else None
    return Model(
        shape,
        SIZES[settings.dtype],
        scalar,
        adapters,
        settings.quantize if adapts else None,
        on_shared_base,
    )


def _adapters(lora: LoraSettings) -> Adapters:
    return Adapters(lora.rank, None if lora.targets == "all-linear" else frozenset(lora.targets), lora.dora)


# ---------------------------------------------------------------- roles


def estimate_memory(config: RunConfig, plan: Plan, shapes: Shapes, *, turns: bool = True) -> MemoryEstimate:
    """Predict a stage's memory where the plan puts it. turns: roles that share a GPU leave it to one another."""
    roles = {role: _role(role, config, plan, shapes, turns and time_shared(plan, role)) for role in plan.roles}
    phases = STAGE_PHASES[plan.stage]
    places = (*_hosts(config, plan, roles, shapes), *_devices(plan, roles, turns))
    return MemoryEstimate(phases, roles, places, _cache_warnings(config, plan, roles, shapes))


def _role(role: Role, config: RunConfig, plan: Plan, shapes: Shapes, turns: bool) -> RoleMemory:
    if role == "rollout":
        return RoleMemory(_engine(config, plan, shapes, turns))
    planned, settings, strategy = (
        plan.roles[role],
        model_settings(config, plan.stage),
        strategy_in(plan.stage, role, config),
    )
    assert strategy is not None
    sharding = Sharding(strategy, planned.ranks, plan.device, SIZES[settings.optimizer_dtype])
    work, on_shared_base = _work(role, config, plan), role != planned.process_roles[0]
    if role not in TRAINED[plan.stage]:
        uses = _frozen(role, settings, sharding, work, shapes, len(planned.process_roles) > 1, on_shared_base)
        model = _model(shapes.policy if role == "reference" else shapes.scalars[0], settings, role == "reward", False)
        return RoleMemory(_waiting(uses, model, sharding) if turns else uses)
    scalar = role in ("critic", "reward")
    shape = (shapes.scalars or (shapes.policy,))[0] if scalar else shapes.policy
    model = _model(shape, settings, scalar, adapts=True, on_shared_base=on_shared_base)
    published = _sent(model, sharding, config, plan) if role == "actor" and plan.stage == "ppo" else 0
    snapshots = config.recovery.snapshot_every is not None
    uses = trainer(model, sharding, work, scores=role == "critic", published=published, snapshots=snapshots)
    if turns:
        uses = _waiting(uses, model, sharding)
    if not snapshots:
        return RoleMemory(uses)
    return RoleMemory(
        uses, state_bytes(model, sharding), optimizer_bytes(model, sharding) if sharding.zero.stage else 0
    )


def _frozen(
    role: Role,
    settings: ModelSettings,
    sharding: Sharding,
    work: Work,
    shapes: Shapes,
    shares: bool,
    on_shared_base: bool,
) -> Uses:
    """A role that does not learn. Beside others on one base the reference is that base, a reward model an adapter and a head."""
    if on_shared_base:
        adapts = role == "reward"
        return adapted(_model(shapes.policy, settings, adapts, adapts, on_shared_base=True), sharding, work)
    found = [shapes.policy] if role == "reference" else shapes.scalars
    return frozen([_model(shape, settings, role == "reward", adapts=shares) for shape in found], sharding, work)


def _waiting(uses: Uses, model: Model, sharding: Sharding) -> Uses:
    """With the host memory in which what it has on its device waits for its turn; it is kept for the next time."""
    held = replace(RoleMemory(uses).idle.device, runtime=0)
    room = MemoryUse(host=moved(model, sharding, held))
    return {phase: use + room for phase, use in uses.items()}


def _sent(model: Model, sharding: Sharding, config: RunConfig, plan: Plan) -> int:
    bucket, transport = config.publish.bucket_mib * MIB, transport_of(config, plan)
    return (
        model.own * model.size if config.publish.lora == "adapter" else sent_bytes(model, sharding, bucket, transport)
    )


def _engine(config: RunConfig, plan: Plan, shapes: Shapes, turns: bool) -> Uses:
    rollout, planned = config.rollout, plan.roles["rollout"]
    model = _model(shapes.policy, config.model, False, False)
    sequences = min(rollout.max_sequences, -(-plan.batch.sequences // planned.ranks))
    received = received_bytes(model, config.publish.bucket_mib * MIB, transport_of(config, plan))
    served = _model(shapes.policy, config.model, False, adapts=True).own * model.size
    gpu = _gpu_bytes(plan, plan.group(planned.group))
    reserved = None if gpu is None else int(rollout.gpu_memory_share * gpu)
    kv_cache = int(rollout.kv_cache_gib * GIB)
    arriving, beside = (served, served) if config.publish.lora == "adapter" else (received, 0)
    return engine(model, plan.device, planned.devices_per_rank, kv_cache, sequences, arriving, reserved, beside, turns)


def _cache_warnings(config: RunConfig, plan: Plan, roles: dict[Role, RoleMemory], shapes: Shapes) -> tuple[str, ...]:
    """An engine on a GPU needs room for the keys and values of one sequence at least: how much there is can only be predicted.
    On CPU a setting says it, and `make_plan` refuses what is too little."""
    if "rollout" not in roles or _gpu_bytes(plan, plan.group(plan.roles["rollout"].group)) is None:
        return ()
    cache = roles["rollout"].uses["generate"].device.kv_cache * plan.roles["rollout"].devices_per_rank
    needed = least_cache(config, shapes.policy, plan.device)
    if cache >= needed:
        return ()
    return (
        f"rollout.gpu_memory_share: was {config.rollout.gpu_memory_share:g}, which leaves {cache / GIB:.3f} GiB for keys and "
        f"values, and one sequence of {longest_row(config, 'ppo')} tokens takes {needed / GIB:.3f}",
    )


def _work(role: Role, config: RunConfig, plan: Plan) -> Work:
    """The largest pass: a micro-batch, or one row where that is longer."""
    if plan.stage == "ppo":
        assert config.ppo is not None
        length = config.ppo.max_prompt_tokens + config.rollout.max_new_tokens
        if role == "actor" and config.ppo.ptx and config.sft:
            length = max(length, config.sft.max_length)
        row, rows, limit = length, plan.batch.sequences, config.ppo.micro_batch_tokens
    else:
        batches = config.sft if plan.stage == "sft" else config.rm
        assert batches is not None
        length, rows, limit = batches.max_length, plan.batch.prompts, batches.micro_batch_tokens
        row = longest_row(config, plan.stage)
    tokens = max(row, min(limit, -(-rows // plan.roles[role].ranks) * row))
    settings = model_settings(config, plan.stage)
    return Work(tokens, length, settings.gradient_checkpointing, settings.activation_offload)


# ---------------------------------------------------------------- sums


def _hosts(config: RunConfig, plan: Plan, roles: dict[Role, RoleMemory], shapes: Shapes) -> list[Place]:
    """The nodes that hold something; those that are alike once."""
    alike: dict[tuple[Any, ...], list[str]] = {}
    for node in plan.cluster.nodes:
        held = tuple((group.nodes.count(node.name), group.nodes[0] == node.name) for group in plan.groups)
        if any(count for count, _ in held):
            alike.setdefault((node.host_memory_gb, held), []).append(node.name)
    found: dict[tuple[Any, ...], list[str]] = {}
    for (size, held), names in alike.items():
        counts = [
            (group, count * group.devices_per_bundle) for group, (count, _) in zip(plan.groups, held, strict=True)
        ]
        parts = {
            phase: sum(
                (_group_host(plan, g, count, names[0], phase, roles) for g, count in counts if count), MemoryBreakdown()
            )
            + MemoryBreakdown(buffers=_store(config, plan, names[0], phase, roles, shapes))
            + MemoryBreakdown(buffers=_mapped(config, plan, names[0], shapes) if phase == "load" else 0)
            for phase in STAGE_PHASES[plan.stage]
        }
        found.setdefault((size, tuple(parts.items())), []).extend(names)
    return [
        Place(
            names[0] if len(names) == 1 else f"each of {len(names)} nodes, {names[0]} ...",
            dict(parts),
            None if size is None else int(size * GIB),
        )
        for (size, parts), names in found.items()
    ]


def _group_host(
    plan: Plan, group: GroupPlan, count: int, node: str, phase: Phase, roles: dict[Role, RoleMemory]
) -> MemoryBreakdown:
    """What a group's processes hold on a node: of those that take turns one works, and the others keep what they hold."""
    first = int(group.nodes[0] == node)
    if phase == "save":  # the first rank saves more than the others
        snapshots = sum(first * r.first_snapshot + (count - first) * r.other_snapshot for r in _of(group, roles))
        return sum((r.idle.host for r in _of(group, roles)), MemoryBreakdown()) * count + MemoryBreakdown(
            buffers=snapshots
        )
    busy = {role: roles[role].uses[phase].host for role in group.roles}
    idle = {role: roles[role].idle.host for role in group.roles}
    return _worst(plan, phase, busy, idle, idle) * count


def _worst(
    plan: Plan,
    phase: Phase,
    busy: dict[Role, MemoryBreakdown],
    idle: dict[Role, MemoryBreakdown],
    asleep: dict[Role, MemoryBreakdown],
) -> MemoryBreakdown:
    """What the roles of a group hold in one place in the worst turn: one works, those of its process are still, the others
    asleep. Publishing takes both ends."""
    working = [role for role in busy if role in BUSY.get(phase, TRAINED[plan.stage])]

    def held(turn: Sequence[Role]) -> MemoryBreakdown:
        awake = {role for worker in turn for role in plan.roles[worker].process_roles}
        return sum((busy[r] if r in turn else idle[r] if r in awake else asleep[r] for r in busy), MemoryBreakdown())

    turns = [working] if phase == "publish" else [[role] for role in working] or [[]]
    return max(map(held, turns), key=lambda place: place.total)


def _of(group: GroupPlan, roles: dict[Role, RoleMemory]) -> list[RoleMemory]:
    return [roles[role] for role in group.roles]


def _store(
    config: RunConfig, plan: Plan, node: str, phase: Phase, roles: dict[Role, RoleMemory], shapes: Shapes
) -> int:
    """Bytes in Ray's object store: the last snapshot, while one is taken two; the bucket of weights under way."""
    snapshots = sum(
        int(group.nodes[0] == node) * roles[role].first_snapshot
        + (group.nodes.count(node) - int(group.nodes[0] == node)) * roles[role].other_snapshot
        for group in plan.groups
        for role in group.roles
    )
    if phase == "load":
        return 0
    if phase == "publish" and plan.group(plan.roles["actor"].group).nodes[0] == node:
        model = _model(shapes.policy, config.model, False, False)
        if config.publish.lora == "adapter":
            return snapshots + _model(shapes.policy, config.model, False, True).own * model.size
        if transport_of(config, plan) == "object_store":
            return snapshots + min(config.publish.bucket_mib * MIB + model.largest, model.nbytes)
    return snapshots * (2 if phase == "save" else 1)


def _mapped(config: RunConfig, plan: Plan, node: str, shapes: Shapes) -> int:
    """Bytes of the files that a node's processes map while they load onto GPUs: each file once, however many read it. A model
    that is drawn has none, and stands in each process."""
    if plan.device == "cpu":
        return 0
    size, files, drawn = SIZES[model_settings(config, plan.stage).dtype], set[Architecture](), 0
    for role, planned in plan.roles.items():
        read = {"critic": shapes.scalars[:1], "reward": shapes.scalars}.get(role, (shapes.policy,))
        if processes := plan.group(planned.group).nodes.count(node):
            files |= set(read)
            drawn += processes * max((shape.parameters * size for shape in read), default=0)
    once = sum(shape.parameters * size for shape in files)
    return drawn if model_settings(config, plan.stage).init == "random" else once


def _devices(plan: Plan, roles: dict[Role, RoleMemory], turns: bool) -> list[Place]:
    """A GPU of each group. What a pass took is given back after it; the states stay, but where roles hold the GPU by turns."""
    if plan.device == "cpu":
        return []
    places = []
    for group in plan.groups:
        parts = {}
        for phase in STAGE_PHASES[plan.stage]:
            busy = {role: roles[role].uses[phase].device for role in group.roles}
            idle = {role: roles[role].idle.device for role in group.roles}
            asleep = idle
            if turns and time_shared(plan, group.roles[0]):
                asleep = {role: MemoryBreakdown(runtime=held.runtime) for role, held in idle.items()}
                if phase == "save" and "rollout" in asleep:  # from the publication on its weights are there
                    asleep["rollout"] += MemoryBreakdown(parameters=idle["rollout"].parameters)
            parts[phase] = _worst(plan, phase, busy, idle, asleep)
        places.append(Place(f"each GPU of {group.name}", parts, _gpu_bytes(plan, group)))
    return places


def _gpu_bytes(plan: Plan, group: GroupPlan) -> int | None:
    """Of the smallest GPU that a group uses."""
    sizes = [node.gpu_memory_gb for node in plan.cluster.nodes if node.name in group.nodes]
    known = [size for size in sizes if size is not None]
    return int(min(known) * GIB) if known and plan.device == "cuda" else None
