"""Predicted memory of one rank: what DeepSpeed, our trainer and vLLM hold, and when. Pure arithmetic, no torch.

P parameters of the model, T of them trained, N ranks. Read in DeepSpeed 0.19 (`runtime/zero`, `fp16/fused_optimizer.py`), whose
states are those of ZeRO (Rajbhandari et al. 2020), and in workers/; docs/memory.md says what was measured.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

from configs.schema import Strategy
from placement.activations import FLOAT32, Adapters, logits, passing, saved
from placement.architecture import Architecture
from placement.shape import Device

Phase = Literal["load", "generate", "score", "train", "publish", "save"]
PHASES: tuple[Phase, ...] = ("load", "generate", "score", "train", "publish", "save")

GIB = 2**30
MIB = 2**20

TRAINER_RUNTIME = int(0.46 * GIB)
"""Python, torch, DeepSpeed and Ray in a process that holds a model; measured on CPU: 0.25 to 0.46 GiB."""
ENGINE_RUNTIME = int(0.60 * GIB)
"""The same with vLLM; measured on CPU."""
CUDA_CONTEXT = int(0.50 * GIB)
"""What CUDA takes of a GPU for each process. Assumed: no path has run on a GPU."""

BUCKET_ELEMENTS = 16_000_000
"""Elements that a trainer reduces or gathers at a time."""
LIVE_ELEMENTS = 1_000_000_000
"""Parameters that ZeRO-3 keeps gathered at most (DeepSpeed's stage3_max_live_parameters)."""
PACKED_BUFFERS = 2
"""Buckets of vLLM's NCCL transport on each side."""


@dataclass(frozen=True)
class Bytes:
    """Bytes of one place, by what they are. Float32 master weights are counted with the optimizer."""

    parameters: int = 0
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0
    logits: int = 0
    kv_cache: int = 0
    buffers: int = 0
    runtime: int = 0

    @property
    def total(self) -> int:
        return sum(self.parts().values())

    def parts(self) -> dict[str, int]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}


class Use(NamedTuple):
    """What one rank holds in a phase: of the host's memory, and of its device's (nothing on CPU)."""

    host: Bytes
    device: Bytes

    def as_dict(self) -> dict[str, Any]:
        return {place: b.parts() | {"total": b.total} for place, b in (("host", self.host), ("device", self.device))}


Uses = dict[Phase, Use]


@dataclass(frozen=True)
class Model:
    """A model as a role holds it. `scalar`: with a scalar head."""

    shape: Architecture
    size: int
    """Bytes of a parameter: 4 or 2."""
    scalar: bool = False
    adapters: Adapters | None = None

    @property
    def base(self) -> int:
        return self.shape.scalar_parameters if self.scalar else self.shape.parameters

    @property
    def parameters(self) -> int:
        return self.base + (self.adapters.parameters(self.shape) if self.adapters else 0)

    @property
    def trained(self) -> int:
        """A scalar head is trained in full beside adapters."""
        if self.adapters is None:
            return self.base
        return self.adapters.parameters(self.shape) + self.scalar * self.shape.embedding_width

    @property
    def nbytes(self) -> int:
        return self.parameters * self.size

    @property
    def largest(self) -> int:
        return self.shape.largest * self.size


