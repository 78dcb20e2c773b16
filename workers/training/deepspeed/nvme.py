"""States on NVMe: their folder, and checkpoints of them, which DeepSpeed does not support."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from safetensors.torch import load_file, save_file
from torch import Tensor

_open_pipes: list[IO[bytes]] = []


def can_swap() -> bool:
    """Whether DeepSpeed's NVMe I/O, which is compiled at first use, can be built here."""
    from deepspeed.ops.op_builder import AsyncIOBuilder

    compatible: bool = AsyncIOBuilder().is_compatible()
    return compatible


def own_folder(parent: str, name: str) -> str:
    """A new folder in `parent` for this process only; it is removed when the process ends, even if killed."""
    Path(parent).mkdir(parents=True, exist_ok=True)
    folder = tempfile.mkdtemp(prefix=f"{name}-", dir=parent)
    # The pipe closes when this process ends. Its reader is an orphan, so it is not killed together with our child processes.
    script = 'exec 3<&0; (read -r _ <&3; rm -rf -- "$0") &'
    reader = subprocess.Popen(["sh", "-c", script, folder], stdin=subprocess.PIPE, start_new_session=True)
    reader.wait()
    assert reader.stdin is not None
    _open_pipes.append(reader.stdin)
    return folder


def write_states(optimizer: Any, folder: Path) -> None:
    """Write this rank's shards of weights and AdamW's states, one of DeepSpeed's sub-groups at a time."""
    folder.mkdir(parents=True)
    for i, weights in _sub_groups(optimizer):
        swapped = optimizer._swappable_optimizer_subgroup(i)
        if swapped:
            optimizer._optimizer_states_and_gradient_swap_in(i)
        states = {name: value.clone() for name, value in optimizer.optimizer.state.get(weights, {}).items()}
        save_file({"weights": weights.detach().clone()} | states, folder / f"{i}.safetensors")
        if swapped:
            optimizer._release_swap_buffers(i)


def read_states(optimizer: Any, folder: Path) -> None:
    """Load the files of `write_states`. Collective. The optimizer must not have taken a step."""
    for i, weights in _sub_groups(optimizer):
        saved = load_file(folder / f"{i}.safetensors")
        optimizer._prepare_sub_group(i, set())
        weights.data.copy_(saved.pop("weights"))
        if saved:
            optimizer.optimizer.state[weights] = saved
        optimizer._reassign_or_swap_out_partitioned_parameters(i)
        optimizer._release_sub_group(i, set())
    optimizer._post_step(set())


def _sub_groups(optimizer: Any) -> Iterator[tuple[int, Tensor]]:
    optimizer.checkpoint_event_prologue()
    return enumerate(optimizer.fp32_partitioned_groups_flat)
