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
    before = {name: PPOSettings.model_fields[name].annotation for name in _OPEN}

    def restore() -> None:
        added = {
            member.__module__
            for name in _OPEN
            for member in kind_of_field(PPOSettings, name).members
            if str(member) not in str(before[name])
        }
        if not added:
            return
        for name in _OPEN:
            PPOSettings.model_fields[name].annotation = before[name]
        extensions._rebuild(PPOSettings)
        for module in added:
            sys.modules.pop(module, None)

    return restore
