"""Settings of plugins: new kinds of a component, and sections for their own stages.

A plugin's settings behave like all others: they are checked at loading, with the same error texts, and saved with the run.
Importing the module registers them; the setting `plugins` lists the modules.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self, TypeVar, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from configs.annotations import choices, kind_of_child, kind_of_field
from configs.schema import PPOSettings, RunConfig, Settings

S = TypeVar("S", bound=type[Settings])


def settings_kind(owner: type[Settings], field: str) -> Callable[[S], S]:
    """Decorator: allows a class of settings as a value of `owner.field`, or of its items, chosen by the class's `kind`.

    Raises ValueError where another class has the same kind.
    """

    def add(settings: S) -> S:
        info, (kind,) = owner.model_fields[field], choices(kind_of_field(settings, "kind"))
        held = kind_of_field(owner, field)
        registered = (kind_of_child(held, 0) or held).models.get(kind)
        if registered is not None and registered.__module__ != settings.__module__:
            owner_name = f"{registered.__module__}.{registered.__qualname__}"
            raise ValueError(f"{field}: the kind {kind!r} is already used by {owner_name}")
        if registered is None:
            info.annotation = _with_member(info.annotation, settings)
            _rebuild(owner)
        return settings

    return add


class Component:
    """Base of what a setting chooses by `kind`: losses, advantages, loggers. A subclass with a `Config`, its settings, is
    registered by being defined:

        class MyLoss(PolicyLoss):
            class Config(Settings):
                kind: Literal["my_loss"] = "my_loss"

    Outside of this repository, the setting `plugins` names the module.
    """

    Config: ClassVar[type[Settings]]
    owner: ClassVar[type[Settings]]
    setting: ClassVar[str]
    """Field of `owner` that chooses among the components, or lists some."""
    kinds: ClassVar[dict[str, type[Any]]]
    """Kind -> component, of one family of components."""

    def __init_subclass__(cls, owner: type[Settings] | None = None, setting: str = "") -> None:
        """owner, setting: of the base class of a family. Raises ValueError where another component has the kind."""
        super().__init_subclass__()
        if owner is not None:
            cls.owner, cls.setting, cls.kinds = owner, setting, {}
        elif "Config" in vars(cls):
            settings_kind(cls.owner, cls.setting)(cls.Config)
            for kind in choices(kind_of_field(cls.Config, "kind")):
                cls.kinds[kind] = cls

    def __init__(self, config: Any) -> None:
        self.config = config

    @classmethod
    def of(cls, config: Any, *args: Any) -> Self:
        """The component that the settings are of. args: what it takes beside them."""
        component: Self = cls.kinds[config.kind](config, *args)
        return component


def add_section(name: str, settings: type[Settings]) -> None:
    """Add an optional section `name` with these settings to RunConfig. Raises ValueError where the name is already used."""
    existing = RunConfig.model_fields.get(name)
    if existing is not None and settings.__module__ not in str(existing.annotation):
        raise ValueError(f"{name}: a setting with this name exists already")
    description = (settings.__doc__ or name).strip().partition("\n")[0]
    annotation = _union(settings, None)
    RunConfig.model_fields[name] = FieldInfo(annotation=annotation, default=None, description=description)
    RunConfig.__annotations__[name] = annotation
    _rebuild(RunConfig)


def _with_member(annotation: Any, member: type[Settings]) -> Any:
    """The annotation of a union, or of a list of a union, with one more member."""
    if get_origin(annotation) is list:
        (item,) = get_args(annotation)
        return list[_with_member(item, member)]  # type: ignore[misc]  # a value, not a type
    if get_origin(annotation) is Annotated:
        union, *notes = get_args(annotation)
        return Annotated[(_union(union, member), *notes)]
    return _union(annotation, member)


def _union(*members: Any) -> Any:
    return Union[members]  # noqa: UP007  a value, not an annotation


def _rebuild(owner: type[Settings]) -> None:
    """Rebuild the validators: pydantic builds each once, and the models that contain `owner` hold a copy of its validator."""
    models: list[type[Settings]] = [owner, PPOSettings, RunConfig]
    for model in dict.fromkeys(models):
        model.model_rebuild(force=True)


def search_working_folder() -> None:
    """Let Python find modules of the working folder: plugins, rewards and judges."""
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())


def import_plugins(modules: Sequence[str]) -> list[str]:
    """Import plugins, also from the working folder. Returns a problem, setting first, for each that cannot be imported."""
    search_working_folder()
    problems = []
    for i, module in enumerate(modules):
        setting = f"plugins.{i}"
        if problem := hidden_module(module, setting):
            problems.append(problem)
            continue
        try:
            import_module(module)
        except ImportError as error:
            problems.append(f"{setting}: cannot import {module!r}: {error}")
    return problems


def hidden_module(name: str, setting: str) -> str | None:
    """The problem with a module of the working folder for which Python imports another module of that name; None: there is none.

    name: a module, or module:function.
    """
    module = name.partition(":")[0]
    top = module.partition(".")[0]
    cwd = Path.cwd()
    file = cwd.joinpath(*module.split("."))
    if not (file.is_dir() or file.with_name(f"{file.name}.py").is_file()):
        return None
    spec = find_spec(top)
    origins = [*(spec.submodule_search_locations or []), spec.origin] if spec else []
    imported = [Path(origin).resolve() for origin in origins if origin]
    if not imported or {cwd / top, cwd / f"{top}.py"} & set(imported):
        return None
    hidden = f"{top}/" if (cwd / top).is_dir() else f"{top}.py"
    return f"{setting}: was {name!r}, but {hidden} in {cwd} is hidden by {imported[0]}, which has the same name; rename yours"
