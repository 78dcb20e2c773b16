"""Predicted memory of one rank in each phase: DeepSpeed, our trainer, vLLM. Pure arithmetic, no torch.

placement/memory/states.py counts what stays between passes; here is what each phase adds. docs/memory.md lists the measurements.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from placement.memory.states import (
    Model,
    Sharding,
    accumulates_separately,
    idle_use,
    keeps_gradients,
    parameters,
    uses_torch_adamw,
)
from placement.memory.usage import MemoryBreakdown, MemoryUse, at, peak
from placement.models.activations import FLOAT32, inference_bytes, layer_saved_bytes, logits_bytes, saved_bytes
from placement.stages import WITH_ENGINES, Phase
from placement.types import GIB, Device

TRAINER_RUNTIME = int(0.46 * GIB)
"""Python, torch, DeepSpeed and Ray in a process that holds a model; measured on CPU: 0.25 to 0.46 GiB."""
ENGINE_RUNTIME = int(0.60 * GIB)
"""The same with vLLM; measured on CPU."""
CUDA_CONTEXT = int(0.50 * GIB)
"""GPU memory of a CUDA context, for each process. Assumed: not measured on a GPU."""
FRAGMENTATION: dict[Device, float] = {"cpu": 0.0, "cuda": 0.1}
"""Allowance, as a share of the transient bytes of a phase. Assumed for PyTorch's allocator on a GPU."""
PACKED_BUFFERS = 2
"""Buckets of vLLM's NCCL transport on each side."""

UseByPhase = dict[Phase, MemoryUse]


@dataclass(frozen=True)
class PassSize:
    """A model's largest pass. `tokens`: of the pass, padding included; `length`: of its longest row; `offloading`: tensors for
    the backward pass are kept in host memory."""

    tokens: int
    length: int
    checkpointing: bool = False
    offloading: bool = False


def trainer_memory(
    model: Model, sharding: Sharding, pass_size: PassSize, *, scores: bool, published: int = 0, snapshots: bool = True
) -> UseByPhase:
    """Rank 0 of a trained role.

    scores: it computes values (the critic). published: bytes that it needs to send its weights; 0: it sends none.
    snapshots: its state is copied to host memory on its way to Ray's object store.
    """
    idle = idle_use(model, sharding)
    candidates: dict[Phase, list[MemoryUse]] = {
        "load": _load(model, sharding, idle),
        "generate": [idle],
        "score": [_pass(idle, model, sharding, pass_size) if scores else idle],
        "train": _train(model, sharding, pass_size, idle),
        "weight_sync": [idle + at("device", buffers=published)],
        "save": [idle + at("host", buffers=state_bytes(model, sharding) if snapshots else 0)],
    }
    return _peaks(candidates, sharding, 0 if model.on_shared_base else TRAINER_RUNTIME)


def frozen_memory(models: list[Model], sharding: Sharding, pass_size: PassSize) -> UseByPhase:
    """A rank of the reference or the reward role: it holds its models and runs one at a time."""
    idle = sum((parameters(model, sharding) for model in models), MemoryUse())
    whole = max((model.nbytes if sharding.device == "cpu" else model.largest for model in models), default=0)
    loading = idle + at("device", buffers=whole if sharding.zero.stage == 3 else 0)
    candidates: dict[Phase, list[MemoryUse]] = {phase: [idle] for phase in WITH_ENGINES}
    candidates["load"] = [loading]
    candidates["score"] = [idle, *(_pass(idle, model, sharding, pass_size) for model in models)]
    return _peaks(candidates, sharding, TRAINER_RUNTIME)


def adapter_memory(model: Model, sharding: Sharding, pass_size: PassSize) -> UseByPhase:
    """A frozen role on a base that another role of its process holds: only its adapters and its head, if any."""
    idle = at("device", parameters=model.nbytes)
    candidates: dict[Phase, list[MemoryUse]] = {phase: [idle] for phase in WITH_ENGINES}
    candidates["score"] = [_pass(idle, model, sharding, pass_size)]
    return _peaks(candidates, sharding, 0)


