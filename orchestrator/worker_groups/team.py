"""The worker groups of a stage, and the calls that the driver makes to them.

    team = Team.start(config, plan)
    team.load(model, {"model": reward_model})
    team.add_prompts("prompts", rows)
    rollouts = team.generate("prompts", picked, step).get()               # references and lengths, no tokens
    reference, values, scores = run_concurrently(
        team.log_probs(rollouts), team.values(rollouts), team.scores(rollouts, ["model"])
    )
    run_concurrently(team.train_actor(...), team.train_critic(...))
    team.sync_weights(version)

`generate`, `log_probs`, `values`, `scores` and `train_...` return a Call: run one by `.get()`, several by `run_concurrently`.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray.actor import ActorHandle
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from configs import ZERO
from configs.renamed import log_rename
from configs.schema import ModelReward, ModelSettings, Role, RunConfig, SamplingSettings
from orchestrator.run.run_dir import local
from orchestrator.worker_groups.calls import Call, WorkerGroup, run_concurrently
from orchestrator.worker_groups.deadlines import BACKWARD, Cost, Deadlines
from orchestrator.worker_groups.failure_policy import FailurePolicy
from orchestrator.worker_groups.failures import Rank, WorkerError, alive_nodes, end, on_node
from orchestrator.worker_groups.rollouts import Experience, Rollouts, TokenColumn
from orchestrator.worker_groups.sharding import (
    in_order,
    shard_samples,
    share_prompts,
    supervised_batches,
    train_step_inputs,
)
from orchestrator.worker_groups.snapshot import RankFiles, Snapshot
from placement.plan import floor_to, time_shared
from placement.plan.placement_groups import PlacementError, await_groups, bundle_of, create_groups, remove_groups
from placement.stages import STAGES
from placement.types import Plan, transport_of
from troupe.imports import Actor
from workers.api import PolicyApi, RewardsApi, RolloutApi, TrainerApi, ValueApi, WorkerApi, request
from workers.data import Codec, Preferences, Prompts, Row, Sequences, encode_prompts
from workers.data.batching import Rows
from workers.data.samples import RaggedArray, SampleRefs
from workers.data.step_inputs import (
    DifferentModel,
    RolloutInfo,
    ScoringRequest,
    StaleWeights,
    SupervisedBatch,
    TrainStepInput,
)
from workers.process.state_files import copy_files
from workers.process.worker import WorkerSpec, environment
from workers.rewards.result import RewardResult
from workers.training.schedule import StageStep
from workers.weight_sync.probe import Probe


@dataclass(frozen=True)
class Publication:
    """Result of an update of the engines."""

    nbytes: int
    """Bytes of one copy of the weights."""
    gap: float
    """Mean |difference| of the probe's log-probabilities between the actor and the engine that differs most."""
    proof_seconds: float
    """Seconds of the comparison."""


Changed = Callable[["Team"], None]

KINDS: dict[Role, str] = {
    "actor": "policy",
    "reference": "policy",
    "critic": "value",
    "reward": "rewards",
    "rollout": "rollout",
}


