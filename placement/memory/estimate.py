"""Predicted memory of a plan: of each role in each phase, summed on nodes and GPUs, and what is left or missing there.

It warns and refuses nothing. docs/memory.md says what it was checked against, and what it does not count.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from configs.schema import ROLES, LoraSettings, ModelSettings, Role, RunConfig
from placement.memory.phases import (
    PassSize,
    UseByPhase,
    adapter_memory,
    engine_memory,
    frozen_memory,
    optimizer_bytes,
    received_bytes,
    sent_bytes,
    state_bytes,
    trainer_memory,
)
from placement.memory.states import Model, Sharding, offloaded
from placement.memory.usage import MemoryBreakdown, MemoryUse
from placement.models.activations import Adapters
from placement.models.architecture import Architecture
from placement.models.shapes import SIZES, Shapes, longest_row, min_kv_cache, model_settings
from placement.plan.layout import strategy_in
from placement.plan.time_sharing import time_shared
from placement.stages import STAGES, Phase
from placement.types import GIB, MIB, Device, GroupPlan, Plan, transport_of

BUSY: dict[Phase, tuple[Role, ...]] = {
    "load": ROLES,
    "generate": ("rollout",),
    "score": ("reference", "critic", "reward"),
    "weight_sync": ("actor", "rollout"),
}
"""Roles that work in a phase; in the other phases, the trained roles. Roles of one group take turns, but publishing needs both
sender and receiver at the same time."""


@dataclass(frozen=True)
class RoleMemory:
    """Memory of one role's first rank, and the size of a snapshot of its first rank and of each other rank."""

    uses: UseByPhase
    first_snapshot: int = 0
    other_snapshot: int = 0

    @cached_property
    def idle(self) -> MemoryUse:
        """Memory held while idle."""
        return min(self.uses.values(), key=lambda use: (use.device.total, use.host.total))


@dataclass(frozen=True)
class Place:
    """Memory of a node, or of each GPU of a group: its use in each phase, and its size (None: unknown)."""

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
        """Bytes left in the tightest phase; negative where it does not fit. None: size unknown."""
        return None if self.size is None else self.size - self.used[self.tightest]

    def as_dict(self) -> dict[str, Any]:
        parts = {phase: held.parts() for phase, held in self.parts.items()}
        fields = {"name": self.name, "used": self.used, "parts": parts, "size": self.size}
        return fields | {"tightest": self.tightest, "headroom": self.headroom}


@dataclass(frozen=True)
class MemoryEstimate:
    """Predicted memory of a stage. `warnings`: other reasons why it cannot work; `advice`: changes with which it would fit."""

    phases: tuple[Phase, ...]
    roles: dict[Role, RoleMemory]
    places: tuple[Place, ...]
    warnings: tuple[str, ...] = ()
    advice: tuple[str, ...] = ()

    @property
    def missing(self) -> int:
        """Bytes missing, summed over all places."""
        return sum(-place.headroom for place in self.places if place.headroom is not None and place.headroom < 0)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON; bytes."""
        roles = {role: {p: memory.uses[p].as_dict() for p in self.phases} for role, memory in self.roles.items()}
        return {
            "roles": roles,
            "places": [place.as_dict() for place in self.places],
            "fits": not self.missing and not self.warnings,
            "warnings": list(self.warnings),
            "advice": list(self.advice),
        }


def _model(
    shape: Architecture, settings: ModelSettings, scalar: bool, with_adapters: bool, on_shared_base: bool = False
) -> Model:
    adapters = _adapters(settings.lora) if with_adapters and settings.lora else None
    return Model(
        shape,
        SIZES[settings.dtype],
        scalar,
        adapters,
        settings.quantize if with_adapters else None,
        on_shared_base,
    )


def _adapters(lora: LoraSettings) -> Adapters:
    return Adapters(lora.rank, None if lora.targets == "all-linear" else frozenset(lora.targets), lora.dora)


# ---------------------------------------------------------------- roles


def estimate_memory(config: RunConfig, plan: Plan, shapes: Shapes, *, offload_idle: bool = True) -> MemoryEstimate:
    """Predict a stage's memory on the nodes and GPUs of its plan. offload_idle: roles that share a GPU free it for each other."""
    roles = {role: _role(role, config, plan, shapes, offload_idle and time_shared(plan, role)) for role in plan.roles}
    phases = STAGES[plan.stage].phases
    places = (*_hosts(config, plan, roles, shapes), *_devices(plan, roles, offload_idle))
    return MemoryEstimate(phases, roles, places, _cache_warnings(config, plan, roles, shapes))


