"""What plugins add to the settings, taken back: tests of errors and of the documentation see the settings as they are."""

from __future__ import annotations

import sys
from collections.abc import Callable

from configs import extensions
from configs.annotations import kind_of_field
from configs.schema import PPOSettings

_OPEN = ("loss", "advantage")


def take_back() -> Callable[[], None]:
    """Returns a function that removes the kinds of loss and advantage that were added since, and their modules."""
    annotations = {name: PPOSettings.model_fields[name].annotation for name in _OPEN}
    before = _members()

    def restore() -> None:
        added = _members() - before
        if not added:
            return
        for name in _OPEN:
            PPOSettings.model_fields[name].annotation = annotations[name]
        extensions._rebuild(PPOSettings)
        for settings in added:
            sys.modules.pop(settings.__module__, None)

    return restore


def _members() -> set[type]:
    return {member for name in _OPEN for member in kind_of_field(PPOSettings, name).members}
