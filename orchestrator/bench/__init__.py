"""`troupe bench`: measures a PPO step, and finds the largest model that fits."""

from typing import TYPE_CHECKING

from troupe.imports import lazy

if TYPE_CHECKING:
    from orchestrator.bench.bench import Benchmark, run_benchmark
    from orchestrator.bench.capacity import memory_of, search_capacity, variants
    from orchestrator.bench.process_memory import MemoryMonitor
    from orchestrator.bench.tables import print_bench

__all__ = ["Benchmark", "MemoryMonitor", "memory_of", "print_bench", "run_benchmark", "search_capacity", "variants"]

__getattr__ = lazy(
    __name__,
    {
        "orchestrator.bench.bench": ("Benchmark", "run_benchmark"),
        "orchestrator.bench.capacity": ("memory_of", "search_capacity", "variants"),
        "orchestrator.bench.process_memory": ("MemoryMonitor",),
        "orchestrator.bench.tables": ("print_bench",),
    },
)
