"""The first module of Troupe in every process: from here on Troupe's packages come before other modules of the same names.

Python searches the folders of a user's script, config and job before the place where Troupe is installed, and a file
`workers.py` or a folder `configs` there is nothing unusual. So every process begins with this module, whose name nobody
else uses: the command `troupe`, Ray's actors and tasks, the processes of reward functions, and each of the packages.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
"""The folder that Troupe's packages lie in: site-packages, or a checkout."""
PACKAGES = ("configs", "placement", "workers", "orchestrator")


class OwnPackages:
    """A finder (sys.meta_path) that knows where Troupe's packages are."""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        return PathFinder.find_spec(name, [str(ROOT)]) if name in PACKAGES else None


def main() -> None:
    """The command `troupe`."""
    import_module("orchestrator.cli").app()


def call(path: str, *args: Any) -> Any:
    """Call the function, or make an object of the class, module:name. Run as a Ray task in place of that function: Ray
    imports this module before it unpickles the arguments."""
    module, _, name = path.partition(":")
    return getattr(import_module(module), name)(*args)


class Actor:
    """A Ray actor around an object of the class module:name, for the same reason."""

    def __init__(self, path: str, *args: Any) -> None:
        self._inside = call(path, *args)

    def __repr__(self) -> str:
        """What Ray's dashboard shows."""
        return repr(self._inside)

    def call(self, *args: Any) -> Any:
        return self._inside.call(*args)


def _refuse_foreign() -> None:
    """Raises ImportError where a module of another origin has the name of a package of Troupe already."""
    for name in PACKAGES:
        file = getattr(sys.modules.get(name), "__file__", None)
        if name in sys.modules and (file is None or ROOT / name not in Path(file).resolve().parents):
            raise ImportError(
                f"the module {name} ({file}) has the name of a package of Troupe ({ROOT / name}); rename it"
            )


_refuse_foreign()
sys.meta_path.insert(0, OwnPackages)
