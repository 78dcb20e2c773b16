"""New weights in a real vLLM engine: after every update it must compute what the trainer computes.

Each precaution of workers/weight_sync/receivers.py is also left out once, to show that the comparison detects it.
"""

from __future__ import annotations

import gc
import re
import time
from collections.abc import Iterator
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import ray
from ray._private.internal_api import node_stats

from benchmarks.families.zoo import make
from configs.schema import LoraSettings, ModelSettings, OptimizerSettings, Strategy
from orchestrator.worker_groups.calls import WorkerGroup, run_concurrently
from orchestrator.worker_groups.failures import WorkerError
from tests.support.apis import FaultyPolicyApi, FaultyRolloutApi, OpenApi
from tests.support.hosts import Hosts, generate, log_probs
from tests.support.models import ARCHITECTURES, encoded, make_model
from workers.api import PolicyApi, RolloutApi, TrainerApi, WorkerApi, request
from workers.data import Row
from workers.data.step_inputs import SupervisedBatch
from workers.training.schedule import StageStep

pytestmark = pytest.mark.slow

AGREES = 1e-4  # nats, mean and largest difference; seen: 1e-6 and 1e-5
DIFFERS = 0.03  # nats, mean difference: the minimum effect of an update, and of a fault
SMALL_BUCKET = (
    130_000  # bytes: an update has several buckets, and the first ends between two matrices that vLLM makes one of
)
LENGTH = 256

# Some prompts share their first 128 tokens, a block of the prefix cache, and so does each with itself in the next step.
PROMPTS = ["a", "Who was it?", "hello " * 3, "It is " + "so " * 50, "It is " + "so " * 52, "The film " * 16]
DEMONSTRATIONS = [Row(prompt="It is ", completion="so bad."), Row(prompt="The ", completion="film is so good!")]
DORA = LoraSettings(rank=4, alpha=16.0, dora=True)
RSLORA = LoraSettings(rank=4, alpha=16.0, rslora=True)


class Pair:
    """An actor and an engine."""

    def __init__(self, hosts: Hosts, strategy: Strategy = "ddp", served: LoraSettings | None = None) -> None:
        self.ranks = 1 if strategy == "ddp" else 2
        self.actor = hosts.group("faulty_policy", "actor", strategy, self.ranks, served=served)
        self.engine = hosts.group("faulty_rollout", "rollout", served=served)
        self.step = 0
        self.version = 0

    def load(self, folder: Path, transport: str = "object_store", lora: LoraSettings | None = None) -> None:
        settings = ModelSettings(path=str(folder), dtype="float32", lora=lora)
        run_concurrently(
            self.actor.call(TrainerApi.load, str(folder), settings, OptimizerSettings(lr=0.03)),
            self.engine.call(RolloutApi.load, str(folder), transport, LENGTH),
        )
        self.engine.call(
            WorkerApi.add_rows, "prompts", encoded([Row(prompt=text) for text in PROMPTS], "prompt", LENGTH)
        ).get()
        demonstrations = encoded(DEMONSTRATIONS, "demonstration", LENGTH)
        self.actor.call(WorkerApi.add_rows, "sft", demonstrations).get()
        self.completions = demonstrations.learnt

    def connect(self) -> None:
        self.actor.call(PolicyApi.connect, list(self.engine.handles), "object_store", ("", 0)).get()

    def connect_with(self, bucket_bytes: int) -> None:
        self.actor.call(FaultyPolicyApi.connect_with, list(self.engine.handles), bucket_bytes).get()

    def train(self) -> None:
        """One optimizer step; two ranks take a demonstration each."""
        count = int(self.completions.sum())
        parts = [
            SupervisedBatch("sft", [rows], count) for rows in np.array_split(np.arange(len(DEMONSTRATIONS)), self.ranks)
        ]
        at, seed = StageStep(1, 1), (1, self.step)
        self.actor.scatter([request(PolicyApi.train_demonstrations, part, at, seed) for part in parts]).get()

    def noise(self) -> None:
        self.step += 1
        self.actor.call(OpenApi.add_noise, 0.05, self.step).get()

    def publish(self) -> int:
        self.version += 1
        size, _ = self.actor.call(PolicyApi.sync_weights, self.version).get()[0]
        return size

    def differences(self) -> np.ndarray:
        """|engine - trainer| of the log-probabilities of newly sampled tokens, which bear the published version."""
        self.step += 1
        refs, chunk, version = generate(self.engine, len(PROMPTS), self.step)
        assert version == self.version
        return np.abs(chunk.log_probs.values - log_probs(self.actor, refs))

    def agrees(self) -> bool:
        found = self.differences()
        return found.mean() < AGREES and found.max() < AGREES

    def leave_out(self, care: str) -> None:
        self.engine.call(FaultyRolloutApi.leave_out, care).get()

    def disturb(self, fault: str) -> None:
        self.actor.call(FaultyPolicyApi.disturb, fault).get()


