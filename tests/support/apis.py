"""The remote methods of the tests' own workers, without torch and vLLM."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING

from workers.api import PolicyApi, RolloutApi, TrainerApi, WorkerApi, remote

if TYPE_CHECKING:
    import numpy as np
    from ray.actor import ActorHandle

    from configs.schema import Strategy


class OpenApi(TrainerApi):
    """tests.support.learners"""

    @remote(phase="train")
    @abstractmethod
    def spoil(self, how: str) -> None: ...

    @remote(phase="train")
    @abstractmethod
    def become(self, strategy: Strategy, offload: dict[str, str]) -> None: ...

    @remote(phase="train")
    @abstractmethod
    def stage(self) -> int: ...

    @remote(phase="train")
    @abstractmethod
    def held(self) -> dict[str, np.ndarray]: ...

    @remote(phase="train")
    @abstractmethod
    def gradients(self) -> list[int]: ...

    @remote(phase="train")
    @abstractmethod
    def offload_and_onload(self) -> tuple[int, int]: ...

    @remote(phase="train")
    @abstractmethod
    def dtypes(self) -> tuple[set[str], set[str]]: ...

    @remote(phase="train")
    @abstractmethod
    def add_noise(self, scale: float, seed: int) -> None: ...

    @remote(phase="train")
    @abstractmethod
    def logits(self, ids: list[list[int]]) -> np.ndarray: ...


class FaultyPolicyApi(PolicyApi):
    """tests.support.faults"""

    @remote(phase="train")
    @abstractmethod
    def connect_with(self, engines: list[ActorHandle], bucket_bytes: int) -> None: ...

    @remote(phase="train")
    @abstractmethod
    def disturb(self, fault: str) -> None: ...

    @remote(phase="train")
    @abstractmethod
    def refuse_descriptions(self, refuse: bool) -> None: ...

    @remote(phase="train")
    @abstractmethod
    def buckets(self) -> int: ...


class FaultyRolloutApi(RolloutApi):
    """tests.support.faults"""

    @remote(phase="train")
    @abstractmethod
    def leave_out(self, precaution: str) -> None: ...

    @remote(phase="train")
    @abstractmethod
    def begin_answer(self) -> None: ...

    @remote(phase="train")
    @abstractmethod
    def drop_answer(self) -> None: ...


class SharingApi(WorkerApi):
    """tests.support.sharing"""

    @remote(phase="train")
    @abstractmethod
    def leave(self, alone: bool) -> None: ...

    @remote(phase="train")
    @abstractmethod
    def storage(self) -> dict[int, int]: ...


class SharingTrainerApi(SharingApi):
    """tests.support.sharing"""

    @remote(phase="train")
    @abstractmethod
    def saved(self) -> set[str]: ...


class DyingRolloutApi(RolloutApi):
    """tests.support.dying_workers"""

    @remote(phase="train")
    @abstractmethod
    def go_wrong(self, after: str, times: int) -> None: ...


class RaisingApi(WorkerApi):
    """tests.support.raising"""

    @remote(phase="train")
    @abstractmethod
    def fail(self, how: str) -> None: ...

    @remote(phase="train")
    @abstractmethod
    def ping(self) -> int: ...
