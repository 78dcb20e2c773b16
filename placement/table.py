"""A plan as a person reads it."""

from __future__ import annotations

from collections import Counter

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from placement.packing import written
from placement.shape import TRAINED, GroupPlan, Plan


def render(plan: Plan) -> RenderableType:
    """Roles, bundles and nodes as tables, the batch arithmetic in words."""
    note = f" ({plan.cluster.note})" if plan.cluster.note else ""
    head = Text(f"stage {plan.stage} on {plan.device}: {plan.cluster.describe()}{note}")
    batch = Text("\n".join(f"  {line}" for line in plan.batch.words))
    return Group(head, _roles(plan), _groups(plan), Text("batch", style="italic"), batch)


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
