"""YAML read so that no text is lost: a plain scalar that YAML takes for a number, a truth value or none keeps its text.

Which of the two a setting gets depends on what the setting may be (`fitted`): of `0123` a name gets the text, of `10` a number of
steps gets the number. Only what is quoted is text for every setting.
"""

from __future__ import annotations

import json
import re
from typing import Any, Self, get_origin

import yaml
from yaml.constructor import ConstructorError

from configs.annotations import Kind, choices, kind_of, kind_of_child

DEEPEST = 30
"""Levels of a tree of settings, at most."""
MOST = 10_000
"""Values in a tree of settings, at most."""

_TAG = "tag:yaml.org,2002:"
_TEXT, _NONE, _INTEGER, _FLOAT, _MERGE = (_TAG + name for name in ("str", "null", "int", "float", "merge"))


class TooMuch(Exception):
    """A value lies deeper than any setting, or there are more than any run has: aliases or interpolations lead back to where they
    stand, or each stands for several."""


class Typed(str):
    """A plain scalar that YAML takes for a number, a truth value or none. As text it is what was typed."""

    value: int | float | bool | None
    """What YAML takes it for."""

    def __new__(cls, text: str, value: int | float | bool | None) -> Self:
        made = super().__new__(cls, text)
        made.value = value
        return made

    def __getnewargs__(self) -> tuple[str, Any]:  # type: ignore[override]  # copies keep the value
        return str(self), self.value

    @property
    def misread(self) -> bool:
        """Whether people read these digits otherwise than YAML 1.1, in which 010 is octal, and 1:30 is 90."""
        if isinstance(self.value, bool) or self.value is None:
            return False
        digits = self.lstrip("+-").replace("_", "")
        return ":" in self or (digits.isdecimal() and digits[0] == "0" and len(digits.lstrip("0")) > 1)


def is_none(value: Any) -> bool:
    """Whether a value stands for none: `none`, `null`, `~` or nothing, none of them quoted."""
    return value is None or (isinstance(value, Typed) and value.value is None)


def is_number(text: str) -> bool:
    """Whether text would be a number if it were not quoted."""
    return _plain_tag(text) in (_INTEGER, _FLOAT)


# ---------------------------------------------------------------- YAML


class _Loader(yaml.SafeLoader):
    """YAML 1.1 with `none` beside `null`, numbers such as 1e-4, and no dates."""


class _Dumper(yaml.SafeDumper):
    """Quotes what `_Loader` would take for something else than text."""


for _either in (_Loader, _Dumper):
    _either.add_implicit_resolver(_NONE, re.compile("^(?:none|None|NONE)$"), ["n", "N"])
    _either.add_implicit_resolver(
        _FLOAT,
        re.compile(r"^[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9][0-9_]*)[eE][-+]?[0-9]+$"),
        list("-+.0123456789"),
    )
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != f"{_TAG}timestamp"]
    for first, resolvers in _Loader.yaml_implicit_resolvers.items()
}


def read_yaml(source: bytes | str) -> Any:
    """The only document of a YAML text, as dicts with text as keys, lists, text and `Typed`; None where it is empty.

    Raises:
        yaml.YAMLError: it is not YAML, or holds a tag that settings have no use for, or a key twice.
        TooMuch: it is nested too deeply, or its aliases stand for too many values.
        RecursionError: it is nested more deeply still.
    """
    loader = _Loader(source)
    try:
        node = loader.get_single_node()
        return None if node is None else _Builder(loader).build(node, 0)
    finally:
        loader.dispose()


def read_value(text: str) -> Any:
    """What stands behind `a.b=` on the command line: a list, a mapping or quoted text in YAML; else the scalar as it was typed,
    whatever signs are in it. Errors: see read_yaml."""
    text = text.strip()
    if text.startswith(("[", "{", "'", '"')):
        return read_yaml(text)
    loader = _Loader(text)
    return _Builder(loader).scalar(yaml.ScalarNode(_plain_tag(text), text))


def _plain_tag(text: str) -> str:
    return str(_Loader("").resolve(yaml.ScalarNode, text, (True, False)))


