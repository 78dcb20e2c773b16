"""Published capacities of the original benchmark, compared with the memory model's under the same settings."""

from __future__ import annotations

import pytest

from placement.memory.capacity import PUBLISHED, Published, large_estimate, largest_that_fits, steps_apart
from placement.models import Architecture
from placement.models.known_models import KNOWN
from placement.types import GIB


@pytest.mark.parametrize("case", PUBLISHED, ids=lambda c: f"{c.machine}-{c.strategy}-{c.largest}{'-lora' * c.lora}")
def test_published_capacities_are_reproduced_within_a_step(case: Published) -> None:
    assert abs(steps_apart(case, largest_that_fits(case))) <= 1


def test_most_are_reproduced_exactly() -> None:
    assert sum(steps_apart(case, largest_that_fits(case)) == 0 for case in PUBLISHED) >= 10


@pytest.mark.parametrize(("nodes", "host"), [(4, 1600), (8, 880)])
def test_175_billion_parameters_train_on_4_and_on_8_nodes(nodes: int, host: int) -> None:
    memory = large_estimate(nodes)
    assert not memory.missing
    held = max(place.used["train"] for place in memory.places if place.name.startswith("each of"))
    assert 0.7 * host * GIB < held < host * GIB, "host memory is the limit: 22 bytes of each parameter over all nodes"


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("Qwen/Qwen2.5-0.5B-Instruct", 494_032_768),
        ("Qwen/Qwen2.5-1.5B", 1_543_714_304),
        ("Qwen/Qwen2.5-7B", 7_615_616_512),
        ("meta-llama/Llama-3.2-1B", 1_235_814_400),
        ("meta-llama/Llama-3.1-8B-Instruct", 8_030_261_248),
        ("facebook/opt-125m", 125_239_296),
        ("facebook/opt-350m", 331_196_416),
        ("facebook/opt-1.3b", 1_315_758_080),
    ],
)
def test_shapes_that_are_known_by_name(name: str, count: int) -> None:
    assert Architecture.of(name).parameters == count


def test_every_known_shape_is_as_large_as_its_name_says() -> None:
    for name in KNOWN:
        size, unit = name.rsplit("-", 1)[1][:-1], name[-1].lower()
        assert Architecture.of(name).parameters == pytest.approx(float(size) * {"m": 1e6, "b": 1e9}[unit], rel=0.25), (
            name
        )
