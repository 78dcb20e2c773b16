"""The command line: help, and what is refused in one clear message before anything starts."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from orchestrator.cli import app
from tests.support.micro import write_micro
from tests.support.models import make_model

COMMANDS = (
    "sft",
    "rm",
    "ppo",
    "pipeline",
    "resume",
    "status",
    "list",
    "check",
    "plan",
    "config",
    "report",
    "generate",
    "chat",
    "bench",
)
ROOT = Path(__file__).parents[3]


def troupe(*args: object) -> Result:
    return CliRunner().invoke(app, [str(arg) for arg in args])


@pytest.fixture
def micro(tmp_path: Path) -> Path:
    """It fits on one core: what is refused is not for want of cores."""
    return write_micro(tmp_path, placement={"cpus_per_device": 0.2})


def refused(*args: object) -> str:
    """The message of a command that must be refused: exit code 2, nothing on standard output, no traceback."""
    result = troupe(*args)
    assert result.exit_code == 2, result.output
    assert isinstance(result.exception, SystemExit)
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    return result.stderr


# ---------------------------------------------------------------- help


def test_help_names_every_command() -> None:
    output = troupe("--help").output
    assert all(f"\n  {command} " in output for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_has_help(command: str) -> None:
    result = troupe(command, "--help")
    assert result.exit_code == 0
    assert len(result.output.splitlines()) > 4


def test_nothing_heavy_is_imported_for_help() -> None:
    heavy = "[m for m in ('ray', 'torch', 'vllm', 'transformers', 'tensorboard', 'pydantic') if m in sys.modules]"
    code = f"import sys, orchestrator, orchestrator.cli; print({heavy})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_api_is_there_by_name_and_needs_no_torch() -> None:
    import orchestrator

    code = "import sys; from orchestrator import *; print('torch' in sys.modules, 'vllm' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False False"
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        orchestrator.nothing  # noqa: B018


# ---------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["ppo.step=3"], "troupe: ppo.step: no such setting; did you mean steps?\n"),
        (["ppo.steps=many"], 'troupe: ppo.steps: was "many"; must be integer > 0\n'),
        (["steps"], "troupe: override steps: must have the form a.b=value\n"),
        (["sft.train.path=no.jsonl"], "troupe: sft.train: no.jsonl: no such file or folder\n"),
        (["ppo.advantage=gea"], 'troupe: ppo.advantage.kind: was "gea"; must be gae | reinforce'),
        (["ppo.value_loss=clip"], "troupe: ppo.value_loss: 'clip' is not registered; it may be "),
        (
            ["model.path=./nowhere"],
            f"troupe: model.path: was './nowhere', which is not a model's folder; {ROOT}/nowhere/config.json does not exist\n",
        ),
        (
            ["model.lora={}", "model.quantize=4bit"],
            "troupe: model.quantize: was '4bit', which needs the package bitsandbytes; install it (`pip install",
        ),
        (["plugins=[no.such.module]"], "troupe: plugins.0: cannot import 'no.such.module': No module named 'no'\n"),
        (
            ["ppo.rewards=[{kind: function, name: f, function: 'tests.support.micro:long'}]"],
            "troupe: ppo.rewards.0.function: cannot import 'tests.support.micro:long': "
            "module 'tests.support.micro' has no attribute 'long'\n",
        ),
        (
            ["ppo.rewards=[{kind: http, name: h, url: 'http://localhost', token_env: NOT_SET_ANYWHERE}]"],
            "troupe: ppo.rewards.0.token_env: the environment variable NOT_SET_ANYWHERE is not set\n",
        ),
        (
            ["ppo.rewards=[{kind: model, path: ./nowhere}]"],
            "troupe: ppo.rewards.0.path: was './nowhere', which is not a model's folder",
        ),
        (
            ["ppo.evaluation.judges=[{name: j, function: 'none:none'}]"],
            "troupe: ppo.evaluation.judges.0.function: cannot import 'none:none': No module named 'none'\n",
        ),
    ],
)  # fmt: skip
def test_wrong_settings_are_refused(micro: Path, overrides: list[str], message: str) -> None:
    said = refused("pipeline", micro, *overrides)
    assert said.startswith(message)
    assert len(said.splitlines()) == (2 if "quantize" in message else 1), "4bit cannot be computed on a CPU either"
    assert not (micro.parent / "runs").exists()


@pytest.mark.parametrize(
    ("runs", "reason"),
    [
        ("{0}/file", "{0}/file: Not a directory"),
        ("{0}/file/below", "{0}/file: Not a directory"),
        ("/proc/runs", "/proc: "),
    ],
)
def test_a_place_where_no_folder_can_be_is_refused(micro: Path, tmp_path: Path, runs: str, reason: str) -> None:
    (tmp_path / "file").touch()
    runs = runs.format(tmp_path)
    said = refused("sft", micro, f"runs={runs}")
    assert said.startswith(f"troupe: runs: cannot make or write to the folder {runs}/micro: {reason.format(tmp_path)}")
    assert len(said.splitlines()) == 1


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written_to_is_refused(micro: Path, tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir(mode=0o500)
    said = refused("sft", micro, f"runs={tmp_path}/runs")
    assert (
        said
        == f"troupe: runs: cannot make or write to the folder {tmp_path}/runs/micro: {tmp_path}/runs: Permission denied\n"
    )


@pytest.mark.parametrize(
    "file", ["workers.py", "workers/mine.py", "orchestrator/__init__.py", "examples/mine.py", "random.py"]
)
def test_a_module_that_is_hidden_by_another_of_its_name_is_named(
    micro: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text("def f(prompts, answers, **columns): return [1.0] * len(answers)")
    monkeypatch.chdir(tmp_path)
    module = file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    top = f"{file.partition('/')[0]}{'/' if '/' in file else ''}"
    hidden = f"but {top} in {tmp_path} is hidden by "
    for setting, value in (
        ("ppo.rewards.0.function", f"ppo.rewards=[{{kind: function, name: f, function: '{module}:f'}}]"),
        ("ppo.evaluation.judges.0.function", f"ppo.evaluation.judges=[{{name: j, function: '{module}:f'}}]"),
        ("plugins.0", f"plugins=[{module}]"),
    ):
        said = refused("pipeline", micro, value)
        assert said.startswith(f"troupe: {setting}: was '{module}")
        assert hidden in said and said.endswith("which has the same name; rename yours\n")


def test_a_run_goes_on_where_it_began(micro: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative paths in its settings are meant from there."""
    from configs import load_config
    from orchestrator.run.run_dir import Run

    began = micro.parent
    micro.write_text(micro.read_text().replace(f"{began}/", ""))
    monkeypatch.chdir(began)
    run = Run.begin(load_config(micro, ["cluster.address=127.0.0.1:1"]), ["sft"])
    run.save()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    result = troupe("resume", f"../{run.folder.relative_to(tmp_path)}")
    first, *_, last = result.stdout.splitlines()
    assert first == f"working folder: {began}, where this run began"
    assert last.startswith("checked in ") and last.endswith(" s; connecting to Ray")
    assert "where no Ray cluster responds" in result.stderr
    assert Run.open(run.folder).working_folder == str(began)


