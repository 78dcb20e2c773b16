"""Senders, the trainer's side of the transports. `object_store` is ours and needs no vLLM; `nccl` and `ipc` are vLLM's."""

from __future__ import annotations

from typing import Protocol

import ray
import torch
from torch import Tensor

from workers.weight_sync.gather import EngineClient, GatheredWeights


class Sender(Protocol):
    """Sends a model's weights to all engines. Collective over the trainer's ranks; rank 0 calls the engines."""

    def send_weights(self) -> None: ...


class ObjectStoreSender:
    """Puts buckets into Ray's object store, one at a time. A bucket is freed once every engine has loaded it."""

    def __init__(self, client: EngineClient, source: GatheredWeights, is_leader: bool, bucket_bytes: int) -> None:
        self.client, self.source, self.is_leader, self.bucket_bytes = client, source, is_leader, bucket_bytes
        if is_leader:
            client.init_weight_transfer_engine({})

    def send_weights(self) -> None:
        if not self.is_leader:
            for _ in self.source:  # gathering is collective
                pass
            return
        self.client.start_weight_update()
        bucket: list[tuple[str, Tensor]] = []
        for name, tensor in self.source:
            bucket.append((name, tensor.detach().contiguous().cpu()))
            if sum(t.nbytes for _, t in bucket) >= self.bucket_bytes:
                self._send(bucket)
                bucket = []
        if bucket:
            self._send(bucket)
        self.client.finish_weight_update()

    def _send(self, bucket: list[tuple[str, Tensor]]) -> None:
        arrays = ray.put([t.flatten().view(torch.uint8).numpy() for _, t in bucket])
        self.client.update_weights(
            {
                "names": [name for name, _ in bucket],
                "dtypes": [str(t.dtype).removeprefix("torch.") for _, t in bucket],
                "shapes": [tuple(t.shape) for _, t in bucket],
                "arrays": arrays,
            }
        )


def make_sender(
    transport: str,
    client: EngineClient,
    source: GatheredWeights,
    rank: int,
    bucket_bytes: int,
    engine_ranks: int,
    address: tuple[str, int],
) -> Sender:
    """The sender of a trainer's rank. engine_ranks: processes of all engines. address: host and port of the rendezvous (nccl)."""
    if transport == "object_store":
        return ObjectStoreSender(client, source, rank == 0, bucket_bytes)
    # Imported here: they import all of vLLM, a second and 150 MB that a trainer on CPU does not need.
    from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
    from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo
    from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

    if transport == "nccl":
        init = NCCLTrainerInitInfo(
            master_address=address[0],
            master_port=address[1],
            world_size=1 + engine_ranks,
            packed_buffer_size_bytes=bucket_bytes,
            rank=rank,
        )
    else:
        size = max(bucket_bytes, source.largest)
        init = IPCTrainerInitInfo(rank=rank, packed=True, packed_buffer_size_bytes=size)
    sender: Sender = WeightTransferTrainerFactory.trainer_init(init, client=client, source=source)
    return sender
