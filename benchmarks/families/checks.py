"""The checks of a family, in one process: our trainer and a vLLM engine against plain transformers and PEFT.

The classes are those that run in Ray actors; only the calls between them do not use Ray. Each check returns its largest
difference; a refusal comes from Troupe's own check (`workers.models.model_facts`).
"""

from __future__ import annotations

import socket
import traceback
from collections.abc import Iterable, Iterator
from contextlib import chdir
from copy import deepcopy
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel
from vllm import SamplingParams, TokensPrompt

from benchmarks.families.limits import MOVED
from benchmarks.families.zoo import VOCABULARY
from configs.schema import LoraSettings, ModelSettings, OptimizerSettings, RunConfig
from workers.data.samples import Sample
from workers.data.step_inputs import SupervisedBatch
from workers.models.heads import Batch
from workers.models.loading import LEARNS, load_hf
from workers.models.model_facts import model_facts
from workers.process.worker import WorkerSpec
from workers.rollout.engine import RolloutWorker
from workers.training.policy import PolicyWorker
from workers.training.schedule import StageStep
from workers.training.trainer import Trainer
from workers.training.value import ValueWorker
from workers.weight_sync.gather import GatheredWeights
from workers.weight_sync.senders import ObjectStoreSender

LORA = LoraSettings(rank=4, alpha=16.0)
LENGTH, NEW_TOKENS = 96, 8
BUCKET = 20_000
"""Bytes; so small that an update has many buckets, which end within layers."""
Kind = TypeVar("Kind", bound=Trainer)
Differences = dict[str, float]
"""Check -> largest difference."""


def _rows(lengths: Iterable[int], seed: int) -> list[np.ndarray]:
    draw = np.random.default_rng(seed)
    return [draw.integers(3, VOCABULARY, length).astype(np.int32) for length in lengths]


PROMPTS = _rows((37, 12, 60, 3), seed=0)
DEMONSTRATIONS = [
    Sample.of(ids[:prompt], ids[prompt:]) for ids, prompt in zip(_rows((19, 8, 30, 12), 1), (5, 1, 11, 6), strict=True)
]


def merged(folder: Path, scratch: Path) -> dict[str, Any]:
    """All checks except adapters alone. Returns the family's `problems`, or the differences of `full` and `lora`, and
    the problems of the scalar head.

    folder: the random model. scratch: an empty folder to export to.
    """
    refused = problems(folder, ["language"])
    if refused:
        return {"problems": refused}
    no_scores = problems(folder, ["scalar"])
    engine = Engine(folder, config())
    report: dict[str, Any] = {"problems": [], "scalar_problems": no_scores}
    for mode, lora in (("full", None), ("lora", LORA)):
        report[mode] = policy(folder, scratch / mode, engine, lora)
        if not no_scores:
            report[mode] |= scalar(folder, scratch / f"{mode}-scalar", lora)
    return report


def alone(folder: Path, scratch: Path) -> dict[str, Any]:
    """Adapters alone, with the weights that the engine started with."""
    refused = problems(folder, ["language"], adapter_served=True)
    if refused:
        return {"problems": refused}
    settings = config(weight_sync={"lora": "adapter"}, lora=LORA)
    return {"problems": [], "alone": policy(folder, scratch, Engine(folder, settings), LORA, settings, trains=False)}


def problems(folder: Path, heads: Any, adapter_served: bool = False) -> list[str]:
    """Problems that Troupe's own check reports for the family."""
    settings = ModelSettings(path=str(folder), dtype="float32", lora=LORA)
    facts = model_facts(str(folder), settings, heads, learns=True, served_on="cpu", adapter_served=adapter_served)
    return [problem.replace(f"{folder}: ", "") for problem in facts.problems]


def config(lora: LoraSettings | None = None, **settings: Any) -> RunConfig:
    data, adam = {"path": "rows.jsonl"}, {"lr": 0.03}
    ppo = {"prompts": data, "steps": 1, "actor_optimizer": adam, "critic_optimizer": adam}
    rollout = {"max_new_tokens": NEW_TOKENS, "kv_cache_gib": 0.0625, "max_sequences": 8}
    base = {
        "name": "families",
        "model": {"path": "model", "dtype": "float32", "lora": lora},
        "ppo": ppo,
        "rollout": rollout,
    }
    return RunConfig.model_validate(base | {"rm": {"train": data, "optimizer": adam}} | settings)


