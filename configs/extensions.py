"""How plugins add settings: further kinds of a component, and sections of stages of their own.

A plugin's settings are then settings like all others: checked when they are read, with the same error texts, and shown by
`troupe config`. Importing the module registers them; the setting `plugins` names the modules.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, TypeVar, Union

from pydantic.fields import FieldInfo

from configs.annotations import choices, kind_of_field
from configs.schema import PPOSettings, RunConfig, Settings

S = TypeVar("S", bound=type[Settings])


def settings_kind(owner: type[Settings], field: str) -> Callable[[S], S]:
    """Decorator of a class of settings that `owner.field` may hold too, by the `kind` of the class.

    Raises ValueError where another class has the kind.
    """

    def add(settings: S) -> S:
        info, (kind,) = owner.model_fields[field], choices(kind_of_field(settings, "kind"))
        known = kind_of_field(owner, field).models.get(kind)
        if known is not None and known.__module__ != settings.__module__:
            raise ValueError(f"{field}: the kind {kind!r} is taken by {known.__module__}.{known.__qualname__}")
        if known is None:
            info.annotation = _union(info.annotation, settings)
            _rebuild(owner)
        return settings

    return add


def add_section(name: str, settings: type[Settings]) -> None:
    """Give RunConfig a section `name`, of these settings or none. Raises ValueError where there is such a setting."""
    known = RunConfig.model_fields.get(name)
    if known is not None and settings.__module__ not in str(known.annotation):
        raise ValueError(f"{name}: there is a setting of that name already")
    description = (settings.__doc__ or name).strip().partition("\n")[0]
    annotation = _union(settings, None)
    RunConfig.model_fields[name] = FieldInfo(annotation=annotation, default=None, description=description)
    RunConfig.__annotations__[name] = annotation
    _rebuild(RunConfig)


def _union(*members: Any) -> Any:
    return Union[members]  # noqa: UP007  a value, not an annotation


def _rebuild(owner: type[Settings]) -> None:
    """Pydantic builds a model's validator once; those of the models around it hold a copy."""
    models: list[type[Settings]] = [owner, PPOSettings, RunConfig]
    for model in dict.fromkeys(models):
        model.model_rebuild(force=True)


def import_plugins(modules: Sequence[str]) -> list[str]:
    """Import plugins, also from the working folder. Returns a problem, setting first, for each that cannot be imported."""
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # plugins, rewards and judges are looked for from here on
    problems = []
    for i, module in enumerate(modules):
        try:
            import_module(module)
        except ImportError as error:
            problems.append(f"plugins.{i}: cannot import {module!r}: {error}")
    return problems
