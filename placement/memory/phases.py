"""Predicted memory of one rank: what DeepSpeed, our trainer and vLLM hold, and when. Pure arithmetic, no torch.

placement/memory/states.py has what stays; here is what comes and goes with each phase. docs/memory.md says what was measured.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from placement.memory.states import Model, Sharding, idle_use, keeps_gradients, parameters, plain, sums_apart
from placement.memory.usage import MemoryBreakdown, MemoryUse, at, largest
from placement.models.activations import FLOAT32, layer_saved, logits, passing, saved
from placement.types import GIB, Device

Phase = Literal["load", "generate", "score", "train", "publish", "save"]
PHASES: tuple[Phase, ...] = ("load", "generate", "score", "train", "publish", "save")

TRAINER_RUNTIME = int(0.46 * GIB)
"""Python, torch, DeepSpeed and Ray in a process that holds a model; measured on CPU: 0.25 to 0.46 GiB."""
ENGINE_RUNTIME = int(0.60 * GIB)
"""The same with vLLM; measured on CPU."""
CUDA_CONTEXT = int(0.50 * GIB)
"""What CUDA takes of a GPU for each process. Assumed: no path has run on a GPU."""
FRAGMENTATION: dict[Device, float] = {"cpu": 0.0, "cuda": 0.1}
"""Allowance, as a share of what comes and goes within a phase. Assumed for PyTorch's allocator on a GPU."""
PACKED_BUFFERS = 2
"""Buckets of vLLM's NCCL transport on each side."""

Uses = dict[Phase, MemoryUse]


@dataclass(frozen=True)
class Work:
    """What goes through a model. `tokens`: of one pass, padding included; `length`: of the longest row; offloading: what the
    backward pass needs waits in host memory."""

    tokens: int
    length: int
    checkpointing: bool = False
    offloading: bool = False


def trainer(
    model: Model, sharding: Sharding, work: Work, *, scores: bool, published: int = 0, snapshots: bool = True
) -> Uses:
    """Rank 0 of a role that learns.

    scores: it computes values (the critic). published: bytes of what sending the weights takes; 0: it sends none.
    snapshots: its state is read into memory to be put into Ray's object store.
    """
    idle = idle_use(model, sharding)
    moments: dict[Phase, list[MemoryUse]] = {
        "load": _load(model, sharding, idle),
        "generate": [idle],
        "score": [_pass(idle, model, sharding, work) if scores else idle],
        "train": _train(model, sharding, work, idle),
        "publish": [idle + at("device", buffers=published)],
        "save": [idle + at("host", buffers=state_bytes(model, sharding) if snapshots else 0)],
    }
    return _finished(moments, sharding, 0 if model.on_shared_base else TRAINER_RUNTIME)


def frozen(models: list[Model], sharding: Sharding, work: Work) -> Uses:
    """A rank of the reference or the reward role: it holds models, and one at a time has a pass."""
    idle = sum((parameters(model, sharding) for model in models), MemoryUse())
    whole = max((model.nbytes if sharding.device == "cpu" else model.largest for model in models), default=0)
    loading = idle + at("device", buffers=whole if sharding.zero.stage == 3 else 0)
    moments: dict[Phase, list[MemoryUse]] = {phase: [idle] for phase in PHASES}
    moments["load"] = [loading]
    moments["score"] = [idle, *(_pass(idle, model, sharding, work) for model in models)]
    return _finished(moments, sharding, TRAINER_RUNTIME)


def adapted(model: Model, sharding: Sharding, work: Work) -> Uses:
    """A frozen role on a base that another role of its process holds: adapters and a head of its own, if any."""
    idle = at("device", parameters=model.nbytes)
    moments: dict[Phase, list[MemoryUse]] = {phase: [idle] for phase in PHASES}
    moments["score"] = [_pass(idle, model, sharding, work)]
    return _finished(moments, sharding, 0)


