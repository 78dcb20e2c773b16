"""What plugins add to the settings, taken back: other tests see settings and stages as they are without plugins."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from configs import extensions
from configs.annotations import kind_of_child, kind_of_field
from configs.schema import PPOSettings, RunConfig, Settings
from placement.stages import STAGES

_OPEN: tuple[tuple[type[Settings], str], ...] = (
    (PPOSettings, "loss"),
    (PPOSettings, "advantage"),
    (RunConfig, "loggers"),
)
"""Fields that plugins add kinds to."""


def take_back() -> Callable[[], None]:
    """Returns a function that removes the kinds, sections and stages that were added since, and the modules that added them."""
    annotations = {field: field[0].model_fields[field[1]].annotation for field in _OPEN}
    before, sections, stages = _kinds(), dict(RunConfig.model_fields), dict(STAGES)

    def restore() -> None:
        added = _kinds() - before
        added |= {kind_of_field(RunConfig, name).core for name in RunConfig.model_fields.keys() - sections.keys()}
        if not added:
            return
        for (owner, name), annotation in annotations.items():
            owner.model_fields[name].annotation = annotation
        for name in RunConfig.model_fields.keys() - sections.keys():
            del RunConfig.model_fields[name], RunConfig.__annotations__[name]
        for name in STAGES.keys() - stages.keys():
            del STAGES[name]
        extensions._rebuild(PPOSettings)
        for settings in added:
            sys.modules.pop(settings.__module__, None)

    return restore


def _kinds() -> set[Any]:
    fields = [kind_of_field(owner, name) for owner, name in _OPEN]
    return {member for field in fields for member in (kind_of_child(field, 0) or field).members}
