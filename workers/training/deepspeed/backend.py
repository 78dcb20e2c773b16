"""Training with DeepSpeed: ZeRO 0 to 3, with states on the device, in host memory or on NVMe."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn

from configs.schema import OptimizerSettings
from configs.zero import ZERO
from placement.memory.states import BUCKET_ELEMENTS
from workers.models.linear import add_in_place
from workers.training.backend import BackendSetup, StepOutcome, TrainBackend
from workers.training.deepspeed.config import deepspeed_settings, takes_over
from workers.training.deepspeed.nvme import own_folder, read_states, write_states
from workers.training.deepspeed.universal_checkpoint import universal

# The op serves only inference_all_reduce, and building it would need a compiler.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

_TAG, _NOTE = "state", "cut.json"
"""In a saved folder: DeepSpeed's files, and how they are sharded."""


class DeepSpeedBackend(TrainBackend):
    """The TrainBackend of all strategies in configs.zero."""

    def __init__(self, setup: BackendSetup) -> None:
        self.setup = setup
        self.zero = ZERO[setup.strategy]
        self.model: nn.Module | None = None
        self.engine: deepspeed.DeepSpeedEngine | None = None
        self.learns = False
        self._accept: Callable[[float], bool] = lambda norm: False
        """The `accept` of the current step."""
        if not deepspeed.comm.is_initialized():
            deepspeed.init_distributed(dist_backend=dist.get_backend())

    # ------------------------------------------------------------ building

    def prepare(self, model: nn.Module, optimizer: OptimizerSettings | None) -> nn.Module:
        self.model, self.learns = model, optimizer is not None
        if optimizer is None and self.zero.stage < 3:
            return model.requires_grad_(False).eval().to(self.setup.device)
        settings = deepspeed_settings(self.setup.strategy, self.setup.model, self.setup.device, self._new_nvme_folder())
        if self.zero.stage == 3:
            _register_adapters(model)
            # Shards tensor by tensor; deepspeed.initialize would first move the whole model to the device.
            deepspeed.zero.Init(module=model, config_dict_or_path=settings)
        if optimizer is None:
            self.engine, *_ = deepspeed.initialize(model=model.requires_grad_(False).eval(), config=settings)
            return self.engine
        trained = [p for p in model.parameters() if p.requires_grad]
        adam = torch.optim.AdamW(
            trained, lr=optimizer.lr, betas=optimizer.betas, weight_decay=optimizer.weight_decay, fused=True
        )
        plain = not self.zero.stage and self.setup.model.dtype == "float32"
        if not plain:
            settings["gradient_clipping"] = optimizer.max_grad_norm
        else:  # DeepSpeed would clip here without returning the norm, and at 1 by default
            settings["gradient_clipping"] = 0.0
            clip = torch.nn.utils.clip_grad_norm_
            adam.register_step_pre_hook(
                lambda adam, *_: setattr(adam, "_global_grad_norm", float(clip(trained, optimizer.max_grad_norm)))
            )
        # No update before the first real step: one of DeepSpeed's optimizers takes a step to build its states.
        adam.found_inf = torch.ones((), device=self.setup.device)  # type: ignore[attr-defined]
        self.engine, *_ = deepspeed.initialize(model=model, optimizer=adam, config=settings)
        if not self.zero.stage:  # DeepSpeed sums gradients in float32 only with ZeRO; here PyTorch does
            for parameter in trained:
                parameter.grad_dtype = torch.float32
        # Unsharded gradients are reduced through a flat copy, which by default holds all of them.
        self.engine.allreduce_gradients = partial(self.engine.allreduce_gradients, bucket_size=BUCKET_ELEMENTS)
        adam.register_step_pre_hook(self._before_adam)
        if plain and self.setup.device.type == "cpu":
            # DeepSpeed would free the gradients after each step, and the next step would request the pages again.
            self.engine.zero_grad = partial(model.zero_grad, set_to_none=False)
            if self.setup.model.lora is None:  # for the small matrices of adapters it costs more than it saves
                add_in_place(model)
        return self.engine

    def _new_nvme_folder(self) -> str | None:
        if not self._on_nvme:
            return None
        assert self.setup.nvme_path is not None
        return own_folder(self.setup.nvme_path, self.setup.name)

    @property
    def _on_nvme(self) -> bool:
        return self.zero.optimizer == "nvme"

    # ------------------------------------------------------------ steps

    def backward(self, loss: Tensor, last: bool) -> None:
        assert self.engine is not None
        self.engine.set_gradient_accumulation_boundary(last)
        # DeepSpeed averages gradients over ranks, but the losses are shares of one global mean, so they must be summed.
        self.engine.backward(loss * self.setup.world_size)

    def step(self, lr: float, accept: Callable[[float], bool]) -> StepOutcome:
        assert self.engine is not None
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr
        self._accept = accept
        self.engine.step()
        norm = float(self.engine.get_global_grad_norm())
        return StepOutcome(norm, accept(norm))

    def _before_adam(self, adam: torch.optim.Optimizer, *_: Any) -> None:
        """Runs after the global norm is computed, before AdamW updates the weights (several times per step under ZeRO-3).

        `found_inf` = 1 makes the fused AdamW skip the step: weights, moments and step count stay unchanged. DeepSpeed's code
        around it runs as in any step, so the gradients are dropped as usual.
        """
        assert self.engine is not None
        accepted = self._accept(float(self.engine.optimizer._global_grad_norm))
        device = adam.param_groups[0]["params"][0].device  # the host if the states are offloaded
        adam.found_inf = None if accepted else torch.ones((), device=device)  # type: ignore[attr-defined]

    # ------------------------------------------------------------ tensors

    @contextmanager
    def gathered(self, parameters: Sequence[Tensor]) -> Iterator[bool]:
        sharded = [p for p in parameters if hasattr(p, "ds_id")]
        if not sharded:
            yield False
            return
        with deepspeed.zero.GatheredParameters(sharded, modifier_rank=None):
            yield True

    def whole_shape(self, parameter: Tensor) -> tuple[int, ...]:
        return tuple(getattr(parameter, "ds_shape", parameter.shape))

    def resident_tensors(self) -> Iterator[Tensor]:
        if self.model is None:
            return
        for parameter in self.model.parameters():
            yield parameter
            yield from filter(torch.is_tensor, (parameter.grad, getattr(parameter, "ds_tensor", None)))
        yield from self.model.buffers()
        if self.engine is not None and self.learns:
            for group in self.engine.basic_optimizer.param_groups:
                yield from group["params"]
            for state in self.adam_states():
                yield from state.values()
            zero3: dict[str, Any] = vars(self.engine.optimizer)
            yield from zero3.get("fp32_partitioned_groups_flat", ())
            yield from filter(torch.is_tensor, (zero3.get("lp_param_buffer"), zero3.get("grad_partitions_flat_buffer")))

    def adam_states(self) -> list[dict[str, Any]]:
        """AdamW's states, one entry per tensor; empty before its first step."""
        assert self.engine is not None
        return [state for state in self.engine.basic_optimizer.state.values() if state]

    # ------------------------------------------------------------ checkpoints

    def save(self, folder: Path) -> None:
        assert self.engine is not None
        folder.mkdir(parents=True, exist_ok=True)
        if self._on_nvme:
            write_states(self.engine.optimizer, self._nvme_states(folder))
        else:
            self.engine.save_checkpoint(str(folder), tag=_TAG, exclude_frozen_parameters=bool(self.setup.model.lora))
        if self.setup.rank == 0:
            (folder / _NOTE).write_text(json.dumps(self._sharding() | {"stepped": bool(self.adam_states())}))

    def load(self, folder: Path) -> None:
        """Accepts states of ZeRO 1 for ZeRO 2 and vice versa, and offloaded states without offload and vice versa."""
        assert self.engine is not None
        saved = json.loads((folder / _NOTE).read_text())
        stepped, own = saved.pop("stepped"), self._sharding()
        if not takes_over(own["strategy"], saved["strategy"]):
            raise ValueError(
                f"strategy: {folder} was saved with {saved['strategy']}, and cannot continue with {own['strategy']}"
            )
        same_ranks = saved["ranks"] == own["ranks"]
        if self._on_nvme:
            if not same_ranks:
                text = f"{folder} was saved by {saved['ranks']} ranks, and cannot continue with {own['ranks']}: "
                raise ValueError(f"strategy: {text}zero3_nvme needs the same number")
            read_states(self.engine.optimizer, self._nvme_states(folder))
        elif same_ranks or own["strategy"] == "ddp":
            self._load_checkpoint(str(folder))
        elif stepped:
            with universal(str(folder), _TAG, self.engine) as whole:
                self._load_checkpoint(whole)
            for state in self.adam_states():
                state["step"] = state["step"].clone()  # DeepSpeed lets the parts of ZeRO-3 share one count

    def _load_checkpoint(self, folder: str) -> None:
        assert self.engine is not None
        path, _ = self.engine.load_checkpoint(folder, tag=_TAG, load_module_strict=not self.setup.model.lora)
        if path is None:
            raise FileNotFoundError(f"{folder}: contains no state of {self.setup.name}")

    def _nvme_states(self, folder: Path) -> Path:
        return folder / _TAG / f"rank-{self.setup.rank}"

    def _sharding(self) -> dict[str, Any]:
        return {"ranks": self.setup.world_size, "strategy": self.setup.strategy}


def _register_adapters(model: nn.Module) -> None:
    """Register the parameters that a module reads from other modules: ZeRO-3 releases parameters when their owner's pass ends.

    DoRA reads parameters of other modules; adapters of experts read those of the module that they wrap.
    """
    layer: Any
    for layer in model.modules():
        for adapter, reader in getattr(layer, "lora_magnitude_vector", nn.ModuleDict()).items():
            for owner in (layer.get_base_layer(), layer.lora_A[adapter], layer.lora_B[adapter]):
                for parameter in owner.parameters(recurse=False):
                    deepspeed.zero.register_external_parameter(reader, parameter)
        if hasattr(layer, "parameter_name"):
            adapters = [*layer.lora_A.values(), *layer.lora_B.values()]
            for parameter in (layer.get_param(), *(each.weight for each in adapters)):
                deepspeed.zero.register_external_parameter(layer, parameter)