class Team:
    """The worker groups of one stage."""

    def __init__(
        self,
        config: RunConfig,
        plan: Plan,
        recovery: FailurePolicy | None,
        changed: Changed | None,
        started: datetime | None = None,
    ) -> None:
        self.config = config
        self.started = started or datetime.now()
        """The time that chat templates may use."""
        self.model = config.model.path
        """The model that the actor starts from."""
        self.plan = plan
        self._changed = changed or (lambda team: None)
        self.recovery = recovery or FailurePolicy(config.recovery)
        self.deadlines = Deadlines(config.deadlines)
        self.groups: dict[Role, WorkerGroup] = {}
        self.lengths: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        self.version = 0
        """Policy version that the engines serve."""
        self._places: dict[str, PlacementGroup] = {}
        self._starts: Counter[tuple[Role, int]] = Counter()
        self.transport = transport_of(config, plan)

    # ------------------------------------------------------------ start and stop

    @classmethod
    def start(
        cls,
        config: RunConfig,
        plan: Plan,
        recovery: FailurePolicy | None = None,
        changed: Changed | None = None,
        started: datetime | None = None,
        say: Callable[[str], None] = lambda text: None,
    ) -> Team:
        """Reserve the placement groups and start every worker; nothing is loaded yet.

        recovery: the failure policy; none: the config's budget, without a log. changed: called with the team when there are
        new workers. started: when the run began; none: now. say: called with a line that names who holds the resources that
        the run waits for.
        """
        team = cls(config, plan, recovery, changed, started)
        try:
            team._places = create_groups(plan, config.name, config.placement.timeout, say)
            all_groups: list[WorkerGroup] = []
            for role, planned in plan.roles.items():
                group = WorkerGroup(role, [], planned.group, team.deadlines, all_groups=all_groups)
                if role not in STAGES[plan.stage].trained:
                    # A process shared with a trained role also holds that role's state, so it cannot be replaced on its own.
                    group.replace_failed = team._replace_failed if planned.process_roles == (role,) else None
                    group.collective = role == "reference" or len(planned.process_roles) > 1
                team.groups[role] = group
                all_groups.append(group)
            team._spawn({role: range(planned.ranks) for role, planned in plan.roles.items()})
            team._join({role: list(range(len(group))) for role, group in team.groups.items()})
        except BaseException:
            team.stop()
            raise
        return team

    def _spawn(self, ranks: Mapping[Role, Sequence[int]]) -> None:
        """Start the processes of these ranks of roles; roles that share a process have the same ranks in `ranks`."""
        for process_roles in dict.fromkeys(self.plan.roles[role].process_roles for role in ranks):
            for rank in ranks[process_roles[0]]:
                handle = self._start_process(process_roles, rank)
                for role in process_roles:
                    handles = self.groups[role].handles
                    handles[rank : rank + 1] = [handle]

    def _start_process(self, process_roles: tuple[Role, ...], rank: int) -> ActorHandle:
        """Start the process of a rank: of one role, or of several that share the process."""
        plans = [self.plan.roles[role] for role in process_roles]
        first, device = plans[0], "cuda" if any(planned.gpus for planned in plans) else "cpu"
        place, bundle = bundle_of(self.plan, first.role, rank)
        started = self._starts[process_roles[0], rank]
        self._starts.update((role, rank) for role in process_roles)
        options: dict[str, Any] = {
            "name": f"{self.config.name}/{'+'.join(process_roles)}-{rank}" + (f" restart {started}" if started else ""),
            "namespace": "troupe",
            "num_cpus": floor_to(sum(planned.cpus for planned in plans), 4),
            "num_gpus": floor_to(sum(planned.gpus for planned in plans), 4),
            "scheduling_strategy": PlacementGroupSchedulingStrategy(self._places[place], bundle),
            "runtime_env": {"env_vars": environment(self.config, first.role, device, first.threads)},
        }
        hosted = [
            (
                STAGES[self.plan.stage].workers.get(role, KINDS[role]),
                WorkerSpec(
                    self.config,
                    role,
                    rank,
                    first.ranks,
                    device,
                    first.threads,
                    time_shared(self.plan, role),
                    self.started,
                ),
            )
            for role in process_roles
        ]
        return ray.remote(Actor).options(**options).remote("workers.process.worker_process:WorkerProcess", hosted)

    def _join(self, new: Mapping[Role, Sequence[int]]) -> None:
        """Record where new workers run, and give the ranks of each role the address at which they join."""
        locations_of = run_concurrently(
            *(self.groups[role].to(ranks, WorkerApi.location) for role, ranks in new.items())
        )
        for (role, ranks), locations in zip(new.items(), locations_of, strict=True):
            self.groups[role].locations |= dict(zip(ranks, locations, strict=True))
        self._changed(self)
        addresses = run_concurrently(*(self.groups[role].to(ranks, WorkerApi.address) for role, ranks in new.items()))
        address = {role: each[0] for role, each in zip(new, addresses, strict=True)}
        run_concurrently(*(self.groups[role].to(ranks, WorkerApi.join, address[role]) for role, ranks in new.items()))

    def stop(self) -> None:
        """Stop the workers and release their placement groups."""
        for handle in {handle for group in self.groups.values() for handle in group.handles}:
            ray.kill(handle)
        try:
            remove_groups(self._places)
        except PlacementError as error:  # a slow end must not hide its reason
            logging.getLogger("troupe").warning("%s", error)
        self.groups, self._places = {}, {}

    # ------------------------------------------------------------ recovery

    def replace(self, error: WorkerError, reset_roles: Sequence[Role] = ()) -> None:
        """Replace the failed ranks, for a role whose ranks compute together all of them, and repeat the setup calls for the new
        ranks. The state that they had learned is lost: see `restore`. reset_roles: roles that start again as well.

        Raises the final error if the run does not survive the failure; PlacementError if a lost node leaves too few resources.
        """
        decision = self.recovery.decide(error)
        if isinstance(decision, WorkerError):
            end(error.failure.locations)  # a stopped process would outlive the run
            raise decision
        lost: dict[Role, list[int]] = {}
        for role, rank in self._due(error):
            lost.setdefault(role, []).append(rank)
        for role in [*lost, *reset_roles]:
            if role in reset_roles or self.groups[role].collective:
                lost |= {other: list(range(len(self.groups[other]))) for other in self.plan.roles[role].process_roles}
        lost = {role: lost[role] for role in self.groups if role in lost}  # they load in the order of a start
        lost_ranks = [(role, rank) for role, ranks in lost.items() for rank in ranks]
        locations = {rank: location for role in lost for rank, location in self.groups[role].by_rank().items()}
        end({rank: locations[rank] for rank in lost_ranks if rank in locations})
        for role, rank in lost_ranks:
            ray.kill(self.groups[role].handles[rank])
        await_groups(self.plan, self.config.name, self._places, self.config.recovery.node_timeout)
        self._spawn(lost)
        self._join(lost)
        for calls in zip_longest(*(self.groups[role].setup_calls(ranks) for role, ranks in lost.items())):
            run_concurrently(*calls)
        if "rollout" in self.groups and lost.keys() & {"actor", "rollout"}:
            self._connect()
            if not self.version:
                self.sync_weights(0)

    def _due(self, error: WorkerError) -> list[Rank]:
        """The failed ranks that still have to be replaced: another error that names them may have led to it already."""
        failed_at = error.failure.locations
        return [
            (role, rank)
            for role, rank in error.failure.failed_ranks
            if (role, rank) not in failed_at or failed_at[role, rank] == self.groups[role].locations.get(rank)
        ]

    def _replace_failed(self, error: WorkerError) -> None:
        """Replace workers without state. New engines get the same weights as the others."""
        if due := self._due(error):
            self.replace(error)
            if self.version and any(role == "rollout" for role, _ in due):
                self.sync_weights(self.version)

    def snapshot(self, step: int, state: dict[str, Any], roles: Sequence[Role]) -> Snapshot:
        """Copy the state of trained roles into the object store, and onto a second node if there are several."""
        groups = [self.groups[role] for role in roles]
        states = run_concurrently(
            *(group.scatter([request(TrainerApi.snapshot)] * len(group), stored_returns=1) for group in groups)
        )
        nodes = sorted(alive_nodes())
        files: dict[Role, list[RankFiles]] = {role: [] for role in roles}
        for group, ranks in zip(groups, states, strict=True):
            for rank, (ref, names) in enumerate(ranks):
                node = group.locations[rank].node
                others = [other for other in nodes if other != node]
                copies = {node: ref}
                if others:
                    other = others[rank % len(others)]
                    copies[other] = on_node(other, copy_files, ref)
                files[group.role].append(RankFiles(names, node, copies))
        return Snapshot(step, state, files)

    def restore(self, snapshot: Snapshot) -> None:
        """Load the state of trained roles from a snapshot."""
        calls: list[Call[Any]] = []
        alive = alive_nodes()
        for role, ranks in snapshot.files.items():
            names = sorted({name for rank in ranks for name in rank.names})
            copies = [rank.copy_on(alive) for rank in ranks]
            calls.append(
                self.groups[role].scatter(
                    [request(TrainerApi.restore_snapshot, mine, copies[0], names) for mine in copies]
                )
            )
        run_concurrently(*calls)

    def workers(self) -> list[dict[str, Any]]:
        """Role, rank, node, pid and restarts of every worker."""
        return [
            {"role": role, "rank": rank, "node": place.host, "pid": place.pid, "restarts": self._starts[role, rank] - 1}
            for role, group in self.groups.items()
            for rank, place in sorted(group.locations.items())
        ]

    # ------------------------------------------------------------ models and data

    def load(self, model: str, reward_models: Mapping[str, str]) -> None:
        """Load all roles of the PPO stage at the same time, and connect the actor to the engines. May be repeated.

        model: folder that the actor, the reference and the engines start from. reward_models: name in `ppo.rewards` ->
        folder; the critic starts from the first that reads the policy's tokens, else from `model`.
        """
        groups, ppo = self.groups, self.config.ppo
        assert ppo is not None
        self.version = 0
        self.model = model
        model, paths = local(model), {name: local(path) for name, path in reward_models.items()}
        actor = pretrained(self.config.model)
        if actor.lora:  # the policy that learns must be the policy that sampled
            actor = actor.model_copy(update={"lora": actor.lora.model_copy(update={"dropout": 0.0})})
        own = {s.name for s in ppo.rewards if isinstance(s, ModelReward) and s.tokenizer == "own"}
        critic = next((path for name, path in paths.items() if name not in own), model)
        run_concurrently(
            groups["actor"].setup_call(PolicyApi.load, model, actor, ppo.actor_optimizer),
            groups["critic"].setup_call(ValueApi.load, critic, actor, ppo.critic_optimizer)
            if "critic" in groups
            else None,
            groups["reference"].setup_call(PolicyApi.load, model, actor, None) if "reference" in groups else None,
            groups["reward"].setup_call(RewardsApi.load, model, paths),
            groups["rollout"].setup_call(RolloutApi.load, model, self.transport, self._longest),
        )
        self._connect()
        if not self.config.model.quantize:  # then the actor has other weights than the folder
            self._prove(0, groups["actor"].call(PolicyApi.probe, 0).get()[0])
        # One weight sync before any training: if engines cannot load the weights of a model family, it fails now.
        self.sync_weights(0)

    @property
    def _longest(self) -> int:
        """Maximum tokens of an engine's sequence."""
        assert self.config.ppo is not None
        return self.config.ppo.max_prompt_tokens + self.config.rollout.max_new_tokens

    def export(self, role: Role, folder: str | Path) -> None:
        """Write a role's model as a plain Hugging Face folder with adapters merged, and the adapter in a folder beside it."""
        self.groups[role].call(TrainerApi.export, str(Path(folder).absolute())).get()

    def add_prompts(self, name: str, rows: Sequence[Row]) -> None:
        """Tokenise prompts and give them to the engines, and to the reward role, whose functions get the rows' other columns.

        Raises DataError if a prompt is longer than `ppo.max_prompt_tokens` and `ppo.overlong` does not allow it.
        """
        assert self.config.ppo is not None
        codec = Codec.load(self.model, self.config, self.config.model, self.started)
        prompts, _ = encode_prompts(codec, rows, self.config.ppo.max_prompt_tokens, self.config.ppo.overlong)
        self.add_encoded_prompts(name, prompts)

    def add_encoded_prompts(self, name: str, prompts: Prompts) -> None:
        """The same for tokenised prompts."""
        self._give(name, prompts.ids, "rollout")
        self._give(name, prompts.rows, "reward")
        self.lengths[name] = (prompts.lengths, np.zeros_like(prompts.lengths))

    def add_data(self, name: str, rows: Sequences | Preferences, role: Role) -> None:
        """Give tokenised demonstrations or preferences to a role's workers; `parts` refers to them by `name`."""
        self._give(name, rows, role)
        self.lengths[name] = (rows.lengths, rows.learnt)

    def _give(self, name: str, data: Any, role: Role) -> None:
        """Give data to a role's workers through the object store; workers that replace them get it too."""
        self.groups[role].setup_call(WorkerApi.add_rows, name, ray.put(data)).get()

    def memory(self) -> dict[Role, int]:
        """Bytes of each role's workers, proportional set size. Roles that share a process have equal parts of it."""
        roles = list(self.groups)
        sizes = run_concurrently(*(self.groups[role].call(WorkerApi.memory) for role in roles))
        return {
            role: sum(each) // len(self.plan.roles[role].process_roles) for role, each in zip(roles, sizes, strict=True)
        }

    # ------------------------------------------------------------ rollouts

    def generate(
        self, data: str, rows: np.ndarray, step: int, samples: int = 1, sampling: SamplingSettings | None = None
    ) -> Call[Rollouts]:
        """Generate `samples` responses to each of the dataset's rows; responses to one prompt are adjacent.

        sampling: None: as in training.
        """
        group = self.groups["rollout"]
        longest = (sampling or self.config.rollout).max_new_tokens
        earlier_draws = [
            int((rows[:i] == row).sum()) for i, row in enumerate(rows)
        ]  # a prompt may come twice in a step
        prompts, groups = np.repeat(rows, samples), np.repeat(np.arange(len(rows)), samples)
        numbers = np.concatenate([np.arange(samples) + samples * before for before in earlier_draws])
        shares = share_prompts(self.lengths[data][0][prompts], len(group), longest)

        def gather(results: list[tuple[Any, RolloutInfo]]) -> Rollouts:
            def ordered(name: str) -> np.ndarray:
                return in_order(shares, [getattr(written, name) for _, written in results], len(prompts))

            refs = SampleRefs.of([ref for ref, _ in results], shares, len(prompts))
            return Rollouts(
                data,
                prompts,
                groups,
                numbers,
                step,
                refs,
                prompt_lengths=ordered("prompt_lengths"),
                answer_lengths=ordered("answer_lengths"),
                trained_tokens=ordered("trained_tokens"),
                ended=ordered("ended"),
                min_versions=ordered("min_versions"),
                max_versions=ordered("max_versions"),
            )

        requests = [
            request(RolloutApi.generate, data, prompts[share], numbers[share], step, self.version, sampling)
            for share in shares
        ]
        prompt_tokens = float(self.lengths[data][0][prompts].sum())
        turns = -(
            -max(map(len, shares)) // self.config.rollout.max_sequences
        )  # an engine generates max_sequences at a time
        cost = Cost(prompt_tokens + len(prompts) * longest, turns * longest)

        def actual_cost(results: list[tuple[Any, RolloutInfo]]) -> Cost:
            lengths = np.concatenate([written.answer_lengths for _, written in results])
            return Cost(prompt_tokens + float(lengths.sum()), float(turns * lengths.max(initial=0)))

        return group.scatter(requests, cost, stored_returns=1, actual_cost=actual_cost).reduce(gather)

    # ------------------------------------------------------------ scores

    def log_probs(self, rollouts: Rollouts) -> Call[TokenColumn] | None:
        """The reference's log-probabilities; per response, the sum of log(actor / reference). None: there is no reference."""
        return self._column("reference", PolicyApi.log_probs, rollouts) if "reference" in self.groups else None

    def values(self, rollouts: Rollouts) -> Call[TokenColumn] | None:
        """The critic's values. None: there is no critic."""
        return self._column("critic", ValueApi.values, rollouts) if "critic" in self.groups else None

    def _column(
        self,
        role: Role,
        method: Callable[[Any, SampleRefs, list[Rows]], tuple[RaggedArray, np.ndarray]],
        rollouts: Rollouts,
    ) -> Call[TokenColumn]:
        shards, micro_batches = self._shard(role, rollouts)

        def gather(results: list[tuple[Any, np.ndarray]]) -> TokenColumn:
            refs = SampleRefs.of([ref for ref, _ in results], shards, len(rollouts))
            return TokenColumn(refs, in_order(shards, [numbers for _, numbers in results], len(rollouts)))

        requests = [
            request(method, rollouts.refs.take(rows), micro) for rows, micro in zip(shards, micro_batches, strict=True)
        ]
        cost = Cost(float(rollouts.lengths.sum()), len(micro_batches[0]))
        return self.groups[role].scatter(requests, cost, stored_returns=1).reduce(gather)

    def scores(self, rollouts: Rollouts, names: Sequence[str]) -> Call[dict[str, RewardResult]]:
        """Results of the named sources (rewards or judges): for each response a score, a timeout or an error."""
        shards, micro_batches = self._shard("reward", rollouts)

        def gather(results: list[dict[str, RewardResult]]) -> dict[str, RewardResult]:
            return {name: RewardResult.gather(shards, [r[name] for r in results], len(rollouts)) for name in names}

        requests = [
            request(RewardsApi.scores, self._request(rollouts, rows), rollouts.refs.take(rows), micro, list(names))
            for rows, micro in zip(shards, micro_batches, strict=True)
        ]
        assert self.config.ppo is not None
        models = [source.name for source in self.config.ppo.rewards if isinstance(source, ModelReward)]
        passes = sum(name in models for name in names)
        cost = Cost(passes * float(rollouts.lengths.sum()), 1 + passes * len(micro_batches[0]))
        call = self.groups["reward"].scatter(requests, cost).reduce(gather)
        call.allowance = self.config.ppo.longest_scoring(max(map(len, shards)))
        return call

    def _request(self, rollouts: Rollouts, rows: Rows) -> ScoringRequest:
        return ScoringRequest(
            rollouts.data, rollouts.prompts[rows], rollouts.numbers[rows], rollouts.ended[rows], rollouts.step
        )

    def texts(self, rollouts: Rollouts, samples: np.ndarray | None = None) -> list[tuple[str, str]]:
        """(prompt, response) as text, of all samples or of some, for people to read."""
        samples = np.arange(len(rollouts)) if samples is None else samples
        cost = Cost(float(rollouts.lengths[samples].sum()))
        asked = request(RewardsApi.texts, rollouts.refs.take(samples))
        return Call[list[list[tuple[str, str]]]](self.groups["reward"], {0: asked}, cost).get()[0]

    def _shard(self, role: Role, rollouts: Rollouts) -> tuple[list[Rows], list[list[Rows]]]:
        assert self.config.ppo is not None
        return shard_samples(rollouts.lengths, len(self.groups[role]), self.config.ppo.micro_batch_tokens)

    # ------------------------------------------------------------ training

    def train_actor(self, experience: Experience, step: int, steps: int, update: bool = True) -> Call[dict[str, float]]:
        """The policy's updates of a step. step: from 1. steps: of the stage, for the learning rate's schedule.

        Each sample with a score is trained on once per epoch. Without `update` the weights stay as they are and only the
        log-probability mismatch is measured. Raises ValueError if no sample has a score.
        """
        return self._train("actor", PolicyApi.train_answers, experience, StageStep(step, steps), update)

    def train_critic(self, experience: Experience, step: int, steps: int) -> Call[dict[str, float]] | None:
        """The critic's updates of a step. None: there is no critic. See `train_actor`."""
        if "critic" not in self.groups:
            return None
        return self._train("critic", ValueApi.train_values, experience, StageStep(step, steps), True)

    def _train(
        self,
        role: Role,
        method: Callable[[Any, TrainStepInput, StageStep, tuple[int, ...]], dict[str, float]],
        experience: Experience,
        at: StageStep,
        update: bool,
    ) -> Call[dict[str, float]]:
        ppo, seed = self.config.ppo, (self.config.seed, at.step)
        assert ppo is not None
        demonstrations = experience.ptx if role == "actor" else []
        ptx = [self.parts("actor", "sft", rows, ppo.micro_batch_tokens) for rows in demonstrations]
        inputs = train_step_inputs(experience, ppo, len(self.groups[role]), seed, update, ptx)
        requests = [request(method, each, at, seed) for each in inputs]
        cost = self._training_cost(role, experience, update)

        def actual_cost(results: list[dict[str, float]]) -> Cost:
            """The actor may stop before its last update (`ppo.target_kl`)."""
            updates = results[0].get("updates", 0.0) + results[0].get("skipped/actor", 0.0)
            return Cost(cost.tokens * updates / cost.steps, updates) if role == "actor" and update else cost

        return self.groups[role].scatter(requests, cost, actual_cost=actual_cost).reduce(lambda results: results[0])

    def _training_cost(self, role: Role, experience: Experience, update: bool) -> Cost:
        """All updates of a step; without `update` one forward pass over the first mini-batch, which measures the mismatch."""
        ppo, rollouts = self.config.ppo, experience.rollouts
        assert ppo is not None
        tokens = float(rollouts.lengths[experience.scored].sum())
        if not update:
            return Cost(tokens / ppo.mini_batches, 0.0)
        if role == "actor":
            tokens += sum(float(self.lengths["sft"][0][rows].sum()) for rows in experience.ptx)
        return Cost(BACKWARD * ppo.epochs * tokens, ppo.epochs * ppo.mini_batches)

    def parts(self, role: Role, name: str, rows: np.ndarray, max_tokens: int) -> list[SupervisedBatch]:
        """Each rank's part of a batch of dataset rows, balanced by tokens."""
        lengths, trained = self.lengths[name]
        return supervised_batches(name, rows, lengths, trained, len(self.groups[role]), max_tokens)

    # ------------------------------------------------------------ weights

    def _connect(self) -> None:
        """Connect the actor's ranks to the engines."""
        actor, engines = self.groups["actor"], list(self.groups["rollout"].handles)
        address = actor.call(WorkerApi.address).get()[0]
        actor.call(PolicyApi.connect, engines, self.transport, address).get()

    def _prove(self, version: int, probe: Probe) -> float:
        """Check that every engine computes the actor's log-probabilities; the largest gap. Raises WorkerError."""
        return max(self.groups["rollout"].call(RolloutApi.prove, version, probe).get())

    def sync_weights(self, version: int) -> Publication:
        """Send the actor's weights to every engine under a version, and check that the engines compute with them.

        Engines that die meanwhile are replaced. If weights arrive damaged, or an engine computes other log-probabilities than
        the actor, they are sent once more.
        """
        damaged = 0
        while True:
            try:
                size, probe = self.groups["actor"].call(PolicyApi.sync_weights, version).get()[0]
                started = time.monotonic()
                gap = self._prove(version, probe)
            except WorkerError as error:
                if isinstance(error.failure.cause, StaleWeights | DifferentModel) and not damaged:
                    damaged += 1
                    self.recovery.record(error.failure, "sent once more")
                elif self._only_engines(error):
                    self.replace(error)
                else:
                    raise
            else:
                self.version = version
                return Publication(size, gap, probe.seconds + time.monotonic() - started)

    def publish(self, version: int) -> Publication:
        """The old name of `sync_weights`, for one release."""
        log_rename("Team.publish", "Team.sync_weights")
        return self.sync_weights(version)

    def _only_engines(self, error: WorkerError) -> bool:
        """Whether only engines have to be replaced: all of them failed ranks, and no rank of the actor waits for another."""
        no_collective = len(self.groups["actor"]) == 1 or ZERO[self.config.strategy_of("actor")].stage < 3
        roles = {role for role, _ in error.failure.failed_ranks}
        return no_collective and roles == {"rollout"}


def pretrained(settings: ModelSettings) -> ModelSettings:
    """The same settings, for a model folder with weights."""
    return settings.model_copy(update={"init": "pretrained"})
