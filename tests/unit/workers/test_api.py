"""Declared remote methods: what a type checker sees of their calls, and what is refused when they are made."""

from __future__ import annotations

import logging
import re
import sys
from abc import abstractmethod
from pathlib import Path
from subprocess import run
from typing import Any

import pytest

from configs.renamed import log_rename
from orchestrator.worker_groups.team import Publication, Team
from workers import api
from workers.api import PolicyApi, RemoteMethod, Request, TrainerApi, ValueApi, WorkerApi, is_remote, remote, request

ROOT = Path(api.__file__).parents[1]

CALLS = """
from abc import abstractmethod
from collections.abc import Sequence

from orchestrator.worker_groups.calls import WorkerGroup
from workers.api import PolicyApi, TrainerApi, WorkerApi, remote, request


class JudgeApi(WorkerApi):
    @remote(phase="score")
    @abstractmethod
    def judge(self, answers: list[str], strict: bool = False) -> list[float]: ...

    @remote(phase="sing")  # arg-type: no such phase
    @abstractmethod
    def sing(self) -> None: ...


class Judge(JudgeApi):
    def judge(self, answers: str) -> list[float]:  # override: not what was declared
        return []


def calls(group: WorkerGroup) -> None:
    sizes: list[int] = [size for size, _ in group.call(PolicyApi.sync_weights, 1).get()]
    group.call(PolicyApi.sync_weight, 1)  # attr-defined: misspelled
    group.call(PolicyApi.sync_weights, "one")  # arg-type: an int is required
    group.call(PolicyApi.sync_weights)  # call-arg: it lacks the version
    group.setup_call(TrainerApi.save, folder=1)  # arg-type: a str is required
    group.to([0], WorkerApi.join, "host")  # arg-type: host and port are required
    group.first(JudgeApi.judge, [], strict=True)
    texts: list[str] = group.first(JudgeApi.judge, [])  # arg-type: it returns numbers
    requests = [request(JudgeApi.judge, [text]) for text in "ab"]
    scores: list[list[float]] = group.scatter(requests).get()
    total: float = group.scatter(requests).reduce(lambda results: sum(map(sum, results))).get()
    group.scatter([request(JudgeApi.judge, [1.0])])  # list-item: texts are required
    ref, sizes = group.scatter([request(TrainerApi.snapshot)], stored_returns=1).get()[0]  # assignment: they are names
    group.scatter(requests, stored_returns=1)  # call-overload: it returns one value
"""
"""Each line that ends in a comment is wrong; the comment begins with mypy's code of the error."""


@pytest.mark.slow
def test_a_type_checker_sees_a_misspelled_method_and_a_wrong_argument(tmp_path: Path) -> None:
    file = tmp_path / "calls.py"
    file.write_text(CALLS)
    lines = ((number, re.search(r"# ([\w-]+): ", line)) for number, line in enumerate(CALLS.splitlines(), 1))
    expected = {(number, comment[1]) for number, comment in lines if comment}
    command = [sys.executable, "-m", "mypy", "--follow-imports=silent", "--no-error-summary", str(file)]
    done = run(command, cwd=ROOT, capture_output=True, text=True)
    reported = {
        (int(number), code) for number, code in re.findall(r"calls\.py:(\d+): error: .*\[([\w-]+)\]", done.stdout)
    }
    assert reported == expected, done.stdout + done.stderr


class Api(WorkerApi):
    @remote(phase="score")
    @abstractmethod
    def values(self, first: int, second: int = 2, third: int = 3) -> int: ...

    @remote(phase="score")
    @abstractmethod
    def named(self, *, name: str) -> None: ...

    def undeclared(self) -> None: ...


class Implementation(Api):
    def values(self, *args: Any, **kwargs: Any) -> int:
        return 0

    def helper(self) -> None: ...


def test_a_declaration_has_a_name_and_a_phase() -> None:
    assert RemoteMethod.of(PolicyApi.sync_weights) == RemoteMethod("sync_weights", "weight_sync")
    assert RemoteMethod.of(ValueApi.save) == RemoteMethod("save", "save") == RemoteMethod.of(TrainerApi.save)
    with pytest.raises(ValueError, match=r"^phase of a remote method: was 'sing'; must be start, generate, "):
        remote(phase="sing")  # type: ignore[arg-type]


def test_what_is_not_declared_cannot_be_called() -> None:
    with pytest.raises(
        TypeError, match=r"^Api.undeclared cannot be called remotely: it is not marked with workers.api.rem"
    ):
        request(Api.undeclared)
    assert [is_remote(Implementation, name) for name in ("values", "location", "undeclared", "helper", "spec", "_abc_impl")] == [
        True, True, False, False, False, False,
    ]  # fmt: skip


def test_arguments_that_are_named_travel_in_order() -> None:
    method = RemoteMethod("values", "score")
    assert request(Api.values, 1) == Request(method, (1,))
    assert request(Api.values, 1, third=5) == Request(method, (1, 2, 5))
    with pytest.raises(TypeError, match="has keyword-only parameters: name"):
        request(Api.named, name="a")


def test_a_worker_that_lacks_a_declared_method_cannot_be_made() -> None:
    with pytest.raises(TypeError, match="abstract"):
        Implementation()  # type: ignore[abstract]


class UnconnectedTeam(Team):
    """A team without processes."""

    def __init__(self) -> None: ...

    def sync_weights(self, version: int) -> Publication:
        return Publication(version, 0.0, 0.0)


def test_the_old_name_of_sync_weights_works_with_one_notice(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "troupe")
    log_rename.cache_clear()
    for version in (3, 4):
        assert UnconnectedTeam().publish(version) == Publication(version, 0.0, 0.0)
    assert [record.getMessage() for record in caplog.records] == [
        "Team.publish is now Team.sync_weights; the old name goes with the next release"
    ]