@dataclass(frozen=True)
class Sharding:
    """How a role's states lie over its ranks."""

    strategy: Strategy
    ranks: int
    device: Device

    def bucket(self, model: Model) -> int:
        """Bytes of the buckets in which gradients are reduced: two where communication overlaps (CUDA). ddp copies into one."""
        if self.strategy == "ddp":
            return min(BUCKET_ELEMENTS, model.trained) * model.size if self.ranks > 1 else 0
        return BUCKET_ELEMENTS * model.size * (2 if self.device == "cuda" else 1)

    def part(self, elements: int) -> int:
        return -(-elements // self.ranks)

    def held(self, model: Model) -> int:
        """Bytes of parameters between passes."""
        return self.part(model.parameters) * model.size if self.strategy == "zero3" else model.nbytes

    def gathered(self, model: Model) -> int:
        """Bytes of what ZeRO-3 gathers for a pass: it keeps up to LIVE_ELEMENTS, so a smaller model stays whole."""
        if self.strategy != "zero3":
            return 0
        return (min(model.parameters, LIVE_ELEMENTS) + min(model.parameters, BUCKET_ELEMENTS)) * model.size

    def optimizer(self, model: Model) -> int:
        """AdamW's two moments in float32 and, but for ddp and ZeRO-3 in float32, a float32 copy of the weights."""
        own = model.size == FLOAT32 and self.strategy in ("ddp", "zero3")
        share = model.trained if self.strategy == "ddp" else self.part(model.trained)
        return (8 if own else 12) * share


@dataclass(frozen=True)
class Work:
    """What goes through a model. `tokens`: of one pass, padding included; `length`: of the longest row."""

    tokens: int
    length: int
    checkpointing: bool = False


def trainer(
    model: Model, sharding: Sharding, work: Work, *, scores: bool, published: int = 0, snapshots: bool = True
) -> Uses:
    """Rank 0 of a role that learns.

    scores: it computes values (the critic). published: bytes of what sending the weights takes; 0: it sends none.
    snapshots: its state is read into memory to be put into Ray's object store.
    """
    idle = Bytes(
        parameters=sharding.held(model),
        gradients=sharding.part(model.trained) * model.size if sharding.strategy == "zero3" else 0,  # one flat buffer
        optimizer=sharding.optimizer(model),
    )
    phases: dict[Phase, Bytes] = {
        "load": _largest(_load(model, sharding, idle)),
        "generate": idle,
        "score": _pass(idle, model, sharding, work) if scores else idle,
        "train": _largest(_train(model, sharding, work, idle)),
        "publish": idle,
        "save": idle,
    }
    if published and sharding.device == "cuda":
        phases["publish"] = replace(idle, buffers=published)
    uses = _placed(phases, sharding.device, TRAINER_RUNTIME)
    if published and sharding.device == "cpu":
        uses["publish"] = _more_host(uses["publish"], published)
    if snapshots:
        uses["save"] = _more_host(uses["save"], state_bytes(model, sharding))
    if sharding.device == "cuda":
        uses["load"] = _more_host(uses["load"], model.nbytes)
    return uses


def frozen(models: list[Model], sharding: Sharding, work: Work) -> Uses:
    """A rank of the reference or the reward role: it holds models, and one at a time has a pass."""
    held = sum(sharding.held(model) for model in models)
    idle = Bytes(parameters=held)
    loading = Bytes(parameters=held + max((m.nbytes for m in models), default=0) * (sharding.strategy == "zero3"))
    phases: dict[Phase, Bytes] = dict.fromkeys(PHASES, idle)
    phases["load"] = loading
    phases["score"] = _largest([idle, *(_pass(idle, model, sharding, work) for model in models)])
    uses = _placed(phases, sharding.device, TRAINER_RUNTIME)
    if sharding.device == "cuda":
        uses["load"] = _more_host(uses["load"], max((m.nbytes for m in models), default=0))
    return uses


def engine(
    model: Model, device: Device, devices: int, kv_cache: int, sequences: int, received: int, reserved: int | None
) -> Uses:
    """One device of a vLLM engine.

    On CPU a tied head is packed anew, beside the embeddings. `kv_cache`: on CPU; on a GPU vLLM fills what `reserved` bytes
    leave. sequences: answered at a time; of each there are logits and log-probabilities. received: bytes of the buckets
    that are there before the weights are replaced.
    """
    weights = -(-model.nbytes // devices)
    if device == "cpu" and model.shape.tied:
        weights += -(-model.shape.word_embeddings * model.size // devices)
    sampling = 2 * sequences * model.shape.vocabulary * FLOAT32
    if device == "cuda":
        kv_cache = max(0, (reserved or 0) - weights - sampling - CUDA_CONTEXT)
    idle = Bytes(parameters=weights, kv_cache=kv_cache)
    phases: dict[Phase, Bytes] = dict.fromkeys(PHASES, idle)
    phases["generate"] = replace(idle, logits=sampling)
    phases["publish"] = replace(idle, buffers=received)
    uses = _placed(phases, device, ENGINE_RUNTIME)
    if device == "cuda":
        uses["load"] = _more_host(uses["load"], weights)
    return uses


def state_bytes(model: Model, sharding: Sharding) -> int:
    """What rank 0 saves: its weights (of ZeRO-3 its share; with adapters the trained ones alone) and optimizer states."""
    weights = model.trained if model.adapters else model.base
    held = sharding.part(weights) if sharding.strategy == "zero3" else weights
    return held * model.size + sharding.optimizer(model)


def sent_bytes(model: Model, strategy: Strategy, bucket: int, transport: str) -> int:
    """What sending weights takes of the sender, beside the object store.

    Over the object store: on CPU tensors are sent as they are, but adapters are merged and ZeRO-3's shards are gathered into
    new ones, a bucket and a layer of them. nccl: two packed buffers; ipc: one, no smaller than the largest tensor.
    """
    if transport == "nccl":
        return PACKED_BUFFERS * bucket
    if transport == "ipc":
        return max(bucket, model.largest)
    if model.adapters is None and strategy != "zero3":
        return 0
    return min(bucket + max(model.shape.layer * model.size, model.largest), model.base * model.size)


def received_bytes(model: Model, bucket: int, transport: str) -> int:
    """What arrives at an engine and stays until its layer is complete: a bucket and a layer, or the largest tensor."""
    layer = max(model.shape.layer * model.size, model.largest)
    buckets = PACKED_BUFFERS if transport == "nccl" else 1
    return min(buckets * bucket + layer, 2 * model.base * model.size)


# ---------------------------------------------------------------- moments


def _load(model: Model, sharding: Sharding, idle: Bytes) -> list[Bytes]:
    """Building: the whole model, and the flat copy that DeepSpeed makes of it. Then, but for plain Adam, a step of zeros."""
    plain = sharding.strategy == "ddp" and model.size == FLOAT32
    flat = 0 if plain else model.trained * model.size
    built = Bytes(parameters=model.nbytes, buffers=sharding.held(model) if sharding.strategy == "zero3" else flat)
    if plain:
        return [built, idle]
    share = model.trained if sharding.strategy == "ddp" else sharding.part(model.trained)
    return [built, replace(idle, gradients=idle.gradients + FLOAT32 * share)]


def _train(model: Model, sharding: Sharding, work: Work, idle: Bytes) -> list[Bytes]:
    """The moments that may be the tightest: a later micro-batch's head, the end of its backward pass, the optimizer's step."""
    gathered, bucket = sharding.gathered(model), sharding.bucket(model)
    backward = replace(idle, gradients=_gradients(model, sharding), buffers=gathered + bucket)
    # Tied: the head's part of the gradient waits for the embeddings'. Untied, each comes when it does.
    head = model.shape.word_embeddings * model.size if model.adapters is None and not model.scalar else 0
    embeddings = model.shape.word_embeddings * model.size if model.adapters is None else 0
    waiting = head + embeddings if model.shape.tied else max(head, embeddings)
    full = replace(
        backward,
        gradients=backward.gradients + head,
        activations=saved(model.shape, model.size, work.tokens, work.length, model.adapters, work.checkpointing),
        logits=0 if model.scalar else logits(model.shape, work.tokens),
    )
    end = replace(backward, gradients=backward.gradients + waiting)
    step = replace(idle, gradients=_stepping(model, sharding), buffers=bucket)
    return [full, end, step]


def _gradients(model: Model, sharding: Sharding) -> int:
    """Bytes of gradients in a backward pass: ZeRO-2 keeps those of earlier micro-batches beside this one's."""
    if sharding.strategy in ("ddp", "zero1"):
        return model.trained * model.size
    share = sharding.part(model.trained) * model.size
    return 2 * share if sharding.strategy == "zero2" else share


def _stepping(model: Model, sharding: Sharding) -> int:
    """Bytes of gradients in the optimizer's step: flattened, and in float32 (two copies, of ddp in bfloat16)."""
    wide = FLOAT32 if model.size != FLOAT32 else 0
    if sharding.strategy == "ddp":
        return model.trained * (model.size + 2 * wide)
    return sharding.part(model.trained) * (2 * model.size + wide)


def _pass(idle: Bytes, model: Model, sharding: Sharding, work: Work) -> Bytes:
    return replace(
        idle,
        activations=passing(model.shape, model.size, work.tokens, work.length),
        logits=0 if model.scalar else logits(model.shape, work.tokens),
        buffers=sharding.gathered(model),
    )


def _largest(moments: list[Bytes]) -> Bytes:
    return max(moments, key=lambda moment: moment.total)


def _placed(phases: dict[Phase, Bytes], device: Device, runtime: int) -> Uses:
    """On CPU all of it is the host's; on a GPU the host has the process alone."""
    if device == "cpu":
        return {phase: Use(replace(b, runtime=runtime), Bytes()) for phase, b in phases.items()}
    return {phase: Use(Bytes(runtime=runtime), replace(b, runtime=CUDA_CONTEXT)) for phase, b in phases.items()}


def _more_host(use: Use, buffers: int) -> Use:
    return Use(replace(use.host, buffers=use.host.buffers + buffers), use.device)
