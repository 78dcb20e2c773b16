"""Every exception of a worker's process reaches the driver with its type, whole text and traceback."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import ray

from orchestrator.worker_groups.calls import Call, WorkerGroup
from orchestrator.worker_groups.failures import WorkerError
from placement import Cluster
from tests.support.apis import RaisingApi
from tests.support.hosts import DEADLINES, run_config
from workers.api import RemoteMethod, Request
from workers.data.step_inputs import StaleWeights
from workers.process.remote_error import RemoteError, headline, headline_of_traceback
from workers.process.worker import WorkerSpec
from workers.process.worker_process import WorkerProcess

Start = Callable[..., WorkerGroup]


@pytest.fixture(scope="module")
def start(ray_here: Cluster) -> Iterator[Start]:
    """start(**environment): a group of one process with the plugin tests.support.raising."""
    groups: list[WorkerGroup] = []

    def get(**environment: str) -> WorkerGroup:
        spec = WorkerSpec(run_config(plugins=["tests.support.raising"]), "reference", 0, 1, "cpu", 1)
        actor = ray.remote(WorkerProcess).options(num_cpus=0, runtime_env={"env_vars": environment})
        groups.append(WorkerGroup("reference", [actor.remote([("raising", spec)])], "reference", DEADLINES))
        groups[-1].replace_failed = lambda error: pytest.fail(f"replaced because of: {error}")
        return groups[-1]

    yield get
    for handle in (handle for group in groups for handle in group.handles):
        ray.kill(handle)


@pytest.fixture(scope="module")
def group(start: Start) -> WorkerGroup:
    return start()


@pytest.mark.parametrize(
    ("how", "text", "more"),
    [
        ("lock", "OSError: no model gpt-9 is here", "Check your internet connection"),
        (
            "pydantic",
            "ValidationError: 1 validation error for Shape width Input should be a valid integer",
            "input_value",
        ),
        ("plugin", "OfThePlugin: first line", "LookupError: its cause"),
        ("pickled", "RaisesWhenPickled: of no type that Ray knows", "tests.support.raising.RaisesWhenPickled"),
        ("exit", "SystemExit: the library gave up", "sys.exit("),
    ],
)
def test_any_exception_reaches_the_driver_with_type_text_and_traceback(
    group: WorkerGroup, how: str, text: str, more: str
) -> None:
    before = group.first(RaisingApi.ping)
    with pytest.raises(WorkerError) as e:
        group.first(RaisingApi.fail, how)
    failure = e.value.failure
    assert failure.text.startswith(f"reference rank 0 failed in fail: {text}")
    assert failure.kind == "error" and not failure.survivable
    assert isinstance(failure.cause, RemoteError)
    assert more in failure.detail and "raising.py" in failure.detail
    assert failure.detail.count("Error: first line") <= 1, "shown once"
    assert group.first(RaisingApi.ping) == before, "the same process still runs"


def test_troupes_exceptions_arrive_unchanged(group: WorkerGroup) -> None:
    with pytest.raises(WorkerError, match=r"^reference rank 0 failed in fail: StaleWeights: version 3\n") as e:
        group.first(RaisingApi.fail, "ours")
    assert isinstance(e.value.failure.cause, StaleWeights)


def test_a_method_that_is_not_declared_is_refused(group: WorkerGroup) -> None:
    """Even if called by its name. An override of a declared method is remote, other methods of the class are not."""
    for name in ("tensors", "spec", "__init__", "no_such_method"):
        with pytest.raises(WorkerError) as e:
            Call(group, {0: Request(RemoteMethod(name, "train"), ())}).get()
        assert e.value.failure.text.endswith(
            f"AttributeError: Raising declares no remote method {name} (workers.api.remote)"
        )
    assert group.first(RaisingApi.memory) > 0


def test_a_process_that_cannot_start_gives_the_reason(start: Start) -> None:
    """It does not count as a dead process, which would be replaced."""
    with pytest.raises(WorkerError) as e:
        start(TESTS_RAISING="broken").first(RaisingApi.ping)
    assert e.value.failure.text == "reference rank 0 failed in ping: ImportError: the plugin lacks a library"
    assert e.value.failure.kind == "error"


def test_the_headline_of_a_message() -> None:
    assert headline("") == headline(" \n ") == ""
    assert headline("one\ntwo") == "one"
    assert headline("\n  Errors:\n  a\n\n  b\n  c") == "Errors: a b"
    assert headline("x" * 1000) == "x" * 400 + "..."


def test_the_headline_of_a_traceback() -> None:
    chained = """Traceback (most recent call last):
  File "a.py", line 1, in f
    raise KeyError(1)
KeyError: 1

During handling of the above exception, another exception occurred:

Traceback (most recent call last):
  File "a.py", line 3, in f
    raise package.Broken("x")
    ^^^^^^^^^^^^^^^^^^^^^^^^^
package.Broken: first: line
last line"""
    assert headline_of_traceback(chained) == "Broken: first: line"
    assert headline_of_traceback("Traceback (most recent call last):\n  File\nKeyboardInterrupt") == "KeyboardInterrupt"
    assert headline_of_traceback("no traceback") == ""