def write_yaml(tree: Any) -> str:
    """Plain values as YAML that `read_yaml` reads as the same."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1000)


class _Builder:
    """Makes values of YAML's nodes. Aliases are counted as often as they are used."""

    def __init__(self, loader: _Loader) -> None:
        self.loader = loader
        self.count = 0

    def build(self, node: yaml.Node, depth: int) -> Any:
        self.count += 1
        if depth > DEEPEST or self.count > MOST:
            raise TooMuch
        if isinstance(node, yaml.ScalarNode):
            return self.scalar(node)
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, depth)
        return [self.build(item, depth + 1) for item in node.value]

    def scalar(self, node: yaml.ScalarNode) -> str:
        make = {
            "null": self.loader.construct_yaml_null,
            "bool": self.loader.construct_yaml_bool,
            "int": self.loader.construct_yaml_int,
            "float": self.loader.construct_yaml_float,
        }.get(node.tag.removeprefix(_TAG))
        if make is None:
            if node.tag not in (_TEXT, _MERGE, f"{_TAG}value"):
                raise ConstructorError(None, None, f"unknown tag {node.tag.replace(_TAG, '!!')}", node.start_mark)
            return str(node.value)
        try:
            value = make(node)
            json.dumps(value)  # a number may be too long for that
        except (ValueError, LookupError):  # the text does not fit the tag
            return str(node.value)
        return Typed(node.value, value)

    def _mapping(self, node: yaml.MappingNode, depth: int) -> dict[str, Any]:
        merged: dict[str, Any] = {}
        own: dict[str, Any] = {}
        for key, item in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise ConstructorError(None, None, "a key must be text", key.start_mark)
            value = self.build(item, depth + 1)
            if key.tag == _MERGE:
                for mapping in reversed(value if isinstance(value, list) else [value]):
                    if not isinstance(mapping, dict):
                        raise ConstructorError(None, None, "<< must be followed by a mapping", item.start_mark)
                    merged |= mapping
            elif str(key.value) in own:
                raise ConstructorError(None, None, f"found duplicate key {key.value}", key.start_mark)
            else:
                own[str(key.value)] = value
        return merged | own


# ---------------------------------------------------------------- what settings get


def fitted(value: Any, kind: Kind | None) -> Any:
    """A tree in which each `Typed` is what its setting can use: a number, a truth value, none, or the text. Where none of these
    fits it is the text, which is then refused. kind: what may stand there; None: nothing that is known."""
    if isinstance(value, dict):
        kind = _with_keys(kind, value)
        return {key: fitted(item, kind_of_child(kind, key) if kind else None) for key, item in value.items()}
    if isinstance(value, list):
        kind = _with_items(kind)
        return [fitted(item, kind_of_child(kind, index) if kind else None) for index, item in enumerate(value)]
    return _fitted_scalar(value, kind) if isinstance(value, Typed) else value


def takes(kind: Kind, *types: type) -> bool:
    """Whether values of one of these types may stand there."""
    return any(kind_of(member).core in types for member in kind.members)


def _fitted_scalar(typed: Typed, kind: Kind | None) -> int | float | bool | str | None:
    if kind is None:
        return typed.value
    if any(str(typed) in choices(kind_of(member)) for member in kind.members):
        return str(typed)
    value = typed.value
    fits = {bool: takes(kind, bool), int: takes(kind, int, float), float: takes(kind, float)}
    return value if value is None or (fits[type(value)] and not typed.misread) else str(typed)


def _with_keys(kind: Kind | None, value: dict[str, Any]) -> Kind | None:
    """The member of a union that a mapping is."""
    if kind and kind.discriminator:
        chosen = kind.models.get(str(value.get(kind.discriminator)))
        return kind_of(chosen) if chosen else None
    return kind


def _with_items(kind: Kind | None) -> Kind | None:
    """The member of a union that a list is."""
    members = [kind_of(member) for member in kind.members] if kind else []
    return next((member for member in members if get_origin(member.core) in (list, tuple)), kind)