def engine_memory(
    model: Model,
    device: Device,
    devices: int,
    kv_cache: int,
    sequences: int,
    received: int,
    reserved: int | None,
    adapters: int = 0,
    time_shared: bool = False,
) -> UseByPhase:
    """One device of a vLLM engine.

    On CPU vLLM repacks a tied head as a copy of the embeddings, and keeps a third, unused table (measured). kv_cache: bytes on
    CPU; on a GPU vLLM fills the rest of `reserved` bytes. sequences: generated at the same time; each has logits and
    log-probabilities. received: bytes of the buckets held before they replace the weights. adapters: bytes of an adapter
    served beside the base. time_shared: it sleeps while other roles use its device, with its weights in host memory and
    its key-value cache freed.
    """
    weights = -(-model.nbytes // devices) + adapters
    if device == "cpu" and model.shape.tied:
        weights += 2 * -(-model.shape.word_embeddings * model.size // devices)
    sampling = 2 * sequences * model.shape.vocabulary * FLOAT32
    if device == "cuda":
        kv_cache = max(0, (reserved or 0) - weights - sampling - CUDA_CONTEXT)
    idle = at("device", parameters=weights, kv_cache=0 if time_shared else kv_cache)
    if time_shared:
        idle += at("host", parameters=weights)
    awake = idle + at("device", kv_cache=kv_cache if time_shared else 0)
    candidates: dict[Phase, list[MemoryUse]] = {phase: [idle] for phase in WITH_ENGINES}
    candidates["load"] = [awake]
    candidates["generate"] = [awake + at("device", logits=sampling)]
    candidates["weight_sync"] = [idle + at("device", buffers=received)]
    return _peaks(candidates, Sharding("ddp", 1, device), ENGINE_RUNTIME, reserved is not None)


def state_bytes(model: Model, sharding: Sharding) -> int:
    """Bytes that rank 0 saves: weights (ZeRO-3: its shard; with adapters: the trained ones only) and optimizer states."""
    weights = model.trained if model.adapters else model.base
    held = sharding.per_rank(weights) if sharding.zero.stage == 3 else weights
    return held * model.size + optimizer_bytes(model, sharding)


def optimizer_bytes(model: Model, sharding: Sharding) -> int:
    """Bytes of optimizer states that each rank saves, from all places."""
    return sum(place.optimizer for place in idle_use(model, sharding).places().values())


def sent_bytes(model: Model, sharding: Sharding, bucket: int, transport: str) -> int:
    """Bytes that the sender of weights needs, without those in the object store.

    Object store: on CPU tensors are sent as they are, but merged adapters and gathered ZeRO-3 shards are new tensors, a bucket
    and a layer of them. nccl: two packed buffers. ipc: one buffer, at least as large as the largest tensor.
    """
    if transport == "nccl":
        return PACKED_BUFFERS * bucket
    if transport == "ipc":
        return max(bucket, model.largest)
    if model.adapters is None and sharding.zero.stage < 3:
        return 0
    return min(bucket + max(model.shape.layer * model.size, model.largest), model.base * model.size)


def received_bytes(model: Model, bucket: int, transport: str) -> int:
    """Bytes that an engine holds until a received layer is complete: a bucket and a layer, or the largest tensor."""
    layer = max(model.shape.layer * model.size, model.largest)
    buckets = PACKED_BUFFERS if transport == "nccl" else 1
    return min(buckets * bucket + layer, 2 * model.base * model.size)


# ---------------------------------------------------------------- peaks


def _load(model: Model, sharding: Sharding, idle: MemoryUse) -> list[MemoryUse]:
    """Building: the whole model and DeepSpeed's flat copy of it; ZeRO-3 moves one tensor at a time to the device and keeps its
    shard. Then, except with PyTorch's AdamW, a step with zero gradients. On a GPU machine the model is read from mapped files,
    whose memory counts once per node, for all its processes (`_mapped_files` in estimate.py)."""
    zero = sharding.zero
    flat = 0 if uses_torch_adamw(model, sharding) or zero.stage == 3 else model.trained * model.size
    built = at("device", parameters=model.nbytes, buffers=flat)
    if zero.stage == 3:
        shards = parameters(model, sharding)
        whole = model.nbytes if sharding.device == "cpu" else model.largest
        built = shards + shards + at("device", buffers=whole)  # DeepSpeed copies the shards into one buffer
    if uses_torch_adamw(model, sharding) or zero.optimizer != "device":
        return [built, idle]
    return [built, idle + at("device", gradients=FLOAT32 * sharding.optimizer_share(model))]


def _train(model: Model, sharding: Sharding, pass_size: PassSize, idle: MemoryUse) -> list[MemoryUse]:
    """The candidates for the peak: a later micro-batch at its head, the end of its backward pass, the optimizer's step."""
    bucket = sharding.bucket(model)
    backward = idle + at("device", gradients=_backward(model, sharding), buffers=sharding.gathered(model) + bucket)
    # Never both: if tied, the embeddings' gradient is added to the head's (`workers.models.fused_log_probs.TiedEmbedding`).
    head = model.shape.word_embeddings * model.size if model.adapters is None and not model.scalar else 0
    embeddings = model.shape.word_embeddings * model.size if model.adapters is None else 0
    full = (
        backward
        + _saved(model, sharding, pass_size)
        + at("device", gradients=head, logits=0 if model.scalar else logits_bytes(model.shape, pass_size.tokens))
    )
    return [
        full,
        backward + at("device", gradients=embeddings),
        idle + at("device", gradients=_stepping(model, sharding), buffers=bucket),
    ]


def _saved(model: Model, sharding: Sharding, pass_size: PassSize) -> MemoryUse:
    """Tensors that autograd keeps; with offload the device holds one layer's at a time."""
    kept = saved_bytes(
        model.shape, model.size, pass_size.tokens, pass_size.length, model.adapters, pass_size.checkpointing
    )
    if not pass_size.offloading or sharding.device == "cpu":
        return at("device", activations=kept)
    layer = pass_size.tokens * layer_saved_bytes(model.shape, model.size, pass_size.length, model.adapters)
    return MemoryUse(host=MemoryBreakdown(activations=kept), device=MemoryBreakdown(activations=min(kept, layer)))


def _backward(model: Model, sharding: Sharding) -> int:
    """Bytes of gradients that a backward pass adds: ZeRO-2 holds those of earlier micro-batches beside the current ones. ZeRO-3,
    and ZeRO-2 with offload, have buffers for them already."""
    if keeps_gradients(model, sharding):
        return 0
    if accumulates_separately(model, sharding):
        return model.largest
    if sharding.zero.stage < 2:
        return model.trained * sharding.optimizer_size
    return 2 * sharding.optimizer_share(model) * sharding.optimizer_size if sharding.strategy == "zero2" else 0


def _stepping(model: Model, sharding: Sharding) -> int:
    """Bytes of gradients in the optimizer's step: those that the backward passes left, and a flat copy of them."""
    if keeps_gradients(model, sharding) or accumulates_separately(model, sharding):
        return 0
    zero, size = sharding.zero, sharding.optimizer_size
    if zero.stage == 0:
        return model.trained * size * (1 if uses_torch_adamw(model, sharding) else 2)
    if zero.optimizer != "device":
        return model.trained * size if zero.stage == 1 else 0
    return sharding.optimizer_share(model) * size * (1 if zero.stage == 3 else 2)


def _pass(idle: MemoryUse, model: Model, sharding: Sharding, pass_size: PassSize) -> MemoryUse:
    return idle + at(
        "device",
        activations=inference_bytes(model.shape, model.size, pass_size.tokens, pass_size.length),
        logits=0 if model.scalar else logits_bytes(model.shape, pass_size.tokens),
        buffers=sharding.gathered(model),
    )


def _peaks(
    candidates: dict[Phase, list[MemoryUse]], sharding: Sharding, runtime: int, bounded: bool = False
) -> UseByPhase:
    """The peak of each phase, with the process's runtime and the allowance for fragmentation. bounded: the process stays within
    the memory that it reserved, so it needs no allowance."""
    return {
        phase: _with_process(peak([sharding.merge_on_cpu(use) for use in uses]), sharding.device, runtime, bounded)
        for phase, uses in candidates.items()
    }


def _with_process(use: MemoryUse, device: Device, runtime: int, bounded: bool) -> MemoryUse:
    context = CUDA_CONTEXT if runtime and device == "cuda" else 0
    host, on_device = replace(use.host, runtime=runtime), replace(use.device, runtime=context)
    if bounded:
        return replace(use, host=host, device=on_device)
    if device == "cpu":
        return replace(use, host=host + _allowance(host, device))
    return replace(use, host=host, device=on_device + _allowance(on_device, device))


def _allowance(place: MemoryBreakdown, device: Device) -> MemoryBreakdown:
    return MemoryBreakdown(fragmentation=int(FRAGMENTATION[device] * place.transient))
