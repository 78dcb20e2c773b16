"""The preflight: what cannot work is said before anything starts, all at once; and what became of the rows."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from transformers import AutoTokenizer, GenerationConfig
from typer.testing import CliRunner

from benchmarks.families.zoo import make
from configs import load_config
from orchestrator import run_stages
from orchestrator.api import checked
from orchestrator.cli import app
from orchestrator.preflight.preflight import PreflightError, Report
from orchestrator.run.run_dir import Run, described
from placement.cluster import Cluster
from placement.types import Stage
from tests.support.micro import write_micro
from tests.support.models import CHAT_TEMPLATE, VOCABULARY, make_model, make_reward_model

FUNCTION = "{kind: function, name: points, function: 'tests.support.micro:short'}"
ON_ONE_CORE = {"cpus_per_device": 0.2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in which nothing is wrong, on any machine; its data and its model. Nothing in it changes."""
    return write_micro(tmp_path_factory.mktemp("preflight"), placement=ON_ONE_CORE, device="cpu").parent


def report_of(folder: Path, *overrides: str, stages: Sequence[Stage] | None = None) -> Report:
    config = load_config(folder / "config.yaml", list(overrides))
    return checked(Run.begin(config, stages or described(config)))[1]


def told(folder: Path, *overrides: str, stages: Sequence[Stage] | None = None) -> list[str]:
    """What is refused, a line each."""
    return [str(problem) for problem in report_of(folder, *overrides, stages=stages).problems]


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


# ---------------------------------------------------------------- all at once


def test_all_that_is_wrong_in_all_stages_comes_in_one_error(folder: Path) -> None:
    wrong = {
        "sft.max_length": "sft.max_length=300",
        "rm.train": f"rm.train.path={folder}/none.jsonl",
        "ppo.prompts": "ppo.max_prompt_tokens=4",
        "ppo.evaluation.judges.0.function": "ppo.evaluation.judges=[{name: j, function: 'tests.support.micro:long'}]",
        "rollout.kv_cache_gib": "rollout.kv_cache_gib=0.0001",
        "placement.cpus_per_device": "placement.cpus_per_device=1000",
    }
    config = load_config(folder / "config.yaml", list(wrong.values()))
    with pytest.raises(PreflightError) as refused:
        run_stages(config)
    named = [problem.setting or problem.text.partition(":")[0] for problem in refused.value.problems]
    assert wrong.keys() <= set(named)
    assert len(str(refused.value).splitlines()) == len(named), "a line each"
    assert not (folder / "runs").exists()


def test_check_prints_what_became_of_the_rows_and_starts_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "init", lambda **_: pytest.fail("Ray is started"))
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    done = CliRunner().invoke(app, ["check", str(folder / "config.yaml")])
    assert done.exit_code == 0, done.output
    *lines, last = done.stdout.splitlines()
    assert lines == [
        "sft.train               60 rows, 1,160 tokens, longest 21",
        "sft.validation          10 rows, 194 tokens, longest 20",
        "rm.train                40 of 60 pairs, 20 left out with two equal answers, 1,560 tokens, longest 21",
        "rm.validation           7 of 10 pairs, 3 left out with two equal answers, 275 tokens, longest 21",
        "rm.normalize_on         60 rows, 1,160 tokens, longest 21",
        "ppo.prompts             60 prompts, 600 tokens, longest 11",
        "ppo.evaluation.prompts  6 prompts, 60 tokens, longest 10",
    ]
    assert last.startswith("no problems; checked in ")
    assert not (folder / "runs").exists()
    assert {child.pid for child in psutil.Process().children(recursive=True)} == before


def test_check_prints_all_that_is_wrong(folder: Path) -> None:
    done = CliRunner().invoke(app, ["check", str(folder / "config.yaml"), "sft.max_length=300", "rm.max_length=400"])
    assert done.exit_code == 2
    assert [line.partition(" ")[0] for line in done.stderr.splitlines()] == ["troupe:", "rm.max_length:"]
    assert done.stdout.startswith("sft.train "), "the datasets come all the same"


# ---------------------------------------------------------------- lengths and tokens


