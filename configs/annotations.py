"""What a setting may be: type annotations taken apart and put into words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic import BaseModel
from pydantic.fields import FieldInfo

_WORDS: Mapping[Any, str] = {bool: "true | false", int: "integer", float: "number", str: "text"}


@dataclass(frozen=True)
class Called:
    """In an annotation: what its values are called, in place of `text` and of the pattern that it matches."""

    words: str


@dataclass(frozen=True)
class Kind:
    """One annotation, without `Annotated` and `None`."""

    core: Any
    """A class, a `Literal` or a generic such as `list[int]`; of a union, its first member."""
    members: tuple[Any, ...]
    """The annotations of a union's members, or the core alone."""
    constraints: tuple[Any, ...] = ()
    """What `Annotated` and `Field` ask for: Gt, MinLen, a pattern ..."""
    discriminator: str | None = None
    """Name of the field that tells a union's members apart."""
    optional: bool = False
    """None is allowed."""

    @property
    def model(self) -> type[BaseModel] | None:
        """The settings that this is, if it is settings and no choice of several."""
        single = len(self.members) == 1 and isinstance(self.core, type) and issubclass(self.core, BaseModel)
        return self.core if single else None

    @property
    def models(self) -> dict[str, type[BaseModel]]:
        """Of a discriminated union: the value of the discriminator -> settings."""
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
    """What stands under a key or an index; None where nothing can."""
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


def in_words(kind: Kind) -> str:
    """For example `integer > 0 or none`."""
    if kind.discriminator:
        text = f"settings with {kind.discriminator}: {' | '.join(kind.models)}"
    elif len(kind.members) > 1:
        text = " or ".join(in_words(kind_of(member)) for member in kind.members)
    else:
        text = _core_in_words(kind)
    return text + (" or none" if kind.optional else "")


def _core_in_words(kind: Kind) -> str:
    arguments = get_args(kind.core)
    if kind.model:
        text = "settings"
    elif kind.core in _WORDS:
        called = [note.words for note in kind.constraints if isinstance(note, Called)]
        if called:
            return called[0]
        text = _WORDS[kind.core]
    elif get_origin(kind.core) is list:
        least = "".join(f"at least {note.min_length} " for note in kind.constraints if isinstance(note, MinLen))
        text = f"list of {least}{in_words(kind_of(arguments[0]))}"
    elif get_origin(kind.core) is tuple:
        text = f"[{', '.join(in_words(kind_of(argument)) for argument in arguments)}]"
    elif get_origin(kind.core) is dict:
        text = f"mapping of {' | '.join(choices(kind_of(arguments[0]))) or 'text'} to {in_words(kind_of(arguments[1]))}"
    else:
        text = " | ".join(choices(kind))
    bounds = " and ".join(filter(None, map(_constraint_in_words, kind.constraints)))
    return f"{text} {bounds}".rstrip()


def _constraint_in_words(constraint: Any) -> str:
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
