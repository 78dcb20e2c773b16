"""Files that appear whole or not at all, files that grow by whole lines, and the records of failures."""

from typing import TYPE_CHECKING

from troupe.imports import lazy

if TYPE_CHECKING:
    from orchestrator.storage.atomic_files import (
        DiskError,
        atomic_directory,
        clear_leftovers,
        discard,
        sync,
        verify,
        write_checksums,
        write_json,
        write_text,
        writing,
    )
    from orchestrator.storage.failure_log import FailureLog
    from orchestrator.storage.metrics_file import (
        SAMPLES,
        AppendedFile,
        MetricsError,
        read_lines,
        read_metrics,
        repeatable,
    )

__all__ = [
    "SAMPLES",
    "AppendedFile",
    "DiskError",
    "FailureLog",
    "MetricsError",
    "atomic_directory",
    "clear_leftovers",
    "discard",
    "read_lines",
    "read_metrics",
    "repeatable",
    "sync",
    "verify",
    "write_checksums",
    "write_json",
    "write_text",
    "writing",
]

__getattr__ = lazy(
    __name__,
    {
        "orchestrator.storage.atomic_files": (
            "DiskError",
            "atomic_directory",
            "clear_leftovers",
            "discard",
            "sync",
            "verify",
            "write_checksums",
            "write_json",
            "write_text",
            "writing",
        ),
        "orchestrator.storage.failure_log": ("FailureLog",),
        "orchestrator.storage.metrics_file": (
            "SAMPLES",
            "AppendedFile",
            "MetricsError",
            "read_lines",
            "read_metrics",
            "repeatable",
        ),
    },
)