def _role(role: Role, config: RunConfig, plan: Plan, shapes: Shapes, offloads: bool) -> RoleMemory:
    if role == "rollout":
        return RoleMemory(_engine(config, plan, shapes, offloads))
    planned, settings, strategy = (
        plan.roles[role],
        model_settings(config, plan.stage),
        strategy_in(plan.stage, role, config),
    )
    assert strategy is not None
    device: Device = "cuda" if planned.gpus else "cpu"
    sharding = Sharding(strategy, planned.ranks, device, SIZES[settings.optimizer_dtype])
    pass_size, on_shared_base = _largest_pass(role, config, plan), role != planned.process_roles[0]
    if role not in STAGES[plan.stage].trained:
        uses = _frozen(role, settings, sharding, pass_size, shapes, len(planned.process_roles) > 1, on_shared_base)
        shape = shapes.policy if role == "reference" else next(iter(shapes.scalars), None)
        if shape is None or not offloads:
            return RoleMemory(uses)
        return RoleMemory(_with_offload(uses, _model(shape, settings, role == "reward", False), sharding))
    scalar = role in ("critic", "reward")
    shape = (shapes.scalars or (shapes.policy,))[0] if scalar else shapes.policy
    model = _model(shape, settings, scalar, with_adapters=True, on_shared_base=on_shared_base)
    published = _sent(model, sharding, config, plan) if role == "actor" and "rollout" in plan.roles else 0
    snapshots = config.recovery.snapshot_every is not None
    uses = trainer_memory(model, sharding, pass_size, scores=role == "critic", published=published, snapshots=snapshots)
    if offloads:
        uses = _with_offload(uses, model, sharding)
    if not snapshots:
        return RoleMemory(uses)
    return RoleMemory(
        uses, state_bytes(model, sharding), optimizer_bytes(model, sharding) if sharding.zero.stage else 0
    )


def _frozen(
    role: Role,
    settings: ModelSettings,
    sharding: Sharding,
    pass_size: PassSize,
    shapes: Shapes,
    shares_base: bool,
    on_shared_base: bool,
) -> UseByPhase:
    """A frozen role. On a shared base the reference is the base itself, and a reward model is an adapter and a head."""
    if on_shared_base:
        scalar = role == "reward"
        return adapter_memory(_model(shapes.policy, settings, scalar, scalar, on_shared_base=True), sharding, pass_size)
    held = [shapes.policy] if role == "reference" else shapes.scalars
    models = [_model(shape, settings, role == "reward", with_adapters=shares_base) for shape in held]
    return frozen_memory(models, sharding, pass_size)


def _with_offload(uses: UseByPhase, model: Model, sharding: Sharding) -> UseByPhase:
    """Adds the host memory for the role's device tensors while other roles use the device. It stays allocated all the time."""
    held = replace(RoleMemory(uses).idle.device, runtime=0)
    buffers = MemoryUse(host=offloaded(model, sharding, held))
    return {phase: use + buffers for phase, use in uses.items()}


def _sent(model: Model, sharding: Sharding, config: RunConfig, plan: Plan) -> int:
    bucket, transport = config.weight_sync.bucket_mib * MIB, transport_of(config, plan)
    if config.weight_sync.lora == "adapter":
        return model.adapter_parameters * model.size
    return sent_bytes(model, sharding, bucket, transport)


