"""The workers of tests.support.dying."""

from __future__ import annotations

import os
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.support.apis import DyingRolloutApi
from workers.process.worker import Worker
from workers.rewards.worker import RewardWorker
from workers.rollout.engine import RolloutWorker
from workers.training.backend import StepOutcome
from workers.training.policy import PolicyWorker
from workers.training.trainer import Trainer
from workers.training.value import ValueWorker
from workers.weight_sync.probe import Probe


class _Dying(Worker):
    """Common part of the workers below."""

    def reach(self, point: str) -> bool:
        """Send the signal that is due at this point, if any. Returns whether a fault was due."""
        counts: Counter[str] = vars(self).setdefault("counts", Counter())
        counts[point] += 1
        for number in (0, signal.SIGKILL, signal.SIGSTOP):
            path = Path(self.config.runs) / "faults" / f"{self!r}.{point}.{counts[point]}.{int(number)}"
            if path.exists():
                path.unlink()
                os.kill(os.getpid(), number)
                return True
        return False


class _DyingTrainer(_Dying, Trainer):
    def optimize(self, losses: Any, *args: Any) -> dict[str, float]:
        if "step" not in vars(self.backend):
            step = self.backend.step

            def dying(*args: Any) -> StepOutcome:
                self.reach("optimizer")
                return step(*args)

            vars(self.backend)["step"] = dying

        def share(loss: Any) -> Tensor:
            self.reach("forward")
            value: Tensor = loss()
            value.register_hook(lambda _: self.reach("backward") or None)  # a returned value would replace the gradient
            return value * float("nan") if self.reach("loss") else value

        return super().optimize([lambda loss=loss: share(loss) for loss in losses], *args)  # type: ignore[misc]

    def save(self, folder: str) -> None:
        self.reach("save")
        super().save(folder)

    def export(self, folder: str) -> None:
        if self.reach("export"):
            raise ValueError("this model cannot be written\nnor read")
        super().export(folder)


class DyingPolicy(_DyingTrainer, PolicyWorker):
    def log_probs(self, *args: Any) -> Any:
        self.reach("score")
        return super().log_probs(*args)

    def sync_weights(self, version: int) -> tuple[int, Probe]:
        self.reach("sync_weights")
        return super().sync_weights(version)


class DyingValue(_DyingTrainer, ValueWorker):
    def values(self, *args: Any) -> Any:
        self.reach("score")
        return super().values(*args)


class DyingRewards(_Dying, RewardWorker):
    def scores(self, *args: Any) -> Any:
        self.reach("score")
        return super().scores(*args)


class DyingRollout(_Dying, RolloutWorker, DyingRolloutApi):
    wrong: tuple[str, int] = ("", 0)

    def go_wrong(self, after: str, times: int) -> None:
        """Compute with wrong weights after each of the next `times` calls of `load` or `finish_weight_update`."""
        self.wrong = after, times

    def _follow(self, call: str) -> None:
        after, times = self.wrong
        if call == after and times:
            self.wrong = after, times - 1
            self.engine.collective_rpc(_move_a_weight)

    def finish_weight_update(self, *args: Any) -> None:
        super().finish_weight_update(*args)
        self._follow("finish_weight_update")

    def load(self, *args: Any) -> None:
        super().load(*args)
        self._follow("load")
        step = self.engine.step

        def dying() -> Any:
            if self.generating:
                self.reach("generate")
            return step()

        self.engine.step, self.generating = dying, False

    def generate(self, *args: Any) -> Any:
        self.generating = True
        try:
            return super().generate(*args)
        finally:
            self.generating = False

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.reach("sync_weights")
        super().update_weights(update_info)


def _move_a_weight(engine: Any) -> None:
    """Scale the last norm by 1.1, as if an update had not reached the kernels."""
    weight: Tensor = engine.get_model().model.norm.weight
    with torch.no_grad():
        weight.mul_(1.1)