def test_an_adapter_of_a_model_that_vllm_applies_none_to_is_refused(micro: Path, tmp_path: Path) -> None:
    path = make_model(tmp_path / "gpt2", "gpt2")
    said = refused("pipeline", micro, f"model.path={path}", "model.lora={}", "weight_sync.lora=adapter")
    assert said == "troupe: weight_sync.lora: was 'adapter', but vLLM serves no adapters of gpt2 models; use merged\n"


def test_all_wrong_settings_at_once(micro: Path) -> None:
    assert len(refused("ppo", micro, "ppo.step=3", "seed=-1").splitlines()) == 2


def test_malformed_rows_are_refused_with_their_place(micro: Path) -> None:
    data = micro.parent / "sft.jsonl"
    good = data.read_text().splitlines()
    data.write_text("\n".join([*good[:2], "{oops", '{"prompt": "no answer"}', *good[2:]]))
    first, second, total, *_ = refused("pipeline", micro).splitlines()  # the validation rows are of this file too
    assert first.startswith(f"troupe: sft.train: {data}:3: not JSON")
    assert second.startswith(f"{data}:4: ")
    assert total == f"{data}: 2 of 62 rows cannot be read as a demonstration"


def test_margins_that_no_row_has(micro: Path) -> None:
    data = micro.parent / "pairs.jsonl"
    message = refused("rm", micro, "rm.margin=0.5")
    assert message == (
        f"troupe: rm.train: no row of {data} has a margin (column `margin`, or the one that rm.train.columns names for it), but "
        "rm.margin was 0.5; 0 would fit\n"
    )


