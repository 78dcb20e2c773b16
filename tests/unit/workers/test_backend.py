"""The contract between Trainer and a training backend: a second backend trains the same without other changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from orchestrator.worker_groups.calls import WorkerGroup
from tests.support.hosts import Hosts, close, load, steps, train
from tests.support.models import make_model
from workers.api import TrainerApi

pytestmark = pytest.mark.slow


def exported(group: WorkerGroup, folder: Path) -> dict[str, torch.Tensor]:
    """Export, which also checks that the folder, read back, gives the outputs of the trained model."""
    group.call(TrainerApi.export, str(folder)).get()
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("lora", [None, {"rank": 4}], ids=["full", "lora"])
def test_a_backend_of_pytorch_alone_trains_as_deepspeed_does(
    hosts: Hosts, tmp_path: Path, lora: dict[str, Any] | None
) -> None:
    model = make_model(tmp_path / "model", "llama", tied=True)
    deepspeed, plain = hosts.group("open_policy", "actor"), hosts.group("open_plain", "actor")
    results = {}
    for name, group in (("deepspeed", deepspeed), ("plain", plain)):
        load(group, model, lora=lora)
        results[name] = steps(group, 1, 2), exported(group, tmp_path / name)
    assert results["plain"][0][0]["loss"] > 1.01 * results["plain"][0][1]["loss"], "the first step moved the weights"
    close(results["plain"][0], results["deepspeed"][0], 1e-5)
    for name, weight in results["deepspeed"][1].items():
        torch.testing.assert_close(results["plain"][1][name], weight, rtol=0, atol=1e-5)


def test_it_skips_steps_and_continues_from_a_checkpoint(hosts: Hosts, tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", "llama")
    group = hosts.group("open_plain", "actor")
    load(group, model)
    steps(group, 1)
    group.call(TrainerApi.save, str(tmp_path / "saved")).get()
    expected = steps(group, 2), exported(group, tmp_path / "expected")

    load(group, model)
    group.call(TrainerApi.restore, str(tmp_path / "saved")).get()
    assert train(group, 2, spoil="nan loss")["skipped"] == 1.0
    assert train(group, 2, spoil="finite loss, nan gradients")["skipped"] == 1.0
    assert (batch := group.first(TrainerApi.skipped_batch)) and batch["ids"].size
    assert steps(group, 2) == expected[0]
    weights = exported(group, tmp_path / "again")
    assert all(torch.equal(weights[name], weight) for name, weight in expected[1].items())