def engine(
    model: Model,
    device: Device,
    devices: int,
    kv_cache: int,
    sequences: int,
    received: int,
    reserved: int | None,
    adapters: int = 0,
    turns: bool = False,
) -> Uses:
    """One device of a vLLM engine.

    On CPU vLLM packs a tied head anew, beside the embeddings, and has a third table that nobody reads (measured). `kv_cache`:
    on CPU; on a GPU vLLM fills what `reserved` bytes leave. sequences: answered at a time; of each there are logits and
    log-probabilities. received: bytes of the buckets that are there before the weights are replaced. adapters: bytes of an
    adapter that it serves beside the base. turns: it sleeps while other roles have its device: the weights in host memory,
    and the cache of keys and values given back.
    """
    weights = -(-model.nbytes // devices) + adapters
    if device == "cpu" and model.shape.tied:
        weights += 2 * -(-model.shape.word_embeddings * model.size // devices)
    sampling = 2 * sequences * model.shape.vocabulary * FLOAT32
    if device == "cuda":
        kv_cache = max(0, (reserved or 0) - weights - sampling - CUDA_CONTEXT)
    idle = at("device", parameters=weights, kv_cache=0 if turns else kv_cache)
    if turns:
        idle += at("host", parameters=weights)
    awake = idle + at("device", kv_cache=kv_cache if turns else 0)
    moments: dict[Phase, list[MemoryUse]] = {phase: [idle] for phase in PHASES}
    moments["load"] = [awake]
    moments["generate"] = [awake + at("device", logits=sampling)]
    moments["publish"] = [idle + at("device", buffers=received)]
    return _finished(moments, Sharding("ddp", 1, device), ENGINE_RUNTIME, reserved is not None)


def state_bytes(model: Model, sharding: Sharding) -> int:
    """What rank 0 saves: its weights (of ZeRO-3 its share; with adapters the trained ones alone) and optimizer states."""
    weights = model.trained if model.adapters else model.base
    held = sharding.part(weights) if sharding.zero.stage == 3 else weights
    return held * model.size + optimizer_bytes(model, sharding)


def optimizer_bytes(model: Model, sharding: Sharding) -> int:
    """What each rank saves of the optimizer, wherever it is."""
    return sum(place.optimizer for place in idle_use(model, sharding).places().values())


def sent_bytes(model: Model, sharding: Sharding, bucket: int, transport: str) -> int:
    """What sending weights takes of the sender, beside the object store.

    Over the object store: on CPU tensors are sent as they are, but adapters are merged and ZeRO-3's shards are gathered into
    new ones, a bucket and a layer of them. nccl: two packed buffers; ipc: one, no smaller than the largest tensor.
    """
    if transport == "nccl":
        return PACKED_BUFFERS * bucket
    if transport == "ipc":
        return max(bucket, model.largest)
    if model.adapters is None and sharding.zero.stage < 3:
        return 0
    return min(bucket + max(model.shape.layer * model.size, model.largest), model.base * model.size)


def received_bytes(model: Model, bucket: int, transport: str) -> int:
    """What arrives at an engine and stays until its layer is complete: a bucket and a layer, or the largest tensor."""
    layer = max(model.shape.layer * model.size, model.largest)
    buckets = PACKED_BUFFERS if transport == "nccl" else 1
    return min(buckets * bucket + layer, 2 * model.base * model.size)


# ---------------------------------------------------------------- moments


def _load(model: Model, sharding: Sharding, idle: MemoryUse) -> list[MemoryUse]:
    """Building: the whole model and the flat copy that DeepSpeed makes of it; ZeRO-3 takes one tensor at a time to the device
    and leaves its shard. Then, but for plain Adam, a step of zeros. On a GPU machine the model comes out of mapped files, which
    are the node's (`Model.nbytes`, once for all processes)."""
    zero = sharding.zero
    flat = 0 if plain(model, sharding) or zero.stage == 3 else model.trained * model.size
    built = at("device", parameters=model.nbytes, buffers=flat)
    if zero.stage == 3:
        shards = parameters(model, sharding)
        whole = model.nbytes if sharding.device == "cpu" else model.largest
        built = shards + shards + at("device", buffers=whole)  # DeepSpeed copies the shards into one buffer
    if plain(model, sharding) or zero.optimizer != "device":
        return [built, idle]
    return [built, idle + at("device", gradients=FLOAT32 * sharding.share(model))]


def _train(model: Model, sharding: Sharding, work: Work, idle: MemoryUse) -> list[MemoryUse]:
    """The moments that may be the tightest: a later micro-batch's head, the end of its backward pass, the optimizer's step."""
    bucket = sharding.bucket(model)
    backward = idle + at("device", gradients=_backward(model, sharding), buffers=sharding.gathered(model) + bucket)
    # One at a time: tied, the embeddings' gradient is added to the head's (`workers.models.fused_log_probs.TiedEmbedding`).
    head = model.shape.word_embeddings * model.size if model.adapters is None and not model.scalar else 0
    embeddings = model.shape.word_embeddings * model.size if model.adapters is None else 0
    full = (
        backward
        + _saved(model, sharding, work)
        + at("device", gradients=head, logits=0 if model.scalar else logits(model.shape, work.tokens))
    )
    return [
        full,
        backward + at("device", gradients=embeddings),
        idle + at("device", gradients=_stepping(model, sharding), buffers=bucket),
    ]


def _saved(model: Model, sharding: Sharding, work: Work) -> MemoryUse:
    """What autograd keeps; offloaded, the device has one layer's at a time."""
    kept = saved(model.shape, model.size, work.tokens, work.length, model.adapters, work.checkpointing)
    if not work.offloading or sharding.device == "cpu":
        return at("device", activations=kept)
    layer = work.tokens * layer_saved(model.shape, model.size, work.length, model.adapters)
    return MemoryUse(host=MemoryBreakdown(activations=kept), device=MemoryBreakdown(activations=min(kept, layer)))


def _backward(model: Model, sharding: Sharding) -> int:
    """Bytes of gradients that a backward pass adds: ZeRO-2 keeps those of earlier micro-batches beside this one's; ZeRO-3 has
    a place for them, and so has ZeRO-2 with offload."""
    if keeps_gradients(model, sharding):
        return 0
    if sums_apart(model, sharding):
        return model.largest
    if sharding.zero.stage < 2:
        return model.trained * sharding.optimizer_size
    return 2 * sharding.share(model) * sharding.optimizer_size if sharding.strategy == "zero2" else 0


def _stepping(model: Model, sharding: Sharding) -> int:
    """Bytes of gradients that the optimizer's step adds: what the backward passes left, and the same flattened."""
    if keeps_gradients(model, sharding) or sums_apart(model, sharding):
        return 0
    zero, size = sharding.zero, sharding.optimizer_size
    if zero.stage == 0:
        return model.trained * size * (1 if plain(model, sharding) else 2)
    if zero.optimizer != "device":
        return model.trained * size if zero.stage == 1 else 0
    return sharding.share(model) * size * (1 if zero.stage == 3 else 2)


def _pass(idle: MemoryUse, model: Model, sharding: Sharding, work: Work) -> MemoryUse:
    return idle + at(
        "device",
        activations=passing(model.shape, model.size, work.tokens, work.length),
        logits=0 if model.scalar else logits(model.shape, work.tokens),
        buffers=sharding.gathered(model),
    )


def _finished(moments: dict[Phase, list[MemoryUse]], sharding: Sharding, runtime: int, bounded: bool = False) -> Uses:
    """The largest moment of each phase, with the process's runtime and the allowance for fragmentation. bounded: the process
    keeps within what it reserved."""
    return {
        phase: _with_process(largest([sharding.placed(moment) for moment in found]), sharding.device, runtime, bounded)
        for phase, found in moments.items()
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
    return MemoryBreakdown(fragmentation=int(FRAGMENTATION[device] * place.passing))
