"""Strategies by name: which states each one shards over a role's ranks, and where it keeps them."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator

StateLocation = Literal["device", "host", "nvme"]

ALIASES = {
    "colossalai_zero1": "zero1",
    "colossalai_zero1_cpu": "zero1_offload",
    "colossalai_zero2": "zero2",
    "colossalai_zero2_cpu": "zero2_offload",
    "colossalai_gemini": "zero3",
    "colossalai_gemini_cpu": "zero3_offload",
    "ddp_offload": "zero1_offload",
}
"""Names from Colossal-AI's benchmark, and ddp_offload: DeepSpeed offloads nothing without ZeRO, so it means zero1_offload."""


def _without_alias(name: Any) -> Any:
    return _resolve_alias(name) if isinstance(name, str) and name in ALIASES else name


@cache
def _resolve_alias(alias: str) -> str:
    """The strategy that an alias means; logged once per alias."""
    logging.getLogger("troupe").warning("strategy: %s is an alias of %s", alias, ALIASES[alias])
    return ALIASES[alias]


Strategy = Annotated[
    Literal["ddp", "zero1", "zero2", "zero3", "zero1_offload", "zero2_offload", "zero3_offload", "zero3_nvme", "auto"],
    BeforeValidator(_without_alias),
]


@dataclass(frozen=True)
class Zero:
    """How a strategy shards and offloads a role's states (ZeRO: Rajbhandari et al. 2020; offload: Ren et al. 2021; NVMe:
    Rajbhandari et al. 2021)."""

    stage: int
    """0: every rank holds all states. 1: each rank holds a shard of the optimizer's states; 2: of the gradients too; 3: of the
    parameters too."""
    optimizer: StateLocation = "device"
    """Location of AdamW's moments and of its own copy of the weights, if any. Its step runs there (with NVMe: on the host)."""
    parameters: StateLocation = "device"
    """Location of the parameter shards between passes."""

    @property
    def bfloat16_optimizer(self) -> bool:
        """Whether `model.optimizer_dtype` may be bfloat16."""
        return self.stage > 0 and self.optimizer == "device"


ZERO: dict[Strategy, Zero] = {
    "ddp": Zero(0),
    "zero1": Zero(1),
    "zero2": Zero(2),
    "zero3": Zero(3),
    "zero1_offload": Zero(1, optimizer="host"),
    "zero2_offload": Zero(2, optimizer="host"),
    "zero3_offload": Zero(3, optimizer="host", parameters="host"),
    "zero3_nvme": Zero(3, optimizer="nvme", parameters="host"),
}
"""Without auto, which becomes one of these before a run starts."""
