"""Reads a run's settings from YAML and the command line, and reports every problem with them."""

from __future__ import annotations

import difflib
import json
import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf, resolvers
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from configs.annotations import Kind, choices, describe_kind, kind_of, kind_of_child
from configs.extensions import import_plugins
from configs.renamed import OldNames
from configs.schema import RunConfig
from configs.yaml_values import (
    MAX_DEPTH,
    MAX_VALUES,
    PlainScalar,
    TreeTooLarge,
    accepts,
    convert,
    is_none,
    is_number,
    read_value,
    read_yaml,
    write_yaml,
)

_KEY = re.compile(r"\w[\w-]*(\.\w[\w-]*)*")
_ENVIRONMENT = (
    "settings are saved and shown, so they may not come from the environment; pass a value that is not secret on the "
    "command line: setting=$NAME"
)
_SHOWN_CHARACTERS = 60


class ConfigError(ValueError):
    """Invalid settings: one line for each problem, with its dotted path first."""

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(self.problems))


def load_config(
    source: str | Path | Mapping[str, Any], overrides: Sequence[str] = (), saved: bool = False
) -> RunConfig:
    """The settings in a YAML file, or in a mapping of the same form, with the overrides applied.

    An override `a.b=c` or `rewards.0.weight=c` replaces one value; c is a scalar as typed, or a list or mapping in YAML's flow
    style. `none`, `null` and an empty value mean none, unless they are quoted. Interpolations `${a.b}` are resolved;
    `${oc.env:NAME}` is refused: settings are saved and shown, and the environment holds secrets.

    Old names of settings (configs.renamed) become new ones, with a notice. saved: the file was written by `save_config`;
    its old names cause no notice.

    Raises:
        ConfigError: with all problems at once.
    """
    names = OldNames(notify=not saved)
    if isinstance(source, Mapping):
        given, where = dict(source), "settings"
    else:
        path = Path(source).expanduser()
        given, where = _read(path), str(path)
    tree = _tree(given, where, names)
    names.notify = True
    problems: dict[str, str] = {}
    with _environment_refused():
        for override in overrides:
            try:
                _apply(tree, override, names)
            except ConfigError as error:
                problems[override] = str(error)
        values = _Resolved(tree, problems)
    _rename_loss(values.tree, tell=not saved)
    if failed := import_plugins(_plugins(values.tree)):  # the check of the settings needs what they register
        raise ConfigError([*problems.values(), *failed])
    try:
        # Through JSON: only there pydantic's strict mode (no "3" for 3, no true for 1) accepts a list for a tuple.
        plain = convert(values.tree, kind_of(RunConfig))
        config = RunConfig.model_validate_json(json.dumps(plain, default=str), strict=True)
    except ValidationError as error:
        for details in error.errors():
            key, text = _problem(details, values)
            problems.setdefault(key, text)
    if problems:
        raise ConfigError(names.explained(key, text) for key, text in problems.items())
    return config


def _rename_loss(tree: dict[str, Any], tell: bool) -> None:
    """`ppo.policy_loss: NAME` and `ppo.clip_range: WIDTH` of earlier versions become `ppo.loss`, over what that holds."""
    ppo = tree.get("ppo")
    names = [name for name in ("policy_loss", "clip_range") if isinstance(ppo, dict) and name in ppo]
    if not (isinstance(ppo, dict) and names):
        return
    old = {name: value for name in names if (value := ppo.pop(name)) is not None}
    if tell:
        _warn_of(" and ".join(f"ppo.{name}" for name in names))
    given = ppo.get("loss") or {}
    loss = {"kind": given} if isinstance(given, str) else dict(given)
    if loss.get("kind") != old.get("policy_loss", loss.get("kind")):
        loss = {}
    loss.setdefault("kind", old.get("policy_loss", "ppo_clip"))
    if loss["kind"] == "ppo_clip" and "clip_range" in old:
        loss |= {"clip_low": old["clip_range"], "clip_high": old["clip_range"]}
    ppo["loss"] = loss


@cache
def _warn_of(names: str) -> None:
    logging.getLogger("troupe").warning("%s: now in ppo.loss: {kind: ..., clip_low: ..., clip_high: ...}", names)


