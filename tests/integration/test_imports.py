"""A user's folder with modules named like Troupe's: in the driver, in the processes of reward functions, in processes of vLLM.
Ray's actors are in tests/integration/test_job.py."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.runs import ROOT

OURS = ("configs", "placement", "workers", "orchestrator")


@pytest.fixture
def theirs(tmp_path: Path) -> Path:
    """A folder with broken modules named like Troupe's packages, and some modules of its own."""
    for name in OURS:
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise RuntimeError('not of Troupe')\n")
    for name in ("tests", "examples"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").touch()
        (tmp_path / name / "mine.py").write_text("def f(prompts, answers, **columns): return [0.5 for _ in answers]\n")
    return tmp_path


def python(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run code in a folder that is first in the module search path; Troupe is installed further down."""
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=env, capture_output=True, text=True, timeout=120
    )


def test_troupes_packages_come_first_and_theirs_before_the_rest(theirs: Path) -> None:
    code = f"""
import troupe.imports, importlib, examples.mine, tests.mine
for name in {OURS}:
    print(name, importlib.import_module(name).__file__)
print(tests.mine.__file__, examples.mine.__file__)
"""
    done = python(code, theirs)
    wanted = [f"{name} {ROOT}/{name}/__init__.py" for name in OURS]
    assert done.stdout.splitlines() == [*wanted, f"{theirs}/tests/mine.py {theirs}/examples/mine.py"], done.stderr


def test_a_reward_function_of_theirs_runs(theirs: Path) -> None:
    code = """
import troupe.imports
from configs.schema import FunctionReward
from workers.rewards.function_process import FunctionProcess
settings = FunctionReward(kind="function", name="mine", function="tests.mine:f")
process = FunctionProcess(settings, "ppo.rewards.0", [])
process.wait_ready()
print(process.score(["a"], ["b"], {}).values)
process.close()
"""
    done = python(code, theirs)
    assert done.stdout == "[0.5]\n", done.stderr


@pytest.mark.parametrize("package", ["orchestrator", "placement"])
def test_each_package_finds_the_others(theirs: Path, package: str) -> None:
    """A program in another folder that imports either package first."""
    code = f"import sys, {package}; sys.path.insert(0, {str(theirs)!r}); import configs, placement, workers.process.state_files"
    done = python(code, theirs.parent)
    assert done.returncode == 0, done.stderr


def test_a_module_command_is_troupes(theirs: Path) -> None:
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "troupe", "config", "ppo.kl.estimator"]
    done = subprocess.run(command, cwd=theirs, env=env, capture_output=True, text=True, timeout=120)
    assert done.stdout.startswith("ppo.kl.estimator"), done.stderr


@pytest.mark.slow
def test_a_process_that_vllm_spawns_finds_the_extension(theirs: Path) -> None:
    code = "from vllm.utils.import_utils import resolve_obj_by_qualname as r; print(r('troupe.vllm.WeightVerifier').__module__)"
    done = python(code, theirs)
    assert done.stdout.splitlines()[-1] == "workers.weight_sync.receivers", done.stderr


def test_a_module_that_is_there_already_is_named(theirs: Path) -> None:
    (theirs / "workers" / "__init__.py").write_text("")
    done = python("import workers, troupe.imports", theirs)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        f"ImportError: the module workers ({theirs}/workers/__init__.py) has the name of a package of Troupe ({ROOT}/workers); "
        "rename it"
    )
