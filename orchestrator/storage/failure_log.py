"""The folder `failures/` of a run: a file for each failure, and one only for what comes again and again."""

from __future__ import annotations

import re
import time
import traceback
from collections.abc import Hashable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from workers.process.remote_error import summary

MOST_FILES = 200
"""Of texts in one run's folder. Further failures share the file `more.txt`, which has the last of them and their number."""
MOST_KINDS = 10
"""Files of one source of rewards that fails in ever new words."""


@dataclass
class _Entry:
    path: Path
    text: str
    times: int = 1


class FailureLog:
    """Writes what failed, when and where. Files are numbered in the order of the failures, across the sessions of a run.

    Nothing here raises for want of disk space: what failed matters more.
    """

    def __init__(self, folder: Path) -> None:
        """folder: made with the first file."""
        self.folder = folder
        self.where = ""
        """Stage and step, for the records."""
        self._entries: dict[Hashable, _Entry] = {}
        self._more = 0

    def write(self, kind: str, text: str, key: Hashable = None) -> bool:
        """Record a failure. kind: for the file's name. text: its first line says what happened.

        key: what makes a failure the same as another; such ones share a file, which counts them. None: it is like no other.
        Returns whether it is the first of its kind.
        """
        if key is not None and (entry := self._entries.get(key)):
            entry.times += 1
            self._put(entry.path, f"{entry.text}\n{entry.times} times so far, the last: {self._now()}\n")
            return False
        text = f"{self._now()}\n{text.rstrip()}\n"
        if path := self._path(kind):
            self._put(path, text)
        else:
            self._more += 1
            path = self.folder / "more.txt"
            self._put(path, f"{text}\n{self._more} failures more than there are files, of which this is the last\n")
        if key is not None:
            self._entries[key] = _Entry(path, text)
        return True

    def write_of_source(self, source: str, text: str, why: str) -> bool:
        """`write` for a source of rewards. It may have as many reasons as answers: from the tenth on they share a file."""
        kinds = sum(isinstance(key, tuple) and key[0] == source for key in self._entries)
        apart = (source, why) in self._entries or kinds < MOST_KINDS - 1
        return self.write(f"reward-{source}", text, (source, why if apart else ""))

    def write_exception(self, error: BaseException) -> None:
        """Record an exception of this process, with its traceback."""
        self.write(type(error).__name__, f"{summary(error)}\n{''.join(traceback.format_exception(error))}")

    def _path(self, kind: str) -> Path | None:
        """Of the next file; None where there are enough."""
        numbers = [int(path.name[:4]) for path in self.folder.glob("[0-9][0-9][0-9][0-9]-*.txt")]
        if len(numbers) >= MOST_FILES:
            return None
        return self.folder / f"{max(numbers, default=0) + 1:04d}-{re.sub(r'[^A-Za-z0-9_.-]', '_', kind)}.txt"

    def _now(self) -> str:
        return f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {self.where}"

    def _put(self, path: Path, text: str) -> None:
        with suppress(OSError):
            self.folder.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8", errors="replace")