@pytest.mark.parametrize(
    ("override", "setting", "tokens"),
    [
        ("sft.max_length=257", "sft.max_length", 257),
        ("rm.max_length=257", "rm.max_length", 257),
        ("ppo.max_prompt_tokens=249", "ppo.max_prompt_tokens + rollout.max_new_tokens", 257),
        ("rollout.max_new_tokens=241", "ppo.max_prompt_tokens + rollout.max_new_tokens", 257),
        ("ppo.max_prompt_tokens=248", "", 256),
    ],
)
def test_lengths_beyond_the_models_positions(folder: Path, override: str, setting: str, tokens: int) -> None:
    said = f"{setting}: {tokens} tokens, but {folder}/model (llama) takes 256 at most"
    assert told(folder, override) == ([said] if setting else [])


def test_a_tokenizer_larger_than_the_embeddings(folder: Path, tmp_path: Path) -> None:
    path = make_model(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.add_tokens(["<one>", "<more>"])
    tokenizer.save_pretrained(path)
    said = f"model.path: {path}: its tokenizer has {VOCABULARY + 2} tokens, but its embeddings have {VOCABULARY} rows"
    assert told(folder, f"model.path={path}", stages=["sft"]) == [said]


def test_a_prompt_without_tokens(folder: Path, tmp_path: Path) -> None:
    """With a template that leaves out what the system says, and begins no answer."""
    model = make_model(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role != 'system' %}{{ m.content + '<eos>' }}{% endif %}{% endfor %}"
    )
    tokenizer.save_pretrained(model)
    rows = [{"messages": [{"role": role, "content": "hm"}]} for role in ("user", "system")]
    asked = f"ppo.prompts.path={write_rows(tmp_path / 'p.jsonl', rows)}", f"ppo.rewards=[{FUNCTION}]"
    (said,) = told(folder, f"model.path={model}", *asked, "ppo.evaluation=null", stages=["ppo"])
    assert said.startswith(f"ppo.prompts: {tmp_path}/p.jsonl:2: prompt: has no tokens")


@pytest.mark.parametrize(
    ("stage", "overlong", "said"),
    [
        ("sft", "refuse", "1 of 4 rows are longer than 48 tokens (max_length), the longest has 62 ({0}:3)"),
        ("sft", "cut", "4 rows, 1 cut to length, 69 tokens, longest 62"),
        ("sft", "drop", "3 of 4 rows, 1 left out as too long, 21 tokens, longest 62"),
        ("rm", "refuse", "1 of 4 rows are longer than 48 tokens (max_length), the longest has 62 ({0}:3)"),
        ("rm", "cut", "3 of 4 pairs, 1 cut to length, 1 left out with two equal answers, 124 tokens, longest 62"),
        ("rm", "drop", "2 of 4 pairs, 1 left out as too long, 1 left out with two equal answers, 28 tokens, longest 62"),
        ("ppo", "refuse", "1 of 4 rows are longer than 16 tokens (max_prompt_tokens), the longest has 60 ({0}:3)"),
        ("ppo", "cut", "4 prompts, 1 cut to length, 31 tokens, longest 60"),
        ("ppo", "drop", "3 of 4 prompts, 1 left out as too long, 15 tokens, longest 60"),
    ],
)  # fmt: skip
def test_rows_that_are_too_long_are_refused_cut_or_left_out_and_counted(
    folder: Path, tmp_path: Path, stage: Stage, overlong: str, said: str
) -> None:
    """The third row is too long; the sides of the fourth pair are equal."""
    prompts = ["five:", "five:", "x" * 60, "five:"]
    made: dict[str, list[dict[str, str]]] = {
        "sft": [{"prompt": prompt, "completion": "y"} for prompt in prompts],
        "rm": [{"prompt": p, "chosen": "y", "rejected": "y" if k == 3 else "n"} for k, p in enumerate(prompts)],
        "ppo": [{"prompt": prompt} for prompt in prompts],
    }
    path = write_rows(tmp_path / "rows.jsonl", made[stage])
    data = {"sft": "sft.train", "rm": "rm.train", "ppo": "ppo.prompts"}[stage]
    rewards = f"ppo.rewards=[{FUNCTION}]"
    report = report_of(folder, f"{data}.path={path}", f"{stage}.overlong={overlong}", rewards, stages=[stage])
    lines = [str(problem) for problem in report.problems] or [report.counts[data].describe()]
    assert len(lines) == 1 and said.format(path) in lines[0]


