"""The actor and the reference: a language model, trained on demonstrations and on scored answers."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from ray.actor import ActorHandle
from torch import Tensor

from workers.api import PolicyApi
from workers.data.batching import Rows
from workers.data.samples import RaggedArray, SampleRefs
from workers.data.step_inputs import MiniBatch, SupervisedBatch, TrainStepInput
from workers.models.heads import Batch
from workers.models.loading import LEARNS, load_hf
from workers.rl.advantages import masked
from workers.rl.aggregation import aggregation_divisor, aggregation_weights
from workers.rl.kl import kl_estimate
from workers.rl.losses import LossInputs, PolicyLoss, kl_from_behavior, masked_sum, next_token
from workers.training import experience
from workers.training.schedule import StageStep
from workers.training.skipped_steps import Arrays, micro_batch_numbers, token_rows
from workers.training.trainer import Trainer
from workers.weight_sync.gather import EngineClient, GatheredWeights
from workers.weight_sync.probe import Probe, sequences
from workers.weight_sync.senders import make_sender


class PolicyWorker(Trainer, PolicyApi):
    """One rank of a language model."""

    # ------------------------------------------------------------ scoring

    def log_probs(self, rollouts: SampleRefs, micro_batches: list[Rows]) -> tuple[RaggedArray, np.ndarray]:
        """Log-probabilities of the answers' tokens under this model, and each answer's sum of log(actor / this model)."""
        samples = rollouts.fetch()
        rows: list[np.ndarray] = [np.empty(0, np.float32)] * len(samples)
        with self.evaluating():
            for indices in micro_batches:
                batch = Batch([samples[i] for i in indices], self.device)
                log_probs, _ = self.module(batch, self.config.rollout.temperature)
                for i, row, mask in zip(indices, log_probs.cpu(), batch.mask.cpu(), strict=True):
                    rows[i] = row[mask].numpy()
        kl = [float((sample.log_probs - row).sum()) for sample, row in zip(samples, rows, strict=True)]
        return RaggedArray.of(rows, np.float32), np.array(kl)

    def probe_outputs(self, ids: np.ndarray) -> np.ndarray:
        """Log-probabilities [rows, length - 1] of all tokens after the first."""
        with self.evaluating():
            log_probs, _ = self.module(Batch(sequences(ids), self.device))
        outputs: np.ndarray = log_probs.cpu().numpy()
        return outputs

    @torch.no_grad()
    def read_back(self, folder: str, ids: np.ndarray) -> np.ndarray:
        """`probe_outputs` of an exported folder, on the host, from the logits of transformers' model."""
        settings = self.settings.model_copy(update={"init": "pretrained", "quantize": None, "lora": None})
        model = load_hf(settings, folder, scalar=False, seed=0).eval()
        rows = torch.from_numpy(ids).long()
        log_probs = model(rows).logits[:, :-1].float().log_softmax(-1)
        outputs: np.ndarray = log_probs.gather(-1, rows[:, 1:, None]).squeeze(-1).numpy()
        return outputs

    # ------------------------------------------------------------ demonstrations

    def train_demonstrations(self, part: SupervisedBatch, at: StageStep, seed: tuple[int, ...]) -> dict[str, float]:
        """One optimizer step on the mean negative log-likelihood of the completions' tokens."""
        losses = [partial(self._demonstration_loss, part, i) for i in part.micro_batches]
        return self.optimize(losses, at, seed, partial(self._debug_batch, part))

    def demonstration_loss(self, part: SupervisedBatch) -> dict[str, float]:
        """Mean negative log-likelihood of the completions' tokens, without training."""
        with self.evaluating():
            total = sum(float(self._demonstration_loss(part, i)) for i in part.micro_batches)
        return self.sum_over_ranks({"loss": total})

    def _demonstration_loss(self, part: SupervisedBatch, indices: Rows) -> Tensor:
        """A micro-batch's share of the mean over the batch's completion tokens."""
        rows = self.datasets[part.data]
        batch = Batch([rows[i] for i in indices], self.device)
        log_probs, _ = self.module(batch)
        return next_token(log_probs, batch.mask).sum() / part.count

    def _debug_batch(self, part: SupervisedBatch, prefix: str = "") -> Arrays:
        rows = [self.datasets[part.data][i] for indices in part.micro_batches for i in indices]
        return token_rows(rows, prefix) | {f"{prefix}micro_batch": micro_batch_numbers(part.micro_batches)}

    # ------------------------------------------------------------ PPO

    def train_answers(self, step_input: TrainStepInput, at: StageStep, seed: tuple[int, ...]) -> dict[str, float]:
        """The policy's updates of one step: epochs x mini-batches, until `target_kl` is exceeded.

        Returns means over the step's tokens. `logprob_mismatch` compares the engine with this model before its first update.
        Skipped updates are counted in `skipped/actor` and enter no other metric.
        """
        ppo = self.config.ppo
        assert ppo is not None
        answers = experience.prepare(step_input, ppo, self.total, self.device)
        loss = PolicyLoss.of(ppo.loss)
        metrics = dict(answers.metrics)
        sums: dict[str, float] = {}
        updates = skipped_updates = 0
        for epoch in range(ppo.epochs if step_input.update else 1):
            for k, mini in enumerate(step_input.mini_batches):
                first = epoch == 0 and k == 0
                mini_sums, skipped = _Sums(), False
                if step_input.update:
                    steps = self._update(loss, answers, mini, at, (*seed, epoch, k), mini_sums)
                    metrics |= {"lr/actor": steps["lr"], "grad_norm/actor": steps["grad_norm"]}
                    skipped = bool(steps["skipped"])
                    updates, skipped_updates = updates + (not skipped), skipped_updates + skipped
                elif first:
                    with self.evaluating():
                        for indices in mini.micro_batches:
                            self._policy_loss(loss, answers, indices, mini, mini_sums)
                else:
                    continue
                totals = self.sum_over_ranks(mini_sums)
                means = {name: value / mini.tokens for name, value in totals.items()}
                means["loss"] = totals["loss"] / self._divisor(loss, mini)
                if first:
                    metrics |= {"logprob_mismatch": means["gap"], "entropy": means["entropy"]}
                if skipped:
                    continue
                for name, value in means.items():
                    sums[name] = sums.get(name, 0.0) + value
                if step_input.update and ppo.target_kl is not None and means["approx_kl"] > ppo.target_kl:
                    return self._summary(metrics, sums, updates, skipped_updates, stopped=True)
        return self._summary(metrics, sums, updates, skipped_updates, stopped=False)

    def _summary(
        self, metrics: dict[str, float], sums: dict[str, float], updates: int, skipped_updates: int, stopped: bool
    ) -> dict[str, float]:
        names = {"loss": "loss/policy", "approx_kl": "approx_kl", "ptx": "loss/ptx"}
        reported = sums.keys() - {"gap", "entropy"}  # reported for the first mini-batch only
        means = {names.get(name, name): sums[name] / max(updates, 1) for name in reported}
        counts = {"updates": float(updates), "skipped/actor": float(skipped_updates), "early_stop": float(stopped)}
        return metrics | means | counts

    def _update(
        self,
        loss: PolicyLoss,
        answers: experience.TrainingBatch,
        mini: MiniBatch,
        at: StageStep,
        seed: tuple[int, ...],
        sums: _Sums,
    ) -> dict[str, float]:
        """One optimizer step on a mini-batch of answers and its demonstrations (ptx)."""
        losses = [partial(self._policy_loss, loss, answers, i, mini, sums) for i in mini.micro_batches]
        if mini.ptx:
            losses += [partial(self._ptx_loss, mini.ptx, i, mini.tokens, sums) for i in mini.ptx.micro_batches]

        def debug_batch() -> Arrays:
            demonstrations = self._debug_batch(mini.ptx, "ptx_") if mini.ptx else {}
            return answers.arrays(mini.micro_batches) | demonstrations

        return self.optimize(losses, at, seed, debug_batch)

    def _divisor(self, loss: PolicyLoss, mini: MiniBatch) -> int:
        longest = self.config.rollout.max_new_tokens
        return aggregation_divisor(loss.aggregation, mini.tokens, mini.sequences, mini.prompts, longest)

    def _policy_loss(
        self, loss: PolicyLoss, answers: experience.TrainingBatch, indices: Rows, mini: MiniBatch, sums: _Sums
    ) -> Tensor:
        """A micro-batch's share of the loss: policy loss, KL penalty and entropy bonus, all with the same mean."""
        ppo, kl = self.config.ppo, answers.kl
        assert ppo is not None
        batch = Batch([answers.samples[i] for i in indices], self.device)
        log_probs, entropy = self.module(batch, self.config.rollout.temperature)
        width = log_probs.shape[1]
        old, advantages = answers.log_probs[indices, :width], answers.advantages[indices, :width]
        reference = None if answers.reference is None else answers.reference[indices, :width]
        weights = aggregation_weights(loss.aggregation, batch.mask, answers.prompt_tokens[indices])
        inputs = LossInputs(log_probs, old, old, reference, advantages, batch.mask)
        output = loss(inputs)
        policy_loss = total = masked_sum(weights * output.loss, batch.mask)
        if kl.loss_coefficient and reference is not None:
            penalty = kl_estimate(masked(log_probs - reference, batch.mask), kl.estimator)
            total = total + kl.loss_coefficient * masked_sum(weights * penalty, batch.mask)
        if ppo.entropy_coefficient:
            total = total - ppo.entropy_coefficient * masked_sum(weights * entropy, batch.mask)
        sums.add("loss", policy_loss)
        metrics = {"entropy": entropy, "gap": (log_probs - old).abs(), "approx_kl": kl_from_behavior(inputs)}
        for name, values in (metrics | output.metrics).items():
            sums.add(name, masked_sum(values, batch.mask))
        return total / self._divisor(loss, mini)

    def _ptx_loss(self, part: SupervisedBatch, indices: Rows, tokens: int, sums: _Sums) -> Tensor:
        ppo = self.config.ppo
        assert ppo is not None and ppo.ptx is not None
        loss = self._demonstration_loss(part, indices)
        sums.add("ptx", loss * tokens)  # the loss is a mean already
        return ppo.ptx.coefficient * loss

    # ------------------------------------------------------------ weight updates

    def connect(self, engines: list[ActorHandle], transport: str, address: tuple[str, int]) -> None:
        """Connect to the engines over a transport: object_store, nccl or ipc."""
        adapter = LEARNS if self.config.weight_sync.lora == "adapter" else None
        self.source = GatheredWeights(self.model.hf, self.backend, checked=self.rank == 0, adapter=adapter)
        rollout, bucket_bytes = self.config.rollout, self.config.weight_sync.bucket_mib * 2**20
        self.client = EngineClient(engines, self.source, rollout.tensor_parallel)
        engine_ranks = len(engines) * rollout.tensor_parallel
        self.sender = make_sender(transport, self.client, self.source, self.rank, bucket_bytes, engine_ranks, address)

    def sync_weights(self, version: int) -> tuple[int, Probe]:
        """Send the weights to every engine as this version. Collective. Returns the bytes of one copy, and the outputs that the
        engines must reproduce."""
        self.client.version = version
        with torch.no_grad():
            self.sender.send_weights()
        return self.source.nbytes, self.probe(version)


class _Sums(dict[str, float]):
    """Sums over the micro-batches of a mini-batch."""

    def add(self, name: str, value: Tensor) -> None:
        self[name] = self.get(name, 0.0) + float(value.detach())
