"""The public names of orchestrator and its subpackages: each exists, and costs nothing until it is used."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

FACES = [
    "orchestrator",
    *(f"orchestrator.{name}" for name in ("bench", "console", "evaluation", "preflight", "report", "run", "storage")),
]


@pytest.mark.parametrize("package", FACES)
def test_each_public_name_exists(package: str) -> None:
    module = import_module(package)
    assert module.__all__ == sorted(module.__all__, key=lambda name: (not name.isupper(), not name[0].isupper(), name))
    for name in module.__all__:
        assert getattr(module, name).__module__ if callable(getattr(module, name)) else getattr(module, name)
    with pytest.raises(AttributeError, match=f"module '{package}' has no attribute 'no_such_name'"):
        module.no_such_name  # noqa: B018


@pytest.mark.parametrize("package", FACES)
def test_no_public_name_is_that_of_a_module(package: str) -> None:
    """Python sets a module as an attribute of its package when it is imported: the name would then be the module."""
    module = import_module(package)
    modules = {path.stem for path in Path(str(module.__file__)).parent.glob("*.py")}
    assert modules & set(module.__all__) == set()


def test_a_package_imports_no_module_of_its_own() -> None:
    code = f"import sys, {', '.join(FACES)}; print(*(m for m in sys.modules if m.partition('.')[0] in {{'orchestrator', 'ray'}}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == FACES, done.stderr
