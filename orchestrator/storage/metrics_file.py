"""JSON-lines files that grow record by record: a run's metrics.jsonl and its sampled answers."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from orchestrator.storage.atomic_files import sync, writing

FILE = "metrics.jsonl"
SAMPLES = "samples"
"""Folder of the sampled answers: `<stage>.jsonl`."""
VOLATILE = ("time", "tokens_per_second", "seconds/", "memory_gib/")

RENAMED_METRICS = {
    "log_prob_gap": "logprob_mismatch",
    "refused": "skipped",
    "refused/actor": "skipped/actor",
    "refused/critic": "skipped/critic",
    "left_out": "unscored",
    "length/answer": "length/response",
    "ratio_kl": "approx_kl",
    "stopped_on_kl": "early_stop",
    "missing_eos": "truncated",
    "seconds/publish": "seconds/weight_sync",
    "published_mib": "weight_sync_mib",
}
"""Old name -> new one, of metrics that runs before the latest release recorded."""


class MetricsError(ValueError):
    """A JSON-lines file cannot be read: names the line and the reason."""


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl, in file order; a non-finite value is None. Metrics that were written under an old name
    have their new one. Errors: see read_lines."""
    path = folder / FILE
    lines = read_lines(path) if path.exists() else []
    return [{RENAMED_METRICS.get(name, name): value for name, value in line.items()} for line in lines]


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file.

    A last line without a newline is skipped: it is still being written, or was truncated by a crash.

    Raises:
        MetricsError: another line is not a JSON object; names file and line.
    """
    return [parsed for _, parsed in _lines_of(path)]


def repeatable(folder: Path, stage: str) -> list[dict[str, Any]]:
    """A stage's lines without fields that differ from run to run: times and memory."""
    return [
        {name: value for name, value in line.items() if not name.startswith(VOLATILE)}
        for line in read_metrics(folder)
        if line["stage"] == stage
    ]


class AppendedFile:
    """A file that grows by whole records. Records that cannot be written wait; the file always ends with a whole record."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._waiting: list[tuple[int, bytes]] = []
        self._file: io.FileIO | None = None

    def add(self, step: int, record: bytes) -> None:
        self._waiting.append((step, record))

    def forget_after(self, step: int) -> None:
        """Drop waiting records of later steps."""
        self._waiting = [(at, record) for at, record in self._waiting if at <= step]

    def flush(self) -> None:
        """Write the waiting records. Raises DiskError; unwritten records still wait."""
        if not self._waiting:
            return
        with writing(self.path):
            if self._file is None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._file = self.path.open("ab", buffering=0)
            while self._waiting:
                end = os.fstat(self._file.fileno()).st_size
                rest = memoryview(self._waiting[0][1])
                try:
                    while rest:
                        rest = rest[self._file.write(rest) :]
                except OSError:
                    self._file.truncate(end)
                    raise
                del self._waiting[0]

    def cut(self, keep: Callable[[dict[str, Any]], bool]) -> None:
        """Keep only the lines for which `keep` is true; the file is valid at every moment. Raises DiskError."""
        if self.path.exists():
            with writing(self.path):
                self._rewrite([raw for raw, line in _lines_of(self.path) if keep(line)])

    def drop_oldest(self, max_bytes: int) -> None:
        """If the file is larger than max_bytes, drop its oldest steps until it is half as large. Raises DiskError."""
        if not self.path.exists() or self.path.stat().st_size <= max_bytes:
            return
        by_step: dict[int, list[bytes]] = {}
        for raw, line in _lines_of(self.path):
            by_step.setdefault(line["step"], []).append(raw)
        kept: list[list[bytes]] = []
        size = 0
        for lines in reversed(by_step.values()):
            size += sum(len(raw) + 1 for raw in lines)
            if kept and size > max_bytes // 2:
                break
            kept.append(lines)
        with writing(self.path):
            self._rewrite([raw for lines in reversed(kept) for raw in lines])

    def _rewrite(self, lines: Sequence[bytes]) -> None:
        partial = self.path.with_name(self.path.name + ".partial")
        try:
            partial.write_bytes(b"".join(line + b"\n" for line in lines))
            sync(partial)
            partial.replace(self.path)
            sync(self.path.parent)
        finally:
            partial.unlink(missing_ok=True)
        self.close()  # the open file was replaced

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def _lines_of(path: Path) -> list[tuple[bytes, dict[str, Any]]]:
    """The complete lines of a JSON-lines file, raw and parsed. Errors: see read_lines."""
    whole, _, _ = path.read_bytes().rpartition(b"\n")
    return [(line, _parsed(path, number, line)) for number, line in enumerate(whole.split(b"\n"), start=1) if line]


def _parsed(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        parsed = json.loads(line)
    except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, or a number or nesting that is too large
        raise MetricsError(f"{path}:{number}: not JSON ({error}): {line[:80]!r}") from error
    if not isinstance(parsed, dict):
        raise MetricsError(f"{path}:{number}: must be a JSON object, was {line[:80]!r}")
    return parsed