def assert_follows(pair: Pair) -> None:
    """Update after update the engine computes what the trainer does."""
    for _ in range(3):
        pair.train()
        assert pair.differences().mean() > DIFFERS, "the training step changed the policy"
        pair.publish()
        assert pair.agrees()
    pair.publish()
    assert pair.agrees(), "an update without a change changes nothing"


@pytest.mark.parametrize(
    ("strategy", "architecture", "tied", "grouped", "lora"),
    [
        ("ddp", "llama", True, True, None),
        ("ddp", "gpt2", True, False, RSLORA),
        ("zero1", "qwen2", False, True, None),
        ("zero2", "opt", True, False, None),
        ("zero3", "qwen3", False, True, None),
        ("zero3", "llama", False, False, DORA),
        ("zero3", "deepseek_v3", False, False, RSLORA),
        ("zero3", "qwen3_moe", False, False, None),
        ("ddp", "mixtral", False, False, None),
        ("ddp", "gpt_oss", False, False, None),
    ],
    ids=lambda value: {id(DORA): "dora", id(RSLORA): "rslora"}.get(id(value)),
)
def test_the_engine_computes_what_the_trainer_computes(
    hosts: Hosts,
    tmp_path: Path,
    strategy: Strategy,
    architecture: str,
    tied: bool,
    grouped: bool,
    lora: LoraSettings | None,
) -> None:
    pair = Pair(hosts, strategy)
    if architecture in ARCHITECTURES:
        make_model(tmp_path, architecture, tied, grouped)
    else:  # its experts are so large that ZeRO-3 does not keep them whole
        make(tmp_path, architecture, **({"moe_intermediate_size": 512} if strategy == "zero3" else {}))
    pair.load(tmp_path, lora=lora)
    pair.connect()
    assert pair.agrees()
    assert_follows(pair)


@pytest.mark.parametrize(
    ("strategy", "architecture", "tied", "grouped"), [("ddp", "llama", True, True), ("zero3", "opt", True, False)]
)
def test_an_adapter_alone_computes_what_the_trainer_computes(
    hosts: Hosts, tmp_path: Path, strategy: Strategy, architecture: str, tied: bool, grouped: bool
) -> None:
    pair = Pair(hosts, strategy, served=RSLORA)
    folder = make_model(tmp_path, architecture, tied, grouped)
    pair.load(folder, lora=RSLORA)
    pair.connect_with(4096)
    assert pair.agrees(), "before the first update it has none, and the trainer's does nothing yet"
    assert_follows(pair)


def test_an_adapter_that_did_not_arrive_is_not_served_and_a_new_engine_gets_it_again(
    hosts: Hosts, tmp_path: Path
) -> None:
    pair = Pair(hosts, served=RSLORA)
    folder = make_model(tmp_path, "llama", tied=False, grouped=True)
    pair.load(folder, lora=RSLORA)
    pair.connect_with(4096)
    for fault, error in [
        ("flip", "StaleWeights: .* 1 of 28 tensors"),
        ("lose", "StaleWeights: .* 1 of 28 tensors"),
        ("break off", "ConnectionError: the trainer broke off"),
    ]:
        pair.noise()
        pair.disturb(fault)
        with pytest.raises(WorkerError, match=error):
            pair.publish()
        assert_serves_nothing(pair)
    pair.publish()
    assert pair.agrees()
    pair.engine.call(RolloutApi.load, str(folder), "object_store", LENGTH).get()
    written = pair.engine.first(RolloutApi.generate, "prompts", np.arange(1), np.zeros(1), 1)[1]
    assert written.max_versions.tolist() == [0]
    pair.connect_with(4096)
    pair.publish()
    assert pair.agrees()