# ---------------------------------------------------------------- the engine


class Engine:
    """A rollout worker in a subprocess, as in a run, because vLLM changes classes of transformers; and its client."""

    tensor_parallel = 1

    def __init__(self, folder: Path, settings: RunConfig) -> None:
        """Forks: call it before torch computes anything."""
        context = get_context("fork")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, folder, settings), daemon=True)
        self.process.start()
        theirs.close()
        self.version = 0

    def publish(self, source: GatheredWeights) -> None:
        """Send an update as the actor does."""
        self.source = source
        self.version += 1
        _Sender(self, source, True, BUCKET).send_weights()  # type: ignore[arg-type]

    def init_weight_transfer_engine(self, info: dict[str, Any]) -> None:
        self._call("init_weight_transfer_engine", info)

    def start_weight_update(self) -> None:
        self._call("start_weight_update")

    def update_weights(self, info: dict[str, Any]) -> None:
        self._call("update_weights", info)

    def finish_weight_update(self) -> None:
        self._call("finish_weight_update", self.version, self.source.checksums)

    def differs(self, plain: nn.Module) -> float:
        """Largest difference of its log-probabilities from a plain model's."""
        ids, log_probs = self._call("log_probs")
        return max(
            float(np.abs(log_prob_rows(plain, row) - mine).max()) for row, mine in zip(ids, log_probs, strict=True)
        )

    def _call(self, method: str, *args: Any) -> Any:
        self.connection.send((method, args))
        result, error = self.connection.recv()
        if error:
            raise RuntimeError(f"engine: {error}")
        return result


def _serve(connection: Connection, folder: Path, settings: RunConfig) -> None:
    """The engine's process."""
    worker = RolloutWorker(WorkerSpec(settings, "rollout", 0, 1, "cpu", 1))
    loaded = False
    while True:
        method, args = connection.recv()
        try:
            if not loaded:
                worker.load(str(folder), "object_store", LENGTH)
                loaded = True
            result = _log_probs(worker) if method == "log_probs" else getattr(worker, method)(*args)
            connection.send((result, None))
        except Exception as error:
            traceback.print_exc()
            connection.send((None, f"{type(error).__name__}: {error}"))


