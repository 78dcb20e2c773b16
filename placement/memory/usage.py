"""Bytes by what they are and by where they lie: host memory, a device's memory, NVMe."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, replace
from typing import Any, Self


@dataclass(frozen=True)
class MemoryBreakdown:
    """Bytes of one place, by what they are. The optimizer's own weights count with it."""

    parameters: int = 0
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0
    logits: int = 0
    kv_cache: int = 0
    buffers: int = 0
    fragmentation: int = 0
    """What an allocator rounds up, or cannot give out again: an allowance."""
    runtime: int = 0

    @property
    def total(self) -> int:
        return sum(self.parts().values())

    @property
    def passing(self) -> int:
        """What comes and goes within a phase."""
        return self.gradients + self.activations + self.logits + self.buffers

    def parts(self) -> dict[str, int]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def __add__(self, other: MemoryBreakdown) -> Self:
        more = {name: getattr(self, name) + size for name, size in other.parts().items() if size}
        return replace(self, **more) if more else self

    def __mul__(self, count: int) -> Self:
        return replace(self, **{name: count * size for name, size in self.parts().items() if size})


NOTHING = MemoryBreakdown()


@dataclass(frozen=True)
class MemoryUse:
    """What one rank holds: of the host's memory, of its device's (on CPU: nothing, all is the host's), and on NVMe."""

    host: MemoryBreakdown = NOTHING
    device: MemoryBreakdown = NOTHING
    nvme: MemoryBreakdown = NOTHING

    def __add__(self, other: MemoryUse) -> MemoryUse:
        return MemoryUse(self.host + other.host, self.device + other.device, self.nvme + other.nvme)

    def places(self) -> dict[str, MemoryBreakdown]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def as_dict(self) -> dict[str, Any]:
        return {place: b.parts() | {"total": b.total} for place, b in self.places().items()}


def at(home: str, **parts: int) -> MemoryUse:
    """Bytes at one place: `host`, `device` or `nvme`."""
    return MemoryUse(**{home: MemoryBreakdown(**parts)})


def largest(moments: list[MemoryUse]) -> MemoryUse:
    """Of each place the moment that takes the most of it."""
    return MemoryUse(
        *(max((m.places()[place] for m in moments), key=lambda b: b.total) for place in MemoryUse().places())
    )
