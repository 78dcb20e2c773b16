"""Loading with another number of ranks, through DeepSpeed's universal checkpoints, which store whole tensors by name."""

from __future__ import annotations

import io
import shutil
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

import torch.distributed as dist
from deepspeed import DeepSpeedEngine
from deepspeed.checkpoint import ds_to_universal


@contextmanager
def universal(folder: str, tag: str, engine: DeepSpeedEngine) -> Iterator[str]:
    """Context: the engine loads universal checkpoints. Yields the folder of one, created next to `folder` and removed at the end.

    Collective. All ranks must see the same files. The states must be of ZeRO 1 to 3, after at least one step.
    """
    converted = Path(f"{folder}.universal")
    first = not dist.is_initialized() or dist.get_rank() == 0
    if first:
        shutil.rmtree(converted, ignore_errors=True)  # left by a process that was killed here
        _convert(Path(folder) / tag, converted / tag)
    _wait_for_all()
    engine._config.load_universal_checkpoint = True
    try:
        yield str(converted)
        _wait_for_all()
    finally:
        engine._config.load_universal_checkpoint = False
        if first:
            shutil.rmtree(converted)


def _convert(saved: Path, converted: Path) -> None:
    with redirect_stdout(io.StringIO()):  # it prints its progress
        ds_to_universal.main(
            Namespace(
                input_folder=str(saved),
                output_folder=str(converted),
                num_extract_workers=1,  # in this process
                num_merge_workers=1,
                keep_temp_folder=False,
                strict=True,
                inject_missing_state=True,  # it describes tensor and pipeline parallelism only
            )
        )


def _wait_for_all() -> None:
    if dist.is_initialized():
        dist.barrier()
