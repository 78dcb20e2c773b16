"""Workers that can leave their shared base and report the memory of their parameters. The plugin replaces the usual workers."""

from __future__ import annotations

from torch import nn

from tests.support.apis import SharingApi, SharingTrainerApi
from tests.support.learners import Open, OpenPolicy, OpenValue
from workers.models.shared_base import SharedBase
from workers.process.worker import Worker
from workers.process.worker_process import KINDS
from workers.rewards.worker import RewardWorker


class _Sharing(Worker, SharingApi):
    left: SharedBase | None = None

    def leave(self, alone: bool) -> None:
        """alone: the next `load` uses a base of its own; else the shared one."""
        if alone and self.base:
            self.left, self.base = self.base, None
        elif not alone and self.left:
            self.base, self.left = self.left, None

    def holds(self) -> list[nn.Module]:
        raise NotImplementedError

    def storage(self) -> dict[int, int]:
        """Address -> bytes of the parameters' memory."""
        sizes = {}
        for model in self.holds():
            for parameter in model.parameters():
                memory = parameter.untyped_storage()
                sizes[memory.data_ptr()] = memory.nbytes()
        return sizes


class _SharingTrainer(_Sharing, Open, SharingTrainerApi):
    def holds(self) -> list[nn.Module]:
        return [self.model]

    def saved(self) -> set[str]:
        """Names of the weights in a checkpoint."""
        return set(self.engine.module_state_dict(exclude_frozen_parameters=True))


class SharingPolicy(_SharingTrainer, OpenPolicy):
    """A language model."""


class SharingValue(_SharingTrainer, OpenValue):
    """A scalar model."""


class SharingRewards(_Sharing, RewardWorker):
    def holds(self) -> list[nn.Module]:
        return list(self.models.values())


KINDS |= {
    "policy": "tests.support.sharing:SharingPolicy",
    "value": "tests.support.sharing:SharingValue",
    "rewards": "tests.support.sharing:SharingRewards",
}
