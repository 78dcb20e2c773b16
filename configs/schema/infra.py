"""Infrastructure of a run: engines, weight updates, placement, cluster, deadlines, recovery, checkpoints."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from configs.schema.base import FilePath, Role, Settings
from configs.schema.sampling import SamplingSettings


class RolloutSettings(SamplingSettings):
    """vLLM engines, and how they sample the training responses."""

    tensor_parallel: PositiveInt = 1
    """Number of devices of one engine."""
    max_sequences: PositiveInt = 256
    """Most sequences that an engine generates at the same time."""
    kv_cache_gib: PositiveFloat = 1.0
    """Size of an engine's key-value cache on CPU, in GiB; one sequence of full length must fit."""
    gpu_memory_share: Annotated[float, Field(gt=0.0, le=1.0)] = 0.4
    """Share of a GPU's memory that an engine may use."""
    compile: Literal["auto"] | bool = "auto"
    """Use torch.compile and CUDA graphs: slower start, faster generation. auto: only on GPUs."""


class VerifySettings(Settings):
    """How closely engines and exported folders must match the trainer. Log-probabilities of a few random tokens are compared: an
    engine's after loading and after every update, an exported folder's after it was read back from disk."""

    float32: PositiveFloat = 1e-4
    """Largest mean |difference| in nats per token for models in float32."""
    bfloat16: PositiveFloat = 0.25
    """The same for models in bfloat16, where products are rounded to 8 bits: two implementations of SmolLM2-135M differ by 0.09
    for random tokens, with log-probabilities of about -15, and by 0.03 for likely ones."""


class WeightSyncSettings(Settings):
    """How new weights reach the engines."""

    transport: Literal["auto", "object_store", "nccl", "ipc"] = "auto"
    """auto: object_store on CPU; on GPU ipc where actor and rollout are colocated, else nccl."""
    bucket_mib: PositiveInt = 128
    """Size of a bucket of weights in MiB."""
    lora: Literal["merged", "adapter"] = "merged"
    """Weights sent with `model.lora`. merged: all weights, with the adapter added; no extra cost in generation. adapter: only the
    adapter, a few percent of the bytes, which the engine's LoRA kernels apply."""


class GroupSettings(Settings):
    """Roles that share one placement group."""

    roles: Annotated[list[Role], Field(min_length=1)]
    """Roles on the same devices."""
    devices: PositiveInt = 1
    """Number of bundles, each with one device. A training role has a rank on each; rollout has devices / tensor_parallel
    engines."""
    packing: Literal["PACK", "STRICT_PACK", "SPREAD", "STRICT_SPREAD"] = "PACK"
    """How Ray places the bundles on nodes."""


class PlacementSettings(Settings):
    """Which roles share devices, and how many devices they get."""

    layout: Literal["separate", "paired", "colocated"] = "separate"
    """separate: one group for each role. paired: actor+reference, critic+reward, rollout. colocated: one group for all."""
    devices: dict[Role, PositiveInt] = {}
    """Devices of a role in a preset layout (1 where not set; a group gets the devices of its largest role)."""
    groups: list[GroupSettings] | None = None
    """A custom partition of the roles into groups, instead of `layout`."""
    cpus_per_device: PositiveFloat | None = None
    """CPU cores of a bundle; none: 1 with a GPU; without GPUs all cores, divided among the bundles."""
    timeout: PositiveFloat = 120.0
    """Seconds to wait for the placement groups, for example while another run holds their resources."""

    @model_validator(mode="after")
    def _partition(self) -> Self:
        named = [role for group in self.groups or [] for role in group.roles]
        for role in named:
            if named.count(role) > 1:
                raise ValueError(f"groups: the role {role} is in more than one group")
        return self


class OffloadSettings(Settings):
    """Disk for the optimizer states of zero3_nvme."""

    nvme_path: FilePath | None = None
    """Folder on each node's fast disk; a run's files there are removed when its workers end."""


class ClusterSettings(Settings):
    """The Ray cluster."""

    address: str | None = None
    """Running cluster to join: HOST:PORT, or auto for the one on this machine; none: RAY_ADDRESS, or else a new cluster for this
    run on this machine."""
    dashboard_port: Annotated[int, Field(ge=1, le=65_535)] | None = None
    """Dashboard port of a cluster that the run starts; none: 8265, or the next free port."""


class DeadlineSettings(Settings):
    """Seconds that a call to a worker may take. A phase without its own number uses `initial_timeout`,
    `min_timeout` and `timeout_factor`."""

    start: PositiveFloat | None = 600.0
    """Workers start, connect, and load models and data."""
    generate: PositiveFloat | None = None
    """An engine generates a step's responses."""
    score: PositiveFloat | None = None
    """Reference, critic or reward score a step's responses."""
    train: PositiveFloat | None = None
    """Actor or critic train on a step."""
    weight_sync: PositiveFloat | None = None
    """New weights reach all engines."""
    save: PositiveFloat | None = None
    """Workers save, restore or export."""
    initial_timeout: PositiveFloat = 1800.0
    """Timeout of the first call of its kind, before its speed is known."""
    min_timeout: PositiveFloat = 60.0
    """Smallest timeout of later calls."""
    timeout_factor: PositiveFloat = 10.0
    """Timeout of later calls, as a multiple of the slowest recent call of their kind, scaled by the amount of work."""


class RecoverySettings(Settings):
    """What happens when a worker dies or hangs."""

    max_restarts: Annotated[int, Field(ge=0)] = 3
    """Most restarts of a role within `restart_window`, or within one step; the next failure ends the run. 0: any failure
    ends it."""
    restart_window: PositiveFloat = 3600.0
    """Seconds in which restarts are counted."""
    snapshot_every: PositiveInt | None = 10
    """Steps between snapshots of the training state in Ray's object store. Lost steps are replayed from the latest one; none:
    from the latest checkpoint, or from the stage's start."""
    node_timeout: PositiveFloat = 600.0
    """Seconds to wait for free resources on other nodes when a node is lost."""
    stop_grace: PositiveFloat = 25.0
    """Seconds for a run that was asked to stop to finish its step; then it stops at once and saves the latest snapshot as
    checkpoint."""
    max_skipped_steps: PositiveInt = 3
    """Number of consecutive training steps without finite loss and gradient that ends the run."""


class CheckpointSettings(Settings):
    """Saved states from which a run can be resumed."""

    every: PositiveInt | None = None
    """Steps between checkpoints; none: only when the run is asked to stop."""
    keep: PositiveInt = 2
    """Checkpoints kept per stage."""
    on_error: Literal["stop", "continue"] = "stop"
    """When a checkpoint or metrics cannot be written, for example on a full disk. continue: warn, and try again with the next."""


class TensorBoardSettings(Settings):
    """Events for TensorBoard, in tensorboard/ of the run's folder."""

    kind: Literal["tensorboard"] = "tensorboard"


class RayMetricsSettings(Settings):
    """Metrics on Ray's metrics port, for Prometheus."""

    kind: Literal["ray"] = "ray"


LoggerSettings = TensorBoardSettings | RayMetricsSettings
"""Plugins add further kinds (configs.extensions.settings_kind)."""
