"""Memory of a process and all its descendants while they run: proportional set size, so that a shared page counts once.

Reading a process's proportional set size takes the kernel 50 ms per GiB: too long to catch a short peak, and too much load for
two busy cores. Pages without a file are not shared by processes that were not forked from one another, and the kernel has their
count ready: they are read every 20 ms. The rest (files, shared memory) is read again only after it changed, for at most a fifth
of the time.
"""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

_INTERVAL_S, _LIST_INTERVAL_S, _DEVICES_INTERVAL_S = 0.02, 0.5, 1.0
"""Seconds between readings of the counters, of the list of processes, and of devices."""
_MIN_CHANGE = 4 * 2**20
"""Change of the shared bytes after which the proportional share is read again."""
_PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass
class MemoryUse:
    """Current memory of a process, in bytes."""

    private: int = 0
    resident_shared: int = 0
    """All mapped shared pages."""
    share: int = 0
    """Its proportional share of them at the last reading."""
    read_at: int = -(2**62)
    """`resident_shared` at that reading."""

    @property
    def total(self) -> int:
        return self.private + self.share


@dataclass
class Peak:
    """Peak memory, in bytes."""

    total: int = 0
    each: dict[int, int] = field(default_factory=lambda: defaultdict(int))
    """Process -> its own peak."""
    devices: dict[int, int] = field(default_factory=lambda: defaultdict(int))
    """Process -> its peak of GPU memory."""

    def update(self, uses: dict[int, MemoryUse]) -> None:
        self.total = max(self.total, sum(use.total for use in uses.values()))
        for pid, use in uses.items():
            self.each[pid] = max(self.each[pid], use.total)


class MemoryMonitor(threading.Thread):
    """Measures a process and all its descendants until the block ends.

    root: the process's pid. limit: bytes; `over_limit` is set when the total exceeds it.
    """

    def __init__(self, root: int, limit: int | None = None) -> None:
        super().__init__(name="memory monitor", daemon=True)
        self._root, self._limit = psutil.Process(root), limit
        self._uses: dict[int, MemoryUse] = {}
        self._phase = "between"
        self._stopped = threading.Event()
        self._next_reading_at = 0.0
        self.also: set[int] = set()
        """Further processes of this machine that are not descendants of the root."""
        self.gpus = False
        """Also measure GPU memory (nvidia-smi)."""
        self.peaks: dict[str, Peak] = defaultdict(Peak)
        """Phase -> peak."""
        self.over_limit = threading.Event()

    def __enter__(self) -> MemoryMonitor:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self.join()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count readings in the block for this phase."""
        previous, self._phase = self._phase, name
        try:
            yield
        finally:
            self._phase = previous

    @property
    def total(self) -> int:
        """Peak bytes over all phases."""
        return max((peak.total for peak in self.peaks.values()), default=0)

    def each(self) -> dict[int, int]:
        """Process -> bytes at its own peak."""
        return _highest([peak.each for peak in self.peaks.values()])

    def devices(self) -> dict[int, int]:
        """Process -> bytes of GPU memory at its own peak."""
        return _highest([peak.devices for peak in self.peaks.values()])

    def run(self) -> None:
        listed_at = devices_read_at = 0.0
        while not self._stopped.wait(_INTERVAL_S):
            now = time.monotonic()
            if now - listed_at > _LIST_INTERVAL_S:
                self._list_processes()
                listed_at = time.monotonic()
            if self.gpus and now - devices_read_at > _DEVICES_INTERVAL_S:
                for pid, size in _device_memory().items():
                    peak = self.peaks[self._phase].devices
                    peak[pid] = max(peak[pid], size)
                devices_read_at = time.monotonic()
            self._read_counters()

    def _list_processes(self) -> None:
        with suppress(psutil.NoSuchProcess):
            alive = {self._root.pid, *(p.pid for p in self._root.children(recursive=True)), *self.also}
            self._uses = {pid: self._uses.get(pid, MemoryUse()) for pid in alive}

    def _read_counters(self) -> None:
        for pid in list(self._uses):
            try:
                _, resident, shared, *_ = map(int, Path(f"/proc/{pid}/statm").read_text().split())
            except (FileNotFoundError, ProcessLookupError):
                del self._uses[pid]
                continue
            use = self._uses[pid]
            use.private, use.resident_shared = (resident - shared) * _PAGE, shared * _PAGE
        self._read_shares()
        self.peaks[self._phase].update(self._uses)
        if self._limit is not None and sum(use.total for use in self._uses.values()) > self._limit:
            self.over_limit.set()

    def _read_shares(self) -> None:
        """Read all processes' shares if the shared pages of one changed: they change the others' shares too."""
        began = time.monotonic()
        changed = any(abs(use.resident_shared - use.read_at) > _MIN_CHANGE for use in self._uses.values())
        if began < self._next_reading_at or not changed:
            return
        for pid, use in self._uses.items():
            with suppress(FileNotFoundError, ProcessLookupError):
                use.share, use.read_at = proportional_share(pid), use.resident_shared
        self._next_reading_at = time.monotonic() + 4 * (time.monotonic() - began)


def _highest(peaks: list[dict[int, int]]) -> dict[int, int]:
    pids = {pid for peak in peaks for pid in peak}
    return {pid: max(peak.get(pid, 0) for peak in peaks) for pid in pids}


def proportional_share(pid: int) -> int:
    """Bytes of mapped files and shared memory, each page divided by the number of processes that map it."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(("Pss_File:", "Pss_Shmem:")))


def _device_memory() -> dict[int, int]:
    """Process -> bytes of GPU memory over all GPUs of this machine."""
    command = ["nvidia-smi", "--query-compute-apps=pid,used_gpu_memory", "--format=csv,noheader,nounits"]
    by_process: dict[int, int] = defaultdict(int)
    for line in subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines():
        pid, mib = line.split(",")
        by_process[int(pid)] += int(mib) * 2**20
    return by_process
