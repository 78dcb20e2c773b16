"""Checksums of tensors, cheap enough to take on every weight update."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

Checksums = dict[str, int]
"""Name of a tensor -> its checksum."""

_COLUMNS = 4096


def checksum(tensor: Tensor) -> int:
    """64-bit hash of the tensor's dtype, shape and sums: its 8-byte words form rows of 4096, and the sum of every row and every
    column is taken modulo 2**64.

    A changed word changes a row sum and a column sum; two exchanged words change two row sums or two column sums. Equal on CPU
    and GPU, where int64 wraps around. Only the sums leave the device.
    """
    data = tensor.detach().contiguous().flatten().view(torch.uint8)
    data = torch.nn.functional.pad(data, (0, -len(data) % (8 * _COLUMNS))) if len(data) % (8 * _COLUMNS) else data
    words = data.view(torch.int64).view(len(data) // (8 * _COLUMNS), _COLUMNS)
    digest = hashlib.blake2b(f"{tensor.dtype} {tuple(tensor.shape)}".encode(), digest_size=8)
    for axis in (0, 1):
        digest.update(words.sum(axis).cpu().numpy().tobytes())
    return int.from_bytes(digest.digest(), "little")