def _plugins(tree: Any) -> list[str]:
    """The modules in `plugins`. Values that are not text are left to the check of the settings, which refuses them."""
    modules = tree.get("plugins") if isinstance(tree, dict) else None
    return [str(name) for name in modules if isinstance(name, str)] if isinstance(modules, list) else []


def save_config(config: RunConfig, path: str | Path) -> None:
    """Writes all settings, with defaults and without absent sections; `load_config` returns an equal config. The file is
    written whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # A section that a plugin added is unknown to a process without the plugin.
    values = {name: value for name, value in config.model_dump(mode="json").items() if value is not None}
    text = write_yaml(_escaped(values))
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _escaped(value: Any) -> Any:
    """The values with text that looks like an interpolation escaped, so that it is read back as text."""
    if isinstance(value, dict):
        return {key: _escaped(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_escaped(item) for item in value]
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value


# ---------------------------------------------------------------- file and overrides


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ConfigError([f"{path}: {'a folder, not a file' if path.is_dir() else 'no such file'}"])
    try:
        settings = read_yaml(path.read_bytes())
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError([f"{path}{line}: not YAML: {error.problem}"]) from None
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError([f"{path}: not YAML text: {getattr(error, 'reason', error)}"]) from None
    except (TreeTooLarge, RecursionError):
        raise ConfigError([f"{path}: nested too deeply, or has too many values"]) from None
    if settings is None or settings == {}:
        raise ConfigError([f"{path}: is empty; at least name and model are needed"])
    if not isinstance(settings, dict):
        raise ConfigError([f"{path}: was {_brief(settings)}; must be a mapping of settings"])
    return settings


def _tree(settings: dict[str, Any], where: str, names: OldNames) -> DictConfig:
    try:
        renamed = names.in_tree(settings)
    except ValueError as error:
        raise ConfigError([str(error)]) from None
    except RecursionError:
        raise ConfigError([f"{where}: nested too deeply"]) from None
    try:
        # With this flag the library keeps values of other types than its own, such as `PlainScalar`.
        return OmegaConf.create(renamed, flags={"allow_objects": True})
    except OmegaConfBaseException as error:
        raise ConfigError([f"{where}: {_first_line(error)}"]) from None
    except RecursionError:
        raise ConfigError([f"{where}: nested too deeply"]) from None


def _apply(tree: DictConfig, override: str, names: OldNames) -> None:
    key, equals, text = override.partition("=")
    if not equals or not _KEY.fullmatch(key):
        raise ConfigError([f"override {key}: must have the form a.b=value"])
    try:
        value = read_value(text)
    except yaml.YAMLError as error:
        reason = getattr(error, "problem", None) or _first_line(error)
        raise ConfigError([f"{key}: the override's value is not YAML: {reason}"]) from None
    except (TreeTooLarge, RecursionError):
        raise ConfigError([f"{key}: the override's value is nested too deeply, or has too many values"]) from None
    try:
        key, value = names.in_override(key, value)
    except ValueError as error:
        raise ConfigError([str(error)]) from None
    *parents, last = key.split(".")
    node: DictConfig | ListConfig = tree
    try:
        for depth, part in enumerate(parents):
            node = _enter(node, part, key, ".".join(parents[:depth]))
        node[_position(node, last, key, ".".join(parents))] = value
    except OmegaConfBaseException as error:
        raise ConfigError([f"{key}: {_first_line(error)}"]) from None


def _enter(node: DictConfig | ListConfig, part: str, key: str, where: str) -> DictConfig | ListConfig:
    """The container under `part`, created where there is none."""
    at = _position(node, part, key, where)
    if isinstance(node, DictConfig) and (at not in node or is_none(node[at])):
        node[at] = {}
    elif OmegaConf.is_interpolation(node, at):
        node[at] = node[at]  # a copy, so that the override does not change the interpolation's target
    child = node[at]
    if not isinstance(child, DictConfig | ListConfig):
        raise ConfigError([f"{key}: {f'{where}.{part}'.lstrip('.')} is a single value, so it has no settings below it"])
    return child


def _position(node: DictConfig | ListConfig, part: str, key: str, where: str) -> Any:
    """The key or the index that `part` means in a container."""
    if isinstance(node, DictConfig):
        return part
    if not part.isdecimal() or int(part) >= len(node):
        raise ConfigError([f"{key}: {where} is a list of {len(node)} and has no index {part}; indices start at 0"])
    return int(part)


@contextmanager
def _environment_refused() -> Iterator[None]:
    """While this is active, no form of interpolation can read the environment."""

    def refuse(*_: Any) -> None:
        raise ConfigError([_ENVIRONMENT])

    OmegaConf.register_resolver("oc.env", refuse, replace=True)
    try:
        yield
    finally:
        OmegaConf.register_resolver("oc.env", resolvers.oc.env, replace=True)


class _Resolved:
    """The plain values of a tree, and the interpolations that some of them came from."""

    def __init__(self, tree: DictConfig, problems: dict[str, str]) -> None:
        self.problems = problems
        self.origins: dict[str, str] = {}
        self._count = 0
        try:
            self.tree = self._container(tree, "")
        except (TreeTooLarge, RecursionError):
            text = "settings: too many values, nested too deeply, or circular interpolations"
            raise ConfigError([*problems.values(), text]) from None

    def _container(self, node: DictConfig | ListConfig, prefix: str) -> Any:
        self._count += len(node)
        if prefix.count(".") > MAX_DEPTH or self._count > MAX_VALUES:
            raise TreeTooLarge
        raw: Any = OmegaConf.to_container(node, resolve=False)
        if isinstance(node, ListConfig):
            return [self._item(node, index, raw[index], f"{prefix}{index}") for index in range(len(node))]
        keys: list[Any] = list(node)
        items = {str(key): self._item(node, key, raw[key], f"{prefix}{key}") for key in keys}
        return {key: value for key, value in items.items() if f"{prefix}{key}" not in self.problems}

    def _item(self, node: Any, key: Any, raw: Any, path: str) -> Any:
        if OmegaConf.is_missing(node, key):
            self.problems[path] = f"{path}: has no value (???)"
            return None
        if OmegaConf.is_interpolation(node, key):
            self.origins[path] = str(raw)
        try:
            value = node[key]
        except OmegaConfBaseException as error:
            reason = _first_line(error).removeprefix("ConfigError raised while resolving interpolation: ")
            if "oc.decode" in str(raw) and _ENVIRONMENT not in reason:
                reason = "cannot be decoded"  # the library's reason contains the whole text
            self.problems[path] = f"{path}: was {raw}: {reason}"
            return None
        return self._container(value, f"{path}.") if isinstance(value, DictConfig | ListConfig) else value

    def describe(self, path: str, value: Any) -> str:
        """A value for an error text; for an interpolation its expression, since the value is written elsewhere."""
        parts = path.split(".")
        for depth in range(len(parts), 0, -1):
            origin = self.origins.get(".".join(parts[:depth]))
            if origin:
                return f"set by {origin}"
        if any(origin.startswith(f"{path}.") for origin in self.origins):
            return "a list" if isinstance(value, list) else "a mapping"
        return _brief(value)


def _brief(value: Any) -> str:
    """A value for an error text, as typed."""
    text = "nothing" if value == "" and isinstance(value, PlainScalar) else _flow(value)
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}..."


def _flow(value: Any) -> str:
    """As JSON, but text that was typed without quotes has none here."""
    if isinstance(value, PlainScalar):
        return str(value)
    if isinstance(value, list):
        return f"[{', '.join(map(_flow, value))}]"
    if isinstance(value, dict):
        return (
            f"{{{', '.join(f'{json.dumps(key, ensure_ascii=False)}: {_flow(item)}' for key, item in value.items())}}}"
        )
    return json.dumps(value, ensure_ascii=False, default=str)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


# ---------------------------------------------------------------- validation errors


def _problem(details: ErrorDetails, values: _Resolved) -> tuple[str, str]:
    """Dotted path and text of one of pydantic's errors."""
    parts, parent, kind = _locate(details["loc"])
    path = ".".join(parts)
    match details["type"]:
        case "extra_forbidden":
            return path, f"{path}: no such setting; {_nearest(parts[-1], parent)}"
        case "value_error":
            return path, _from_validator(path, kind, str(details["ctx"]["error"]))
        case "union_tag_not_found":
            path = f"{path}.{kind.discriminator}"
            return path, f"{path}: missing; must be {' | '.join(kind.models)}"
        case "union_tag_invalid":
            path = f"{path}.{kind.discriminator}"
            tag = values.describe(path, _at(values.tree, path.split("."), details["ctx"]["tag"]))
            return path, f"{path}: was {tag}; must be {' | '.join(kind.models)}"
        case "missing":
            return path, f"{path}: missing; must be {_allowed(kind)}"
        case _ if details["loc"][-1:] == ("[key]",):
            keys = choices(kind_of(kind.core.__args__[0]))
            path = f"{path}.{details['input']}"
            return path, f"{path}: no such key; {_suggestion(str(details['input']), keys)}"
    value = _at(values.tree, parts, details["input"])
    return path, f"{path}: was {values.describe(path, value)}; must be {_allowed(kind)}{_hint(value, kind)}"


