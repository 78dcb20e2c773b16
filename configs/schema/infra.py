"""What carries a run: engines, weight updates, placement, the cluster, deadlines, recovery, checkpoints."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from configs.schema.base import FilePath, Role, Settings


class RolloutSettings(Settings):
    """The vLLM engines."""

    max_new_tokens: PositiveInt = 128
    """Longest answer in tokens."""
    temperature: Annotated[float, Field(ge=0.01)] = 1.0
    """Sampling temperature; log-probabilities are taken under it. vLLM would raise lower ones to 0.01."""
    ignore_eos: bool = False
    """Go on to max_new_tokens (for benchmarks)."""
    tensor_parallel: PositiveInt = 1
    """Devices of one engine."""
    max_sequences: PositiveInt = 256
    """Sequences that an engine works on at a time."""
    kv_cache_gib: PositiveFloat = 1.0
    """Memory of an engine's key-value cache on CPU, in GiB; one sequence of full length must fit."""
    gpu_memory_share: Annotated[float, Field(gt=0.0, le=1.0)] = 0.4
    """Share of a GPU's memory that an engine may use."""
    compile: Literal["auto"] | bool = "auto"
    """torch.compile and CUDA graphs: slower start, faster generation. auto: on GPUs."""


class VerifySettings(Settings):
    """How near engines and exported folders must come to what the trainer computes. Log-probabilities of a few random tokens are
    compared: of an engine after loading and after every update, of an exported folder read back from disk."""

    float32: PositiveFloat = 1e-4
    """Largest mean |difference| in nats per token for models in float32."""
    bfloat16: PositiveFloat = 0.25
    """The same for models in bfloat16, whose products are rounded to 8 bits: two ways to compute the same SmolLM2-135M differ by
    0.09 for random tokens, whose log-probabilities are about -15, and by 0.03 for likely ones."""


class PublishSettings(Settings):
    """How new weights reach the engines."""

    transport: Literal["auto", "object_store", "nccl", "ipc"] = "auto"
    """auto: object_store on CPU; on GPU ipc where actor and rollout are colocated, else nccl."""
    bucket_mib: PositiveInt = 128
    """Size of a bucket of weights in MiB."""
    lora: Literal["merged", "adapter"] = "merged"
    """With `model.lora`. merged: all weights, the adapter added; generation costs nothing more. adapter: it alone is sent, a few
    percent of the bytes, and applied by the engine's LoRA kernels."""


class GroupSettings(Settings):
    """Roles that share one placement group."""

    roles: Annotated[list[Role], Field(min_length=1)]
    """Roles on the same devices."""
    devices: PositiveInt = 1
    """Bundles, one device each. A training role has a rank on each; rollout has devices / tensor_parallel engines."""
    packing: Literal["PACK", "STRICT_PACK", "SPREAD", "STRICT_SPREAD"] = "PACK"
    """How the bundles lie over nodes."""


class PlacementSettings(Settings):
    """Which roles share devices, and how many they get."""

    layout: Literal["separate", "paired", "colocated"] = "separate"
    """separate: each role its own group. paired: actor+reference, critic+reward, rollout. colocated: one group."""
    devices: dict[Role, PositiveInt] = {}
    """Devices of a role in a preset layout (1 where not named; a group takes its largest)."""
    groups: list[GroupSettings] | None = None
    """A partition of the roles of one's own, in place of `layout`."""
    cpus_per_device: PositiveFloat | None = None
    """CPU cores that a bundle asks for; none: 1 beside a GPU; without GPUs all cores, divided among the bundles."""
    timeout: PositiveFloat = 120.0
    """Seconds to wait for the placement groups, also while another run holds their room."""

    @model_validator(mode="after")
    def _partition(self) -> Self:
        named = [role for group in self.groups or [] for role in group.roles]
        for role in named:
            if named.count(role) > 1:
                raise ValueError(f"groups: the role {role} stands in more than one group")
        return self


class OffloadSettings(Settings):
    """Where zero3_nvme keeps what it takes off the devices."""

    nvme_path: FilePath | None = None
    """Folder on each node's fast disk; what a run puts there is gone when its workers are."""


class ClusterSettings(Settings):
    """The Ray cluster."""

    address: str | None = None
    """Running cluster to join: HOST:PORT, or auto for the one on this machine; none: RAY_ADDRESS, else one is started here for
    the run."""
    dashboard_port: Annotated[int, Field(ge=1, le=65_535)] | None = None
    """Port of the dashboard of a cluster that the run starts; none: 8265, or the next one that is free."""


class DeadlineSettings(Settings):
    """Seconds that a call to a worker may take. A phase without a number of its own goes by `first`, `least` and `patience`."""

    start: PositiveFloat | None = 600.0
    """Workers start, meet, and load models and data."""
    generate: PositiveFloat | None = None
    """An engine writes a step's answers."""
    score: PositiveFloat | None = None
    """Reference, critic or reward score a step's answers."""
    train: PositiveFloat | None = None
    """Actor or critic learn from a step."""
    publish: PositiveFloat | None = None
    """New weights reach all engines."""
    save: PositiveFloat | None = None
    """Workers save, restore or export."""
    first: PositiveFloat = 1800.0
    """The first time that a call of its kind is made, when nothing is known of its speed."""
    least: PositiveFloat = 60.0
    """Later calls get no less."""
    patience: PositiveFloat = 10.0
    """Later calls get so many times the longest that the latest ones of their kind took, in proportion to what there is to do."""


class RecoverySettings(Settings):
    """What happens when a worker dies or hangs."""

    restarts: Annotated[int, Field(ge=0)] = 3
    """Restarts of a role within `window`, or within one step; one failure more ends the run. 0: every failure does."""
    window: PositiveFloat = 3600.0
    """Seconds over which restarts are counted."""
    snapshot_every: PositiveInt | None = 10
    """Steps between snapshots of the training state, kept in Ray's object store, from which lost steps are replayed; none:
    they are replayed from the latest checkpoint, or from the stage's start."""
    node_timeout: PositiveFloat = 600.0
    """Seconds to wait for room elsewhere when a node is lost."""
    grace: PositiveFloat = 25.0
    """Seconds that a run asked to stop has to end its step; then it stops at once, with the latest snapshot as checkpoint."""
    refused_steps: PositiveInt = 3
    """So many training steps in a row without a finite loss and gradient end the run."""


class CheckpointSettings(Settings):
    """Where a run can be taken up again."""

    every: PositiveInt | None = None
    """Steps between checkpoints; none: only when the run is asked to stop."""
    keep: PositiveInt = 2
    """Checkpoints kept per stage."""
    on_error: Literal["stop", "continue"] = "stop"
    """When a checkpoint or metrics cannot be written, as on a full disk. continue: warn, and try again at the next ones."""