def test_adapters_on_weights_that_are_drawn(micro: Path) -> None:
    message = refused("sft", micro, "model.init=random", "model.lora.rank=4")
    assert message.startswith(
        "troupe: model.lora: adapters need trained base weights, but with model.init=random the base is random"
    )


def test_no_config(tmp_path: Path) -> None:
    assert refused("sft", tmp_path / "none.yaml") == f"troupe: {tmp_path}/none.yaml: no such file\n"


def test_ppo_without_a_reward_model(micro: Path) -> None:
    assert refused("ppo", micro).startswith("troupe: ppo.rewards.0.path: not set, and this run has no rm stage")


def test_a_stage_that_the_config_lacks(micro: Path) -> None:
    assert refused("rm", micro, "rm=null").startswith("troupe: rm: the config has no section of this name")


def test_too_few_devices(micro: Path) -> None:
    message = refused("plan", micro, "device=cuda", "--cluster", "1x4xA100-80GB")
    assert message.startswith("troupe: stage ppo cannot be placed:\n  placement.")
    assert "5" in message
    assert "colocated" in message or "paired" in message


def test_a_cluster_that_cannot_be_read(micro: Path) -> None:
    assert "Invalid value for --cluster: cluster 'huge'" in refused("plan", micro, "--cluster", "huge")