def _hint(value: Any, kind: Kind) -> str:
    """How to write the value, where only its notation is wrong."""
    numeric = accepts(kind, int, float)
    if numeric and isinstance(value, PlainScalar) and value.ambiguous:
        return f", in plain decimal digits (YAML reads {value} as {value.value})"
    if numeric and type(value) is str and is_number(value):
        return "; write numbers without quotes"
    not_text = (
        value != "" and is_none(value) if isinstance(value, PlainScalar) else isinstance(value, bool | int | float)
    )
    return "; quote it if it is text" if not_text and accepts(kind, str) else ""


def _locate(location: tuple[str | int, ...]) -> tuple[list[str], Kind, Kind]:
    """(parts of the dotted path, kind of the parent, kind of the setting) of an error.

    Pydantic's locations contain names of union members; following the annotations separates them from keys. For a union
    without a discriminator pydantic reports an error of each member: the location is then the union itself.
    """
    parts: list[str] = []
    parent = kind = kind_of(RunConfig)
    steps = list(location)
    if steps[-1:] == ["[key]"]:
        steps = steps[:-2]
    for step in steps:
        if kind.discriminator:
            kind = kind_of(kind.models[str(step)])
            continue
        if len(kind.members) > 1:
            break
        parts.append(str(step))
        parent, child = kind, kind_of_child(kind, step)
        if child is None:
            break
        kind = child
    return parts, parent, kind


