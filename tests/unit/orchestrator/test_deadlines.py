"""How long a call may take, and how often a worker may be replaced."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.schema import DeadlineSettings, RecoverySettings, Role, RunConfig
from orchestrator.storage.failure_log import FailureLog
from orchestrator.worker_groups.calls import Call, WorkerGroup
from orchestrator.worker_groups.deadlines import Cost, Deadlines
from orchestrator.worker_groups.failure_policy import FailurePolicy, Restart
from orchestrator.worker_groups.failures import Failure, Kind, WorkerError
from orchestrator.worker_groups.rollouts import Experience, Rollouts, TokenColumn
from orchestrator.worker_groups.team import Team
from placement import Cluster, make_plan
from placement.cluster import Node
from workers.api import PolicyApi, RemoteMethod, RewardsApi, RolloutApi, ValueApi
from workers.data.samples import SampleRefs
from workers.data.step_inputs import KLTerm, RolloutInfo

GENERATE, SCORES = RemoteMethod.of(RolloutApi.generate), RemoteMethod.of(RewardsApi.scores)
LOG_PROBS, TRAIN_ANSWERS = RemoteMethod.of(PolicyApi.log_probs), RemoteMethod.of(PolicyApi.train_answers)
VALUES = RemoteMethod.of(ValueApi.values)

# ---------------------------------------------------------------- timeouts from earlier calls


def test_a_phase_with_a_setting_gets_its_value() -> None:
    deadlines = Deadlines(DeadlineSettings(generate=7))
    deadlines.observe(GENERATE, Cost(), 500)
    deadlines.missed(GENERATE)
    assert deadlines.seconds(GENERATE, Cost(1000)) == 7
    assert deadlines.setting(GENERATE) == "deadlines.generate"


def test_other_timeouts_follow_the_time_of_earlier_calls() -> None:
    deadlines = Deadlines(DeadlineSettings(initial_timeout=100, min_timeout=20, timeout_factor=10))
    assert deadlines.seconds(VALUES, Cost(50, 1)) == 100
    deadlines.observe(VALUES, Cost(1000, 4), 4.0)
    assert deadlines.seconds(VALUES, Cost(1000, 4)) == 40
    assert deadlines.seconds(VALUES, Cost(5000, 4)) == 200, "more tokens"
    assert deadlines.seconds(VALUES, Cost(1000, 8)) == 80, "more micro-batches, each with fixed costs"
    assert deadlines.seconds(VALUES, Cost(10, 1)) == 40, "a small call may consist of fixed costs alone"
    assert deadlines.seconds(LOG_PROBS, Cost(1000, 4)) == 100, "another method has its own timeout"
    deadlines.observe(VALUES, Cost(1000, 4), 0.1)
    assert deadlines.seconds(VALUES, Cost(1000, 4)) == 40, "by the slowest call"
    for _ in range(20):
        deadlines.observe(VALUES, Cost(1000, 4), 3.0)
    assert deadlines.seconds(VALUES, Cost(1000, 4)) == 30, "by the latest calls alone"


def test_a_call_with_a_new_kind_of_cost_is_a_first_call() -> None:
    """A critic's warm-up measures the actor's log-probabilities and updates nothing."""
    deadlines = Deadlines(DeadlineSettings(initial_timeout=100, min_timeout=1, timeout_factor=10))
    deadlines.observe(TRAIN_ANSWERS, Cost(500, steps=0), 1.0)
    assert deadlines.seconds(TRAIN_ANSWERS, Cost(500, steps=0)) == 10
    assert deadlines.seconds(TRAIN_ANSWERS, Cost(6000, steps=4)) == 100
    deadlines.observe(TRAIN_ANSWERS, Cost(6000, steps=4), 60.0)
    assert deadlines.seconds(TRAIN_ANSWERS, Cost(6000, steps=4)) == 600


def test_after_a_missed_deadline_the_next_attempt_has_twice_the_time() -> None:
    deadlines = Deadlines(DeadlineSettings(initial_timeout=100, min_timeout=60, timeout_factor=10))
    deadlines.missed(VALUES)
    assert deadlines.seconds(VALUES, Cost()) == 100, "the timeout of a first call is not doubled"
    deadlines.observe(VALUES, Cost(), 1.0)
    assert deadlines.seconds(VALUES, Cost()) == 60
    deadlines.missed(VALUES)
    deadlines.missed(VALUES)
    assert deadlines.seconds(VALUES, Cost()) == 240
    deadlines.observe(VALUES, Cost(), 100.0)
    assert deadlines.seconds(VALUES, Cost()) == 1000


COSTS = st.floats(1e-4, 10.0)
AMOUNTS = st.tuples(st.floats(1, 1e6), st.floats(1, 1e4))


@given(st.lists(AMOUNTS, min_size=1, max_size=5), AMOUNTS, COSTS, COSTS, COSTS)
def test_a_worker_as_fast_as_before_does_not_count_as_hung(
    before: list[tuple[float, float]], now: tuple[float, float], token: float, step: float, fixed: float
) -> None:
    """Whatever a token, a step and a call cost, and whatever sizes the calls had."""

    def seconds(work: tuple[float, float]) -> float:
        return fixed + token * work[0] + step * work[1]

    deadlines = Deadlines(DeadlineSettings(initial_timeout=1, min_timeout=1e-6, timeout_factor=3))
    for work in before:
        deadlines.observe(SCORES, Cost(*work), seconds(work))
    assert seconds(now) <= deadlines.seconds(SCORES, Cost(*now)) * (1 + 1e-9)


# ---------------------------------------------------------------- costs of the calls of a team

SAMPLES, PROMPT, ANSWER = 8, 10, 50
"""Answers of a step, and tokens of each."""


@pytest.fixture(scope="module")
def team() -> Team:
    """A team without processes: its calls are inspected, not run."""
    data, adam = {"path": "rows.jsonl"}, {"lr": 1e-4}
    ppo = {"prompts": data, "steps": 5, "prompts_per_step": SAMPLES, "epochs": 2, "mini_batches": 2, "critic_warmup": 2}
    settings = {
        "name": "deadlines",
        "model": {"path": "model"},
        "ppo": ppo | {"actor_optimizer": adam, "critic_optimizer": adam},
        "rollout": {"max_new_tokens": 1000, "max_sequences": 4},
    }
    config = RunConfig.model_validate(settings)
    made = Team(config, make_plan(config, "ppo", Cluster((Node(8.0),))), None, None)
    for role in made.plan.roles:
        made.groups[role] = WorkerGroup(role, [None], role, made.deadlines)
    made.lengths["prompts"] = np.full(SAMPLES, PROMPT), np.zeros(SAMPLES)
    return made


def experience() -> Experience:
    refs = SampleRefs((None,), np.zeros((SAMPLES, 2), np.int32))
    prompts, answers = np.full(SAMPLES, PROMPT), np.full(SAMPLES, ANSWER)
    ended, numbers = np.ones(SAMPLES, bool), np.zeros(SAMPLES, int)
    rollouts = Rollouts(
        "prompts",
        np.arange(SAMPLES),
        np.arange(SAMPLES),
        numbers,
        1,
        refs,
        prompts,
        answers,
        answers,
        ended,
        numbers,
        numbers,
    )
    column = TokenColumn(refs, np.zeros(SAMPLES))
    return Experience(rollouts, column, column, np.zeros(SAMPLES), KLTerm())


def written_by_an_engine(lengths: np.ndarray) -> RolloutInfo:
    versions = np.zeros(SAMPLES, int)
    return RolloutInfo(np.full(SAMPLES, PROMPT), lengths, lengths, np.ones(SAMPLES, bool), versions, versions)


def done(call: Call[Any], *results: Any) -> Cost:
    assert call.actual_cost is not None
    return call.actual_cost(list(results))


def test_a_warm_up_does_not_set_the_timeout_of_a_training_step(team: Team) -> None:
    """It runs over the first of two mini-batches once, forward; a step over both twice, backward too, with four updates."""
    warm_up = team.train_actor(experience(), 1, 5, update=False)
    step = team.train_actor(experience(), 3, 5)
    tokens = SAMPLES * (PROMPT + ANSWER)
    assert warm_up.cost == done(warm_up, {"updates": 0.0, "skipped/actor": 0.0}) == Cost(tokens / 2, 0)
    assert step.cost == done(step, {"updates": 3.0, "skipped/actor": 1.0}) == Cost(3 * 2 * tokens, 4)
    critic = team.train_critic(experience(), 1, 5)
    assert critic is not None
    assert critic.cost == done(critic, {}) == step.cost


def test_a_step_that_stops_early_has_the_cost_of_its_updates(team: Team) -> None:
    step = team.train_actor(experience(), 3, 5)
    short = done(step, {"updates": 1.0, "skipped/actor": 0.0})
    assert short == Cost(step.cost.tokens / 4, 1)
    assert step.cost.times(short) == 4


def test_longer_answers_do_not_count_as_a_hang(team: Team) -> None:
    """Up to 1,000 tokens each; the actual cost is that of the generated tokens. Eight answers, four at a time, take two turns."""
    call = team.generate("prompts", np.arange(SAMPLES), step=1)
    prompts = SAMPLES * PROMPT
    assert call.cost == Cost(prompts + SAMPLES * 1000, 2 * 1000)
    lengths = np.array([5] * 7 + [20])
    written = written_by_an_engine(lengths)
    assert done(call, ("reference", written)) == Cost(prompts + lengths.sum(), 2 * 20)


def test_few_long_answers_take_no_less_than_many_short_ones(team: Team) -> None:
    """An evaluation of one prompt after steps of eight: an engine writes no faster than token by token."""
    many = team.generate("prompts", np.arange(SAMPLES), step=1)
    short = done(many, ("reference", written_by_an_engine(np.full(SAMPLES, 100))))
    one = team.generate("prompts", np.arange(1), step=0)
    assert one.cost.tokens < 2 * short.tokens
    assert one.cost.times(short) == 1000 / 200


# ---------------------------------------------------------------- how often a worker is replaced


def failure(kind: Kind, role: Role, ranks: tuple[int, ...] = (0,)) -> WorkerError:
    failed_ranks = () if kind in ("error", "lost") else tuple((role, rank) for rank in ranks)
    return WorkerError(Failure(kind, role, ranks, "values", "score", f"{role} failed", failed_ranks=failed_ranks))


def final_error(recovery: FailurePolicy, error: WorkerError) -> WorkerError:
    decision = recovery.decide(error)
    assert isinstance(decision, WorkerError) and decision.final
    return decision


def test_an_error_that_a_worker_raised_ends_the_run(tmp_path: Path) -> None:
    error = failure("error", "critic")
    assert FailurePolicy(RecoverySettings(), FailureLog(tmp_path)).decide(error) is error
    assert error.final
    [record] = tmp_path.iterdir()
    assert record.name == "0001-critic-error.txt"
    assert record.read_text().endswith("not survivable\n")


def test_each_role_has_its_budget(tmp_path: Path) -> None:
    said: list[str] = []
    recovery = FailurePolicy(RecoverySettings(max_restarts=2), FailureLog(tmp_path), said.append)
    for role in ("critic", "actor"):
        assert recovery.decide(failure("died", role)) == Restart(1)
        assert recovery.decide(failure("hung", role)) == Restart(0)
    error = failure("died", "actor")
    final = final_error(recovery, error)
    assert final.__cause__ is error and not error.final
    assert str(final).startswith(
        "actor failed\n  not replaced again: at most 2 restarts in 3600 s, or in one step, are"
    )
    assert len(list(tmp_path.iterdir())) == 5
    assert said == ["critic failed"] * 2 + ["actor failed"] * 2, "the last one is raised instead"


def test_a_lost_reply_without_failed_ranks_counts_too() -> None:
    recovery = FailurePolicy(RecoverySettings(max_restarts=2))
    assert [recovery.decide(failure("lost", "reward")) for _ in range(2)] == [Restart(1), Restart(0)]
    assert "not replaced again" in str(final_error(recovery, failure("lost", "reward")))


def test_a_failure_of_two_roles_counts_for_both() -> None:
    recovery = FailurePolicy(RecoverySettings(max_restarts=3))
    assert recovery.decide(failure("died", "critic")) == Restart(2)
    both = replace(failure("died", "actor").failure, failed_ranks=(("actor", 0), ("critic", 0)))
    assert recovery.decide(WorkerError(both)) == Restart(1), "of the role that has the fewest"
    assert recovery.decide(failure("died", "actor")) == Restart(1)


def test_restarts_are_counted_over_a_window() -> None:
    recovery = FailurePolicy(RecoverySettings(max_restarts=1, restart_window=0.2))
    assert recovery.decide(failure("died", "critic")) == Restart(0)
    time.sleep(0.3)
    assert recovery.decide(failure("died", "critic")) == Restart(0)
    assert "not replaced again" in str(final_error(recovery, failure("died", "critic")))


def test_a_step_is_not_repeated_for_ever_if_each_attempt_takes_longer_than_the_window(tmp_path: Path) -> None:
    log = FailureLog(tmp_path)
    recovery = FailurePolicy(RecoverySettings(max_restarts=1, restart_window=0.01), log)
    for step in (1, 2):
        log.where = f"ppo, step {step} of 5"
        assert recovery.decide(failure("hung", "actor")) == Restart(0)
        time.sleep(0.02)
    assert "not replaced again" in str(final_error(recovery, failure("hung", "actor")))