@pytest.mark.parametrize("command", ["resume", "report", "chat", "generate"])
def test_a_run_that_is_not_there(command: str, tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n')
    options = ["--prompts", tmp_path / "p.jsonl"] if command == "generate" else []
    assert refused(command, tmp_path, *options) == f"troupe: {tmp_path}: not a run's folder (no config.yaml)\n"


def test_generate_says_what_is_wrong_before_it_loads_a_model(micro: Path, tmp_path: Path) -> None:
    from configs import load_config
    from orchestrator.run.run_dir import Run

    run = Run.begin(load_config(micro), ["sft"])
    run.save()
    prompts = micro.parent / "prompts.jsonl"
    assert "no such file" in refused("generate", run.folder, "--prompts", tmp_path / "none.jsonl")
    assert "does not exist" in refused(
        "generate", run.folder, "--prompts", prompts, "--output", tmp_path / "none" / "a.jsonl"
    )
    message = refused("generate", run.folder, "--prompts", prompts, "--output", tmp_path / "a.jsonl")
    assert message == f"troupe: {run.folder}: no finished sft or ppo stage; finished: none\n"


def test_a_job_in_a_copy_of_the_folder_needs_an_absolute_runs(micro: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", '{"runtime_env": {"working_dir": "gcs://package.zip"}}')
    message = refused("sft", micro, "runs=runs")
    assert message.startswith("troupe: runs: was 'runs', in the job's copy of the working folder")


def test_a_run_that_another_process_works_on_keeps_its_record(micro: Path) -> None:
    """Before the first step, too, when nothing tells yet that a stage has begun."""
    from configs import load_config
    from orchestrator.run.run_dir import Run

    run = Run.begin(load_config(micro), ["sft"])
    with run.locked():
        run.save()
        noted = (run.folder / "config.yaml").read_text()
        result = troupe("sft", micro, "sft.epochs=9")
    assert result.stderr == f"troupe: {run.folder}: another process is running this run\n"
    assert (run.folder / "config.yaml").read_text() == noted


@pytest.mark.parametrize(
    ("address", "what"),
    [
        ("ray://head:10001", "an address of Ray Client, which Troupe does not support"),
        ("http://head:8265", "the address of a job server, which only `ray job submit` accepts"),
        ("head", "not an address of a cluster"),
    ],
)
def test_an_address_that_is_no_cluster_is_refused(
    micro: Path, monkeypatch: pytest.MonkeyPatch, address: str, what: str
) -> None:
    said = refused("sft", micro, f"cluster.address={address}")
    assert said.startswith(f"troupe: cluster.address: was '{address}', {what}") and len(said.splitlines()) == 1
    monkeypatch.setenv("RAY_ADDRESS", address)
    assert refused("sft", micro).startswith(f"troupe: RAY_ADDRESS: was '{address}', {what}")


def test_a_cluster_that_is_not_there(micro: Path) -> None:
    result = troupe("sft", micro, "cluster.address=127.0.0.1:1")
    assert result.exit_code == 2
    assert result.stderr.startswith("troupe: cluster.address: was '127.0.0.1:1', where no Ray cluster responds: ")


@pytest.mark.parametrize("command", ["resume", "report", "status", "chat", "generate", "sft", "pipeline", "plan"])
def test_the_home_folder_stands_for_a_tilde(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In what a shell leaves as it is: quoted, and behind `--option=`."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n')
    options = ["--prompts=~/p.jsonl", "--output=~/a.jsonl"] if command == "generate" else []
    reason = "no such file" if command in ("sft", "pipeline", "plan") else "not a run's folder (no config.yaml)"
    assert refused(command, "~/none", *options) == f"troupe: {tmp_path}/none: {reason}\n"


def test_files_that_commands_write_and_models_may_lie_below_the_tilde(
    micro: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert troupe("plan", "--model=~/model", "--cluster", "1x8cpu", "--picture=~/a.svg").exit_code == 0
    assert (tmp_path / "a.svg").exists()
    assert troupe("plan", micro, "--cluster", "1x8cpu", "runs=~/runs", "model.path=~/model").exit_code == 0
    assert "model.path: was '" + str(tmp_path / "nothing") in refused("sft", micro, "model.path=~/nothing")


# ---------------------------------------------------------------- cheap commands


def test_plan_prints_every_stage(micro: Path) -> None:
    result = troupe("plan", micro, "--cluster", "4x8xA100-80GB", "placement.devices.actor=4", "ppo.prompts_per_step=16")
    assert result.exit_code == 0
    assert [f"stage {stage} on cuda" in result.stdout for stage in ("sft", "rm", "ppo")] == [True] * 3


def test_plan_as_json(micro: Path) -> None:
    import json

    plans = json.loads(troupe("plan", micro, "--cluster", "1x8cpu", "--json").stdout)
    assert list(plans) == ["sft", "rm", "ppo"]
    assert plans["ppo"]["batch"]["prompts"] == 4


def test_plan_of_a_model_alone() -> None:
    asked = ("plan", "--model", "8b", "--strategy", "zero3_offload", "--cluster", "1x1xA100-80GB,host=1TB")
    assert "GiB are left" in troupe(*asked).stdout
    assert "does not fit" in troupe(*asked, "--cluster", "1x1xA100-80GB,host=64GB").stdout
    chosen = troupe(
        "plan", "--model", "40b", "model.lora.rank=8", "--strategy", "auto", "--cluster", "4x8xA100-80GB,host=2TB"
    )
    assert re.search(r"strategy: auto is zero\d\w* for the actor", chosen.stdout)


@pytest.mark.parametrize(
    ("file", "start"), [("a.svg", b"<?xml"), ("a.png", b"\x89PNG"), ("a.html", b"<!doctype html>")]
)
def test_plan_draws_a_picture(file: str, start: bytes, tmp_path: Path) -> None:
    result = troupe("plan", "--model", "s", "--cluster", "1x8cpu,host=64GB", "--picture", str(tmp_path / file))
    assert result.exit_code == 0
    drawn = (tmp_path / file).read_bytes()
    assert drawn.startswith(start)
    if file != "a.png":
        text = re.sub(r"\s+", " ", drawn.decode())
        assert all(word in text for word in ("optimizer", "fragmentation", "train", "ppo: node-0"))


def test_plan_says_what_it_needs(tmp_path: Path) -> None:
    assert "needs a file with settings, or --model" in refused("plan")
    assert "--model: 9b is neither a local folder" in refused("plan", "--model", "9b")
    message = refused("plan", "--model", "s", "--cluster", "1x8cpu", "--picture", "a.pdf", "--json")
    assert "must end in .svg, .png, .html" in message


def test_config_lists_settings() -> None:
    output = troupe("config", "ppo.kl").stdout
    assert "ppo.kl.estimator  k1 | k2 | k3  [k1]" in output
    assert "sft.epochs" not in output
    assert "no setting's path contains 'kll'" in refused("config", "kll")