def _at(tree: Any, parts: Sequence[str], otherwise: Any) -> Any:
    """otherwise: for what is not written there but in a shorter form."""
    for part in parts:
        if not isinstance(tree, list) and not (isinstance(tree, dict) and part in tree):
            return otherwise
        tree = tree[int(part)] if isinstance(tree, list) else tree[part]
    return tree


def _from_validator(path: str, kind: Kind, text: str) -> str:
    """A validator that checks several settings starts its text with the name of the setting to change."""
    name = text.partition(":")[0].partition(".")[0]
    own = kind.model is not None and name in kind.model.model_fields
    return f"{path}.{text}".lstrip(".") if own else f"{path}: {text}".removeprefix(": ")


def _allowed(kind: Kind) -> str:
    if not kind.model:
        return describe_kind(kind)
    return f"settings ({', '.join(kind.model.model_fields)}){' or none' if kind.optional else ''}"


def _nearest(name: str, parent: Kind) -> str:
    from configs.reference import describe  # needed only for an error

    names = list(parent.model.model_fields) if parent.model else []
    if not difflib.get_close_matches(name, names, n=1):
        elsewhere = [setting.path for setting in describe() if setting.path.rpartition(".")[2] == name]
        if len(elsewhere) == 1:
            return f"did you mean {elsewhere[0]}?"
    return _suggestion(name, names)


def _suggestion(name: str, names: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, names, n=1)
    return f"did you mean {close[0]}?" if close else f"there are {', '.join(names)}"
