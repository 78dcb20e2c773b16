"""What a rank holds of a model between passes, and where: what DeepSpeed allocates for parameters, gradients and optimizer.

P parameters, T of them trained, N ranks. Read in DeepSpeed 0.19 (`runtime/zero/stage_1_and_2.py`, `stage3.py`,
`runtime/swap_tensor`, `fp16/fused_optimizer.py`); the states are those of ZeRO (Rajbhandari et al. 2020, 2021; Ren et al. 2021).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from configs.schema import Strategy
from configs.zero import ZERO, Zero
from placement.memory.usage import MemoryBreakdown, MemoryUse, at
from placement.models.activations import FLOAT32, Adapters
from placement.models.architecture import Architecture
from placement.types import Device

BUCKET_ELEMENTS = 16_000_000
"""Elements that a trainer reduces or gathers at a time."""
LIVE_ELEMENTS = 1_000_000_000
"""Parameters that ZeRO-3 keeps gathered at most (DeepSpeed's stage3_max_live_parameters)."""
SUBGROUP_ELEMENTS = 1_000_000_000
"""Elements of a rank that ZeRO-3's optimizer steps on at a time (sub_group_size)."""
SWAPPED_ELEMENTS = 100_000_000
"""The same under zero3_nvme: elements whose states are in host memory at a time."""
SWAPPED = 4
"""Buffers of a subgroup through which states come from NVMe: weights, gradients, two moments (buffer_count)."""
Quantized = Literal["4bit", "8bit"]
QUANTIZED_BYTES: dict[Quantized, float] = {"4bit": 0.5 + FLOAT32 / 64, "8bit": 1.0}
"""Bytes of a weight: NF4 has a float32 scale for every 64 (Dettmers et al. 2023), int8 one a row, which is not counted."""


@dataclass(frozen=True)
class Model:
    """A model as a role holds it. `scalar`: with a scalar head."""

    shape: Architecture
    size: int
    """Bytes of a parameter: 4 or 2."""
    scalar: bool = False
    adapters: Adapters | None = None
    quantized: Quantized | None = None
    """How the linear layers of a frozen base are held."""
    on_shared_base: bool = False
    """Another role of the process holds the base; this one has its adapters and its head."""

    @property
    def base(self) -> int:
        return self.shape.scalar_parameters if self.scalar else self.shape.parameters

    @property
    def own(self) -> int:
        """Adapters, and the scalar head beside them."""
        return self.adapters.parameters(self.shape) + self.scalar * self.shape.embedding_width if self.adapters else 0

    @property
    def parameters(self) -> int:
        """Elements in memory."""
        return (
            self.own
            if self.on_shared_base
            else self.base + (self.adapters.parameters(self.shape) if self.adapters else 0)
        )

    @property
    def trained(self) -> int:
        """A scalar head is trained in full beside adapters."""
        return self.own if self.adapters else self.base

    @property
    def nbytes(self) -> int:
        if self.quantized is None or self.on_shared_base:
            return self.parameters * self.size
        matrices = self.shape.layers * sum(m.inputs * m.outputs for m in self.shape.matrices)
        return (self.parameters - matrices) * self.size + int(matrices * QUANTIZED_BYTES[self.quantized])

    @property
    def largest(self) -> int:
        return self.shape.largest * self.size


@dataclass(frozen=True)
class Sharding:
    """How a role's states lie over its ranks. `optimizer_size`: bytes of each of the optimizer's numbers, and of gradients summed
    over micro-batches."""

    strategy: Strategy
    ranks: int
    device: Device
    optimizer_size: int = FLOAT32

    @property
    def zero(self) -> Zero:
        return ZERO[self.strategy]

    def part(self, elements: int) -> int:
        return -(-elements // self.ranks)

    def share(self, model: Model) -> int:
        """Elements whose optimizer states this rank holds."""
        return self.part(model.trained) if self.zero.stage else model.trained

    def placed(self, use: MemoryUse) -> MemoryUse:
        """On CPU the device's memory is the host's."""
        return MemoryUse(use.host + use.device, MemoryBreakdown(), use.nvme) if self.device == "cpu" else use

    def bucket(self, model: Model) -> int:
        """Bytes of the buckets in which gradients are reduced: two where communication overlaps (CUDA). ddp copies into one."""
        if self.strategy == "ddp":
            return min(BUCKET_ELEMENTS, model.trained) * self.optimizer_size if self.ranks > 1 else 0
        return BUCKET_ELEMENTS * self.optimizer_size * (2 if self.device == "cuda" else 1)

    def gathered(self, model: Model) -> int:
        """Bytes of what ZeRO-3 gathers for a pass: it keeps up to LIVE_ELEMENTS, so a smaller model stays whole."""
        if self.zero.stage < 3:
            return 0
        return (min(model.parameters, LIVE_ELEMENTS) + min(model.parameters, BUCKET_ELEMENTS)) * model.size


def parameters(model: Model, sharding: Sharding) -> MemoryUse:
    """Parameters between passes; with offload those that do not learn wait in host memory too."""
    if sharding.zero.stage < 3:
        return at("device", parameters=model.nbytes)
    return at(sharding.zero.parameters, parameters=sharding.part(model.parameters) * model.size)


def optimizer(model: Model, sharding: Sharding) -> MemoryUse:
    """AdamW's two moments and the optimizer's own weights; the device's parameters serve as these under ddp and ZeRO-3 alone,
    where both are of one type."""
    zero, share, size = sharding.zero, sharding.share(model), sharding.optimizer_size
    own = model.size == size and zero.stage in (0, 3) and zero.optimizer == "device"
    states = at(zero.optimizer, optimizer=(2 if own else 3) * size * share)
    if zero.optimizer == "nvme":
        states += at("host", buffers=SWAPPED * min(share, SWAPPED_ELEMENTS + sharding.part(model.shape.largest)) * size)
    return states


def gradients(model: Model, sharding: Sharding) -> MemoryUse:
    """Gradients that stay allocated between steps.

    ddp in float32 on CPU: all (`Trainer._initialize`). ZeRO-1 in bfloat16: all (`BF16_Optimizer`). ZeRO-3: a flat buffer, beside
    the optimizer. With offload also the optimizer's own, in float32. ZeRO 1 and 2 with offload keep there the sums over
    micro-batches, and copy weights and the largest gradient through buffers.
    """
    zero, share = sharding.zero, sharding.share(model)
    if zero.optimizer == "device":
        if zero.stage == 3:
            return at("device", gradients=share * sharding.optimizer_size)
        kept = keeps_gradients(model, sharding) or sums_apart(model, sharding)
        return at("device", gradients=model.trained * sharding.optimizer_size if kept else 0)
    flat = at("host", gradients=share * (sharding.optimizer_size if zero.stage == 3 else model.size))
    if zero.stage == 3:
        return flat + at(zero.optimizer, gradients=share * FLOAT32)
    largest = min(model.largest, model.trained * model.size)
    copies = MemoryUse(
        host=MemoryBreakdown(buffers=share * model.size + largest), device=MemoryBreakdown(buffers=largest)
    )
    return flat + at("host", gradients=share * FLOAT32) + copies


def plain(model: Model, sharding: Sharding) -> bool:
    """Whether PyTorch's AdamW works on the model's own parameters and gradients: ddp in float32."""
    return sharding.zero.stage == 0 and model.size == FLOAT32


def keeps_gradients(model: Model, sharding: Sharding) -> bool:
    """Whether unsharded gradients stay where they are between steps."""
    return sharding.device == "cpu" and plain(model, sharding)


def sums_apart(model: Model, sharding: Sharding) -> bool:
    """Whether unsharded gradients are added to a wider buffer of their own as soon as they are there: ZeRO-1 in bfloat16."""
    return sharding.strategy == "zero1" and model.size < sharding.optimizer_size


def idle_use(model: Model, sharding: Sharding) -> MemoryUse:
    """All that a rank that learns holds between passes."""
    return (
        parameters(model, sharding) + gradients(model, sharding) + optimizer(model, sharding) + rounded(model, sharding)
    )


def rounded(model: Model, sharding: Sharding) -> MemoryUse:
    """On GPU machines DeepSpeed page-locks its large flat buffers, and PyTorch rounds each up to a power of two
    (`CachingHostAllocator`)."""
    zero, share = sharding.zero, sharding.share(model)
    if sharding.device == "cpu" or zero.optimizer == "device":
        return MemoryUse()
    if zero.stage < 3:
        flat = [share * FLOAT32, share * FLOAT32, share * model.size]
    else:
        subgroups, rest = divmod(share, SUBGROUP_ELEMENTS)
        flat = [share * model.size] * (2 if zero.parameters == "host" else 1)
        flat += [SUBGROUP_ELEMENTS * FLOAT32] * subgroups + [rest * FLOAT32] if zero.optimizer == "host" else []
    return at("host", fragmentation=sum(excess(size) for size in flat))


def excess(size: int) -> int:
    """What a page-locked buffer takes beyond its size."""
    return (1 << (size - 1).bit_length()) - size if size else 0


def moved(model: Model, sharding: Sharding, held: MemoryBreakdown) -> MemoryBreakdown:
    """Host memory in which a role's tensors wait while other roles have its device: page-locked, each storage for itself.

    held: what it has on the device between passes. ZeRO has its parameters in one storage, and one of each state.
    """
    if model.on_shared_base:
        rest = 0  # adapters are small
    elif sharding.zero.stage:
        rest = excess(held.parameters) + excess(held.gradients) + 3 * excess(held.optimizer // 3)
    else:
        sizes = [m.inputs * m.outputs for m in model.shape.matrices] * model.shape.layers + [
            model.shape.word_embeddings
        ]
        copies = 1 + (held.optimizer > 0 and model.adapters is None) * held.optimizer / (model.base * FLOAT32)
        rest = int(copies * sum(excess(size * model.size) for size in sizes))
    return held + MemoryBreakdown(fragmentation=rest)
