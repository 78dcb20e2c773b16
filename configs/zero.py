"""Strategies by name: what each shards over a role's ranks, and where what it shards is kept."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator

Home = Literal["device", "host", "nvme"]

ALIASES = {
    "colossalai_zero1": "zero1",
    "colossalai_zero1_cpu": "zero1_offload",
    "colossalai_zero2": "zero2",
    "colossalai_zero2_cpu": "zero2_offload",
    "colossalai_gemini": "zero3",
    "colossalai_gemini_cpu": "zero3_offload",
    "ddp_offload": "zero1_offload",
}
"""Names of Colossal-AI's benchmark, and one that would be missed: without ZeRO DeepSpeed moves nothing to the host."""


def _ours(name: Any) -> Any:
    return _told(name) if isinstance(name, str) and name in ALIASES else name


@cache
def _told(alias: str) -> str:
    """What an alias stands for; said once."""
    logging.getLogger("troupe").warning("strategy: %s is %s here", alias, ALIASES[alias])
    return ALIASES[alias]


Strategy = Annotated[
    Literal["ddp", "zero1", "zero2", "zero3", "zero1_offload", "zero2_offload", "zero3_offload", "zero3_nvme", "auto"],
    BeforeValidator(_ours),
]


@dataclass(frozen=True)
class Zero:
    """What a strategy does with a role's states (ZeRO: Rajbhandari et al. 2020; offload: Ren et al. 2021; NVMe: Rajbhandari
    et al. 2021)."""

    stage: int
    """0: every rank holds everything. 1: it holds a shard of the optimizer's states; 2: of the gradients too; 3: of the
    parameters too."""
    optimizer: Home = "device"
    """Where AdamW's moments are, and its own weights where it has them; there its step runs (from NVMe on the host)."""
    parameters: Home = "device"
    """Where the shards of the parameters are between passes."""

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
"""auto is not among them: it becomes one of these before a run starts."""
