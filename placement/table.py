"""A plan and its predicted memory as tables and text for people."""

from __future__ import annotations

from collections import Counter

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from placement.cluster.bin_packing import resource_text
from placement.memory.estimate import MemoryEstimate, Place
from placement.memory.usage import MemoryBreakdown, MemoryUse
from placement.plan.time_sharing import describe
from placement.stages import STAGES
from placement.types import GIB, GroupPlan, Plan


def render(plan: Plan, memory: MemoryEstimate | str | None = None) -> RenderableType:
    """Roles, bundles and nodes as tables, the batch arithmetic as sentences, and predicted memory where it is given."""
    note = f" ({plan.cluster.note})" if plan.cluster.note else ""
    head = Text(f"stage {plan.stage} on {plan.device}: {plan.cluster.describe()}{note}")
    batch = Text("\n".join(f"  {line}" for line in plan.batch.description))
    sharing = [Text(text) for text in [describe(plan)] if text]
    return Group(
        head, _roles(plan), _groups(plan), *sharing, Text("batch", style="italic"), batch, *_memory(plan, memory)
    )


def _roles(plan: Plan) -> Table:
    table = Table(
        "role", "group", "workers", "resources (each)", "threads", "weights", title="roles", title_justify="left"
    )
    for role, planned in plan.roles.items():
        workers = f"{planned.ranks} {'rank' if role != 'rollout' else 'engine'}{'s' if planned.ranks > 1 else ''}"
        if planned.devices_per_rank > 1:
            workers += f" x {planned.devices_per_rank} devices"
        resources = {"CPU": planned.cpus} | ({"GPU": planned.gpus} if planned.gpus else {})
        kind = "served" if role == "rollout" else "trained" if role in STAGES[plan.stage].trained else "frozen"
        weights = f"{kind}, {planned.strategy}" if planned.strategy else kind
        table.add_row(role, planned.group, workers, resource_text(resources), str(planned.threads), weights)
    return table


def _groups(plan: Plan) -> Table:
    table = Table("group", "bundles", "packing", "expected nodes", title="placement groups", title_justify="left")
    for group in plan.groups:
        table.add_row(
            group.name, f"{len(group.bundles)} x ({resource_text(group.bundles[0])})", group.packing, _where(group)
        )
    return table


def _where(group: GroupPlan) -> str:
    return ", ".join(f"{name}: {count}" for name, count in Counter(group.nodes).items())


# ---------------------------------------------------------------- memory


def _memory(plan: Plan, memory: MemoryEstimate | str | None) -> list[RenderableType]:
    if memory is None:
        return []
    if isinstance(memory, str):
        return [Text("memory", style="italic"), Text(f"  {memory}")]
    lines = [_tightest(role, [memory.roles[role].uses[p] for p in memory.phases], memory) for role in memory.roles]
    lines += [_verdict(place) for place in memory.places]
    lines += memory.warnings
    if memory.missing:
        lines += ["does not fit (predicted):", *(f"  {line}" for line in memory.advice)]
    return [_uses(plan, memory), Text("\n".join(f"  {line}" for line in lines))]


def _uses(plan: Plan, memory: MemoryEstimate) -> Table:
    table = Table("", *memory.phases, title="predicted memory, GiB per rank and in total", title_justify="left")
    for role, estimate in memory.roles.items():
        for where in ("host", "device") if plan.device == "cuda" else ("host",):
            name = f"{role}, {'GPU' if where == 'device' else 'host'}" if plan.device == "cuda" else role
            table.add_row(name, *(_gib(getattr(estimate.uses[phase], where).total) for phase in memory.phases))
    table.add_section()
    for place in memory.places:
        table.add_row(place.name, *(_gib(place.used[phase]) for phase in memory.phases))
    return table


def _tightest(role: str, uses: list[MemoryUse], memory: MemoryEstimate) -> str:
    """`actor, peak in train: optimizer 1.0, gradients 0.6, ...`, on the device or, without one, on the host."""
    by_phase: list[MemoryBreakdown] = [use.device if use.device.total else use.host for use in uses]
    peak = max(by_phase, key=lambda breakdown: breakdown.total)
    parts = sorted(peak.parts().items(), key=lambda part: -part[1])
    sizes = ", ".join(f"{name.replace('_', ' ')} {_gib(size)}" for name, size in parts if size)
    return f"{role}, peak in {memory.phases[by_phase.index(peak)]}: {sizes}"


def _verdict(place: Place) -> str:
    peak = f"{place.name}: peak {_gib(place.used[place.tightest])} GiB in {place.tightest}"
    if place.size is None or place.headroom is None:
        return f"{peak}; its size is not known"
    if place.headroom < 0:
        return f"{peak}, of {_gib(place.size)}: {_gib(-place.headroom)} GiB are missing"
    return f"{peak}, of {_gib(place.size)}: {_gib(place.headroom)} GiB are left"


def _gib(size: int) -> str:
    return f"{size / GIB:.2f}" if size < 100 * GIB else f"{size / GIB:.0f}"
