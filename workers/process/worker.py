"""The base of every worker: a Ray actor that is one rank of one role."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray

from configs.schema import Role, RunConfig
from workers.api import WorkerApi
from workers.process.inspection import ProcessLocation, location, proportional_memory

if TYPE_CHECKING:
    from torch import Tensor

    from workers.models.shared_base import SharedBase


@dataclass(frozen=True)
class WorkerSpec:
    """Identity and configuration of a worker."""

    config: RunConfig
    role: Role
    rank: int
    world_size: int
    device: str
    """cpu or cuda"""
    threads: int
    time_shared: bool = False
    """Whether it time-shares its device with other processes."""
    started: datetime | None = None
    """Start of the run, for chat templates that write the date; None: now."""


class Worker(WorkerApi):
    """The base of all workers: location and memory of the process, process group, datasets."""

    def __init__(self, spec: WorkerSpec) -> None:
        self.spec = spec
        self.config = spec.config
        self.rank = spec.rank
        self.datasets: dict[str, Any] = {}
        self.base: SharedBase | None = None
        """The frozen base that the roles of this process share; None if the process has one role."""

    def __repr__(self) -> str:
        return f"{self.spec.role}-{self.spec.rank}"

    def location(self) -> ProcessLocation:
        return location()

    def address(self) -> tuple[str, int]:
        """Host and a free port, for the group's rendezvous."""
        with socket.socket() as s:
            s.bind(("", 0))
            return ray.util.get_node_ip_address(), s.getsockname()[1]

    def join(self, address: tuple[str, int]) -> None:
        """Set the variables that torch.distributed and DeepSpeed read to form the group."""
        os.environ |= {
            "MASTER_ADDR": address[0],
            "MASTER_PORT": str(address[1]),
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.spec.world_size),
            "LOCAL_RANK": "0",  # Ray shows each worker its own devices only
            "LOCAL_SIZE": "1",
        }
        if address[0].startswith("127."):
            os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # otherwise gloo listens on the address of the host's name

    def add_rows(self, name: str, rows: Any) -> None:
        """Store a dataset under a name: tokenised (workers.data.Sequences, Preferences, or the ids of prompts) or, for reward
        functions, as rows."""
        self.datasets[name] = rows

    def mark(self, folder: str) -> str:
        """Create an empty file in a folder, so that other nodes can check that they share the folder; returns its name."""
        name = f"{self!r}.partial"  # the suffix of all temporary files
        os.makedirs(folder, exist_ok=True)
        Path(folder, name).touch()
        return name

    def tensors(self) -> Iterable[Tensor]:
        """All tensors on its device between calls."""
        return ()

    def memory(self) -> int:
        """Bytes of this process."""
        return proportional_memory()


def compiles(config: RunConfig, device: str) -> bool:
    """Whether engines use torch.compile."""
    return device == "cuda" if config.rollout.compile == "auto" else config.rollout.compile


def environment(config: RunConfig, role: Role, device: str, threads: int) -> dict[str, str]:
    """Environment of a worker's process; must be set before torch is imported."""
    common = {
        "OMP_NUM_THREADS": str(threads),
        # An idle thread spins briefly, then sleeps. The default spin time slows the other workers tenfold; sleeping at once
        # slows its own worker by a fifth, between small operations.
        "GOMP_SPINCOUNT": "10000",
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TQDM_DISABLE": "1",
        "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "0",
    }
    if device == "cpu":
        common |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    if role == "rollout":
        common |= {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine runs inside the actor
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_LOGGING_LEVEL": "WARNING",
            "VLLM_NO_USAGE_STATS": "1",
        }
        if not compiles(config, device):
            # vLLM compiles parts of its sampler even when eager, for which a CPU needs a C++ compiler.
            common["TORCH_COMPILE_DISABLE"] = "1"
    return common
