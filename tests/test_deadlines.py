"""How long a call may take, and how often a worker may be replaced."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from configs.schema import DeadlineSettings, RecoverySettings, Role
from orchestrator.deadlines import Deadlines
from orchestrator.failures import Failure, Kind, WorkerError
from orchestrator.recovery import Recovery


def test_a_phase_that_is_named_gets_what_it_says() -> None:
    deadlines = Deadlines(DeadlineSettings(generate=7))
    deadlines.observe("generate", 1.0, time.monotonic() - 500)
    assert deadlines.seconds("generate", 1000) == 7
    assert deadlines.setting("generate") == "deadlines.generate"


def test_other_calls_go_by_what_they_took_before() -> None:
    deadlines = Deadlines(DeadlineSettings(first=100, least=20, patience=10))
    assert deadlines.seconds("values", 50) == 100
    for tokens, seconds in ((1000, 4.0), (1000, 2.0), (100, 0.1)):
        deadlines.observe("values", tokens, time.monotonic() - seconds)
    assert deadlines.seconds("values", 1000) == pytest.approx(40, rel=0.01)
    assert deadlines.seconds("values", 5000) == pytest.approx(200, rel=0.01)
    assert deadlines.seconds("values", 10) == 20, "a small call has its fixed costs"
    assert deadlines.seconds("log_probs", 1000) == 100, "another call is another matter"


def failure(kind: Kind, role: Role, ranks: tuple[int, ...] = (0,)) -> WorkerError:
    casualties = () if kind == "error" else tuple((role, rank) for rank in ranks)
    return WorkerError(Failure(kind, role, ranks, "values", "score", f"{role} failed", casualties=casualties))


def test_an_error_of_its_own_is_not_survived(tmp_path: Path) -> None:
    error = failure("error", "critic")
    with pytest.raises(WorkerError) as raised:
        Recovery(RecoverySettings(), tmp_path).consider(error)
    assert raised.value is error
    [record] = tmp_path.iterdir()
    assert record.name == "0001-critic-error.txt"
    assert record.read_text().endswith("not survivable\n")


def test_each_role_has_its_budget(tmp_path: Path) -> None:
    recovery = Recovery(RecoverySettings(restarts=2), tmp_path)
    for role in ("critic", "actor"):
        recovery.consider(failure("died", role))
        recovery.consider(failure("hung", role))
    with pytest.raises(WorkerError, match=r"actor failed\n  not replaced again: 2 restarts in 3600 s are allowed"):
        recovery.consider(failure("died", "actor"))
    assert len(list(tmp_path.iterdir())) == 5


def test_restarts_are_counted_over_a_window() -> None:
    recovery = Recovery(RecoverySettings(restarts=1, window=0.2))
    recovery.consider(failure("died", "critic"))
    time.sleep(0.3)
    recovery.consider(failure("died", "critic"))
    with pytest.raises(WorkerError, match="not replaced again"):
        recovery.consider(failure("died", "critic"))