def test_weights_that_vllm_loads_past_its_layers_are_noticed(hosts: Hosts, tmp_path: Path) -> None:
    """vLLM's load_weights does this with gpt_oss's experts in one tensor: the engine keeps computing with the old ones."""
    pair = Pair(hosts)
    pair.load(make(tmp_path, "gpt_oss"), transport="faulty")
    pair.connect_with(SMALL_BUCKET)
    pair.leave_out("experts one by one")
    with pytest.raises(
        WorkerError, match=r"vLLM did not load the new weights of 2 layers, first model.layers.0.mlp.experts"
    ):
        pair.publish()
    assert_serves_nothing(pair)
    pair.leave_out("")
    pair.noise()
    pair.publish()
    assert pair.agrees()


@pytest.fixture(scope="module")
def served(hosts: Hosts, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """A model with tied embeddings, small buckets, and faults at will."""
    pair = Pair(hosts)
    pair.load(make_model(tmp_path_factory.mktemp("served"), "llama", tied=True, grouped=True), transport="faulty")
    pair.connect_with(SMALL_BUCKET)
    return pair


@pytest.fixture
def pair(served: Pair) -> Iterator[Pair]:
    """The same, without faults and up to date when a test begins; whatever a test does to it, the next update repairs it."""
    served.publish()
    assert served.agrees()
    yield served
    served.leave_out("")


@pytest.mark.parametrize("care", ["repacking", "prefix cache", "memory of their own"])
def test_without_a_care_the_engine_computes_something_else(pair: Pair, care: str) -> None:
    pair.leave_out(care)
    pair.noise()
    pair.publish()  # its checksums are right: the tensors arrived
    assert pair.differences().mean() > DIFFERS
    pair.leave_out("")
    pair.publish()
    assert pair.agrees()


def test_without_the_layerwise_reload_weights_do_not_load(pair: Pair) -> None:
    pair.leave_out("layerwise reload")
    with pytest.raises(WorkerError, match="AssertionError: Attempted to load weight"):
        pair.publish()
    assert_serves_nothing(pair)


def test_an_update_that_broke_off_leaves_nothing_to_the_next(pair: Pair) -> None:
    pair.disturb("break off")
    pair.noise()
    with pytest.raises(WorkerError, match="ConnectionError: the trainer broke off"):
        pair.publish()
    assert_serves_nothing(pair)
    pair.noise()
    pair.publish()
    assert pair.agrees()


def test_without_a_fresh_start_an_update_would_fail(pair: Pair) -> None:
    """After an interrupted update, half-loaded layers do not restart their loading by themselves."""
    pair.leave_out("fresh start")
    pair.disturb("break off")
    with pytest.raises(WorkerError, match="ConnectionError"):
        pair.publish()
    pair.noise()
    with pytest.raises(WorkerError, match="no attribute 'weight_loader'"):
        pair.publish()


@pytest.mark.parametrize(("fault", "differ"), [("flip", "1 of 20"), ("lose", "1 of 20"), ("exchange", "2 of 20")])
def test_an_engine_that_got_something_else_serves_nothing(pair: Pair, fault: str, differ: str) -> None:
    pair.disturb(fault)
    with pytest.raises(WorkerError, match=rf"StaleWeights.*rollout-0: version {pair.version + 1} .* {differ} tensors"):
        pair.publish()
    assert_serves_nothing(pair)
    pair.publish()
    assert pair.agrees()


def test_an_update_amid_answers_is_refused(pair: Pair) -> None:
    pair.engine.call(FaultyRolloutApi.begin_answer).get()
    with pytest.raises(WorkerError, match=r"StaleWeights: .*arrived while requests were running"):
        pair.publish()
    pair.engine.call(FaultyRolloutApi.drop_answer).get()
    assert_serves_nothing(pair)


def assert_serves_nothing(pair: Pair) -> None:
    with pytest.raises(WorkerError, match=r"StaleWeights: .*rollout-0 has no verified weights"):
        generate(pair.engine, len(PROMPTS), 0)


def test_an_engine_may_have_nothing_to_answer(pair: Pair) -> None:
    """Where an evaluation has fewer prompts than there are engines."""
    refs, chunk, _ = generate(pair.engine, 0, 1)
    assert (len(refs), len(chunk.ids), len(chunk.log_probs)) == (0, 0, 0)


def test_the_size_of_the_buckets_changes_nothing(pair: Pair) -> None:
    pair.noise()
    answers, buckets = [], []
    for size in (1, SMALL_BUCKET, 2**27):
        pair.connect_with(size)
        size_of_all = pair.publish()
        buckets.append(pair.actor.first(FaultyPolicyApi.buckets))
        answers.append(generate(pair.engine, len(PROMPTS), step=77)[1])
    pair.connect_with(SMALL_BUCKET)
    assert buckets[0] == 20 and 2 < buckets[1] <= size_of_all / SMALL_BUCKET + 1 and buckets[2] == 1
    for other in answers[1:]:
        np.testing.assert_array_equal(answers[0].ids.values, other.ids.values)
        np.testing.assert_array_equal(answers[0].log_probs.values, other.log_probs.values)


def test_updates_leave_nothing_in_the_object_store(pair: Pair) -> None:
    gc.collect()  # what tests before this one left is not ours
    before = settled()
    mine = ray.put(np.zeros(2**20, np.uint8))
    assert stored() >= before + 2**20, "a megabyte shows"
    del mine
    for fault in ("", "flip", "break off", ""):
        pair.disturb(fault)
        if fault:
            with pytest.raises(WorkerError):
                pair.publish()
        else:
            pair.publish()
    deadline = time.monotonic() + 20  # Ray frees a little later
    few = 2**13  # the inspection of a failure leaves some kilobytes; every bucket is larger
    while stored() > before + few and time.monotonic() < deadline:
        time.sleep(0.1)
    assert stored() <= before + few


def test_an_engine_listens_on_no_more_interfaces_than_a_trainer(pair: Pair) -> None:
    """By itself vLLM opens a store on every interface."""

    def everywhere(group: WorkerGroup) -> int:
        """Sockets on which a process listens on all interfaces; Ray has some."""
        connections = psutil.Process(group.first(WorkerApi.location).pid).net_connections(kind="inet")
        return sum(c.status == psutil.CONN_LISTEN and ip_address(c.laddr.ip).is_unspecified for c in connections)

    assert everywhere(pair.engine) == everywhere(pair.actor)


def test_what_an_engine_refuses_is_an_error_with_its_text(pair: Pair, tmp_path: Path) -> None:
    """The exceptions of vLLM's configs cannot be pickled."""
    pair.engine.replace_failed = lambda error: pytest.fail(f"replaced after: {error}")
    short = make_model(tmp_path / "short", "gpt2")
    try:
        with pytest.raises(WorkerError) as e:
            pair.engine.call(RolloutApi.load, str(short), "object_store", 262).get()
    finally:
        pair.engine.replace_failed = None
    assert e.value.failure.kind == "error"
    assert re.match(
        r"rollout rank 0 failed in load: ValidationError: 1 validation error for ModelConfig .*\(262\) is greater than",
        e.value.failure.text,
    )
    pair.load(make_model(tmp_path / "whole"))


def settled() -> int:
    """Bytes in the object store once they have stayed the same for a second: Ray frees a little later."""
    size, since = stored(), time.monotonic()
    while time.monotonic() - since < 1.0:
        time.sleep(0.1)
        if (now := stored()) != size:
            size, since = now, time.monotonic()
    return size


def stored() -> int:
    """Bytes in the object store."""
    (node,) = ray.nodes()
    stats: Any = node_stats(node["NodeManagerAddress"], node["NodeManagerPort"]).store_stats
    return int(stats.object_store_bytes_used)
