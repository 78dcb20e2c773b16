"""Settings that have a new name. The old name is accepted for one release, with a line of notice."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any


@dataclass(frozen=True)
class Renamed:
    """The old and the new path of a setting or section: dotted, with `[]` for an index. A `[]` is in both paths or in neither,
    and the part before it is the same in both."""

    old: str
    new: str
    value: Callable[[Any], Any] = lambda value: value
    """Old value -> new value. `old` and `new` are equal if only the value is new. Scalars are given as text."""


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
"""Applied in this order."""


class OldNames:
    """Replaces old names of settings by the new ones, and records which old names were used.

    Args:
        notify: Log a line for each old name that is used, once in a process.
        renamed: The table of names.
    """

    def __init__(self, notify: bool = True, renamed: Sequence[Renamed] = ()) -> None:
        self.notify = notify
        self._renamed = renamed or RENAMED
        self._given: dict[str, str] = {}  # new path -> old path
        self._overrides: dict[str, str] = {}  # new path -> path on the command line

    def in_tree(self, settings: dict[str, Any]) -> dict[str, Any]:
        """A copy of the settings with new names. Raises ValueError if a setting is given by both names."""
        tree: dict[str, Any] = self._copy(settings)
        for renamed in self._renamed:
            self._rename(tree, _parts(renamed.old), _parts(renamed.new), renamed, ())
        return tree

    def in_override(self, key: str, value: Any) -> tuple[str, Any]:
        """An override's path and value with new names. Raises ValueError if a setting is given by both names."""
        given, path, value = key, tuple(key.split(".")), self._copy(value)
        self._given.pop(key, None)
        for renamed in self._renamed:
            old, new = _parts(renamed.old), _parts(renamed.new)
            depth = min(len(old), len(path))
            if not all(a == b or (a == "[]" and b.isdecimal()) for a, b in zip(old, path, strict=False)):
                continue
            if len(path) < len(old):
                if old[:depth] == new[:depth]:  # otherwise the new path is outside of the override's value
                    self._rename(value, old[depth:], new[depth:], renamed, path)
                continue
            at, rest = path[:depth], path[depth:]
            changed = value if rest else renamed.value(value)
            path = (*_filled(new, at), *rest)
            if renamed.old != renamed.new or changed is not value:
                self._note(renamed, at, _filled(new, at))
            value = changed
        key = ".".join(path)
        if (before := self._overrides.setdefault(key, given)) != given:
            raise ValueError(f"{key}: is given by its old name {given if before == key else before} too")
        return key, value

    def explained(self, path: str, text: str) -> str:
        """The text of a problem with a setting; adds the old name if the setting was given by it."""
        for new, old in self._given.items():
            if path == new or path.startswith(f"{new}."):
                return f"{text} (given as {old}{path.removeprefix(new)})"
        return text

    def _copy(self, value: Any) -> Any:
        """A copy with new names in interpolations."""
        if isinstance(value, dict):
            return {key: self._copy(item) for key, item in value.items()}
        if isinstance(value, list):
            return [self._copy(item) for item in value]
        if isinstance(value, str) and "${" in value:
            for renamed in self._renamed:
                pattern = r"\$\{" + re.escape(renamed.old).replace(r"\[\]", r"\.(\d+)") + r"(?=[.}\[])"
                value = re.sub(pattern, partial(_with_indices, renamed.new), value)
        return value

    def _rename(
        self, node: Any, old: tuple[str, ...], new: tuple[str, ...], renamed: Renamed, path: tuple[str, ...]
    ) -> None:
        """Rename in the container `node`, whose path is `path`."""
        if old[0] == "[]":
            for index, item in enumerate(node if isinstance(node, list) else ()):
                self._rename(item, old[1:], new[1:], renamed, (*path, str(index)))
        elif isinstance(node, dict) and old[0] in node:
            if len(old) > 1 and old[0] == new[0]:
                self._rename(node[old[0]], old[1:], new[1:], renamed, (*path, old[0]))
            else:
                self._move(node, old, new, renamed, path)

    def _move(
        self, node: dict[str, Any], old: tuple[str, ...], new: tuple[str, ...], renamed: Renamed, path: tuple[str, ...]
    ) -> None:
        source: Any = node
        for part in old[:-1]:
            source = source.get(part) if isinstance(source, dict) else None
        if not isinstance(source, dict) or old[-1] not in source:
            return
        value = source.pop(old[-1])
        changed = renamed.value(value)
        target: Any = node
        for part in new[:-1]:
            target = target.setdefault(part, {}) if isinstance(target, dict) else None
        if not isinstance(target, dict) or new[-1] in target:
            raise ValueError(f"{'.'.join((*path, *new))}: is given by its old name {'.'.join((*path, *old))} too")
        target[new[-1]] = changed
        if old != new or changed is not value:
            self._note(renamed, (*path, *old), (*path, *new))

    def _note(self, renamed: Renamed, old: Sequence[str], new: Sequence[str]) -> None:
        self._given[".".join(new)] = ".".join(old)
        if self.notify:
            log_rename(renamed.old, renamed.new)


def _parts(path: str) -> tuple[str, ...]:
    return tuple(path.replace("[]", ".[]").split("."))


def _filled(pattern: tuple[str, ...], path: tuple[str, ...]) -> tuple[str, ...]:
    """The pattern with the indices of a path in place of `[]`."""
    return tuple(path[i] if part == "[]" else part for i, part in enumerate(pattern))


def _with_indices(path: str, match: re.Match[str]) -> str:
    """The start of an interpolation of this path, with the indices of the match."""
    for index in match.groups():
        path = path.replace("[]", f".{index}", 1)
    return "${" + path


@cache
def log_rename(old: str, new: str) -> None:
    """Log a line of notice, once in a process."""
    change = f"{old} has a new form; the old one" if old == new else f"{old} is now {new}; the old name"
    logging.getLogger("troupe").warning("%s goes with the next release", change)
