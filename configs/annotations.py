"""Type annotations of settings: parsed into a `Kind`, and described as text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic import BaseModel
from pydantic.fields import FieldInfo

_TYPE_NAMES: Mapping[Any, str] = {bool: "true | false", int: "integer", float: "number", str: "text"}


@dataclass(frozen=True)
class DisplayName:
    """In an annotation: the name of its values in texts, instead of `text` and the pattern that they match."""

    name: str


@dataclass(frozen=True)
class Kind:
    """One annotation, without `Annotated` and `None`."""

    core: Any
    """A class, a `Literal` or a generic such as `list[int]`; of a union, its first member."""
    members: tuple[Any, ...]
    """The annotations of a union's members, or the core alone."""
    constraints: tuple[Any, ...] = ()
    """Constraints in `Annotated` and `Field`: Gt, MinLen, a pattern ..."""
    discriminator: str | None = None
    """Name of the field that selects a union's member."""
    optional: bool = False
    """None is allowed."""

    @property
    def model(self) -> type[BaseModel] | None:
        """The settings class, if this is exactly one."""
        single = len(self.members) == 1 and isinstance(self.core, type) and issubclass(self.core, BaseModel)
        return self.core if single else None

    @property
    def models(self) -> dict[str, type[BaseModel]]:
        """For a discriminated union: value of the discriminator -> settings class."""
        if not self.discriminator:
            return {}
        return {
            tag: member for member in self.members for tag in choices(kind_of_field(member, self.discriminator)) or ()
        }


def kind_of(annotation: Any) -> Kind:
    constraints: list[Any] = []
    discriminator: str | None = None
    while get_origin(annotation) is Annotated:
        annotation, *notes = get_args(annotation)
        for note in notes:
            if isinstance(note, FieldInfo):
                constraints += note.metadata
                discriminator = discriminator or note.discriminator  # type: ignore[assignment]
            else:
                constraints.append(note)
    members: tuple[Any, ...] = (annotation,)
    optional = False
    if get_origin(annotation) in (Union, UnionType):
        optional = NoneType in get_args(annotation)
        members = tuple(member for member in get_args(annotation) if member is not NoneType)
        if len(members) == 1:
            only = kind_of(members[0])
            return replace(only, constraints=(*constraints, *only.constraints), optional=True)
    return Kind(members[0], members, tuple(constraints), discriminator, optional)


def kind_of_field(model: type[BaseModel], name: str) -> Kind:
    field = model.model_fields[name]
    return kind_of(Annotated[field.annotation, field])


def kind_of_child(kind: Kind, key: str | int) -> Kind | None:
    """The kind of the value under a key or an index; None where there can be none."""
    if kind.model:
        return kind_of_field(kind.model, str(key)) if key in kind.model.model_fields else None
    arguments = get_args(kind.core)
    match get_origin(kind.core):
        case origin if origin is list:
            return kind_of(arguments[0])
        case origin if origin is dict:
            return kind_of(arguments[1])
        case origin if origin is tuple and isinstance(key, int) and key < len(arguments):
            return kind_of(arguments[key])
    return None


def choices(kind: Kind) -> tuple[str, ...]:
    """The values of a Literal."""
    return tuple(map(str, get_args(kind.core))) if get_origin(kind.core) is Literal else ()


def describe_kind(kind: Kind) -> str:
    """The allowed values as text, for example `integer > 0 or none`."""
    if kind.discriminator:
        text = f"settings with {kind.discriminator}: {' | '.join(kind.models)}"
    elif len(kind.members) > 1:
        text = " or ".join(describe_kind(kind_of(member)) for member in kind.members)
    else:
        text = _describe_core(kind)
    return text + (" or none" if kind.optional else "")


def _describe_core(kind: Kind) -> str:
    arguments = get_args(kind.core)
    if kind.model:
        text = "settings"
    elif kind.core in _TYPE_NAMES:
        names = [note.name for note in kind.constraints if isinstance(note, DisplayName)]
        if names:
            return names[0]
        text = _TYPE_NAMES[kind.core]
    elif get_origin(kind.core) is list:
        least = "".join(f"at least {note.min_length} " for note in kind.constraints if isinstance(note, MinLen))
        text = f"list of {least}{describe_kind(kind_of(arguments[0]))}"
    elif get_origin(kind.core) is tuple:
        text = f"[{', '.join(describe_kind(kind_of(argument)) for argument in arguments)}]"
    elif get_origin(kind.core) is dict:
        text = f"mapping of {' | '.join(choices(kind_of(arguments[0]))) or 'text'} to {describe_kind(kind_of(arguments[1]))}"
    else:
        text = " | ".join(choices(kind))
    bounds = " and ".join(filter(None, map(_describe_constraint, kind.constraints)))
    return f"{text} {bounds}".rstrip()


def _describe_constraint(constraint: Any) -> str:
    match constraint:
        case Gt(gt):
            return f"> {gt:g}"
        case Ge(ge):
            return f">= {ge:g}"
        case Lt(lt):
            return f"< {lt:g}" if isinstance(lt, float) else f"< {lt}"
        case Le(le):
            return f"<= {le:g}"
    pattern = getattr(constraint, "pattern", None)
    return f"matching {pattern}" if pattern else ""
