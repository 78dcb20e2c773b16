"""Memory that a rank holds between passes: what DeepSpeed allocates for parameters, gradients and optimizer, and where.

Read in the source of DeepSpeed 0.19 (`runtime/zero/stage_1_and_2.py`, `stage3.py`,
`runtime/swap_tensor`, `fp16/fused_optimizer.py`); the states are those of ZeRO (Rajbhandari et al. 2020, 2021; Ren et al. 2021).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from configs import ZERO, Zero
from configs.schema import Strategy
from placement.memory.usage import MemoryBreakdown, MemoryUse, at
from placement.models.activations import FLOAT32, Adapters
from placement.models.architecture import Architecture
from placement.types import Device

BUCKET_ELEMENTS = 16_000_000
"""Elements that a trainer reduces or gathers at once."""
LIVE_ELEMENTS = 1_000_000_000
"""Most parameters that ZeRO-3 keeps gathered (DeepSpeed's stage3_max_live_parameters)."""
SUBGROUP_ELEMENTS = 1_000_000_000
"""Elements of a rank that ZeRO-3's optimizer updates at once (sub_group_size)."""
SWAPPED_ELEMENTS = 100_000_000
"""The same under zero3_nvme: elements whose states are in host memory at the same time."""
SWAP_BUFFERS = 4
"""Buffers through which a subgroup's states are read from NVMe: weights, gradients, two moments (buffer_count)."""
Quantized = Literal["4bit", "8bit"]
QUANTIZED_BYTES: dict[Quantized, float] = {"4bit": 0.5 + FLOAT32 / 64, "8bit": 1.0}
"""Bytes of a weight. NF4 has a float32 scale per 64 weights (Dettmers et al. 2023); int8 has one per row, not counted here."""


@dataclass(frozen=True)
class Model:
    """A role's model. `scalar`: it has a scalar head."""

    shape: Architecture
    size: int
    """Bytes of a parameter: 4 or 2."""
    scalar: bool = False
    adapters: Adapters | None = None
    quantized: Quantized | None = None
    """Quantization of the linear layers of a frozen base."""
    on_shared_base: bool = False
    """Another role of the process holds the base; this role has only its adapters and its head."""

    @property
    def base(self) -> int:
        return self.shape.scalar_parameters if self.scalar else self.shape.parameters

    @property
    def adapter_parameters(self) -> int:
        """Elements of the adapters and of the scalar head trained with them; 0 without adapters."""
        return self.adapters.parameters(self.shape) + self.scalar * self.shape.embedding_width if self.adapters else 0

    @property
    def parameters(self) -> int:
        """Elements in memory of this role."""
        return (
            self.adapter_parameters
            if self.on_shared_base
            else self.base + (self.adapters.parameters(self.shape) if self.adapters else 0)
        )

    @property
    def trained(self) -> int:
        """Trained elements; a scalar head is trained in full together with adapters."""
        return self.adapter_parameters if self.adapters else self.base

    @property
    def nbytes(self) -> int:
        if self.quantized is None or self.on_shared_base:
            return self.parameters * self.size
        matrices = self.shape.layers * sum(m.inputs * m.outputs for m in self.shape.matrices)
        return (self.parameters - matrices) * self.size + int(matrices * QUANTIZED_BYTES[self.quantized])

    @property
    def largest(self) -> int:
        """Bytes of the largest weight tensor."""
        return self.shape.largest * self.size


@dataclass(frozen=True)
class Sharding:
    """How a role's states are sharded over its ranks. `optimizer_size`: bytes of an element of the optimizer's states, and of
    gradients summed over micro-batches."""

    strategy: Strategy
    ranks: int
    device: Device
    optimizer_size: int = FLOAT32

    @property
    def zero(self) -> Zero:
        return ZERO[self.strategy]

    def per_rank(self, elements: int) -> int:
        return -(-elements // self.ranks)

    def optimizer_share(self, model: Model) -> int:
        """Elements whose optimizer states one rank holds."""
        return self.per_rank(model.trained) if self.zero.stage else model.trained

    def merge_on_cpu(self, use: MemoryUse) -> MemoryUse:
        """On CPU the device's memory is host memory, so both are added; on GPUs `use` as it is."""
        return MemoryUse(use.host + use.device, MemoryBreakdown(), use.nvme) if self.device == "cpu" else use

    def bucket(self, model: Model) -> int:
        """Bytes of the buckets that reduce gradients: two where communication overlaps (CUDA); ddp copies into one."""
        if self.strategy == "ddp":
            return min(BUCKET_ELEMENTS, model.trained) * self.optimizer_size if self.ranks > 1 else 0
        return BUCKET_ELEMENTS * self.optimizer_size * (2 if self.device == "cuda" else 1)

    def gathered(self, model: Model) -> int:
        """Bytes that ZeRO-3 gathers for a pass: it keeps up to LIVE_ELEMENTS, so a smaller model stays gathered."""
        if self.zero.stage < 3:
            return 0
        return (min(model.parameters, LIVE_ELEMENTS) + min(model.parameters, BUCKET_ELEMENTS)) * model.size


def parameters(model: Model, sharding: Sharding) -> MemoryUse:
    """Parameters between passes; with offload, frozen parameters are in host memory too."""
    if sharding.zero.stage < 3:
        return at("device", parameters=model.nbytes)
    return at(sharding.zero.parameters, parameters=sharding.per_rank(model.parameters) * model.size)


def optimizer(model: Model, sharding: Sharding) -> MemoryUse:
    """AdamW's two moments and the optimizer's own copy of the weights. Under ddp and ZeRO-3 on the device there is no such copy
    where parameters and optimizer have the same type."""
    zero, share, size = sharding.zero, sharding.optimizer_share(model), sharding.optimizer_size
    no_copy = model.size == size and zero.stage in (0, 3) and zero.optimizer == "device"
    states = at(zero.optimizer, optimizer=(2 if no_copy else 3) * size * share)
    if zero.optimizer == "nvme":
        states += at(
            "host", buffers=SWAP_BUFFERS * min(share, SWAPPED_ELEMENTS + sharding.per_rank(model.shape.largest)) * size
        )
    return states


def gradients(model: Model, sharding: Sharding) -> MemoryUse:
    """Gradients that stay allocated between steps.

    ddp in float32 on CPU: all (`Trainer._initialize`). ZeRO-1 in bfloat16: all (`BF16_Optimizer`). ZeRO-3: a flat buffer in the
    optimizer's place. With offload also the optimizer's gradients, in float32. ZeRO-1 and 2 with offload keep the sums over
    micro-batches on the host, and copy weights and the largest gradient through buffers.
    """
    zero, share = sharding.zero, sharding.optimizer_share(model)
    if zero.optimizer == "device":
        if zero.stage == 3:
            return at("device", gradients=share * sharding.optimizer_size)
        allocated = keeps_gradients(model, sharding) or accumulates_separately(model, sharding)
        return at("device", gradients=model.trained * sharding.optimizer_size if allocated else 0)
    flat = at("host", gradients=share * (sharding.optimizer_size if zero.stage == 3 else model.size))
    if zero.stage == 3:
        return flat + at(zero.optimizer, gradients=share * FLOAT32)
    largest = min(model.largest, model.trained * model.size)
    copies = MemoryUse(
        host=MemoryBreakdown(buffers=share * model.size + largest), device=MemoryBreakdown(buffers=largest)
    )
    return flat + at("host", gradients=share * FLOAT32) + copies


def uses_torch_adamw(model: Model, sharding: Sharding) -> bool:
    """Whether PyTorch's AdamW updates the model's own parameters and gradients: ddp in float32."""
    return sharding.zero.stage == 0 and model.size == FLOAT32


def keeps_gradients(model: Model, sharding: Sharding) -> bool:
    """Whether unsharded gradients stay allocated between steps."""
    return sharding.device == "cpu" and uses_torch_adamw(model, sharding)


def accumulates_separately(model: Model, sharding: Sharding) -> bool:
    """Whether each unsharded gradient is added to a separate, wider buffer as soon as it is computed: ZeRO-1 in bfloat16."""
    return sharding.strategy == "zero1" and model.size < sharding.optimizer_size


def idle_use(model: Model, sharding: Sharding) -> MemoryUse:
    """All memory that a rank of a trained role holds between passes."""
    return (
        parameters(model, sharding)
        + gradients(model, sharding)
        + optimizer(model, sharding)
        + pinned_rounding(model, sharding)
    )


def pinned_rounding(model: Model, sharding: Sharding) -> MemoryUse:
    """Host memory lost by rounding: on GPU machines DeepSpeed page-locks its large flat buffers, and PyTorch rounds each up to a
    power of two (`CachingHostAllocator`)."""
    zero, share = sharding.zero, sharding.optimizer_share(model)
    if sharding.device == "cpu" or zero.optimizer == "device":
        return MemoryUse()
    if zero.stage < 3:
        flat = [share * FLOAT32, share * FLOAT32, share * model.size]
    else:
        subgroups, rest = divmod(share, SUBGROUP_ELEMENTS)
        flat = [share * model.size] * (2 if zero.parameters == "host" else 1)
        flat += [SUBGROUP_ELEMENTS * FLOAT32] * subgroups + [rest * FLOAT32] if zero.optimizer == "host" else []
    return at("host", fragmentation=sum(rounding_excess(size) for size in flat))


def rounding_excess(size: int) -> int:
    """Bytes that a page-locked buffer takes beyond its size."""
    return (1 << (size - 1).bit_length()) - size if size else 0


def offloaded(model: Model, sharding: Sharding, held: MemoryBreakdown) -> MemoryBreakdown:
    """Host memory for a role's tensors while other roles use its device: page-locked, one buffer for each storage.

    held: its device memory between passes. ZeRO has one storage for its parameters, and one for each state.
    """
    if model.on_shared_base:
        excess = 0  # adapters are small
    elif sharding.zero.stage:
        excess = rounding_excess(held.parameters) + rounding_excess(held.gradients)
        excess += 3 * rounding_excess(held.optimizer // 3)
    else:
        sizes = [m.inputs * m.outputs for m in model.shape.matrices] * model.shape.layers + [
            model.shape.word_embeddings
        ]
        copies = 1 + (held.optimizer > 0 and model.adapters is None) * held.optimizer / (model.base * FLOAT32)
        excess = int(copies * sum(rounding_excess(size * model.size) for size in sizes))
    return held + MemoryBreakdown(fragmentation=excess)
