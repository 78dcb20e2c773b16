"""Metrics of a running stage on Ray's metrics port, for Prometheus.

orchestrator.loggers.ray_table maps recorded metrics and worker events to names. Ray puts `ray_` before the names. Every metric
has the labels `run` and `stage`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from threading import Lock
from typing import Any

from configs.schema import RayMetricsSettings, Role
from orchestrator.loggers.base import LoggedStage, Logger
from orchestrator.loggers.ray_table import Row, row_of
from orchestrator.periodic import Repeating
from placement.stages import STAGES

SECONDS = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0, 500.0, 1000.0, 2500.0)
"""Upper bounds of the buckets of a histogram."""
_OF_ROLE = ("lr", "grad_norm", "skipped")


class RayMetrics(Logger):
    """Shows a stage's metrics on the metrics port until `close`; does nothing if Ray is not initialised.

    Gauges show the latest finite values. Counters and histograms start at 0 with the driver's process.
    """

    Config = RayMetricsSettings

    def __init__(self, config: RayMetricsSettings, stage: LoggedStage) -> None:
        super().__init__(config, stage)
        self._labels = {"run": stage.run, "stage": stage.name}
        self._metrics: dict[str, Any] = {}
        self._lock = Lock()
        self._gauges: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
        self._refreshing: Repeating | None = None
        self._restarts: Counter[str] = Counter()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show the metrics of a step. A gauge is not on the port while it has no finite value."""
        self._show({"step": float(step), **self._named(metrics)})

    def failed(self, role: str, kind: str) -> None:
        """Count a call that failed."""
        self._show({f"failures/{role}/{kind}": 1.0})

    def spent(self, seconds: Mapping[tuple[Role, str], float]) -> None:
        """Count seconds of calls: (role, method) -> seconds."""
        self._show({f"role_seconds/{role}/{method}": value for (role, method), value in seconds.items()})

    def workers(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Count restarts. rows: role and restarts so far of every worker of the team."""
        now: Counter[str] = Counter()
        for row in rows:
            now[row["role"]] += row["restarts"]
        new = now - self._restarts  # a new team counts from 0 again
        self._restarts = now
        self._show({f"restarts/{role}": float(count) for role, count in new.items()})

    def close(self) -> None:
        """Remove the gauges from the port: their values are no longer current."""
        if self._refreshing is not None:
            self._refreshing.stop()
        with self._lock:
            for name, labels in self._gauges:
                self._metrics[name].set(math.nan, tags=dict(labels))
            self._gauges.clear()

    def _named(self, values: Mapping[str, float]) -> dict[str, float]:
        trained = STAGES[self.stage.name].trained
        role = trained[0] if len(trained) == 1 else None  # then the recorded name is without the role
        return {f"{name}/{role}" if role and name in _OF_ROLE else name: value for name, value in values.items()}

    def _show(self, values: Mapping[str, float]) -> None:
        import ray  # the import takes half a second; readers of metrics.jsonl do not need it

        if not ray.is_initialized():
            return
        if self._refreshing is None:
            # Ray removes a gauge that was not set during two of its reports.
            self._refreshing = Repeating(self._refresh, max(ray._config.metrics_report_interval_ms() / 1000, 1.0) / 2)
        with self._lock:
            for metric, value in values.items():
                row, labels = row_of(metric, values)
                self._set(row, {**self._labels, **labels}, value * row.scale)

    def _set(self, row: Row, labels: dict[str, str], value: float) -> None:
        if row.name not in self._metrics:
            self._metrics[row.name] = _make_metric(row)
        metric, key = self._metrics[row.name], (row.name, tuple(labels.items()))
        if row.kind == "gauge":
            if math.isfinite(value):
                self._gauges[key] = value
            else:
                self._gauges.pop(key, None)
            metric.set(value, tags=labels)
        elif row.kind == "counter" and 0.0 < value < math.inf:
            metric.inc(value, tags=labels)
        elif row.kind == "histogram" and math.isfinite(value):
            metric.observe(value, tags=labels)

    def _refresh(self) -> None:
        with self._lock:
            for (name, labels), value in self._gauges.items():
                self._metrics[name].set(value, tags=dict(labels))


def _make_metric(row: Row) -> Any:
    from ray.util import metrics

    if row.kind == "histogram":
        return metrics.Histogram(row.name, row.help, boundaries=list(SECONDS), tag_keys=row.labels)
    return {"gauge": metrics.Gauge, "counter": metrics.Counter}[row.kind](row.name, row.help, tag_keys=row.labels)
