"""A plan as a person reads it."""

from __future__ import annotations

from collections import Counter

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from placement.cluster.bin_packing import written
from placement.memory.estimate import MemoryEstimate, Place
from placement.memory.usage import MemoryBreakdown, MemoryUse
from placement.plan.time_sharing import in_words
from placement.types import GIB, TRAINED, GroupPlan, Plan


def render(plan: Plan, memory: MemoryEstimate | str | None = None) -> RenderableType:
    """Roles, bundles and nodes as tables, the batch arithmetic in words, and predicted memory where it is given."""
    note = f" ({plan.cluster.note})" if plan.cluster.note else ""
    head = Text(f"stage {plan.stage} on {plan.device}: {plan.cluster.describe()}{note}")
    batch = Text("\n".join(f"  {line}" for line in plan.batch.words))
    turns = [Text(words) for words in [in_words(plan)] if words]
    return Group(
        head, _roles(plan), _groups(plan), *turns, Text("batch", style="italic"), batch, *_memory(plan, memory)
    )


def _roles(plan: Plan) -> Table:
    table = Table(
        "role", "group", "workers", "each asks for", "threads", "weights", title="roles", title_justify="left"
    )
    for role, planned in plan.roles.items():
        workers = f"{planned.ranks} {'rank' if role != 'rollout' else 'engine'}{'s' if planned.ranks > 1 else ''}"
        if planned.devices_per_rank > 1:
            workers += f" x {planned.devices_per_rank} devices"
        share = {"CPU": planned.cpus} | ({"GPU": planned.gpus} if planned.gpus else {})
        kind = "served" if role == "rollout" else "trained" if role in TRAINED[plan.stage] else "frozen"
        weights = f"{kind}, {planned.strategy}" if planned.strategy else kind
        table.add_row(role, planned.group, workers, written(share), str(planned.threads), weights)
    return table


def _groups(plan: Plan) -> Table:
    table = Table("group", "bundles", "packing", "would lie on", title="placement groups", title_justify="left")
    for group in plan.groups:
        table.add_row(group.name, f"{len(group.bundles)} x ({written(group.bundles[0])})", group.packing, _where(group))
    return table


def _where(group: GroupPlan) -> str:
    return ", ".join(f"{name}: {count}" for name, count in Counter(group.nodes).items())


# ---------------------------------------------------------------- memory


def _memory(plan: Plan, known: MemoryEstimate | str | None) -> list[RenderableType]:
    if known is None:
        return []
    if isinstance(known, str):
        return [Text("memory", style="italic"), Text(f"  {known}")]
    lines = [_tightest(role, [known.roles[role].uses[p] for p in known.phases], known) for role in known.roles]
    lines += [_verdict(place) for place in known.places]
    lines += known.warnings
    if known.missing:
        lines += ["does not fit, by prediction:", *(f"  {line}" for line in known.advice)]
    return [_uses(plan, known), Text("\n".join(f"  {line}" for line in lines))]


def _uses(plan: Plan, known: MemoryEstimate) -> Table:
    table = Table("", *known.phases, title="predicted memory, GiB of each rank and in all", title_justify="left")
    for role, of in known.roles.items():
        for where in ("host", "device") if plan.device == "cuda" else ("host",):
            name = f"{role}, {'GPU' if where == 'device' else 'host'}" if plan.device == "cuda" else role
            table.add_row(name, *(_gib(getattr(of.uses[phase], where).total) for phase in known.phases))
    table.add_section()
    for place in known.places:
        table.add_row(place.name, *(_gib(place.used[phase]) for phase in known.phases))
    return table


def _tightest(role: str, uses: list[MemoryUse], known: MemoryEstimate) -> str:
    """`actor, most in train: optimizer 1.0, gradients 0.6, ...` of the device or, without one, of the host."""
    found: list[MemoryBreakdown] = [use.device if use.device.total else use.host for use in uses]
    most = max(found, key=lambda b: b.total)
    parts = sorted(most.parts().items(), key=lambda part: -part[1])
    said = ", ".join(f"{name.replace('_', ' ')} {_gib(size)}" for name, size in parts if size)
    return f"{role}, most in {known.phases[found.index(most)]}: {said}"


def _verdict(place: Place) -> str:
    most = f"{place.name}: at most {_gib(place.used[place.tightest])} GiB, in {place.tightest}"
    if place.size is None or place.headroom is None:
        return f"{most}; how much there is is not known"
    if place.headroom < 0:
        return f"{most}, of {_gib(place.size)}: {_gib(-place.headroom)} GiB are missing"
    return f"{most}, of {_gib(place.size)}: {_gib(place.headroom)} GiB are left"


def _gib(size: int) -> str:
    return f"{size / GIB:.2f}" if size < 100 * GIB else f"{size / GIB:.0f}"
