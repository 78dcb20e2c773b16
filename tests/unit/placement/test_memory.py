"""The memory model: exact parameter counts, tensors that autograd keeps, properties, and one measured run."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from rich.console import Console

from configs import ZERO
from configs.schema import RunConfig, Strategy
from placement import Cluster, PlanError, PlanReport, make_plan, render, with_memory
from placement.memory import MemoryEstimate, Place
from placement.memory.phases import (
    PassSize,
    UseByPhase,
    engine_memory,
    frozen_memory,
    received_bytes,
    sent_bytes,
    trainer_memory,
)
from placement.memory.states import Model, Sharding
from placement.models import LADDER, Adapters, Architecture
from placement.models.activations import saved_bytes
from placement.stages import WITH_ENGINES, Phase
from placement.types import GIB, MIB

STRATEGIES: tuple[Strategy, ...] = tuple(ZERO)
ON_DEVICE = [strategy for strategy in STRATEGIES if ZERO[strategy].optimizer == "device"]

GATED = {"vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 32}
GATED |= {"num_key_value_heads": 1, "intermediate_size": 128}
OPT = {"model_type": "opt", "vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
OPT |= {"ffn_dim": 256, "max_position_embeddings": 256}
SMOLLM2 = {"model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "num_hidden_layers": 30}
SMOLLM2 |= {"num_attention_heads": 9, "num_key_value_heads": 3, "intermediate_size": 1536, "tie_word_embeddings": True}


def smollm2(size: int = 4, scalar: bool = False, adapters: Adapters | None = None) -> Model:
    return Model(Architecture.read(SMOLLM2), size, scalar, adapters)


def train(
    model: Model, strategy: Strategy = "ddp", ranks: int = 1, tokens: int = 200, checkpointing: bool = False
) -> UseByPhase:
    return trainer_memory(
        model, Sharding(strategy, ranks, "cpu"), PassSize(tokens, 66, checkpointing), scores=model.scalar
    )


# ---------------------------------------------------------------- parameters


@pytest.mark.parametrize(
    ("name", "count"), [("s", 124_439_808), ("m", 354_823_168), ("l", 774_030_080), ("xl", 1_557_611_200)]
)
def test_gpt2(name: str, count: int) -> None:
    assert Architecture.preset(name).parameters == count


def test_the_ladder_rises_and_its_names_say_how_large() -> None:
    counts = [Architecture.preset(name).parameters for name in LADDER]
    assert counts == sorted(counts)
    for name, count in zip(LADDER, counts, strict=True):
        if name.endswith("b"):
            assert count / 1e9 == pytest.approx(float(name[:-1]), rel=0.07)


@pytest.mark.parametrize(
    ("config", "count"),
    [
        # layer: q, o 4096 each; k, v 2048 each; 3 x 8192; norms 128
        (GATED | {"model_type": "llama"}, 2 * 36_992 + 2 * 8192 + 64),
        (GATED | {"model_type": "llama", "tie_word_embeddings": True}, 2 * 36_992 + 8192 + 64),
        (GATED | {"model_type": "llama", "attention_bias": True}, 2 * (36_992 + 64 + 32 + 32 + 64) + 2 * 8192 + 64),
        (GATED | {"model_type": "llama", "mlp_bias": True}, 2 * (36_992 + 128 + 128 + 64) + 2 * 8192 + 64),
        (GATED | {"model_type": "qwen2"}, 2 * (36_992 + 64 + 32 + 32) + 2 * 8192 + 64),
        (GATED | {"model_type": "qwen3"}, 2 * (36_992 + 2 * 32) + 2 * 8192 + 64),
        # layer: 4 x (4096 + 64); 16384 + 256; 16384 + 64; norms 2 x 128
        (OPT, 2 * 49_984 + 8192 + 258 * 64 + 128),
        (OPT | {"word_embed_proj_dim": 16}, 2 * 49_984 + 128 * 16 + 258 * 64 + 2 * 16 * 64 + 128),
        (OPT | {"do_layer_norm_before": False}, 2 * 49_984 + 8192 + 258 * 64),
        # layer: 12288 + 192; 4096 + 64; 16384 + 256; 16384 + 64; norms 2 x 128
        (
            {"model_type": "bloom", "vocab_size": 128, "hidden_size": 64, "n_layer": 2, "n_head": 2},
            2 * 49_984 + 8192 + 256,
        ),
        (SMOLLM2, 134_515_008),
    ],
)
def test_other_architectures(config: dict[str, Any], count: int) -> None:
    shape = Architecture.read(config)
    assert shape.parameters == count
    assert shape.embeddings + shape.layers * shape.layer + shape.final_norm + shape.head == count


def test_a_scalar_head_takes_the_place_of_the_head() -> None:
    tied, untied = (Architecture.read(GATED | {"model_type": "llama", "tie_word_embeddings": t}) for t in (True, False))
    assert tied.scalar_parameters == untied.scalar_parameters == tied.parameters + 64


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "mamba"}, "model_type is 'mamba'"),
        (OPT | {"ffn_dim": None}, "inner is None"),
        ({}, "None"),
    ],
)
def test_an_unknown_shape_is_told(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        Architecture.of(tmp_path)


def test_a_missing_number_is_told() -> None:
    with pytest.raises(ValueError, match="llama: 'intermediate_size' is missing"):
        Architecture.read({k: v for k, v in SMOLLM2.items() if k != "intermediate_size"})


# ---------------------------------------------------------------- against torch


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "gpt2", "opt", "bloom"])
@pytest.mark.parametrize(("size", "kv_heads"), [(4, 1), (2, 2)])
def test_counts_are_those_of_transformers_and_of_autograd(kind: str, size: int, kv_heads: int) -> None:
    """Parameters exactly; what the layers keep for the backward pass within 2%."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    gated = GATED | {"num_attention_heads": 4, "num_key_value_heads": kv_heads}
    idle = dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop", "dropout"), 0.0)
    short: dict[str, Any] = {"n_embd": 64, "hidden_size": 64, "n_layer": 2, "n_head": 2}
    chosen = {"gpt2": short, "opt": OPT, "bloom": short}.get(kind, gated) | {"vocab_size": 128} | idle
    chosen = {
        name: value for name, value in chosen.items() if hasattr(CONFIG_MAPPING[kind](), name) and name != "model_type"
    }
    config = CONFIG_MAPPING[kind](**chosen, bos_token_id=None, eos_token_id=1, pad_token_id=0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32 if size == 4 else torch.bfloat16).train()
    shape = Architecture.read(config.to_dict())
    assert shape.parameters == sum(p.numel() for p in model.parameters())

    rows, length = 4, 48
    kept: dict[tuple[int, int], int] = {}
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    alive = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr(), storage.nbytes()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    mask = torch.ones(rows, length, dtype=torch.long)
    mask[1, 30:] = 0
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.base_model(input_ids=torch.ones(rows, length, dtype=torch.long), attention_mask=mask, use_cache=False)
    gathered = rows * length * 64 * size  # for the head, which does not run here
    predicted = saved_bytes(shape, size, rows * length, length, None, False) - gathered
    assert sum(kept.values()) == pytest.approx(predicted, rel=0.02)


