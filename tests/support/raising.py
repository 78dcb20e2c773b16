"""A plugin with a worker that raises a given error. An environment variable makes the import of the plugin fail."""

from __future__ import annotations

import os
import sys
import threading
from typing import Any

import pydantic

from tests.support.apis import RaisingApi
from workers.data.step_inputs import StaleWeights
from workers.process.worker import Worker
from workers.process.worker_process import KINDS

KINDS["raising"] = "tests.support.raising:Raising"

if os.environ.get("TESTS_RAISING") == "broken":
    raise ImportError("the plugin lacks a library\nwhich one might install")


class OfThePlugin(Exception):
    """An exception of a module that the driver may lack."""


class RaisesWhenPickled(Exception):
    """An exception on which Ray's own code for worker exceptions fails."""

    def __reduce__(self) -> Any:
        raise RuntimeError("not to be pickled")


class Shape(pydantic.BaseModel):
    width: int
    source: Any = None


class Raising(Worker, RaisingApi):
    def fail(self, how: str) -> None:
        match how:
            case "lock":
                error = OSError("no model gpt-9 is here\nCheck your internet connection")
                error.lock = threading.Lock()  # type: ignore[attr-defined]
                raise error
            case "pydantic":  # its error holds the invalid input, as with vLLM's configs
                Shape.model_validate({"width": "wide", "source": threading.Lock()})
            case "plugin":
                raise OfThePlugin("first line\nsecond line") from LookupError("its cause")
            case "pickled":
                raise RaisesWhenPickled("of no type that Ray knows")
            case "exit":
                sys.exit("the library gave up")
            case "ours":
                raise StaleWeights("version 3")

    def ping(self) -> int:
        return os.getpid()