def _engine(config: RunConfig, plan: Plan, shapes: Shapes, offloads: bool) -> UseByPhase:
    rollout, planned = config.rollout, plan.roles["rollout"]
    model = _model(shapes.policy, config.model, False, False)
    sequences = min(rollout.max_sequences, -(-plan.batch.sequences // planned.ranks))
    received = received_bytes(model, config.weight_sync.bucket_mib * MIB, transport_of(config, plan))
    adapter = _model(shapes.policy, config.model, False, with_adapters=True).adapter_parameters * model.size
    gpu = _gpu_bytes(plan, plan.group(planned.group))
    reserved = None if gpu is None else int(rollout.gpu_memory_share * gpu)
    kv_cache = int(rollout.kv_cache_gib * GIB)
    received, served = (adapter, adapter) if config.weight_sync.lora == "adapter" else (received, 0)
    return engine_memory(
        model, plan.device, planned.devices_per_rank, kv_cache, sequences, received, reserved, served, offloads
    )


def _cache_warnings(config: RunConfig, plan: Plan, roles: dict[Role, RoleMemory], shapes: Shapes) -> tuple[str, ...]:
    """An engine on a GPU needs a key-value cache for at least one sequence; its size can only be predicted. On CPU a setting
    gives the size, and `make_plan` refuses one that is too small."""
    if "rollout" not in roles or _gpu_bytes(plan, plan.group(plan.roles["rollout"].group)) is None:
        return ()
    cache = roles["rollout"].uses["generate"].device.kv_cache * plan.roles["rollout"].devices_per_rank
    needed = min_kv_cache(config, shapes.policy, plan.device)
    if cache >= needed:
        return ()
    return (
        f"rollout.gpu_memory_share: was {config.rollout.gpu_memory_share:g}, which leaves {cache / GIB:.3f} GiB for keys and "
        f"values, and one sequence of {longest_row(config, 'ppo')} tokens takes {needed / GIB:.3f}",
    )


def _largest_pass(role: Role, config: RunConfig, plan: Plan) -> PassSize:
    """A micro-batch, or one row where that is longer."""
    if plan.stage == "ppo":
        assert config.ppo is not None
        length = config.ppo.max_prompt_tokens + config.rollout.max_new_tokens
        if role == "actor" and config.ppo.ptx and config.sft:
            length = max(length, config.sft.max_length)
        row, rows, limit = length, plan.batch.sequences, config.ppo.micro_batch_tokens
    else:
        batches = config.section(plan.stage)
        length, rows, limit = batches.max_length, plan.batch.prompts, batches.micro_batch_tokens
        row = longest_row(config, plan.stage)
    tokens = max(row, min(limit, -(-rows // plan.roles[role].ranks) * row))
    settings = model_settings(config, plan.stage)
    return PassSize(tokens, length, settings.gradient_checkpointing, settings.activation_offload)


# ---------------------------------------------------------------- sums


def _hosts(config: RunConfig, plan: Plan, roles: dict[Role, RoleMemory], shapes: Shapes) -> list[Place]:
    """The nodes that hold workers; equal nodes are listed once."""
    alike: dict[tuple[Any, ...], list[str]] = {}
    for node in plan.cluster.nodes:
        held = tuple((group.nodes.count(node.name), group.nodes[0] == node.name) for group in plan.groups)
        if any(count for count, _ in held):
            alike.setdefault((node.host_memory_gb, held), []).append(node.name)
    merged: dict[tuple[Any, ...], list[str]] = {}
    for (size, held), names in alike.items():
        counts = [
            (group, count * group.devices_per_bundle) for group, (count, _) in zip(plan.groups, held, strict=True)
        ]
        parts = {
            phase: sum(
                (_group_host(plan, g, count, names[0], phase, roles) for g, count in counts if count), MemoryBreakdown()
            )
            + MemoryBreakdown(buffers=_store(config, plan, names[0], phase, roles, shapes))
            + MemoryBreakdown(buffers=_mapped_files(config, plan, names[0], shapes) if phase == "load" else 0)
            for phase in STAGES[plan.stage].phases
        }
        merged.setdefault((size, tuple(parts.items())), []).extend(names)
    return [
        Place(
            names[0] if len(names) == 1 else f"each of {len(names)} nodes, {names[0]} ...",
            dict(parts),
            None if size is None else int(size * GIB),
        )
        for (size, parts), names in merged.items()
    ]


def _group_host(
    plan: Plan, group: GroupPlan, count: int, node: str, phase: Phase, roles: dict[Role, RoleMemory]
) -> MemoryBreakdown:
    """Host memory of a group's processes on a node: those of one role work, the others are idle."""
    first = int(group.nodes[0] == node)
    if phase == "save":  # the first rank saves more than the others
        snapshots = sum(first * r.first_snapshot + (count - first) * r.other_snapshot for r in _of(group, roles))
        return sum((r.idle.host for r in _of(group, roles)), MemoryBreakdown()) * count + MemoryBreakdown(
            buffers=snapshots
        )
    busy = {role: roles[role].uses[phase].host for role in group.roles}
    idle = {role: roles[role].idle.host for role in group.roles}
    return _worst_turn(plan, phase, busy, idle, idle) * count


def _worst_turn(
    plan: Plan,
    phase: Phase,
    busy: dict[Role, MemoryBreakdown],
    idle: dict[Role, MemoryBreakdown],
    asleep: dict[Role, MemoryBreakdown],
) -> MemoryBreakdown:
    """Memory of a group's roles in one place at the worst time: one role works, the others of its process are idle, those of
    other processes asleep. Publishing needs sender and receiver at the same time."""
    working = [role for role in busy if role in BUSY.get(phase, STAGES[plan.stage].trained)]

    def held(turn: Sequence[Role]) -> MemoryBreakdown:
        awake = {role for worker in turn for role in plan.roles[worker].process_roles}
        return sum((busy[r] if r in turn else idle[r] if r in awake else asleep[r] for r in busy), MemoryBreakdown())

    turns = [working] if phase == "weight_sync" else [[role] for role in working] or [[]]
    return max(map(held, turns), key=lambda place: place.total)


def _of(group: GroupPlan, roles: dict[Role, RoleMemory]) -> list[RoleMemory]:
    return [roles[role] for role in group.roles]


def _store(
    config: RunConfig, plan: Plan, node: str, phase: Phase, roles: dict[Role, RoleMemory], shapes: Shapes
) -> int:
    """Bytes in Ray's object store: the last snapshot (two while a new one is taken); the bucket of weights being sent."""
    snapshots = sum(
        int(group.nodes[0] == node) * roles[role].first_snapshot
        + (group.nodes.count(node) - int(group.nodes[0] == node)) * roles[role].other_snapshot
        for group in plan.groups
        for role in group.roles
    )
    if phase == "load":
        return 0
    if phase == "weight_sync" and plan.group(plan.roles["actor"].group).nodes[0] == node:
        model = _model(shapes.policy, config.model, False, False)
        if config.weight_sync.lora == "adapter":
            return snapshots + _model(shapes.policy, config.model, False, True).adapter_parameters * model.size
        if transport_of(config, plan) == "object_store":
            return snapshots + min(config.weight_sync.bucket_mib * MIB + model.largest, model.nbytes)
    return snapshots * (2 if phase == "save" else 1)


def _mapped_files(config: RunConfig, plan: Plan, node: str, shapes: Shapes) -> int:
    """Bytes of the files that a node's processes map while they load onto GPUs; a file counts once for all its readers. A
    randomly initialized model has no file: it is built in each process."""
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


def _devices(plan: Plan, roles: dict[Role, RoleMemory], offload_idle: bool) -> list[Place]:
    """A GPU of each group. A pass frees its memory at its end; states stay on the GPU, except where roles share it in turns."""
    if plan.device == "cpu":
        return []
    places = []
    for group in plan.groups:
        if "GPU" not in group.bundles[0]:
            continue
        parts = {}
        for phase in STAGES[plan.stage].phases:
            busy = {role: roles[role].uses[phase].device for role in group.roles}
            idle = {role: roles[role].idle.device for role in group.roles}
            asleep = idle
            if offload_idle and time_shared(plan, group.roles[0]):
                asleep = {role: MemoryBreakdown(runtime=held.runtime) for role, held in idle.items()}
                if phase == "save" and "rollout" in asleep:  # its weights stay on the GPU from publishing on
                    asleep["rollout"] += MemoryBreakdown(parameters=idle["rollout"].parameters)
            parts[phase] = _worst_turn(plan, phase, busy, idle, asleep)
        places.append(Place(f"each GPU of {group.name}", parts, _gpu_bytes(plan, group)))
    return places


def _gpu_bytes(plan: Plan, group: GroupPlan) -> int | None:
    """Bytes of the smallest GPU that a group uses; None where unknown."""
    sizes = [node.gpu_memory_gb for node in plan.cluster.nodes if node.name in group.nodes]
    known_sizes = [size for size in sizes if size is not None]
    return int(min(known_sizes) * GIB) if known_sizes and plan.device == "cuda" else None