# ---------------------------------------------------------------- properties


@given(
    st.sampled_from(STRATEGIES),
    st.integers(1, 64),
    st.sampled_from([2, 4]),
    st.booleans(),
    st.sampled_from([None, Adapters(8), Adapters(8, frozenset({"q_proj"}))]),
    st.booleans(),
    st.sampled_from(["cpu", "cuda"]),
)
def test_no_part_is_negative_and_the_total_is_their_sum(
    strategy: Strategy, ranks: int, size: int, scalar: bool, adapters: Adapters | None, checkpointing: bool, device: Any
) -> None:
    model, sharding, work = (
        smollm2(size, scalar, adapters),
        Sharding(strategy, ranks, device),
        PassSize(400, 66, checkpointing),
    )
    learning = trainer_memory(
        model, sharding, work, scores=scalar, published=sent_bytes(model, sharding, MIB, "object_store")
    )
    serving = engine_memory(model, device, 1, GIB, 64, received_bytes(model, MIB, "nccl"), 2 * GIB)
    for uses in (learning, serving, frozen_memory([model, model], sharding, work), frozen_memory([], sharding, work)):
        assert tuple(uses) == WITH_ENGINES
        for use in uses.values():
            for place in use.places().values():
                assert all(size >= 0 for size in place.parts().values())
                assert place.total == sum(place.parts().values())
            assert use.host.runtime > 0
            assert (use.device.total > 0) == (device == "cuda")