# ---------------------------------------------------------------- models


def other_template(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = CHAT_TEMPLATE.replace(": ", "> ")
    tokenizer.save_pretrained(folder)


def other_vocabulary(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        text = (folder / name).read_text()
        (folder / name).write_text(text.replace("<unk>", "<what>"))


def other_end(folder: Path) -> None:
    GenerationConfig(eos_token_id=[1, 2]).save_pretrained(folder)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (other_template, "another form of a conversation: 'user> How was the film?<eos>assistant> Great.<eos>'; the policy has "
            "'user: How was the film?<eos>assistant: Great.<eos>'"),
        (other_vocabulary, f"another vocabulary ({VOCABULARY} tokens; the policy has {VOCABULARY})"),
        (other_end, "other end tokens (<eos>, <unk>; the policy has <eos>)"),
    ],
)  # fmt: skip
def test_a_reward_model_that_reads_otherwise(
    folder: Path, tmp_path: Path, change: Callable[[Path], None], said: str
) -> None:
    reward_model = make_reward_model(folder / "model", tmp_path / "reward")
    asked = (
        "chat_template=true",
        "ppo.max_prompt_tokens=40",
        f"ppo.rewards=[{{kind: model, name: theirs, path: {reward_model}}}]",
    )
    own = asked[-1].replace("}]", ", tokenizer: own}]")
    assert told(folder, *asked, stages=["ppo"]) == []
    change(reward_model)
    (problem,) = told(folder, *asked, stages=["ppo"])
    assert problem.startswith(f"ppo.rewards.0.tokenizer: was policy, but {reward_model} has {said}")
    assert "; use own: " in problem
    assert told(folder, *asked[:-1], own, stages=["ppo"]) == []


@pytest.mark.parametrize("same", [True, False])
def test_a_language_model_as_a_reward_model(folder: Path, tmp_path: Path, same: bool) -> None:
    """Also where it is the policy, whose scalar head may begin as a critic's, but not as a reward model's."""
    path = folder / "model" if same else shutil.copytree(folder / "model", tmp_path / "copy")
    (said,) = told(folder, f"ppo.rewards=[{{kind: model, path: {path}}}]", stages=["ppo"])
    assert said.startswith(f"ppo.rewards.0.path: {path}") and "1 missing (score.weight)" in said


def test_a_family_without_a_scalar_head(folder: Path, tmp_path: Path) -> None:
    """Neither reward models nor critics can be made of it."""
    model, function = f"model.path={make(tmp_path, 'granite')}", f"ppo.rewards=[{FUNCTION}]"
    for stage, *asked in (["rm"], ["ppo", function]):
        (said,) = told(folder, model, *asked, stages=[stage])
        assert said.startswith("model.path: ") and "no granite with a scalar head" in said
    assert told(folder, model, stages=["sft"]) == []
    assert told(folder, model, function, "ppo.critic=false", "ppo.advantage=reinforce", stages=["ppo"]) == []


def test_a_family_that_engines_do_not_serve_here(folder: Path, tmp_path: Path) -> None:
    asked = f"model.path={make(tmp_path, 'mamba')}", f"ppo.rewards=[{FUNCTION}]", "ppo.critic=false"
    (said,) = told(folder, *asked, "ppo.advantage=reinforce", stages=["ppo"])
    assert said.startswith("model.path: mamba is not served: ") and "vLLM's CPU build lacks" in said
    assert told(folder, asked[0], stages=["sft"]) == [], "which needs no engine"


# ---------------------------------------------------------------- rewards


def test_a_reward_whose_argument_the_dataset_lacks(folder: Path) -> None:
    reward = "ppo.rewards=[{kind: function, name: f, function: 'tests.support.reward_functions:by_label'}]"
    both = told(folder, reward, stages=["ppo"])
    assert [line.partition(":")[0] for line in both] == ["ppo.rewards.0.function"] * 2, "both datasets lack it"
    assert all("needs the column label, note, and there are: wanted" in line for line in both)


