"""What tests of several files share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from placement.cluster import Cluster

if TYPE_CHECKING:
    from orchestrator import Result
    from tests.support.hosts import Hosts
    from tests.support.services import Service


@pytest.hookimpl(tryfirst=True)  # before pytest leaves out what `-m` does not name
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests on the shared cluster run last, or in a process of their own (`-m shared`): a process has one Ray at a time, and
    other tests start their own."""
    for item in items:
        if "ray_here" in getattr(item, "fixturenames", ()):
            item.add_marker("shared")
    items.sort(key=lambda item: item.get_closest_marker("shared") is not None)


@pytest.fixture(autouse=True, scope="module")
def without_plugins_of_other_files() -> Iterator[None]:
    """What the plugins of a file's fixtures add to the settings ends with the file."""
    from tests.support.settings import take_back

    restore = take_back()
    yield
    restore()


@pytest.fixture(autouse=True)
def without_plugins_of_other_tests() -> Iterator[None]:
    """What a test's plugins add to the settings ends with it. A plugin is therefore imported by a test, not by its module."""
    from tests.support.settings import take_back

    restore = take_back()
    yield
    restore()


@pytest.fixture(scope="session")
def ray_here() -> Iterator[Cluster]:
    """A small Ray cluster on this machine, for all tests that do not need one of their own.

    It claims 8 CPUs whatever the machine has; set `placement.cpus_per_device: 1`, so that each worker gets one thread.
    It has no dashboard. Runs and teams that are started while it lives use it; so can the tests' child processes, by RAY_ADDRESS.
    """
    from orchestrator.run.ray_cluster import local_cluster

    with local_cluster(num_cpus=8, num_gpus=0, include_dashboard=False, object_store_memory=500 * 2**20) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def micro(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The config of a run so small that its stages take seconds (tests/support/micro.py), and that may have faults
    (tests/support/dying.py)."""
    from tests.support.micro import write_micro

    return write_micro(tmp_path_factory.mktemp("micro"), plugins=["tests.support.dying"])


@pytest.fixture(scope="session")
def whole(micro: Path, ray_here: Cluster) -> Result:
    """All its stages, never interrupted, with two engines."""
    from orchestrator import load_config, run_stages
    from tests.support.runs import TWO_ENGINES

    return run_stages(load_config(micro, [TWO_ENGINES]))


@pytest.fixture(scope="module")
def hosts(ray_here: Cluster) -> Iterator[Hosts]:
    """Groups of workers that the tests of a file share."""
    from tests.support.hosts import Hosts

    started = Hosts()
    try:
        yield started
    finally:
        started.stop()


@pytest.fixture
def service() -> Iterator[Service]:
    """A service for `http` rewards that answers well until the test plans otherwise."""
    from tests.support.services import Service

    with Service().running() as started:
        yield started
