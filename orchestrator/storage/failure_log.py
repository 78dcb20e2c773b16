"""The folder `failures/` of a run: a file for each failure; repeated failures share a file."""

from __future__ import annotations

import re
import time
import traceback
from collections.abc import Hashable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from workers.process.remote_error import summary

MAX_FILES = 200
"""Files in one run's folder. Further failures share `more.txt`, with the last of them and their number."""
MAX_REASONS = 10
"""Files for one reward source that fails with ever new messages."""


@dataclass
class _Entry:
    path: Path
    text: str
    times: int = 1


class FailureLog:
    """Writes what failed, when and where. Files are numbered in the order of the failures, across the sessions of a run.

    Disk errors are ignored: they must not hide the failure itself.
    """

    def __init__(self, folder: Path) -> None:
        """folder: created with the first file."""
        self.folder = folder
        self.where = ""
        """Stage and step of the next records."""
        self._entries: dict[Hashable, _Entry] = {}
        self._more = 0

    def write(self, kind: str, text: str, key: Hashable = None) -> bool:
        """Record a failure. kind: part of the file's name. text: its first line says what happened.

        key: failures with the same key share a file, which counts them; None: a file of its own.
        Returns whether it is the first with its key.
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
            self._put(path, f"{text}\n{self._more} more failures without a file; this is the last\n")
        if key is not None:
            self._entries[key] = _Entry(path, text)
        return True

    def write_of_source(self, source: str, text: str, why: str) -> bool:
        """Record a failure of a reward source. Reasons may be as many as answers: from the tenth reason on they share a file."""
        kinds = sum(isinstance(key, tuple) and key[0] == source for key in self._entries)
        separate = (source, why) in self._entries or kinds < MAX_REASONS - 1
        return self.write(f"reward-{source}", text, (source, why if separate else ""))

    def write_exception(self, error: BaseException) -> None:
        """Record an exception of this process, with its traceback."""
        self.write(type(error).__name__, f"{summary(error)}\n{''.join(traceback.format_exception(error))}")

    def _path(self, kind: str) -> Path | None:
        """Path of the next file; None if there are MAX_FILES already."""
        numbers = [int(path.name[:4]) for path in self.folder.glob("[0-9][0-9][0-9][0-9]-*.txt")]
        if len(numbers) >= MAX_FILES:
            return None
        return self.folder / f"{max(numbers, default=0) + 1:04d}-{re.sub(r'[^A-Za-z0-9_.-]', '_', kind)}.txt"

    def _now(self) -> str:
        return f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {self.where}"

    def _put(self, path: Path, text: str) -> None:
        with suppress(OSError):
            self.folder.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8", errors="replace")
