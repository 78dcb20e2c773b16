"""Settings that have a new name. The old one is understood for one release, with a line of notice."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any


@dataclass(frozen=True)
class Renamed:
    """A setting or a section under its old and its new path, dotted, `[]` for an index. `[]` stands in both or in neither, and
    what comes before it is the same in both."""

    old: str
    new: str
    value: Callable[[Any], Any] = lambda value: value
    """Old value -> new value. Where it alone is new, `old` and `new` are equal. Scalars come as text."""


OPTIMIZERS = ("sft.optimizer", "rm.optimizer", "ppo.actor_optimizer", "ppo.critic_optimizer")
RENAMED: tuple[Renamed, ...] = (
    Renamed("share", "shared_base"),
    Renamed("publish", "weight_sync"),
    Renamed("deadlines.publish", "deadlines.weight_sync"),
    Renamed("deadlines.first", "deadlines.initial_timeout"),
    Renamed("deadlines.least", "deadlines.min_timeout"),
    Renamed("deadlines.patience", "deadlines.timeout_factor"),
    Renamed("recovery.restarts", "recovery.max_restarts"),
    Renamed("recovery.window", "recovery.restart_window"),
    Renamed("recovery.grace", "recovery.stop_grace"),
    Renamed("recovery.refused_steps", "recovery.max_skipped_steps"),
    Renamed("ppo.kl.place", "ppo.kl.apply_to"),
    Renamed("ppo.kl.control", "ppo.kl.controller"),
    Renamed("ppo.refuse_kl", "ppo.max_kl_per_step"),
    Renamed("ppo.max_log_prob_gap", "ppo.max_logprob_mismatch"),
    *(Renamed(f"{optimizer}.refuse_grad_norm", f"{optimizer}.skip_grad_norm") for optimizer in OPTIMIZERS),
)
"""In the order in which they are applied."""


class OldNames:
    """Gives settings their new names, and keeps by which old ones they were given.

    Args:
        tell: Log a line for each old name that is used, once in a process.
        renamed: The table.
    """

    def __init__(self, tell: bool = True, renamed: Sequence[Renamed] = ()) -> None:
        self.tell = tell
        self._renamed = renamed or RENAMED
        self._given: dict[str, str] = {}  # new path -> old path
        self._overrides: dict[str, str] = {}  # new path -> path on the command line

    def in_tree(self, settings: dict[str, Any]) -> dict[str, Any]:
        """A copy of settings with new names. Raises ValueError where a setting is there by both names."""
        tree: dict[str, Any] = self._copy(settings)
        for one in self._renamed:
            self._rename(tree, _parts(one.old), _parts(one.new), one, ())
        return tree

    def in_override(self, key: str, value: Any) -> tuple[str, Any]:
        """An override's path and value with new names. Raises ValueError where a setting is there by both names."""
        asked, path, value = key, tuple(key.split(".")), self._copy(value)
        self._given.pop(key, None)
        for one in self._renamed:
            old, new = _parts(one.old), _parts(one.new)
            depth = min(len(old), len(path))
            if not all(a == b or (a == "[]" and b.isdecimal()) for a, b in zip(old, path, strict=False)):
                continue
            if len(path) < len(old):
                if old[:depth] == new[:depth]:  # else it would leave what the override gives
                    self._rename(value, old[depth:], new[depth:], one, path)
                continue
            at, rest = path[:depth], path[depth:]
            changed = value if rest else one.value(value)
            path = (*_filled(new, at), *rest)
            if one.old != one.new or changed is not value:
                self._note(one, at, _filled(new, at))
            value = changed
        key = ".".join(path)
        if (before := self._overrides.setdefault(key, asked)) != asked:
            raise ValueError(f"{key}: is given by its old name {asked if before == key else before} too")
        return key, value

    def explained(self, path: str, text: str) -> str:
        """The text of a problem with a setting, with the old name by which it was given."""
        for new, old in self._given.items():
            if path == new or path.startswith(f"{new}."):
                return f"{text} (given as {old}{path.removeprefix(new)})"
        return text

    def _copy(self, value: Any) -> Any:
        """With new names in interpolations."""
        if isinstance(value, dict):
            return {key: self._copy(item) for key, item in value.items()}
        if isinstance(value, list):
            return [self._copy(item) for item in value]
        if isinstance(value, str) and "${" in value:
            for one in self._renamed:
                pattern = r"\$\{" + re.escape(one.old).replace(r"\[\]", r"\.(\d+)") + r"(?=[.}\[])"
                value = re.sub(pattern, partial(_with_indices, one.new), value)
        return value

    def _rename(
        self, node: Any, old: tuple[str, ...], new: tuple[str, ...], one: Renamed, path: tuple[str, ...]
    ) -> None:
        """In the container `node`, which stands at `path`."""
        if old[0] == "[]":
            for index, item in enumerate(node if isinstance(node, list) else ()):
                self._rename(item, old[1:], new[1:], one, (*path, str(index)))
        elif isinstance(node, dict) and old[0] in node:
            if len(old) > 1 and old[0] == new[0]:
                self._rename(node[old[0]], old[1:], new[1:], one, (*path, old[0]))
            else:
                self._move(node, old, new, one, path)

    def _move(
        self, node: dict[str, Any], old: tuple[str, ...], new: tuple[str, ...], one: Renamed, path: tuple[str, ...]
    ) -> None:
        source: Any = node
        for part in old[:-1]:
            source = source.get(part) if isinstance(source, dict) else None
        if not isinstance(source, dict) or old[-1] not in source:
            return
        value = source.pop(old[-1])
        changed = one.value(value)
        target: Any = node
        for part in new[:-1]:
            target = target.setdefault(part, {}) if isinstance(target, dict) else None
        if not isinstance(target, dict) or new[-1] in target:
            raise ValueError(f"{'.'.join((*path, *new))}: is given by its old name {'.'.join((*path, *old))} too")
        target[new[-1]] = changed
        if old != new or changed is not value:
            self._note(one, (*path, *old), (*path, *new))

    def _note(self, one: Renamed, old: Sequence[str], new: Sequence[str]) -> None:
        self._given[".".join(new)] = ".".join(old)
        if self.tell:
            _told(one.old, one.new)


def _parts(path: str) -> tuple[str, ...]:
    return tuple(path.replace("[]", ".[]").split("."))


def _filled(pattern: tuple[str, ...], path: tuple[str, ...]) -> tuple[str, ...]:
    """The pattern with the indices of a path in place of `[]`."""
    return tuple(path[i] if part == "[]" else part for i, part in enumerate(pattern))


def _with_indices(path: str, found: re.Match[str]) -> str:
    """The beginning of an interpolation of that path, with the indices that were found."""
    for index in found.groups():
        path = path.replace("[]", f".{index}", 1)
    return "${" + path


@cache
def _told(old: str, new: str) -> None:
    """Said once."""
    if old == new:
        logging.getLogger("troupe").warning(
            "%s: values are written otherwise now; the old ones go with the next release", old
        )
    else:
        logging.getLogger("troupe").warning("%s is now %s; the old name goes with the next release", old, new)