def _log_probs(worker: RolloutWorker) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Prompts with their answers: token ids, and log-probabilities of all tokens but the first."""
    sampling = SamplingParams(prompt_logprobs=0, logprobs=0, max_tokens=NEW_TOKENS, seed=1, detokenize=False)
    engine = worker.engine
    for i, prompt in enumerate(PROMPTS):
        engine.add_request(
            str(i), TokensPrompt(prompt_token_ids=prompt.tolist()), sampling, lora_request=worker.adapter
        )
    outputs: dict[int, Any] = {}
    while engine.has_unfinished_requests():
        outputs |= {int(output.request_id): output for output in engine.step() if output.finished}
    ids, log_probs = [], []
    for i, prompt in enumerate(PROMPTS):
        answer = outputs[i].outputs[0]
        ids.append(np.array([*prompt, *answer.token_ids]))
        at_each = [*outputs[i].prompt_logprobs[1:], *answer.logprobs]
        log_probs.append(np.array([at[token].logprob for at, token in zip(at_each, ids[-1][1:], strict=True)]))
    return ids, log_probs


class _Sender(ObjectStoreSender):
    """Sends buckets to the engine directly."""

    def _send(self, bucket: list[tuple[str, Tensor]]) -> None:
        self.client.update_weights({
            "names": [name for name, _ in bucket],
            "dtypes": [str(tensor.dtype).removeprefix("torch.") for _, tensor in bucket],
            "shapes": [tuple(tensor.shape) for _, tensor in bucket],
            "arrays": [tensor.flatten().view(torch.uint8).numpy().copy() for _, tensor in bucket],
        })  # fmt: skip


@torch.no_grad()
def log_prob_rows(model: nn.Module, ids: np.ndarray) -> np.ndarray:
    """Log-probabilities of all tokens but the first, by a plain model."""
    tokens = torch.from_numpy(ids.astype(np.int64))[None]
    log_softmax = torch.log_softmax(model.eval()(input_ids=tokens).logits[0].double(), -1)
    return log_softmax[:-1].gather(-1, tokens[0, 1:, None])[:, 0].numpy()


# ---------------------------------------------------------------- policies


def policy(
    folder: Path,
    out: Path,
    engine: Engine,
    lora: LoraSettings | None,
    settings: RunConfig | None = None,
    trains: bool = True,
) -> Differences:
    """Training, publication and export of a policy."""
    actor = start(PolicyWorker, folder, lora, settings)
    plain = plain_model(folder)
    differences = {"load": engine.differs(plain)} if not engine.version else {}
    if trains:
        differences["gradient"] = policy_gradient(actor, plain, lora)
    source = GatheredWeights(actor.model.hf, checked=True, adapter=LEARNS if settings else None)
    engine.publish(source)
    differences["unchanged"] = engine.differs(plain)
    before = log_prob_rows(plain, PROMPTS[0])
    for update in ("first", "second"):
        if update == "first" and trains:
            actor.datasets["rows"] = DEMONSTRATIONS
            actor.train_demonstrations(part(), StageStep(1, 1), seed=(1,))
        else:
            move(actor)
        actor.export(str(out / update))
        exported = plain_model(out / update)
        differences[f"export, {update}"] = max(
            float(np.abs(log_prob_rows(exported, row) - log_prob_rows(actor.model.hf, row)).max()) for row in PROMPTS
        )
        engine.publish(source)
        differences[f"{update} update"] = engine.differs(exported)
        after = log_prob_rows(exported, PROMPTS[0])
        if np.abs(after - before).max() < MOVED:
            raise RuntimeError(f"the {update} update changed no log-probability by {MOVED}: this could hide an error")
        before = after
    if lora:
        differences["adapter"] = adapter_differs(folder, out / "second" / "adapter", exported)
    return differences


def plain_model(folder: Path) -> PreTrainedModel:
    """A plain model, loaded as Troupe loads it: sdpa would ignore the attention cap of some models."""
    return _with_caps(AutoModelForCausalLM.from_pretrained(folder))


def plain_scorer(folder: Path) -> PreTrainedModel:
    """The same with a scalar head, which is random if the folder has none."""
    return _with_caps(AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1))


def _with_caps(model: PreTrainedModel) -> PreTrainedModel:
    if getattr(model.config, "attn_logit_softcapping", None):
        model.set_attn_implementation("eager")
    return model


def start(kind: type[Kind], folder: Path, lora: LoraSettings | None, settings: RunConfig | None = None) -> Kind:
    """A trainer that has loaded the model."""
    worker = kind(WorkerSpec(settings or config(), "actor", 0, 1, "cpu", 1))
    worker.join(("127.0.0.1", _free_port()))
    worker.load(str(folder), ModelSettings(path=str(folder), dtype="float32", lora=lora), OptimizerSettings(lr=0.03))
    return worker


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def part() -> SupervisedBatch:
    tokens = sum(len(row.ids) - row.prompt_length for row in DEMONSTRATIONS)
    return SupervisedBatch("rows", [np.array([0, 1]), np.array([2, 3])], tokens)


@torch.no_grad()
def move(trainer: Trainer) -> None:
    """Move every parameter that is trained."""
    torch.manual_seed(trainer.spec.rank)
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.add_(0.05 * torch.randn_like(parameter))


def policy_gradient(actor: PolicyWorker, plain: PreTrainedModel, lora: LoraSettings | None) -> float:
    """Difference of loss and gradients from a plain model's, which sees one row at a time and makes all logits."""
    actor.datasets["rows"] = DEMONSTRATIONS
    batch = part()
    actor.model.zero_grad()
    mine = torch.zeros(())
    for rows in batch.micro_batches:
        loss = actor._demonstration_loss(batch, rows)
        actor.backend.backward(loss, last=False)
        mine = mine + loss.detach()
    model = as_plain(actor, plain, lora)
    theirs = torch.zeros(())
    for row in DEMONSTRATIONS:
        ids = torch.from_numpy(row.ids.astype(np.int64))
        log_softmax = torch.log_softmax(model(input_ids=ids[None]).logits[0].float(), -1)
        answer = torch.arange(max(row.prompt_length, 1), len(ids))
        loss = -log_softmax[answer - 1, ids[answer]].sum() / batch.count
        loss.backward()
        theirs = theirs + loss.detach()
    return max(float((mine - theirs).abs()), gradients_differ(actor, model))


