"""A cluster's nodes with their cores, GPUs and memory, read from a text, from Ray or from this machine.

Memory is counted in GB of 2**30 bytes, as GPU makers count it.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Self

GPU_NODES = re.compile(r"(\d+)x(\d+)x([A-Za-z]\w*(?:-[A-Za-z]\w*)*)(?:-(\d+(?:\.\d+)?)(GB|TB))?")
CPU_NODES = re.compile(r"(\d+)x(\d+(?:\.\d+)?)cpus?")
MEMORY = re.compile(r"(\d+(?:\.\d+)?)(GB|TB)")
GB_IN = {"GB": 1.0, "TB": 1024.0}
CPUS_PER_GPU = 8
"""Cores assumed for each GPU where a text has no `cpus=`."""

FORMS = "NODESxGPUSxTYPE[-MEMORY] such as 4x8xA100-80GB, or NODESxCORES of CPU such as 2x16cpu; then ,cpus=96 ,host=1TB"


@dataclass(frozen=True)
class Node:
    """One machine. All its GPUs are of one type. Memory in GB of 2**30 bytes, None where unknown."""

    cpus: float
    gpus: int = 0
    gpu: str | None = None
    gpu_memory_gb: float | None = None
    host_memory_gb: float | None = None
    name: str = "node-0"

    def describe(self) -> str:
        parts = [f"{self.cpus:g} CPU cores"]
        if self.gpus:
            memory = f" {self.gpu_memory_gb:g}GB" if self.gpu_memory_gb else ""
            parts.insert(0, f"{self.gpus} {self.gpu or 'GPU'}{memory}")
        if self.host_memory_gb:
            parts.append(f"{self.host_memory_gb:g} GB of memory")
        return ", ".join(parts)


@dataclass(frozen=True)
class Cluster:
    """Nodes to place workers on; `note` states what was assumed about them."""

    nodes: tuple[Node, ...]
    note: str = ""

    @property
    def cpus(self) -> float:
        return sum(node.cpus for node in self.nodes)

    @property
    def gpus(self) -> int:
        return sum(node.gpus for node in self.nodes)

    def describe(self) -> str:
        """Equal nodes are listed once: `4 nodes with 8 A100 80GB, 64 CPU cores`."""
        kinds = Counter(node.describe() for node in self.nodes)
        return "; ".join(f"{count} node{'s' if count > 1 else ''} with {kind}" for kind, count in kinds.items())

    @classmethod
    def parse(cls, text: str) -> Self:
        """A cluster from its description; it need not exist.

        Args:
            text: `4x8xA100-80GB` (nodes x GPUs x type-memory) or `2x16cpu` (nodes x cores), then `,cpus=96`
                (cores of a node) and `,host=1TB` (memory of a node).

        Raises:
            ValueError: the text has neither form; the message names the wrong part.
        """
        shape, *options = (part.strip() for part in text.split(","))
        count, node, note = _nodes(text, shape)
        given: set[str] = set()
        for option in options:
            name, _, value = option.partition("=")
            if name in given:
                raise ValueError(f"cluster {text!r}: {name}= is given twice")
            given.add(name)
            if name == "cpus" and node.gpus and re.fullmatch(r"\d+(\.\d+)?", value) and float(value) > 0:
                node, note = replace(node, cpus=float(value)), ""
            elif name == "host" and (memory := MEMORY.fullmatch(value)):
                node = replace(node, host_memory_gb=float(memory[1]) * GB_IN[memory[2]])
            else:
                raise ValueError(f"cluster {text!r}: cannot read {option!r}; it may be {FORMS}")
        return cls(tuple(replace(node, name=f"node-{index}") for index in range(count)), note)

    @classmethod
    def of_ray(cls) -> Self:
        """The alive nodes of the connected Ray cluster, with all their resources, free or not."""
        import ray  # imported only here: a plan for a described cluster needs no Ray

        alive = sorted((node for node in ray.nodes() if node["Alive"]), key=lambda node: str(node["NodeID"]))
        hosts = Counter(node["NodeName"] for node in alive)
        return cls(tuple(_ray_node(node, unique=hosts[node["NodeName"]] == 1) for node in alive))

    @classmethod
    def of_new_ray(cls) -> Self:
        """This machine, counted as a Ray cluster that `ray.init` starts on it."""
        from ray._private.resource_and_label_spec import ResourceAndLabelSpec

        spec = ResourceAndLabelSpec().resolve(is_head=True, node_ip_address="127.0.0.1")
        return cls((_ray_node({"Resources": spec.to_resource_dict(), "NodeName": os.uname().nodename}, unique=True),))

    @classmethod
    def this_machine(cls) -> Self:
        """This machine alone: the cores that this process may use and the GPUs that it can see."""
        gpus = list(_visible_gpus())
        host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
        name, memory = gpus[0] if gpus else (None, None)
        node = Node(float(len(os.sched_getaffinity(0))), len(gpus), name, memory, round(host, 1), os.uname().nodename)
        return cls((node,))


def _nodes(text: str, shape: str) -> tuple[int, Node, str]:
    """The number of nodes, one of them, and a note on what was assumed."""
    if cores := CPU_NODES.fullmatch(shape):
        count, node, note = int(cores[1]), Node(float(cores[2])), ""
    elif (gpus := GPU_NODES.fullmatch(shape)) and gpus[3].lower() not in ("cpu", "cpus"):
        memory = float(gpus[4]) * GB_IN[gpus[5]] if gpus[4] else None
        count, node = int(gpus[1]), Node(float(CPUS_PER_GPU * int(gpus[2])), int(gpus[2]), gpus[3], memory)
        note = f"{CPUS_PER_GPU} CPU cores per GPU are assumed; append ,cpus=N to set them"
    else:
        raise ValueError(f"cluster {text!r}: cannot read {shape!r}; it may be {FORMS}")
    if not count or not node.cpus or node.gpu_memory_gb == 0:
        raise ValueError(f"cluster {text!r}: every number must be at least 1")
    return count, node, note


def _ray_node(node: dict[str, Any], unique: bool) -> Node:
    """One entry of ray.nodes(). The memory is what Ray manages: memory of workers and of the object store."""
    resources: dict[str, float] = node["Resources"]
    types = sorted(key.partition(":")[2] for key in resources if key.startswith("accelerator_type:"))
    gigabytes = re.search(r"-(\d+)GB?$", types[-1]) if types else None
    memory = (resources.get("memory", 0.0) + resources.get("object_store_memory", 0.0)) / 2**30
    return Node(
        cpus=resources.get("CPU", 0.0),
        gpus=int(resources.get("GPU", 0)),
        gpu=types[0] if types else None,
        gpu_memory_gb=float(gigabytes[1]) if gigabytes else None,
        host_memory_gb=round(memory, 1),
        name=node["NodeName"] if unique else f"{node['NodeName']}/{node['NodeID'][:6]}",
    )


def _visible_gpus() -> Iterator[tuple[str, float]]:
    """(name, memory in GB) of each GPU that nvidia-smi lists and CUDA_VISIBLE_DEVICES leaves visible."""
    if shutil.which("nvidia-smi") is None:
        return
    query = ["nvidia-smi", "--query-gpu=index,uuid,name,memory.total", "--format=csv,noheader,nounits"]
    listed = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    for line in listed.splitlines():
        index, uuid, name, mebibytes = (field.strip() for field in line.split(","))
        if visible is None or index in visible.split(",") or uuid in visible.split(","):
            yield name, round(float(mebibytes) / 1024, 1)
