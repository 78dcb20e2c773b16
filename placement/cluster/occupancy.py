"""What the nodes of a Ray cluster have free, and who holds the rest."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import ray
from ray._private.state import available_resources_per_node
from ray.util.placement_group import placement_group_table

from configs.schema import ROLES
from placement.cluster.bin_packing import KINDS, Resources, units, written


@dataclass(frozen=True)
class Room:
    """A node's resources: name -> amount."""

    free: Mapping[str, float]
    total: Mapping[str, float]

    def __str__(self) -> str:
        return ", ".join(
            f"{self.free.get(kind, 0.0):g} of {self.total[kind]:g} {kind}" for kind in KINDS if self.total.get(kind)
        )


def room() -> dict[str, Room]:
    """Each alive node by its name (address and id). As of now: what the autoscaler knows is up to a second old."""
    free = available_resources_per_node()
    return {
        f"{node['NodeManagerAddress']}/{node['NodeID'][:6]}": Room(free.get(node["NodeID"], {}), node["Resources"])
        for node in ray.nodes()
        if node["Alive"]
    }


def free_of(nodes: Mapping[str, Room]) -> list[Resources]:
    return [units(node.free) for node in nodes.values()]


def held(nodes: Mapping[str, Room], kinds: Collection[str], but: str = "") -> str:
    """Who holds these kinds of resources: `8 GPU + 64 CPU are held by job1`; empty where nobody does.

    but: a run whose own placement groups are left out.
    """
    holders: dict[str, Counter[str]] = {}
    for group_id, group in placement_group_table().items():
        if group["state"] in ("CREATED", "RESCHEDULING"):
            mine = holders.setdefault(_holder(group["name"], group_id), Counter())
            for bundle in group["bundles"].values():
                mine.update({kind: bundle.get(kind, 0.0) for kind in kinds})
    used = Counter(
        {kind: sum(n.total.get(kind, 0.0) - n.free.get(kind, 0.0) for n in nodes.values()) for kind in kinds}
    )
    for mine in holders.values():
        used.subtract(mine)
    holders["actors and tasks without a placement group"] = used
    holders.pop(but, None)
    amounts = {name: {kind: n for kind, n in mine.items() if n > 1e-4} for name, mine in sorted(holders.items())}
    return ", ".join(f"{written(mine)} are held by {name}" for name, mine in amounts.items() if mine)


def _holder(group: str, group_id: str) -> str:
    """A placement group's run: groups are named `{run}-{roles}`."""
    run, _, roles = group.rpartition("-")
    if run and set(roles.split("+")) <= set(ROLES):
        return run
    return f"placement group {group or group_id[:8]}"