@pytest.mark.parametrize("strategy", STRATEGIES[1:])
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("adapters", [None, Adapters(16)])
def test_ranks_never_cost_memory_under_zero(strategy: Strategy, size: int, adapters: Adapters | None) -> None:
    model = smollm2(size, adapters=adapters)
    for phase in WITH_ENGINES:
        totals = [train(model, strategy, ranks)[phase].host.total for ranks in (1, 2, 3, 8, 64)]
        assert totals == sorted(totals, reverse=True), phase


def test_each_stage_of_zero_holds_less_when_idle() -> None:
    for size in (2, 4):
        totals = [train(smollm2(size), s, 8)["generate"].host.total for s in ON_DEVICE]
        assert totals == sorted(totals, reverse=True)


def test_adapters_shrink_gradients_and_optimizer() -> None:
    for strategy in ON_DEVICE:
        full, lora = (train(smollm2(adapters=a), strategy, 2)["train"].host for a in (None, Adapters(8)))
        assert lora.optimizer < 0.03 * full.optimizer
        assert lora.gradients < 0.03 * full.gradients
        assert lora.parameters >= full.parameters
    assert Adapters(8).parameters(smollm2().shape) == 30 * 8 * (1152 + 768 + 768 + 1152 + 3 * 2112)
    assert Adapters(8, frozenset({"k_proj"})).parameters(smollm2().shape) == 30 * 8 * 768


def test_bfloat16_halves_parameters_and_keeps_float32_states() -> None:
    wide, narrow = (train(smollm2(size))["train"].host for size in (4, 2))
    assert narrow.parameters * 2 == wide.parameters
    assert narrow.optimizer == 12 * smollm2().base
    assert wide.optimizer == 8 * smollm2().base


@settings(deadline=None)
@given(st.integers(1, 4096), st.integers(1, 4096), st.booleans(), st.booleans())
def test_more_tokens_never_take_less(one: int, other: int, scalar: bool, checkpointing: bool) -> None:
    few, many = sorted((one, other))
    model = smollm2(scalar=scalar)
    for phase in WITH_ENGINES:
        less, more = (train(model, tokens=t, checkpointing=checkpointing)[phase].host.total for t in (few, many))
        assert less <= more


def test_checkpointing_keeps_less() -> None:
    plain, checkpointed = (train(smollm2(), tokens=2048, checkpointing=c)["train"].host for c in (False, True))
    assert checkpointed.activations < 0.15 * plain.activations
    assert replace(checkpointed, activations=0) == replace(plain, activations=0)


# ---------------------------------------------------------------- against a measured run


def test_smollm2_as_measured() -> None:
    """Full training in float32, one rank, ddp, micro-batches of 200 tokens; proportional set sizes on CPU, GiB."""
    actor, critic = train(smollm2()), train(smollm2(scalar=True))
    serving = engine_memory(
        smollm2(), "cpu", 1, int(0.1 * GIB), 64, received_bytes(smollm2(), 128 * MIB, "object_store"), None
    )
    assert actor["train"].host.total / GIB == pytest.approx(3.13, rel=0.15)  # 3.06 to 3.2
    assert actor["generate"].host.total / GIB == pytest.approx(2.50, rel=0.15)
    assert critic["generate"].host.total / GIB == pytest.approx(2.36, rel=0.15)
    assert serving["generate"].host.total / GIB == pytest.approx(1.45, rel=0.15)


# ---------------------------------------------------------------- plans


def planned(folder: Path, cluster: str, shape: dict[str, Any] | None = None, **settings: Any) -> PlanReport:
    (folder / "config.json").write_text(json.dumps(shape or SMOLLM2))
    data, adam = {"path": "rows.jsonl"}, {"lr": 1e-4}
    ppo = {"prompts": data, "steps": 3, "actor_optimizer": adam, "critic_optimizer": adam}
    supervised = {"train": data, "optimizer": adam}
    base = {
        "name": "run",
        "model": {"path": str(folder), "dtype": "float32"},
        "sft": supervised,
        "rm": supervised,
        "ppo": ppo,
    }
    settings = {key: base[key] | value if key in ("ppo", "rm", "model") else value for key, value in settings.items()}
    config = RunConfig.model_validate(base | settings)
    return with_memory(config, make_plan(config, "ppo", Cluster.parse(cluster)))


def estimate_of(plan: PlanReport) -> MemoryEstimate:
    assert isinstance(plan.memory, MemoryEstimate)
    return plan.memory


