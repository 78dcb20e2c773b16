"""The order in which rows are trained on: a function of the seed, the same on every machine."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

_WINDOW = 16
"""Batches within which rows are sorted by length."""


def epoch_order(n: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """[n] the order of the rows in an epoch: a permutation, the same on every machine."""
    return np.random.default_rng((seed, epoch)).permutation(n)


def batches(lengths: npt.ArrayLike, batch_size: int, epochs: float, seed: int) -> list[npt.NDArray[np.int64]]:
    """The rows of each optimizer step, [batch_size] each; ceil(epochs * N / batch_size) steps, at least one.

    The concatenated steps are the concatenated epochs, each a random order of all rows. Where an epoch ends within a batch, the
    next epoch's first rows fill the batch, also after the last epoch: no row is dropped, and a few rows occur once more.
    Within a window of 16 batches, rows of similar length share a batch; batches are in random order. A larger `epochs` only
    appends steps.

    lengths: [N] tokens of each row.
    """
    lengths = np.asarray(lengths)
    n = len(lengths)
    steps = max(1, math.ceil(epochs * n / batch_size - 1e-9))
    stream = np.concatenate([
        _sorted_within(epoch_order(n, seed, epoch), lengths, -epoch * n % batch_size, batch_size, (seed, epoch, 1))
        for epoch in range(math.ceil(steps * batch_size / n))
    ])  # fmt: skip
    return list(stream[: steps * batch_size].reshape(steps, batch_size))


def _sorted_within(
    order: npt.NDArray[np.int64], lengths: npt.NDArray[Any], start: int, batch_size: int, seed: tuple[int, ...]
) -> npt.NDArray[np.int64]:
    """An epoch's order in which full batches, the first at `start`, hold rows of similar length."""
    count = max(0, len(order) - start) // batch_size
    whole = order[start : start + count * batch_size]
    for window in np.split(whole, range(_WINDOW * batch_size, len(whole), _WINDOW * batch_size)):
        window[:] = window[np.argsort(lengths[window], kind="stable")]
    whole[:] = whole.reshape(count, batch_size)[np.random.default_rng(seed).permutation(count)].ravel()
    return order
