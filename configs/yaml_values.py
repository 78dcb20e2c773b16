"""Reads YAML without losing text: a plain scalar that YAML reads as a number, a truth value or none also keeps its text.

The type of the setting decides which of the two it gets (`convert`): from `0123` a name gets the text, from `10` a number of
steps gets the number. Only quoted text is text for every setting.
"""

from __future__ import annotations

import json
import re
from typing import Any, Self, get_origin

import yaml
from yaml.constructor import ConstructorError

from configs.annotations import Kind, choices, kind_of, kind_of_child

MAX_DEPTH = 30
"""Most levels of a tree of settings."""
MAX_VALUES = 10_000
"""Most values in a tree of settings."""

_TAG = "tag:yaml.org,2002:"
_TEXT, _NONE, _INTEGER, _FLOAT, _MERGE = (_TAG + name for name in ("str", "null", "int", "float", "merge"))


class TreeTooLarge(Exception):
    """A tree is deeper or has more values than any run's settings: aliases or interpolations are circular, or multiply."""


class PlainScalar(str):
    """A plain scalar that YAML reads as a number, a truth value or none. Its text is what was typed."""

    value: int | float | bool | None
    """The value that YAML reads."""

    def __new__(cls, text: str, value: int | float | bool | None) -> Self:
        scalar = super().__new__(cls, text)
        scalar.value = value
        return scalar

    def __getnewargs__(self) -> tuple[str, Any]:  # type: ignore[override]  # so that copies keep the value
        return str(self), self.value

    @property
    def ambiguous(self) -> bool:
        """Whether people read these digits differently from YAML 1.1, in which 010 is octal and 1:30 is 90."""
        if isinstance(self.value, bool) or self.value is None:
            return False
        digits = self.lstrip("+-").replace("_", "")
        return ":" in self or (digits.isdecimal() and digits[0] == "0" and len(digits.lstrip("0")) > 1)


def is_none(value: Any) -> bool:
    """Whether a value means none: an unquoted `none`, `null`, `~` or nothing."""
    return value is None or (isinstance(value, PlainScalar) and value.value is None)


def is_number(text: str) -> bool:
    """Whether text would be a number without its quotes."""
    return _plain_tag(text) in (_INTEGER, _FLOAT)


# ---------------------------------------------------------------- YAML


class _Loader(yaml.SafeLoader):
    """YAML 1.1 with `none` beside `null`, numbers such as 1e-4, and no dates."""


class _Dumper(yaml.SafeDumper):
    """Quotes text that `_Loader` would not read as text."""


for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver(_NONE, re.compile("^(?:none|None|NONE)$"), ["n", "N"])
    _class.add_implicit_resolver(
        _FLOAT,
        re.compile(r"^[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9][0-9_]*)[eE][-+]?[0-9]+$"),
        list("-+.0123456789"),
    )
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != f"{_TAG}timestamp"]
    for first, resolvers in _Loader.yaml_implicit_resolvers.items()
}


def read_yaml(source: bytes | str) -> Any:
    """The single document of a YAML text: dicts with text keys, lists, text and `PlainScalar`; None where it is empty.

    Raises:
        yaml.YAMLError: it is not YAML, or has a tag that settings do not use, or a duplicate key.
        TreeTooLarge: it is nested too deeply, or its aliases expand to too many values.
        RecursionError: it is nested even more deeply.
    """
    loader = _Loader(source)
    try:
        node = loader.get_single_node()
        return None if node is None else _Builder(loader).build(node, 0)
    finally:
        loader.dispose()


def read_value(text: str) -> Any:
    """The value after `a.b=` on the command line: a list, a mapping or quoted text is read as YAML; any other text is one scalar
    as typed, whatever characters it has. Errors: see read_yaml."""
    text = text.strip()
    if text.startswith(("[", "{", "'", '"')):
        return read_yaml(text)
    loader = _Loader(text)
    return _Builder(loader).scalar(yaml.ScalarNode(_plain_tag(text), text))


def _plain_tag(text: str) -> str:
    return str(_Loader("").resolve(yaml.ScalarNode, text, (True, False)))


def write_yaml(tree: Any) -> str:
    """Plain values as YAML text that `read_yaml` reads back unchanged."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1000)


class _Builder:
    """Builds values from YAML nodes. An alias counts each time it is used."""

    def __init__(self, loader: _Loader) -> None:
        self.loader = loader
        self.count = 0

    def build(self, node: yaml.Node, depth: int) -> Any:
        self.count += 1
        if depth > MAX_DEPTH or self.count > MAX_VALUES:
            raise TreeTooLarge
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
            json.dumps(value)  # fails where a number has too many digits
        except (ValueError, LookupError):  # the text does not match the tag
            return str(node.value)
        return PlainScalar(node.value, value)

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


# ---------------------------------------------------------------- conversion to settings


def convert(value: Any, kind: Kind | None) -> Any:
    """The tree with each `PlainScalar` replaced by the value that its setting accepts: a number, a truth value, none or text.

    Where none of these fits it becomes text, which validation then refuses. kind: the setting's type, None where unknown.
    """
    if isinstance(value, dict):
        kind = _with_keys(kind, value)
        return {key: convert(item, kind_of_child(kind, key) if kind else None) for key, item in value.items()}
    if isinstance(value, list):
        kind = _with_items(kind)
        return [convert(item, kind_of_child(kind, index) if kind else None) for index, item in enumerate(value)]
    return _convert_scalar(value, kind) if isinstance(value, PlainScalar) else value


def accepts(kind: Kind, *types: type) -> bool:
    """Whether the setting may have values of one of these types."""
    return any(kind_of(member).core in types for member in kind.members)


def _convert_scalar(typed: PlainScalar, kind: Kind | None) -> int | float | bool | str | None:
    if kind is None:
        return typed.value
    if any(str(typed) in choices(kind_of(member)) for member in kind.members):
        return str(typed)
    value = typed.value
    fits = {bool: accepts(kind, bool), int: accepts(kind, int, float), float: accepts(kind, float)}
    return value if value is None or (fits[type(value)] and not typed.ambiguous) else str(typed)


def _with_keys(kind: Kind | None, value: dict[str, Any]) -> Kind | None:
    """The member of a union that a mapping selects."""
    if kind and kind.discriminator:
        chosen = kind.models.get(str(value.get(kind.discriminator)))
        return kind_of(chosen) if chosen else None
    return kind


def _with_items(kind: Kind | None) -> Kind | None:
    """The member of a union that accepts a list."""
    members = [kind_of(member) for member in kind.members] if kind else []
    return next((member for member in members if get_origin(member.core) in (list, tuple)), kind)
