"""A vLLM engine inside a Ray actor: token ids in, token ids and log-probabilities out."""

from __future__ import annotations

import hashlib
from typing import Any, get_args

import numpy as np
import ray
import torch.distributed as dist
from vllm import EngineArgs, LLMEngine, SamplingParams, TokensPrompt
from vllm.config import WeightTransferConfig
from vllm.config.lora import MaxLoRARanks
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.lora.request import LoRARequest
from vllm.sampling_params import RequestOutputKind

from configs.schema import LoraSettings, SamplingSettings
from workers.api import RolloutApi
from workers.data import end_tokens, load_tokenizer
from workers.data.samples import RolloutBatch, Sample
from workers.data.step_inputs import RolloutInfo, StaleWeights
from workers.models.loading import load_config
from workers.models.served import engine_options, why_not_served
from workers.process.worker import Worker, compiles
from workers.weight_sync.checksums import Checksums
from workers.weight_sync.probe import Probe
from workers.weight_sync.receivers import ADAPTER_ID


def sample_seed(run: int, step: int, prompt: int, sample: int) -> int:
    """Seed of one answer. It does not depend on the engine or the batch."""
    digest = hashlib.blake2b(f"{run}/{step}/{prompt}/{sample}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % 2**63


def _adapter_options(lora: LoraSettings) -> dict[str, Any]:
    """Engine options for one adapter, at the smallest rank that vLLM has kernels for."""
    return {
        "enable_lora": True,
        "max_loras": 1,
        "max_lora_rank": min(r for r in get_args(MaxLoRARanks) if r >= lora.rank),
    }


def _in_peft_words(lora: LoraSettings) -> dict[str, Any]:
    return {"r": lora.rank, "lora_alpha": lora.alpha, "target_modules": lora.targets, "use_rslora": lora.rslora}


class RolloutWorker(Worker, RolloutApi):
    """One engine. It serves exactly one policy version; during an update, or after a failed one, it serves none."""

    engine: LLMEngine
    version: int | None = None
    adapter: LoRARequest | None = None
    """The adapter of all requests, once one was published."""

    def load(self, path: str, transport: str, max_length: int) -> None:
        """Start the engine on the model in a folder; a previous engine is shut down."""
        if hasattr(self, "engine"):
            self.engine.engine_core.shutdown()
            del self.engine
            self.adapter = None
            cleanup_dist_env_and_memory()
        self.longest = max_length
        settings, model = self.config.rollout, self.config.model
        sends_adapter = self.config.weight_sync.lora == "adapter"
        config = load_config(path, model, scalar=False)
        if reason := why_not_served(config, "cuda" if self.spec.device == "cuda" else "cpu"):
            raise ValueError(f"{path}: {reason}")
        self.ends = end_tokens(path, load_tokenizer(path, model.trust_remote_code), model)
        on_gpu = self.spec.device == "cuda"
        memory: dict[str, Any] = (
            {"gpu_memory_utilization": settings.gpu_memory_share}
            if on_gpu
            else {"kv_cache_memory_bytes": int(settings.kv_cache_gib * 2**30)}
        )
        args = EngineArgs(
            model=path,
            skip_tokenizer_init=True,
            generation_config="vllm",  # end tokens and sampling settings come from each request only
            trust_remote_code=model.trust_remote_code,
            dtype=model.dtype,
            seed=self.config.seed,
            max_model_len=max_length,
            max_num_seqs=settings.max_sequences,
            tensor_parallel_size=settings.tensor_parallel,
            # vLLM's default inside a placement group is its Ray executor, which would place workers itself.
            distributed_executor_backend="uni" if settings.tensor_parallel == 1 else "mp",
            enforce_eager=not compiles(self.config, self.spec.device),
            # A prompt in two chunks would rewind its request's random generator, which is impossible on CPU.
            enable_chunked_prefill=None if on_gpu else False,
            logprobs_mode="processed_logprobs",
            weight_transfer_config=WeightTransferConfig(
                backend=f"verified_{'adapter' if sends_adapter else 'weights'}_{transport}"
            ),
            worker_extension_cls="troupe.vllm.WeightVerifier",
            enable_sleep_mode=self.spec.time_shared,
            disable_log_stats=True,
            **memory,
            **(_adapter_options(model.lora) if sends_adapter and model.lora else {}),
            **engine_options(config, "cuda" if on_gpu else "cpu"),
        )
        # vLLM itself would open a rendezvous store that listens on every interface.
        if settings.tensor_parallel == 1 and not dist.is_initialized():
            store = dist.HashStore()  # type: ignore[attr-defined]
            dist.init_process_group("nccl" if on_gpu else "gloo", store=store, rank=0, world_size=1)
        self.engine = LLMEngine.from_engine_args(args)
        self.version = 0
        self._sleep()

    def _sleep(self) -> None:
        """Free the device for other roles: the weights move to host memory, the KV cache is dropped."""
        if self.spec.time_shared:
            self.engine.sleep(level=1)

    def _wake(self, *parts: str) -> None:
        """parts: weights, kv_cache; none: all that sleep. vLLM does nothing if one of several parts is awake already."""
        if self.spec.time_shared and self.engine.is_sleeping():
            self.engine.wake_up(list(parts) or None)

    def generate(
        self,
        data: str,
        prompts: np.ndarray,
        samples: np.ndarray,
        step: int,
        version: int | None = None,
        sampling: SamplingSettings | None = None,
    ) -> tuple[RolloutBatch, RolloutInfo]:
        """Answer prompts: entry i is answer number samples[i] to row prompts[i] of the dataset. sampling: None: as in training.

        Raises StaleWeights where the engine's weights are not those of `version` (None: any version).
        """
        if self.version is None:
            raise StaleWeights(f"{self!r} has no verified weights and generates nothing until a weight sync succeeds")
        if version not in (None, self.version):
            raise StaleWeights(f"{self!r} has version {self.version}, but version {version} was requested")
        self._wake()
        for i, (prompt, sample) in enumerate(zip(prompts.tolist(), samples.tolist(), strict=True)):
            ids = self.datasets[data].row(prompt).tolist()
            seed = sample_seed(self.config.seed, step, prompt, sample)
            self.engine.add_request(
                str(i), TokensPrompt(prompt_token_ids=ids), self._sampling(sampling, seed), lora_request=self.adapter
            )
        answers: list[Any] = [None] * len(prompts)
        while self.engine.has_unfinished_requests():
            for output in self.engine.step():
                if output.finished:
                    answers[int(output.request_id)] = output
        self._sleep()
        return self._batch(answers)

    def prove(self, version: int, probe: Probe) -> float:
        """Compare the engine's log-probabilities of the probe's tokens with the trainer's. Returns their gap.

        Raises DifferentModel where it is above the bound; the engine then serves nothing until another update succeeds.
        """
        probe = probe.within(self.longest - 1)  # an engine always generates at least one token
        self._wake()
        asked = SamplingParams(
            prompt_logprobs=0, max_tokens=1, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY
        )
        for i, ids in enumerate(probe.ids.tolist()):
            self.engine.add_request(str(i), TokensPrompt(prompt_token_ids=ids), asked, lora_request=self.adapter)
        found = np.empty_like(probe.values)
        while self.engine.has_unfinished_requests():
            for output in self.engine.step():
                if output.finished:
                    pairs = zip(output.prompt_logprobs[1:], output.prompt_token_ids[1:], strict=True)
                    found[int(output.request_id)] = [at[token].logprob for at, token in pairs]
        self._sleep()
        served, self.version = self.version, None
        gap = probe.require(found, self.config.gap_bound(self.config.model), f"{self!r}, version {version},")
        self.version = served
        return gap

    def _sampling(self, sampling: SamplingSettings | None, seed: int) -> SamplingParams:
        settings = sampling or self.config.rollout
        return SamplingParams(
            temperature=settings.temperature,
            max_tokens=settings.max_new_tokens,
            seed=seed,
            logprobs=0,
            detokenize=False,
            ignore_eos=settings.ignore_eos,
            stop_token_ids=[] if settings.ignore_eos else self.ends,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

    def _batch(self, answers: list[Any]) -> tuple[RolloutBatch, RolloutInfo]:
        outputs = [answer.outputs[0] for answer in answers]
        samples = [
            Sample.of(
                answer.prompt_token_ids,
                output.token_ids,
                [at[token].logprob for at, token in zip(output.logprobs, output.token_ids, strict=True)],
                self.version,
            )
            for answer, output in zip(answers, outputs, strict=True)
        ]
        ended = [output.finish_reason == "stop" for output in outputs]
        return RolloutBatch.of(samples), RolloutInfo.of(samples, ended)

    # ------------------------------------------------------------ weights: called by the trainer's EngineClient

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self.engine.collective_rpc("init_weight_transfer_engine", kwargs={"init_info": init_info})

    def start_weight_update(self) -> None:
        self.version = None
        self._wake("weights")  # no KV cache until the next `generate`: the actor needs the device now
        self.engine.collective_rpc("forget_weight_update")  # if a trainer died during one
        self.engine.collective_rpc("start_weight_update")

    def update_weights(self, update_info: dict[str, Any]) -> None:
        if isinstance(arrays := update_info.get("arrays"), ray.ObjectRef):
            update_info = update_info | {"arrays": ray.get(arrays)}
        self.engine.collective_rpc("update_weights", kwargs={"update_info": update_info})

    def finish_weight_update(self, version: int, checksums: Checksums) -> None:
        """Serve the new version if the engine has the weights that were sent (protocol: workers.weight_sync)."""
        shown = self.engine.collective_rpc("weight_checksums")
        self.engine.collective_rpc("finish_weight_update")
        for received in shown:
            if received != checksums:
                wrong = sorted(n for n in checksums.keys() | received.keys() if checksums.get(n) != received.get(n))
                raise StaleWeights(
                    f"{self!r}: version {version} did not arrive as it was sent: {len(wrong)} of {len(checksums)} tensors "
                    f"differ, first {wrong[0]}"
                )
        for lacking in self.engine.collective_rpc("layers_without_weights"):
            if lacking:
                raise RuntimeError(f"vLLM did not load the new weights of {len(lacking)} layers, first {lacking[0]}")
        if self.config.weight_sync.lora == "adapter":
            assert self.config.model.lora is not None
            self.engine.collective_rpc("apply_adapter", kwargs={"config": _in_peft_words(self.config.model.lora)})
            self.adapter = LoRARequest("actor", ADAPTER_ID, "in memory")
        if not self.engine.reset_prefix_cache():  # the old weights computed it
            raise StaleWeights(
                f"{self!r}: version {version} arrived while requests were running, which use the prefix cache"
            )
        self.version = version
