"""Settings: accepted values, refused values and their error texts, the reference."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from configs import ConfigError, RunConfig, load_config, save_config
from configs.annotations import choices, kind_of
from configs.reference import describe, settings_markdown
from configs.schema import EVALUATION_METRICS, PPOClipLoss, ReinforceLoss
from configs.zero import ALIASES, ZERO, Strategy, _resolve_alias

ROOT = Path(__file__).parents[3]

GOOD = """
name: run
model: {path: some/model}
ppo:
  prompts: {path: prompts.jsonl}
  steps: 3
  rewards:
    - {kind: model}
    - {kind: function, name: short, function: "rewards:short"}
  actor_optimizer: {lr: 1e-4}
  critic_optimizer: ${ppo.actor_optimizer}
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text)
    return path


def problems(path: Path, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    assert str(caught.value).splitlines() == list(caught.value.problems)
    return list(caught.value.problems)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_file_interpolations_and_overrides(tmp_path: Path) -> None:
    config = load_config(
        write(tmp_path, GOOD),
        [
            "ppo.rewards.1.weight=0.5",
            "ppo.critic_optimizer.lr=2e-4",
            "model.path=${name}/model",
            "rollout.gpu_memory_share=0.9",
            "ppo.kl.controller={kind: adaptive, target: 0.2}",
            "cluster.address=",
        ],
    )
    assert config.ppo is not None
    assert [reward.weight for reward in config.ppo.rewards] == [1.0, 0.5]
    assert config.ppo.actor_optimizer.lr == 1e-4, "an override must not reach through an interpolation"
    assert config.ppo.critic_optimizer is not None
    assert config.ppo.critic_optimizer.lr == 2e-4
    assert config.ppo.critic_optimizer.betas == (0.9, 0.95)
    assert config.model.path == "run/model"
    assert config.rollout.gpu_memory_share == 0.9
    assert config.ppo.kl.controller.kind == "adaptive"
    assert config.cluster.address is None


def test_names_of_the_original_benchmark_become_ours_and_it_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _resolve_alias.cache_clear()
    text = GOOD + "strategy: colossalai_zero2\nstrategies: {critic: colossalai_gemini_cpu, reference: zero3}\n"
    config = load_config(write(tmp_path, text), ["strategies.actor=colossalai_zero2"])
    assert config.strategy == "zero2"
    assert config.strategies == {"actor": "zero2", "critic": "zero3_offload", "reference": "zero3"}
    assert caplog.messages == [
        "strategy: colossalai_zero2 is an alias of zero2",
        "strategy: colossalai_gemini_cpu is an alias of zero3_offload",
    ]
    save_config(config, tmp_path / "saved.yaml")
    assert "colossalai" not in (tmp_path / "saved.yaml").read_text()
    with pytest.raises(ConfigError, match=r"^strategy: was \"colossalai_zero9\"; must be ddp \| zero1 \|"):
        load_config(write(tmp_path, GOOD), ["strategy=colossalai_zero9"])


def test_each_alias_and_each_name_is_a_strategy() -> None:
    assert set(ALIASES.values()) <= set(ZERO)
    assert {*ZERO, "auto"} == set(choices(kind_of(Strategy)))


@pytest.mark.parametrize("word", ["none", "None", "NONE", "null", "Null", "~", ""])
def test_none_is_none_wherever_it_may_be(tmp_path: Path, word: str) -> None:
    """In the file and on the command line, for a number, text, a path, settings or a list."""
    text = GOOD + f"  target_kl: {word}\ncluster: {{address: {word or 'null'}}}\n"
    section = f"sft={{train: {{path: a, split: {word or 'null'}}}, optimizer: {{lr: 1}}}}"
    overrides = [
        f"recovery.snapshot_every={word}",
        f"offload.nvme_path={word}",
        f"rm={word}",
        f"placement.groups={word}",
    ]
    config = load_config(write(tmp_path, text), [section, f"model.lora={word}", *overrides])
    assert config.ppo is not None and config.sft is not None
    assert config.ppo.target_kl is None and config.recovery.snapshot_every is None
    assert config.cluster.address is None and config.offload.nvme_path is None and config.sft.train.split is None
    assert config.model.lora is None and config.rm is None and config.placement.groups is None
    assert load_config(write(tmp_path, text), ["model.lora.rank=3"]).model.lora is not None, (
        "settings below it replace it"
    )


def test_what_is_quoted_is_text(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD + "cluster: {address: 'none'}\n")
    config = load_config(path, ["name='none'", 'model.path="null"', "ppo.prompts.columns={prompt: 'none'}"])
    assert (config.cluster.address, config.name, config.model.path) == ("none", "none", "null")
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml") == config


@pytest.mark.parametrize("name", ["20250101", "1.10", "0123", "1e3", "0x10", "1_0", "yes", "off", "2024-01-01", "3.0"])
def test_text_is_what_was_typed(tmp_path: Path, name: str) -> None:
    """Also where YAML would read a number or a truth value, as a value and as a key."""
    (tmp_path / "typed.yaml").write_text(GOOD.replace("name: run", f"name: {name}"))
    for config in (
        load_config(write(tmp_path, GOOD), [f"name={name}", "model.path=${name}/${name}"]),
        load_config(tmp_path / "typed.yaml", ["model.path=${name}/${name}"]),
    ):
        assert config.name == name
        assert config.model.path == f"{name}/{name}"
        save_config(config, tmp_path / "saved.yaml")
        assert load_config(tmp_path / "saved.yaml") == config
    columns = load_config(write(tmp_path, GOOD), [f"ppo.prompts.columns={{{name}: {name}}}"])
    assert columns.ppo is not None and columns.ppo.prompts.columns == {name: name}


@pytest.mark.parametrize(
    ("typed", "value"),
    [
        ("1e-4", 1e-4),
        ("1E3", 1e3),
        (".5", 0.5),
        ("5.", 5.0),
        ("+2", 2.0),
        ("1_000", 1000.0),
        ("2.5e1", 25.0),
        ("07", 7.0),
    ],
)
def test_numbers_as_people_write_them(tmp_path: Path, typed: str, value: float) -> None:
    config = load_config(write(tmp_path, GOOD), [f"ppo.value_clip_range={typed}"])
    assert config.ppo is not None and config.ppo.value_clip_range == value
    (tmp_path / "typed.yaml").write_text(GOOD + f"  value_clip_range: {typed}\n")
    assert load_config(tmp_path / "typed.yaml") == config


@pytest.mark.parametrize("typed", ["true", "True", "yes", "on"])
def test_truth_values(tmp_path: Path, typed: str) -> None:
    assert load_config(write(tmp_path, GOOD), [f"chat_template={typed}"]).chat_template is True


def test_a_setting_that_may_be_several_kinds_takes_the_one_that_was_typed(tmp_path: Path) -> None:
    typed = "{thinking: no, depth: 3, effort: high, version: 010, share: 0.5, quoted: '3'}"
    config = load_config(write(tmp_path, GOOD), [f"chat_template_args={typed}", "ppo.prompts.path=[2024, ~/b.jsonl]"])
    assert config.chat_template_args == {
        "thinking": False,
        "depth": 3,
        "effort": "high",
        "version": "010",
        "share": "0.5",
        "quoted": "3",
    }
    assert config.ppo is not None and config.ppo.prompts.paths == ["2024", os.path.expanduser("~/b.jsonl")]
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml") == config


@pytest.mark.parametrize("text", ["a: b", "a #b", "- a", "*a", "&a b", "!a", "%a", "@a", "> a", "x, y"])
def test_signs_of_yaml_mean_nothing_on_the_command_line(tmp_path: Path, text: str) -> None:
    assert load_config(write(tmp_path, GOOD), [f"model.path={text}"]).model.path == text


def test_numbers_from_python_that_are_to_be_text_are_refused() -> None:
    """A caller that parsed `name: 0123` as YAML has 83."""
    base = {"name": "a", "model": {"path": "m"}, "ppo": {"prompts": {"path": "p"}, "steps": 1}}
    with pytest.raises(ConfigError) as caught:
        load_config(base | {"runs": 83, "device": True, "seed": "1", "cluster": {"address": False}})
    assert [problem for problem in caught.value.problems if "ppo" not in problem] == [
        "runs: was 83; must be path; quote it if it is text",
        'seed: was "1"; must be integer >= 0 and < 2147483648; write numbers without quotes',
        "device: was true; must be auto | cpu | cuda",
        "cluster.address: was false; must be text or none; quote it if it is text",
    ]


# ---------------------------------------------------------------- paths


def test_the_home_folder_stands_for_a_tilde(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In every path; saved in expanded form, since `~` may mean another folder on another machine."""
    monkeypatch.setenv("HOME", "/home/me")
    config = load_config(
        write(tmp_path, GOOD),
        [
            "runs=~/runs",
            "start_from=~/runs/other",
            "model.path=~/",
            "offload.nvme_path=~/fast",
            "ppo.rewards.0.path=~/rm",
            "ppo.prompts.path=~/p.jsonl",
            "ppo.evaluation={prompts: {path: ~/q.jsonl}}",
            "ppo.ptx={coefficient: 1, data: {path: ~/d.jsonl}}",
            "sft={train: {path: ~/a.jsonl}, validation: {path: ~/b.jsonl}, optimizer: {lr: 1}}",
            "rm={train: {path: ~/c.jsonl}, model: {path: ~/m}, normalize_on: {path: ~/e.jsonl}, optimizer: {lr: 1}}",
        ],
    )
    text = str(config.model_dump())
    assert "~" not in text
    assert text.count("/home/me/") == 13
    save_config(config, tmp_path / "saved.yaml")
    monkeypatch.setenv("HOME", "/root")
    assert load_config(tmp_path / "saved.yaml") == config
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_config("~/saved.yaml") == config


def test_every_setting_that_names_a_path_knows_the_tilde() -> None:
    """Every setting named `path`, `runs` or `start_from` in the reference has a type that expands it."""
    paths = [setting for setting in describe() if setting.path.endswith(("path", "runs", "start_from"))]
    assert len(paths) > 12
    assert [setting.path for setting in paths if not setting.type.startswith(("path", "folder or hub name"))] == []


# ---------------------------------------------------------------- refused


NAME = "1 to 63 letters, digits, _ . and -, not starting with . or -"
BAD: list[tuple[str, str]] = [
    # what a strategy needs or does not support
    ("strategy=zero3_nvme", "offload.nvme_path: was none; zero3_nvme needs a folder on a fast disk of every node"),
    (
        "strategies.reference=zero3_nvme",
        "offload.nvme_path: was none; zero3_nvme needs a folder on a fast disk of every node",
    ),
    (
        "model.optimizer_dtype=bfloat16",
        "model.optimizer_dtype: was 'bfloat16', which is for models with dtype bfloat16; dtype was 'auto'",
    ),
    (
        "model={path: m, dtype: bfloat16, optimizer_dtype: bfloat16}",
        "model.optimizer_dtype: was 'bfloat16', which ddp of the actor does not support; zero1, zero2, zero3 do",
    ),
    ("model.activation_offload=true", "model.activation_offload: was true, which needs gradient_checkpointing: true"),
    # unknown names
    ("ppo.epoch=1", "ppo.epoch: no such setting; did you mean epochs?"),
    ("sed=3", "sed: no such setting; did you mean seed?"),
    ("temperature=1", "temperature: no such setting; did you mean rollout.temperature?"),
    ("weight_sync.zzz=1", "weight_sync.zzz: no such setting; there are transport, bucket_mib, lora"),
    ("ppo.rewards.0.wight=1", "ppo.rewards.0.wight: no such setting; did you mean weight?"),
    ("ppo.rewards.0.model=1", "ppo.rewards.0.model: no such setting; there are kind, name, path, tokenizer, weight"),
    (
        "ppo.kl.controller={kind: adaptive, horizn: 1}",
        "ppo.kl.controller.horizn: no such setting; did you mean horizon?",
    ),
    ("placement.devices.actr=1", "placement.devices.actr: no such key; did you mean actor?"),
    ("strategies={acto: ddp}", "strategies.acto: no such key; did you mean actor?"),
    # missing
    ("model={}", "model.path: missing; must be folder or hub name"),
    ("ppo.critic_optimizer={betas: [0, 0]}", "ppo.critic_optimizer.lr: missing; must be number > 0"),
    (
        "sft={train: {path: x}}",
        "sft.optimizer: missing; must be settings (lr, betas, weight_decay, warmup, schedule, max_grad_norm, skip_grad_norm)",
    ),
    ("ppo.steps=???", "ppo.steps: has no value (???)"),
    ("seed=???", "seed: has no value (???)"),
    ("ppo.rewards.1={kind: function, function: 'a:b'}", "ppo.rewards.1.name: missing; must be text"),
    # type
    ("ppo.steps=many", 'ppo.steps: was "many"; must be integer > 0'),
    ("ppo.steps='3'", 'ppo.steps: was "3"; must be integer > 0; write numbers without quotes'),
    ("ppo.target_kl='1e-4'", 'ppo.target_kl: was "1e-4"; must be number > 0 or none; write numbers without quotes'),
    ("ppo.steps=2.5", "ppo.steps: was 2.5; must be integer > 0"),
    ("ppo.steps=null", "ppo.steps: was null; must be integer > 0"),
    ("seed=true", "seed: was true; must be integer >= 0 and < 2147483648"),
    ("chat_template=1", "chat_template: was 1; must be true | false"),
    ("chat_template='yes'", 'chat_template: was "yes"; must be true | false'),
    ("ppo.steps=yes", "ppo.steps: was yes; must be integer > 0"),
    ("ppo.steps=none", "ppo.steps: was none; must be integer > 0"),
    ("ppo.steps=", "ppo.steps: was nothing; must be integer > 0"),
    ("ppo.steps=2024-01-01", 'ppo.steps: was "2024-01-01"; must be integer > 0'),
    ("ppo.value_clip_range=0,2", 'ppo.value_clip_range: was "0,2"; must be number > 0'),
    ("ppo.target_kl=0", "ppo.target_kl: was 0; must be number > 0 or none"),
    ("weight_sync=none", "weight_sync: was none; must be settings (transport, bucket_mib, lora)"),
    ("runs=null", "runs: was null; must be path; quote it if it is text"),
    ("runs=none", "runs: was none; must be path; quote it if it is text"),
    ("runs=~", "runs: was ~; must be path; quote it if it is text"),
    ("runs=", "runs: was nothing; must be path"),
    ("runs=''", 'runs: was ""; must be path'),
    ("device=on", "device: was on; must be auto | cpu | cuda"),
    # digits that YAML reads differently from people
    ("ppo.steps=010", "ppo.steps: was 010; must be integer > 0, in plain decimal digits (YAML reads 010 as 8)"),
    ("ppo.steps=1:30", "ppo.steps: was 1:30; must be integer > 0, in plain decimal digits (YAML reads 1:30 as 90)"),
    (
        "placement.timeout=1:30.5",
        "placement.timeout: was 1:30.5; must be number > 0, in plain decimal digits (YAML reads 1:30.5 as 90.5)",
    ),
    (
        "ppo.prompts=file.jsonl",
        'ppo.prompts: was "file.jsonl"; must be settings (path, split, configuration, revision, columns, limit)',
    ),
    ("model.lora=16", "model.lora: was 16; must be settings (rank, alpha, rslora, dora, dropout, targets) or none"),
    (
        "ppo.rewards=model",
        'ppo.rewards: was "model"; must be list of at least 1 settings with kind: model | function | http',
    ),
    ("ppo.rewards.0=model", 'ppo.rewards.0: was "model"; must be settings with kind: model | function | http'),
    ("ppo.kl.controller=fixed", 'ppo.kl.controller: was "fixed"; must be settings with kind: fixed | adaptive'),
    (
        "model.lora={targets: [q, [3]]}",
        'model.lora.targets: was ["q", [3]]; must be list of at least 1 text or all-linear',
    ),
    ("model.lora={targets: []}", "model.lora.targets: was []; must be list of at least 1 text or all-linear"),
    ("model.lora={targets: some}", 'model.lora.targets: was "some"; must be list of at least 1 text or all-linear'),
    ("ppo.prompts.columns=[a]", 'ppo.prompts.columns: was ["a"]; must be mapping of text to text'),
    ("ppo.prompts.columns={prompt: [3]}", "ppo.prompts.columns.prompt: was [3]; must be text"),
    # range and choice
    ("ppo.steps=0", "ppo.steps: was 0; must be integer > 0"),
    ("seed=-1", "seed: was -1; must be integer >= 0 and < 2147483648"),
    ("rollout.gpu_memory_share=1.5", "rollout.gpu_memory_share: was 1.5; must be number > 0 and <= 1"),
    ("ppo.gamma=.nan", "ppo.gamma: was .nan; must be number >= 0 and <= 1"),
    ("ppo.value_clip_range=.inf", "ppo.value_clip_range: was .inf; must be number > 0"),
    ("device=tpu", 'device: was "tpu"; must be auto | cpu | cuda'),
    *(
        (f"name={name}", f'name: was "{name}"; must be {NAME}')
        for name in ("..", ".", ".hidden", "-flag", "/root", "../a", "a" * 57 + "/")
    ),
    ("name=a/b", f'name: was "a/b"; must be {NAME}'),
    ("ppo.rewards.1.function=short", 'ppo.rewards.1.function: was "short"; must be module:function'),
    ("ppo.rewards=[]", "ppo.rewards: was []; must be list of at least 1 settings with kind: model | function | http"),
    ("ppo.critic_optimizer.betas=[0.9]", "ppo.critic_optimizer.betas.1: missing; must be number >= 0 and < 1"),
    (
        "ppo.critic_optimizer.betas=[0.9, 0.9, 0.9]",
        "ppo.critic_optimizer.betas: was [0.9, 0.9, 0.9]; must be [number >= 0 and < 1, number >= 0 and < 1]",
    ),
    ("ppo.critic_optimizer.betas=[-1, 0.9]", "ppo.critic_optimizer.betas.0: was -1; must be number >= 0 and < 1"),
    ("ppo.critic_optimizer.betas=[0.9, 1.0]", "ppo.critic_optimizer.betas.1: was 1.0; must be number >= 0 and < 1"),
    ("ppo.rewards.0.kind=modl", 'ppo.rewards.0.kind: was "modl"; must be model | function | http'),
    (
        "ppo.rewards.1={kind: http, name: h, url: 'ftp://host'}",
        'ppo.rewards.1.url: was "ftp://host"; must be http:// or https:// address without user, password, query and spaces',
    ),
    ("ppo.rewards.1.timeout=0", "ppo.rewards.1.timeout: was 0; must be number > 0 and <= 86400"),
    ("ppo.max_unscored=2", "ppo.max_unscored: was 2; must be number >= 0 and <= 1"),
    ("ppo.kl.controller={coefficient: 1}", "ppo.kl.controller.kind: missing; must be fixed | adaptive"),
    ("ppo.kl.controller={kind: fixed, coefficient: -1}", "ppo.kl.controller.coefficient: was -1; must be number >= 0"),
    (
        "ppo.kl.apply_to=loss",
        "ppo.kl: k1 in the loss has a gradient with mean 0, so it is no penalty. Use estimator=k2 or k3.",
    ),
    ("placement.devices={critic: 0}", "placement.devices.critic: was 0; must be integer > 0"),
    (
        "placement.groups=[{roles: [actor, judge]}]",
        'placement.groups.0.roles.1: was "judge"; must be actor | critic | reference | reward | rollout',
    ),
    # several settings at once
    (
        "ppo.mini_batches=65",
        "ppo.mini_batches: was 65, but a step has 64 sequences (prompts_per_step 64 x samples_per_prompt 1); that many or "
        "fewer would fit",
    ),
    (
        "placement.groups=[{roles: [actor]}, {roles: [actor]}]",
        "placement.groups: the role actor is in more than one group",
    ),
    (
        "weight_sync.lora=adapter",
        "weight_sync.lora: was 'adapter', but model.lora is none, so there is no adapter; merged would fit",
    ),
    (
        "model.quantize=4bit",
        "model.quantize: was '4bit', but quantized weights cannot be trained, and there are no adapters; set lora too "
        "(lora.rank), or remove quantize",
    ),
    (
        "model={path: m, init: random, quantize: 8bit, lora: {}}",
        "model.quantize: was '8bit', but init is random, and random weights must all be trained",
    ),
    # settings that contradict each other or would have no effect
    (
        "ppo={prompts: {path: p}, steps: 2, loss: reinforce, epochs: 2, mini_batches: 4, actor_optimizer: {lr: 1}, "
        "critic_optimizer: {lr: 1}}",
        "ppo.loss: was reinforce, which is correct for one update per step only, but epochs (2) x mini_batches (4) make 8; "
        "epochs 1 and mini_batches 1 would fit, or ppo_clip",
    ),
    ("ppo.advantage=gea", 'ppo.advantage.kind: was "gea"; must be gae | reinforce'),
    ("ppo.loss={clip_low: 1}", "ppo.loss.kind: missing; must be ppo_clip | reinforce"),
    (
        "ppo.critic_warmup=3",
        "ppo.critic_warmup: was 3, and steps is 3: the actor would never learn; 2 or less would fit",
    ),
    (
        "ppo.rewards=[{kind: model, weight: 0}, {kind: function, name: f, function: 'a:b', weight: 0.0}]",
        "ppo.rewards: every weight is 0, so there is no reward; at least one weight must differ from 0",
    ),
    ("rollout.temperature=0.009", "rollout.temperature: was 0.009; must be number >= 0.01"),
    ("rollout.gpu_memory_share=0", "rollout.gpu_memory_share: was 0; must be number > 0 and <= 1"),
    ("ppo.critic_optimizer={lr: 1, warmup: 100}", "ppo.critic_optimizer.warmup: was 100; must be number >= 0 and <= 1"),
    ("model.lora={dropout: 1}", "model.lora.dropout: was 1; must be number >= 0 and < 1"),
    (
        "ppo.critic_optimizer=none",
        "ppo.critic_optimizer: missing; must be settings (lr, betas, weight_decay, warmup, schedule, max_grad_norm, "
        "skip_grad_norm): critic is true",
    ),
    (
        "ppo={prompts: {path: p}, steps: 2, critic: false, advantage: gae, actor_optimizer: {lr: 1}}",
        "ppo.advantage: was 'gae', which needs a critic, and critic is false; reinforce would fit",
    ),
    (
        "ppo={prompts: {path: p}, steps: 2, critic: false, prompts_per_step: 1, whiten_rewards: true, actor_optimizer: {lr: 1}}",
        "ppo.whiten_rewards: was true, but a step has 1 sequence, whose whitened score is always 0; more prompts_per_step "
        "would fit, or false",
    ),
    (
        "ppo={prompts: {path: p}, steps: 2, critic: false, max_kl_per_step: 0.1, kl: {controller: {kind: adaptive}}, "
        "actor_optimizer: {lr: 1}}",
        "ppo.max_kl_per_step: was 0.1, and kl.controller.target is 0.1: a step at its target would not change the actor; a "
        "larger one would fit",
    ),
    ("ppo.rewards.0.name=std", "ppo.rewards: the name std is the name of a metric; choose another"),
    ("ppo.rewards.0.name=short_std", "ppo.rewards: the name short_std is the name of a metric; choose another"),
    (
        "ppo.evaluation={prompts: {path: p}, judges: [{name: kl, function: 'a:b'}]}",
        "ppo.evaluation.judges: the name kl is the name of a metric; choose another",
    ),
    (
        "ppo.evaluation={prompts: {path: p}, judges: [{name: short, function: 'a:b'}]}",
        "ppo.rewards: the name short is used more than once; each reward and judge needs its own",
    ),
    (
        "ppo.ptx={coefficient: 1}",
        "ppo.ptx.data: missing; without a section sft there are no demonstrations to use",
    ),
    (
        "sft={train: {path: x}, validate_every: 5, optimizer: {lr: 1}}",
        "sft.validate_every: was 5, but there are no held-out rows (validation)",
    ),
    ("loggers=[{kind: wandb}]", 'loggers.0.kind: was "wandb"; must be tensorboard | ray'),
    ("loggers=[{kind: ray}, {kind: ray}]", "loggers: ray is listed more than once with the same settings"),
    ("cluster.dashboard_port=70000", "cluster.dashboard_port: was 70000; must be integer >= 1 and <= 65535 or none"),
    (
        "runs=~nobody-of-this-name/runs",
        "runs: was '~nobody-of-this-name/runs', but this machine has no user ~nobody-of-this-name",
    ),
    # overrides and interpolations
    ("ppo.steps", "override ppo.steps: must have the form a.b=value"),
    ("=3", "override : must have the form a.b=value"),
    ("ppo..steps=secret", "override ppo..steps: must have the form a.b=value"),
    ("--ppo.steps=3", "override --ppo.steps: must have the form a.b=value"),
    (
        "ppo.rewards.2.weight=1",
        "ppo.rewards.2.weight: ppo.rewards is a list of 2 and has no index 2; indices start at 0",
    ),
    ("ppo.rewards.last=1", "ppo.rewards.last: ppo.rewards is a list of 2 and has no index last; indices start at 0"),
    ("name.first=x", "name.first: name is a single value, so it has no settings below it"),
    ("ppo.steps=${ppo.stepz}", "ppo.steps: was ${ppo.stepz}: Interpolation key 'ppo.stepz' not found"),
    (
        "runs=${oc.env:HOME}/runs",
        "runs: was ${oc.env:HOME}/runs: settings are saved and shown, so they may not come from the environment; "
        "pass a value that is not secret on the command line: setting=$NAME",
    ),
    ("ppo.kl=${ppo}", "ppo.kl: was ${ppo}: Interpolation to parent node detected"),
]


@pytest.mark.parametrize(("override", "error"), BAD, ids=[override for override, _ in BAD])
def test_bad_setting(tmp_path: Path, override: str, error: str) -> None:
    """One wrong setting gives exactly one error, its own."""
    assert problems(write(tmp_path, GOOD), override) == [error]


@pytest.mark.parametrize(
    "overrides",
    [
        ["ppo.critic=false"],
        ["ppo.critic=false", "ppo.critic_warmup=2", "ppo.value_loss=mse", "ppo.value_clip_range=1"],
        ["ppo.critic=false", "ppo.critic_optimizer=none"],
        ["ppo.loss=reinforce"],
        ["ppo.rewards.0.weight=0"],
        ["ppo.steps=1", "ppo.evaluation={prompts: {path: p}, every: 5}", "checkpoint.every=9"],
        ["sft={train: {path: x}, validate_every: 5, validation: none, optimizer: {lr: 1}}"],
    ],
    ids=" ".join,
)
def test_what_is_turned_off_in_one_setting_is_turned_off(tmp_path: Path, overrides: list[str]) -> None:
    """Settings that then have no effect may stay in the file."""
    config = load_config(write(tmp_path, GOOD), overrides)
    assert config.ppo is not None
    assert config.ppo.advantage.kind == ("gae" if config.ppo.critic else "reinforce")
    assert config.ppo.warmup_steps == 0
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml") == config


def test_the_names_of_metrics_are_taken() -> None:
    import numpy as np

    from orchestrator.evaluation.evaluate import Evaluation

    one = np.ones(1)
    metrics = Evaluation(["p"], ["a"], one, {}, [], one, one).metrics()
    assert {name.removeprefix("evaluation/") for name in metrics} == set(EVALUATION_METRICS)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        ("lora: {dora: true}", "vLLM serves no DoRA adapters (model.lora.dora)"),
        ("lora: {rank: 513}", "vLLM serves adapters up to rank 512, and model.lora.rank is 513"),
        (
            "lora: {}, quantize: 8bit",
            "the engines' weights differ from the trainer's, which model.quantize=8bit quantizes",
        ),
    ],
)
def test_an_adapter_that_no_engine_can_serve_is_refused(tmp_path: Path, model: str, reason: str) -> None:
    errors = problems(write(tmp_path, GOOD), f"model={{path: m, {model}}}", "weight_sync.lora=adapter")
    assert errors == [f"weight_sync.lora: was 'adapter', but {reason}; merged would fit"]
    load_config(write(tmp_path, GOOD), [f"model={{path: m, {model}}}"])


def test_circle_of_interpolations(tmp_path: Path) -> None:
    assert "settings: too many values, nested too deeply, or circular interpolations" in problems(
        write(tmp_path, GOOD), "ppo.kl.controller={kind: '${rollout}'}", "rollout.seed={a: '${ppo.kl.controller}'}"
    )


def test_value_that_is_not_yaml(tmp_path: Path) -> None:
    (problem,) = problems(write(tmp_path, GOOD), "ppo.steps=[1,")
    assert problem.startswith("ppo.steps: the override's value is not YAML: ")


def test_all_problems_at_once(tmp_path: Path) -> None:
    text = GOOD.replace("steps: 3", "steps: 0\n  value_clip_rnge: 1").replace("name: run\n", "")
    assert problems(write(tmp_path, text), "nonsense", "device=tpu") == [
        "override nonsense: must have the form a.b=value",
        f"name: missing; must be {NAME}",
        'device: was "tpu"; must be auto | cpu | cuda',
        "ppo.steps: was 0; must be integer > 0",
        "ppo.value_clip_rnge: no such setting; did you mean value_clip_range?",
    ]


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("", "is empty; at least name and model are needed"),
        ("# nothing\n", "is empty; at least name and model are needed"),
        ("- a\n", 'was ["a"]; must be a mapping of settings'),
        ("5\n", "was 5; must be a mapping of settings"),
        ("name: a\nmodel: [\n", ":3: not YAML: "),
        ("name: a\n\tmodel: b\n", ":2: not YAML: found character '\\t' that cannot start any token"),
        ("name: a\nname: b\n", ":2: not YAML: found duplicate key name"),
        ("name: \x00\n", "not YAML text: special characters are not allowed"),
        ("name: ${broken\n", "${broken"),
    ],
)
def test_bad_file(tmp_path: Path, text: str, error: str) -> None:
    path = write(tmp_path, text)
    errors = problems(path)
    assert error in errors[0]
    if "broken" not in text:
        assert errors[0].startswith(str(path))
        assert len(errors) == 1


def test_no_file(tmp_path: Path) -> None:
    assert problems(tmp_path / "none.yaml") == [f"{tmp_path / 'none.yaml'}: no such file"]
    assert problems(tmp_path) == [f"{tmp_path}: a folder, not a file"]
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\xfa")
    assert "not YAML text" in problems(binary)[0]


def test_the_environment_reaches_no_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKEN", "hunter2[")
    monkeypatch.setenv("MAPPING", "{rank: 77}")
    for override in (
        "cluster.address=${oc.env:TOKEN}",
        "seed='${ oc.env : TOKEN }'",
        "cluster.address=https://${oc.env:TOKEN}@host",
        "cluster.address=${oc.env:NOT_THERE,nothing}",
        "cluster={address: '${oc.${device}:TOKEN}'}",
        "ppo.rewards.0={token: '${oc.env:TOKEN}'}",
        "model.lora={targets: ['${oc.env:TOKEN}', 3]}",
        "ppo.steps=${oc.decode:${oc.env:TOKEN}}",
        "cluster.address=${oc.select:'${oc.env:TOKEN}'}",
        "cluster.address=${oc.create:${oc.env:TOKEN}}",
    ):
        errors = "\n".join(problems(write(tmp_path, GOOD), override, "device=env"))
        assert "hunter2" not in errors, override
        assert "may not come from the environment" in errors, override
    text = GOOD.replace("some/model}", "some/model, lora: '${oc.decode:${oc.env:MAPPING}}'}")
    assert "77" not in "\n".join(problems(write(tmp_path, text), "model.lora.alpha=3"))
    assert OmegaConf.create({"a": "${oc.env:TOKEN}"}).a == "hunter2[", "other users of the library are left alone"


def test_error_names_the_interpolation(tmp_path: Path) -> None:
    assert problems(write(tmp_path, GOOD), "ppo.actor_optimizer.lr=0") == [
        "ppo.actor_optimizer.lr: was 0; must be number > 0",
        "ppo.critic_optimizer.lr: was set by ${ppo.actor_optimizer}; must be number > 0",
    ]


# ---------------------------------------------------------------- saving


def test_saved_config_is_the_same(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, GOOD), ["seed=7", "placement.devices={actor: 2}", "strategies={actor: zero3}"])
    path = tmp_path / "deep" / "saved.yaml"
    save_config(config, path)
    assert load_config(path) == config
    assert names(path.parent) == ["saved.yaml"]
    assert "${" not in path.read_text()


texts = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=20) | st.sampled_from(
    [
        "1e5",
        "null",
        "true",
        "3",
        "${a}",
        r"\${a}",
        r"\\${a}",
        "a: b",
        "- x",
        "x\\",
        "2024-01-01",
        "~",
        "$",
        "${",
        "???x",
    ]
)


@settings(deadline=None)
@given(
    path=texts.filter(lambda text: text[0] != "~"),
    column=texts,
    lr=st.floats(min_value=0, exclude_min=True, allow_infinity=False),
)
def test_any_text_and_number_survives(
    tmp_path_factory: pytest.TempPathFactory, path: str, column: str, lr: float
) -> None:
    settings: dict[str, Any] = {
        "name": "x",
        "model": {"path": path},
        "sft": {"train": {"path": path, "columns": {"prompt": column}}, "optimizer": {"lr": lr}},
    }
    config = RunConfig.model_validate(settings)
    file = tmp_path_factory.mktemp("config") / "run.yaml"
    save_config(config, file)
    assert load_config(file) == config


def test_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "saved.yaml"
    config = load_config(write(tmp_path, GOOD))
    save_config(config, path)
    before = path.read_text()

    def full(descriptor: int) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        save_config(config.model_copy(update={"seed": 9}), path)
    assert path.read_text() == before
    assert names(tmp_path) == ["run.yaml", "saved.yaml"]


# ---------------------------------------------------------------- the policy loss


@pytest.mark.parametrize(
    ("overrides", "loss"),
    [
        ([], PPOClipLoss()),
        (["ppo.loss=ppo_clip"], PPOClipLoss()),
        (["ppo.loss={kind: ppo_clip, clip_high: 0.28}"], PPOClipLoss(clip_high=0.28)),
        (["ppo.policy_loss=ppo_clip"], PPOClipLoss()),
        (["ppo.clip_range=0.1"], PPOClipLoss(clip_low=0.1, clip_high=0.1)),
        (["ppo.policy_loss=reinforce", "ppo.clip_range=0.1"], ReinforceLoss()),
        (["ppo.loss={kind: ppo_clip, clip_high: 0.28}", "ppo.policy_loss=reinforce"], ReinforceLoss()),
        (["ppo.loss={kind: ppo_clip, aggregation: constant}", "ppo.clip_range=1"],
         PPOClipLoss(aggregation="constant", clip_low=1.0, clip_high=1.0)),
    ],
    ids=str,
)  # fmt: skip
def test_a_loss_by_its_kind_and_by_its_old_names(
    tmp_path: Path, overrides: list[str], loss: Any, caplog: pytest.LogCaptureFixture
) -> None:
    from configs import load

    load._warn_of.cache_clear()
    for _ in range(2):
        config = load_config(write(tmp_path, GOOD), overrides)
    assert config.ppo is not None and config.ppo.loss == loss
    old = [name for name in ("policy_loss", "clip_range") if any(f"ppo.{name}=" in each for each in overrides)]
    assert len(caplog.messages) == bool(old), "once"
    assert all(f"ppo.{name}" in caplog.text for name in old)


@pytest.mark.parametrize("name", ["policy_loss=clip", "clip_range=-1"])
def test_a_wrong_value_under_an_old_name_is_refused_under_the_new_one(tmp_path: Path, name: str) -> None:
    said = {
        "policy_loss=clip": ['ppo.loss.kind: was "clip"; must be ppo_clip | reinforce'],
        "clip_range=-1": [f"ppo.loss.clip_{end}: was -1; must be number > 0" for end in ("low", "high")],
    }
    assert problems(write(tmp_path, GOOD), f"ppo.{name}") == said[name]


# ---------------------------------------------------------------- reference


def test_reference_lists_every_setting() -> None:
    settings = describe()
    by_path = {setting.path: setting for setting in settings}
    assert all(setting.meaning and setting.type and setting.default for setting in settings)
    assert by_path["ppo.value_clip_range"].type == "number > 0"
    assert by_path["ppo.value_clip_range"].default == "0.2"
    assert by_path["ppo.value_clip_range"].meaning == "Half-width of the clip on the change of a value."
    assert by_path["ppo.rewards[].weight"].when == ""
    assert by_path["ppo.rewards[].kind"].type == "model | function | http"
    assert by_path["ppo.rewards[].function"].when == "kind: function"
    names = [setting for setting in settings if setting.path == "ppo.rewards[].name"]
    assert [(setting.when, setting.default) for setting in names] == [
        ("kind: model", "model"),
        ("kind: function, http", "required"),
    ]
    assert by_path["placement.groups[].devices"].default == "1"
    assert by_path["sft.train.path"].default == "required"
    assert len(settings) == len(set(settings))


def test_settings_page_is_up_to_date() -> None:
    page = (ROOT / "docs" / "settings.md").read_text()
    assert page == settings_markdown(), "run: python -m configs.reference > docs/settings.md"


def test_configs_imports_nothing_heavy() -> None:
    code = "import sys, configs, configs.reference; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert not {"torch", "vllm", "transformers", "ray", "deepspeed", "numpy"} & set(loaded.split())
