"""Bytes by kind (parameters, gradients ...) and by place: host memory, device memory, NVMe."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, replace
from typing import Any, Self


@dataclass(frozen=True)
class MemoryBreakdown:
    """Bytes in one place, by kind. The optimizer's own copy of the weights counts as `optimizer`."""

    parameters: int = 0
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0
    logits: int = 0
    kv_cache: int = 0
    buffers: int = 0
    fragmentation: int = 0
    """Allowance for bytes that an allocator adds by rounding, or cannot reuse."""
    runtime: int = 0

    @property
    def total(self) -> int:
        return sum(self.parts().values())

    @property
    def transient(self) -> int:
        """Bytes that are allocated and freed within a phase."""
        return self.gradients + self.activations + self.logits + self.buffers

    def parts(self) -> dict[str, int]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def __add__(self, other: MemoryBreakdown) -> Self:
        sums = {name: getattr(self, name) + size for name, size in other.parts().items() if size}
        return replace(self, **sums) if sums else self

    def __mul__(self, count: int) -> Self:
        return replace(self, **{name: count * size for name, size in self.parts().items() if size})


EMPTY = MemoryBreakdown()


@dataclass(frozen=True)
class MemoryUse:
    """Memory of one rank: on the host, on its device (on CPU none: all counts as the host's), and on NVMe."""

    host: MemoryBreakdown = EMPTY
    device: MemoryBreakdown = EMPTY
    nvme: MemoryBreakdown = EMPTY

    def __add__(self, other: MemoryUse) -> MemoryUse:
        return MemoryUse(self.host + other.host, self.device + other.device, self.nvme + other.nvme)

    def places(self) -> dict[str, MemoryBreakdown]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def as_dict(self) -> dict[str, Any]:
        return {place: b.parts() | {"total": b.total} for place, b in self.places().items()}


def at(place: str, **parts: int) -> MemoryUse:
    """Bytes in one place: `host`, `device` or `nvme`."""
    return MemoryUse(**{place: MemoryBreakdown(**parts)})


def peak(candidates: list[MemoryUse]) -> MemoryUse:
    """For each place the candidate that uses the most of it."""
    return MemoryUse(
        *(max((use.places()[place] for use in candidates), key=lambda b: b.total) for place in MemoryUse().places())
    )
