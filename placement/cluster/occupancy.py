"""Free resources on the nodes of a Ray cluster, and who holds the rest."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import ray
from ray._private.state import available_resources_per_node
from ray.util.placement_group import placement_group_table

from configs.schema import ROLES
from placement.cluster.bin_packing import KINDS, Resources, resource_text, units


@dataclass(frozen=True)
class NodeResources:
    """A node's resources: name -> amount."""

    free: Mapping[str, float]
    total: Mapping[str, float]

    def __str__(self) -> str:
        return ", ".join(
            f"{self.free.get(kind, 0.0):g} of {self.total[kind]:g} {kind}" for kind in KINDS if self.total.get(kind)
        )


def node_resources() -> dict[str, NodeResources]:
    """Resources of each alive node, by its name (address and id). As of now: the autoscaler's view is up to a second old."""
    free = available_resources_per_node()
    return {
        f"{node['NodeManagerAddress']}/{node['NodeID'][:6]}": NodeResources(
            free.get(node["NodeID"], {}), node["Resources"]
        )
        for node in ray.nodes()
        if node["Alive"]
    }


def free_resources(nodes: Mapping[str, NodeResources]) -> list[Resources]:
    return [units(node.free) for node in nodes.values()]


def holders_text(nodes: Mapping[str, NodeResources], kinds: Collection[str], exclude: str = "") -> str:
    """Who holds resources of these kinds: `8 GPU + 64 CPU are held by job1`; empty where nobody does.

    exclude: a run whose own placement groups are left out.
    """
    holders: dict[str, Counter[str]] = {}
    for group_id, group in placement_group_table().items():
        if group["state"] in ("CREATED", "RESCHEDULING"):
            held = holders.setdefault(_holder(group["name"], group_id), Counter())
            for bundle in group["bundles"].values():
                held.update({kind: bundle.get(kind, 0.0) for kind in kinds})
    used = Counter(
        {kind: sum(n.total.get(kind, 0.0) - n.free.get(kind, 0.0) for n in nodes.values()) for kind in kinds}
    )
    for held in holders.values():
        used.subtract(held)
    holders["actors and tasks without a placement group"] = used
    holders.pop(exclude, None)
    amounts = {name: {kind: n for kind, n in held.items() if n > 1e-4} for name, held in sorted(holders.items())}
    return ", ".join(f"{resource_text(held)} are held by {name}" for name, held in amounts.items() if held)


def _holder(group: str, group_id: str) -> str:
    """A placement group's run: groups are named `{run}-{roles}`."""
    run, _, roles = group.rpartition("-")
    if run and set(roles.split("+")) <= set(ROLES):
        return run
    return f"placement group {group or group_id[:8]}"
