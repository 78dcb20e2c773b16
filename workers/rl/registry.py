"""Functions that a setting chooses by name."""

from __future__ import annotations

from collections.abc import Callable
from difflib import get_close_matches
from typing import Generic, TypeVar

Entry = TypeVar("Entry")


class UnknownNameError(LookupError):
    """A setting names an entry that nobody registered."""


class Registry(Generic[Entry]):
    """Name -> function, for one setting.

    A new entry is one function and one line, in a module that is imported before the run starts:

        @value_losses.register("my_loss")
        def my_loss(values, old_values, returns, mask, clip_range): ...
    """

    def __init__(self, setting: str) -> None:
        """setting: dotted path of the setting that chooses among the entries."""
        self.setting = setting
        self._entries: dict[str, Entry] = {}

    def register(self, name: str) -> Callable[[Entry], Entry]:
        """Decorator that enters a function under `name`. Raises ValueError where the name is taken."""

        def enter(entry: Entry) -> Entry:
            if name in self._entries:
                raise ValueError(f"{self.setting}: the name {name!r} is registered already, by {self._entries[name]!r}")
            self._entries[name] = entry
            return entry

        return enter

    def get(self, name: str) -> Entry:
        """The entry of that name. Raises UnknownNameError, which says what there is."""
        if name in self._entries:
            return self._entries[name]
        nearest = get_close_matches(name, self.names, n=1)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
        raise UnknownNameError(f"{self.setting}: {name!r} is not registered; it may be {', '.join(self.names)}{hint}")

    @property
    def names(self) -> list[str]:
        return sorted(self._entries)
