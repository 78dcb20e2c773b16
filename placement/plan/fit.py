"""Groups of roles laid on a cluster's nodes; where they do not fit, what is missing and what would."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeVar

from configs.schema import PlacementSettings, Role
from placement.cluster.bin_packing import KINDS, amount, creation_order, free_of, lay, shortage, simulate, units
from placement.cluster.spec import Cluster
from placement.plan.layout import PRESETS, GroupSpec, capped, preset, with_engines
from placement.types import Device, Problem

N = TypeVar("N", int, float)

LEAST_CPUS = 0.01
"""Cores are divided down to hundredths."""


class Assignment(NamedTuple):
    """CPU cores of a device, and for each group the index of the node of each bundle."""

    cpus_per_device: float
    nodes: list[tuple[int, ...]]


@dataclass(frozen=True)
class ClusterFit:
    """A cluster, and the settings by which a stage's roles are laid on it."""

    cluster: Cluster
    device: Device
    placement: PlacementSettings
    roles: tuple[Role, ...]
    processes: tuple[tuple[Role, ...], ...] = ()

    def lay(self, shares: list[GroupSpec]) -> Assignment | None:
        """By the settings' cores per device; by default 1 beside a GPU, else as many as let everything fit."""
        cpus = self._cpus() or self._most_cpus(shares)
        return None if cpus is None else self._try(shares, cpus)

    def misfits(self, shares: list[GroupSpec]) -> list[Problem]:
        """Why `lay` found nothing: for the cluster as a whole or, where that has enough, for single groups."""
        requests = [share.request(self.device, self._cpus() or LEAST_CPUS) for share in shares]
        hint = self._hint(shares)
        free, problems = free_of(self.cluster), []
        for kind in KINDS:
            asked = [request.count * units(request.bundle)[kind] for request in requests]
            there = sum(node[kind] for node in free)
            if (missing := sum(asked) - there) > 0:
                by = ", ".join(f"{share.name} {amount(part)}" for share, part in zip(shares, asked, strict=True))
                text = f"{amount(sum(asked))} {kind} are asked for ({by}), the cluster has {amount(there)}: "
                problems.append(Problem(self._setting(kind), f"{text}{amount(missing)} missing; {hint}"))
        if problems:
            return problems
        laid, free = simulate(requests, self.cluster)
        for share, request, nodes in zip(shares, requests, laid, strict=True):
            if nodes is None:
                beside = " beside the others" if len(shares) > 1 else ""
                text = f"group {share.name} finds no room{beside}: {shortage(request, free)}; {hint}"
                problems.append(Problem(self._setting_of(share, shares), text))
        return problems

    def _cpus(self) -> float | None:
        return self.placement.cpus_per_device or (1.0 if self.device == "cuda" else None)

    def _try(self, shares: Sequence[GroupSpec], cpus: float) -> Assignment | None:
        requests = [share.request(self.device, cpus) for share in shares]
        free, laid = free_of(self.cluster), {}
        for index in creation_order(requests):
            nodes = lay(requests[index], free)
            if nodes is None:
                return None
            laid[index] = nodes
        return Assignment(cpus, [laid[index] for index in range(len(shares))])

    def _most_cpus(self, shares: Sequence[GroupSpec]) -> float | None:
        """The most cores that every device can have: some node's cores divided by a whole number, in hundredths."""
        devices = sum(share.devices for share in shares)
        even = self.cluster.cpus / devices
        parts = {floor_to(node.cpus / count, 2) for node in self.cluster.nodes for count in range(1, devices + 1)}
        candidates = sorted(part for part in parts if LEAST_CPUS <= part <= even)
        return _last(candidates, lambda cpus: self._try(shares, cpus) is not None)

    def _hint(self, shares: list[GroupSpec]) -> str:
        """The changes, each alone, with which everything fits."""
        hints = []
        if self._cpus() is not None and (cpus := self._most_cpus(shares)) is not None:
            hints.append(f"placement.cpus_per_device={cpus:g}")
        if self.lay([_loose(share) for share in shares]) is not None:
            hints.append("packing PACK or SPREAD in place of the strict one")
        if self.placement.groups is None:
            hints += [f"placement.layout={layout}" for layout in PRESETS if self._preset_fits(layout, shares)]
        sizes = range(1, max(share.devices for share in shares))
        most = _last(sizes, lambda size: self.lay(capped(shares, size)) is not None)
        if most is not None:
            hints.append(f"at most {most} device{'s' if most > 1 else ''} in each group")
        return f"{' or '.join(hints)} would fit" if hints else "only a larger cluster would fit"

    def _preset_fits(self, layout: str, shares: list[GroupSpec]) -> bool:
        size = max(share.tensor_parallel for share in shares)
        groups = with_engines(preset(self.placement, layout, self.roles, self.processes), size)
        works = self.device == "cpu" or all(share.engines_fit for share in groups)
        return works and self.lay(groups) is not None

    def _setting(self, kind: str) -> str:
        if kind == "CPU" and self._cpus() is not None:
            return "placement.cpus_per_device"
        if self.placement.groups is not None:
            return "placement.groups"
        return "placement.devices" if self.placement.devices else "placement.layout"

    def _setting_of(self, share: GroupSpec, shares: Sequence[GroupSpec]) -> str:
        if self.placement.cpus_per_device is not None and self._most_cpus(shares) is not None:
            return "placement.cpus_per_device"
        return f"{share.setting}.packing" if share.packing.startswith("STRICT") else share.setting


def floor_to(value: float, digits: int) -> float:
    """Rounded down to so many decimal places, but for what floats lose."""
    scale: int = 10**digits
    return math.floor(round(value * scale, 6)) / scale


def _loose(share: GroupSpec) -> GroupSpec:
    return replace(share, packing="SPREAD" if share.packing == "STRICT_SPREAD" else "PACK")


def _last(candidates: Sequence[N], fits: Callable[[N], bool]) -> N | None:
    """The last of ascending candidates that fits, given that all before one that fits do."""
    index = bisect_left(candidates, True, key=lambda candidate: not fits(candidate))
    return candidates[index - 1] if index else None
