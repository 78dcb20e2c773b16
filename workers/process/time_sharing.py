"""Roles that hold a device by turns: between its calls a process keeps what it has there in host memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, UntypedStorage

from workers.process.worker import Worker


class DeviceTimeSharing:
    """A process's workers on a shared device. Tensors lose and regain their memory and nothing else: what views what stays."""

    def __init__(self, workers: Sequence[Worker], device: str) -> None:
        self.workers, self.device = workers, device
        self._away: list[tuple[UntypedStorage, Tensor]] = []

    @contextmanager
    def turn(self, method: str) -> Iterator[None]:
        """Within it the device is this process's. Methods that all workers have need none."""
        if hasattr(Worker, method):
            yield
            return
        self.onload()
        try:
            yield
        finally:
            self.offload(tensor for worker in self.workers for tensor in worker.tensors())

    def offload(self, tensors: Iterable[Tensor]) -> None:
        found = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors if t.device.type == self.device}
        for storage in found.values():
            if size := storage.nbytes():
                host = torch.empty(size, dtype=torch.uint8, pin_memory=self.device == "cuda")
                host.copy_(_bytes(storage))
                storage.resize_(0)
                self._away.append((storage, host))
        if self.device == "cuda":
            torch.cuda.empty_cache()  # what stayed in the allocator no other process could use

    def onload(self) -> None:
        for storage, host in self._away:
            storage.resize_(host.nbytes)
            _bytes(storage).copy_(host)
        self._away = []


def _bytes(storage: UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
