"""DeepSpeed's configuration for a strategy."""

from __future__ import annotations

from typing import Any

import torch

from configs import ZERO, StateLocation, Strategy
from configs.schema import ModelSettings
from placement.memory import BUCKET_ELEMENTS, SUBGROUP_ELEMENTS, SWAPPED_ELEMENTS


def deepspeed_settings(
    strategy: Strategy, model: ModelSettings, device: torch.device, nvme_folder: str | None
) -> dict[str, Any]:
    """DeepSpeed's configuration without `gradient_clipping`."""
    zero, all_bfloat16 = ZERO[strategy], model.optimizer_dtype == "bfloat16"
    on_gpu = device.type == "cuda"

    def offload(location: StateLocation) -> dict[str, Any]:
        names = {"device": "none", "host": "cpu", "nvme": "nvme"}
        return {"device": names[location], "pin_memory": on_gpu, "nvme_path": nvme_folder}

    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "zero_optimization": {
            "stage": zero.stage,
            "overlap_comm": on_gpu,
            # DeepSpeed's default is half a billion elements, and it allocates several such buffers.
            "reduce_bucket_size": BUCKET_ELEMENTS,
            "allgather_bucket_size": BUCKET_ELEMENTS,
            "stage3_prefetch_bucket_size": BUCKET_ELEMENTS,
            "offload_optimizer": offload(zero.optimizer),
            # Parameters whose NVMe states are in memory at the same time.
            "sub_group_size": SWAPPED_ELEMENTS if zero.optimizer == "nvme" else SUBGROUP_ELEMENTS,
            "offload_param": offload(zero.parameters),
        },
        "bf16": {
            "enabled": model.dtype == "bfloat16",
            "bf16_master_weights_and_grads": all_bfloat16,
            "bf16_optimizer_states": all_bfloat16,
        },
        # Types of gradient sums over micro-batches (without ZeRO, DeepSpeed accepts only the model's type) and over ranks.
        "data_types": {"grad_accum_dtype": "fp32" if zero.stage and not all_bfloat16 else None},
        "communication_data_type": None if all_bfloat16 else "fp32",
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }


def takes_over(now: Strategy, saved: Strategy) -> bool:
    """Whether training under the strategy `now` can load states that were saved under `saved`."""
    if now == saved:
        return True
    zeros = [ZERO[now], ZERO[saved]]
    sharded = [{1: 2}.get(zero.stage, zero.stage) for zero in zeros]
    return sharded[0] == sharded[1] and all(zero.optimizer != "nvme" for zero in zeros)
