"""The first module of Troupe in every process: after it, Python finds Troupe's packages before other modules of the same names.

Python searches the folders of a user's script, config and job before the folder where Troupe is installed, and users often
have a file `workers.py` or a folder `configs` there. So every process imports this module first, because its name is unique:
the command `troupe`, Ray's actors and tasks, the processes of reward functions, and each of the packages.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
"""The folder that contains Troupe's packages: site-packages, or a checkout."""
PACKAGES = ("configs", "placement", "workers", "orchestrator")


class OwnPackages:
    """A finder (sys.meta_path) for Troupe's packages."""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        return PathFinder.find_spec(name, [str(ROOT)]) if name in PACKAGES else None


def lazy(package: str, modules: Mapping[str, Sequence[str]]) -> Callable[[str], Any]:
    """The `__getattr__` of a package: imports a module at the first use of one of its names, so the package itself loads fast.

    modules: module -> the names that it defines. A name must not equal a module of the package: Python sets an imported module
    as an attribute of the package.
    """
    homes = {name: module for module, names in modules.items() for name in names}

    def getattr_(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(homes[name]), name)

    return getattr_


def main() -> None:
    """The command `troupe`."""
    import_module("orchestrator.cli").app()


def call(path: str, *args: Any) -> Any:
    """Call the function or class named module:name. Used as the Ray task instead of that function, so that Ray imports this
    module before it unpickles the arguments."""
    module, _, name = path.partition(":")
    return getattr(import_module(module), name)(*args)


class Actor:
    """A Ray actor that wraps an object of the class module:name, for the same reason as `call`."""

    _wrapped: Any = None  # if the object cannot be made: Ray asks for the name all the same, to report the error

    def __init__(self, path: str, *args: Any) -> None:
        self._wrapped = call(path, *args)

    def __repr__(self) -> str:
        """The name in Ray's dashboard."""
        return repr(self._wrapped)

    def call(self, *args: Any) -> Any:
        return self._wrapped.call(*args)


def _reject_foreign() -> None:
    """Raises ImportError if a foreign module with the name of one of Troupe's packages was imported before."""
    for name in PACKAGES:
        file = getattr(sys.modules.get(name), "__file__", None)
        if name in sys.modules and (file is None or ROOT / name not in Path(file).resolve().parents):
            raise ImportError(
                f"the module {name} ({file}) has the name of a package of Troupe ({ROOT / name}); rename it"
            )


_reject_foreign()
sys.meta_path.insert(0, OwnPackages)
