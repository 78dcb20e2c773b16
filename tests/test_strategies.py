"""Every strategy, on two ranks: what is learned, refused, saved, published and exported is the same wherever states lie."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from configs.schema import Strategy
from orchestrator.calls import WorkerGroup
from tests.hosts import Held, Hosts, load, same_held, train
from tests.models import make_model

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


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"), "llama", tied=True, grouped=True)


@pytest.fixture(scope="module")
def group(hosts: Hosts) -> Iterator[WorkerGroup]:
    """Two ranks, which take up one strategy after another."""
    yield hosts.group("open_policy", "actor", "ddp", 2)
    hosts.stop()


def begin(group: WorkerGroup, strategy: Strategy, model: Path, **settings: Any) -> None:
    group.call("become", strategy).get()
    load(group, model, **settings)


def steps(group: WorkerGroup, *numbers: int) -> list[dict[str, float]]:
    return [train(group, step) for step in numbers]


@pytest.fixture(scope="module")
def whole(
    group: WorkerGroup, model: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[list[dict[str, float]], dict]:
    """What ddp does: its metrics of three steps, and its weights after them."""
    begin(group, "ddp", model)
    metrics = steps(group, 1, 2, 3)
    folder = tmp_path_factory.mktemp("exported")
    group.call("export", str(folder)).get()
    return metrics, load_file(folder / "model.safetensors")


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_each_strategy(group: WorkerGroup, whole: Any, model: Path, strategy: Strategy, tmp_path: Path) -> None:
    metrics, weights = whole
    begin(group, strategy, model)
    assert train(group, 1, spoil="nan loss")["refused"] == 1.0, "before AdamW has any state"
    found = steps(group, 1, 2)
    before: Held = group.call("held").get()
    for how in ("infinite loss, finite gradients", "explosion", "finite loss, nan gradients"):
        assert train(group, 3, spoil=how)["refused"] == 1.0, how
        same_held(group.call("held").get(), before)
    group.call("save", str(tmp_path / "saved")).get()
    files: list[Any] = group.call("snapshot").get()
    found += steps(group, 3)
    for step, (a, b) in enumerate(zip(found, metrics, strict=True), start=1):
        assert a == pytest.approx(b, rel=2e-4, abs=2e-5), step
    assert found[0]["grad_norm"] > 1.0, "gradients are clipped"
    group.call("export", str(tmp_path / "exported")).get()
    exported = load_file(tmp_path / "exported" / "model.safetensors")
    assert exported.keys() == weights.keys()
    assert all(float((exported[n] - weights[n]).abs().mean()) < 1e-5 for n in weights)
    after: Held = group.call("held").get()

    begin(group, strategy, model)
    group.call("restore", str(tmp_path / "saved")).get()
    same_held(group.call("held").get(), before)
    assert steps(group, 3) == found[2:]
    same_held(group.call("held").get(), after)
    begin(group, strategy, model)
    names = sorted({name for _, listed in files for name in listed})
    group.scatter("restore_snapshot", [(mine, files[0][0], names) for mine, _ in files]).get()
    same_held(group.call("held").get(), before)
    assert steps(group, 3) == found[2:]
