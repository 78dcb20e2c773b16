"""Where Ray would lay the bundles of placement groups: a simulation of its policies, which takes no cluster.

Resources are counted in ten-thousandths, as Ray counts them, so that 5 x 0.4 CPUs fit on 2 exactly.
All bundles of a group are alike.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from placement.cluster.spec import Cluster

Packing = Literal["PACK", "STRICT_PACK", "SPREAD", "STRICT_SPREAD"]
Resources = dict[str, int]
"""Resource -> ten-thousandths."""
KINDS = ("GPU", "CPU")


@dataclass(frozen=True)
class Request:
    """`count` bundles alike, to be laid by one policy."""

    bundle: Mapping[str, float]
    count: int
    packing: Packing


def units(amounts: Mapping[str, float]) -> Resources:
    return {kind: round(amounts.get(kind, 0.0) * 10_000) for kind in KINDS}


def free_of(cluster: Cluster) -> list[Resources]:
    """Everything that each node has."""
    return [units({"CPU": node.cpus, "GPU": node.gpus}) for node in cluster.nodes]


def creation_order(requests: Sequence[Request]) -> list[int]:
    """Hardest first: strict policies, then big bundles, then many; small ones laid first would break up the nodes."""

    def ease(index: int) -> tuple[bool, bool, float, float, int]:
        request = requests[index]
        bundle, packing = request.bundle, request.packing
        loose = not packing.startswith("STRICT")
        return loose, packing != "STRICT_PACK", -bundle.get("GPU", 0.0), -bundle["CPU"], -request.count

    return sorted(range(len(requests)), key=ease)


def simulate(requests: Sequence[Request], cluster: Cluster) -> tuple[list[tuple[int, ...] | None], list[Resources]]:
    """For each request the index of the node of each bundle, or None where it does not fit; and what stays free."""
    free = free_of(cluster)
    laid: list[tuple[int, ...] | None] = [None] * len(requests)
    for index in creation_order(requests):
        laid[index] = lay(requests[index], free)
    return laid, free


def lay(request: Request, free: list[Resources]) -> tuple[int, ...] | None:
    """Node index of each bundle, taken out of `free`; None, and `free` as it was, where they do not fit."""
    bundle, trial = units(request.bundle), [dict(node) for node in free]
    nodes: list[int] = []
    if request.packing == "STRICT_SPREAD" and request.count > len(free):
        return None
    while len(nodes) < request.count:
        left = request.count - len(nodes)
        batch = {"STRICT_PACK": left, "PACK": left}.get(request.packing, 1)
        unused = set(range(len(trial))).difference(nodes)
        if request.packing == "STRICT_PACK":
            best = _roomiest(trial, {kind: left * amount for kind, amount in bundle.items()}, unused)
        else:
            best = _roomiest(trial, bundle, unused)
            if best is None and request.packing == "SPREAD":
                best = _roomiest(trial, bundle, range(len(trial)))
        if best is None:
            return None
        taken = min(batch, holds(trial[best], bundle))
        for kind, amount in bundle.items():
            trial[best][kind] -= taken * amount
        nodes += [best] * taken
    free[:] = trial
    return tuple(nodes)


def holds(free: Mapping[str, int], bundle: Mapping[str, int]) -> int:
    """How many such bundles a node's free resources hold."""
    return min(free[kind] // amount for kind, amount in bundle.items() if amount)


def _roomiest(free: Sequence[Resources], wanted: Resources, among: Iterable[int]) -> int | None:
    """The node that keeps the largest share of what is free, as Ray's scorer chooses; None where none has room."""

    def room(index: int) -> float:
        return sum((free[index][kind] - amount) / free[index][kind] for kind, amount in wanted.items() if amount)

    fitting = [index for index in among if holds(free[index], wanted)]
    return max(fitting, key=room, default=None)


def shortage(request: Request, free: Sequence[Mapping[str, int]]) -> str:
    """What is missing for a request that does not fit into `free`."""
    bundle = units(request.bundle)
    short = [
        f"{kind} is short: {amount(asked)} asked, {amount(there)} there, {amount(asked - there)} missing"
        for kind in KINDS
        if (asked := request.count * bundle[kind]) > (there := sum(node[kind] for node in free))
    ]
    if short:
        return "; ".join(short)
    if request.packing == "STRICT_PACK":
        whole = {kind: request.count * size for kind, size in request.bundle.items()}
        most = {kind: max(node[kind] for node in free) / 10_000 for kind in whole}
        return f"STRICT_PACK wants {written(whole)} on one node; the most that a node has is {written(most)}"
    if request.packing == "STRICT_SPREAD":
        fitting = sum(holds(node, bundle) > 0 for node in free)
        return f"STRICT_SPREAD wants {request.count} nodes with {written(request.bundle)} each; {fitting} have that"
    fitting = sum(holds(node, bundle) for node in free)
    return f"{request.count} x ({written(request.bundle)}) asked, each on one node; the nodes have room for {fitting}"


def amount(ten_thousandths: int) -> str:
    return f"{ten_thousandths / 10_000:g}"


def written(resources: Mapping[str, float]) -> str:
    """`1 GPU + 0.5 CPU`."""
    return " + ".join(f"{size:g} {kind}" for kind in KINDS if (size := resources.get(kind, 0.0)) or kind in resources)
