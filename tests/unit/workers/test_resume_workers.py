"""A group continues from another group's checkpoint: bit for bit with the same number of ranks, otherwise within rounding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from configs.schema import Strategy
from orchestrator.worker_groups.failures import WorkerError
from tests.support.apis import OpenApi
from tests.support.hosts import Held, Hosts, close, load, same_held, steps
from tests.support.models import make_model
from workers.api import TrainerApi, request

pytestmark = pytest.mark.slow

ROUNDING = 1e-5
LORA = {"rank": 4, "targets": ["q_proj", "v_proj", "down_proj"]}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"), "llama", tied=True, grouped=True)


@pytest.mark.parametrize(
    ("strategy", "settings"),
    [
        ("ddp", {}),
        ("ddp", {"lora": LORA}),
        ("ddp", {"dtype": "bfloat16"}),
        ("zero1", {}),
        ("zero1", {"lora": LORA}),
        ("zero2", {}),
        ("zero2", {"dtype": "bfloat16"}),
        ("zero3", {}),
        ("zero3", {"lora": LORA}),
        ("zero3", {"dtype": "bfloat16"}),
    ],
    ids=str,
)
def test_a_new_group_goes_on_bit_for_bit(
    hosts: Hosts, model: Path, tmp_path: Path, strategy: Strategy, settings: dict[str, Any]
) -> None:
    group = hosts.group("open_policy", "actor", strategy, 2)
    load(group, model, **settings)
    steps(group, 1, 2)
    group.call(TrainerApi.save, str(tmp_path / "saved")).get()
    files: list[Any] = group.call(TrainerApi.snapshot).get()
    saved: Held = group.call(OpenApi.held).get()
    expected = steps(group, 3, 4)
    after: Held = group.call(OpenApi.held).get()

    group = hosts.group("open_policy", "actor", strategy, 2, another=True)
    load(group, model, **settings)
    group.call(TrainerApi.restore, str(tmp_path / "saved")).get()
    same_held(group.call(OpenApi.held).get(), saved)
    assert steps(group, 3, 4) == expected
    same_held(group.call(OpenApi.held).get(), after)

    load(group, model, **settings)
    names = sorted({name for _, listed in files for name in listed})
    group.scatter([request(TrainerApi.restore_snapshot, mine, files[0][0], names) for mine, _ in files]).get()
    same_held(group.call(OpenApi.held).get(), saved)
    assert steps(group, 3, 4) == expected


@pytest.mark.parametrize("strategy", ["ddp", "zero1", "zero2", "zero3"])
def test_another_number_of_ranks_goes_on_within_rounding(
    hosts: Hosts, model: Path, tmp_path: Path, strategy: Strategy
) -> None:
    """The losses, rates and gradients' norms of the next steps."""
    groups = {ranks: hosts.group("open_policy", "actor", strategy, ranks) for ranks in (1, 2)}
    both: list[dict[str, Any]] = [{}, {"lora": LORA}]
    for settings in both:
        expected = {}
        for ranks, group in groups.items():
            load(group, model, **settings)
            steps(group, 1, 2)
            group.call(TrainerApi.save, str(tmp_path / f"by-{ranks}")).get()
            expected[ranks] = steps(group, 3, 4, 5)
        for ranks, other in ((1, 2), (2, 1)):
            load(groups[ranks], model, **settings)
            groups[ranks].call(TrainerApi.restore, str(tmp_path / f"by-{other}")).get()
            close(steps(groups[ranks], 3, 4, 5), expected[other], ROUNDING)
        with pytest.raises(AssertionError):
            close(expected[1][1:], expected[1][:-1], ROUNDING)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["by-1", "by-2"], "nothing else is left"


@pytest.mark.parametrize("strategy", ["zero2", "zero3"])
def test_bfloat16_goes_on_from_its_float32_masters(
    hosts: Hosts, model: Path, tmp_path: Path, strategy: Strategy
) -> None:
    two, one = hosts.group("open_policy", "actor", strategy, 2), hosts.group("open_policy", "actor", strategy, 1)
    load(two, model, dtype="bfloat16")
    steps(two, 1, 2)
    two.call(TrainerApi.save, str(tmp_path / "saved")).get()
    load(one, model, dtype="bfloat16")
    one.call(TrainerApi.restore, str(tmp_path / "saved")).get()
    for a, b in zip(steps(one, 3, 4), steps(two, 3, 4), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=0.02)


def test_zero_1_and_2_take_over_from_one_another(hosts: Hosts, model: Path, tmp_path: Path) -> None:
    one, two = (
        hosts.group("open_policy", "actor", "zero1", 2),
        hosts.group("open_policy", "actor", "zero2", 2, another=True),
    )
    load(one, model)
    steps(one, 1, 2)
    one.call(TrainerApi.save, str(tmp_path / "saved")).get()
    load(two, model)
    two.call(TrainerApi.restore, str(tmp_path / "saved")).get()
    close(steps(two, 3, 4), steps(one, 3, 4), ROUNDING)


def test_another_strategy_is_refused_by_name(hosts: Hosts, model: Path, tmp_path: Path) -> None:
    whole = hosts.group("open_policy", "actor", "ddp")
    load(whole, model)
    steps(whole, 1)
    whole.call(TrainerApi.save, str(tmp_path / "saved")).get()
    sharded = hosts.group("open_policy", "actor", "zero3")
    load(sharded, model)
    with pytest.raises(WorkerError, match="saved was saved with ddp, and cannot continue with zero3"):
        sharded.call(TrainerApi.restore, str(tmp_path / "saved")).get()


@pytest.mark.parametrize("strategy", ["ddp", "zero1", "zero2", "zero3"])
def test_a_group_that_has_not_learned_yet(hosts: Hosts, model: Path, tmp_path: Path, strategy: Strategy) -> None:
    """Like the actor while only the critic is trained."""
    groups = {ranks: hosts.group("open_policy", "actor", strategy, ranks) for ranks in (1, 2)}
    load(groups[2], model)
    groups[2].call(TrainerApi.save, str(tmp_path / "saved")).get()
    expected = steps(groups[2], 1, 2)
    for ranks, group in groups.items():
        load(group, model)
        group.call(TrainerApi.restore, str(tmp_path / "saved")).get()
        metrics = steps(group, 1, 2)
        if ranks == 2:
            assert metrics == expected
        close(metrics, expected, ROUNDING)
