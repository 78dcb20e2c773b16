"""Calls to worker groups, on a real Ray cluster."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import ray
from ray.exceptions import ObjectLostError

import orchestrator.run.ray_cluster  # noqa: F401  its environment must be there before Ray is used
from configs.schema import DeadlineSettings, Role
from orchestrator.worker_groups.calls import Call, WorkerGroup, run_concurrently
from orchestrator.worker_groups.deadlines import Deadlines
from orchestrator.worker_groups.failures import WorkerError
from placement.cluster import Cluster
from tests.support.runs import wait_for
from workers.api import remote, request
from workers.process.inspection import ProcessLocation, location

pytestmark = pytest.mark.slow


class Unloadable(Exception):
    """Can be pickled but not unpickled: its arguments are not those of its constructor."""

    def __init__(self, a: int, b: int) -> None:
        super().__init__(f"of {a} and {b}\nand more")


class Unreadable:
    """A result that the driver cannot unpickle."""

    def __reduce__(self) -> tuple[Any, ...]:
        return int, ("not a number",)


class Rank:
    """The actor method that a group uses: `call`. The role is ignored."""

    def call(self, role: Role, method: str, *args: Any) -> Any:
        return getattr(self, method)(*args)

    @remote(phase="train")
    def ping(self) -> int:
        return os.getpid()

    @remote(phase="start")
    def location(self) -> ProcessLocation:
        return location()

    @remote(phase="train")
    def echo(self, *args: Any) -> Any:
        return args

    @remote(phase="train")
    def nap(self, seconds: float) -> tuple[float, float]:
        """Start and end."""
        began = time.time()
        time.sleep(seconds)
        return began, time.time()

    @remote(phase="train")
    def two(self, seconds: float, size: int) -> tuple[np.ndarray, int]:
        time.sleep(seconds)
        return np.full(size, size), size

    @remote(phase="train")
    def fail(self) -> None:
        raise LookupError("no such thing as 42")

    @remote(phase="train")
    def fail_with_a_lock(self) -> None:
        error = ValueError("holds a lock\nwhich no pickle carries")
        error.lock = threading.Lock()  # type: ignore[attr-defined]
        raise error

    @remote(phase="train")
    def fail_unloadable(self) -> None:
        raise Unloadable(1, 2)

    @remote(phase="train")
    def answer_unreadably(self) -> Unreadable:
        return Unreadable()

    @remote(phase="train")
    def lose(self) -> None:
        raise ObjectLostError("00" * 28, None, "")

    @remote(phase="train")
    def fail_or_hang(self, rank: int) -> None:
        if rank == 1:
            self.fail()
        time.sleep(600)

    @remote(phase="train")
    def hang(self, words: str, seconds: float) -> None:
        print(f"out: {words}", flush=True)
        time.sleep(seconds)

    @remote(phase="train")
    def die_as(self, pid: int) -> int:
        """Die only in the process with this id."""
        if os.getpid() == pid:
            os.kill(pid, signal.SIGKILL)
        return os.getpid()

    @remote(phase="train")
    def die(self, words: str) -> tuple[None, None]:
        print(f"out: {words}", flush=True)
        print(f"err: {words}", file=sys.stderr, flush=True)
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError("still alive")


@pytest.fixture(scope="module")
def cluster(ray_here: Cluster) -> None:
    """Ranks request no CPUs: there may be many."""


Start = Callable[..., WorkerGroup]
Handles = list[ray.actor.ActorHandle]


@pytest.fixture(scope="module")
def idle(cluster: None) -> Handles:
    """Idle ranks for reuse: a process takes a second to start."""
    return []


def group_of(idle: Handles, taken: Handles) -> Start:
    def start(role: Role, ranks: int = 1, place: str | None = None, timeout: float = 60.0) -> WorkerGroup:
        while len(idle) < ranks:
            idle.append(ray.remote(Rank).options(num_cpus=0).remote())
        mine = [idle.pop() for _ in range(ranks)]
        taken.extend(mine)
        places = ray.get([handle.call.remote(role, "location") for handle in mine])
        deadlines = Deadlines(DeadlineSettings(start=timeout, train=timeout))
        return WorkerGroup(role, mine, place or role, deadlines, locations=dict(enumerate(places)))

    return start


@pytest.fixture
def start(idle: Handles) -> Iterator[Start]:
    """start(role, ranks, place, timeout): a group of running ranks; later tests reuse them."""
    taken: Handles = []
    yield group_of(idle, taken)
    idle += taken


@pytest.fixture
def spend(idle: Handles) -> Iterator[Start]:
    """The same for groups that hang or die; their ranks are killed."""
    taken: Handles = []
    yield group_of(idle, taken)
    for handle in taken:
        ray.kill(handle)


def overlap(a: tuple[float, float], b: tuple[float, float]) -> float:
    """Seconds that two spans have in common."""
    return min(a[1], b[1]) - max(a[0], b[0])


# ---------------------------------------------------------------- results


def test_every_rank_gets_its_arguments(start: Start) -> None:
    group = start("actor", ranks=3)
    assert len(group) == 3
    assert group.call(Rank.echo, 1, "a").get() == [(1, "a")] * 3
    squares = [request(Rank.echo, rank, rank**2) for rank in range(3)]
    assert group.scatter(squares).get() == [(0, 0), (1, 1), (2, 4)]
    assert group.scatter(squares).reduce(lambda results: sum(square for _, square in results)).get() == 5
    assert group.first(Rank.ping) == group.call(Rank.ping).get()[0]
    with pytest.raises(ValueError, match="shorter"):
        group.scatter([request(Rank.echo, 0)]).get()
    with pytest.raises(ValueError, match=r"^a call to actor needs one method, not echo, ping$"):
        group.scatter([request(Rank.echo), request(Rank.ping), request(Rank.echo)])


def test_stored_values_stay_in_the_store(start: Start) -> None:
    """Results are in the order of the ranks, not of their replies."""
    requests = [request(Rank.two, 0.3, 5), request(Rank.two, 0.0, 7)]
    (first, small), (second, large) = start("actor", ranks=2).scatter(requests, stored_returns=1).get()
    assert (small, large) == (5, 7)
    assert isinstance(first, ray.ObjectRef)
    assert (ray.get(first).tolist(), ray.get(second).tolist()) == ([5] * 5, [7] * 7)


def test_the_ranks_of_a_group_run_at_the_same_time(start: Start) -> None:
    spans = start("actor", ranks=3).call(Rank.nap, 0.5).get()
    assert overlap(spans[0], spans[1]) > 0.2
    assert overlap(spans[1], spans[2]) > 0.2


def test_groups_on_other_devices_run_at_the_same_time_and_on_the_same_in_turn(start: Start) -> None:
    actor, reference, critic = start("actor", place="a"), start("reference", 2, place="a"), start("critic", place="b")
    calls: list[Call[Any] | None] = [
        actor.call(Rank.nap, 0.6),
        None,
        reference.call(Rank.nap, 0.3),
        critic.call(Rank.nap, 0.6),
    ]
    [actor_span], none, reference_spans, [critic_span] = run_concurrently(*calls)
    assert none is None
    assert overlap(actor_span, critic_span) > 0.3
    for span in reference_spans:
        assert actor_span[1] <= span[0], "the second call on the same devices waits for the first"
    assert overlap(*reference_spans) > 0.1, "ranks of one group do not wait for each other"


def test_a_call_starts_when_its_placement_group_is_free_though_others_are_busy(start: Start) -> None:
    groups = [start("actor", place="a"), start("reference", place="a"), start("critic", place="b")]
    [first], [second], [long] = run_concurrently(
        *(g.call(Rank.nap, s) for g, s in zip(groups, (0.2, 0.2, 1.5), strict=True))
    )
    assert first[1] <= second[0]
    assert second[1] < long[1]


def test_the_awaited_call_is_visible_to_other_threads(start: Start) -> None:
    group = start("actor", ranks=2, timeout=50)
    deadlines = group.deadlines
    thread = threading.Thread(target=group.scatter([request(Rank.nap, 0.0), request(Rank.nap, 2.0)]).get)
    thread.start()
    wait_for(lambda: deadlines.awaited is not None and deadlines.awaited.ranks == (1,), 30)
    awaited = deadlines.awaited
    assert awaited is not None
    assert (awaited.role, awaited.method, awaited.setting) == ("actor", "nap", "deadlines.train")
    assert awaited.until - awaited.since == pytest.approx(50, abs=0.01)
    assert abs(awaited.since - time.time()) < 30
    thread.join()
    assert deadlines.awaited is None
    assert deadlines.taken() == {("actor", "nap"): pytest.approx(2.0, abs=1.5)}
    assert deadlines.taken() == {}


# ---------------------------------------------------------------- calls in flight


def test_a_call_runs_while_the_driver_does_something_else(start: Start) -> None:
    """It may run another call, to other processes; each result can be read at any time."""
    group, other = start("rollout", ranks=2), start("actor")
    call = group.scatter([request(Rank.nap, 0.2), request(Rank.nap, 1.5)])
    call.start()
    assert not call.poll()
    [meanwhile] = other.call(Rank.nap, 0.1).get()
    assert not call.finished
    wait_for(call.poll, 30)
    short, long = call.result()
    assert overlap(meanwhile, long) > 0.05
    assert call.result() == [short, long]
    seconds = group.deadlines.taken()["rollout", "nap"]
    assert seconds > 1.4
    assert len(group.deadlines._seen["nap"]) == 1, "reading a result twice is one call"


def test_a_result_waits_for_the_missing_replies(start: Start) -> None:
    call = start("actor", ranks=2).call(Rank.nap, 0.5)
    call.start()
    assert not call.finished
    assert len(call.result()) == 2
    assert call.finished and call.poll()


def test_a_call_is_started_once(start: Start) -> None:
    call = start("actor").call(Rank.ping)
    for early in (call.poll, call.result):
        with pytest.raises(RuntimeError, match=r"^actor: this call of ping was not started$"):
            early()
    call.start()
    for again in (call.start, call.get):
        with pytest.raises(RuntimeError, match=r"^actor: this call of ping was started before$"):
            again()
    assert call.result()


def test_a_poll_raises_a_failure_and_a_passed_deadline(spend: Start) -> None:
    failing, late = spend("critic").call(Rank.fail), spend("reward", timeout=0.5).call(Rank.nap, 600.0)
    failing.start()
    late.start()
    with pytest.raises(WorkerError, match=r"^critic rank 0 failed in fail: LookupError: "):
        wait_for(failing.poll, 30)
    with pytest.raises(WorkerError, match=r"^reward rank 0: no reply to nap in 0 s \(deadlines\.train\)"):
        wait_for(late.poll, 30)


def test_ranks_without_state_are_replaced_and_called_again_in_flight(spend: Start, start: Start) -> None:
    group, spare = spend("rollout", ranks=2), start("rollout")
    replaced: list[WorkerError] = []

    def replace_failed(error: WorkerError) -> None:
        replaced.append(error)
        group.handles[0], group.locations[0] = spare.handles[0], spare.locations[0]

    group.replace_failed, group.collective = replace_failed, False
    pid = group.first(Rank.ping)
    call = group.scatter([request(Rank.die_as, pid), request(Rank.die_as, 0)])
    call.start()
    wait_for(call.poll, 60)
    assert len(replaced) == 1
    assert call.result()[0] == spare.first(Rank.ping) != pid
    assert "die_as" not in group.deadlines._seen, "the time of two attempts says nothing about the cost"


def test_a_setup_call_is_repeated_for_new_ranks(start: Start) -> None:
    group = start("reference", ranks=2)
    assert group.setup_calls([1]) == []
    assert group.setup_call(Rank.echo, "model", 1).get() == [("model", 1)] * 2
    group.call(Rank.echo, "no setup").get()
    [again] = group.setup_calls([1])
    assert list(again.requests) == [1] and not again.retryable
    assert again.get() == [("model", 1)]
    assert len(group.setup_calls([0])) == 1, "a repeated call is not recorded again"


# ---------------------------------------------------------------- failures


def never(error: WorkerError) -> None:
    pytest.fail(f"replaced after: {error}")


@pytest.mark.parametrize(
    ("method", "kind", "text"),
    [
        (Rank.fail_with_a_lock, "error", "ValueError: holds a lock"),
        (Rank.fail_unloadable, "error", "Unloadable: of 1 and 2"),
        (Rank.answer_unreadably, "error", "ValueError: invalid literal for int() with base 10: 'not a number'"),
        (Rank.lose, "lost", "ObjectLostError: Failed to retrieve object"),
    ],
)
def test_an_error_that_would_come_again_is_raised_without_another_attempt(
    start: Start, method: Callable[[Rank], Any], kind: str, text: str
) -> None:
    """Even for a role whose failed ranks are replaced during a call: the error would be the same."""
    group = start("reference")
    group.replace_failed = never
    with pytest.raises(WorkerError) as e:
        group.call(method).get()
    assert e.value.failure.text.startswith(f"reference rank 0 failed in {method.__name__}: {text}")
    assert e.value.failure.kind == kind
    assert e.value.failure.survivable == (kind == "lost")


def test_the_first_line_of_an_exception_is_in_the_headline(start: Start) -> None:
    with pytest.raises(WorkerError) as e:
        start("actor").call(Rank.fail_with_a_lock).get()
    assert str(e.value).splitlines()[0] == "actor rank 0 failed in fail_with_a_lock: ValueError: holds a lock"
    assert "which no pickle carries" in str(e.value), "further down"


def test_an_error_names_role_rank_and_call(start: Start) -> None:
    with pytest.raises(
        WorkerError, match=r"^actor rank 0 failed in fail: LookupError: 'no such thing as 42'|42\n"
    ) as e:
        start("actor", ranks=2).call(Rank.fail).get()
    assert 'raise LookupError("no such thing as 42")' in str(e.value), "the traceback"


def test_a_failed_rank_is_reported_at_once_though_another_hangs(spend: Start) -> None:
    group = spend("reference", ranks=2)
    began = time.monotonic()
    with pytest.raises(WorkerError, match=r"^reference rank 1 failed in fail_or_hang: LookupError: "):
        group.scatter([request(Rank.fail_or_hang, rank) for rank in range(2)]).get()
    assert time.monotonic() - began < 10


def test_a_failed_group_is_reported_at_once_though_another_hangs(spend: Start) -> None:
    began = time.monotonic()
    with pytest.raises(WorkerError, match=r"^critic rank 0 failed in fail: LookupError: "):
        run_concurrently(spend("actor").call(Rank.nap, 600.0), spend("critic").call(Rank.fail))
    assert time.monotonic() - began < 20


@pytest.mark.parametrize("stored", [False, True])
def test_a_killed_process_is_named_with_the_end_of_its_log(spend: Start, stored: bool) -> None:
    group = spend("critic", ranks=2)
    with pytest.raises(WorkerError, match=r"^critic rank [01] failed in die: its process died\n") as e:
        requests = [request(Rank.die, "last words")] * 2
        call: Call[Any] = group.scatter(requests, stored_returns=1) if stored else group.scatter(requests)
        call.get()
    assert "out: last words" in str(e.value)
    assert "err: last words" in str(e.value)
    assert "not to be had" not in str(e.value)


def test_a_call_to_a_dead_process_says_so(spend: Start) -> None:
    group = spend("reward")
    with pytest.raises(WorkerError, match="reward rank 0 failed in die: its process died"):
        group.call(Rank.die, "bye").get()
    with pytest.raises(WorkerError, match="reward rank 0 failed in ping: its process died"):
        group.call(Rank.ping).get()


def test_a_passed_deadline_names_the_ranks_that_did_not_reply(spend: Start) -> None:
    group = spend("rollout", ranks=3, timeout=1.0)
    began = time.monotonic()
    with pytest.raises(WorkerError, match=r"^rollout rank 1, 2: no reply to hang in 1 s \(deadlines\.train\)") as e:
        group.scatter([request(Rank.hang, f"rank {rank}", 600.0 if rank else 0.0) for rank in range(3)]).get()
    assert time.monotonic() - began < 20
    assert "out: rank 1" in str(e.value)
    assert "out: rank 2" in str(e.value)
    assert "out: rank 0" not in str(e.value)


def test_a_deadline_begins_when_the_call_does(start: Start) -> None:
    """The time that a call waits for its turn does not count."""
    first, second = start("actor", place="a", timeout=2.0), start("reference", place="a", timeout=2.0)
    run_concurrently(first.call(Rank.nap, 1.2), second.call(Rank.nap, 1.2))


def test_each_call_has_its_own_deadline(spend: Start) -> None:
    patient, hasty = spend("critic", timeout=60.0), spend("reward", timeout=1.0)
    with pytest.raises(WorkerError, match=r"^reward rank 0: no reply to nap in 1 s"):
        run_concurrently(patient.call(Rank.nap, 600.0), hasty.call(Rank.nap, 600.0))
