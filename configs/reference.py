"""The reference of all settings, generated from the schema: `python -m configs.reference > docs/settings.md`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from configs.annotations import Kind, describe_kind, kind_of, kind_of_field
from configs.schema import RunConfig


@dataclass(frozen=True)
class Setting:
    """One line of the reference."""

    path: str
    """Dotted; `[]` means any index."""
    type: str
    """Its allowed values as text."""
    default: str
    """As YAML, `required`, `none`, or `below` for a section whose settings have their own defaults."""
    meaning: str
    when: str = ""
    """The kinds that have this setting, where not all have it: `kind: function`."""


def describe() -> list[Setting]:
    """All settings in the schema's order, a section before its settings."""
    return list(_settings(RunConfig, ""))


def settings_markdown() -> str:
    """docs/settings.md."""
    lines = [
        "# Settings",
        "",
        "All settings of a run, generated from configs/schema/ by `python -m configs.reference > docs/settings.md`.",
        "On the command line `path=value` sets one of them, for example `ppo.steps=20`. An item of a list (`[]` below)",
        "is set by its index: `ppo.rewards.0.weight=2`. In the file and in values `${other.path}` means the value of",
        "another setting.",
        "",
        "`none`, `null` and an empty value mean none, in the file and on the command line; quote them to mean text. Other",
        "text is used as typed: `name=0123` needs no quotes. Lists and mappings are written in YAML:",
        "`placement.devices={actor: 2}`. In paths `~` is the home folder of the user who starts the run.",
        "",
        *_table(setting for setting in describe() if "." not in setting.path and "[" not in setting.path),
    ]
    nested = (setting for setting in describe() if "." in setting.path or "[" in setting.path)
    for name, settings in groupby(nested, key=lambda setting: setting.path.partition(".")[0]):
        lines += ["", f"## {name}", "", *_table(settings)]
    return "\n".join(lines) + "\n"


def _table(settings: Iterator[Setting]) -> Iterator[str]:
    yield "| Setting | Allowed values | Default | Meaning |"
    yield "| --- | --- | --- | --- |"
    for setting in settings:
        meaning = f"({setting.when}) {setting.meaning}" if setting.when else setting.meaning
        default = setting.default if setting.default in ("required", "none", "below") else f"`{setting.default}`"
        cells = (f"`{setting.path}`", setting.type, default, meaning)
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _settings(model: type[BaseModel], prefix: str) -> Iterator[Setting]:
    for name, field in model.model_fields.items():
        kind = kind_of_field(model, name)
        path = f"{prefix}{name}"
        yield Setting(path, describe_kind(kind), _default(field), " ".join((field.description or "").split()))
        yield from _below(kind, path)


def _below(kind: Kind, path: str) -> Iterator[Setting]:
    if kind.model:
        yield from _settings(kind.model, f"{path}.")
    elif kind.discriminator:
        yield from _choice(kind, f"{path}.")
    elif get_origin(kind.core) is list:
        yield from _below(kind_of(get_args(kind.core)[0]), f"{path}[]")


def _choice(kind: Kind, prefix: str) -> Iterator[Setting]:
    """The settings of a discriminated union's members; settings that several members share are listed once."""
    tag = f"{prefix}{kind.discriminator}"
    meanings = "; ".join(f"{name}: {_summary(model)}" for name, model in kind.models.items())
    yield Setting(tag, " | ".join(kind.models), "required", meanings)
    members = {name: list(_settings(model, prefix)) for name, model in kind.models.items()}
    listed: set[Setting] = set()
    for settings in members.values():
        for setting in settings:
            if setting.path == tag or setting in listed:
                continue
            listed.add(setting)
            names = [name for name, own in members.items() if setting in own]
            shared = len(names) == len(members)
            yield setting if shared else replace(setting, when=f"{kind.discriminator}: {', '.join(names)}")


def _summary(model: type[BaseModel]) -> str:
    return (model.__doc__ or model.__name__).strip().partition("\n")[0].rstrip(".")


def _default(field: FieldInfo) -> str:
    value: Any = field.default
    if field.is_required():
        return "required"
    if value is None:
        return "none"
    if isinstance(value, BaseModel) and not field.discriminator:
        return "below"
    if isinstance(value, str):
        return value
    return json.dumps(value, default=lambda model: model.model_dump(exclude_none=True))


if __name__ == "__main__":
    print(settings_markdown(), end="")
