"""Predicted memory: bytes by kind and place, for each role, phase and node; and what to change where it does not fit."""

from placement.memory.auto_strategy import auto_roles, keep_resolved, resolve, with_ddp_for_auto
from placement.memory.capacity import default_settings_for
from placement.memory.estimate import MemoryEstimate, Place
from placement.memory.states import BUCKET_ELEMENTS, SUBGROUP_ELEMENTS, SWAPPED_ELEMENTS
from placement.memory.suggestions import PlanReport, with_memory

__all__ = [
    "BUCKET_ELEMENTS",
    "SUBGROUP_ELEMENTS",
    "SWAPPED_ELEMENTS",
    "MemoryEstimate",
    "Place",
    "PlanReport",
    "auto_roles",
    "default_settings_for",
    "keep_resolved",
    "resolve",
    "with_ddp_for_auto",
    "with_memory",
]
