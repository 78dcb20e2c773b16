"""Untrusted code does not run; secrets are not written."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from configs import ConfigError, load_config
from configs.schema import ModelSettings
from tests.support.micro import write_micro
from tests.support.models import make_model

ROOT = Path(__file__).parents[2]

CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
Path({marker!r}).touch()
class Config(LlamaConfig):
    model_type = "brought"
class Model(LlamaForCausalLM):
    config_class = Config
"""


@pytest.mark.parametrize("trust", [False, True])
def test_code_that_comes_with_a_model_runs_only_when_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trust: bool
) -> None:
    from workers.data import load_tokenizer
    from workers.models.loading import load_hf

    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "cache"))
    folder, marker = tmp_path / "model", tmp_path / "it-ran"
    make_model(folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "brought",
        "auto_map": {"AutoConfig": "brought.Config", "AutoModelForCausalLM": "brought.Model"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "brought.py").write_text(CODE.format(marker=str(marker)))

    def load() -> None:
        load_tokenizer(str(folder), trust)
        load_hf(
            ModelSettings(path=str(folder), dtype="float32", trust_remote_code=trust), str(folder), scalar=False, seed=1
        )

    if trust:
        load()
    else:
        with pytest.raises(ValueError, match="trust_remote_code"):
            load()
    assert marker.exists() == trust
    assert ModelSettings(path="x").trust_remote_code is False


class Trap:
    """Creates a file when unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return (os.mkdir, (str(self.marker),))


def test_weights_in_a_pickle_run_no_code(tmp_path: Path) -> None:
    from workers.models.loading import load_hf

    folder, marker = tmp_path / "model", tmp_path / "it-ran"
    make_model(folder)
    (folder / "model.safetensors").unlink()
    torch.save({"model.embed_tokens.weight": Trap(marker)}, folder / "pytorch_model.bin")
    with pytest.raises(pickle.UnpicklingError, match="Weights only"):
        load_hf(ModelSettings(path=str(folder), dtype="float32"), str(folder), scalar=False, seed=1)
    assert not marker.exists()
    torch.load(folder / "pytorch_model.bin", weights_only=False)  # noqa: TID251  the trap works
    assert marker.exists()


def test_a_config_runs_no_code(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    for tag in ("object/apply:os.mkdir", "object/new:os.mkdir", "name:os.mkdir", "module:os"):
        path.write_text(f"name: !!python/{tag} [{tmp_path / 'it-ran'}]\nmodel: {{path: x}}\n")
        with pytest.raises(ConfigError):
            load_config(path)
    assert not (tmp_path / "it-ran").exists()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_environment_is_not_written_down(tmp_path: Path) -> None:
    """A whole stage with a cluster of its own, with secrets in the environment: neither what it prints nor what lies in the
    run's folder and in the logs of the workers and of Ray holds them."""
    secret = "hunter2-0123456789"
    names = ("HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "MY_REWARD_TOKEN")
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | dict.fromkeys(
        names, secret
    )
    config = write_micro(tmp_path, placement={})
    command = [sys.executable, "-m", "orchestrator.cli", "sft", str(config)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert secret not in done.stdout + done.stderr
    run = tmp_path / "runs" / "micro"
    logs = (run / "logs").resolve()
    files = [path for folder in (run, logs) for path in folder.rglob("*") if path.is_file()]
    assert len([path for path in files if path.is_relative_to(logs)]) > 10
    assert [path for path in files if secret.encode() in path.read_bytes()] == []