def place(plan: PlanReport, start: str) -> Place:
    return next(place for place in estimate_of(plan).places if place.name.startswith(start))


def text(plan: PlanReport) -> str:
    console = Console(file=io.StringIO(), width=200)
    console.print(render(plan.plan, plan.memory))
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_roles_of_one_machine_add_up(tmp_path: Path) -> None:
    plan = planned(tmp_path, "1x4cpu,host=64GB", recovery={"snapshot_every": None})
    roles, node = estimate_of(plan).roles, place(plan, "node-0")
    phases: tuple[Phase, ...] = ("load", "train", "generate", "score")
    for phase in phases:
        assert node.used[phase] == sum(role.uses[phase].host.total for role in roles.values())
    assert node.headroom == 64 * GIB - node.used[node.tightest]
    assert not estimate_of(plan).missing
    assert "GiB are left" in text(plan)
    assert "does not fit" not in text(plan)


def test_roles_of_one_group_take_turns(tmp_path: Path) -> None:
    apart, colocated = (
        place(planned(tmp_path, "1x4cpu,host=64GB", placement={"layout": layout}), "node-0")
        for layout in ("separate", "colocated")
    )
    assert colocated.used["train"] < apart.used["train"]
    assert colocated.used["load"] == apart.used["load"]


def test_alike_nodes_stand_once(tmp_path: Path) -> None:
    group = {"roles": ["actor", "critic", "reference", "reward", "rollout"], "devices": 4, "packing": "STRICT_SPREAD"}
    plan = planned(tmp_path, "4x4cpu,host=64GB", placement={"groups": [group]}, strategy="zero2")
    assert [p.name for p in estimate_of(plan).places] == [
        "node-0",
        "each of 3 nodes, node-1 ...",
    ]  # the first rank saves more


def test_what_does_not_fit_says_what_would_help(tmp_path: Path) -> None:
    fits = place(planned(tmp_path, "1x4cpu", ppo={"micro_batch_tokens": 4096}), "node-0")
    size = fits.used[fits.tightest] / GIB
    plan = planned(tmp_path, f"1x4cpu,host={size - 1:.2f}GB", ppo={"micro_batch_tokens": 4096})
    assert estimate_of(plan).missing == pytest.approx(GIB, rel=0.01)
    assert estimate_of(plan).advice[0] == "model.gradient_checkpointing=true would fit"
    assert estimate_of(plan).advice[1].startswith("ppo.micro_batch_tokens=")
    assert "does not fit" in text(plan)
    for line in estimate_of(plan).advice:  # the memory model itself tried it
        setting, _, value = line.removesuffix(" would fit").partition("=")
        changes: Any = OmegaConf.to_container(
            OmegaConf.from_dotlist(["ppo.micro_batch_tokens=4096", f"{setting}={value}"])
        )
        assert not estimate_of(planned(tmp_path, f"1x4cpu,host={size - 1:.2f}GB", **changes)).missing, line


def test_what_can_never_fit(tmp_path: Path) -> None:
    (line,) = estimate_of(planned(tmp_path, "1x4cpu,host=2GB")).advice
    assert "would still be missing: more memory" in line


def test_gpus(tmp_path: Path) -> None:
    plan = planned(tmp_path, "1x8xA100-80GB,host=1TB")
    assert {p.name for p in estimate_of(plan).places} == {
        "node-0",
        *(f"each GPU of {role}" for role in estimate_of(plan).roles),
    }
    assert all(p.size == 80 * GIB for p in estimate_of(plan).places if "GPU" in p.name)
    engine_gpu = place(plan, "each GPU of rollout")
    assert engine_gpu.used["generate"] == pytest.approx(0.4 * 80 * GIB, rel=1e-6)
    assert "actor, GPU" in text(plan)


def test_a_gpu_of_unknown_size_gets_no_verdict(tmp_path: Path) -> None:
    plan = planned(tmp_path, "1x8xL4")
    assert not estimate_of(plan).missing
    assert "is not known" in text(plan)


def test_an_engine_without_room_for_a_sequence_is_told(tmp_path: Path) -> None:
    plan = planned(tmp_path, "1x8xA100-80GB,host=1TB", rollout={"gpu_memory_share": 0.01})
    assert any(line.startswith("rollout.gpu_memory_share: was 0.01") for line in estimate_of(plan).warnings)
    assert "rollout.gpu_memory_share: was 0.01" in text(plan)


