"""Every strategy, on two ranks: training, skipped steps, checkpoints and exports are the same for every location of states."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from configs.schema import Strategy
from orchestrator.preflight.settings_checks import check_offload
from orchestrator.run.run_dir import RunError
from orchestrator.worker_groups.calls import WorkerGroup
from tests.support.apis import OpenApi
from tests.support.hosts import Held, Hosts, close, load, run_config, same_held, steps, train
from tests.support.models import make_model
from workers.api import PolicyApi, TrainerApi, request
from workers.data.step_inputs import SupervisedBatch
from workers.training.schedule import StageStep

pytestmark = pytest.mark.slow

STRATEGIES: tuple[Strategy, ...] = (
    "ddp",
    "zero1",
    "zero2",
    "zero3",
    "zero1_offload",
    "zero2_offload",
    "zero3_offload",
)


AGREES = 2e-4
LORA = {"rank": 4, "targets": ["q_proj", "v_proj", "down_proj"]}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"), "llama", tied=True, grouped=True)


@pytest.fixture(scope="module")
def group(hosts: Hosts) -> WorkerGroup:
    """Two ranks that use one strategy after another."""
    return hosts.group("open_policy", "actor", "ddp", 2)


def begin(
    group: WorkerGroup, strategy: Strategy, model: Path, offload: dict[str, str] | None = None, **settings: Any
) -> None:
    group.call(OpenApi.become, strategy, offload or {}).get()
    load(group, model, **settings)


def exported(group: WorkerGroup, folder: Path) -> dict[str, torch.Tensor]:
    """The whole weights, gathered in the same way as for the engines."""
    group.call(TrainerApi.export, str(folder)).get()
    return load_file(folder / "model.safetensors")


Whole = tuple[list[dict[str, float]], dict[str, torch.Tensor]]
"""Result of ddp: metrics of three steps, and the weights after them."""


def by_ddp(group: WorkerGroup, model: Path, folder: Path, **settings: Any) -> Whole:
    begin(group, "ddp", model, **settings)
    return steps(group, 1, 2, 3), exported(group, folder)


@pytest.fixture(scope="module")
def whole(group: WorkerGroup, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    return by_ddp(group, model, tmp_path_factory.mktemp("whole"), init="random")


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_each_strategy(group: WorkerGroup, whole: Whole, model: Path, strategy: Strategy, tmp_path: Path) -> None:
    """Uses random weights: on CPU, weights of a file are memory-mapped, so their memory cannot be released."""
    metrics, weights = whole
    begin(group, strategy, model, init="random")
    assert train(group, 1, spoil="nan loss")["skipped"] == 1.0, "before AdamW has any state"
    metrics_so_far = steps(group, 1, 2)
    before: Held = group.call(OpenApi.held).get()
    for how in ("infinite loss, finite gradients", "explosion", "finite loss, nan gradients"):
        assert train(group, 3, spoil=how)["skipped"] == 1.0, how
        same_held(group.call(OpenApi.held).get(), before)
    group.call(TrainerApi.save, str(tmp_path / "saved")).get()
    files: list[Any] = group.call(TrainerApi.snapshot).get()
    for held, meanwhile in group.call(OpenApi.offload_and_onload).get():
        assert held > 0 == meanwhile
    same_held(group.call(OpenApi.held).get(), before)
    metrics_so_far += steps(group, 3)
    close(metrics_so_far, metrics, AGREES)
    assert metrics_so_far[0]["grad_norm"] > 1.0, "gradients are clipped"
    for name, weight in exported(group, tmp_path / "exported").items():
        assert float((weight - weights[name]).abs().mean()) < 1e-5, name
    after: Held = group.call(OpenApi.held).get()

    begin(group, strategy, model, init="random")
    group.call(TrainerApi.restore, str(tmp_path / "saved")).get()
    same_held(group.call(OpenApi.held).get(), before)
    assert steps(group, 3) == metrics_so_far[2:]
    same_held(group.call(OpenApi.held).get(), after)
    begin(group, strategy, model, init="random")
    names = sorted({name for _, listed in files for name in listed})
    group.scatter([request(TrainerApi.restore_snapshot, mine, files[0][0], names) for mine, _ in files]).get()
    same_held(group.call(OpenApi.held).get(), before)
    assert steps(group, 3) == metrics_so_far[2:]


@pytest.mark.parametrize(
    ("first", "then", "settings"),
    [
        ("zero1_offload", "zero2", {}),
        ("zero2", "zero2_offload", {"lora": LORA}),
        ("zero1", "zero2_offload", {}),
        ("zero3", "zero3_offload", {}),
        ("zero3_offload", "zero3", {"lora": LORA}),
    ],
)
def test_a_checkpoint_loads_with_and_without_offload(
    group: WorkerGroup, model: Path, first: Strategy, then: Strategy, settings: dict[str, Any], tmp_path: Path
) -> None:
    begin(group, first, model, **settings)
    steps(group, 1, 2)
    group.call(TrainerApi.save, str(tmp_path / "saved")).get()
    expected, weights = steps(group, 3), exported(group, tmp_path / "one")
    begin(group, then, model, **settings)
    group.call(TrainerApi.restore, str(tmp_path / "saved")).get()
    close(steps(group, 3), expected, 1e-6)
    for name, weight in exported(group, tmp_path / "two").items():
        torch.testing.assert_close(weight, weights[name], rtol=1e-5, atol=1e-6)


def test_another_number_of_ranks_continues_from_offloaded_states(
    group: WorkerGroup, hosts: Hosts, model: Path, tmp_path: Path
) -> None:
    one = hosts.group("open_policy", "actor", "ddp", 1)
    strategies: tuple[Strategy, ...] = ("zero2_offload", "zero3_offload")
    for strategy in strategies:
        begin(group, strategy, model)
        steps(group, 1, 2)
        group.call(TrainerApi.save, str(tmp_path / strategy)).get()
        begin(one, strategy, model)
        one.call(TrainerApi.restore, str(tmp_path / strategy)).get()
        close(steps(one, 3, 4), steps(group, 3, 4), 1e-5)


@pytest.mark.parametrize(("dtype", "stay"), [("float32", True), ("bfloat16", False)])
def test_gradients_of_ddp_stay_where_they_are(group: WorkerGroup, model: Path, dtype: str, stay: bool) -> None:
    """Between steps, as the plan says (`placement.memory.keeps_gradients`)."""
    begin(group, "ddp", model, dtype=dtype)
    train(group, 1)
    places: list[list[int]] = group.call(OpenApi.gradients).get()
    train(group, 2)
    assert all(map(bool, places)) == stay
    assert group.call(OpenApi.gradients).get() == places


def test_bfloat16_has_float32_weights_beside_it(group: WorkerGroup, model: Path) -> None:
    begin(group, "ddp", model, dtype="bfloat16")
    expected = steps(group, 1, 2, 3)
    for strategy in STRATEGIES:
        begin(group, strategy, model, dtype="bfloat16")
        close(steps(group, 1, 2, 3), expected, 0.03)
        for types in group.call(OpenApi.dtypes).get():
            assert types == ({"torch.bfloat16"}, {"torch.float32"}), strategy


def test_bfloat16_gradients_of_many_micro_batches_add_up(group: WorkerGroup, model: Path) -> None:
    """Repeating each row 64 times keeps the mean. With sums in bfloat16 the gradients would be off by some percent."""

    def norm(strategy: Strategy, times: int) -> float:
        begin(group, strategy, model, dtype="bfloat16")
        parts = [SupervisedBatch("rows", [np.array([row])] * times, 16 * times) for row in (0, 4)]
        metrics = group.scatter(
            [request(PolicyApi.train_demonstrations, part, StageStep(1, 1), (1, 1)) for part in parts]
        ).get()
        return metrics[0]["grad_norm"]

    for strategy in STRATEGIES[:4]:
        assert norm(strategy, 64) == pytest.approx(norm(strategy, 1), rel=0.003), strategy


def test_the_optimizer_in_bfloat16(group: WorkerGroup, model: Path, tmp_path: Path) -> None:
    begin(group, "ddp", model, dtype="bfloat16")
    expected = steps(group, 1, 2, 3)
    narrow: dict[str, Any] = {"dtype": "bfloat16", "optimizer_dtype": "bfloat16"}
    strategies: tuple[Strategy, ...] = ("zero1", "zero2", "zero3")
    for strategy in strategies:
        begin(group, strategy, model, **narrow)
        assert train(group, 1, spoil="nan loss")["skipped"] == 1.0
        metrics_so_far = steps(group, 1, 2)
        before: Held = group.call(OpenApi.held).get()
        assert train(group, 3, spoil="explosion")["skipped"] == 1.0
        same_held(group.call(OpenApi.held).get(), before)
        group.call(TrainerApi.save, str(tmp_path / strategy)).get()
        metrics_so_far += steps(group, 3)
        close(metrics_so_far, expected, 0.1)
        for types in group.call(OpenApi.dtypes).get():
            assert types == ({"torch.bfloat16"}, {"torch.bfloat16"}), strategy
        begin(group, strategy, model, **narrow)
        group.call(TrainerApi.restore, str(tmp_path / strategy)).get()
        same_held(group.call(OpenApi.held).get(), before)
        assert steps(group, 3) == metrics_so_far[2:]


def test_states_on_disk(group: WorkerGroup, hosts: Hosts, tmp_path: Path) -> None:
    """Shards of less than a megabyte never leave memory: the model is larger."""
    from workers.training.deepspeed.nvme import can_swap

    disk = tmp_path / "nvme"
    config = run_config(strategy="zero3_nvme", offload={"nvme_path": str(disk)})
    with pytest.raises(RunError, match=f"^offload.nvme_path: was '{disk}', which is not a writable folder"):
        check_offload(config)
    disk.mkdir()
    if not can_swap():
        with pytest.raises(RunError, match=r"^strategy: zero3_nvme needs libaio"):
            check_offload(config)
        pytest.skip("reading and writing NVMe needs libaio with its headers and a C++ compiler")
    large = make_model(tmp_path / "large", "llama", hidden_size=512, intermediate_size=1024)
    metrics, weights = by_ddp(group, large, tmp_path / "whole")

    def reset_roles() -> None:
        begin(group, "zero3_nvme", large, {"nvme_path": str(disk)})

    reset_roles()
    assert train(group, 1, spoil="nan loss")["skipped"] == 1.0
    metrics_so_far = steps(group, 1, 2)
    group.call(TrainerApi.save, str(tmp_path / "saved")).get()
    before = saved_states(tmp_path / "saved")
    assert train(group, 3, spoil="explosion")["skipped"] == 1.0
    group.call(TrainerApi.save, str(tmp_path / "again")).get()
    assert all(torch.equal(saved_states(tmp_path / "again")[name], before[name]) for name in before)
    metrics_so_far += steps(group, 3)
    close(metrics_so_far, metrics, AGREES)
    for name, weight in exported(group, tmp_path / "exported").items():
        assert float((weight - weights[name]).abs().mean()) < 1e-5, name
    on_disk = " ".join(path.name for path in disk.rglob("*.swp"))
    assert all(kind in on_disk for kind in ("exp_avg-", "exp_avg_sq-", "_gradient_"))

    reset_roles()
    group.call(TrainerApi.restore, str(tmp_path / "saved")).get()
    assert steps(group, 3) == metrics_so_far[2:]
    assert len(list(disk.iterdir())) == 4, "two ranks, two times"
    hosts.stop()
    deadline = time.monotonic() + 20
    while list(disk.iterdir()) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not list(disk.iterdir()), "the folder is removed with the processes"


def saved_states(folder: Path) -> dict[str, torch.Tensor]:
    return {
        f"{file.parent.name} {file.name} {name}": value
        for file in folder.rglob("*.safetensors")
        for name, value in load_file(file).items()
    }
