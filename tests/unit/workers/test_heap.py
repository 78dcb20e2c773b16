"""Freed tensors are returned to the system, wherever they were allocated."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.support.runs import ROOT

HOLES = """
import sys
import numpy as np, psutil
from workers.process import malloc

if "apart" in sys.argv:
    malloc.keep_tensors_apart()
resident = lambda: psutil.Process().memory_info().rss
np.ones(2**21)  # 16 MiB, freed at once: by default glibc then allocates smaller blocks in its heap
tensors, small = [], []
for _ in range(10):
    tensors.append(np.ones(2**20))  # 8 MiB
    small.append(np.ones(2**14))  # 128 KiB: in no hole that imports left
peak = resident()
tensors.clear()
if "back" in sys.argv:
    malloc.give_back()
print((peak - resident()) // 2**20)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc")
@pytest.mark.parametrize(("how", "least", "most"), [("", 0, 20), ("apart", 75, 85), ("back", 75, 85)])
def test_freed_tensors(how: str, least: int, most: int) -> None:
    done = subprocess.run([sys.executable, "-c", HOLES, how], cwd=ROOT, capture_output=True, text=True)
    assert least <= int(done.stdout or -1) <= most, done.stderr