def as_plain(trainer: Trainer, plain: PreTrainedModel, lora: LoraSettings | None) -> nn.Module:
    """The plain model, with adapters like the trainer's where it has some."""
    model = deepcopy(plain)
    if lora:
        PeftModel(model, deepcopy(trainer.peft.peft_config[LEARNS]))
    names = dict(trainer.model.hf.named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(names[name]).requires_grad_(names[name].requires_grad)
    return model.eval()


def gradients_differ(trainer: Trainer, model: nn.Module) -> float:
    """Largest difference, relative to a tensor's largest gradient, or to a thousandth of the model's largest gradient if that is
    greater: gradients of a bias of attention keys are only rounding."""
    mine = dict(trainer.model.hf.named_parameters())
    largest, least = 0.0, 1e-3 * max(float(p.grad.abs().max()) for p in model.parameters() if p.grad is not None)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        wanted = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        given = mine[name].grad if mine[name].grad is not None else torch.zeros_like(wanted)
        largest = max(largest, float((given - wanted).abs().max() / wanted.abs().max().clamp(min=least)))
    trainer.model.zero_grad()
    return largest


def adapter_differs(base: Path, adapter: Path, exported: nn.Module) -> float:
    """Difference between the adapter, loaded by PEFT onto the base from another working folder, and the merged model."""
    with chdir("/"):
        model = PeftModel.from_pretrained(plain_model(base), str(adapter))
    return max(float(np.abs(log_prob_rows(model, row) - log_prob_rows(exported, row)).max()) for row in PROMPTS)


# ---------------------------------------------------------------- critics and reward models


def scalar(folder: Path, out: Path, lora: LoraSettings | None) -> Differences:
    """Values, their gradients, and a reward model's export."""
    critic = start(ValueWorker, folder, lora)
    differences = {"values": value_gradient(critic, folder, lora)}
    move(critic)
    critic.export(str(out))
    batch = Batch(DEMONSTRATIONS, torch.device("cpu"))
    with torch.no_grad():
        scores = critic.model.eval()(batch, per_token=False).numpy()
        differences["scalar export"] = float(np.abs(scores - last_scores(plain_scorer(out))).max())
        read = load_hf(ModelSettings(path=str(out), dtype="float32"), str(out), scalar=True, seed=0)
        differences["scalar export"] = max(
            differences["scalar export"], float(np.abs(scores - last_scores(read)).max())
        )
        if lora:
            with chdir("/"):
                adapted = PeftModel.from_pretrained(plain_scorer(folder), str(out / "adapter"))
            differences["scalar adapter"] = float(np.abs(scores - last_scores(adapted)).max())
    return differences


def last_scores(model: nn.Module) -> np.ndarray:
    """Scores at the rows' last tokens, one row at a time."""
    hf: Any = (model.get_base_model() if isinstance(model, PeftModel) else model).eval()
    rows: Iterator[Tensor] = (torch.from_numpy(row.ids.astype(np.int64))[None] for row in DEMONSTRATIONS)
    return np.array([float(hf.score(hf.base_model(input_ids=ids)[0])[0, -1, 0]) for ids in rows])


def value_gradient(critic: ValueWorker, folder: Path, lora: LoraSettings | None) -> float:
    """Difference of values, and of the gradients of their squares, from a plain model's."""
    batch = Batch(DEMONSTRATIONS, torch.device("cpu"))
    critic.model.zero_grad()
    values = critic.model.eval()(batch, per_token=True)
    critic.backend.backward(values.square().sum(), last=False)
    torch.manual_seed(critic.config.seed)
    model: Any = as_plain(critic, plain_scorer(folder), lora)
    largest = 0.0
    for row, mine, mask in zip(DEMONSTRATIONS, values, batch.mask, strict=True):
        ids = torch.from_numpy(row.ids.astype(np.int64))[None]
        wanted = model.score(model.base_model(input_ids=ids)[0])[0, row.prompt_length - 1 : -1, 0]
        wanted.square().sum().backward()
        largest = max(largest, float((mine[mask] - wanted).abs().max().detach()))
    return max(largest, gradients_differ(critic, model))
