"""How much memory a process and all below it take, while they run: proportional set size, so that a page that several share
counts once.

To ask the kernel for a process's proportional set size takes 50 ms for each GiB: too long to catch a short peak, and too much
beside two cores that work. Pages that no file backs are not shared by processes that were not forked from one another, and
the kernel has their count ready: they are looked at every 20 ms. The rest (files, shared memory) is asked for anew where it
has moved, for at most a fifth of the time.
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

_INTERVAL, _LOOK_AROUND, _LOOK_AT_DEVICES = 0.02, 0.5, 1.0
"""Seconds between looks at the counters, at which processes there are, and at devices."""
_MOVED = 4 * 2**20
"""Bytes by which what is shared may move before it is asked for anew."""
_PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass
class MemoryUse:
    """What a process holds now, in bytes."""

    private: int = 0
    resident_shared: int = 0
    """All of the shared pages that it has mapped."""
    share: int = 0
    """Its part of them, when it was last asked for."""
    asked_at: int = -(2**62)
    """`resident_shared` at that time."""

    @property
    def total(self) -> int:
        return self.private + self.share


@dataclass
class Peak:
    """The most that was seen, in bytes."""

    total: int = 0
    each: dict[int, int] = field(default_factory=lambda: defaultdict(int))
    """By process: each one's own peak."""
    devices: dict[int, int] = field(default_factory=lambda: defaultdict(int))
    """GPU memory by process."""

    def see(self, uses: dict[int, MemoryUse]) -> None:
        self.total = max(self.total, sum(use.total for use in uses.values()))
        for pid, use in uses.items():
            self.each[pid] = max(self.each[pid], use.total)


class Footprint(threading.Thread):
    """Watches a process and all below it until the block ends.

    root: its pid. limit: bytes, beyond which `passed` is set.
    """

    def __init__(self, root: int, limit: int | None = None) -> None:
        super().__init__(name="footprint", daemon=True)
        self._root, self._limit = psutil.Process(root), limit
        self._uses: dict[int, MemoryUse] = {}
        self._phase = "between"
        self._over = threading.Event()
        self._may_ask_at = 0.0
        self.also: set[int] = set()
        """Further processes of this machine, which are not below the root."""
        self.gpus = False
        """Look at GPU memory too (nvidia-smi)."""
        self.peaks: dict[str, Peak] = defaultdict(Peak)
        """By phase."""
        self.passed = threading.Event()

    def __enter__(self) -> Footprint:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self.join()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """What is seen within counts for a phase of this name."""
        before, self._phase = self._phase, name
        try:
            yield
        finally:
            self._phase = before

    @property
    def total(self) -> int:
        """Bytes at the highest moment of all phases."""
        return max((peak.total for peak in self.peaks.values()), default=0)

    def each(self) -> dict[int, int]:
        """Bytes of each process at its own highest moment."""
        return _highest([peak.each for peak in self.peaks.values()])

    def devices(self) -> dict[int, int]:
        """Bytes of GPU memory of each process at its own highest moment."""
        return _highest([peak.devices for peak in self.peaks.values()])

    def run(self) -> None:
        looked_around = looked_at_devices = 0.0
        while not self._over.wait(_INTERVAL):
            now = time.monotonic()
            if now - looked_around > _LOOK_AROUND:
                self._look_around()
                looked_around = time.monotonic()
            if self.gpus and now - looked_at_devices > _LOOK_AT_DEVICES:
                for pid, size in _device_memory().items():
                    peak = self.peaks[self._phase].devices
                    peak[pid] = max(peak[pid], size)
                looked_at_devices = time.monotonic()
            self._look()

    def _look_around(self) -> None:
        with suppress(psutil.NoSuchProcess):
            alive = {self._root.pid, *(p.pid for p in self._root.children(recursive=True)), *self.also}
            self._uses = {pid: self._uses.get(pid, MemoryUse()) for pid in alive}

    def _look(self) -> None:
        for pid in list(self._uses):
            try:
                _, resident, shared, *_ = map(int, Path(f"/proc/{pid}/statm").read_text().split())
            except (FileNotFoundError, ProcessLookupError):
                del self._uses[pid]
                continue
            use = self._uses[pid]
            use.private, use.resident_shared = (resident - shared) * _PAGE, shared * _PAGE
        self._ask()
        self.peaks[self._phase].see(self._uses)
        if self._limit is not None and sum(use.total for use in self._uses.values()) > self._limit:
            self.passed.set()

    def _ask(self) -> None:
        """What they share, of all where it has moved anywhere: what one maps changes the others' part."""
        began = time.monotonic()
        moved = any(abs(use.resident_shared - use.asked_at) > _MOVED for use in self._uses.values())
        if began < self._may_ask_at or not moved:
            return
        for pid, use in self._uses.items():
            with suppress(FileNotFoundError, ProcessLookupError):
                use.share, use.asked_at = proportional_share(pid), use.resident_shared
        self._may_ask_at = time.monotonic() + 4 * (time.monotonic() - began)


def _highest(peaks: list[dict[int, int]]) -> dict[int, int]:
    pids = {pid for peak in peaks for pid in peak}
    return {pid: max(peak.get(pid, 0) for peak in peaks) for pid in pids}


def proportional_share(pid: int) -> int:
    """Bytes of files and shared memory that a process has mapped, each page divided by the processes that have it."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(("Pss_File:", "Pss_Shmem:")))


def _device_memory() -> dict[int, int]:
    """Bytes of GPU memory by process, over all GPUs of this machine."""
    command = ["nvidia-smi", "--query-compute-apps=pid,used_gpu_memory", "--format=csv,noheader,nounits"]
    found: dict[int, int] = defaultdict(int)
    for line in subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines():
        pid, mib = line.split(",")
        found[int(pid)] += int(mib) * 2**20
    return found