@pytest.mark.parametrize(("dtype", "needed"), [("bfloat16", 0.011), ("float32", 0.022)])
def test_a_cache_without_room_for_a_sequence_is_refused_on_cpu(tmp_path: Path, dtype: str, needed: float) -> None:
    """384 tokens in blocks of 128, and one block that vLLM keeps empty, of 30 layers with 3 heads of 64 each."""
    exact = 4 * 128 * 2 * 30 * 3 * 64 * (2 if dtype == "bfloat16" else 4) / GIB
    assert exact == pytest.approx(needed, abs=1e-4)
    model = {"dtype": dtype}
    assert planned(tmp_path, "1x8cpu", rollout={"kv_cache_gib": exact}, model=model)
    with pytest.raises(PlanError) as refused:
        planned(tmp_path, "1x8cpu", rollout={"kv_cache_gib": 0.99 * exact}, model=model)
    (problem,) = refused.value.problems
    assert problem.setting == "rollout.kv_cache_gib"
    start = f"{0.99 * exact:g}, but one sequence of 384 tokens (ppo.max_prompt_tokens + rollout.max_new_tokens) needs {needed:g} "
    assert problem.text.startswith(start)


@pytest.mark.parametrize(("micro_batch_tokens", "times"), [(4096, 1), (512, 2), (1, 2)])
def test_both_sides_of_a_pair_count(tmp_path: Path, micro_batch_tokens: int, times: int) -> None:
    """A pass has as many tokens as the setting allows, but at least one pair of 512 tokens on each side."""
    (tmp_path / "config.json").write_text(json.dumps(SMOLLM2))
    supervised = {"train": {"path": "rows.jsonl"}, "optimizer": {"lr": 1e-4}, "micro_batch_tokens": micro_batch_tokens}
    config = RunConfig.model_validate(
        {"name": "run", "model": {"path": str(tmp_path), "dtype": "float32"}, "sft": supervised, "rm": supervised}
    )
    sft, rm = (estimate_of(with_memory(config, make_plan(config, s, Cluster.parse("1x4cpu")))) for s in ("sft", "rm"))
    assert sft.phases == rm.phases == ("load", "train", "save")
    kept = [m.roles[r].uses["train"].host.activations for m, r in ((sft, "actor"), (rm, "reward"))]  # type: ignore[index]
    assert kept[1] == times * kept[0]


def test_a_model_that_is_not_here_leaves_it_out(tmp_path: Path) -> None:
    plan = planned(tmp_path, "1x4cpu", model={"path": "some/model"})
    assert str(plan.memory).startswith("not predicted: some/model is neither a local folder with a config.json")
    assert "not predicted" in text(plan)
    assert plan.as_dict()["memory"] == plan.memory


def test_as_json(tmp_path: Path) -> None:
    memory = json.loads(json.dumps(planned(tmp_path, "1x4cpu,host=64GB").as_dict()))["memory"]
    host = memory["roles"]["actor"]["train"]["host"]
    assert host["total"] == sum(size for part, size in host.items() if part != "total")
    assert memory["fits"] is True
    assert memory["places"][0]["tightest"] in memory["places"][0]["used"]


def test_a_large_cluster_is_predicted(tmp_path: Path) -> None:
    devices = dict.fromkeys(("actor", "critic", "reference", "reward", "rollout"), 128)
    plan = planned(tmp_path, "64x16xA100-1GB,host=1TB", placement={"devices": devices}, ppo={"prompts_per_step": 1024})
    assert estimate_of(plan).missing


@pytest.mark.parametrize(("cluster", "gpus"), [("1x5xA100-80GB,host=1TB", 4), ("1x8cpu,host=64GB", 0)])
def test_rewards_that_are_functions_alone_ask_for_no_gpu(tmp_path: Path, cluster: str, gpus: int) -> None:
    rewards = [{"kind": "function", "name": "brief", "function": "rewards:brief"}]
    report = planned(tmp_path, cluster, ppo={"rewards": rewards})
    assert sum(bundle.get("GPU", 0) for group in report.plan.groups for bundle in group.bundles) == gpus
    assert report.plan.roles["reward"].gpus == 0
    memory = estimate_of(report)
    assert not any("GPU of reward" in place.name for place in memory.places)
    assert memory.roles["reward"].uses["score"].device.total == 0
    assert memory.roles["reward"].uses["score"].host.parameters == 0
