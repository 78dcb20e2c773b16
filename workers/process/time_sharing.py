"""Time sharing of a device between roles: between its calls a process moves its device tensors to host memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, UntypedStorage

from workers.process.worker import Worker


class DeviceTimeSharing:
    """A process's workers on a shared device. Only the tensors' memory is released and restored: views stay valid."""

    def __init__(self, workers: Sequence[Worker], device: str) -> None:
        self.workers, self.device = workers, device
        self._offloaded: list[tuple[UntypedStorage, Tensor]] = []

    @contextmanager
    def turn(self, method: str) -> Iterator[None]:
        """Context: this process has the device. Methods of the base Worker do not need it."""
        if hasattr(Worker, method):
            yield
            return
        self.onload()
        try:
            yield
        finally:
            self.offload(tensor for worker in self.workers for tensor in worker.tensors())

    def offload(self, tensors: Iterable[Tensor]) -> None:
        storages = {
            t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors if t.device.type == self.device
        }
        for storage in storages.values():
            if size := storage.nbytes():
                host = torch.empty(size, dtype=torch.uint8, pin_memory=self.device == "cuda")
                host.copy_(_bytes(storage))
                storage.resize_(0)
                self._offloaded.append((storage, host))
        if self.device == "cuda":
            torch.cuda.empty_cache()  # memory cached by the allocator is unusable for other processes

    def onload(self) -> None:
        for storage, host in self._offloaded:
            storage.resize_(host.nbytes)
            _bytes(storage).copy_(host)
        self._offloaded = []


def _bytes(storage: UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