def test_a_service_that_would_be_sent_a_column_that_is_no_json(folder: Path, tmp_path: Path) -> None:
    pq.write_table(pa.table({"prompt": ["a", "b"], "picture": [b"png", b"\xff"]}), tmp_path / "rows.parquet")
    service = "ppo.rewards=[{kind: http, name: service, url: 'http://127.0.0.1:1/'}]"
    asked = service, f"ppo.prompts.path={tmp_path}/rows.parquet", "ppo.evaluation=null"
    (said,) = told(folder, *asked, stages=["ppo"])
    assert said.startswith("ppo.rewards.0: ") and "the column picture of row 2 of ppo.prompts (" in said
    assert told(folder, service, stages=["ppo"]) == []


# ---------------------------------------------------------------- placement


def test_stages_that_cannot_be_placed_on_this_machine(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not where the run joins a cluster, of which nothing is known before."""
    asked = "placement.cpus_per_device=1000"
    assert [line[:50] for line in told(folder, asked)] == [
        "placement.cpus_per_device: 1000 CPU are requested ",
        "placement.cpus_per_device: 1000 CPU are requested ",
        "placement.cpus_per_device: 5000 CPU are requested ",
    ]
    assert told(folder, asked, "cluster.address=127.0.0.1:1") == []
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    assert told(folder, asked) == []


def test_a_cluster_that_this_process_is_connected_to(folder: Path, ray_here: Cluster) -> None:
    """Which claims to have 8 CPUs."""
    assert told(folder, "placement.cpus_per_device=1.6") == []
    (said,) = told(folder, "placement.cpus_per_device=1.7")
    assert said.startswith("placement.cpus_per_device: 8.5 CPU are requested")


def test_auto_for_a_model_whose_memory_is_not_known(folder: Path, tmp_path: Path) -> None:
    (said,) = told(folder, f"model.path={make(tmp_path, 'olmo')}", "strategy=auto", stages=["sft"])
    assert said.startswith("strategy: auto needs predicted memory, but ")


def test_a_cache_smaller_than_one_sequence(folder: Path) -> None:
    """A sequence has 24 tokens, for which vLLM takes a block of 128 and keeps one empty; a token takes 1 KiB."""
    needed = 256 / 2**20
    (said,) = told(folder, f"rollout.kv_cache_gib={0.99 * needed}")
    sequence = "one sequence of 24 tokens (ppo.max_prompt_tokens + rollout.max_new_tokens)"
    asked = f"rollout.kv_cache_gib: {0.99 * needed:g}"
    assert said == f"{asked}, but {sequence} needs 0.000245 GiB for its keys and values"
    assert told(folder, f"rollout.kv_cache_gib={needed}") == []
    assert told(folder, "rollout.kv_cache_gib=0.0001", stages=["sft", "rm"]) == [], "no engine there"


# ---------------------------------------------------------------- notes


def test_prompts_of_another_form_than_the_demonstrations_are_noted(folder: Path, tmp_path: Path) -> None:
    chat = write_rows(tmp_path / "p.jsonl", [{"messages": [{"role": "user", "content": "the film"}]}])
    asked = f"ppo.prompts.path={chat}", "ppo.evaluation=null", "ppo.max_prompt_tokens=40"
    assert report_of(folder).notes == []
    (note,) = report_of(folder, *asked).notes
    assert (
        note.startswith("ppo.prompts: conversations in the chat template, but the demonstrations ")
        and "plain text" in note
    )
    assert report_of(folder, *asked).problems == []
    assert report_of(folder, *asked, "chat_template=true").notes == []


def test_the_form_of_a_finished_sft_stage_counts(folder: Path, tmp_path: Path) -> None:
    asked = f"runs={tmp_path}", f"ppo.rewards=[{FUNCTION}]"
    run = Run.begin(load_config(folder / "config.yaml", list(asked)), ["sft"])
    run.save({"sft": "chat"})
    shutil.copytree(folder / "model", run.model("sft"))
    (note,) = report_of(folder, *asked, stages=["ppo"]).notes
    assert note.startswith("ppo.prompts: plain text, but the demonstrations ")
